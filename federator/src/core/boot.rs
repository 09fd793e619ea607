//! From the store to the facts: what a federator knows when it starts.
//!
//! A store of another cluster is refused. An empty one gets a new epoch, and keys that derive from the CA's: after a lost
//! store they are those that members and gateways still hold, so that members come back by the control handle they know,
//! show their leases and are adopted ([`super::leases`]). Links must be made anew.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use tombolo_identity::SpiffeId;
use tombolo_identity::authority::ClusterMaterial;
use tombolo_identity::issuer::IssueError;
use tombolo_model::ids::{Epoch, Handle};
use tombolo_model::names::ClusterName;
use tombolo_model::resource::Object;
use tombolo_model::sync::Freshness;
use tombolo_overlay::keys::{ClusterKey, LinkKey};

use super::audit::AuditLog;
use super::imports::View;
use super::{Core, trust};
use crate::authorities::Announcements;
use crate::clones::Contests;
use crate::facts::{
    AddressRecord, ClusterFacts, Facts, HandleRecord, IdentityRecord, Import, ImportRecord, LeaseRecord,
    Link, MetaRecord, ObjectRecord, Role, ShiftRecord, StoredObject, TrustRecord,
};
use crate::import;
use crate::registry::{Patience, Registry};
use crate::store::{Record, Store, StoreError, Table, Transaction, record};

/// Key of the cluster's record in [`Table::Meta`].
const META: &str = "cluster";
/// Shifts kept per service, newest first.
pub const SHIFTS_KEPT: usize = 50;

/// Why a federator can't start from what it has.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Issuer(#[from] IssueError),
    #[error(
        "the store belongs to cluster {found}, the trust directory to {expected}: give each cluster a --state-dir of its own"
    )]
    OtherCluster { found: ClusterName, expected: ClusterName },
    #[error(
        "the store was made with tag {found}, the trust directory has tag {expected}: the cluster was recreated; move the state directory away to start anew"
    )]
    OtherTag { found: String, expected: String },
    #[error("the trust directory holds no root certificate: run `tombolo trust cluster` again")]
    NoRoot,
    #[error("the trust directory can't be used: {0}")]
    Trust(String),
}

/// What a store remembers, as far as it reads. A record that does not read is an error: it would be lost otherwise.
fn all<R: Record>(store: &dyn Store) -> Result<Vec<(String, R)>, StoreError> {
    record::list::<R>(store)
}

impl Core {
    /// Loads everything. `monotonic` is zero here: the registry counts from the start of the process.
    pub fn load(
        store: Arc<dyn Store>,
        material: ClusterMaterial,
        properties: BTreeMap<String, String>,
        unix: Duration,
    ) -> Result<Self, BootError> {
        let meta = meta(&*store, &material)?;
        let jwt = super::jwt::load(&*store, &material.cluster, unix.as_secs())?;
        if material.bundle.roots.is_empty() {
            return Err(BootError::NoRoot);
        }
        let kept = record::get::<TrustRecord>(&*store, trust::RECORD)?.unwrap_or_default();
        let settled = trust::settle(&material, &kept, unix).map_err(|e| BootError::Trust(e.to_string()))?;
        let damaged = |e: &dyn std::fmt::Display| BootError::Trust(e.to_string());
        let cluster = ClusterFacts {
            name: material.cluster.clone(),
            tag: material.tag,
            trust_domain: material.trust_domain.clone(),
            federator_id: SpiffeId::federator(&material.trust_domain, &material.cluster)
                .map_err(|e| damaged(&e))?,
            cluster_key: ClusterKey::from_bytes(key("cluster_key", &meta.cluster_key)?),
            self_link_key: LinkKey::from_bytes(key("self_link_key", &meta.self_link_key)?),
            epoch: meta.epoch,
            properties: super::properties::merged(&properties, &super::properties::stored(&*store)?),
            started_unix: unix.as_secs(),
        };
        let mut facts = Facts {
            cluster: Arc::new(cluster),
            trust: Arc::new(settled),
            own_word: None,
            federator: None,
            revision: meta.starts << 32,
            objects: objects(&*store)?,
            links: all::<Link>(&*store)?.into_iter().map(|(_, l)| (l.peer.clone(), Arc::new(l))).collect(),
            handles: BTreeMap::new(),
            leases: BTreeMap::new(),
            registry: Registry::new(Patience::default()),
            imports: BTreeMap::new(),
            shifts: shifts(&*store)?,
            identities: all::<IdentityRecord>(&*store)?.into_iter().collect(),
            jwt_authorities: jwt.authorities(),
            federations: BTreeMap::new(),
            upstream: None,
            addresses: Arc::default(),
            kubernetes_hosts: BTreeMap::new(),
            first_contacts: BTreeMap::new(),
            pods: Arc::default(),
            store_writable: true,
        };
        facts.federations = super::federations::load(&*store, &facts, unix.as_secs())?;
        let released = handles(&*store, &mut facts)?;
        leases(&*store, &mut facts, unix.as_secs())?;
        let views = imports(&*store, &mut facts, unix)?;
        let heard = |(peer, import): (&ClusterName, &Arc<Import>)| Some((peer.clone(), import.heard?));
        let saved_heard = facts.imports.iter().filter_map(heard).collect();
        let audit = AuditLog::load(&*store)?;
        let addresses =
            all::<AddressRecord>(&*store)?.into_iter().map(|(_, a)| (a.service.clone(), a)).collect();
        Ok(Self {
            audit,
            addresses,
            gateways: None,
            addresses_stale: true,
            announcements: Announcements::default(),
            given_properties: properties,
            in_use: facts.handles.values().map(|record| record.handle).collect(),
            handles_stale: true,
            issuer: trust::issuer_of(material, &facts.trust)?,
            facts,
            store,
            jwt,
            crl_number: 0,
            last_word: Duration::ZERO,
            pending_trust: None,
            released,
            views,
            sessions: HashMap::new(),
            contests: Contests::default(),
            next_watch: 1,
            unsaved_imports: BTreeSet::new(),
            saved_heard,
            last_save: Duration::ZERO,
            ending: false,
            dirty: true,
        })
    }
}

