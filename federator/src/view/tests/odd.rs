//! Data that makes no sense is shown as well as can be, and never more than a page of it.

use super::*;

fn everything(facts: &Facts, now: Duration, unix: Duration) -> usize {
    let text = serde_json::to_string(&status(facts, now, unix)).unwrap();
    let objects = tombolo_model::resource::KINDS.iter().map(|kind| {
        let query = Query { kind, namespace: None, name: None };
        serde_json::to_string(&objects(facts, &query, now, unix)).unwrap().len()
    });
    text.len() + objects.sum::<usize>()
}

/// A cluster in which nothing fits: unlinked peers, clocks at both ends, silent members, floods of text
/// (of names and ports the edge takes care).
fn odd() -> Facts {
    let mut facts = east();
    let flood = "x\u{1b}[2J".repeat(10_000);
    facts.link("far").created_unix = u64::MAX;
    facts.link("far").first_gateways.clear();
    let far = facts.import("far");
    (far.heard, far.freshness) = (Some(Duration::MAX), Freshness::Expired);
    (far.connected, far.last_error) = (false, flood.clone());
    far.rejected = (0..1000).map(|n| (format!("export/shop/{n}"), flood.clone())).collect();
    let ghost = facts.import("ghost");
    ghost.heard = Some(Duration::ZERO);
    let odd_port =
        Port { name: "\u{0}".into(), port: 0, app_protocol: "\u{1b}".into(), protocol: String::new() };
    let odd_export = ImportedExport {
        healthy: u32::MAX,
        total: 0,
        exported_at_unix_ms: i64::MIN,
        endpoints: Vec::new(),
        headless: false,
        named: Vec::new(),
        ports: vec![odd_port.clone(); 70],
        ..exported(0, 0, &[])
    };
    ghost.exports.insert(service("shop/web"), odd_export.clone());
    facts.import("far").exports.insert(
        service("shop/web"),
        ImportedExport { exported_at_unix_ms: i64::MAX, ports: vec![port("a", 1)], ..odd_export },
    );
    facts.export("web", Some("east,ghost,nowhere,far"));
    facts.sidecar(1, "/ns/shop/sa/web", &[("shop/web", odd_port)]);
    facts.healthy(1, "shop/web", Some(&flood));
    let upstream = v1::UpstreamStatus {
        service: "shop/web".into(),
        tier: i32::MIN,
        reason: flood.clone(),
        ..Default::default()
    };
    facts.report(1, v1::StatusReport { upstreams: vec![upstream], ..Default::default() });
    let mut wild = hop("far/gw/x", true, u64::MAX);
    (wild.loss_per_mille, wild.mtu) = (u32::MAX, u32::MAX);
    facts.gateway("gw", vec![wild, hop("", true, 1), v1::HopStatus { alive: true, ..Default::default() }]);
    for member in facts.registry.members.values_mut() {
        (member.heard, member.heard_unix) = (Duration::MAX, u64::MAX);
        member.presence = crate::registry::Presence::Silent;
    }
    let trust = Arc::get_mut(&mut facts.trust).unwrap();
    (trust.root_not_after, trust.intermediate_not_after) = (u64::MAX, 1);
    Arc::get_mut(&mut facts.cluster).unwrap().started_unix = u64::MAX;
    facts
}

#[test]
fn whatever_the_facts_and_the_clocks_are_something_is_shown() {
    let times = [Duration::ZERO, Duration::from_secs(UNIX), Duration::MAX];
    let mut shown = 0;
    for facts in [east(), odd()] {
        for now in times {
            for unix in times {
                shown += usize::from(everything(&facts, now, unix) > 0);
            }
        }
    }
    assert_eq!(shown, 2 * 9);
}

#[test]
fn a_flood_from_a_peer_is_cut() {
    let length = everything(&odd(), NOW, Duration::from_secs(UNIX));
    assert!(length < 100_000, "{length} bytes");
    let link = get_one(&odd(), "ClusterLink", "far");
    for condition in link["status"]["conditions"].as_array().unwrap() {
        assert!(condition["message"].as_str().unwrap().chars().count() <= 1003);
    }
}

#[test]
fn an_unlinked_clusters_leftovers_are_no_supply() {
    let mut facts = east();
    facts.import("ghost").exports.insert(service("shop/web"), exported(5, 5, &[]));
    let import = get_one(&facts, "ServiceImport", "web");
    assert_condition("ghost", &import, "Ready", "False Pending", &["ghost 5/5 (expired"]);
    assert_eq!(shown(&facts).links, []);
}

#[test]
fn a_peers_clock_ahead_of_ours_is_no_age() {
    let mut facts = east();
    facts.link("west");
    facts.import("west").heard = Some(Duration::from_secs(UNIX + 3600));
    assert_eq!(shown(&facts).links[0].age_ms, Some(0));
}
