use tombolo_overlay::keys::{CidKey, Hour};

use super::*;

fn ring() -> v1::KeyRing {
    KeyRing::derive(Hour(10), 2, |_| CidKey::from_bytes([1; 16])).to_wire()
}

fn own() -> (ClusterName, ClusterTag) {
    ("east".parse().unwrap(), ClusterTag::new(1).unwrap())
}

fn backend_of(cluster: &str, tag: u32) -> v1::Backend {
    v1::Backend {
        cluster: cluster.into(),
        tag,
        handle: 300,
        keys: Some(ring()),
        spiffe_ids: vec![format!("spiffe://acme.example/cluster/{cluster}/ns/shop/sa/web")],
        healthy: 2,
        total: 2,
        ..Default::default()
    }
}

fn snapshot() -> v1::SidecarSnapshot {
    v1::SidecarSnapshot {
        revision: 7,
        cluster: "east".into(),
        tag: 1,
        direct: true,
        endpoints: vec![v1::LocalEndpoint { block: 5, address: "127.0.0.1:7442".into() }],
        inbound: vec![v1::InboundHandle {
            binding: Some(v1::HandleBinding {
                handle: 300,
                importer: "west".into(),
                service: "shop/web".into(),
                export_uid: vec![0; 16],
            }),
            class: v1::HandleClass::Service.into(),
            ..Default::default()
        }],
        upstreams: vec![v1::Upstream {
            service: "shop/web".into(),
            ports: vec![v1::ServicePort { port: 80, ..Default::default() }],
            backends: vec![
                v1::Backend { endpoints: vec![5 << 4, 6 << 4], ..backend_of("east", 1) },
                backend_of("west", 2),
            ],
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn parse(wire: &v1::SidecarSnapshot) -> Tables {
    let (cluster, tag) = own();
    Tables::parse(wire, &cluster, tag).unwrap()
}

#[test]
fn a_whole_snapshot_parses_and_endpoints_without_an_address_are_chosen_as_often_as_others() {
    let tables = parse(&snapshot());
    assert!(tables.rejected.is_empty(), "{:?}", tables.rejected);
    let upstream = &tables.upstreams[&"shop/web".parse().unwrap()];
    assert_eq!((upstream.ports.as_slice(), upstream.backends.len()), ([(Protocol::Tcp, 80)].as_slice(), 2));
    let endpoints = [5, 6].map(|block: u32| EndpointId::from_u32(block << 4));
    assert_eq!(tables.routes.services[&Handle::from_u32(300)], endpoints);
    let known = endpoints.map(|endpoint| tables.routes.endpoints.contains_key(&endpoint.block()));
    assert_eq!(known, [true, false], "the second is reached through a gateway");
    assert_eq!(&*tables.inbound.handles[&Handle::from_u32(300)].service, "shop/web");
}

#[test]
fn each_bad_record_is_refused_by_name_and_the_rest_counts() {
    type Spoil = fn(&mut v1::SidecarSnapshot);
    let cases: [(&str, &str, Spoil); 10] = [
        ("backend", "spiffe_ids", |s| s.upstreams[0].backends[1].spiffe_ids.clear()),
        ("backend", "weights", |s| s.upstreams[0].backends[1].weights = vec![1, 2]),
        ("backend", "spiffe_ids", |s| s.upstreams[0].backends[1].spiffe_ids[0] = "http://x".into()),
        ("backend", "keys", |s| s.upstreams[0].backends[1].keys = None),
        ("backend", "tag", |s| s.upstreams[0].backends[1].tag = 1 << 24),
        ("backend", "cluster", |s| s.upstreams[0].backends[1].cluster = "east".into()),
        ("port", "port", |s| s.upstreams[0].ports[0].port = 70_000),
        ("port", "protocol", |s| s.upstreams[0].ports[0].protocol = "SCTP".into()),
        ("inbound", "class", |s| s.inbound[0].class = 2),
        ("inbound", "handle", |s| s.inbound[0].binding.as_mut().unwrap().handle = 2),
    ];
    for (record, field, spoil) in cases {
        let mut wire = snapshot();
        spoil(&mut wire);
        let tables = parse(&wire);
        let [rejected] = tables.rejected.as_slice() else {
            panic!("{record} {field}: {:?}", tables.rejected)
        };
        assert_eq!(rejected.record, record);
        assert!(rejected.error.field.contains(field), "{:?}", rejected.error);
        assert_eq!(tables.upstreams.len(), 1, "the rest counts");
    }
}

#[test]
fn a_snapshot_of_another_cluster_is_refused_whole() {
    let (cluster, tag) = own();
    let mut wire = snapshot();
    wire.cluster = "west".into();
    assert!(Tables::parse(&wire, &cluster, tag).is_err());
    let mut wire = snapshot();
    wire.tag = 9;
    assert!(Tables::parse(&wire, &cluster, tag).is_err(), "a recreated cluster is another one");
}

#[test]
fn without_direct_everything_goes_through_the_gateways() {
    let mut wire = snapshot();
    wire.direct = false;
    let tables = parse(&wire);
    assert!(tables.routes.endpoints.is_empty() && tables.routes.services.is_empty());
}
