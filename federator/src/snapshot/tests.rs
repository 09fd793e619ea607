//! What gateways and sidecars are told, from hand-built facts of a cluster `east`.

mod access;
mod weights;

use std::collections::BTreeMap;
use std::time::Duration;

use tombolo_model::ids::{Block, EndpointId, Handle};
use tombolo_model::names::ServiceKey;
use tombolo_model::sync::Freshness;
use tombolo_overlay::Across;
use tombolo_overlay::keys::{AcrossTarget, HandleBinding, Hour, KeyRing, LinkKey};
use tombolo_proto::v1;

use super::rings::Rings;
use crate::facts::{CONTROL, Facts, FederatorEndpoint, LeaseRecord, Role};
use crate::view::tests::{Fill, NOW, UNIX, cluster, east, exported, port, service};

const AT: Duration = Duration::from_secs(UNIX);

fn gateway_snapshot(facts: &Facts) -> v1::GatewaySnapshot {
    super::gateway::snapshot(facts, "gw-1", NOW, AT)
}

fn sidecar_snapshot(facts: &Facts, block: u32, upstreams: &[&str]) -> v1::SidecarSnapshot {
    let upstreams: Vec<ServiceKey> = upstreams.iter().map(|text| service(text)).collect();
    let block = Block::new(block).unwrap();
    super::sidecar::snapshot(facts, block, &upstreams, &Rings::default(), NOW, AT)
}

/// The lease of a member that [`Fill::sidecar`] has entered.
fn lease(facts: &mut Facts, block: u32, role: Role) {
    let block = Block::new(block).unwrap();
    let record = LeaseRecord {
        block,
        spiffe_id: facts.registry.members[&block].spiffe_id.to_string(),
        role,
        not_after: UNIX + 1000,
        adopted: false,
        address: None,
        registers: false,
        ids: Vec::new(),
        services: Vec::new(),
        pinned: Vec::new(),
        gateway: None,
        replaced: false,
        left: false,
        group: String::new(),
        pod: None,
        clones: Vec::new(),
    };
    facts.leases.insert(block, record.into());
}

/// A federator, a gateway, a sidecar of shop/web (block 7) and one of shop/api (block 8), both healthy; west is linked.
fn shop() -> Facts {
    let mut facts = east();
    facts.federator = Some(FederatorEndpoint {
        endpoint: EndpointId::from_u32(0x55),
        address: "10.0.0.5:7443".parse().unwrap(),
    });
    facts.gateway("gw-1", Vec::new());
    for (block, path, name) in [(7, "/ns/shop/sa/web", "shop/web"), (8, "/ns/shop/sa/api", "shop/api")] {
        facts.sidecar(block, path, &[(name, port("", 80))]);
        facts.healthy(block, name, None);
        lease(&mut facts, block, Role::Sidecar);
    }
    facts.link("west");
    facts.import("west");
    facts
}

/// With a number of its own.
fn allot(facts: &mut Facts, importer: &str, name: &str, number: u32) {
    facts.allot(importer, name);
    let record = facts.handles.get_mut(&(cluster(importer), name.to_owned())).unwrap();
    record.handle = Handle::from_u32(number);
}

fn binding(wire: &v1::InboundHandle) -> HandleBinding {
    HandleBinding::from_wire(wire.binding.as_ref().unwrap()).unwrap()
}

fn inbound(handles: &[v1::InboundHandle], number: u32) -> Option<&v1::InboundHandle> {
    handles.iter().find(|handle| handle.binding.as_ref().unwrap().handle == number)
}

