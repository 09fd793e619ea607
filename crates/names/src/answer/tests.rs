//! Every rule of the MCS DNS specification, as a table of questions and answers.

use super::*;
use crate::table::tests::wire;
use tombolo_proto::v1;

fn port(name: &str, port: u32, protocol: &str) -> v1::ServicePort {
    v1::ServicePort { name: name.into(), port, protocol: protocol.into(), ..Default::default() }
}

fn endpoint(cluster: &str, hostname: &str, address: &str) -> v1::NamedEndpoint {
    v1::NamedEndpoint { cluster: cluster.into(), hostname: hostname.into(), address: address.into() }
}

fn table() -> NameTable {
    let web = v1::NamedService {
        local: true,
        ports: vec![port("http", 80, "TCP"), port("http3", 80, "UDP"), port("", 9000, "TCP")],
        ..wire("shop/web", &["241.64.0.1", "fd00::1"])
    };
    let v4 = v1::NamedService { ports: vec![port("", 80, "TCP")], ..wire("shop/v4only", &["241.64.0.2"]) };
    let own = v1::NamedService { clusterset: false, local: true, ..wire("lab/own", &["241.64.0.3"]) };
    let db = v1::NamedService {
        headless: true,
        ports: vec![port("sql", 5432, "TCP"), port("", 9187, "TCP")],
        endpoints: vec![
            endpoint("east", "db-0", "10.0.0.1"),
            endpoint("east", "db-1", "10.0.0.2"),
            endpoint("west.prod", "db-0", "10.1.0.1"),
            endpoint("west.prod", "db-0", "fd00:1::1"),
        ],
        ..wire("shop/db", &[])
    };
    let nobody = v1::NamedService {
        headless: true,
        ports: vec![port("sql", 5432, "TCP")],
        ..wire("shop/nobody", &[])
    };
    let (table, refused) = NameTable::default().updated(true, &[web, v4, own, db, nobody], &[]);
    assert!(refused.is_empty(), "{refused:?}");
    table
}

/// The code and the data of the answers, in the order of text; `forward` where it is not ours.
fn ask(name: &str, kind: RecordType) -> (String, Vec<String>) {
    match answer(&table(), &name.parse().unwrap(), DNSClass::IN, kind, 0) {
        Answer::Forward => ("forward".into(), Vec::new()),
        Answer::Reply(reply) => {
            let negative = reply.answers.is_empty() && reply.code != ResponseCode::Refused;
            let soa =
                matches!(reply.authorities.as_slice(), [record] if record.record_type() == RecordType::SOA);
            assert_eq!(negative, soa, "negative answers, and only they, carry the SOA: {name} {kind}");
            let mut answers: Vec<String> =
                reply.answers.iter().map(|record| record.data.to_string()).collect();
            answers.sort_unstable();
            let code = match reply.code {
                ResponseCode::NoError if negative => "NODATA".to_owned(),
                code => format!("{code:?}"),
            };
            (code, answers)
        }
    }
}

