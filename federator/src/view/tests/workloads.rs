//! `Workload`: applied, and derived from who joined.

use super::*;

fn manifest(sidecar: Option<&str>, services: &[&str]) -> Value {
    let services: Vec<_> =
        services.iter().map(|name| json!({ "name": name, "ports": [{ "port": 80 }] })).collect();
    let mut spec = json!({ "services": services });
    if let Some(sidecar) = sidecar {
        spec["sidecar"] = sidecar.into();
    }
    json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "Workload",
        "metadata": { "name": "web", "namespace": "shop" }, "spec": spec,
    })
}

#[test]
fn a_workload_is_ready_when_its_sidecar_serves_what_it_says() {
    let cases: &[Case<'_>] = &[
        ("not joined", |_| {}, "False NotJoined", &["see Joined"]),
        (
            "serving",
            |f| {
                f.sidecar(7, "/ns/shop/sa/web", &[("shop/web", port("", 80))]);
                f.healthy(7, "shop/web", None);
            },
            "True Ready",
            &["1 of 1"],
        ),
        (
            "a machine",
            |f| {
                f.sidecar(7, "/vm/web", &[("shop/web", port("", 80))]);
                f.healthy(7, "shop/web", None);
            },
            "True Ready",
            &[],
        ),
        (
            "one of two replicas",
            |f| {
                f.sidecar(7, "/ns/shop/sa/web", &[("shop/web", port("", 80))]);
                f.sidecar(8, "/ns/shop/sa/web", &[("shop/web", port("", 80))]);
                f.healthy(7, "shop/web", None);
                f.healthy(8, "shop/web", Some("connection refused"));
            },
            "True Ready",
            &["1 of 2", "00000080: shop/web: connection refused"],
        ),
        (
            "unhealthy",
            |f| {
                f.sidecar(7, "/ns/shop/sa/web", &[("shop/web", port("", 80))]);
                f.healthy(7, "shop/web", Some("connection refused"));
            },
            "False Unhealthy",
            &["0 of 1", "connection refused"],
        ),
        (
            "joined, serving nothing",
            |f| f.sidecar(7, "/ns/shop/sa/web", &[]),
            "False NotServed",
            &["web does not serve shop/web", "--workload"],
        ),
        (
            "refused",
            |f| {
                f.sidecar(7, "/vm/web", &[]);
                let member = f.registry.members.values_mut().next().unwrap();
                member.refused.insert("shop/web".into(), "not granted".into());
            },
            "False Refused",
            &["shop/web is not accepted: not granted"],
        ),
        ("its namesake elsewhere", |f| f.sidecar(7, "/ns/bank/sa/web", &[]), "False NotJoined", &[]),
    ];
    for (case, fill, head, pieces) in cases {
        let mut facts = east();
        facts.apply(manifest(None, &["web"]));
        fill(&mut facts);
        let object = get_one(&facts, "Workload", "web");
        assert_condition(case, &object, "Ready", head, pieces);
        let joined = if head.contains("NotJoined") { "False NotJoined" } else { "True Joined" };
        assert_condition(case, &object, "Joined", joined, &["web"]);
    }
}

#[test]
fn a_workload_may_name_another_sidecar() {
    let mut facts = east();
    facts.apply(manifest(Some("db-1"), &["web"]));
    let object = get_one(&facts, "Workload", "web");
    assert_condition("before", &object, "Joined", "False NotJoined", &["tombolo vm token db-1"]);
    facts.sidecar(7, "/vm/db-1", &[("shop/web", port("", 80))]);
    facts.healthy(7, "shop/web", None);
    let all = get(&facts, "Workload");
    assert_eq!(all.len(), 1, "the machine is the applied workload: {all:?}");
    assert_condition("after", &all[0], "Ready", "True", &[]);
    assert_eq!(all[0]["status"]["endpoints"][0]["id"], "00000070");
}

#[test]
fn who_joined_and_serves_is_a_workload_in_each_namespace() {
    let mut facts = east();
    facts.sidecar(7, "/vm/db-1", &[("shop/db", port("pg", 5432)), ("bank/db", port("", 5432))]);
    facts.sidecar(8, "/vm/db-1", &[("shop/db", port("pg", 5432)), ("shop/admin", port("", 81))]);
    facts.sidecar(9, "/ns/shop/sa/client", &[]);
    facts.identities.insert(
        "1".into(),
        crate::facts::IdentityRecord {
            spiffe_id: "spiffe://acme.example/cluster/east/vm/db-1".into(),
            role: Role::Vm,
            serial: "1".into(),
            issued_unix: UNIX,
            not_after: UNIX + 1,
            workload: false,
            issuer: String::new(),
        },
    );
    let all = get(&facts, "wl");
    let names: Vec<_> = all.iter().map(|w| (&w["metadata"]["namespace"], &w["metadata"]["name"])).collect();
    assert_eq!(names, [(&json!("bank"), &json!("db-1")), (&json!("shop"), &json!("db-1"))]);
    let shop = &all[1];
    assert_eq!(shop["metadata"]["annotations"][DERIVED], "true");
    assert_eq!(shop["metadata"]["creationTimestamp"], "2026-11-24T02:15:05Z");
    let services: Vec<_> = shop["spec"]["services"].as_array().unwrap().iter().map(|s| &s["name"]).collect();
    assert_eq!(services, ["admin", "db"]);
    assert_eq!(shop["status"]["endpoints"].as_array().unwrap().len(), 2);
    let mut again = shop.clone();
    again.as_object_mut().unwrap().remove("status");
    assert!(Object::from_json(again).is_ok(), "what is shown can be applied: {shop}");
}
