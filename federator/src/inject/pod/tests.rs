use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::wishes::{NamespaceLabels, Wanted, wanted};
use super::*;

fn settings() -> InjectSettings {
    InjectSettings {
        image: "tombolo:1".into(),
        capture_image: "tombolo-tools:1".into(),
        federator: "tombolo-federator.tombolo-system.svc:7443".into(),
        requests: "cpu=10m,memory=32Mi".parse().unwrap(),
        limits: "memory=256Mi".parse().unwrap(),
    }
}

fn given(settings: &InjectSettings) -> Given<'_> {
    Given {
        settings,
        join_token: "tombolo-join-1.x".into(),
        audience: "tombolo.dev/acme.example".into(),
        virtual_ranges: vec!["241.64.0.0/16".into()],
        ipv6: false,
    }
}

fn namespace(level: Option<&str>) -> NamespaceLabels {
    let mut labels = BTreeMap::from([("tombolo.dev/inject".to_owned(), "enabled".to_owned())]);
    labels.extend(level.map(|level| ("pod-security.kubernetes.io/enforce".to_owned(), level.to_owned())));
    NamespaceLabels::of(&labels)
}

fn injected(pod: &Value, level: Option<&str>) -> Result<Value, String> {
    let Wanted::Yes(wishes) = wanted(pod, "shop", &namespace(level)).map_err(|e| e.to_string())? else {
        return Err("not wanted".into());
    };
    inject(pod, &wishes, &given(&settings())).map_err(|e| e.to_string())
}

fn app(annotations: Value) -> Value {
    json!({
        "metadata": { "annotations": annotations },
        "spec": { "containers": [{ "name": "app", "ports": [
            { "name": "http", "containerPort": 8080 }, { "name": "dns", "containerPort": 5353, "protocol": "UDP" },
            { "containerPort": 9090 },
        ] }], "initContainers": [{ "name": "migrate" }] },
    })
}

fn container<'a>(pod: &'a Value, name: &str) -> &'a Value {
    let list = pod["spec"]["initContainers"].as_array().unwrap();
    list.iter().find(|container| container["name"] == name).unwrap_or(&Value::Null)
}

