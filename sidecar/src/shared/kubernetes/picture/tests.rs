//! Pictures of objects as an API server sends them.

use serde_json::{Value, json};
use tombolo_kubernetes::words::derived_name;

use super::*;

fn put(tables: &mut Tables, kind: Kind, object: Value) -> bool {
    tables.apply(0, kind, Event::Apply(serde_json::from_value(object).unwrap()))
}

fn remove(tables: &mut Tables, kind: Kind, object: Value) {
    tables.apply(0, kind, Event::Delete(serde_json::from_value(object).unwrap()));
}

fn named(kind: &str, name: &str) -> Value {
    json!({ "name": name, "namespace": "shop", "uid": format!("{kind}-{name}") })
}

fn pod(name: &str, account: &str, addresses: &[&str]) -> Value {
    let ips: Vec<Value> = addresses.iter().map(|ip| json!({ "ip": ip })).collect();
    json!({
        "metadata": named("pod", name), "spec": { "serviceAccountName": account },
        "status": { "phase": "Running", "podIP": addresses[0], "podIPs": ips },
    })
}

fn service(name: &str, ports: Value) -> Value {
    json!({ "metadata": named("service", name), "spec": { "type": "ClusterIP", "ports": ports } })
}

fn slice(service: &str, endpoints: &[(&str, &str, bool)], ports: Value) -> Value {
    let endpoint = |(address, pod, ready): &(&str, &str, bool)| {
        let target = json!({ "kind": "Pod", "name": pod });
        json!({ "addresses": [address], "conditions": { "ready": ready }, "targetRef": target })
    };
    let mut metadata = named("slice", &format!("{service}-1"));
    metadata["labels"] = json!({ LABEL: service });
    let endpoints: Vec<Value> = endpoints.iter().map(endpoint).collect();
    json!({ "metadata": metadata, "endpoints": endpoints, "ports": ports })
}
const LABEL: &str = tombolo_kubernetes::words::LOCAL_SERVICE;

/// `shop/web`, exported, on a pod of each of two service accounts.
fn exported() -> Tables {
    let mut tables = Tables::new(1);
    put(&mut tables, Kind::Pod, pod("web-0", "web", &["10.0.0.1"]));
    put(&mut tables, Kind::Pod, pod("web-1", "web-next", &["10.0.0.2"]));
    let ports = json!([{ "name": "http", "port": 80, "protocol": "TCP", "targetPort": "web" }]);
    put(&mut tables, Kind::Service, service("web", ports));
    let ports = json!([{ "name": "http", "port": 8080, "protocol": "TCP" }]);
    let endpoints = [("10.0.0.1", "web-0", true), ("10.0.0.2", "web-1", false)];
    put(&mut tables, Kind::EndpointSlice, slice("web", &endpoints, ports));
    put(&mut tables, Kind::ServiceExport, json!({ "metadata": named("export", "web") }));
    tables
}

fn account(name: &str) -> Account {
    ("shop".to_owned(), name.to_owned())
}

/// What an account's pods serve: service, port, backends.
fn served(picture: &Picture, name: &str) -> Vec<(String, u16, Vec<String>)> {
    let services = picture.accounts.get(&account(name)).map(|of| of.services.as_slice()).unwrap_or_default();
    let ports = services.iter().flat_map(|of| of.ports.iter().map(move |port| (of, port)));
    let text = |port: &ProvidedPort| port.backends.iter().map(ToString::to_string).collect();
    ports.map(|(of, port)| (of.service.to_string(), port.port, text(port))).collect()
}

