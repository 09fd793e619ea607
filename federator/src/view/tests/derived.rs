//! Objects that follow from the facts, and how they are asked for.

use super::*;

fn importing() -> Facts {
    let mut facts = east();
    facts.link("west");
    facts.import("west").exports.insert(service("shop/web"), exported(1, 1, &[port("http", 80)]));
    facts.import("west").exports.insert(service("bank/db"), exported(1, 1, &[port("", 5432)]));
    facts
}

#[test]
fn an_import_is_there_because_a_peer_exports() {
    let facts = importing();
    let import = get_one(&facts, "ServiceImport", "web");
    assert_eq!(import["apiVersion"], "multicluster.x-k8s.io/v1beta1");
    assert_eq!(import["metadata"]["annotations"][DERIVED], "true");
    assert_eq!(import["metadata"]["creationTimestamp"], "2026-11-24T02:14:15Z");
    assert_eq!(import["spec"]["type"], "ClusterSetIP");
    assert_eq!(import["spec"]["ports"], json!([{ "name": "http", "port": 80, "protocol": "TCP" }]));
    assert_eq!(import["status"]["clusters"], json!([{ "cluster": "west" }]));
    let again = get_one(&facts.clone(), "ServiceImport", "web");
    assert_eq!(import["metadata"]["uid"], again["metadata"]["uid"]);
    assert_ne!(import["metadata"]["uid"], get_one(&facts, "ServiceImport", "db")["metadata"]["uid"]);
    let mut bare = import.clone();
    bare.as_object_mut().unwrap().remove("status");
    let mut facts = facts;
    facts.apply(bare);
    let applied = get_one(&facts, "ServiceImport", "web");
    assert_eq!(applied["metadata"]["uid"], "uid-of-web", "what is shown can be applied: {applied}");
    assert!(applied["metadata"].get("annotations").is_none(), "and is derived no more: {applied}");
}

#[test]
fn an_exporter_imports_too_and_ports_are_united() {
    let mut facts = importing();
    facts.export("web", None);
    facts.sidecar(7, "/ns/shop/sa/web", &[("shop/web", port("admin", 81)), ("shop/web", port("http", 8080))]);
    let import = get_one(&facts, "ServiceImport", "web");
    assert_eq!(import["status"]["clusters"], json!([{ "cluster": "east" }, { "cluster": "west" }]));
    let ports: Vec<_> = import["spec"]["ports"].as_array().unwrap().iter().map(|p| &p["port"]).collect();
    assert_eq!(ports, [81, 8080], "east exported first and wins the name http");
    facts.export("only-here", Some(""));
    assert_eq!(
        get_one(&facts, "ServiceImport", "only-here")["status"]["clusters"],
        json!([{ "cluster": "east" }])
    );
}

#[test]
fn a_service_that_is_only_served_here_is_no_import() {
    let mut facts = east();
    facts.sidecar(7, "/ns/shop/sa/web", &[("shop/web", port("", 80))]);
    assert_eq!(get(&facts, "ServiceImport"), Vec::<Value>::new());
}

#[test]
fn an_applied_import_is_shown_once_and_waits_for_an_exporter() {
    let mut facts = importing();
    for name in ["web", "lonely"] {
        facts.apply(json!({
            "apiVersion": "multicluster.x-k8s.io/v1alpha1", "kind": "ServiceImport",
            "metadata": { "name": name, "namespace": "shop" },
            "spec": { "type": "ClusterSetIP", "ports": [{ "port": 99 }] },
        }));
    }
    let web = get_one(&facts, "ServiceImport", "web");
    assert_eq!(web["spec"]["ports"][0]["port"], 99, "as it was applied");
    assert_condition("exported", &web, "Ready", "True Ready", &["west 1/1"]);
    let lonely = get_one(&facts, "ServiceImport", "lonely");
    assert_condition(
        "nobody",
        &lonely,
        "Ready",
        "False Pending",
        &["no cluster exports shop/lonely to east"],
    );
    facts.import("west").rejected.insert("export/shop/lonely".into(), "over quota".into());
    let lonely = get_one(&facts, "ServiceImport", "lonely");
    assert_condition(
        "refused",
        &lonely,
        "Ready",
        "False Pending",
        &["west's export is not accepted: over quota"],
    );
}

#[test]
fn a_link_is_there_because_clusters_were_linked() {
    let mut facts = importing();
    let link = get_one(&facts, "ClusterLink", "west");
    assert_eq!(link["metadata"]["annotations"][DERIVED], "true");
    assert!(link["metadata"].get("namespace").is_none());
    assert_eq!(link["spec"]["tag"], "00beef");
    assert_eq!(link["spec"]["gateways"], json!(["203.0.113.7:7440"]));
    assert_eq!(link["status"]["gateways"][0]["name"], "gw-1");
    facts.apply(json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "ClusterLink", "metadata": { "name": "the-west" },
        "spec": { "cluster": "west" },
    }));
    let links = get(&facts, "ClusterLink");
    assert_eq!(links.len(), 1, "the applied object stands for the link: {links:?}");
    assert_eq!(links[0]["metadata"]["name"], "the-west");
}

#[test]
fn objects_are_found_by_namespace_and_name() {
    let facts = importing();
    let find = |kind: &str, namespace: Option<&str>, name: Option<&str>| {
        let query = Query {
            kind: KindInfo::find(kind).unwrap(),
            namespace: namespace.map(str::to_owned),
            name: name.map(str::to_owned),
        };
        let found = objects(&facts, &query, NOW, Duration::from_secs(UNIX));
        let names = found.iter().map(|o| o["metadata"]["name"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    assert_eq!(find("svcim", None, None), ["db", "web"], "by namespace, then name");
    assert_eq!(find("svcim", Some("shop"), None), ["web"]);
    assert_eq!(find("svcim", Some("shop"), Some("db")), Vec::<String>::new());
    assert_eq!(find("svcim", None, Some("db")), ["db"]);
    assert_eq!(find("clink", Some("shop"), None), ["west"], "links belong to the cluster");
    assert_eq!(find("fop", None, None), Vec::<String>::new());
}