#[test]
fn a_gateway_knows_every_handle_with_those_who_may_be_behind_it() {
    let mut facts = shop();
    allot(&mut facts, "east", CONTROL, 300);
    allot(&mut facts, "west", CONTROL, 301);
    allot(&mut facts, "east", "shop/web", 400);
    allot(&mut facts, "west", "shop/web", 401);
    facts.sidecar(9, "/ns/shop/sa/web", &[("shop/web", port("", 80))]);
    facts.healthy(9, "shop/web", Some("connection refused"));
    let snapshot = gateway_snapshot(&facts);
    for number in [300, 301] {
        let control = inbound(&snapshot.handles, number).unwrap();
        assert_eq!(control.class(), v1::HandleClass::Control);
        assert_eq!(control.endpoints, [0x55], "the federator");
    }
    for (number, importer) in [(400, "east"), (401, "west")] {
        let web = inbound(&snapshot.handles, number).unwrap();
        assert_eq!(web.class(), v1::HandleClass::Service);
        assert_eq!(web.endpoints, [7 << 4], "only the healthy one");
        assert_eq!(binding(web).importer, cluster(importer));
    }
    let join = inbound(&snapshot.handles, Handle::JOIN.value()).unwrap();
    assert_eq!((join.class(), join.endpoints.as_slice()), (v1::HandleClass::Join, [0x55].as_slice()));
    assert!(snapshot.handles.iter().all(|handle| handle.initials_per_second > 0));
}

#[test]
fn a_peer_has_only_handles_of_what_is_exported_to_it() {
    let mut facts = shop();
    facts.link("north").tag = tombolo_model::ids::ClusterTag::new(0xcafe).unwrap();
    facts.export("web", Some("west"));
    allot(&mut facts, "east", "shop/web", 400);
    allot(&mut facts, "east", "shop/api", 410);
    allot(&mut facts, "west", "shop/web", 401);
    let snapshot = gateway_snapshot(&facts);
    let of = |importer: &str| {
        let handles = snapshot.handles.iter().filter(|h| h.class() == v1::HandleClass::Service);
        handles
            .map(binding)
            .filter(|b| b.importer == cluster(importer))
            .map(|b| b.service)
            .collect::<Vec<_>>()
    };
    assert_eq!(of("west"), ["shop/web"]);
    assert_eq!(of("north"), Vec::<String>::new());
    let told = |peer: &str| crate::records::records(&facts, &cluster(peer)).into_keys().collect::<Vec<_>>();
    assert_eq!(told("west"), ["export/shop/web", "gateways", "properties"]);
    assert_eq!(told("north"), ["gateways", "properties"]);
    let record = &crate::records::records(&facts, &cluster("west"))["export/shop/web"];
    let Some(v1::record::Value::Export(export)) = &record.value else { panic!("{record:?}") };
    assert_eq!((export.handle, export.healthy, export.total), (401, 1, 1));
    assert_eq!(export.spiffe_ids, ["spiffe://acme.example/cluster/east/ns/shop/sa/web"]);
}

#[test]
fn a_released_handle_is_told_to_nobody() {
    let mut facts = shop();
    allot(&mut facts, "east", "shop/web", 400);
    facts.handles.values_mut().for_each(|record| record.released = Some(UNIX));
    assert!(inbound(&gateway_snapshot(&facts).handles, 400).is_none());
    assert!(gateway_snapshot(&facts).links.iter().all(|link| link.outbound.iter().all(|b| b.handle != 400)));
    let sidecar = sidecar_snapshot(&facts, 7, &["shop/web"]);
    assert!(sidecar.inbound.is_empty() && sidecar.upstreams[0].backends.is_empty());
}

#[test]
fn a_sidecar_may_be_called_only_by_the_handles_of_what_it_serves() {
    let mut facts = shop();
    for (importer, name, number) in [
        ("east", "shop/web", 400),
        ("west", "shop/web", 401),
        ("east", "shop/api", 410),
        ("east", CONTROL, 300),
    ] {
        allot(&mut facts, importer, name, number);
    }
    let numbers = |block| {
        let snapshot = sidecar_snapshot(&facts, block, &[]);
        snapshot.inbound.iter().map(|handle| binding(handle).handle.value()).collect::<Vec<_>>()
    };
    assert_eq!(numbers(7), [400, 401]);
    assert_eq!(numbers(8), [410]);
    assert_eq!(numbers(99), Vec::<u32>::new(), "a block that nobody holds");
}