#[test]
fn a_service_is_served_by_the_accounts_of_its_pods_on_those_that_are_ready() {
    let mut tables = exported();
    let picture = tables.picture(0, false, &[]);
    assert_eq!(served(&picture, "web"), [("shop/web".to_owned(), 80, vec!["10.0.0.1:8080".to_owned()])]);
    assert_eq!(served(&picture, "web-next"), [("shop/web".to_owned(), 80, vec![])], "none is ready");
    assert_eq!(picture.accounts[&account("web")].sources, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
    remove(&mut tables, Kind::ServiceExport, json!({ "metadata": named("export", "web") }));
    let picture = tables.picture(0, false, &[]);
    assert!(served(&picture, "web").is_empty(), "it is not exported any more");
    assert_eq!(picture.accounts.len(), 2, "its pods may call all the same");
}

#[test]
fn a_slice_leads_nowhere_but_to_the_pods_that_it_names() {
    let mut tables = exported();
    let ports = json!([{ "name": "http", "port": 8080, "protocol": "TCP" }]);
    // The cloud's credentials, another pod's address, a pod that is not there.
    let forged =
        [("169.254.169.254", "web-0", true), ("10.0.0.2", "web-0", true), ("10.0.0.9", "web-9", true)];
    put(&mut tables, Kind::EndpointSlice, slice("web", &forged, ports));
    let picture = tables.picture(0, false, &[]);
    assert_eq!((served(&picture, "web"), picture.nobodys), (vec![], 3));
}

#[test]
fn pods_with_a_sidecar_and_those_of_the_nodes_network_are_nobody_here() {
    let mut tables = exported();
    let mut injected = pod("web-0", "web", &["10.0.0.1"]);
    injected["metadata"]["labels"] = json!({ "tombolo.dev/injected": "true" });
    put(&mut tables, Kind::Pod, injected);
    let mut host = pod("agent-0", "agent", &["192.0.2.7"]);
    host["spec"]["hostNetwork"] = true.into();
    put(&mut tables, Kind::Pod, host);
    let picture = tables.picture(0, false, &[]);
    assert_eq!(picture.accounts.keys().map(|(_, name)| name.as_str()).collect::<Vec<_>>(), ["web-next"]);
    assert_eq!((picture.nobodys, picture.contested), (0, 0));
}

#[test]
fn an_address_is_never_the_former_pods_once_another_may_have_it() {
    let mut tables = exported();
    let whose = |tables: &Tables, unix| {
        let picture = tables.picture(unix, false, &[]);
        let of = |(account, of): (&Account, &AccountPicture)| {
            of.sources.contains(&"10.0.0.1".parse().unwrap()).then(|| account.1.clone())
        };
        picture.accounts.iter().filter_map(of).collect::<Vec<_>>()
    };
    assert_eq!(whose(&tables, 0), ["web"]);
    let mut ending = pod("web-0", "web", &["10.0.0.1"]);
    ending["metadata"]["deletionTimestamp"] = "1970-01-01T00:01:00Z".into();
    put(&mut tables, Kind::Pod, ending.clone());
    assert_eq!(
        (whose(&tables, 59), tables.picture(59, false, &[]).changes_unix),
        (vec!["web".into()], Some(60))
    );
    assert_eq!(whose(&tables, 60), Vec::<String>::new(), "its containers have been killed");
    put(&mut tables, Kind::Pod, pod("thief-0", "thief", &["10.0.0.1"]));
    assert_eq!(whose(&tables, 59), Vec::<String>::new(), "two claim it");
    assert_eq!(tables.picture(59, false, &[]).contested, 1);
    assert_eq!(whose(&tables, 60), ["thief"]);
    ending["status"]["phase"] = "Succeeded".into();
    put(&mut tables, Kind::Pod, ending);
    assert_eq!(whose(&tables, 0), ["thief"]);
}

#[test]
fn of_two_families_one_is_called_and_a_port_by_its_name() {
    let mut tables = Tables::new(1);
    put(&mut tables, Kind::Pod, pod("web-0", "web", &["10.0.0.1", "fd00::1"]));
    let ports = json!([{ "name": "a", "port": 1, "protocol": "TCP" }, { "name": "b", "port": 1, "protocol": "UDP" }, { "name": "c", "port": 2, "protocol": "SCTP" }]);
    put(&mut tables, Kind::Service, service("web", ports));
    let numbers =
        json!([{ "name": "b", "port": 9, "protocol": "UDP" }, { "name": "a", "port": 8, "protocol": "TCP" }]);
    let mut v6 = slice("web", &[("fd00::1", "web-0", true)], numbers.clone());
    v6["metadata"]["name"] = "web-2".into();
    put(&mut tables, Kind::EndpointSlice, v6);
    put(&mut tables, Kind::EndpointSlice, slice("web", &[("10.0.0.1", "web-0", true)], numbers));
    put(&mut tables, Kind::ServiceExport, json!({ "metadata": named("export", "web") }));
    for (v6, at) in [(false, "10.0.0.1"), (true, "[fd00::1]")] {
        let ports: Vec<_> =
            served(&tables.picture(0, v6, &[]), "web").into_iter().map(|(_, _, at)| at).collect();
        assert_eq!(ports, [vec![format!("{at}:8")], vec![format!("{at}:9")]]);
    }
}

#[test]
fn numbers_lead_to_imports_and_nobody_takes_one_in_our_name() {
    let mut tables = Tables::new(1);
    let derived = |import: &str, name: &str, created: &str, number: u16| {
        let ports = json!([
            { "port": 80, "protocol": "TCP", "targetPort": number }, { "port": 53, "protocol": "UDP", "targetPort": number + 1 },
            { "port": 81, "protocol": "TCP" },
        ]);
        let mut service = service(name, ports);
        service["metadata"]["labels"] = json!({ "app.kubernetes.io/managed-by": "tombolo" });
        service["metadata"]["annotations"] = json!({ "tombolo.dev/service-import": import });
        service["metadata"]["creationTimestamp"] = created.into();
        service
    };
    let own = |import: &str| derived_name(&format!("shop/{import}").parse().unwrap());
    put(&mut tables, Kind::Service, derived("web", &own("web"), "2026-01-01T00:00:00Z", 20_007));
    put(&mut tables, Kind::Service, derived("web", "other-name", "2020-01-01T00:00:00Z", 20_007));
    put(&mut tables, Kind::Service, derived("forged", &own("forged"), "2026-01-02T00:00:00Z", 20_007));
    put(&mut tables, Kind::Service, derived("low", &own("low"), "2026-01-01T00:00:00Z", 443));
    let numbered = tables.picture(0, false, &[]).numbered;
    let claim =
        |number, port, protocol| Numbered { number, service: "shop/web".parse().unwrap(), port, protocol };
    assert_eq!(numbered, [claim(20_007, 80, Protocol::Tcp), claim(20_008, 53, Protocol::Udp)]);
    // An older Service is given the number by hand.
    put(&mut tables, Kind::Service, derived("old", &own("old"), "2020-01-01T00:00:00Z", 20_007));
    assert_eq!(tables.picture(0, false, &numbered).numbered, numbered);
}

#[test]
fn nothing_is_said_before_every_table_was_received_once() {
    let mut tables = Tables::new(2);
    for scope in 0..2 {
        for kind in Kind::ALL {
            assert!(!tables.is_synced());
            tables.apply(scope, kind, Event::Init);
            assert!(tables.apply(scope, kind, Event::InitDone), "an empty list is news, too");
        }
    }
    assert!(tables.is_synced());
}