/// Counts this start; makes the record of a new store.
fn meta(store: &dyn Store, material: &ClusterMaterial) -> Result<MetaRecord, BootError> {
    let found = record::get::<MetaRecord>(store, META)?;
    let meta = match found {
        Some(meta) if meta.cluster != material.cluster => {
            return Err(BootError::OtherCluster { found: meta.cluster, expected: material.cluster.clone() });
        }
        Some(meta) if meta.tag != material.tag => {
            let (found, expected) = (meta.tag.to_string(), material.tag.to_string());
            return Err(BootError::OtherTag { found, expected });
        }
        Some(meta) => MetaRecord { starts: meta.starts + 1, ..meta },
        None => {
            tracing::info!(cluster = %material.cluster, "a new store: new epoch");
            let derived = |label| Ok::<_, BootError>(hex::encode(derived(material, label)?));
            MetaRecord {
                cluster: material.cluster.clone(),
                tag: material.tag,
                epoch: Epoch(rand::random()),
                starts: 1,
                cluster_key: derived("cluster key")?,
                self_link_key: derived("self link key")?,
            }
        }
    };
    store.commit(&Transaction::new().put(META, &meta))?;
    Ok(meta)
}

/// A secret that the cluster's CA key determines (HMAC-SHA256 under it over a label): known again after a lost store.
pub(super) fn derived(material: &ClusterMaterial, label: &str) -> Result<[u8; 32], BootError> {
    let key = PrivateKeyDer::from_pem_slice(material.key_pem.as_bytes())
        .map_err(|e| BootError::Trust(format!("ca.key: {e}")))?;
    let key = hmac::Key::new(hmac::HMAC_SHA256, key.secret_der());
    let mut context = hmac::Context::with_key(&key);
    context.update(b"tombolo derived from the CA 1\0");
    context.update(label.as_bytes());
    let mut out = [0; 32];
    out.copy_from_slice(context.sign().as_ref());
    Ok(out)
}

fn key(field: &'static str, text: &str) -> Result<[u8; 32], StoreError> {
    let bytes = hex::decode(text).ok().and_then(|bytes| bytes.try_into().ok());
    bytes.ok_or_else(|| StoreError::Value {
        table: Table::Meta,
        key: META.to_owned(),
        reason: format!("{field} is not 32 bytes"),
    })
}