/// The ring that a gateway derives for a handle, from what its own snapshot says.
fn as_gateways_derive(snapshot: &v1::GatewaySnapshot, peer: &str, outbound: u32) -> KeyRing {
    let link = snapshot.links.iter().find(|link| link.peer == peer).unwrap();
    let key = LinkKey::from_bytes(link.key.clone().try_into().unwrap());
    let wire = link.outbound.iter().find(|binding| binding.handle == outbound).unwrap();
    let binding = HandleBinding::from_wire(wire).unwrap();
    KeyRing::derive_now(AT, |hour| key.handle_key(&binding, hour))
}

#[test]
fn a_callers_keys_are_those_that_the_gateways_derive() {
    let mut facts = shop();
    allot(&mut facts, "east", "shop/api", 410);
    facts.link("west").key = "5a".repeat(32);
    let mut export = exported(2, 3, &[port("", 80)]);
    export.spiffe_ids = vec!["spiffe://acme.example/cluster/west/ns/shop/sa/api".into()];
    facts.import("west").exports.insert(service("shop/api"), export);
    let gateway = gateway_snapshot(&facts);
    let snapshot = sidecar_snapshot(&facts, 7, &["shop/api"]);
    let backends: BTreeMap<_, _> =
        snapshot.upstreams[0].backends.iter().map(|backend| (backend.cluster.as_str(), backend)).collect();
    assert_eq!(backends.keys().copied().collect::<Vec<_>>(), ["east", "west"]);
    for (peer, number) in [("east", 410), ("west", 500)] {
        let backend = backends[peer];
        assert_eq!(backend.handle, number);
        let ring = KeyRing::from_wire(backend.keys.as_ref().unwrap()).unwrap();
        assert_eq!(ring, as_gateways_derive(&gateway, peer, number), "{peer}");
        assert_eq!(ring.first_hour(), Some(Hour(UNIX / 3600 - 2)));
        assert_eq!(ring.last_hour(), Some(Hour(UNIX / 3600 + 24)));
    }
    // What comes in is checked with the same keys at the other side.
    let own = as_gateways_derive(&gateway, "east", 410);
    let link = gateway.links.iter().find(|link| link.self_).unwrap();
    assert_eq!(link.key, facts.cluster.self_link_key.as_bytes());
    let incoming = binding(inbound(&gateway.handles, 410).unwrap());
    assert_eq!(own, KeyRing::derive_now(AT, |hour| facts.cluster.self_link_key.handle_key(&incoming, hour)));
    assert_eq!(gateway.cluster_key, facts.cluster.cluster_key.as_bytes());
}

