//! `ServiceExport`: to whom, and its conditions.

use super::*;
use crate::exports::exported_to;

/// `shop/web`, exported to everybody, served by one healthy endpoint, usable in west.
fn exporting() -> Facts {
    let mut facts = east();
    facts.link("west");
    facts.import("west");
    facts.export("web", None);
    facts.sidecar(7, "/ns/shop/sa/web", &[("shop/web", port("http", 80))]);
    facts.healthy(7, "shop/web", None);
    facts.allot("west", "shop/web");
    facts
}

#[test]
fn an_export_is_for_the_clusters_that_its_annotation_names() {
    let cases: &[(Option<&str>, bool, bool)] = &[
        (None, true, true),
        (Some("*"), true, true),
        (Some("west"), true, false),
        (Some("north, west"), true, true),
        (Some(""), false, false),
    ];
    for (annotation, west, north) in cases {
        let mut facts = east();
        facts.export("web", *annotation);
        let to = |peer: &str| exported_to(&facts, &service("shop/web"), &cluster(peer));
        assert_eq!((to("west"), to("north")), (*west, *north), "{annotation:?}");
        assert!(!exported_to(&facts, &service("shop/other"), &cluster("west")));
        assert!(!exported_to(&facts, &service("bank/web"), &cluster("west")));
    }
}

#[test]
fn an_export_is_valid_when_something_serves_it() {
    let cases: &[Case<'_>] = &[
        ("served", |_| {}, "True Valid", &["1 endpoint of this cluster serves shop/web"]),
        (
            "nobody",
            |f| f.registry = Registry::default(),
            "False NoService",
            &["tombolo sidecar --service shop/web"],
        ),
        (
            "refused",
            |f| {
                f.sidecar(7, "/ns/shop/sa/web", &[]);
                let member = f.registry.members.values_mut().next().unwrap();
                member.refused.insert("shop/web".into(), "not in namespace shop".into());
            },
            "False NoService",
            &["web offers shop/web", "not in namespace shop"],
        ),
        (
            "promised by a workload",
            |f| {
                f.registry = Registry::default();
                f.apply(json!({
                    "apiVersion": "tombolo.dev/v1alpha1", "kind": "Workload",
                    "metadata": { "name": "web", "namespace": "shop" },
                    "spec": { "sidecar": "db-1", "services": [{ "name": "web", "ports": [{ "port": 80 }] }] },
                }));
            },
            "False NoService",
            &["Workload web", "db-1"],
        ),
    ];
    for (case, fill, head, pieces) in cases {
        let mut facts = exporting();
        fill(&mut facts);
        let object = get_one(&facts, "ServiceExport", "web");
        assert_condition(case, &object, "Valid", head, pieces);
        if head.starts_with("False") {
            assert_condition(case, &object, "Ready", "False Pending", &["see Valid"]);
        }
    }
}

#[test]
fn an_export_is_ready_when_a_linked_cluster_can_use_it() {
    let cases: &[Case<'_>] = &[
        ("all well", |_| {}, "True Exported", &["west can use 1 of 1 endpoints"]),
        ("no link", |f| f.links.clear(), "False Pending", &["no cluster is linked", "tombolo link token"]),
        ("to nobody", |f| f.export("web", Some("")), "False Pending", &["tombolo.dev/export-to", "*"]),
        ("to itself", |f| f.export("web", Some("east")), "False Pending", &["no cluster but this one"]),
        (
            "to an unknown cluster",
            |f| f.export("web", Some("north")),
            "False Pending",
            &["north is not linked", "tombolo link token north"],
        ),
        (
            "to a known and an unknown one",
            |f| f.export("web", Some("west,north")),
            "True Exported",
            &["west can use", "north is not linked"],
        ),
        ("unlinked there", |f| f.link("west").ended_by_peer = true, "False Pending", &["west has unlinked"]),
        (
            "recreated",
            |f| f.link("west").recreated = tombolo_model::ids::ClusterTag::new(5),
            "False Pending",
            &["tombolo link accept west"],
        ),
        ("no handle yet", |f| f.handles.clear(), "False Pending", &["west", "handle is being allotted"]),
        (
            "no handle, no store",
            |f| {
                f.handles.clear();
                f.store_writable = false;
            },
            "False Failed",
            &["store can't be written"],
        ),
        (
            "unhealthy",
            |f| f.healthy(7, "shop/web", Some("HTTP 500")),
            "False Pending",
            &["none of 1", "web: HTTP 500"],
        ),
        ("left", |f| f.close(7), "False Pending", &["web: its control connection closed"]),
        (
            "peer not heard",
            |f| f.import("west").freshness = Freshness::Stale,
            "True Exported",
            &["west can't be told of changes"],
        ),
    ];
    for (case, fill, head, pieces) in cases {
        let mut facts = exporting();
        fill(&mut facts);
        assert_condition(case, &get_one(&facts, "ServiceExport", "web"), "Ready", head, pieces);
    }
}