fn args(container: &Value) -> String {
    let args = container["args"].as_array().unwrap();
    args.iter().map(|arg| arg.as_str().unwrap()).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_restricted_pod_gets_a_native_sidecar_without_privileges_before_all_others() {
    let pod = injected(&app(json!({})), Some("restricted")).unwrap();
    let names: Vec<&str> = named(pod["spec"].get("initContainers")).collect();
    assert_eq!(names, [SIDECAR, "migrate"]);
    let sidecar = container(&pod, SIDECAR);
    assert_eq!(sidecar["restartPolicy"], "Always");
    let context = &sidecar["securityContext"];
    assert_eq!(context["capabilities"], json!({ "drop": ["ALL"] }));
    assert_eq!(
        (&context["runAsNonRoot"], &context["allowPrivilegeEscalation"]),
        (&json!(true), &json!(false))
    );
    assert!(!args(sidecar).contains("--capture"), "{}", args(sidecar));
    assert_eq!(pod["metadata"]["labels"][INJECTED], "true");
    let token = &pod["spec"]["volumes"][1]["projected"]["sources"][0]["serviceAccountToken"];
    assert_eq!(token["audience"], "tombolo.dev/acme.example");
    assert!(pod["spec"].get("hostAliases").is_none() && pod["spec"].get("securityContext").is_none());
}

#[test]
fn a_captured_pod_gets_rules_first_and_its_probes_and_scrapes_are_let_through() {
    let annotations = json!({
        "tombolo.dev/inbound": "strict", "tombolo.dev/exclude-outbound-ports": "25", "tombolo.dev/inbound-allow": "10.0.0.9",
        "prometheus.io/scrape": "true", "prometheus.io/port": "9090",
    });
    let pod = injected(&app(annotations), None).unwrap();
    let names: Vec<&str> = named(pod["spec"].get("initContainers")).collect();
    assert_eq!(names, [CAPTURE, SIDECAR, "migrate"]);
    let rules = args(container(&pod, CAPTURE));
    assert_eq!(
        rules,
        "sidecar capture apply --outbound all --virtual-range 241.64.0.0/16 --exclude-port 25 --inbound strict --inbound-port 8080 --inbound-port 9090 --inbound-allow 10.0.0.9 --inbound-allow =9090"
    );
    assert_eq!(container(&pod, CAPTURE)["env"][0]["valueFrom"]["fieldRef"]["fieldPath"], "status.hostIPs");
    assert_eq!(container(&pod, CAPTURE)["image"], "tombolo-tools:1");
    assert_eq!(container(&pod, CAPTURE)["securityContext"]["capabilities"]["add"], json!(["NET_ADMIN"]));
    assert_eq!(container(&pod, SIDECAR)["securityContext"]["capabilities"]["add"], json!(["NET_RAW"]));
    assert!(args(container(&pod, SIDECAR)).contains("--inbound strict --inbound-listen 127.0.0.1:7448"));
}

#[test]
fn upstreams_get_an_address_and_a_name_each_unless_they_name_one() {
    let upstreams =
        json!({ "tombolo.dev/upstreams": "shop/web:80,bank/db:5432,shop/web:443,bank/x:81=127.0.0.1:9081" });
    let pod = injected(&app(upstreams), Some("restricted")).unwrap();
    let said = args(container(&pod, SIDECAR));
    for upstream in [
        "shop/web:80=127.116.98.2:80",
        "bank/db:5432=127.116.98.1:5432",
        "shop/web:443=127.116.98.2:443",
        "bank/x:81=127.0.0.1:9081",
    ] {
        assert!(said.contains(upstream), "{upstream}: {said}");
    }
    let aliases = &pod["spec"]["hostAliases"];
    assert_eq!(aliases[1], json!({ "ip": "127.116.98.2", "hostnames": ["web.shop.svc.clusterset.local"] }));
    assert_eq!(pod["spec"]["securityContext"]["sysctls"][0]["name"], PORT_SYSCTL);
}

#[test]
fn ports_are_served_by_name_and_what_can_not_be_is_said() {
    let pod = injected(&app(json!({ "tombolo.dev/serve": "web:80=http,dns:53/udp=dns" })), None).unwrap();
    let said = args(container(&pod, SIDECAR));
    assert!(
        said.contains("shop/web:80=127.0.0.1:8080") && said.contains("shop/dns:53/udp=127.0.0.1:5353"),
        "{said}"
    );
    let cases = [
        (app(json!({ "tombolo.dev/serve": "web:80=dns" })), "no container has a TCP port of that name"),
        (
            app(json!({ "tombolo.dev/inbound": "strict", "tombolo.dev/exclude-inbound-ports": "8080,9090" })),
            "declares a TCP port",
        ),
        (app(json!({ "tombolo.dev/outbound": "none" })), "captures nothing"),
        (json!({ "metadata": {}, "spec": {} }), "spec.containers"),
        (json!({ "metadata": {}, "spec": { "containers": [{ "name": SIDECAR }] } }), "choose another"),
        (json!({ "metadata": {}, "spec": { "containers": [{}], "volumes": 7 } }), "spec.volumes: is no list"),
        (
            json!({ "metadata": { "labels": 7 }, "spec": { "containers": [{}] } }),
            "metadata.labels: is no object",
        ),
        (json!({ "spec": { "containers": [{}] } }), "metadata: is missing"),
    ];
    for (pod, said) in cases {
        let error = injected(&pod, None).unwrap_err();
        assert!(error.contains(said), "{said}: {error}");
    }
}

#[test]
fn done_again_after_others_it_changes_nothing_but_what_others_ask_for() {
    let mut pod = injected(&app(json!({ "tombolo.dev/upstreams": "shop/web:80" })), None).unwrap();
    // As API servers and other webhooks leave it.
    for container in pod["spec"]["initContainers"].as_array_mut().unwrap() {
        container["terminationMessagePath"] = "/dev/termination-log".into();
        if let Some(mounts) = container.get_mut("volumeMounts").and_then(Value::as_array_mut) {
            mounts.push(json!({ "name": "kube-api-access-x", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount" }));
        }
    }
    assert_eq!(injected(&pod, None).unwrap(), pod);
    // Another annotation takes effect.
    pod["metadata"]["annotations"]["tombolo.dev/exclude-outbound-ports"] = "25".into();
    let again = injected(&pod, None).unwrap();
    assert!(args(container(&again, CAPTURE)).contains("--exclude-port 25"));
    // What somebody put there under our name is not kept.
    pod["spec"]["initContainers"][1]["args"] = json!(["sidecar", "--upstream", "bank/db:1=127.0.0.1:1"]);
    assert!(!args(container(&injected(&pod, None).unwrap(), SIDECAR)).contains("bank/db:1"));
}

fn apply(mut document: Value, patch: &[Value]) -> Value {
    for operation in patch {
        let path = operation["path"].as_str().unwrap();
        let (parent, name) = path.rsplit_once('/').unwrap();
        let name = name.replace("~1", "/").replace("~0", "~");
        let parent = document.pointer_mut(parent).unwrap().as_object_mut().unwrap();
        match operation["op"].as_str().unwrap() {
            "add" => drop(parent.insert(name, operation["value"].clone())),
            "remove" => assert!(parent.remove(&name).is_some()),
            other => panic!("{other}"),
        }
    }
    document
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u16>().prop_map(Value::from),
        "[a-z/~.:=,0-9]{0,12}".prop_map(Value::from),
        Just(Value::from(SIDECAR)),
        Just(Value::from("http")),
    ];
    leaf.prop_recursive(4, 40, 5, |inner| {
        let field = prop_oneof![
            Just("name".to_owned()),
            Just("ports".to_owned()),
            Just("containerPort".to_owned()),
            Just("protocol".to_owned()),
            Just("ip".to_owned()),
            Just("sysctls".to_owned()),
            "[a-z/~]{1,8}",
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(field, inner, 0..5)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// A pod with anything in the places that are read or written.
fn any_pod() -> impl Strategy<Value = Value> {
    let annotation = prop_oneof![
        Just("tombolo.dev/serve".to_owned()),
        Just("tombolo.dev/upstreams".to_owned()),
        Just("tombolo.dev/inbound".to_owned()),
        Just("tombolo.dev/capture".to_owned()),
    ];
    let value = prop_oneof![
        "[a-z0-9:=/.,]{0,20}".prop_map(Value::from),
        Just(json!("web:80=8080")),
        Just(json!("shop/web:80")),
        Just(json!("strict")),
        Just(json!("enabled")),
        any_json()
    ];
    let annotations = prop::collection::btree_map(annotation, value, 0..4);
    let field = prop_oneof![
        Just("containers".to_owned()),
        Just("initContainers".to_owned()),
        Just("volumes".to_owned()),
        Just("hostAliases".to_owned()),
        Just("securityContext".to_owned()),
        "[a-z]{1,6}",
    ];
    let spec = prop::collection::btree_map(field, any_json(), 0..6);
    (annotations, spec, any::<bool>(), any_json()).prop_map(|(annotations, spec, usual, labels)| {
        let mut spec: Map<String, Value> = spec.into_iter().collect();
        if usual {
            spec.insert("containers".to_owned(), app(json!({}))["spec"]["containers"].clone());
        }
        let annotations: Map<String, Value> = annotations.into_iter().collect();
        json!({ "metadata": { "annotations": annotations, "labels": labels }, "spec": spec })
    })
}

proptest! {
    #[test]
    fn whatever_a_pod_is_it_is_refused_or_changed_once_and_the_patch_says_how(pod in any_pod(), captured in any::<bool>()) {
        let level = if captured { None } else { Some("restricted") };
        let Ok(after) = injected(&pod, level) else { return Ok(()) };
        prop_assert_eq!(apply(pod.clone(), &patch(&pod, &after)), after.clone());
        let again = injected(&after, level);
        prop_assert_eq!(again, Ok(after.clone()));
        // Nothing of others is lost.
        for container in pod["spec"]["containers"].as_array().into_iter().flatten() {
            prop_assert!(after["spec"]["containers"].as_array().is_some_and(|list| list.contains(container)));
        }
    }

    #[test]
    fn no_document_makes_it_panic(document in any_json()) {
        let _ = injected(&document, None);
    }
}
