//! `Revocation`: who has enforced it, who has not, and what is told to whom.

use super::*;
use crate::revocations::{enforced_for, enforced_key, for_peers, in_force, record_key};
use crate::{import, records};

fn revocation(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "Revocation", "metadata": { "name": name }, "spec": spec,
    })
}

const CART: &str = "spiffe://acme.example/cluster/east/ns/shop/sa/cart";

/// East has two sidecars, `cart` (block 1) and `web` (block 2), and is linked with west; cart is revoked.
fn revoked() -> Facts {
    let mut facts = east();
    facts.link("west");
    facts.import("west");
    facts.sidecar(1, "/ns/shop/sa/cart", &[]);
    facts.sidecar(2, "/ns/shop/sa/web", &[]);
    facts.apply(revocation("cart", json!({ "spiffeId": CART })));
    facts
}

fn name(facts: &Facts) -> String {
    in_force(facts)[0].name.clone()
}

fn told(facts: &mut Facts, block: u32, name: &str) {
    let enforcement = v1::Enforcement { revocation: name.to_owned(), at_unix_ms: 1_795_486_505_000 };
    facts.report(block, v1::StatusReport { enforcements: vec![enforcement], ..Default::default() });
}

fn told_by_west(facts: &mut Facts, name: &str, pending: &[&str]) {
    let record = v1::EnforcedRecord {
        revocation: name.to_owned(),
        pending: pending.iter().map(ToString::to_string).collect(),
        enforced: 2 - pending.len() as u32,
        members: 2,
        last_unix_ms: 1_795_486_506_000,
    };
    facts.import("west").enforced.insert(enforced_key(name), record);
}

#[test]
fn a_revocation_is_enforced_once_all_have_said_so_and_names_who_has_not() {
    let mut facts = revoked();
    let name = name(&facts);
    let shown = |facts: &Facts| get_one(facts, "revocation", "cart");
    assert_condition(
        "nobody",
        &shown(&facts),
        "Enforced",
        "False Pending",
        &["federator", "sa/web", "west: its federator has not answered"],
    );
    assert!(!condition(&shown(&facts), "Enforced").contains("sa/cart"), "who is revoked is not asked");

    facts.registry.step(Event::OwnEnforced([(name.clone(), 1)].into()), NOW, UNIX);
    told(&mut facts, 2, &name);
    told_by_west(&mut facts, &name, &["spiffe://acme.example/cluster/west/ns/shop/sa/api"]);
    assert_condition("west is late", &shown(&facts), "Enforced", "False Pending", &["west:", "sa/api"]);
    assert!(!condition(&shown(&facts), "Enforced").contains("east"));

    told_by_west(&mut facts, &name, &[]);
    assert_condition("all", &shown(&facts), "Enforced", "True Enforced", &["all 4", "2 cluster(s)"]);
    let clusters = shown(&facts).pointer("/status/clusters").cloned().unwrap();
    assert_eq!(clusters[0]["lastEnforced"], "2026-11-24T02:15:05Z");
    assert_eq!((&clusters[1]["cluster"], &clusters[1]["enforced"]), (&json!("west"), &json!(2)));

    // One that is not connected is waited for, and named as such.
    facts.sidecar(3, "/ns/shop/sa/late", &[]);
    facts.close(3);
    assert_condition("absent", &shown(&facts), "Enforced", "False Pending", &["sa/late (not connected)"]);
}

#[test]
fn what_was_enforced_before_a_change_says_nothing_about_the_new_one() {
    let mut facts = revoked();
    let before = name(&facts);
    told(&mut facts, 2, &before);
    let key = facts.objects.keys().next().cloned().unwrap();
    let mut stored = (**facts.objects.get(&key).unwrap()).clone();
    stored.generation += 1;
    facts.objects.insert(key, Arc::new(stored));
    assert_ne!(name(&facts), before);
    assert_condition(
        "again",
        &get_one(&facts, "revocation", "cart"),
        "Enforced",
        "False Pending",
        &["sa/web"],
    );
}

