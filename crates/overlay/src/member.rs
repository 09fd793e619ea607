//! A member of a cluster: a sidecar or gateway that has joined, with its identity, lease and way to the federators.
//!
//! [`Member`] owns the state directory (mode 0700):
//!
//! ```text
//!  <dir>/member.json   own name, key, chain, bundle, control access, gateways: one file, so that they always agree
//!  <dir>/lease.json    the endpoint lease and its incarnations ([`crate::lease`])
//! ```
//! `member.json` is written last when joining: a directory without it has not joined, and the token is still the way
//! in. A torn or foreign file is an error that says what to do, never a reason to start over.
//!
//! [`join`](mod@join) fills the directory, [`control`] keeps a connection to a federator, [`renewal`] renews the SVID at half its
//! life, [`lapsed`] one that has ended, [`leave`] gives it up, [`trust`] tells what is trusted and shown, [`workload`] asks for what the application behind it shows. The key is made
//! here and never leaves.

pub mod backoff;
pub mod control;
pub mod join;
pub mod lapsed;
pub mod leave;
pub mod renewal;
mod state;
#[cfg(test)]
mod tests;
mod trust;
pub mod workload;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use tombolo_identity::bundle::{BundleError, BundleSet, TrustBundle};
use tombolo_identity::files::FileError;
use tombolo_identity::tls::SvidError;
use tombolo_identity::{SpiffeId, Svid, SvidHandle};
use tombolo_model::ids::{ClusterTag, EndpointId, Handle};
use tombolo_model::names::ClusterName;
use tombolo_proto::convert::FieldError;
use tombolo_runtime::clock;
use tombolo_runtime::dirs::DirsError;

use crate::keys::KeyRing;
use crate::lease::{EndpointLease, LeaseError, LeaseFile};
use crate::routes::{GatewayHop, Routes};

pub use control::ControlError;
pub use join::{JoinConnection, JoinError, JoinOptions, JoinPlan, PodRole, ServiceAccountToken, TokenSource};
pub use lapsed::{EntryPoints, LapsedError};
use state::State;
pub use trust::trust_of;

/// How a member reaches its cluster's federators.
#[derive(Clone, Debug, PartialEq)]
pub struct Control {
    pub handle: Handle,
    pub keys: Arc<KeyRing>,
    /// That a federator must prove.
    pub spiffe_ids: Arc<[SpiffeId]>,
    /// With their addresses where they can be reached directly.
    pub federators: Vec<(EndpointId, Option<SocketAddr>)>,
    /// Where everything else goes.
    pub gateways: Vec<GatewayHop>,
}

