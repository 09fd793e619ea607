use std::collections::BTreeMap;

use base64::Engine as _;
use proptest::prelude::*;

use super::super::settings::InjectSettings;
use super::*;

fn request(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut review = json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": "705ab4f5", "operation": "CREATE", "namespace": "shop",
            "resource": { "group": "", "version": "v1", "resource": "pods" },
            "object": { "metadata": { "generateName": "web-" }, "spec": { "containers": [{ "name": "app" }] } },
        },
    });
    change(&mut review);
    review.to_string().into_bytes()
}

fn decided(asked: &Asked) -> Decision {
    let settings = InjectSettings {
        image: "tombolo:1".into(),
        capture_image: "tombolo:1".into(),
        federator: "f:1".into(),
        requests: Default::default(),
        limits: Default::default(),
    };
    let given = Given {
        settings: &settings,
        join_token: "t".into(),
        audience: "a".into(),
        virtual_ranges: Vec::new(),
        ipv6: false,
    };
    let labels = BTreeMap::from([("tombolo.dev/inject".to_owned(), "enabled".to_owned())]);
    decide(asked, &NamespaceLabels::of(&labels), &given)
}

#[test]
fn a_new_pod_is_answered_with_a_patch_and_an_injected_one_without() {
    let mut asked = read(&request(|_| ())).unwrap();
    let decision = decided(&asked);
    let answer = decision.answer(&asked.uid);
    let response = &answer["response"];
    assert_eq!(
        (&response["uid"], &response["allowed"], &response["patchType"]),
        (&json!("705ab4f5"), &json!(true), &json!("JSONPatch"))
    );
    let patch =
        base64::engine::general_purpose::STANDARD.decode(response["patch"].as_str().unwrap()).unwrap();
    let patch: Vec<Value> = serde_json::from_slice(&patch).unwrap();
    assert!(patch.iter().any(|operation| operation["path"] == "/spec/initContainers"), "{patch:?}");
    for operation in patch {
        let path = operation["path"].as_str().unwrap();
        let (part, field) = path.trim_start_matches('/').split_once('/').unwrap();
        asked.pod[part][field] = operation["value"].clone();
    }
    assert_eq!(decided(&asked), Decision::Unchanged { warnings: Vec::new() });
    asked.pod["metadata"]["annotations"] = json!({ "tombolo.dev/serve": "rubbish" });
    let refused = decided(&asked).answer("u");
    let message = refused["response"]["status"]["message"].as_str().unwrap();
    assert!(
        message.contains("metadata.annotations[tombolo.dev/serve]") && message.contains("rubbish"),
        "{message}"
    );
    assert_eq!(refused["response"]["allowed"], false);
}

#[test]
fn what_is_not_understood_is_answered_with_the_field_and_what_is_not_ours_is_let_through() {
    type Change = fn(&mut Value);
    let fields: [(Change, &str); 4] = [
        (|review| review["apiVersion"] = "admission.k8s.io/v1beta1".into(), "v1beta1"),
        (|review| review["kind"] = 7.into(), "apiVersion"),
        (|review| review["request"]["namespace"] = "".into(), "request.namespace"),
        (|review| review["request"]["object"] = Value::Null, "request.object"),
    ];
    for (change, said) in fields {
        let answer = read(&request(change)).unwrap_err().answer().unwrap();
        let message = answer["response"]["status"]["message"].as_str().unwrap_or_default();
        assert!(answer["response"]["allowed"] == false && message.contains(said), "{said}: {answer}");
    }
    let others: [Change; 4] = [
        |review| review["request"]["operation"] = "UPDATE".into(),
        |review| review["request"]["resource"]["resource"] = "services".into(),
        |review| review["request"]["resource"]["group"] = "apps".into(),
        |review| review["request"]["subResource"] = "ephemeralcontainers".into(),
    ];
    for change in others {
        let answer = read(&request(change)).unwrap_err().answer().unwrap();
        assert_eq!(answer["response"]["allowed"], true, "{answer}");
    }
    for body in [b"".as_slice(), b"<html>", b"[]", b"{\"request\":{}}", b"\xff"] {
        assert!(read(body).unwrap_err().answer().is_none());
    }
}

#[test]
fn a_warning_is_cut_between_characters() {
    let long = "é".repeat(200);
    assert_eq!(cut(&long).chars().count(), 128);
    assert_eq!(cut("short"), "short");
}

proptest! {
    #[test]
    fn no_body_makes_it_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read(&body);
    }
}
