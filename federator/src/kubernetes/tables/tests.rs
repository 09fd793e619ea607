//! Tables under events in any order, as watches and answers bring them.

use serde_json::{Value, json};

use super::*;
use crate::facts::pods::KubernetesAddresses;

fn object(kind: &str, namespace: &str, name: &str, version: u64, more: Value) -> DynamicObject {
    let mut document = json!({
        "apiVersion": "v1", "kind": kind,
        "metadata": { "name": name, "namespace": namespace, "uid": format!("{kind}-{name}"), "resourceVersion": version.to_string() },
    });
    for (field, value) in more.as_object().unwrap() {
        match (field.as_str(), value) {
            ("metadata", Value::Object(fields)) => {
                for (key, value) in fields {
                    document["metadata"][key] = value.clone();
                }
            }
            _ => document[field] = value.clone(),
        }
    }
    serde_json::from_value(document).unwrap()
}

fn service(version: u64, kind: &str) -> DynamicObject {
    let ports = json!([{ "name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080 }]);
    let spec = json!({ "type": kind, "clusterIP": "10.0.0.1", "ports": ports, "ipFamilies": ["IPv4"] });
    object("Service", "shop", "web", version, json!({ "spec": spec }))
}

fn export(version: u64) -> DynamicObject {
    object("ServiceExport", "shop", "web", version, json!({ "metadata": { "generation": 1 } }))
}

fn slice(name: &str, version: u64, addresses: &[&str]) -> DynamicObject {
    let endpoints: Vec<Value> =
        addresses.iter().map(|a| json!({ "addresses": [a], "conditions": {} })).collect();
    let labels = json!({ LABEL: "web" });
    let ports = json!([{ "name": "http", "port": 8080, "protocol": "TCP" }]);
    object(
        "EndpointSlice",
        "shop",
        name,
        version,
        json!({ "metadata": { "labels": labels }, "endpoints": endpoints, "ports": ports }),
    )
}
const LABEL: &str = super::super::labels::LOCAL_SERVICE;

fn web() -> ServiceKey {
    "shop/web".parse().unwrap()
}

fn listed(tables: &mut Tables, kind: Kind, objects: Vec<DynamicObject>) -> Touched {
    tables.apply(kind, Event::Init);
    objects.into_iter().for_each(|object| drop(tables.apply(kind, Event::InitApply(object))));
    tables.apply(kind, Event::InitDone)
}

#[test]
fn what_peers_would_refuse_is_said_and_not_told() {
    let mut tables = Tables::default();
    tables.apply(Kind::Service, Event::Apply(service(1, "ClusterIP")));
    let long = "x".repeat(MAX_COPIED_BYTES);
    let spec = json!({ "spec": { "exportedAnnotations": { "note": long } } });
    tables.apply(Kind::ServiceExport, Event::Apply(object("ServiceExport", "shop", "web", 2, spec)));
    let KubernetesService::TooLarge(why) = tables.export(&web()).unwrap().service else { panic!("told") };
    assert!(why.contains("spec.exportedAnnotations has 1 entries"), "{why}");
    tables.apply(Kind::ServiceExport, Event::Apply(export(3)));
    assert!(tables.export(&web()).unwrap().service.found().is_some());
}

#[test]
fn an_export_is_what_its_service_and_its_endpoints_make_it() {
    let mut tables = Tables::default();
    let touched = tables.apply(Kind::ServiceExport, Event::Apply(export(1)));
    assert!(touched.exports.contains(&web()) && touched.services.contains(&web()));
    assert_eq!(tables.export(&web()).unwrap().service, KubernetesService::Missing);
    tables.apply(Kind::Service, Event::Apply(service(2, "ExternalName")));
    assert_eq!(tables.export(&web()).unwrap().service, KubernetesService::ExternalName);
    let touched = tables.apply(Kind::Service, Event::Apply(service(3, "ClusterIP")));
    assert!(touched.exports.contains(&web()));
    let touched =
        tables.apply(Kind::EndpointSlice, Event::Apply(slice("web-1", 4, &["10.1.0.2", "10.1.0.1"])));
    assert!(touched.exports.contains(&web()) && touched.services.is_empty());
    tables.apply(Kind::EndpointSlice, Event::Apply(slice("web-2", 5, &["10.1.0.1", "10.1.0.3"])));
    let export = tables.export(&web()).unwrap();
    let hosts: Vec<String> = export.hosts.hosts.iter().map(|host| host.address.to_string()).collect();
    assert_eq!(hosts, ["10.1.0.1", "10.1.0.2", "10.1.0.3"], "each once, in order");
    assert_eq!(export.hosts.ports.len(), 1);
    assert_eq!(export.hosts.ports[0].port, 8080, "where they listen, not what callers name");
    assert_eq!(export.service.found().unwrap().ports[0].port, 80);
    tables.apply(Kind::EndpointSlice, Event::Delete(slice("web-2", 6, &[])));
    assert_eq!(tables.export(&web()).unwrap().hosts.hosts.len(), 2);
    tables.apply(Kind::Service, Event::Delete(service(7, "ClusterIP")));
    let export = tables.export(&web()).unwrap();
    assert_eq!((export.service, export.hosts.hosts.len()), (KubernetesService::Missing, 0));
}

#[test]
fn a_list_that_begins_anew_deletes_nothing_until_it_is_whole() {
    let mut tables = Tables::default();
    for kind in Kind::ALL {
        assert!(!tables.is_synced(), "{kind:?} is still missing");
        listed(&mut tables, kind, Vec::new());
    }
    assert!(tables.is_synced());
    listed(&mut tables, Kind::ServiceExport, vec![export(1)]);
    assert!(tables.export_row(&web()).is_some());
    tables.apply(Kind::ServiceExport, Event::Init);
    assert!(tables.export_row(&web()).is_some(), "the server is away, not the export");
    let touched = tables.apply(Kind::ServiceExport, Event::InitDone);
    assert!(tables.export_row(&web()).is_none() && touched.exports.contains(&web()));
}

#[test]
fn what_is_older_than_what_is_known_is_no_news() {
    let mut tables = Tables::default();
    tables.apply(Kind::Service, Event::Apply(service(5, "ClusterIP")));
    let touched = tables.apply(Kind::Service, Event::Apply(service(4, "ExternalName")));
    assert_eq!(touched, Touched::default(), "the watch is behind the answer to a write");
    let mut other = service(6, "ClusterIP");
    other.metadata.uid = Some("of-before".into());
    let touched = tables.apply(Kind::Service, Event::Delete(other));
    assert_eq!(touched, Touched::default(), "another one of this name was deleted");
    // A server that was restored from a backup counts from lower again: with other uids.
    let mut restored = service(1, "ExternalName");
    restored.metadata.uid = Some("restored".into());
    assert!(!tables.apply(Kind::Service, Event::Apply(restored)).exports.is_empty());
}

#[test]
fn a_namespace_wakes_its_services_when_it_comes_and_when_it_ends_only() {
    let mut tables = Tables::default();
    let namespace = |version, more| object("Namespace", "", "shop", version, more);
    let touched = tables.apply(Kind::Namespace, Event::Apply(namespace(1, json!({}))));
    assert!(touched.namespaces.contains("shop") && tables.has_namespace("shop"));
    let labelled = namespace(2, json!({ "metadata": { "labels": { "a": "b" } } }));
    assert_eq!(tables.apply(Kind::Namespace, Event::Apply(labelled)), Touched::default());
    let ending = namespace(3, json!({ "metadata": { "deletionTimestamp": "2026-11-24T02:15:05Z" } }));
    assert!(!tables.apply(Kind::Namespace, Event::Apply(ending)).namespaces.is_empty());
    assert!(!tables.has_namespace("shop"), "nothing can be made in it any more");
}

#[test]
fn odd_objects_cost_nothing() {
    let mut tables = Tables::default();
    for document in [
        json!({ "spec": null }),
        json!({ "spec": { "ports": [{ "port": 99999 }, 7, null] } }),
        json!({ "spec": [] }),
    ] {
        tables.apply(Kind::Service, Event::Apply(object("Service", "shop", "web", 1, document.clone())));
        tables.apply(
            Kind::ServiceExport,
            Event::Apply(object("ServiceExport", "shop", "web", 1, document.clone())),
        );
        tables.apply(
            Kind::ServiceImport,
            Event::Apply(object("ServiceImport", "shop", "web", 1, document.clone())),
        );
        tables.apply(Kind::EndpointSlice, Event::Apply(object("EndpointSlice", "shop", "web", 1, document)));
    }
    let dotted = object("ServiceExport", "shop", "a.b", 1, json!({}));
    assert_eq!(
        tables.apply(Kind::ServiceExport, Event::Apply(dotted)),
        Touched::default(),
        "no service has it"
    );
    assert!(tables.export(&web()).is_some());
}

#[test]
fn pods_are_those_of_the_slices_with_their_own_ports_and_whether_they_are_counted_on() {
    let mut tables = Tables::default();
    tables.apply(Kind::Service, Event::Apply(service(1, "ClusterIP")));
    tables.apply(Kind::ServiceExport, Event::Apply(export(2)));
    let pod = |name: &str, conditions: Value| {
        let target = json!({ "kind": "Pod", "name": name, "uid": format!("of-{name}") });
        json!({ "addresses": ["10.1.0.1"], "conditions": conditions, "targetRef": target })
    };
    let mut first = slice("web-1", 3, &["10.1.0.9"]);
    first.data["endpoints"] = json!([pod("a", json!({ "ready": true })), pod("b", json!({ "ready": false })), { "addresses": ["10.1.0.2"] }]);
    let mut second = slice("web-2", 4, &[]);
    second.data["endpoints"] = json!([pod("c", json!({}))]);
    second.data["ports"] = json!([{ "name": "http", "port": 8081 }, { "name": "other", "port": 1 }]);
    for slice in [first, second] {
        tables.apply(Kind::EndpointSlice, Event::Apply(slice));
    }
    let groups = tables.export(&web()).unwrap().pods;
    let shown: Vec<String> = groups
        .iter()
        .map(|group| {
            let pods: Vec<String> = group.pods.iter().map(|(uid, ready)| format!("{uid} {ready}")).collect();
            let ports: Vec<String> =
                group.ports.iter().map(|port| format!("{}={}", port.port, port.target)).collect();
            format!("{}: {}", pods.join(", "), ports.join(","))
        })
        .collect();
    assert_eq!(shown, ["of-a true, of-b false: 80=8080", "of-c true: 80=8081"]);
    let headless = json!({ "spec": { "clusterIP": "None", "ports": [] } });
    tables.apply(Kind::Service, Event::Apply(object("Service", "shop", "web", 5, headless)));
    assert!(tables.export(&web()).unwrap().pods.is_empty(), "no port is sent anywhere");
}

#[test]
fn addresses_are_the_derived_services_and_those_of_an_own_service_that_is_exported() {
    let mut tables = Tables::default();
    let cluster_ips = |ips: &[&str]| json!({ "spec": { "clusterIPs": ips, "ports": [] } });
    tables
        .apply(Kind::Service, Event::Apply(object("Service", "shop", "web", 1, cluster_ips(&["10.96.0.5"]))));
    assert_eq!(tables.addresses(&web()), KubernetesAddresses::default(), "nobody's business");
    tables.apply(Kind::ServiceExport, Event::Apply(export(2)));
    let name = derived_name(&web());
    let mut derived = object("Service", "shop", &name, 3, cluster_ips(&["fd00:96::9", "10.96.0.9"]));
    tables.apply(Kind::Service, Event::Apply(derived.clone()));
    assert_eq!(tables.addresses(&web()).set, [] as [std::net::IpAddr; 0], "somebody else's of that name");
    derived.metadata.labels =
        Some([("app.kubernetes.io/managed-by".to_owned(), "tombolo".to_owned())].into());
    derived.metadata.annotations = Some([("tombolo.dev/service-import".to_owned(), "web".to_owned())].into());
    derived.metadata.resource_version = Some("4".to_owned());
    let touched = tables.apply(Kind::Service, Event::Apply(derived));
    assert!(touched.services.contains(&web()), "its import's addresses are looked at again");
    let addresses = tables.addresses(&web());
    let texts = |ips: &[std::net::IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    assert_eq!(
        (texts(&addresses.set), texts(&addresses.local)),
        ("10.96.0.9,fd00:96::9".into(), "10.96.0.5".into())
    );
}
