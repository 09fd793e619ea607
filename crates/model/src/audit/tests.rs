//! The chain: what holds, and how every kind of tampering is named.

use proptest::prelude::*;

use super::*;

fn chain(length: u64) -> Vec<Entry> {
    let mut head = Link::genesis();
    (0..length)
        .map(|n| {
            let event = Event {
                token: format!("t{n}"),
                requester: Requester::operator(Some(1000)),
                ..Event::done(Action::Token, format!("spiffe://acme.example/cluster/east/vm/db-{n}"))
            };
            let entry = Entry::after(&head, "east", format!("2026-11-24T02:15:0{}.000Z", n % 10), event);
            head = entry.link();
            entry
        })
        .collect()
}

fn check(entries: &[Entry]) -> Result<Verifier, Broken> {
    let mut verifier = Verifier::new(None, None);
    entries.iter().try_for_each(|entry| verifier.push(entry))?;
    Ok(verifier)
}

#[test]
fn the_hash_is_the_documented_one() {
    // Computed with Python's hashlib from the header of this module: other programs can check the chain.
    let entry = chain(1).remove(0);
    assert_eq!(entry.hash, "80611f1c4d5b03506169db4f1bb6c5c85ea827c2595a2164681c8f172e902bea");
}

#[test]
fn a_chain_holds_whole_from_an_anchor_and_from_its_middle() {
    let entries = chain(8);
    let whole = check(&entries).unwrap();
    assert_eq!((whole.entries(), whole.first(), whole.head().unwrap().sequence), (8, Some(1), 8));
    assert_eq!(check(&entries[3..]).unwrap().first(), Some(4));
    let mut anchored = Verifier::new(Some(entries[2].link()), Some(entries[2].hash.clone()));
    entries[3..].iter().try_for_each(|entry| anchored.push(entry)).unwrap();
    assert_eq!(anchored.noted_at(), Some(3), "what was pruned last may be the noted one");
    let other = Link { hash: "ab".repeat(32), ..entries[2].link() };
    assert!(matches!(
        Verifier::new(Some(other), None).push(&entries[3]),
        Err(Broken::Unlinked { sequence: 4, before: 3, .. })
    ));
}

#[test]
fn what_was_altered_removed_swapped_or_inserted_is_named() {
    let good = chain(6);
    type Harm = fn(&mut Vec<Entry>);
    let cases: &[(&str, Harm, &str)] = &[
        ("altered", |c| c[2].reason = "other".into(), "entry 3 is not as it was written"),
        ("requester", |c| c[2].requester.uid = None, "entry 3 is not as it was written"),
        ("count", |c| c[2].count = 2, "entry 3 is not as it was written"),
        (
            "rehashed",
            |c| {
                c[2].reason = "other".into();
                c[2].hash = c[2].digest();
            },
            "entry 4 does not continue entry 3",
        ),
        ("removed", |c| drop(c.remove(2)), "entry 4 follows entry 2: one is missing"),
        ("two removed", |c| drop(c.drain(2..4)), "entry 5 follows entry 2: 2 are missing"),
        ("swapped", |c| c.swap(2, 3), "entry 4 follows entry 2"),
        ("doubled", |c| c.insert(2, c[1].clone()), "entry 2 follows entry 2: the order is wrong"),
        (
            "moved text",
            |c| {
                c[2].token = format!("{}{}", c[2].subject, c[2].token);
                c[2].subject.clear();
            },
            "entry 3 is not as it was written",
        ),
        ("a false first", |c| c[0].previous = "00".into(), "entry 1 is not as it was written"),
    ];
    for (case, harm, words) in cases {
        let mut entries = good.clone();
        harm(&mut entries);
        let broken = check(&entries).expect_err(case).to_string();
        assert!(broken.contains(words), "{case}: {broken}");
    }
}

#[test]
fn a_chain_that_was_made_anew_does_not_hold_a_noted_head() {
    let noted = chain(6)[3].hash.clone();
    let mut verifier = Verifier::new(None, Some(noted.to_uppercase()));
    chain(6).iter().try_for_each(|entry| verifier.push(entry)).unwrap();
    assert_eq!(verifier.noted_at(), Some(4));
    let mut anew = Verifier::new(None, Some(noted));
    let mut head = Link::genesis();
    for _ in 0..6 {
        let entry = Entry::after(&head, "east", String::new(), Event::done(Action::Join, "x"));
        anew.push(&entry).unwrap();
        head = entry.link();
    }
    assert_eq!(anew.noted_at(), None);
}

#[test]
fn an_unknown_field_does_not_read_because_no_hash_covers_it() {
    let mut json = serde_json::to_value(&chain(1)[0]).unwrap();
    assert_eq!(serde_json::from_value::<Entry>(json.clone()).unwrap(), chain(1)[0]);
    json["approvedBy"] = "nobody".into();
    assert!(serde_json::from_value::<Entry>(json).unwrap_err().to_string().contains("approvedBy"));
}

#[test]
fn every_action_has_a_name_that_reads_back() {
    for action in Action::ALL {
        assert_eq!(action.as_str().parse(), Ok(action));
        assert_eq!(serde_json::to_value(action).unwrap(), action.as_str());
    }
    assert!("issue".parse::<Action>().unwrap_err().contains("own-svid"));
}

proptest! {
    #[test]
    fn no_two_entries_of_different_content_have_one_hash(a in ".{0,8}", b in ".{0,8}", c in ".{0,8}", d in ".{0,8}") {
        let entry = |subject: &str, reason: &str| {
            let event = Event::refused(Action::Join, subject, reason);
            Entry::after(&Link::genesis(), "east", String::new(), event).hash
        };
        prop_assert_eq!(entry(&a, &b) == entry(&c, &d), (&a, &b) == (&c, &d));
    }
}