#[test]
fn exporters_that_disagree_on_ports_or_type_are_named() {
    let cases: &[Case<'_>] = &[
        ("alone", |_| {}, "False NoConflicts", &[]),
        (
            "agreeing",
            |f| {
                f.import("west").exports.insert(service("shop/web"), exported(1, 1, &[port("http", 80)]));
            },
            "False NoConflicts",
            &[],
        ),
        (
            "a younger export",
            |f| {
                f.import("west").exports.insert(service("shop/web"), exported(1, 1, &[port("web", 81)]));
            },
            "True PortConflict",
            &["oldest export, in east (http 80/TCP)", "1/2 clusters disagree: west has web 81/TCP"],
        ),
        (
            "an older export",
            |f| {
                let old = ImportedExport {
                    exported_at_unix_ms: i64::try_from((UNIX - 500) * 1000).unwrap(),
                    ..exported(1, 1, &[port("web", 81)])
                };
                f.import("west").exports.insert(service("shop/web"), old);
            },
            "True PortConflict",
            &["oldest export, in west (web 81/TCP)"],
        ),
        (
            "a forged age, before the link",
            |f| {
                f.link("west").created_unix = UNIX - 60;
                let forged = ImportedExport { exported_at_unix_ms: 1, ..exported(1, 1, &[port("web", 81)]) };
                f.import("west").exports.insert(service("shop/web"), forged);
            },
            "True PortConflict",
            &["oldest export, in east"],
        ),
        (
            "another type",
            |f| {
                let headless = ImportedExport { headless: true, ..exported(1, 1, &[port("http", 80)]) };
                f.import("west").exports.insert(service("shop/web"), headless);
            },
            "True TypeConflict",
            &["using ClusterSetIP from the oldest export, in east", "west has Headless"],
        ),
        (
            "another type and other ports",
            |f| {
                let headless = ImportedExport { headless: true, ..exported(1, 1, &[port("web", 81)]) };
                f.import("west").exports.insert(service("shop/web"), headless);
            },
            "True TypeConflict,PortConflict",
            &["west has Headless", "west has web 81/TCP"],
        ),
    ];
    for (case, fill, head, pieces) in cases {
        let mut facts = exporting();
        fill(&mut facts);
        assert_condition(case, &get_one(&facts, "ServiceExport", "web"), "Conflict", head, pieces);
    }
}

#[test]
fn status_and_get_say_the_same_of_an_export() {
    let mut facts = exporting();
    facts.export("web", Some("west,north"));
    facts.sidecar(8, "/vm/db-1", &[("shop/web", port("http", 80))]);
    let export = &shown(&facts).exports[0];
    assert_eq!((export.service.as_str(), export.healthy, export.total), ("shop/web", 1, 2));
    assert_eq!(export.export_to, ["west", "north"]);
    let object = get_one(&facts, "ServiceExport", "web");
    for condition in &export.conditions {
        let text = format!("{} {} {}", condition.status, condition.reason, condition.message);
        assert_eq!(super::condition(&object, &condition.r#type), text);
    }
    assert_eq!(export.conditions.len(), 3);
    facts.export("web", None);
    assert_eq!(shown(&facts).exports[0].export_to, ["*"]);
}

#[test]
fn an_applied_object_carries_uid_creation_and_generation() {
    let object = get_one(&exporting(), "ServiceExport", "web");
    assert_eq!(object["metadata"]["uid"], "uid-of-web");
    assert_eq!(object["metadata"]["creationTimestamp"], "2026-11-24T02:13:25Z");
    assert_eq!(object["metadata"]["generation"], 3);
    assert_eq!(object["status"]["conditions"][0]["observedGeneration"], 3);
    assert!(object["metadata"]["annotations"].get(DERIVED).is_none());
}