#[test]
fn each_question_has_the_answer_that_the_specification_gives_it() {
    use RecordType::{A, AAAA, ANY, MX, NS, PTR, SOA, SRV, TXT};
    let web = "0 100 80 web.shop.svc.clusterset.local.";
    let web_unnamed = "0 100 9000 web.shop.svc.clusterset.local.";
    let (db0, db1) = ("db-0.east.db.shop.svc.clusterset.local.", "db-1.east.db.shop.svc.clusterset.local.");
    let db2 = "db-0.west.prod.db.shop.svc.clusterset.local.";
    let sql = |host: &str| format!("0 100 5432 {host}");
    let (s0, s1, s2) = (sql(db0), sql(db1), sql(db2));
    let exporter = |host: &str| format!("0 100 9187 {host}");
    let (e0, e1, e2) = (exporter(db0), exporter(db1), exporter(db2));
    let cases: &[(&str, &str, RecordType, &str, &[&str])] = &[
        ("2.2 schema version", "dns-version.clusterset.local.", TXT, "NoError", &["1.0.0"]),
        ("2.2 of another type", "dns-version.clusterset.local.", A, "NODATA", &[]),
        ("2.3.1 A", "web.shop.svc.clusterset.local.", A, "NoError", &["241.64.0.1"]),
        ("2.3.1 AAAA", "web.shop.svc.clusterset.local.", AAAA, "NoError", &["fd00::1"]),
        ("2.3.1 one family", "v4only.shop.svc.clusterset.local.", AAAA, "NODATA", &[]),
        ("case does not matter", "Web.SHOP.svc.ClusterSet.Local.", A, "NoError", &["241.64.0.1"]),
        ("any type", "web.shop.svc.clusterset.local.", ANY, "NoError", &["241.64.0.1", "fd00::1"]),
        ("another type", "web.shop.svc.clusterset.local.", MX, "NODATA", &[]),
        ("2.3.2 SRV of a named port", "_http._tcp.web.shop.svc.clusterset.local.", SRV, "NoError", &[web]),
        ("2.3.2 over UDP", "_http3._udp.web.shop.svc.clusterset.local.", SRV, "NoError", &[web]),
        ("2.3.2 the wrong protocol", "_http._udp.web.shop.svc.clusterset.local.", SRV, "NXDomain", &[]),
        ("2.3.2 another port", "_https._tcp.web.shop.svc.clusterset.local.", SRV, "NXDomain", &[]),
        ("2.3.2 an unnamed port has none", "_tcp.v4only.shop.svc.clusterset.local.", SRV, "NXDomain", &[]),
        ("2.3.2 its address", "_http._tcp.web.shop.svc.clusterset.local.", A, "NODATA", &[]),
        ("names are below it", "_tcp.web.shop.svc.clusterset.local.", SRV, "NODATA", &[]),
        ("below a port", "x._http._tcp.web.shop.svc.clusterset.local.", SRV, "NXDomain", &[]),
        (
            "SRV at the bare name: each number once",
            "web.shop.svc.clusterset.local.",
            SRV,
            "NoError",
            &[web, web_unnamed],
        ),
        ("2.3.3 PTR is not required", "web.shop.svc.clusterset.local.", PTR, "NODATA", &[]),
        ("2.3.4 one cluster's backends", "east.web.shop.svc.clusterset.local.", A, "NXDomain", &[]),
        ("2.3.4 a host's", "db-0.east.web.shop.svc.clusterset.local.", A, "NXDomain", &[]),
        (
            "2.4.1 A of all ready endpoints",
            "db.shop.svc.clusterset.local.",
            A,
            "NoError",
            &["10.0.0.1", "10.0.0.2", "10.1.0.1"],
        ),
        ("2.4.1 AAAA", "db.shop.svc.clusterset.local.", AAAA, "NoError", &["fd00:1::1"]),
        ("2.4.1 of one host", "db-1.east.db.shop.svc.clusterset.local.", A, "NoError", &["10.0.0.2"]),
        (
            "2.4.1 in a cluster of two labels",
            "db-0.west.prod.db.shop.svc.clusterset.local.",
            A,
            "NoError",
            &["10.1.0.1"],
        ),
        ("2.4.1 its AAAA", "db-0.west.prod.db.shop.svc.clusterset.local.", AAAA, "NoError", &["fd00:1::1"]),
        ("2.4.1 a host without AAAA", "db-0.east.db.shop.svc.clusterset.local.", AAAA, "NODATA", &[]),
        ("2.4.1 an unknown host", "db-9.east.db.shop.svc.clusterset.local.", A, "NXDomain", &[]),
        ("2.4.1 none is ready", "nobody.shop.svc.clusterset.local.", A, "NXDomain", &[]),
        ("2.4.1 none is ready", "_sql._tcp.nobody.shop.svc.clusterset.local.", SRV, "NXDomain", &[]),
        (
            "2.4.2 SRV: endpoints by named ports",
            "_sql._tcp.db.shop.svc.clusterset.local.",
            SRV,
            "NoError",
            &[&s2, &s0, &s1],
        ),
        (
            "SRV at the bare name of a headless one",
            "db.shop.svc.clusterset.local.",
            SRV,
            "NoError",
            &[&s2, &s0, &s1, &e2, &e0, &e1],
        ),
        ("2.4.4 one cluster's: no record", "east.db.shop.svc.clusterset.local.", A, "NODATA", &[]),
        ("2.4.4 of two labels", "west.prod.db.shop.svc.clusterset.local.", A, "NODATA", &[]),
        ("2.4.4 half of its name", "prod.db.shop.svc.clusterset.local.", A, "NODATA", &[]),
        ("2.4.4 another cluster", "north.db.shop.svc.clusterset.local.", A, "NXDomain", &[]),
        ("an unknown service", "cart.shop.svc.clusterset.local.", A, "NXDomain", &[]),
        ("a service that nobody exports", "own.lab.svc.clusterset.local.", A, "NXDomain", &[]),
        ("its namespace", "lab.svc.clusterset.local.", A, "NXDomain", &[]),
        ("a namespace", "shop.svc.clusterset.local.", A, "NODATA", &[]),
        ("svc", "svc.clusterset.local.", A, "NODATA", &[]),
        ("not svc", "web.shop.pod.clusterset.local.", A, "NXDomain", &[]),
        ("the zone", "clusterset.local.", A, "NODATA", &[]),
        ("the zone's server", "clusterset.local.", NS, "NoError", &["ns.dns.clusterset.local."]),
        ("of any name", "web.shop.svc.clusterset.local.", SOA, "NODATA", &[]),
        (
            "the ordinary name of a local service",
            "web.shop.svc.cluster.local.",
            A,
            "NoError",
            &["241.64.0.1"],
        ),
        ("one that nobody exports", "own.lab.svc.cluster.local.", A, "NoError", &["241.64.0.3"]),
        (
            "its SRV",
            "_http._tcp.web.shop.svc.cluster.local.",
            SRV,
            "NoError",
            &["0 100 80 web.shop.svc.cluster.local."],
        ),
        ("its other types", "web.shop.svc.cluster.local.", MX, "NODATA", &[]),
        ("below it", "x.web.shop.svc.cluster.local.", A, "NXDomain", &[]),
        ("the ordinary name of another", "v4only.shop.svc.cluster.local.", A, "forward", &[]),
        ("what else is the cluster's", "kubernetes.default.svc.cluster.local.", A, "forward", &[]),
        ("the cluster's zone", "cluster.local.", SOA, "forward", &[]),
        ("other names", "www.example.", A, "forward", &[]),
        ("that look alike", "xclusterset.local.", A, "forward", &[]),
        ("the root", ".", NS, "forward", &[]),
        ("local", "local.", NS, "forward", &[]),
    ];
    for (rule, name, kind, code, expected) in cases {
        let mut expected: Vec<String> = expected.iter().map(ToString::to_string).collect();
        expected.sort_unstable();
        assert_eq!(ask(name, *kind), ((*code).to_owned(), expected), "{rule}: {name} {kind}");
    }
}

