//! Links, their paths, and gateways.

use tombolo_model::ids::ClusterTag;
use tombolo_model::status::LinkStatus;

use super::*;

fn linked() -> Facts {
    let mut facts = east();
    facts.link("west");
    facts.import("west");
    facts.gateway("gw-a", vec![hop("west/gw-1", true, 52_000), hop("west/gw-2", true, 50_000)]);
    facts
}

fn link(facts: &Facts) -> LinkStatus {
    let links = shown(facts).links;
    assert_eq!(links.len(), 1, "{links:?}");
    links.into_iter().next().unwrap()
}

/// Silent for an age, with a freshness.
fn silent(facts: &mut Facts, seconds: u64, freshness: Freshness) {
    let import = facts.import("west");
    import.connected = false;
    import.freshness = freshness;
    import.heard = Some(Duration::from_secs(UNIX - seconds));
    import.last_error = "no route to host".into();
}

#[test]
fn a_link_is_in_one_of_its_states_with_what_to_do() {
    let cases: &[Case<'_>] = &[
        ("all well", |_| {}, "connected", &[]),
        ("broken a second ago", |f| silent(f, 1, Freshness::Fresh), "connecting", &["1s ago", "no route"]),
        (
            "silent",
            |f| silent(f, 20, Freshness::Stale),
            "stale",
            &["20s ago", "203.0.113.7:7440", "no route"],
        ),
        ("lease over", |f| silent(f, 600, Freshness::Expired), "expired", &["10m ago", "out of rotation"]),
        ("never heard", |f| f.imports.clear(), "connecting", &["not been heard yet", "UDP to 203.0.113.7"]),
        (
            "never heard, refused",
            |f| *f.import("west") = Import { last_error: "certificate expired".into(), ..Import::default() },
            "connecting",
            &["certificate expired"],
        ),
        (
            "recreated",
            |f| f.link("west").recreated = ClusterTag::new(0xabc),
            "recreated",
            &["tombolo link accept west", "000abc", "00beef"],
        ),
        ("unlinked there", |f| f.link("west").ended_by_peer = true, "expired", &["tombolo unlink west"]),
        (
            "connected, no path",
            |f| f.gateway("gw-a", vec![hop("west/gw-1", false, 0)]),
            "connected",
            &["gw-1 at 203.0.113.7:7440", "UDP"],
        ),
        ("connected, not probed", |f| f.gateway("gw-a", vec![]), "connected", &["probed yet"]),
        ("no gateway", |f| f.registry.gateways.clear(), "connected", &["tombolo gateway"]),
        ("silent gateway", |f| f.close(90), "connected", &["no gateway of this cluster reports (gw-a)"]),
    ];
    for (case, fill, state, pieces) in cases {
        let mut facts = linked();
        fill(&mut facts);
        let link = link(&facts);
        assert_eq!(link.state, *state, "{case}: {link:?}");
        assert_eq!(link.reason.is_empty(), pieces.is_empty(), "{case}: {}", link.reason);
        for piece in *pieces {
            assert!(link.reason.contains(piece), "{case}: {piece:?} is missing in {:?}", link.reason);
        }
    }
}

#[test]
fn a_link_shows_its_best_live_path() {
    let mut facts = linked();
    let mut dead = hop("west/gw-1", false, 1_000);
    dead.mtu = 9000;
    facts.gateway("gw-b", vec![dead, hop("gw-a", true, 100), hop("north/gw-1", true, 5)]);
    let link = link(&facts);
    assert_eq!((link.rtt_ms, link.mtu, link.loss_per_mille), (Some(50.0), Some(1420), Some(3)));
    assert_eq!((link.age_ms, link.carrier.as_str(), link.tag.as_str()), (Some(500), "udp", "00beef"));
    assert_eq!(link.gateways, ["gw-1"]);
    let paths: Vec<_> =
        link.paths.iter().map(|p| (p.from.as_str(), p.to.as_str(), p.alive, p.rtt_ms)).collect();
    assert_eq!(
        paths,
        [("gw-a", "gw-1", true, 52.0), ("gw-a", "gw-2", true, 50.0), ("gw-b", "gw-1", false, 1.0)]
    );
}

