//! Where derived `Service`s lead, and what an import's condition says of it.

use std::collections::BTreeSet;

use tombolo_model::protocol::Protocol;

use super::*;

#[test]
fn a_derived_service_leads_to_the_shared_sidecars_that_are_ready() {
    let mut server = Server::with_namespace();
    let wanted = shown(ServiceType::ClusterSetIp);
    let numbers = BTreeMap::from([((Protocol::Tcp, 80), 20_007)]);
    let some: BTreeSet<IpAddr> = ["10.1.0.30", "10.1.0.31", "fd00::30"].map(|ip| ip.parse().unwrap()).into();
    let none = BTreeSet::new();
    let front = |addresses| Some(Front { numbers: &numbers, addresses });
    server.settle_with(&wanted, front(&some));
    let derived = server.tables.derived_row(&web()).unwrap();
    assert_eq!(derived.targets(), [((Protocol::Tcp, 80), 20_007)]);
    let addresses = |server: &Server| {
        let slices = server.tables.fronts_of_import(&web());
        let row = slices.get(format!("{}-ipv4", derived_name(&web())).as_str()).copied().cloned();
        row.map(|row| {
            (row.ready.iter().map(|e| e.address.to_string()).collect::<Vec<_>>(), row.ports[0].port)
        })
    };
    let expected = vec!["10.1.0.30".to_owned(), "10.1.0.31".to_owned()];
    assert_eq!(addresses(&server), Some((expected, 20_007)), "of the family of its address");
    assert_eq!(server.settle_with(&wanted, front(&some)), Vec::<String>::new());
    // The last one goes.
    let written = server.settle_with(&wanted, front(&none));
    assert_eq!(written, ["apply EndpointSlice", "status ServiceImport"]);
    assert_eq!(addresses(&server), Some((vec![], 20_007)));
    let condition =
        |server: &Server| server.tables.import_row(&web()).unwrap().status.value()["conditions"][0].clone();
    assert_eq!(condition(&server)["status"], "False");
    assert!(condition(&server)["message"].as_str().unwrap().contains("no shared sidecar is ready"));
    // Neither do slices outlive the service, nor the flag.
    assert_eq!(server.settle(&wanted)[0], "apply Service");
    assert_eq!(addresses(&server), None);
    assert_eq!(condition(&server)["status"], "True");
    server.settle_with(&wanted, front(&some));
    let removed = server.settle(&ShownService::default());
    assert_eq!(removed.iter().filter(|write| *write == "delete EndpointSlice").count(), 3);
    assert!(server.tables.known().is_empty());
}

#[test]
fn ports_that_no_number_is_left_for_and_those_over_udp_are_left_out() {
    let port = |name: &str, port, protocol: &str| Port {
        name: name.into(),
        port,
        app_protocol: String::new(),
        protocol: protocol.into(),
    };
    let mut of = exporter("east", ServiceType::ClusterSetIp);
    of.ports = vec![port("a", 80, "TCP"), port("b", 81, "TCP"), port("c", 82, "UDP"), port("d", 83, "SCTP")];
    let merged = merge(&[of]);
    assert_eq!(
        desired::numbered_ports(&merged),
        [(Protocol::Tcp, 80), (Protocol::Tcp, 81), (Protocol::Udp, 82)]
    );
    let numbers = BTreeMap::from([((Protocol::Tcp, 80), 20_001), ((Protocol::Udp, 82), 20_002)]);
    let shared = BTreeSet::from(["10.1.0.30".parse().unwrap()]);
    let ips = ["10.96.0.7".parse().unwrap(), "fd00:96::7".parse().unwrap()];
    let slices = desired::fronts(&web(), &merged, "uid", &ips, &numbers, &shared);
    let ports: Vec<_> = slices.values().map(|slice| slice["ports"].clone()).collect();
    let expected = json!([
        { "name": "a", "port": 20_001, "protocol": "TCP" }, { "name": "c", "port": 20_002, "protocol": "UDP" },
    ]);
    assert_eq!(ports, [expected.clone(), expected]);
    let count = |slice: &Value| slice["endpoints"].as_array().unwrap().len();
    assert_eq!(slices.values().map(count).collect::<Vec<_>>(), [1, 0], "one per family");
    let service = desired::derived(&web(), &merged, None, "uid", "v1", &numbers).unwrap();
    let targets: Vec<_> =
        service["spec"]["ports"].as_array().unwrap().iter().map(|port| port["targetPort"].clone()).collect();
    assert_eq!(targets, [json!(20_001), Value::Null, json!(20_002), Value::Null]);
}

#[test]
fn an_import_whose_last_change_was_refused_is_not_ready() {
    let mut server = Server::with_namespace();
    let wanted = shown(ServiceType::ClusterSetIp);
    server.settle(&wanted);
    let ready = |refusal| {
        let writes = server.plan_with(&wanted, None, Some(refusal)).writes;
        let [Write::Status { document, .. }] = writes.as_slice() else { panic!("{writes:?}") };
        let condition = &document["status"]["conditions"][0];
        format!("{} {}: {}", condition["status"], condition["reason"], condition["message"]).replace('"', "")
    };
    assert_eq!(ready("ports are wrong"), "False Pending: what is there is out of date: ports are wrong");
    assert!(ready("spec.ipFamilies[0]: Invalid value").starts_with("False IPFamilyNotSupported"));
}

#[test]
fn a_pod_that_comes_or_goes_changes_one_slice() {
    let hosts = |count: u16| KubernetesHosts {
        hosts: (0..count).map(|n| host(&format!("10.1.{}.{}", n / 250, n % 250 + 1))).collect(),
        ports: Vec::new(),
    };
    let slices = |count| {
        let ShownService { import, .. } = shown(ServiceType::Headless);
        let endpoints = BTreeMap::from([("east".parse().unwrap(), hosts(count))]);
        desired::slices(&web(), &ShownImport { endpoints, ..import.unwrap() }, "uid", "v1")
    };
    let (before, after) = (slices(700), slices(701));
    assert_eq!(before.len(), after.len());
    assert_eq!(before.iter().filter(|(name, slice)| after.get(*name) != Some(slice)).count(), 1);
    let sizes = after.values().map(|slice| slice["endpoints"].as_array().unwrap().len());
    assert_eq!(sizes.clone().sum::<usize>(), 701);
    assert!(sizes.max().unwrap() < 150);
}
