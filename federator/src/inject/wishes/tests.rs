use serde_json::json;

use super::*;

fn labels(of: &[(&str, &str)]) -> NamespaceLabels {
    NamespaceLabels::of(&of.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
}

fn enabled() -> NamespaceLabels {
    labels(&[(INJECT, "enabled")])
}

fn pod(annotations: Value) -> Value {
    json!({ "metadata": { "annotations": annotations }, "spec": { "containers": [{ "name": "app" }] } })
}

fn read(annotations: Value, labels: &NamespaceLabels) -> Result<Wishes, String> {
    match wanted(&pod(annotations), "shop", labels) {
        Ok(Wanted::Yes(wishes)) => Ok(*wishes),
        Ok(other) => Err(format!("{other:?}")),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn the_namespace_decides_unless_the_pod_says_otherwise() {
    let wants = |labels: &NamespaceLabels, metadata: Value| {
        let pod = json!({ "metadata": metadata, "spec": {} });
        matches!(wanted(&pod, "shop", labels).unwrap(), Wanted::Yes(_))
    };
    let none = NamespaceLabels::default();
    assert!(wants(&enabled(), json!({})) && !wants(&none, json!({})));
    assert!(!wants(&labels(&[(INJECT, "disabled")]), json!({})));
    for kind in ["labels", "annotations"] {
        assert!(!wants(&enabled(), json!({ kind: { INJECT: "false" } })), "{kind}");
        assert!(wants(&none, json!({ kind: { INJECT: "true" } })), "{kind}");
    }
    let both = json!({ "labels": { INJECT: "true" }, "annotations": { INJECT: "false" } });
    assert!(!wants(&enabled(), both), "either may keep it away");
}

#[test]
fn pods_that_can_have_none_are_let_through_with_a_reason() {
    for (spec, said) in
        [(json!({ "hostNetwork": true }), "hostNetwork"), (json!({ "os": { "name": "windows" } }), "Linux")]
    {
        let pod = json!({ "metadata": {}, "spec": spec });
        match wanted(&pod, "shop", &enabled()).unwrap() {
            Wanted::NotPossible(why) => assert!(why.contains(said), "{why}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn connections_are_captured_where_the_namespace_lets_pods_and_nowhere_else() {
    let captured = |level: Option<&str>, more: &[(&str, &str)], annotations: Value| {
        let level = level.map(|level| (ENFORCE, level));
        let labels = labels(&[&[(INJECT, "enabled")], level.as_slice(), more].concat());
        read(annotations, &labels).unwrap().capture.is_some()
    };
    let none = || json!({});
    assert!(captured(None, &[], none()) && captured(Some("privileged"), &[], none()));
    assert!(!captured(Some("baseline"), &[], none()) && !captured(Some("restricted"), &[], none()));
    assert!(!captured(None, &[(CAPTURE, "disabled")], none()));
    assert!(captured(None, &[(CAPTURE, "disabled")], json!({ CAPTURE: "enabled" })));
    assert!(!captured(None, &[], json!({ CAPTURE: "disabled" })));
    let forced = labels(&[(INJECT, "enabled"), (ENFORCE, "restricted"), (CAPTURE, "enabled")]);
    let forced = read(none(), &forced).unwrap();
    assert!(forced.capture.is_some() && forced.warnings[0].contains("NET_ADMIN"), "{forced:?}");
}

#[test]
fn everything_that_is_asked_for_is_read() {
    let wishes = read(
        json!({
            SERVE: "web:80=8080, shop/dns:53/udp=dns", UPSTREAMS: "bank/db:5432, shop/web:80=127.0.0.1:9080",
            INBOUND: "strict", INBOUND_ALLOW: "10.0.0.0/24, 10.0.0.1=8080, =9090", EXCLUDE_OUTBOUND_PORTS: "25,465",
            EXCLUDE_OUTBOUND_CIDRS: "192.0.2.0/24, 198.51.100.7", EXCLUDE_INBOUND_PORTS: "9090", OUTBOUND: "services",
            REQUESTS: "cpu=1m", LOG_LEVEL: "info,tombolo=debug", DRAIN: "30s", "example.com/other": "x",
        }),
        &enabled(),
    )
    .unwrap();
    assert_eq!(wishes.serve[0].target, Target::Number(8080));
    assert_eq!(
        (wishes.serve[1].protocol, wishes.serve[1].target.clone()),
        (Protocol::Udp, Target::Name("dns".into()))
    );
    assert_eq!((wishes.upstreams[0].listen, wishes.upstreams[1].listen.unwrap().port()), (None, 9080));
    let capture = wishes.capture.unwrap();
    assert_eq!((capture.outbound, capture.inbound), ("services", Some(Inbound::Strict)));
    assert_eq!(capture.inbound_allow, ["10.0.0.0/24", "10.0.0.1=8080", "=9090"]);
    assert_eq!(capture.exclude_outbound_cidrs.len() + capture.exclude_outbound_ports.len(), 4);
    assert_eq!(wishes.warnings, Vec::<String>::new());
    let misspelt = read(json!({ "tombolo.dev/servs": "web:80=1" }), &enabled()).unwrap();
    assert!(misspelt.warnings[0].contains("tombolo.dev/servs"), "{:?}", misspelt.warnings);
}

#[test]
fn what_is_wrong_is_named_with_its_annotation_and_value() {
    let many = vec!["1"; 101].join(",");
    let cases = [
        (INJECT, "yes", "neither"),
        (CAPTURE, "on", "neither enabled nor disabled"),
        (SERVE, "web:80", "NAME:PORT=TARGET"),
        (SERVE, "web:0=80", "NAME:PORT=TARGET"),
        (SERVE, "web:80=-a", "NAME:PORT=TARGET"),
        (SERVE, "bank/web:80=8080", "of another namespace"),
        (UPSTREAMS, "web:80", "NAMESPACE/NAME:PORT"),
        (UPSTREAMS, "shop/web:80=10.0.0.1:80", "NAMESPACE/NAME:PORT"),
        (OUTBOUND, "some", "all, services or none"),
        (INBOUND, "Strict", "strict, permissive or off"),
        (INBOUND_ALLOW, "10.0.0.1=x", "SOURCE"),
        (INBOUND_ALLOW, "=", "SOURCE"),
        (EXCLUDE_INBOUND_PORTS, "0", "1..=65535"),
        (EXCLUDE_OUTBOUND_PORTS, &many, "too many"),
        (EXCLUDE_OUTBOUND_CIDRS, "10/8", "CIDR"),
        (REQUESTS, "gpu=1", "cpu=10m"),
        (LOG_LEVEL, "a b", "level"),
        (DRAIN, "10", "10s"),
        (DRAIN, "é", "10s"),
    ];
    for (key, value, said) in cases {
        let error = read(json!({ key: value }), &enabled()).unwrap_err();
        assert!(error.contains(key) && error.contains(said), "{key} {value}: {error}");
        assert!(value.len() > 100 || error.contains(value), "{value}: {error}");
    }
    let explicit = labels(&[(INJECT, "enabled"), (ENFORCE, "restricted")]);
    let strict = read(json!({ INBOUND: "strict" }), &explicit).unwrap_err();
    assert!(strict.contains("needs captured connections"), "{strict}");
    let unused = read(json!({ EXCLUDE_OUTBOUND_PORTS: "25" }), &explicit).unwrap();
    assert!(unused.warnings[0].contains(EXCLUDE_OUTBOUND_PORTS));
}

#[test]
fn entries_that_a_sidecar_would_not_start_with_together_are_refused_by_name() {
    let refused = [
        (UPSTREAMS, "shop/web:80,bank/db:1,shop/web:80", "\"shop/web:80\" is about TCP port 80 of shop/web"),
        (
            UPSTREAMS,
            "shop/web:80=127.0.0.1:9080,bank/db:1=127.0.0.1:9080",
            "\"bank/db:1=127.0.0.1:9080\" wants TCP at 127.0.0.1:9080, which \"shop/web:80=127.0.0.1:9080\"",
        ),
        (UPSTREAMS, "shop/dns:53/udp, shop/dns:53/udp", "leave one of them out"),
        (UPSTREAMS, "shop/web:80=127.116.98.7:80", "use 127.0.0.1"),
        (UPSTREAMS, "shop/web:80=127.0.0.1:7448", "the sidecar itself listens"),
        (SERVE, "web:80=8080,shop/web:80=http", "\"shop/web:80=http\" is about TCP port 80 of shop/web"),
    ];
    for (key, value, said) in refused {
        let error = read(json!({ key: value }), &enabled()).unwrap_err();
        assert!(error.contains(&format!("metadata.annotations[{key}]")) && error.contains(said), "{error}");
    }
    for (key, value) in [
        (UPSTREAMS, "shop/web:80,shop/web:81,shop/web:80=127.0.0.1:9080,shop/web:80/udp"),
        (UPSTREAMS, "shop/a:80=127.0.0.1:9080,shop/b:53/udp=127.0.0.1:9080,shop/c:80=127.0.0.2:9080"),
        (SERVE, "web:80=8080,web:81=8080,web:80/udp=8080,admin:80=8080"),
    ] {
        read(json!({ key: value }), &enabled()).unwrap();
    }
}

#[test]
fn an_upstream_at_a_port_that_the_pod_declares_is_a_warning_with_another_port() {
    let warnings = |upstreams: &str| {
        let mut pod = pod(json!({ UPSTREAMS: upstreams }));
        pod["spec"]["containers"][0]["ports"] =
            json!([{ "containerPort": 80 }, { "containerPort": 53, "protocol": "UDP" }]);
        match wanted(&pod, "shop", &enabled()) {
            Ok(Wanted::Yes(wishes)) => wishes.warnings,
            other => panic!("{other:?}"),
        }
    };
    let [warning] = &warnings("shop/web:80,shop/web:53")[..] else { panic!() };
    assert!(warning.contains("TCP port 80") && warning.contains("shop/web:80=127.0.0.1:10080"), "{warning}");
    assert_eq!(warnings("shop/dns:53/udp").len(), 1);
    assert_eq!(warnings("shop/web:80=127.0.0.1:8080"), Vec::<String>::new());
}
