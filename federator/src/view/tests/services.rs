//! Imports with their callers and shifts, endpoints, identities, and the head of the page.

use super::*;
use crate::facts::{IdentityRecord, ShiftRecord};
use tombolo_model::status::{API_VERSION, Consumer, ImportCluster};

fn import_cluster(
    cluster: &str,
    healthy: u32,
    total: u32,
    state: &str,
    age_ms: Option<u64>,
) -> ImportCluster {
    ImportCluster { cluster: cluster.into(), healthy, total, state: state.into(), age_ms }
}

#[test]
fn an_import_shows_each_clusters_share_and_its_age() {
    let mut facts = east();
    for (peer, freshness, age) in
        [("west", Freshness::Fresh, 0), ("north", Freshness::Stale, 7), ("south", Freshness::Expired, 3600)]
    {
        facts.link(peer);
        let import = facts.import(peer);
        import.exports.insert(service("shop/web"), exported(1, 2, &[]));
        (import.freshness, import.heard) = (freshness, Some(Duration::from_secs(UNIX - age)));
    }
    facts.sidecar(7, "/ns/shop/sa/web", &[("shop/web", port("http", 80))]);
    let imports = shown(&facts).imports;
    assert_eq!(imports.len(), 1);
    assert_eq!(
        imports[0].clusters,
        [
            import_cluster("east", 0, 1, "local", None),
            import_cluster("north", 1, 2, "stale", Some(7_000)),
            import_cluster("south", 1, 2, "expired", Some(3_600_000)),
            import_cluster("west", 1, 2, "fresh", Some(0)),
        ]
    );
    facts.links.remove(&cluster("west"));
    assert_eq!(shown(&facts).imports[0].clusters[3].state, "expired", "a cluster that is not linked");
}

#[test]
fn an_import_is_ready_while_anybody_serves_it() {
    let cases: &[Case<'_>] = &[
        ("all well", |_| {}, "True Ready", &["west 2/3"]),
        (
            "stale",
            |f| f.import("west").freshness = Freshness::Stale,
            "True Ready",
            &["west 2/3 (stale, heard 500ms ago)"],
        ),
        (
            "expired",
            |f| f.import("west").freshness = Freshness::Expired,
            "False Pending",
            &["no exporter is heard"],
        ),
        (
            "none healthy",
            |f| f.import("west").exports.insert(service("shop/web"), exported(0, 3, &[])),
            "False Pending",
            &["no endpoint is healthy (west 0/3)"],
        ),
        (
            "served here",
            |f| {
                f.import("west").freshness = Freshness::Expired;
                f.sidecar(7, "/ns/shop/sa/web", &[("shop/web", port("http", 80))]);
                f.healthy(7, "shop/web", None);
            },
            "True Ready",
            &["east 1/1 (local)", "west 2/3 (expired"],
        ),
    ];
    for (case, fill, head, pieces) in cases {
        let mut facts = east();
        facts.link("west");
        facts.import("west").exports.insert(service("shop/web"), exported(2, 3, &[]));
        fill(&mut facts);
        assert_condition(case, &get_one(&facts, "ServiceImport", "web"), "Ready", head, pieces);
    }
}

fn calling(clusters: &[&str], reason: &str) -> v1::StatusReport {
    let upstream = v1::UpstreamStatus {
        service: "shop/web".into(),
        tier: 1,
        clusters: clusters.iter().map(|name| (*name).to_owned()).collect(),
        reason: reason.into(),
        connections: 2,
        open_streams: 5,
    };
    let odd = v1::UpstreamStatus { service: "not a service".into(), ..Default::default() };
    v1::StatusReport { upstreams: vec![upstream, odd], ..Default::default() }
}

