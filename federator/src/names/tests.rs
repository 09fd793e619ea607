use serde_json::json;

use super::*;
use crate::facts::VirtualAddresses;
use crate::facts::pods::KubernetesAddresses;
use crate::view::tests::{Fill, east, exported, port};

fn of<'a>(records: &'a BTreeMap<String, v1::NamedService>, name: &str) -> &'a v1::NamedService {
    &records[&format!("shop/{name}")]
}

fn policy(kind: &str, name: &str) -> serde_json::Value {
    json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "FailoverPolicy",
        "metadata": { "name": name, "namespace": "shop" },
        "spec": { "targetRef": { "kind": kind, "name": name }, "tiers": [{ "clusters": ["*"] }] },
    })
}

fn headless(name: &str) -> serde_json::Value {
    json!({
        "apiVersion": "multicluster.x-k8s.io/v1beta1", "kind": "ServiceExport",
        "metadata": { "name": name, "namespace": "shop", "annotations": { "tombolo.dev/service-type": "Headless" } },
    })
}

#[test]
fn which_names_a_service_has_follows_from_who_serves_exports_and_fails_it_over() {
    let mut facts = east();
    facts.link("west");
    facts
        .import("west")
        .exports
        .insert("shop/imported".parse().unwrap(), exported(1, 1, &[port("http", 80)]));
    facts.import("west").exports.insert("shop/moved".parse().unwrap(), exported(1, 1, &[port("http", 80)]));
    facts.sidecar(8, "/ns/shop/sa/web", &[("shop/served", port("http", 80))]);
    facts.export("own", None);
    facts.apply(policy("Service", "moved"));
    facts.apply(policy("ServiceImport", "imported"));
    let records = records(&facts);
    let names = |name: &str| (of(&records, name).clusterset, of(&records, name).local);
    assert_eq!(names("imported"), (true, false), "its ordinary name is the cluster's own resolver's");
    assert_eq!(names("moved"), (true, true), "a FailoverPolicy on the Service takes the ordinary name over");
    assert_eq!(names("served"), (false, true));
    assert_eq!(names("own"), (true, false));
    assert_eq!(of(&records, "imported").ports[0].name, "http");
}

#[test]
fn a_headless_service_has_no_address_and_resolves_to_its_ready_endpoints() {
    let mut facts = east();
    facts.sidecar(8, "/ns/shop/sa/db", &[("shop/db", port("sql", 5432))]);
    facts.sidecar(9, "/vm/db-1.example", &[("shop/db", port("sql", 5432))]);
    facts.sidecar(10, "/ns/shop/sa/db", &[("shop/db", port("sql", 5432))]);
    facts.healthy(8, "shop/db", None);
    facts.healthy(9, "shop/db", None);
    facts.healthy(10, "shop/db", Some("refused"));
    facts.apply(headless("db"));
    assert!(!with_address(&facts).contains(&"shop/db".parse().unwrap()));
    let records = records(&facts);
    let db = of(&records, "db");
    assert!(db.headless && db.addresses.is_empty() && !db.local);
    let hosts: Vec<_> = db.endpoints.iter().map(|e| (e.cluster.as_str(), e.hostname.as_str())).collect();
    assert_eq!(hosts, [("east", "db-8"), ("east", "db-1-example")], "only the ready ones, each by a label");
}

#[test]
fn a_peer_s_endpoints_are_resolved_over_flat_links_inside_their_ranges_only() {
    let mut facts = east();
    facts.link("west");
    let named = |hostname: &str, address: &str| NamedEndpoint {
        hostname: hostname.into(),
        address: address.parse().unwrap(),
    };
    let mut export = exported(2, 2, &[port("sql", 5432)]);
    (export.headless, export.named) = (true, vec![named("db-1", "10.1.0.7"), named("db-2", "192.0.2.7")]);
    facts.import("west").exports.insert("shop/db".parse().unwrap(), export);
    assert!(of(&records(&facts), "db").headless && of(&records(&facts), "db").endpoints.is_empty());
    facts.apply(json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "ClusterLink", "metadata": { "name": "west" },
        "spec": { "flat": true, "allowedGatewayRanges": ["10.1.0.0/16"] },
    }));
    let records = records(&facts);
    let endpoints = &of(&records, "db").endpoints;
    assert_eq!(endpoints.len(), 1, "{endpoints:?}");
    assert_eq!((endpoints[0].cluster.as_str(), endpoints[0].address.as_str()), ("west", "10.1.0.7"));
}

#[test]
fn in_kubernetes_a_name_resolves_to_the_cluster_set_ip_and_other_addresses_are_captured_alone() {
    let mut facts = east();
    facts.link("west");
    let web: ServiceKey = "shop/web".parse().unwrap();
    facts.import("west").exports.insert(web.clone(), exported(1, 1, &[port("http", 80)]));
    let given = VirtualAddresses { v4: Some("241.64.0.7".parse().unwrap()), v6: None };
    Arc::make_mut(&mut facts.addresses).of.insert(web.clone(), given);
    let told = |facts: &Facts| {
        let records = records(facts);
        (of(&records, "web").addresses.join(","), of(&records, "web").aliases.join(","))
    };
    let kubernetes = |facts: &mut Facts, set: &[&str], local: &[&str]| {
        let ips = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let addresses = KubernetesAddresses { set: ips(set), local: ips(local) };
        Arc::make_mut(&mut facts.pods).addresses.insert(web.clone(), addresses);
    };
    assert_eq!(told(&facts), ("241.64.0.7".into(), String::new()));
    kubernetes(&mut facts, &["10.96.0.9", "fd00:96::9"], &["10.96.0.5"]);
    assert_eq!(told(&facts), ("10.96.0.9,fd00:96::9".into(), "241.64.0.7".into()));
    assert_eq!(addresses(&facts, &web), ["10.96.0.9", "fd00:96::9"], "callers' snapshots say the same");
    facts.apply(policy("Service", "web"));
    assert_eq!(told(&facts).1, "241.64.0.7,10.96.0.5", "whoever calls the Service fails over");
    kubernetes(&mut facts, &[], &["10.96.0.5"]);
    assert_eq!(told(&facts), ("241.64.0.7".into(), "10.96.0.5".into()), "not imported (yet)");
}
