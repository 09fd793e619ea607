//! `AccessPolicy`: what it has a say about, and what it names in vain.

use super::*;

fn policy(spec: Value) -> Value {
    json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "AccessPolicy",
        "metadata": { "name": "web", "namespace": "shop" }, "spec": spec,
    })
}

/// East serves `shop/web` on port 80 and exports it to west, which is linked and on the left side.
fn serving() -> Facts {
    let mut facts = east();
    facts.link("west");
    facts.import("west").properties.insert("side".into(), "left".into());
    facts.sidecar(1, "/ns/shop/sa/web", &[("shop/web", port("http", 80))]);
    facts.export("web", Some("west"));
    facts
}

fn from(source: Value) -> Value {
    json!({ "action": "ALLOW", "rules": [{ "from": [source] }] })
}

#[test]
fn a_policy_says_what_it_is_about_and_what_it_names_in_vain() {
    let cases: &[(&str, Value, &str, &str, &[&str])] = &[
        (
            "all well",
            from(json!({ "clusters": ["west", "@self"] })),
            "Accepted",
            "True Accepted",
            &["ALLOW", "shop/web"],
        ),
        (
            "all there",
            from(json!({ "clusters": ["west", "@self"] })),
            "ResolvedRefs",
            "True ResolvedRefs",
            &[],
        ),
        (
            "a dry run",
            json!({ "action": "DENY", "rules": [{}], "dryRun": true }),
            "Accepted",
            "True DryRun",
            &["logged and counted"],
        ),
        ("for nobody", json!({ "action": "ALLOW" }), "Accepted", "True Accepted", &["nobody is admitted"]),
        (
            "no target",
            json!({ "action": "ALLOW", "targetRefs": [{ "kind": "Service", "name": "wbe" }] }),
            "Accepted",
            "False TargetNotFound",
            &["spec.targetRefs", "shop", "decides nothing"],
        ),
        (
            "one target of two",
            json!({ "action": "ALLOW", "targetRefs": [
                { "kind": "Service", "name": "web" }, { "kind": "Service", "name": "wbe" }] }),
            "ResolvedRefs",
            "False TargetNotFound",
            &["spec.targetRefs[1].name", "shop/wbe"],
        ),
        (
            "no port",
            json!({ "action": "ALLOW", "ports": [80, 8080] }),
            "ResolvedRefs",
            "False PortNotFound",
            &["spec.ports[1]", "8080", "80"],
        ),
        (
            "no cluster",
            from(json!({ "clusters": ["north"] })),
            "ResolvedRefs",
            "False ClusterNotFound",
            &["spec.rules[0].from[0].clusters[0]", "north is not linked", "tombolo link token north"],
        ),
        (
            "an identity of no cluster",
            from(json!({ "identities": ["spiffe://acme.example/cluster/north/*"] })),
            "ResolvedRefs",
            "False ClusterNotFound",
            &["identities[0]", "north"],
        ),
        (
            "an identity of another domain",
            from(json!({ "identities": ["spiffe://acme.exmaple/cluster/west/*"] })),
            "ResolvedRefs",
            "False TrustDomainNotFound",
            &["acme.exmaple", "this one is acme.example"],
        ),
        ("a match", from(json!({ "clusterProperties": { "side": "left" } })), "ResolvedRefs", "True", &[]),
        (
            "no match",
            from(json!({ "clusterProperties": { "side": "right" } })),
            "ResolvedRefs",
            "False NoClusterMatches",
            &["side=right"],
        ),
    ];
    for (case, spec, r#type, head, pieces) in cases {
        let mut facts = serving();
        facts.apply(policy(spec.clone()));
        assert_condition(case, &get_one(&facts, "AccessPolicy", "web"), r#type, head, pieces);
    }
}

#[test]
fn its_status_counts_services_and_endpoints() {
    let mut facts = serving();
    facts.sidecar(2, "/ns/shop/sa/api", &[("shop/api", port("http", 80)), ("bank/api", port("http", 80))]);
    facts.apply(policy(json!({ "action": "ALLOW" })));
    let object = get_one(&facts, "ap", "web");
    assert_eq!(object["status"]["services"], json!(["shop/api", "shop/web"]));
    assert_eq!(object["status"]["endpoints"], 2);
}