#[test]
fn callers_are_shown_with_who_serves_them_and_why() {
    let mut facts = east();
    facts.sidecar(9, "/ns/shop/sa/client", &[]);
    facts.report(9, calling(&["west"], "tier 0 has been under 50%"));
    let imports = shown(&facts).imports;
    assert_eq!(imports.len(), 1, "what is called is shown even if nobody serves it: {imports:?}");
    assert_eq!(imports[0].clusters, []);
    assert_eq!(
        imports[0].consumers,
        [Consumer {
            sidecar: "client".into(),
            tier: 1,
            serving: vec!["west".into()],
            reason: "tier 0 has been under 50%".into(),
            connections: 2,
            open_streams: 5,
        }]
    );
    let member = facts.registry.members.values_mut().next().unwrap();
    member.presence = crate::registry::Presence::Silent;
    assert!(shown(&facts).imports[0].consumers[0].reason.contains("before it fell silent"));
    facts.close(9);
    assert_eq!(shown(&facts).imports, [], "one that has left calls nothing");
}

#[test]
fn the_last_ten_shifts_are_shown_newest_first() {
    let mut facts = east();
    facts.export("web", None);
    let shift = |sequence: u64| ShiftRecord {
        block: None,
        sidecar: "client".into(),
        sequence,
        at_unix_ms: (UNIX - 100 + sequence) * 1000,
        service: "shop/web".into(),
        from_tier: 0,
        to_tier: 1,
        clusters: vec![cluster("west")],
        reason: format!("reason {sequence}"),
    };
    facts.shifts.insert("shop/web".into(), (0..30).rev().map(shift).collect());
    let shifts = &shown(&facts).imports[0].shifts;
    assert_eq!(shifts.len(), 10);
    assert_eq!((shifts[0].sidecar.as_str(), shifts[0].at.as_str()), ("client", "2026-11-24T02:13:54Z"));
    assert_eq!(shifts[0].shift.reason, "reason 29");
    assert_eq!((shifts[9].shift.to_tier, shifts[9].shift.reason.as_str()), (1, "reason 20"));
}

#[test]
fn an_endpoint_is_healthy_or_says_why_not() {
    let cases: &[Case<'_>] = &[
        ("healthy", |f| f.healthy(7, "shop/web", None), "true", &[]),
        ("no report yet", |_| {}, "false", &["shop/web: no health report yet"]),
        ("unhealthy", |f| f.healthy(7, "shop/web", Some("HTTP 500")), "false", &["shop/web: HTTP 500"]),
        ("unhealthy, no word", |f| f.healthy(7, "shop/web", Some("")), "false", &["shop/web: not healthy"]),
        ("a client", |f| f.sidecar(7, "/ns/shop/sa/web", &[]), "true", &[]),
        (
            "refused",
            |f| {
                f.healthy(7, "shop/web", None);
                let member = f.registry.members.values_mut().next().unwrap();
                member.refused.insert("bank/db".into(), "another namespace".into());
            },
            "true",
            &["bank/db is not accepted: another namespace"],
        ),
        ("left", |f| f.close(7), "false", &["its control connection closed"]),
        (
            "silent",
            |f| {
                let member = f.registry.members.values_mut().next().unwrap();
                member.presence = crate::registry::Presence::Silent;
                member.heard = NOW - Duration::from_secs(3);
            },
            "false",
            &["no report for 3s"],
        ),
        (
            "silent for long",
            |f| {
                let member = f.registry.members.values_mut().next().unwrap();
                member.presence = crate::registry::Presence::Silent;
                member.heard = NOW - Duration::from_secs(300);
            },
            "false",
            &["no report for 5m; it may be gone"],
        ),
    ];
    for (case, fill, healthy, pieces) in cases {
        let mut facts = east();
        facts.sidecar(7, "/ns/shop/sa/web", &[("shop/web", port("http", 80))]);
        fill(&mut facts);
        let endpoint = &shown(&facts).endpoints[0];
        assert_eq!(endpoint.healthy.to_string(), *healthy, "{case}: {endpoint:?}");
        assert_eq!(endpoint.reason.is_empty(), pieces.is_empty(), "{case}: {}", endpoint.reason);
        for piece in *pieces {
            assert!(endpoint.reason.contains(piece), "{case}: {piece:?} is missing in {:?}", endpoint.reason);
        }
    }
}

