//! The core, called directly: a store in a file, a real trust directory, and times that the test passes in.

mod addresses;
mod any_order;
mod audit;
mod authorities;
mod boot;
mod clones;
mod crashes;
mod federations;
mod first_contact;
mod handles;
mod imports;
mod joining;
mod jwt;
mod kubernetes;
mod lapsed;
mod leases;
mod leaving;
mod links;
mod members;
mod pods;
mod scale;
mod stores;
mod tokens;
mod trust;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tombolo_identity::PeerIdentity;
use tombolo_identity::authority::{ClusterMaterial, Existing, RootAuthority};
use tombolo_identity::issuer::KeyAndCsr;
use tombolo_model::ids::EndpointId;
use tombolo_model::names::ClusterName;
use tombolo_model::resource::Object;
use tombolo_proto::{token, v1};

use super::*;
use crate::facts::FederatorEndpoint;
use crate::linking::{self, VerifiedParty};
use crate::store::redb::RedbStore;
use crate::store::{Page, StoreError, Table, Transaction};

/// 2026-11-24T02:15:05Z.
const UNIX: u64 = 1_795_486_505;
const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

/// So many seconds after a test's start.
pub(crate) fn at(seconds: u64) -> Moment {
    Moment { monotonic: Duration::from_secs(seconds), unix: Duration::from_secs(UNIX + seconds) }
}

pub(crate) fn name(text: &str) -> ClusterName {
    text.parse().unwrap()
}

/// A trust root, under which clusters are made.
pub(crate) struct World {
    dir: TempDir,
    root: RootAuthority,
}

impl World {
    fn new() -> Self {
        Self::in_dir(tempfile::tempdir().unwrap())
    }

    fn in_dir(dir: TempDir) -> Self {
        let domain = "acme.example".parse().unwrap();
        let root = RootAuthority::init(&dir.path().join("root"), domain, at(0).unix).unwrap();
        Self { dir, root }
    }

    fn sign(&mut self, cluster: &str, existing: Existing) {
        let material = self.root.sign_cluster(&name(cluster), existing, at(0).unix).unwrap();
        material.save(&self.trust_dir(cluster)).unwrap();
    }

    fn trust_dir(&self, cluster: &str) -> PathBuf {
        self.dir.path().join(format!("{cluster}-trust"))
    }

    fn store_file(&self, cluster: &str) -> PathBuf {
        self.dir.path().join(format!("{cluster}.redb"))
    }

    /// A cluster's first start.
    fn cluster(&mut self, cluster: &str) -> Cluster {
        self.sign(cluster, Existing::Refuse);
        self.start(cluster, at(0))
    }

    /// A start from what is there.
    fn start(&self, cluster: &str, moment: Moment) -> Cluster {
        let store = Arc::new(Flaky::open(self.store_file(cluster)));
        let material = ClusterMaterial::load(&self.trust_dir(cluster)).unwrap();
        let shared: Arc<dyn Store> = Arc::clone(&store) as _;
        let mut core = Core::load(shared, material, Default::default(), moment.unix).unwrap();
        core.publish(moment);
        let (endpoint, _) = core.own_endpoint(moment).unwrap();
        let address = "10.0.0.1:7443".parse().unwrap();
        core.set_own_endpoint(FederatorEndpoint { address, ..endpoint });
        core.publish(moment);
        Cluster { core, store, connections: 0 }
    }
}

/// A store on a disk that can fail.
struct Flaky {
    inner: RedbStore,
    broken: AtomicBool,
}

impl Flaky {
    fn open(path: PathBuf) -> Self {
        Self { inner: RedbStore::open(&path).unwrap(), broken: AtomicBool::new(false) }
    }
    fn set_broken(&self, broken: bool) {
        self.broken.store(broken, Ordering::Relaxed);
    }
}

impl Store for Flaky {
    fn get(&self, table: Table, key: &str) -> Option<Vec<u8>> {
        self.inner.get(table, key)
    }
    fn list(&self, table: Table) -> Vec<(String, Vec<u8>)> {
        self.inner.list(table)
    }
    fn after(&self, table: Table, key: &str, limit: usize) -> Result<Page, StoreError> {
        self.inner.after(table, key, limit)
    }
    fn before(&self, table: Table, key: &str, limit: usize) -> Result<Page, StoreError> {
        self.inner.before(table, key, limit)
    }
    fn commit(&self, transaction: &Transaction) -> Result<(), StoreError> {
        if self.broken.load(Ordering::Relaxed) && !transaction.is_empty() {
            return Err(StoreError::Full { path: "/state/store.redb".into() });
        }
        self.inner.commit(transaction)
    }
    fn is_writable(&self) -> bool {
        !self.broken.load(Ordering::Relaxed) && self.inner.is_writable()
    }
}

/// A running federator's core.
pub(crate) struct Cluster {
    pub core: Core,
    store: Arc<Flaky>,
    connections: usize,
}

