use serde_json::json;

use super::super::{KindInfo, Object, Spec};
use super::*;

fn policy(edit: impl FnOnce(&mut Value)) -> Result<Object, String> {
    let mut object = json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "AccessPolicy",
        "metadata": { "name": "web", "namespace": "shop" },
        "spec": {
            "targetRefs": [{ "kind": "Service", "name": "web" }],
            "ports": [80],
            "action": "ALLOW",
            "rules": [
                { "from": [
                    { "identities": ["spiffe://acme.example/cluster/west/ns/shop/*"] },
                    { "clusters": ["@self", "west"], "namespaces": ["shop"] },
                ] },
                { "from": [{ "clusterProperties": { "region.topology": "eu" } }] },
            ],
            "dryRun": true,
        },
    });
    edit(&mut object);
    Object::from_json(object).map_err(|e| e.to_string())
}

#[test]
fn a_policy_reads_back_as_it_was_written() {
    let object = policy(|_| {}).unwrap();
    assert_eq!(Object::from_json(object.to_json()).unwrap(), object);
    let Spec::AccessPolicy(spec) = &object.spec else { panic!("{object:?}") };
    assert!(spec.dry_run && spec.rules.len() == 2);
    assert!(object.warnings().is_empty());
    for name in ["ap", "accesspolicy", "AccessPolicies"] {
        assert_eq!(KindInfo::find(name).map(|k| k.kind), Some("AccessPolicy"), "{name}");
    }
}

#[test]
fn wrong_fields_are_refused_with_path_value_and_remedy() {
    type Edit = fn(&mut Value);
    fn source(o: &mut Value) -> &mut Value {
        &mut o["spec"]["rules"][0]["from"][0]
    }
    let cases: &[(Edit, &[&str])] = &[
        (|o| o["spec"]["action"] = json!("allow"), &["spec.action", "\"allow\"", "ALLOW or DENY"]),
        (|o| drop(o["spec"].as_object_mut().unwrap().remove("action")), &["spec.action", "missing", "DENY"]),
        (|o| o["spec"]["targetRefs"] = json!([]), &["spec.targetRefs", "leave it out"]),
        (|o| o["spec"]["targetRefs"] = Value::Null, &["spec.targetRefs", "null"]),
        (|o| o["spec"]["targetRefs"][0]["kind"] = json!("Pod"), &["targetRefs[0].kind", "Pod", "Service"]),
        (|o| o["spec"]["targetRefs"][0]["name"] = json!("Web"), &["targetRefs[0].name", "Web", "RFC 1123"]),
        (|o| o["spec"]["ports"] = json!([]), &["spec.ports", "every port"]),
        (|o| o["spec"]["ports"] = json!([80, 70000]), &["spec.ports[1]", "70000", "65535"]),
        (|o| o["spec"]["ports"] = json!(["http"]), &["spec.ports[0]", "http"]),
        (|o| o["spec"]["rules"] = json!("all"), &["spec.rules", "all"]),
        (|o| o["spec"]["dryrun"] = json!(true), &["spec.dryrun", "did you mean dryRun"]),
        (|o| o["spec"]["rules"][0]["from"] = json!([]), &["spec.rules[0].from", "every caller"]),
        (|o| o["spec"]["rules"][0]["from"] = Value::Null, &["spec.rules[0].from", "null"]),
        (|o| *source(o) = json!({}), &["spec.rules[0].from[0]", "identities"]),
        (
            |o| *source(o) = json!({ "identities": null, "clusters": ["west"] }),
            &["from[0].identities", "null"],
        ),
        (|o| *source(o) = json!({ "identities": [] }), &["from[0].identities", "leave it out"]),
        (|o| *source(o) = json!({ "clusters": ["*"] }), &["from[0].clusters[0]", "*", "leave clusters out"]),
        (|o| *source(o) = json!({ "clusters": ["West!"] }), &["from[0].clusters[0]", "West!", "@self"]),
        (|o| *source(o) = json!({ "namespaces": ["*"] }), &["from[0].namespaces[0]", "leave namespaces out"]),
        (|o| *source(o) = json!({ "clusterProperties": {} }), &["from[0].clusterProperties", "missing"]),
        (|o| *source(o) = json!({ "cluster": ["west"] }), &["from[0].cluster", "did you mean clusters"]),
        (
            |o| o["spec"]["rules"][1]["requests"] = json!([{ "methods": ["GET"] }]),
            &["spec.rules[1].requests", "not supported yet"],
        ),
        (
            |o| {
                o["spec"]["action"] = json!("DENY");
                o["spec"]["rules"] = json!([]);
            },
            &["spec.rules", "rules: [{}]"],
        ),
        (|o| o["spec"]["rules"] = json!(vec![json!({}); 65]), &["spec.rules", "65", "at most 64"]),
        (
            |o| {
                let id = format!("spiffe://acme.example/cluster/west/ns/shop/sa/{}", "x".repeat(200));
                *source(o) = json!({ "identities": vec![id; 200] });
            },
            &["spec", "bytes", "split it"],
        ),
    ];
    for (edit, expected) in cases {
        let error = policy(edit).expect_err(expected[0]);
        for part in *expected {
            assert!(error.contains(part), "{error:?} should mention {part:?}");
        }
    }
}

#[test]
fn identities_are_spiffe_ids_with_a_star_only_as_the_last_segment() {
    let with = |id: &str| policy(|o| o["spec"]["rules"][0]["from"][0] = json!({ "identities": [id] }));
    for good in [
        "spiffe://acme.example/cluster/west/ns/shop/sa/cart",
        "spiffe://acme.example/cluster/west/*",
        "spiffe://acme.example/*",
    ] {
        assert!(with(good).is_ok(), "{good}");
    }
    for bad in [
        "cart",
        "*",
        "spiffe://*",
        "spiffe://acme.example",
        "spiffe://acme.example/",
        "spiffe://acme.example/*/ns/shop",
        "spiffe://acme.example/cluster/we*",
        "spiffe://acme.example/cluster//ns",
        "spiffe://acme.example/cluster/../*",
        "spiffe://Acme/cluster/west/*",
        "spiffe://acme.example:443/cluster/west/*",
        "https://acme.example/cluster/west/*",
    ] {
        let error = with(bad).expect_err(bad);
        assert!(error.contains("identities[0]") && error.contains("such as spiffe://"), "{bad}: {error}");
    }
    assert!(with(&format!("spiffe://acme.example/{}", "x".repeat(3000))).unwrap_err().len() < 500);
}

#[test]
fn several_wrong_fields_are_reported_together_and_a_policy_for_nobody_is_said() {
    let error = policy(|o| {
        o["spec"]["action"] = json!("no");
        o["spec"]["ports"] = json!([0]);
    })
    .unwrap_err();
    assert!(error.contains("spec.action") && error.contains("spec.ports[0]"), "{error}");
    let closed = policy(|o| o["spec"] = json!({ "action": "ALLOW" })).unwrap();
    assert!(closed.warnings()[0].contains("nobody is admitted"));
}