#[test]
fn past_the_gateways_only_as_the_cluster_link_says_and_with_keys_that_the_targets_derive() {
    let mut facts = shop();
    facts.link("west").key = "5a".repeat(32);
    let mut export = exported(2, 3, &[port("", 80)]);
    export.spiffe_ids = vec!["spiffe://acme.example/cluster/west/ns/shop/sa/api".into()];
    let (id, address) = (EndpointId::from_u32(0x91), "203.0.113.20:7442".parse().unwrap());
    let outside = (EndpointId::from_u32(0xa1), "198.51.100.1:7442".parse().unwrap());
    export.endpoints = vec![(id, address), outside];
    let handle = export.handle;
    facts.import("west").exports.insert(service("shop/api"), export);
    allot(&mut facts, "west", "shop/web", 401);
    facts.export("web", Some("west"));
    let exported_endpoints = |facts: &Facts| {
        let record = &crate::records::records(facts, &cluster("west"))["export/shop/web"];
        let Some(v1::record::Value::Export(export)) = &record.value else { panic!("{record:?}") };
        export.endpoints.clone()
    };
    assert!(sidecar_snapshot(&facts, 7, &["shop/api"]).across.is_empty());
    assert!(exported_endpoints(&facts).is_empty(), "addresses cross flat links only");

    facts.apply(serde_json::json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "ClusterLink", "metadata": { "name": "west" },
        "spec": { "egress": "remote", "flat": true, "allowedGatewayRanges": ["203.0.113.0/24"] },
    }));
    assert_eq!(exported_endpoints(&facts)[0].address, "10.0.0.9:7442");
    let snapshot = sidecar_snapshot(&facts, 7, &["shop/api"]);
    let (tag, across, rejected) = Across::from_wire(&snapshot.across[0]).unwrap();
    assert_eq!(rejected, vec![]);
    assert_eq!(across.gateways[0].address.to_string(), "203.0.113.7:7440");
    let (link, own) = (LinkKey::from_bytes([0x5a; 32]), Block::new(7).unwrap());
    let east = facts.cluster.tag;
    let to = |target| KeyRing::derive_now(AT, |hour| link.across_key(tag, target, hour).of_prober(east, own));
    assert_eq!(*across.gateway_keys, to(AcrossTarget::Gateways));
    let flat = across.flat.unwrap();
    assert_eq!(flat.services[&handle], [id]);
    assert_eq!(flat.endpoints.len(), 1, "the other one lies outside the link's ranges");
    let endpoint = &flat.endpoints[&id.block()];
    assert_eq!(endpoint.address, address);
    assert_eq!(*endpoint.keys, to(AcrossTarget::Endpoint(id.block())));
    // With shares of their own, both are to be chosen: by gateways, who reach both.
    let exports = &mut facts.import("west").exports;
    exports.get_mut(&service("shop/api")).unwrap().weights = vec![100, 20];
    let weighted = sidecar_snapshot(&facts, 7, &["shop/api"]);
    let (_, weighted, _) = Across::from_wire(&weighted.across[0]).unwrap();
    assert!(weighted.flat.unwrap().services.is_empty());
    let own = AcrossTarget::Endpoint(own);
    assert_eq!(flat.caller_keys, KeyRing::derive_now(AT, |hour| link.across_key(east, own, hour)));

    // A machine outside is on nobody's flat network; the peer's gateways it may reach.
    lease(&mut facts, 8, Role::Vm);
    let across = &sidecar_snapshot(&facts, 8, &["shop/api"]).across[0];
    assert!(across.flat.is_none() && !across.gateways.is_empty());
}

#[test]
fn rings_follow_the_hour_and_the_key() {
    let rings = Rings::default();
    let link = |byte| LinkKey::from_bytes([byte; 32]);
    let binding = |uid| HandleBinding {
        handle: Handle::from_u32(300),
        importer: cluster("east"),
        service: "shop/web".into(),
        export_uid: [uid; 16],
    };
    let first = rings.handle(&link(1), &binding(1), AT);
    assert_eq!(rings.handle(&link(1), &binding(1), AT + Duration::from_secs(1)), first);
    assert_ne!(rings.handle(&link(2), &binding(1), AT), first);
    assert_ne!(rings.handle(&link(1), &binding(2), AT), first);
    let next = rings.handle(&link(1), &binding(1), AT + Duration::from_secs(3600));
    assert_eq!(next.first_hour, first.first_hour + 1);
    assert_eq!(rings.handle(&link(1), &binding(1), AT), first, "and back, when a clock is set");
}

#[test]
fn an_import_serves_while_fresh_or_stale_and_vanishes_when_expired() {
    let mut facts = shop();
    let mut export = exported(2, 3, &[port("", 80)]);
    export.spiffe_ids = vec!["spiffe://acme.example/cluster/west/ns/shop/sa/far".into()];
    facts.import("west").exports.insert(service("shop/far"), export);
    let backends = |facts: &Facts| {
        let backends = sidecar_snapshot(facts, 7, &["shop/far"]).upstreams.remove(0).backends;
        backends.into_iter().map(|b| (b.cluster, b.stale, b.healthy, b.total)).collect::<Vec<_>>()
    };
    assert_eq!(backends(&facts), [("west".to_owned(), false, 2, 3)]);
    facts.import("west").freshness = Freshness::Stale;
    facts.import("west").connected = false;
    assert_eq!(backends(&facts), [("west".to_owned(), true, 2, 3)]);
    facts.import("west").freshness = Freshness::Expired;
    assert_eq!(backends(&facts), []);
    facts.import("west").freshness = Freshness::Fresh;
    facts.import("west").exports.get_mut(&service("shop/far")).unwrap().spiffe_ids.clear();
    assert_eq!(backends(&facts), [], "nobody could be demanded of the peer");
}