/// A joined member as the federator meets it.
#[derive(Clone)]
pub(crate) struct Joined {
    identity: PeerIdentity,
    lease: v1::EndpointLease,
    connection: usize,
}

impl Joined {
    fn block(&self) -> tombolo_model::ids::Block {
        tombolo_model::ids::Block::new(self.lease.block).unwrap()
    }
    fn endpoint(&self, incarnation: u32) -> u32 {
        (self.lease.block << 4) | incarnation
    }
    fn hello(&self, services: &[&str]) -> v1::SidecarHello {
        v1::SidecarHello {
            endpoint_addresses: vec!["10.0.0.9:7442".into()],
            endpoints: vec![self.endpoint(0)],
            services: services.iter().map(|service| local_service(service)).collect(),
            lease: Some(self.lease.clone()),
            ..Default::default()
        }
    }
}

fn local_service(service: &str) -> v1::LocalService {
    let port = v1::ServicePort { port: 80, ..Default::default() };
    v1::LocalService { service: service.into(), ports: vec![port], ..Default::default() }
}

pub(crate) fn identity_of(core: &Core, id: &str) -> PeerIdentity {
    PeerIdentity {
        spiffe_id: id.parse().unwrap(),
        cluster: core.facts.cluster.name.clone(),
        tag: core.facts.cluster.tag,
        serial: vec![1],
        not_after: i64::MAX,
        chain_hash: [0; 32],
        issuer_spki: [0; 32],
    }
}

fn csr() -> Vec<u8> {
    KeyAndCsr::generate().unwrap().csr_der
}

fn healthy(services: &[&str]) -> v1::StatusReport {
    let health = |service: &&str| v1::ServiceHealth {
        service: (*service).into(),
        healthy: true,
        reason: String::new(),
    };
    v1::StatusReport { health: services.iter().map(health).collect(), ..Default::default() }
}

pub(crate) fn export(service: &str, to: &str) -> Object {
    let (namespace, name) = service.split_once('/').unwrap();
    object(json!({
        "apiVersion": "multicluster.x-k8s.io/v1beta1", "kind": "ServiceExport",
        "metadata": { "name": name, "namespace": namespace, "annotations": { "tombolo.dev/export-to": to } },
    }))
}

fn workload(machine: &str, services: &[&str]) -> Object {
    let services: Vec<_> =
        services.iter().map(|name| json!({ "name": name, "ports": [{ "port": 80 }] })).collect();
    object(json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "Workload",
        "metadata": { "name": "things", "namespace": "shop" },
        "spec": { "sidecar": machine, "services": services },
    }))
}

fn object(json: Value) -> Object {
    Object::from_json(json).unwrap()
}

impl Cluster {
    fn token(&mut self, role: &str, name: &str, moment: Moment) -> v1::Token {
        let request = v1::CreateJoinTokenRequest {
            role: role.into(),
            name: name.into(),
            namespace: if role == "sidecar" { "shop".into() } else { String::new() },
            ..Default::default()
        };
        let made = self.core.create_join_token(&request, moment).unwrap();
        token::decode(&made.text).unwrap()
    }

    /// Joins with a fresh token.
    fn join(&mut self, role: &str, name: &str, moment: Moment) -> Joined {
        let token = self.token(role, name, moment);
        let answer = self.core.join_workload(&request_for(&token), moment).unwrap();
        self.connections += 1;
        Joined {
            identity: identity_of(&self.core, &answer.svid.unwrap().spiffe_id),
            lease: answer.lease.unwrap(),
            connection: self.connections,
        }
    }

    fn greet(
        &mut self,
        member: &Joined,
        hello: &v1::SidecarHello,
        moment: Moment,
    ) -> Result<crate::core::members::Welcome, CoreError> {
        self.core.sidecar_hello(&member.identity, member.connection, hello, moment)
    }

    fn report(
        &mut self,
        member: &Joined,
        report: v1::StatusReport,
        moment: Moment,
    ) -> Result<v1::ReportAck, CoreError> {
        self.core.report(&member.identity, member.connection, report, moment)
    }

    /// A sidecar that serves and is healthy.
    pub(crate) fn serving(&mut self, name: &str, services: &[&str], moment: Moment) -> Joined {
        let member = self.join("sidecar", name, moment);
        self.greet(&member, &member.hello(services), moment).unwrap();
        self.report(&member, healthy(services), moment).unwrap();
        self.core.publish(moment);
        member
    }

    fn gateway(&mut self, name: &str, moment: Moment) -> Joined {
        let member = self.join("gateway", name, moment);
        self.core
            .gateway_hello(&member.identity, member.connection, &gateway_hello(&member, name), moment)
            .unwrap();
        self.core.publish(moment);
        member
    }

