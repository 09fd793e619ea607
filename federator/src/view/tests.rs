//! Hand-built facts of a cluster `east`, and what is shown of them.

mod access;
mod derived;
mod exports;
mod kubernetes;
mod links;
mod odd;
mod policies;
mod revocations;
mod services;
mod workloads;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};
use tombolo_identity::{SpiffeId, TrustBundle, TrustDomain};
use tombolo_model::ids::{Block, ClusterTag, EndpointId, Epoch, Handle};
use tombolo_model::names::ClusterName;
use tombolo_model::resource::{KindInfo, Object};
use tombolo_model::sync::Freshness;
use tombolo_overlay::keys::{ClusterKey, LinkKey};
use tombolo_proto::v1;

use super::*;
use crate::facts::{
    ClusterFacts, ControlHandle, HandleRecord, Import, ImportedExport, Link, PeerGateway, Port, Role,
    StoredObject, TrustFacts,
};
use crate::registry::{Event, GatewayHello, Registry, SidecarHello};

/// 2026-11-24T02:15:05Z.
pub const UNIX: u64 = 1_795_486_505;
/// Of the registry's clock.
pub const NOW: Duration = Duration::from_secs(1000);

pub fn cluster(name: &str) -> ClusterName {
    name.parse().unwrap()
}
pub fn service(text: &str) -> ServiceKey {
    text.parse().unwrap()
}
pub fn port(name: &str, port: u16) -> Port {
    Port { name: name.into(), port, app_protocol: String::new(), protocol: "TCP".into() }
}
pub fn hop(peer: &str, alive: bool, rtt_us: u64) -> v1::HopStatus {
    v1::HopStatus {
        peer: peer.into(),
        address: "203.0.113.7:7440".into(),
        alive,
        rtt_us,
        loss_per_mille: 3,
        mtu: 1420,
        carrier: "udp".into(),
        cluster: peer.split('/').next().unwrap().into(),
        ..Default::default()
    }
}

/// An empty cluster, to be filled.
pub fn east() -> Facts {
    let domain: TrustDomain = "acme.example".parse().unwrap();
    let name = cluster("east");
    let facts = ClusterFacts {
        federator_id: SpiffeId::federator(&domain, &name).unwrap(),
        name,
        tag: ClusterTag::new(0x3e1e2a).unwrap(),
        trust_domain: domain.clone(),
        cluster_key: ClusterKey::from_bytes([1; 32]),
        self_link_key: LinkKey::from_bytes([2; 32]),
        epoch: Epoch(7),
        properties: BTreeMap::new(),
        started_unix: UNIX - 300,
    };
    let trust = TrustFacts {
        bundle: TrustBundle { trust_domain: domain, sequence: 1, roots: Vec::new() },
        bundle_json: String::new(),
        update: None,
        crosses: Vec::new(),
        reissued: Arc::new([]),
        directory_certificate: Vec::new().into(),
        intermediate: Vec::new().into(),
        issuer_sha256: [1; 32],
        root_fingerprint: String::new(),
        root_not_after: 0,
        intermediate_not_after: 0,
        leaves_after: 0,
        refused: BTreeMap::new(),
    };
    Facts {
        cluster: Arc::new(facts),
        trust: Arc::new(trust),
        own_word: None,
        federator: None,
        revision: 42,
        objects: BTreeMap::new(),
        links: BTreeMap::new(),
        handles: BTreeMap::new(),
        leases: BTreeMap::new(),
        registry: Registry::default(),
        imports: BTreeMap::new(),
        shifts: BTreeMap::new(),
        identities: BTreeMap::new(),
        jwt_authorities: Vec::new(),
        federations: BTreeMap::new(),
        upstream: None,
        addresses: Arc::default(),
        kubernetes_hosts: Default::default(),
        first_contacts: BTreeMap::new(),
        store_writable: true,
    }
}

