use super::*;

const DAY: u64 = 86_400;
const START: u64 = 1_800_000_000;

fn names() -> Vec<String> {
    vec!["tombolo-webhook.tombolo-system.svc".to_owned()]
}

fn at(unix: u64) -> Duration {
    Duration::from_secs(unix)
}

fn done(stored: &Stored, expected: Step, unix: u64, trusted: bool) -> Stored {
    assert_eq!(stored.step(&names(), unix, trusted), expected);
    let after = stored.after(expected, &names(), at(unix)).unwrap();
    // As the next replica reads it.
    let annotations = BTreeMap::from([
        (ROTATE.to_owned(), stored.rotate.clone()),
        (ROTATED.to_owned(), after.rotated().to_owned()),
    ]);
    let again = Stored::read(&after.data(), &annotations);
    assert!(again == after, "it is read as it was written");
    again
}

fn waits(stored: &Stored, unix: u64, trusted: bool) -> u64 {
    match stored.step(&names(), unix, trusted) {
        Step::Wait { until } => until - unix,
        other => panic!("{other:?}"),
    }
}

fn leaf(stored: &Stored) -> &str {
    &stored.current.as_ref().unwrap().certificate
}

#[test]
fn a_new_certificate_is_trusted_before_it_is_shown_and_the_old_one_after_it() {
    let first = done(&Stored::default(), Step::Issue, START, false);
    assert_eq!(waits(&first, START, true), 60 * DAY);
    let due = START + 60 * DAY;
    let prepared = done(&first, Step::Prepare, due, true);
    assert_eq!(leaf(&prepared), leaf(&first));
    let old_and_new = prepared.bundle();
    assert!(old_and_new.contains(&first.bundle()) && old_and_new.len() > first.bundle().len());
    assert_eq!(waits(&prepared, due, true), SETTLES.as_secs());
    assert_eq!(waits(&prepared, due + 20, false), 60, "nobody trusts it yet");
    let promoted = done(&prepared, Step::Promote, due + 20, true);
    assert_ne!(leaf(&promoted), leaf(&first));
    assert_eq!(
        promoted.bundle().len(),
        old_and_new.len(),
        "those who hear of it later still show the old one"
    );
    assert!(promoted.bundle().contains(&first.bundle()));
    let again = done(&promoted, Step::Prepare, due + 60 * DAY, true);
    let again = done(&again, Step::Promote, due + 60 * DAY + 20, true);
    assert!(!again.bundle().contains(&first.bundle()) && again.bundle().len() == old_and_new.len());
}

#[test]
fn whoever_asks_has_it_rotated_once() {
    let mut stored = done(&Stored::default(), Step::Issue, START, false);
    stored.rotate = "today".into();
    let prepared = done(&stored, Step::Prepare, START + 5, true);
    let promoted = done(&prepared, Step::Promote, START + 60, true);
    assert!(waits(&promoted, START + 60, true) > DAY, "not again");
}

#[test]
fn what_is_of_no_use_is_replaced_at_once() {
    let first = done(&Stored::default(), Step::Issue, START, false);
    let end = START + LIFE.as_secs();
    done(&first, Step::Issue, end, true);
    let other = vec!["tombolo-webhook.elsewhere.svc".to_owned()];
    assert_eq!(first.step(&other, START, true), Step::Issue, "the federator has moved");
    let prepared = done(&first, Step::Prepare, START + 80 * DAY, true);
    done(&prepared, Step::Promote, end, false);
    for damaged in ["tls.crt", "tls.key", "ca.crt"] {
        let mut data = first.data();
        data.insert(damaged.to_owned(), ByteString(b"\xff".to_vec()));
        assert_eq!(
            Stored::read(&data, &BTreeMap::new()).step(&names(), START, true),
            Step::Issue,
            "{damaged}"
        );
    }
}