#[test]
fn a_link_that_the_peer_has_ended_is_told_to_nobody() {
    let mut facts = shop();
    let mut export = exported(1, 1, &[port("", 80)]);
    export.spiffe_ids = vec!["spiffe://acme.example/cluster/west/ns/shop/sa/far".into()];
    facts.import("west").exports.insert(service("shop/far"), export);
    let peers = |facts: &Facts| {
        let links = gateway_snapshot(facts).links;
        links.into_iter().map(|link| (link.peer, link.self_)).collect::<Vec<_>>()
    };
    assert_eq!(peers(&facts), [("west".to_owned(), false), ("east".to_owned(), true)]);
    facts.link("west").ended_by_peer = true;
    assert_eq!(peers(&facts), [("east".to_owned(), true)]);
    assert!(sidecar_snapshot(&facts, 7, &["shop/far"]).upstreams[0].backends.is_empty());
}

#[test]
fn a_machine_gets_border_addresses_and_no_neighbours() {
    let mut facts = shop();
    facts.sidecar(20, "/vm/db-1", &[("shop/db", port("", 5432))]);
    lease(&mut facts, 20, Role::Vm);
    let pod = sidecar_snapshot(&facts, 7, &["shop/api"]);
    assert!(pod.direct);
    assert_eq!(pod.gateways[0].address, "10.0.0.1:7441");
    assert_eq!(pod.federators[0].address, "10.0.0.5:7443");
    assert_eq!(pod.endpoints.iter().map(|e| e.block).collect::<Vec<_>>(), [8, 20], "not itself");
    let machine = sidecar_snapshot(&facts, 20, &["shop/api"]);
    assert!(!machine.direct);
    assert_eq!(machine.gateways[0].address, "198.51.100.1:7440");
    assert!(machine.endpoints.is_empty());
    assert_eq!((machine.federators[0].endpoint, machine.federators[0].address.as_str()), (0x55, ""));
    let unknown = sidecar_snapshot(&facts, 99, &[]);
    assert!(!unknown.direct, "who is not known gets no inner address");
}

#[test]
fn a_balanced_border_is_said_to_machines_alone() {
    let mut facts = shop();
    facts.registry.gateways.get_mut("gw-1").unwrap().balanced = true;
    assert!(!super::gateways_for(&facts, Role::Sidecar)[0].balanced);
    assert!(super::gateways_for(&facts, Role::Vm)[0].balanced);
}

#[test]
fn a_caller_that_serves_nothing_has_only_those_as_neighbours_that_it_calls() {
    let mut facts = shop();
    facts.sidecar(30, "/ns/shop/sa/cron", &[]);
    lease(&mut facts, 30, Role::Sidecar);
    let blocks = |facts: &Facts, upstreams: &[&str]| {
        sidecar_snapshot(facts, 30, upstreams).endpoints.iter().map(|e| e.block).collect::<Vec<_>>()
    };
    assert_eq!(blocks(&facts, &["shop/api"]), [8]);
    assert_eq!(blocks(&facts, &[]), Vec::<u32>::new());
    facts.close(8);
    assert_eq!(blocks(&facts, &["shop/api"]), Vec::<u32>::new(), "one that left is no neighbour");
}