#[test]
fn own_identities_are_revoked_everywhere_and_others_here_alone() {
    let mut facts = revoked();
    facts.apply(revocation("all-of-west", json!({ "cluster": "west" })));
    let to_west: Vec<&str> = for_peers(&facts).map(|(object, _)| object).collect();
    assert_eq!(to_west, ["cart"]);
    assert_eq!(in_force(&facts).len(), 2);
    let records = records::records(&facts, &cluster("west"));
    assert!(records.contains_key(&record_key("cart")) && !records.contains_key(&record_key("all-of-west")));
    // That link's other side enforces nothing of it.
    let shown = get_one(&facts, "revocation", "all-of-west");
    assert_eq!(shown.pointer("/status/clusters").and_then(Value::as_array).map(Vec::len), Some(1));

    // The own cluster as a whole: for the others, since members would refuse the federator that can take it back.
    facts.apply(revocation("ourselves", json!({ "cluster": "east" })));
    assert_eq!((in_force(&facts).len(), for_peers(&facts).count()), (2, 2));
    let shown = get_one(&facts, "revocation", "ourselves");
    assert_condition("west alone", &shown, "Enforced", "False Pending", &["by west: its federator"]);
}

#[test]
fn a_peers_word_is_believed_about_its_own_identities_alone_and_answered() {
    let mut facts = revoked();
    let scope = import::PeerScope::of(&facts, &cluster("west"), std::time::Duration::ZERO);
    let record = |name: &str, of: &str, id: &str| v1::Record {
        key: record_key("api"),
        value: Some(v1::record::Value::Revocation(v1::Revocation {
            name: name.into(),
            cluster: of.into(),
            target: Some(v1::revocation::Target::SpiffeId(id.into())),
            reason: String::new(),
        })),
    };
    let api = "spiffe://acme.example/cluster/west/ns/shop/sa/api";
    let bad = [
        (record("west/api@1.1", "east", CART), "revocation.cluster"),
        (record("west/api@1.1", "west", CART), "revocations.spiffe_id"),
        (record("east/api@1.1", "west", api), "revocation.name"),
        (record("west/other@1.1", "west", api), "record.key"),
    ];
    for (record, field) in bad {
        let import = facts.import("west");
        import::put(import, &scope, &record);
        assert!(import.revocations.is_empty(), "{field}");
        assert!(import.rejected[&record.key].contains(field), "{field}: {:?}", import.rejected);
    }
    import::put(facts.import("west"), &scope, &record("west/api@1.1", "west", api));
    assert_eq!(in_force(&facts).len(), 2);
    let answer: Vec<v1::EnforcedRecord> = enforced_for(&facts, &cluster("west")).collect();
    assert_eq!((answer.len(), answer[0].members, answer[0].enforced), (1, 3, 0));
    import::remove(facts.import("west"), &record_key("api"));
    assert_eq!(in_force(&facts).len(), 1);
}

#[test]
fn peers_can_not_fill_the_snapshots_of_others() {
    let mut facts = revoked();
    for peer in 0..20 {
        let peer = format!("peer-{peer:02}");
        facts.link(&peer);
        let scope = import::PeerScope::of(&facts, &cluster(&peer), std::time::Duration::ZERO);
        let import = facts.import(&peer);
        for number in 0..300 {
            let path = format!("{}{number}", "x".repeat(1900));
            let id = format!("spiffe://acme.example/cluster/{peer}/ns/shop/sa/{path}");
            let object = format!("r{number}");
            let revocation = v1::Revocation {
                name: format!("{peer}/{object}@1.1"),
                cluster: peer.clone(),
                target: Some(v1::revocation::Target::SpiffeId(id)),
                reason: String::new(),
            };
            let value = Some(v1::record::Value::Revocation(revocation));
            import::put(import, &scope, &v1::Record { key: record_key(&object), value });
        }
        let refused = import.rejected.values().next().unwrap();
        assert!(refused.contains("bytes of them"), "{refused}");
        assert!((100..200).contains(&import.revocations.len()), "{}", import.revocations.len());
    }
    let held = in_force(&facts);
    let bytes: usize = held.iter().map(prost::Message::encoded_len).sum();
    assert!(bytes <= 2 * 1024 * 1024, "{bytes}");
    assert!(held[0].name.starts_with("east/cart@"), "the own ones come first");
}