    /// This federator's chain with the root, as a link's party shows it.
    fn chain(&mut self, moment: Moment) -> Vec<Vec<u8>> {
        let svid = self.core.own_svid(&csr(), moment).unwrap();
        let domain = self.core.facts.cluster.trust_domain.clone();
        let bundle =
            tombolo_identity::bundle::TrustBundle::from_json(domain, &svid.trust_bundle_json).unwrap();
        svid.chain_der.into_iter().take(2).chain([bundle.roots[0].to_vec()]).collect()
    }

    fn handle(&self, importer: &str, service: &str) -> Option<&crate::facts::HandleRecord> {
        self.core.facts.handle(&name(importer), service)
    }

    fn import(&self, peer: &str) -> &crate::facts::Import {
        &self.core.facts.imports[&name(peer)]
    }
}

fn gateway_hello(member: &Joined, name: &str) -> v1::GatewayHello {
    v1::GatewayHello {
        name: name.into(),
        border_address: "203.0.113.7:7440".into(),
        inner_address: "10.0.0.2:7441".into(),
        start_number: 1,
        endpoint: member.endpoint(0),
        endpoint_address: "10.0.0.2:7442".into(),
        lease: Some(member.lease.clone()),
        ..Default::default()
    }
}

fn request_for(token: &v1::Token) -> v1::JoinWorkloadRequest {
    v1::JoinWorkloadRequest {
        token_id: token.token_id.clone(),
        secret: token.secret.clone(),
        csr_der: csr(),
        name: token.name.clone(),
        lease_request_nonce: vec![7; 16],
    }
}

/// What the joiner sends to link with a token of `inviter`.
fn link_request(joiner: &mut Cluster, token: &v1::Token, moment: Moment) -> v1::JoinLinkRequest {
    let chain = joiner.chain(moment);
    let tag = tombolo_model::ids::ClusterTag::new(token.tag).unwrap();
    let (party, proof) = joiner.core.begin_link(&name(&token.cluster), tag, &token.token_id, chain).unwrap();
    v1::JoinLinkRequest {
        token_id: token.token_id.clone(),
        secret: token.secret.clone(),
        joiner: Some(party),
        joiner_chain_proof: proof,
    }
}

fn link_token(inviter: &mut Cluster, peer: &str, moment: Moment) -> v1::Token {
    let request = v1::CreateLinkTokenRequest { peer: peer.into(), ttl_seconds: 0 };
    token::decode(&inviter.core.create_link_token(&request, moment).unwrap().text).unwrap()
}

fn verified(own: &Cluster, party: &v1::LinkParty, moment: Moment) -> VerifiedParty {
    linking::verify_party(party, &own.core.facts, false, moment.unix).unwrap()
}

/// The inviter's answer to a link request.
fn answer(
    inviter: &mut Cluster,
    request: &v1::JoinLinkRequest,
    moment: Moment,
) -> Result<v1::JoinLinkResponse, CoreError> {
    let party = request.joiner.as_ref().unwrap();
    let joiner = verified(inviter, party, moment);
    assert!(linking::verify_proof(party, &request.token_id, &request.joiner_chain_proof));
    let chain = inviter.chain(moment);
    inviter.core.join_link(request, &joiner, chain, moment)
}

/// Links `joiner` with `inviter`; both need a gateway.
fn link(inviter: &mut Cluster, joiner: &mut Cluster, moment: Moment) {
    let peer = joiner.core.facts.cluster.name.to_string();
    let token = link_token(inviter, &peer, moment);
    let request = link_request(joiner, &token, moment);
    let response = answer(inviter, &request, moment).unwrap();
    let verified = verified(joiner, response.inviter.as_ref().unwrap(), moment);
    let key = tombolo_overlay::keys::LinkKey::from_bytes(response.link_key.try_into().unwrap());
    joiner.core.finish_link(&verified, &key, moment).unwrap();
    inviter.core.publish(moment);
    joiner.core.publish(moment);
}

/// Two clusters under one root, each with a gateway, linked.
pub(crate) fn linked() -> (World, Cluster, Cluster) {
    let mut world = World::new();
    let (mut east, mut west) = (world.cluster("east"), world.cluster("west"));
    east.gateway("gw-1", at(0));
    west.gateway("gw-1", at(0));
    link(&mut east, &mut west, at(0));
    (world, east, west)
}

/// The words of a refusal.
#[track_caller]
fn refusal<T>(result: Result<T, CoreError>) -> String {
    match result {
        Ok(_) => panic!("this should have been refused"),
        Err(error) => error.to_string(),
    }
}

#[track_caller]
pub(crate) fn assert_says(text: &str, pieces: &[&str]) {
    for piece in pieces {
        assert!(text.contains(piece), "{piece:?} is missing in {text:?}");
    }
}

fn endpoint_ids(core: &Core, service: &str) -> Vec<EndpointId> {
    core.facts.registry.healthy(&service.parse().unwrap())
}
