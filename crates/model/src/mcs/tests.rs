//! Merging, case by case and for any exporters.

use proptest::prelude::*;

use super::*;

fn port(name: &str, port: u16) -> Port {
    Port { name: name.into(), port, app_protocol: String::new(), protocol: "TCP".into() }
}

fn exporter(cluster: &str, since: u64, ports: &[Port]) -> Exporter {
    Exporter {
        cluster: cluster.parse().unwrap(),
        since: Duration::from_secs(since),
        kind: ServiceType::ClusterSetIp,
        ports: ports.to_vec(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        service: Some(ServiceProperties::default()),
    }
}

/// `west`, which differs from east by one change.
fn west(change: impl FnOnce(&mut Exporter)) -> Exporter {
    let mut west = exporter("west", 2, &[port("http", 80)]);
    change(&mut west);
    west
}

fn service(change: impl FnOnce(&mut ServiceProperties)) -> impl FnOnce(&mut Exporter) {
    move |exporter| change(exporter.service.get_or_insert_default())
}

#[test]
fn ports_are_a_union_in_which_the_oldest_wins_a_clash() {
    let http = port("http", 80);
    let cases = [
        ("the same", vec![http.clone()], vec![http.clone()], 0),
        ("a clean union", vec![port("admin", 81)], vec![http.clone(), port("admin", 81)], 1),
        ("a name clash", vec![port("http", 8080)], vec![http.clone()], 1),
        ("a number clash", vec![port("web", 80)], vec![http.clone()], 1),
        ("one without endpoints", vec![], vec![http.clone()], 0),
    ];
    for (case, ports, expected, disagreeing) in cases {
        let merged =
            merge_ports(&[exporter("east", 1, std::slice::from_ref(&http)), exporter("west", 2, &ports)]);
        assert_eq!(merged.ports, expected, "{case}");
        assert_eq!(merged.disagreeing.len(), disagreeing, "{case}");
        assert_eq!(merged.winner.is_some(), disagreeing > 0, "{case}");
    }
    assert_eq!(merge_ports(&[]), MergedPorts::default());
}

#[test]
fn unnamed_ports_do_not_clash_by_name() {
    let merged = merge_ports(&[exporter("east", 1, &[port("", 80), port("", 81)])]);
    assert_eq!(merged.ports.len(), 2);
}

#[test]
fn each_property_on_which_exporters_disagree_has_its_reason_and_says_who_wins() {
    let sticky = |timeout| {
        service(move |s| {
            s.session_affinity = SessionAffinity::ClientIP;
            s.affinity_timeout_seconds = timeout;
        })
    };
    let label = |exporter: &mut Exporter| drop(exporter.labels.insert("a".into(), "b".into()));
    let note = |exporter: &mut Exporter| drop(exporter.annotations.insert("a".into(), "b".into()));
    let cases: Vec<(&str, Exporter, &str)> = vec![
        ("", west(|_| ()), ""),
        ("TypeConflict", west(|e| e.kind = ServiceType::Headless), "west has Headless"),
        ("PortConflict", west(|e| e.ports = vec![port("http", 81)]), "west has http 81/TCP"),
        ("SessionAffinityConflict", west(sticky(Some(10))), "west has session affinity ClientIP"),
        (
            "InternalTrafficPolicyConflict",
            west(service(|s| s.internal_traffic_policy = InternalTrafficPolicy::Local)),
            "west has internal traffic policy Local",
        ),
        (
            "TrafficDistributionConflict",
            west(service(|s| s.traffic_distribution = Some("PreferClose".into()))),
            "using traffic distribution unset from the oldest export, in east",
        ),
        (
            "IPFamilyConflict",
            west(service(|s| s.ip_families = vec![IpFamily::IPv4, IpFamily::IPv6])),
            "west has IP families IPv4 and IPv6",
        ),
        ("LabelsConflict", west(label), "using no labels from the oldest export, in east. 1/2"),
        ("AnnotationsConflict", west(note), "west has 1 annotation"),
        (
            "PortConflict,AnnotationsConflict",
            west(|e| {
                note(e);
                e.ports = vec![port("http", 81)];
            }),
            "1/2 clusters disagree",
        ),
    ];
    for (reasons, west, said) in cases {
        let merged = merge(&[exporter("east", 1, &[port("http", 80)]), west]);
        assert_eq!(merged.reasons(), reasons);
        assert!(merged.messages().contains(said), "{reasons}: {}", merged.messages());
        let east = merge(&[exporter("east", 1, &[port("http", 80)])]);
        assert_eq!((merged.kind, merged.service, merged.labels), (east.kind, east.service, east.labels));
    }
}

#[test]
fn affinity_timeouts_are_compared_among_those_that_have_the_affinity() {
    let sticky = |cluster: &str, timeout| {
        let mut exporter = exporter(cluster, 1, &[]);
        exporter.service = Some(ServiceProperties {
            session_affinity: SessionAffinity::ClientIP,
            affinity_timeout_seconds: Some(timeout),
            ..ServiceProperties::default()
        });
        exporter
    };
    let merged = merge(&[sticky("a", 10), sticky("b", 20), exporter("c", 3, &[])]);
    assert_eq!(merged.reasons(), "SessionAffinityConflict,SessionAffinityConfigConflict");
    assert!(merged.messages().contains("using an affinity timeout of 10 s"), "{}", merged.messages());
    assert!(merged.messages().contains("1/2 clusters disagree: b has"), "{}", merged.messages());
    let merged = merge(&[exporter("c", 1, &[]), sticky("a", 10), sticky("b", 20)]);
    assert_eq!(merged.reasons(), "SessionAffinityConflict", "no timeout holds, so none is in conflict");
}

#[test]
fn maps_of_one_size_are_still_told_apart() {
    let with = |cluster: &str, value: &str| {
        let mut exporter = exporter(cluster, 1, &[]);
        exporter.labels.insert("team".into(), value.into());
        exporter
    };
    let merged = merge(&[with("east", "a"), with("west", "b")]);
    assert!(merged.messages().ends_with("west has other label"), "{}", merged.messages());
}

#[test]
fn a_cluster_outside_kubernetes_takes_no_part_in_what_only_kubernetes_says() {
    let mut vm = exporter("vm", 1, &[port("http", 80)]);
    vm.service = None;
    let mut k8s = exporter("k8s", 2, &[port("http", 80)]);
    k8s.service =
        Some(ServiceProperties { session_affinity: SessionAffinity::ClientIP, ..Default::default() });
    let merged = merge(&[vm, k8s.clone()]);
    assert_eq!(merged.conflicts, []);
    assert_eq!(merged.service, k8s.service);
}

#[test]
fn a_crowd_of_exporters_makes_a_short_message() {
    let mut exporters = vec![exporter("c0", 0, &[port("http", 80)])];
    exporters.extend((1..200).map(|n| exporter(&format!("c{n}"), n, &[port("http", 81)])));
    let messages = merge(&exporters).messages();
    assert!(messages.contains("199/200") && messages.contains("and 194 more"), "{messages}");
    assert!(messages.len() < 500, "{messages}");
}

fn any_exporter() -> impl Strategy<Value = Exporter> {
    let port =
        ("[ab]?", 1u16..5, prop_oneof![Just("TCP"), Just("UDP")]).prop_map(|(name, port, protocol)| Port {
            name,
            port,
            app_protocol: String::new(),
            protocol: protocol.to_owned(),
        });
    let affinity = prop_oneof![Just(SessionAffinity::None), Just(SessionAffinity::ClientIP)];
    let service = (affinity, proptest::option::of(1u32..3)).prop_map(|(session_affinity, timeout)| {
        ServiceProperties { session_affinity, affinity_timeout_seconds: timeout, ..Default::default() }
    });
    let kind = prop_oneof![Just(ServiceType::ClusterSetIp), Just(ServiceType::Headless)];
    let labels = proptest::collection::btree_map("[a-c]", "[x-y]", 0..3);
    let ports = proptest::collection::vec(port, 0..5);
    ("[a-z]{3}", 0u64..5, kind, ports, labels, proptest::option::of(service)).prop_map(
        |(cluster, since, kind, ports, labels, service)| Exporter {
            cluster: cluster.parse().unwrap(),
            since: Duration::from_secs(since),
            kind,
            ports,
            labels,
            annotations: BTreeMap::new(),
            service,
        },
    )
}

proptest! {
    /// KEP-1645: no duplicate names, no duplicate (protocol, port), nothing that nobody exports; the oldest export's ports
    /// hold whole as far as they are consistent; conflicts exist exactly where somebody differs.
    #[test]
    fn any_merge_is_consistent_and_names_every_disagreement(
        mut exporters in proptest::collection::vec(any_exporter(), 1..5)
    ) {
        exporters.sort_by_key(|exporter| exporter.since);
        let merged = merge(&exporters);
        let mut names = BTreeSet::new();
        let mut numbers = BTreeSet::new();
        for port in &merged.ports {
            prop_assert!(port.name.is_empty() || names.insert(&port.name), "{:?}", merged.ports);
            prop_assert!(numbers.insert((&port.protocol, port.port)), "{:?}", merged.ports);
            prop_assert!(exporters.iter().any(|exporter| exporter.ports.contains(port)));
        }
        let alone = merge(&exporters[..1]);
        prop_assert_eq!(&merged.ports[..alone.ports.len()], &alone.ports[..], "the oldest loses a port");
        prop_assert_eq!(alone.reasons(), "");
        prop_assert_eq!(merged.kind, exporters[0].kind);
        prop_assert_eq!(&merged.labels, &exporters[0].labels);
        let differs = |of: &dyn Fn(&Exporter) -> bool| exporters.iter().any(of);
        let conflict = |reason: &str| merged.conflicts.iter().any(|conflict| conflict.reason == reason);
        prop_assert_eq!(conflict("TypeConflict"), differs(&|e| e.kind != exporters[0].kind));
        prop_assert_eq!(conflict("LabelsConflict"), differs(&|e| e.labels != exporters[0].labels));
        let mut twice = exporters.clone();
        twice.extend(exporters.iter().cloned());
        prop_assert_eq!(merge(&twice).ports, merged.ports, "an exporter that repeats itself adds nothing");
    }
}