/// Why a member's state can't be used.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    #[error(transparent)]
    Directory(#[from] DirsError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{path} is damaged or not a file of tombolo ({reason}): move the directory away and join again with a new token", path = path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error(transparent)]
    Lease(#[from] LeaseError),
    #[error("the SVID in {path} can't be used: {source}: move the directory away and join again with a new token", path = path.display())]
    Svid { path: PathBuf, source: SvidError },
    #[error("what the federator sent can't be used: {0}")]
    Field(#[from] FieldError),
    #[error("the trust bundle that the federator sent can't be used: {0}")]
    Bundle(#[from] BundleError),
    #[error("the SVID that the federator sent can't be used: {0}")]
    Issued(#[from] SvidError),
    #[error("the federator sent an identity for {found}, expected {expected}")]
    OtherIdentity { found: String, expected: String },
    #[error("{0}")]
    TooLate(String),
    #[error("a new key can't be made: {0}")]
    Key(#[from] tombolo_identity::issuer::IssueError),
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    name: String,
    cluster: ClusterName,
    tag: ClusterTag,
    svid: SvidHandle,
    /// The current lease, replaced by renewals and snapshots.
    lease: ArcSwap<EndpointLease>,
    control: ArcSwap<Control>,
    /// What is on disk; also serialises writers.
    state: Mutex<State>,
    link: control::Link,
    /// A federator has ended the connection because this identity is revoked, and none has let it in since.
    refused: AtomicBool,
    /// What the federator wants the SVID to be.
    wanted: tokio::sync::watch::Sender<Option<trust::Wanted>>,
}

/// A joined sidecar or gateway; clones share it.
#[derive(Clone, Debug)]
pub struct Member(Arc<Inner>);

impl Member {
    /// The member of this directory; `None` when it has not joined yet.
    pub fn load(dir: &Path) -> Result<Option<Self>, MemberError> {
        let Some(state) = State::load(dir)? else { return Ok(None) };
        let lease = LeaseFile::load(dir)?.ok_or_else(|| LeaseError::NoLease { dir: dir.to_owned() })?;
        Self::assemble(dir, state, lease).map(Some)
    }

    fn assemble(dir: &Path, state: State, lease: EndpointLease) -> Result<Self, MemberError> {
        let path = dir.join(state::FILE);
        let damaged = |reason: String| MemberError::Damaged { path: path.clone(), reason };
        let control = state.control().map_err(|e| damaged(e.to_string()))?;
        let svid = state.svid().map_err(|e| match e {
            MemberError::Issued(source) => MemberError::Svid { path: path.clone(), source },
            e => damaged(e.to_string()),
        })?;
        if lease.cluster != state.cluster || lease.tag != state.tag {
            let reason = format!("it is of cluster {}, lease.json of {}", state.cluster, lease.cluster);
            return Err(damaged(reason));
        }
        Ok(Self(Arc::new(Inner {
            dir: dir.to_owned(),
            name: state.name.clone(),
            cluster: state.cluster.clone(),
            tag: state.tag,
            svid: SvidHandle::by(clock::since_unix_epoch, svid),
            lease: ArcSwap::from_pointee(lease),
            control: ArcSwap::from_pointee(control),
            state: Mutex::new(state),
            link: control::Link::default(),
            refused: AtomicBool::new(false),
            wanted: tokio::sync::watch::Sender::new(None),
        })))
    }

    pub fn dir(&self) -> &Path {
        &self.0.dir
    }
    /// The name that it joined with.
    pub fn name(&self) -> &str {
        &self.0.name
    }
    pub fn cluster(&self) -> &ClusterName {
        &self.0.cluster
    }
    pub fn tag(&self) -> ClusterTag {
        self.0.tag
    }
    pub fn spiffe_id(&self) -> SpiffeId {
        self.0.svid.load().spiffe_id.clone()
    }
    /// The identity, for TLS configurations; renewals swap what is in it.
    pub fn svid(&self) -> &SvidHandle {
        &self.0.svid
    }
    pub fn lease(&self) -> Arc<EndpointLease> {
        self.0.lease.load_full()
    }
    pub fn control(&self) -> Arc<Control> {
        self.0.control.load_full()
    }
    /// Whether the last federator that was heard refuses this identity as revoked.
    pub fn is_refused(&self) -> bool {
        self.0.refused.load(Ordering::Relaxed)
    }
    pub fn set_refused(&self, refused: bool) {
        self.0.refused.store(refused, Ordering::Relaxed);
    }

    /// A fresh endpoint id for one overlay socket: burns an incarnation of the lease, on disk before it is returned.
    pub fn burn_endpoint(&self) -> Result<EndpointId, LeaseError> {
        let incarnation = LeaseFile::burn_incarnation(&self.0.dir, clock::since_unix_epoch())?;
        Ok(self.lease().block.endpoint(incarnation))
    }

    /// Routes before the first snapshot: the federators and gateways last heard of.
    pub fn first_routes(&self) -> Routes {
        let control = self.control();
        let mut routes = Routes::empty(self.0.tag);
        routes.control =
            control.federators.iter().filter_map(|(id, address)| Some((*id, (*address)?))).collect();
        routes.gateways.clone_from(&control.gateways);
        routes
    }

    /// Federators and gateways as the newest snapshot names them; kept for the next start. Empty lists are not
    /// believed: a federator that lost its store must not cut its members off.
    pub fn remember(
        &self,
        federators: Vec<(EndpointId, Option<SocketAddr>)>,
        gateways: Vec<GatewayHop>,
    ) -> Result<(), MemberError> {
        let old = self.control();
        let mut new = Control::clone(&old);
        if !federators.is_empty() {
            new.federators = federators;
        }
        if !gateways.is_empty() {
            new.gateways = gateways;
        }
        if new == *old {
            return Ok(());
        }
        self.replace_control(new)
    }

    /// A renewed lease: its keys reach a day further. Another block than ours is refused.
    pub fn renew_lease(&self, lease: EndpointLease) -> Result<(), MemberError> {
        let old = self.lease();
        if (lease.tag, lease.block) != (old.tag, old.block) {
            let expected = format!("a lease of block {} of {}", old.block, old.cluster);
            return Err(FieldError::new("lease.block", lease.block, expected).into());
        }
        if lease == *old {
            return Ok(());
        }
        LeaseFile::save(&self.0.dir, &lease)?;
        self.0.lease.store(Arc::new(lease));
        Ok(())
    }

    /// A new bundle of the own trust domain. One of before is left aside; one without roots is refused: it would lock
    /// everybody out.
    pub fn update_bundle(&self, json: &str) -> Result<(), MemberError> {
        if json.is_empty() || self.lock().bundle == json {
            return Ok(());
        }
        let bundle = TrustBundle::from_json(self.spiffe_id().trust_domain(), json)?;
        if bundle.roots.is_empty() {
            return Err(FieldError::new("trust_bundle_json", "no roots", "a bundle with a root").into());
        }
        let later = self.later_bundle(json)?;
        if self.lock().bundle == later {
            return Ok(());
        }
        self.update(|state| state.bundle = later)?;
        let svid = self.lock().svid()?;
        self.0.svid.swap(svid);
        Ok(())
    }

    /// A renewed identity: key, chain and bundle, on disk before it is used.
    fn install(&self, key_pkcs8: &[u8], issued: &tombolo_proto::v1::Svid) -> Result<(), MemberError> {
        let own = self.spiffe_id();
        let trust_bundle_json = self.later_bundle(&issued.trust_bundle_json)?;
        let issued = &tombolo_proto::v1::Svid { trust_bundle_json, ..issued.clone() };
        let svid = check_svid(key_pkcs8, issued)?;
        if svid.spiffe_id != own {
            return Err(MemberError::OtherIdentity {
                found: svid.spiffe_id.to_string(),
                expected: own.to_string(),
            });
        }
        self.update(|state| state.set_identity(key_pkcs8, issued))?;
        self.0.svid.swap(svid);
        Ok(())
    }

    /// Another way to the federators, on disk before it is used.
    fn replace_control(&self, new: Control) -> Result<(), MemberError> {
        self.update(|state| state.set_control(&new))?;
        self.0.control.store(Arc::new(new));
        Ok(())
    }

    fn renew_control_keys(&self, keys: KeyRing) -> Result<(), MemberError> {
        let mut new = Control::clone(&self.control());
        new.keys = Arc::new(keys);
        self.replace_control(new)
    }

    /// Changes the state on disk first, then in memory.
    fn update(&self, change: impl FnOnce(&mut State)) -> Result<(), MemberError> {
        let mut state = self.lock();
        let mut new = state.clone();
        change(&mut new);
        new.save(&self.0.dir)?;
        *state = new;
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An SVID from the wire with the key that its CSR was made with.
fn check_svid(key_pkcs8: &[u8], issued: &tombolo_proto::v1::Svid) -> Result<Svid, MemberError> {
    let chain: Vec<_> = issued.chain_der.iter().map(|der| der.clone().into()).collect();
    let id: SpiffeId = tombolo_proto::convert::parse("svid.spiffe_id", &issued.spiffe_id)?;
    let bundle = TrustBundle::from_json(id.trust_domain(), &issued.trust_bundle_json)?;
    let svid = Svid::new(key_pkcs8, chain, BundleSet::of(bundle))?;
    if svid.spiffe_id != id {
        return Err(MemberError::OtherIdentity {
            found: svid.spiffe_id.to_string(),
            expected: id.to_string(),
        });
    }
    Ok(svid)
}

/// Gateways from the wire; bad addresses are an error of their own record.
pub fn gateway_hops(wire: &[tombolo_proto::v1::GatewayReplica]) -> (Vec<GatewayHop>, Vec<FieldError>) {
    let mut rejected = Vec::new();
    let hops = wire.iter().filter_map(|replica| {
        match tombolo_proto::convert::address("gateways.address", &replica.address) {
            Ok(Some(address)) => Some(GatewayHop {
                name: replica.name.clone(),
                address,
                balanced: replica.balanced,
                zone: replica.zone.clone(),
            }),
            Ok(None) => None,
            Err(error) => {
                rejected.push(error);
                None
            }
        }
    });
    let hops = hops.collect();
    (hops, rejected)
}

/// Federators from the wire.
pub fn control_targets(
    wire: &[tombolo_proto::v1::ControlTarget],
) -> (Vec<(EndpointId, Option<SocketAddr>)>, Vec<FieldError>) {
    let mut rejected = Vec::new();
    let targets = wire.iter().filter_map(|target| {
        match tombolo_proto::convert::address("federators.address", &target.address) {
            Ok(address) => Some((EndpointId::from_u32(target.endpoint), address)),
            Err(error) => {
                rejected.push(error);
                None
            }
        }
    });
    let targets = targets.collect();
    (targets, rejected)
}