#[test]
fn a_live_path_that_is_not_measured_yet_has_no_rtt() {
    let mut facts = linked();
    facts.gateway("gw-a", vec![hop("west/gw-1", true, 0)]);
    let link = link(&facts);
    assert_eq!((link.rtt_ms, link.mtu), (None, Some(1420)));
}

#[test]
fn gateways_are_ready_draining_or_silent() {
    type Change = fn(&mut crate::registry::Gateway);
    use crate::registry::Presence;
    let cases: &[(&str, Change)] = &[
        ("ready", |_| {}),
        ("draining", |g| g.draining = true),
        ("draining", |g| (g.draining, g.presence) = (true, Presence::Left)),
        ("silent", |g| g.presence = Presence::Silent),
        ("silent", |g| (g.draining, g.presence) = (true, Presence::Silent)),
        ("silent", |g| g.presence = Presence::Left),
    ];
    for (expected, change) in cases {
        let mut facts = linked();
        change(facts.registry.gateways.get_mut("gw-a").unwrap());
        let gateways = shown(&facts).gateways;
        assert_eq!(gateways[0].state, *expected);
        assert_eq!(gateways[0].last_seen, "2026-11-24T02:15:05Z");
        assert_eq!((gateways[0].border.as_str(), gateways[0].registered_endpoints), ("198.51.100.1:7440", 2));
    }
}

#[test]
fn a_cluster_link_says_what_is_wrong_with_it() {
    let cases: &[ConditionCase<'_>] = &[
        ("all well", |_| {}, "Connected", "True Connected", &["heard 500ms ago"]),
        ("paths", |_| {}, "Reachable", "True PathAlive", &["2 of 2", "gw-a to gw-2 in 50.0 ms"]),
        ("silent", |f| silent(f, 9, Freshness::Stale), "Connected", "False Stale", &["9s ago"]),
        ("broken", |f| silent(f, 1, Freshness::Fresh), "Connected", "False Reconnecting", &[]),
        ("over", |f| silent(f, 99, Freshness::Expired), "Connected", "False Expired", &[]),
        ("new", |f| f.imports.clear(), "Connected", "False Connecting", &[]),
        (
            "no path",
            |f| f.gateway("gw-a", vec![hop("west/gw-1", false, 0)]),
            "Reachable",
            "False NoPath",
            &[],
        ),
        ("not probed", |f| f.gateway("gw-a", vec![]), "Reachable", "Unknown NotProbed", &[]),
        ("no gateway", |f| f.registry.gateways.clear(), "Reachable", "False NoGateway", &[]),
        (
            "recreated",
            |f| f.link("west").recreated = ClusterTag::new(0xabc),
            "Recreated",
            "True OtherTag",
            &["tombolo link accept west"],
        ),
        ("not recreated", |_| {}, "Recreated", "no Recreated", &[]),
        ("ended", |f| f.link("west").ended_by_peer = true, "Connected", "False EndedByPeer", &[]),
        (
            "bad record",
            |f| drop(f.import("west").rejected.insert("export/shop/x".into(), "port 0".into())),
            "RecordsAccepted",
            "False RecordsRejected",
            &["1 of west's records", "export/shop/x: port 0"],
        ),
    ];
    for (case, fill, r#type, head, pieces) in cases {
        let mut facts = linked();
        fill(&mut facts);
        assert_condition(case, &get_one(&facts, "ClusterLink", "west"), r#type, head, pieces);
    }
}

#[test]
fn a_cluster_link_that_was_only_applied_waits_for_the_other_side() {
    let mut facts = east();
    facts.apply(json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "ClusterLink", "metadata": { "name": "to-west" },
        "spec": { "cluster": "west" },
    }));
    let link = link(&facts);
    assert_eq!((link.peer.as_str(), link.state.as_str()), ("west", "connecting"));
    let object = get_one(&facts, "ClusterLink", "to-west");
    assert_condition("applied", &object, "Connected", "False NotLinked", &["tombolo link token west"]);
    facts.link("west");
    facts.import("west");
    let object = get_one(&facts, "ClusterLink", "to-west");
    assert_condition("linked", &object, "Connected", "True", &[]);
}