#[test]
fn an_endpoint_is_shown_by_holder_identity_and_address() {
    let mut facts = east();
    facts.sidecar(7, "/vm/db-1", &[("shop/db", port("", 5432)), ("bank/db", port("", 5432))]);
    let endpoint = shown(&facts).endpoints.remove(0);
    assert_eq!((endpoint.id.as_str(), endpoint.holder.as_str()), ("00000070", "db-1"));
    assert_eq!(endpoint.spiffe_id, "spiffe://acme.example/cluster/east/vm/db-1");
    assert_eq!(
        (endpoint.address.as_str(), endpoint.last_seen.as_str()),
        ("10.0.0.9:7442", "2026-11-24T02:15:05Z")
    );
    assert_eq!(endpoint.services, ["bank/db", "shop/db"]);
    let member = facts.registry.members.values_mut().next().unwrap();
    (member.address, member.heard_unix) = (None, 0);
    member.ids.clear();
    let endpoint = shown(&facts).endpoints.remove(0);
    assert_eq!(
        (endpoint.id.as_str(), endpoint.address.as_str(), endpoint.last_seen.as_str()),
        ("0000007", "registers", "")
    );
}

#[test]
fn identities_are_the_authorities_and_the_newest_of_each_id() {
    let mut facts = east();
    let trust = Arc::get_mut(&mut facts.trust).unwrap();
    (trust.root_not_after, trust.intermediate_not_after) = (UNIX + 1000, UNIX + 500);
    let issued = [
        ("1", "/gateway/gw-a", Role::Gateway, 10, 100),
        ("2", "/gateway/gw-a", Role::Gateway, 30, 60),
        ("3", "/gateway/gw-a", Role::Gateway, 20, 200),
        ("4", "/federator", Role::Federator, 5, 50),
        ("5", "/vm/db-1", Role::Vm, 5, 0),
        ("6", "/ns/shop/sa/web", Role::Sidecar, 5, 50),
        ("7", "/vm/joiner", Role::Provisional, 5, 50),
    ];
    for (serial, path, role, issued, left) in issued {
        let record = IdentityRecord {
            spiffe_id: format!("spiffe://acme.example/cluster/east{path}"),
            role,
            serial: serial.into(),
            issued_unix: UNIX - 1000 + issued,
            not_after: if left == 0 { UNIX - 9 } else { UNIX + left },
            workload: false,
            issuer: String::new(),
        };
        facts.identities.insert(serial.into(), record);
    }
    // What a workload shows is its sidecar's matter.
    let web = facts.identities["6"].clone();
    let workload = IdentityRecord { serial: "8".into(), issued_unix: UNIX, workload: true, ..web };
    facts.identities.insert("8".into(), workload);
    let shown: Vec<_> = shown(&facts)
        .identities
        .into_iter()
        .map(|i| (i.role, i.spiffe_id.rsplit('/').next().unwrap().to_owned(), i.expires_in_seconds))
        .collect();
    let expected = [
        ("root", "acme.example", 1000),
        ("intermediate", "acme.example", 500),
        ("federator", "federator", 50),
        ("gateway", "gw-a", 60),
        ("sidecar", "web", 50),
        ("vm", "db-1", -9),
    ];
    assert_eq!(shown, expected.map(|(role, id, left)| (role.to_owned(), id.to_owned(), left)));
}

#[test]
fn the_head_says_which_cluster_and_since_when() {
    let mut facts = east();
    facts.federator = Some(crate::facts::FederatorEndpoint {
        endpoint: EndpointId::from_u32(16),
        address: "10.0.0.1:7443".parse().unwrap(),
    });
    let status = shown(&facts);
    assert_eq!(status.api_version, API_VERSION);
    assert_eq!((status.cluster.as_str(), status.tag.as_str()), ("east", "3e1e2a"));
    assert_eq!(
        (status.trust_domain.as_str(), status.time.as_str()),
        ("acme.example", "2026-11-24T02:15:05Z")
    );
    let federator = status.federator;
    assert_eq!((federator.epoch, federator.revision, federator.overlay.as_str()), (7, 42, "10.0.0.1:7443"));
    assert_eq!(federator.started_at, "2026-11-24T02:10:05Z");
    assert!(!federator.version.is_empty());
}
