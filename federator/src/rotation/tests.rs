//! Who counts as holding and showing, and whose word is passed on, from hand-built facts of a cluster `east`.

use std::sync::Arc;

use super::*;
use crate::view::tests::{Fill, UNIX, cluster, east};

fn held(sequence: u64, issuer: u8, issued_unix: i64) -> v1::StatusReport {
    let trust = v1::TrustHeld { sequence, issuer_sha256: vec![issuer; 32], issued_unix };
    v1::StatusReport { trust: Some(trust), ..Default::default() }
}

/// A federator in order, and two sidecars.
fn shop() -> Facts {
    let mut facts = east();
    for (block, path) in [(1, "/ns/shop/sa/web"), (2, "/ns/shop/sa/api")] {
        facts.sidecar(block, path, &[]);
    }
    facts.registry.own_trust = HeldTrust { sequence: 1, issuer_sha256: [1; 32], issued_unix: 0 };
    facts
}

fn counts(facts: &Facts) -> (u32, u32, u32, Vec<String>) {
    let progress = own_progress(facts);
    (progress.members, progress.holding, progress.showing, progress.pending)
}

#[test]
fn everybody_counts_who_could_be_cut_off_and_whoever_has_not_said_so_is_named() {
    let mut facts = shop();
    let named = |facts: &Facts| counts(facts).3.join(" ");
    assert_eq!(counts(&facts).0, 3);
    assert!(named(&facts).contains("sa/web") && named(&facts).contains("sa/api"));
    facts.report(1, held(1, 1, 0));
    facts.report(2, held(1, 1, 0));
    assert_eq!(counts(&facts), (3, 3, 3, Vec::new()));
    // Another bundle, another issuer, an older leaf than wanted: each by itself.
    for (report, holding, showing) in [(held(2, 1, 0), 2, 3), (held(1, 9, 0), 3, 2)] {
        facts.report(2, report);
        let (members, holds, shows, pending) = counts(&facts);
        assert_eq!((members, holds, shows, pending.len()), (3, holding, showing, 1));
    }
    facts.report(2, held(1, 1, 9));
    Arc::get_mut(&mut facts.trust).unwrap().leaves_after = 5;
    assert_eq!(counts(&facts).2, 1, "the federator's and web's leaves are older");
    // One that says nothing of it, as an older version does not, never counts as done.
    facts.report(2, v1::StatusReport { trust: Some(v1::TrustHeld::default()), ..Default::default() });
    assert_eq!(counts(&facts).1, 2);
}

#[test]
fn the_absent_are_waited_for_and_those_that_said_farewell_are_not() {
    let mut facts = shop();
    facts.report(1, held(1, 1, 0));
    facts.report(2, held(0, 0, 0));
    let block = tombolo_model::ids::Block::new(2).unwrap();
    facts.registry.members.get_mut(&block).unwrap().presence = Presence::Silent;
    assert!(counts(&facts).3[0].ends_with("(not connected)"), "{:?}", counts(&facts));
    facts.report(2, v1::StatusReport { leaving: true, ..Default::default() });
    assert_eq!(counts(&facts), (2, 2, 2, Vec::new()));
}

#[test]
fn at_most_twenty_are_named_and_all_are_counted() {
    let mut facts = east();
    for block in 1..=50 {
        facts.sidecar(block, &format!("/ns/shop/sa/{}", "x".repeat(300)), &[]);
    }
    let (members, holding, _, pending) = counts(&facts);
    assert_eq!((members, holding, pending.len()), (51, 0, 20));
    assert!(pending.iter().all(|name| name.len() <= 220));
}

#[test]
fn renewals_are_spread_by_the_number_of_those_who_renew() {
    let mut facts = east();
    assert_eq!(renewal(&facts, Duration::from_secs(UNIX)).spread_ms, 500);
    for block in 1..=1000 {
        facts.sidecar(block, "/ns/shop/sa/web", &[]);
    }
    assert_eq!(renewal(&facts, Duration::from_secs(UNIX)).spread_ms, 20_000);
}

fn word(of: &str, at_unix_ms: i64) -> Word {
    let progress = at_unix_ms.to_be_bytes().to_vec();
    let wire = v1::SignedTrustProgress { progress, signature: Vec::new() };
    Word { cluster: cluster(of), at_unix_ms, wire }
}

#[test]
fn the_latest_word_of_each_cluster_counts_and_is_passed_on_to_who_has_not_said_it() {
    let mut facts = east();
    for peer in ["west", "north"] {
        facts.link(peer);
        facts.import(peer);
    }
    let keep = |facts: &mut Facts, peer: &str, of: &str, at| {
        let import = Arc::get_mut(facts.imports.get_mut(&cluster(peer)).unwrap()).unwrap();
        keep_word(import, &progress_key(of), word(of, at)).unwrap();
    };
    keep(&mut facts, "west", "west", 10);
    keep(&mut facts, "west", "far", 5);
    keep(&mut facts, "north", "far", 7);
    keep(&mut facts, "north", "far", 6);
    // Nobody's word about ourselves.
    keep(&mut facts, "north", "east", 99);
    let latest: Vec<_> = words(&facts).into_iter().map(|(c, w)| (c.to_string(), w.at_unix_ms)).collect();
    assert_eq!(latest, [("far".to_owned(), 7), ("west".to_owned(), 10)]);
    let told = |facts: &Facts, peer: &str| -> Vec<String> {
        records(facts, &cluster(peer)).into_iter().map(|(key, _)| key).collect()
    };
    assert!(told(&facts, "west").is_empty(), "there is no update yet");
    Arc::get_mut(&mut facts.trust).unwrap().update = Some(vec![1].into());
    facts.own_word = Some(Arc::new(word("east", 1)));
    assert_eq!(told(&facts, "west"), ["trust", "trust-progress/east", "trust-progress/far"]);
    assert_eq!(told(&facts, "north"), ["trust", "trust-progress/east", "trust-progress/west"]);
}