/// Facts with what a test is about added to them.
pub trait Fill {
    fn apply_at(&mut self, created: u64, object: Value);
    fn apply(&mut self, object: Value) {
        self.apply_at(UNIX - 100, object);
    }
    fn export(&mut self, name: &str, to: Option<&str>);
    fn link(&mut self, peer: &str) -> &mut Link;
    fn import(&mut self, peer: &str) -> &mut Import;
    fn allot(&mut self, importer: &str, service: &str);
    fn gateway(&mut self, name: &str, hops: Vec<v1::HopStatus>);
    fn sidecar(&mut self, block: u32, path: &str, services: &[(&str, Port)]);
    fn report(&mut self, block: u32, report: v1::StatusReport);
    fn healthy(&mut self, block: u32, service: &str, reason: Option<&str>);
    fn close(&mut self, watch: u64);
}

impl Fill for Facts {
    fn apply_at(&mut self, created_unix: u64, object: Value) {
        let object = Object::from_json(object).unwrap();
        let uid = format!("uid-of-{}", object.metadata.name);
        let stored =
            StoredObject { uid, created_unix, generation: 3, object, kubernetes: None, in_kubernetes: false };
        self.objects.insert(stored.object.key(), Arc::new(stored));
    }
    fn export(&mut self, name: &str, to: Option<&str>) {
        let annotations = to.map_or_else(|| json!({}), |to| json!({ "tombolo.dev/export-to": to }));
        self.apply(json!({
            "apiVersion": "multicluster.x-k8s.io/v1beta1", "kind": "ServiceExport",
            "metadata": { "name": name, "namespace": "shop", "annotations": annotations },
        }));
    }
    fn link(&mut self, peer: &str) -> &mut Link {
        let gateway = PeerGateway {
            name: "gw-1".into(),
            address: "203.0.113.7:7440".parse().unwrap(),
            balanced: false,
            zone: String::new(),
        };
        let link = Link {
            peer: cluster(peer),
            tag: ClusterTag::new(0xbeef).unwrap(),
            key: "00".repeat(32),
            federator_ids: Vec::new(),
            control: ControlHandle { handle: Handle::from_u32(300), export_uid: [0; 16] },
            first_gateways: vec![gateway],
            properties: BTreeMap::new(),
            created_unix: UNIX - 1000,
            loopback: false,
            recreated: None,
            ended_by_peer: false,
            by_object: false,
            unconfirmed: false,
        };
        Arc::make_mut(self.links.entry(cluster(peer)).or_insert(Arc::new(link)))
    }
    /// Fresh and connected, heard half a second ago.
    fn import(&mut self, peer: &str) -> &mut Import {
        let heard = Some(Duration::from_millis(UNIX * 1000 - 500));
        let fresh = Import { freshness: Freshness::Fresh, connected: true, heard, ..Import::default() };
        Arc::make_mut(self.imports.entry(cluster(peer)).or_insert(Arc::new(fresh)))
    }
    fn allot(&mut self, importer: &str, service: &str) {
        let record = HandleRecord {
            importer: cluster(importer),
            service: service.into(),
            handle: Handle::from_u32(400),
            export_uid: [3; 16],
            released: None,
        };
        self.handles.insert((cluster(importer), service.into()), record);
    }
    fn gateway(&mut self, name: &str, hops: Vec<v1::HopStatus>) {
        let hello = GatewayHello {
            name: name.into(),
            border: "198.51.100.1:7440".parse().unwrap(),
            inner: "10.0.0.1:7441".parse().unwrap(),
            balanced: false,
            zone: String::new(),
            start_number: 1,
            endpoint: None,
            watch: 90,
        };
        self.registry.step(Event::Gateway(hello), NOW, UNIX);
        let counters = v1::GatewayCounters { registered: 2, ..Default::default() };
        let report = v1::StatusReport { hops, gateway: Some(counters), ..Default::default() };
        let report = Event::GatewayReport { name: name.into(), report: Box::new(report) };
        self.registry.step(report, NOW, UNIX);
    }
    fn sidecar(&mut self, block: u32, path: &str, services: &[(&str, Port)]) {
        let spiffe_id: SpiffeId = format!("spiffe://acme.example/cluster/east{path}").parse().unwrap();
        let block = Block::new(block).unwrap();
        let mut served: BTreeMap<ServiceKey, (Vec<Port>, u32)> = BTreeMap::new();
        for (key, port) in services {
            served.entry(service(key)).or_insert((Vec::new(), 100)).0.push(port.clone());
        }
        let hello = SidecarHello {
            block,
            role: Role::of(&spiffe_id).unwrap(),
            spiffe_id,
            ids: vec![EndpointId::from_u32(block.value() << 4)],
            address: Some("10.0.0.9:7442".parse().unwrap()),
            services: served,
            refused: BTreeMap::new(),
            watch: u64::from(block.value()),
            version: String::new(),
            instance: None,
            host: String::new(),
            answers: false,
            plain: BTreeMap::new(),
        };
        self.registry.step(Event::Sidecar(hello), NOW, UNIX);
    }
    fn report(&mut self, block: u32, report: v1::StatusReport) {
        let block = Block::new(block).unwrap();
        self.registry.step(Event::SidecarReport { block, report: Box::new(report) }, NOW, UNIX);
    }
    /// Healthy, or not with a reason.
    fn healthy(&mut self, block: u32, service: &str, reason: Option<&str>) {
        let health = v1::ServiceHealth {
            service: service.into(),
            healthy: reason.is_none(),
            reason: reason.unwrap_or_default().into(),
        };
        self.report(block, v1::StatusReport { health: vec![health], ..Default::default() });
    }
    /// Of a sidecar it is the block, of a gateway 90.
    fn close(&mut self, watch: u64) {
        self.registry.step(Event::Closed { watch }, NOW, UNIX);
    }
}