#[test]
fn gateways_that_left_or_drain_are_used_by_nobody_and_one_is_not_its_own_sibling() {
    let mut facts = shop();
    let second = crate::registry::GatewayHello {
        name: "gw-2".into(),
        border: "198.51.100.2:7440".parse().unwrap(),
        inner: "10.0.0.2:7441".parse().unwrap(),
        balanced: false,
        zone: String::new(),
        start_number: 2,
        endpoint: Some((EndpointId::from_u32(0x990), Some("10.0.0.2:7442".parse().unwrap()))),
        watch: 91,
    };
    facts.registry.step(crate::registry::Event::Gateway(second), NOW, UNIX);
    let names = |facts: &Facts| {
        super::gateways_for(facts, Role::Sidecar).into_iter().map(|g| g.name).collect::<Vec<_>>()
    };
    assert_eq!(names(&facts), ["gw-1", "gw-2"]);
    assert_eq!(
        gateway_snapshot(&facts).siblings.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(),
        ["gw-2"]
    );
    let endpoint = gateway_snapshot(&facts).endpoints.into_iter().find(|e| e.block == 0x99).unwrap();
    assert_eq!((endpoint.address.as_str(), endpoint.gone), ("10.0.0.2:7442", false));
    let counters = v1::GatewayCounters { draining: true, ..Default::default() };
    let report = v1::StatusReport { gateway: Some(counters), ..Default::default() };
    let event = crate::registry::Event::GatewayReport { name: "gw-2".into(), report: Box::new(report) };
    facts.registry.step(event, NOW, UNIX);
    assert_eq!(names(&facts), ["gw-1"]);
    facts.close(90);
    assert_eq!(names(&facts), Vec::<String>::new());
}

#[test]
fn an_endpoint_without_an_address_registers_and_one_that_left_is_gone() {
    let mut facts = shop();
    let of = |facts: &Facts, block| gateway_snapshot(facts).endpoints.into_iter().find(|e| e.block == block);
    facts.registry.members.get_mut(&Block::new(8).unwrap()).unwrap().address = None;
    let api = of(&facts, 8).unwrap();
    assert!(api.registers && api.address.is_empty() && !api.gone);
    let web = of(&facts, 7).unwrap();
    assert!(!web.registers && web.address == "10.0.0.9:7442");
    facts.close(7);
    assert!(of(&facts, 7).unwrap().gone);
    let member = facts.registry.members.get_mut(&Block::new(8).unwrap()).unwrap();
    member.ids = [3, 5]
        .map(|n| Block::new(8).unwrap().endpoint(tombolo_model::ids::Incarnation::new(n).unwrap()))
        .to_vec();
    assert_eq!(of(&facts, 8).unwrap().min_incarnation, 3, "the oldest of its sockets still lives");
}

#[test]
fn the_policy_and_the_ports_of_a_service_come_with_it() {
    let mut facts = shop();
    facts.apply(serde_json::json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "FailoverPolicy",
        "metadata": { "name": "west-first", "namespace": "shop" },
        "spec": {
            "targetRef": { "kind": "ServiceImport", "name": "api" },
            "tiers": [{ "clusters": ["west"] }, { "clusters": ["east"] }],
        },
    }));
    let upstream = sidecar_snapshot(&facts, 7, &["shop/api"]).upstreams.remove(0);
    assert_eq!(upstream.policy_name, "west-first");
    assert!(upstream.failover_policy_json.contains("west"));
    assert_eq!(
        upstream.ports.iter().map(|p| p.port).collect::<Vec<_>>(),
        [80],
        "served, though not exported"
    );
    let other = sidecar_snapshot(&facts, 7, &["shop/web"]).upstreams.remove(0);
    assert!(other.policy_name.is_empty() && other.failover_policy_json.is_empty());
}

#[test]
fn equal_facts_give_equal_snapshots() {
    let mut facts = shop();
    allot(&mut facts, "east", "shop/api", 410);
    assert_eq!(gateway_snapshot(&facts), gateway_snapshot(&facts.clone()));
    let earlier = sidecar_snapshot(&facts, 7, &["shop/api"]);
    facts.revision += 1;
    assert_eq!(sidecar_snapshot(&facts, 7, &["shop/api"]), earlier, "the revision alone makes no news");
}