fn objects(
    store: &dyn Store,
) -> Result<BTreeMap<tombolo_model::resource::ObjectKey, Arc<StoredObject>>, StoreError> {
    let mut objects = BTreeMap::new();
    for (key, record) in all::<ObjectRecord>(store)? {
        let ObjectRecord { json, uid, created_unix, generation, kubernetes, in_kubernetes } = record;
        // What Kubernetes keeps may break rules that `apply` holds up: it says so by its conditions.
        let read = match kubernetes.is_some() || in_kubernetes {
            true => Object::from_json_unchecked(json),
            false => Object::from_json(json),
        };
        if let (Err(error), true) = (&read, in_kubernetes) {
            tracing::warn!(%error, object = key, "an object of Kubernetes can't be read any more: it is asked for anew");
            continue;
        }
        let object = read.map_err(|e| StoreError::Value {
            table: Table::Objects,
            key: key.clone(),
            reason: e.to_string(),
        })?;
        let stored = StoredObject { object, uid, created_unix, generation, kubernetes, in_kubernetes };
        objects.insert(stored.object.key(), Arc::new(stored));
    }
    Ok(objects)
}

fn handles(store: &dyn Store, facts: &mut Facts) -> Result<BTreeMap<Handle, u64>, StoreError> {
    let mut released = BTreeMap::new();
    for (_, handle) in all::<HandleRecord>(store)? {
        match handle.released {
            Some(at) => {
                released.insert(handle.handle, at);
            }
            None => {
                facts.handles.insert((handle.importer.clone(), handle.service.clone()), handle);
            }
        }
    }
    Ok(released)
}

/// Members are there again from the start, but for those whose lease has ended.
fn leases(store: &dyn Store, facts: &mut Facts, unix: u64) -> Result<(), StoreError> {
    let mut found = all::<LeaseRecord>(store)?;
    // A gateway that joined anew has an older lease under its name: the newest is entered last, and stays.
    found.sort_by_key(|(_, lease)| lease.not_after);
    for (key, lease) in found {
        let id: SpiffeId = lease.spiffe_id.parse().map_err(|e| StoreError::Value {
            table: Table::Leases,
            key,
            reason: format!("spiffe_id: {e}"),
        })?;
        match (lease.role, &lease.gateway) {
            _ if lease.not_after < unix => {}
            (Role::Sidecar | Role::Vm, _) if !lease.ids.is_empty() => {
                facts.registry.restore(&lease, id, Duration::ZERO);
            }
            (Role::Gateway, Some(record)) => {
                facts.registry.restore_gateway(&lease, record, Duration::ZERO);
            }
            _ => {}
        }
        facts.leases.insert(lease.block, Arc::new(lease));
    }
    Ok(())
}

/// The last state of each peer's records: stale until the peer is heard again.
fn imports(
    store: &dyn Store,
    facts: &mut Facts,
    unix: Duration,
) -> Result<BTreeMap<ClusterName, View>, StoreError> {
    let saved: BTreeMap<String, ImportRecord> = all::<ImportRecord>(store)?.into_iter().collect();
    let peers: Vec<ClusterName> = facts.links.keys().cloned().collect();
    let mut views = BTreeMap::new();
    for peer in peers {
        let mut import = Import {
            last_error: "not connected yet since the federator's start".to_owned(),
            ..Import::default()
        };
        let mut view = View::new(super::imports::QUOTA);
        if let Some(saved) = saved.get(peer.as_str()) {
            match import::from_saved(&saved.records) {
                Some(records) => {
                    let scope = import::PeerScope::of(facts, &peer, unix);
                    records.values().for_each(|record| import::put(&mut import, &scope, record));
                    import.position = (saved.epoch, saved.revision);
                    import.heard = Some(Duration::from_secs(saved.heard_unix));
                    import.freshness = Freshness::Stale;
                    let records =
                        records.into_iter().map(|(key, record)| (key, super::imports::kept(&record)));
                    view.restore(saved.epoch, saved.revision, records.collect());
                }
                None => {
                    tracing::warn!(%peer, "the saved records of a peer do not read; they are asked for anew");
                }
            }
        }
        facts.imports.insert(peer.clone(), Arc::new(import));
        views.insert(peer, view);
    }
    Ok(views)
}

fn shifts(store: &dyn Store) -> Result<BTreeMap<String, VecDeque<ShiftRecord>>, StoreError> {
    let mut all: Vec<ShiftRecord> = all::<ShiftRecord>(store)?.into_iter().map(|(_, shift)| shift).collect();
    all.sort_by_key(|shift| std::cmp::Reverse(shift.at_unix_ms));
    let mut by_service: BTreeMap<String, VecDeque<ShiftRecord>> = BTreeMap::new();
    for shift in all {
        let kept = by_service.entry(shift.service.clone()).or_default();
        if kept.len() < SHIFTS_KEPT {
            kept.push_back(shift);
        }
    }
    Ok(by_service)
}
