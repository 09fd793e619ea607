//! Health checks by a program, and backends without a sidecar: what is taken, and what is refused by its field.

use serde_json::{Value, json};

use crate::resource::{Object, Spec};

fn workload(spec: Value) -> Result<Object, String> {
    let object = json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "Workload",
        "metadata": { "name": "legacy", "namespace": "shop" }, "spec": spec,
    });
    Object::from_json(object).map_err(|error| error.to_string())
}

fn service(more: Value) -> Value {
    let mut service = json!({ "name": "db", "ports": [ { "port": 5432 } ] });
    for (key, value) in more.as_object().into_iter().flatten() {
        service[key] = value.clone();
    }
    service
}

#[test]
fn a_check_by_a_program_names_it_by_its_path_or_asks_for_a_shell() {
    let check = |command: Value| {
        let spec = json!({ "services": [ service(json!({ "healthCheck": { "command": command } })) ] });
        let object = workload(spec)?;
        let Spec::Workload(spec) = object.spec else { return Err("another kind".to_owned()) };
        let check = spec.services[0].health_check.clone().and_then(|check| check.command);
        check.ok_or("no command")?.command().map_err(str::to_owned)
    };
    assert_eq!(
        check(json!({ "exec": [ "/usr/bin/pg_isready", "-q" ] })).unwrap(),
        ["/usr/bin/pg_isready", "-q"]
    );
    assert_eq!(check(json!({ "shell": "test -e /run/primary" })).unwrap()[..2], ["/bin/sh", "-c"]);
    for (bad, expected) in [
        (json!({}), "either exec"),
        (json!({ "exec": [ "pg_isready" ] }), "absolute path"),
        (json!({ "exec": [ "/bin/true" ], "shell": "true" }), "either exec"),
        (json!({ "shell": " " }), "either exec"),
    ] {
        let error = check(bad.clone()).unwrap_err();
        assert!(error.contains("healthCheck.command") && error.contains(expected), "{bad}: {error}");
    }
}

#[test]
fn backends_need_the_sidecar_in_front_and_one_port_and_addresses() {
    let backends =
        json!([ { "address": "db.legacy:5432", "weight": 80 }, { "address": "[2001:db8::1]:5432" } ]);
    let good = workload(json!({ "via": "front", "services": [ service(json!({ "backends": backends })) ] }))
        .unwrap();
    let Spec::Workload(spec) = &good.spec else { panic!("another kind") };
    assert_eq!(spec.holder("legacy"), "front");
    assert_eq!(Object::from_json(good.to_json()).unwrap(), good);
    let cases = [
        (json!({ "services": [ service(json!({ "backends": backends })) ] }), "spec.via"),
        (json!({ "via": "a", "sidecar": "b", "services": [] }), "either sidecar or via"),
        (
            json!({ "via": "a", "services": [ service(json!({ "backends": backends, "ports": [ { "port": 1 }, { "port": 2 } ] })) ] }),
            "spec.services[0].ports",
        ),
        (
            json!({ "via": "a", "services": [ service(json!({ "backends": [ { "address": "db.legacy" } ] })) ] }),
            "spec.services[0].backends[0].address",
        ),
        (
            json!({ "via": "a", "services": [ service(json!({ "backends": [ { "address": "a:1", "weight": 1001 } ] })) ] }),
            "spec.services[0].backends[0].weight",
        ),
        (
            json!({ "via": "a", "services": [ service(json!({ "backends": vec![json!({ "address": "a:1" }); 33] })) ] }),
            "at most 32",
        ),
        (
            json!({ "via": "a", "services": [ service(json!({ "backends": backends, "healthCheck": { "command": { "shell": "true" } } })) ] }),
            "tcp or http",
        ),
    ];
    for (spec, expected) in cases {
        let error = workload(spec.clone()).unwrap_err();
        assert!(error.contains(expected), "{spec}: {error}");
    }
}
