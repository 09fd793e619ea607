//! Good objects are read, bad ones are refused with the field, the value and the remedy.

use serde_json::json;

use super::*;

fn policy(edit: impl FnOnce(&mut Value)) -> Result<Object, String> {
    let mut object = json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "FailoverPolicy",
        "metadata": { "name": "checkout", "namespace": "shop" },
        "spec": {
            "targetRef": { "kind": "ServiceImport", "name": "checkout" },
            "tiers": [
                { "clusters": ["@self"] },
                { "matchProperties": { "region.topology": "@SameAsImporter@" } },
                { "clusters": ["west", "central"], "weights": { "west": 80, "central": 20 } },
            ],
            "failover": { "whenHealthyBelow": "50%", "for": "3s" },
            "failback": { "whenHealthyAbove": "80%", "for": "60s" },
        },
    });
    edit(&mut object);
    Object::from_json(object).map_err(|e| e.to_string())
}

#[test]
fn the_designs_example_is_read_and_printed_as_it_was_written() {
    let object = policy(|_| ()).unwrap();
    assert_eq!(object.key().to_string(), "FailoverPolicy/shop/checkout");
    assert_eq!(Object::from_json(object.to_json()).unwrap(), object);
}

#[test]
fn wrong_fields_are_refused_with_path_value_and_remedy() {
    type Edit = fn(&mut Value);
    let cases: &[(Edit, &[&str])] = &[
        (|o| o["kind"] = json!("FailoverPolcy"), &["kind", "FailoverPolcy", "did you mean FailoverPolicy"]),
        (|o| o["apiVersion"] = json!("v1"), &["apiVersion", "v1", "tombolo.dev/v1alpha1"]),
        (|o| o["sepc"] = json!({}), &["sepc", "did you mean spec"]),
        (|o| o["spec"]["failovr"] = json!({}), &["spec.failovr", "did you mean failover"]),
        (|o| o["spec"]["tiers"][1]["cluster"] = json!([]), &["spec.tiers[1].cluster", "clusters"]),
        (|o| o["spec"]["tiers"] = json!("west"), &["spec.tiers", "string"]),
        (|o| o["spec"]["tiers"] = json!([]), &["spec.tiers", "1 to 16"]),
        (
            |o| o["spec"]["tiers"][2]["weights"]["north"] = json!(3),
            &["spec.tiers[2].weights.north", "this tier"],
        ),
        (|o| o["spec"]["tiers"][0]["clusters"] = json!(["West!"]), &["spec.tiers[0].clusters[0]", "West!"]),
        (|o| o["spec"]["failover"]["for"] = json!("3"), &["spec.failover.for", "\"3\"", "500ms"]),
        (
            |o| o["spec"]["failover"]["whenHealthyBelow"] = json!("150%"),
            &["whenHealthyBelow", "150%", "100%"],
        ),
        (
            |o| o["spec"]["failback"]["whenHealthyAbove"] = json!("10%"),
            &["whenHealthyAbove", "back and forth"],
        ),
        (|o| o["spec"]["targetRef"]["kind"] = json!("Pod"), &["spec.targetRef.kind", "Pod", "ServiceImport"]),
        (|o| drop(o["spec"].as_object_mut().unwrap().remove("targetRef")), &["spec.targetRef", "missing"]),
        (|o| o["metadata"]["name"] = json!("Check Out"), &["metadata.name", "Check Out"]),
        (|o| o["metadata"]["namespace"] = json!("a/b"), &["metadata.namespace", "a/b"]),
    ];
    for (edit, expected) in cases {
        let error = policy(edit).expect_err(expected[0]);
        for part in *expected {
            assert!(error.contains(part), "{error:?} should mention {part:?}");
        }
    }
}

#[test]
fn several_wrong_fields_are_reported_together() {
    let error = policy(|o| {
        o["spec"]["targetRef"]["kind"] = json!("Pod");
        o["spec"]["tiers"][0]["clusters"] = json!(["West!"]);
    })
    .unwrap_err();
    assert!(error.contains("targetRef") && error.contains("West!"), "{error}");
}

#[test]
fn what_has_no_effect_yet_is_said() {
    let object = policy(|o| o["spec"]["failback"]["ramp"] = json!("30s")).unwrap();
    assert!(object.warnings()[0].contains("ramp"));
}

#[test]
fn exports_name_the_clusters_they_are_for() {
    let export = |to: Option<&str>| {
        let mut object = json!({ "apiVersion": "multicluster.x-k8s.io/v1beta1", "kind": "ServiceExport",
            "metadata": { "name": "web", "namespace": "shop" } });
        if let Some(to) = to {
            object["metadata"]["annotations"] = json!({ service_export::EXPORT_TO: to });
        }
        Object::from_json(object)
    };
    let (west, north) = ("west".parse().unwrap(), "north".parse().unwrap());
    let to = |value| service_export::ExportTo::of(&export(value).unwrap().metadata).unwrap();
    assert!(to(None).includes(&west) && to(Some("*")).includes(&west));
    assert!(to(Some("west, east")).includes(&west) && !to(Some("west, east")).includes(&north));
    assert!(!to(Some("")).includes(&west), "an empty list is nobody");
    assert!(export(Some("West!")).unwrap_err().to_string().contains("tombolo.dev/export-to"));
}

#[test]
fn workloads_are_checked_field_by_field() {
    let workload = |spec: Value| {
        Object::from_json(json!({ "apiVersion": "tombolo.dev/v1alpha1", "kind": "Workload",
            "metadata": { "name": "web", "namespace": "shop" }, "spec": spec }))
        .map_err(|e| e.to_string())
    };
    let good = json!({
        "services": [{ "name": "web", "ports": [{ "port": 80, "targetPort": 8080 }],
            "healthCheck": { "http": { "path": "/healthz", "port": 8080 }, "interval": "1s" } }],
        "upstreams": [{ "service": "db", "port": 5432, "listen": "127.0.0.1:5432" }],
    });
    assert!(workload(good).is_ok());
    for (spec, part) in [
        (json!({ "services": [{ "name": "web", "ports": [] }] }), "spec.services[0].ports"),
        (
            json!({ "services": [{ "name": "web", "ports": [{ "port": 80 }, { "port": 80 }] }] }),
            "spec.services[0].ports[1].port",
        ),
        (
            json!({ "services": [{ "name": "web", "ports": [{ "port": 70000 }] }] }),
            "spec.services[0].ports[0].port",
        ),
        (
            json!({ "services": [{ "name": "web", "ports": [{ "port": 80 }], "healthCheck": {} }] }),
            "healthCheck",
        ),
        (
            json!({ "upstreams": [{ "service": "db", "port": 1, "listen": "5432" }] }),
            "spec.upstreams[0].listen",
        ),
    ] {
        let error = workload(spec).expect_err(part);
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn kinds_go_by_many_names() {
    for name in ["serviceimports", "ServiceImport", "svcim", "serviceimport"] {
        assert_eq!(KindInfo::find(name).map(|k| k.kind), Some("ServiceImport"));
    }
    assert!(KindInfo::find("pod").is_none());
}