#[test]
fn the_zone_s_soa_says_how_long_a_name_may_be_missed() {
    let reply = match answer(
        &table(),
        &"x.shop.svc.clusterset.local.".parse().unwrap(),
        DNSClass::IN,
        RecordType::A,
        0,
    ) {
        Answer::Reply(reply) => reply,
        Answer::Forward => panic!("it is ours"),
    };
    let RData::SOA(soa) = &reply.authorities[0].data else { panic!("{reply:?}") };
    assert_eq!(
        (reply.authorities[0].name.to_string().as_str(), soa.minimum),
        ("clusterset.local.", NEGATIVE_TTL)
    );
    assert_eq!(ask("clusterset.local.", RecordType::SOA).0, "NoError");
    let below_ordinary =
        answer(&table(), &"x.web.shop.svc.cluster.local.".parse().unwrap(), DNSClass::IN, RecordType::A, 0);
    let Answer::Reply(reply) = below_ordinary else { panic!("it is ours") };
    assert_eq!(reply.authorities[0].name.to_string(), "svc.cluster.local.", "no more than that is ours");
}

#[test]
fn other_classes_and_transfers_are_refused() {
    for (class, kind) in [(DNSClass::CH, RecordType::TXT), (DNSClass::IN, RecordType::AXFR)] {
        let name = "web.shop.svc.clusterset.local.".parse().unwrap();
        let Answer::Reply(reply) = answer(&table(), &name, class, kind, 0) else { panic!("it is ours") };
        assert_eq!((reply.code, reply.answers.len(), reply.authorities.len()), (ResponseCode::Refused, 0, 0));
    }
}

#[test]
fn callers_of_a_headless_service_begin_with_different_endpoints() {
    let first = |turn: usize| {
        let name = "db.shop.svc.clusterset.local.".parse().unwrap();
        let Answer::Reply(reply) = answer(&table(), &name, DNSClass::IN, RecordType::A, turn) else {
            panic!("ours")
        };
        assert_eq!(reply.answers.len(), 3);
        reply.answers[0].data.to_string()
    };
    assert_ne!(first(0), first(1));
    assert_ne!(first(1), first(2));
    assert_eq!(first(0), first(4));
}

#[test]
fn the_addresses_of_an_srv_record_s_target_come_along() {
    let name = "_http._tcp.web.shop.svc.clusterset.local.".parse().unwrap();
    let Answer::Reply(reply) = answer(&table(), &name, DNSClass::IN, RecordType::SRV, 0) else {
        panic!("ours")
    };
    let along: Vec<_> = reply.additionals.iter().map(|r| (r.name.to_string(), r.data.to_string())).collect();
    let target = "web.shop.svc.clusterset.local.".to_owned();
    assert_eq!(along, [(target.clone(), "241.64.0.1".to_owned()), (target, "fd00::1".to_owned())]);
}