/// What a peer exports.
pub fn exported(healthy: u32, total: u32, ports: &[Port]) -> ImportedExport {
    ImportedExport {
        export_uid: [9; 16],
        handle: Handle::from_u32(500),
        ports: ports.to_vec(),
        spiffe_ids: Vec::new(),
        weights: Vec::new(),
        healthy,
        total,
        exported_at_unix_ms: i64::try_from((UNIX - 50) * 1000).unwrap(),
        endpoints: Vec::new(),
        headless: false,
        named: Vec::new(),
        named_ports: Vec::new(),
        labels: Default::default(),
        annotations: Default::default(),
        service: None,
    }
}

pub fn shown(facts: &Facts) -> ClusterStatus {
    status(facts, NOW, Duration::from_secs(UNIX))
}

pub fn get(facts: &Facts, kind: &str) -> Vec<Value> {
    let query = Query { kind: KindInfo::find(kind).unwrap(), namespace: None, name: None };
    objects(facts, &query, NOW, Duration::from_secs(UNIX))
}

pub fn get_one(facts: &Facts, kind: &str, name: &str) -> Value {
    let query = Query { kind: KindInfo::find(kind).unwrap(), namespace: None, name: Some(name.into()) };
    let found = objects(facts, &query, NOW, Duration::from_secs(UNIX));
    assert_eq!(found.len(), 1, "{kind}/{name}: {found:?}");
    found.into_iter().next().unwrap()
}

/// A condition as `status reason message`.
pub fn condition(object: &Value, r#type: &str) -> String {
    let conditions = object.pointer("/status/conditions").and_then(Value::as_array).unwrap();
    let found = conditions.iter().find(|condition| condition["type"] == r#type);
    let Some(found) = found else { return format!("no {type} among {conditions:?}") };
    let text = |field: &str| found[field].as_str().unwrap().to_owned();
    format!("{} {} {}", text("status"), text("reason"), text("message"))
}

/// Asserts the start of a condition and pieces of its message.
pub fn assert_condition(case: &str, object: &Value, r#type: &str, head: &str, pieces: &[&str]) {
    let text = condition(object, r#type);
    assert!(text.starts_with(head), "{case}: {type} is {text:?}, not {head:?}");
    for piece in pieces {
        assert!(text.contains(piece), "{case}: {piece:?} is missing in {text:?}");
    }
}

/// A name, what is special, what it leads to, and words that must be said.
pub type Case<'a> = (&'a str, fn(&mut Facts), &'a str, &'a [&'a str]);
/// The same with the condition's type in the middle.
pub type ConditionCase<'a> = (&'a str, fn(&mut Facts), &'a str, &'a str, &'a [&'a str]);
