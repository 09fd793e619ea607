//! What a sidecar is told, from hand-built facts.

use serde_json::{Value, json};
use tombolo_model::ids::Block;
use tombolo_proto::v1;

use super::super::rings::Rings;
use super::super::sidecar::snapshot;
use crate::facts::Facts;
use crate::view::tests::{Fill, NOW, UNIX, east, port};

fn policy(namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "AccessPolicy",
        "metadata": { "name": name, "namespace": namespace }, "spec": spec,
    })
}

fn told(facts: &Facts, block: u32) -> v1::SidecarSnapshot {
    let unix = std::time::Duration::from_secs(UNIX);
    snapshot(facts, Block::new(block).unwrap(), &[], &Rings::default(), NOW, unix)
}

/// Two sidecars, linked to west: 1 serves shop/web and bank/web, 2 serves shop/api.
fn facts() -> Facts {
    let mut facts = east();
    facts.link("west");
    facts.import("west").properties.insert("region".into(), "eu".into());
    let http = port("http", 80);
    facts.sidecar(1, "/ns/shop/sa/web", &[("shop/web", http.clone()), ("bank/web", http.clone())]);
    facts.sidecar(2, "/ns/shop/sa/api", &[("shop/api", http)]);
    facts
}

#[test]
fn a_sidecar_is_told_the_access_policies_of_what_it_serves_and_no_others() {
    let mut facts = facts();
    let web = json!([{ "kind": "Service", "name": "web" }]);
    facts.apply(policy("shop", "web", json!({ "action": "ALLOW", "targetRefs": web })));
    facts.apply(policy("shop", "all", json!({ "action": "ALLOW" })));
    facts.apply(policy("elsewhere", "web", json!({ "action": "ALLOW" })));
    let names = |block| -> Vec<(String, Vec<String>)> {
        told(&facts, block).access_policies.into_iter().map(|p| (p.name, p.services)).collect()
    };
    let expected = |name: &str, service: &str| (name.to_owned(), vec![service.to_owned()]);
    assert_eq!(names(1), [expected("shop/all", "shop/web"), expected("shop/web", "shop/web")]);
    assert_eq!(names(2), [expected("shop/all", "shop/api")]);
    assert_eq!(names(3), []);
    let sent = &told(&facts, 1).access_policies[1].spec_json;
    assert_eq!(serde_json::from_str::<Value>(sent).unwrap()["targetRefs"], web);
}

#[test]
fn properties_of_clusters_travel_only_where_a_policy_asks_for_them() {
    let mut facts = facts();
    facts.apply(policy("shop", "all", json!({ "action": "ALLOW" })));
    assert!(told(&facts, 1).cluster_properties.is_empty());
    let asks = json!({ "action": "DENY", "targetRefs": [{ "kind": "Service", "name": "web" }],
        "rules": [{ "from": [{ "clusterProperties": { "region": "eu" } }] }] });
    facts.apply(policy("shop", "eu", asks));
    let clusters: Vec<_> = told(&facts, 1).cluster_properties.into_iter().map(|c| c.cluster).collect();
    assert_eq!(clusters, ["east", "west"]);
    assert_eq!(told(&facts, 1).cluster_properties[1].properties["region"], "eu");
    assert!(told(&facts, 2).cluster_properties.is_empty());
}
