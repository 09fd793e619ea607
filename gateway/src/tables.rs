//! A snapshot of the federator, parsed once into what packets are judged by. Pure.
//!
//! Records are refused one by one, with the field and the value; the rest of the snapshot counts. A snapshot of another
//! cluster, and an empty one, is refused whole: a federator that lost its store must not delete what is known. A snapshot
//! of another epoch says that the store was lost and made anew: what was known is then [carried](Tables::carried) along for
//! as long as keys are handed out ahead, and consulted where the new snapshot knows nothing.

mod parse;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use tombolo_model::ids::{Block, ClusterTag, EndpointId, Handle};
use tombolo_model::names::ClusterName;
use tombolo_overlay::keys::{AcrossTarget, CidKey, ClusterKey, HandleBinding, Hour, LinkKey};
use tombolo_proto::convert::FieldError;

use crate::bucket::Bucket;
use crate::keys::{KeyCache, KeyName};

/// Initials per second of a handle whose record gives no figure: a core does about 1,600 handshakes a second.
pub const DEFAULT_INITIALS_PER_SECOND: u32 = 1000;

/// The parsed snapshot.
#[derive(Debug)]
pub struct Tables {
    pub revision: u64,
    epoch: u64,
    pub cluster: ClusterName,
    pub tag: ClusterTag,
    pub cluster_key: ClusterKey,
    pub endpoints: HashMap<Block, Endpoint>,
    /// Blocks of joiners that hold a token, with its end in Unix seconds.
    pub provisional: HashMap<Block, u64>,
    pub handles: HashMap<Handle, InboundHandle>,
    pub links: HashMap<ClusterTag, Arc<Link>>,
    pub siblings: Vec<Replica>,
    pub rejected: Vec<Rejected>,
    key_names: KeyNames,
    carried: Option<(Arc<Tables>, u64)>,
}

/// Names of the cluster key's purposes in a [`KeyCache`].
#[derive(Clone, Copy, Debug)]
struct KeyNames {
    endpoint: KeyName,
    replica: KeyName,
    renewal: KeyName,
}

impl KeyNames {
    fn of(key: &ClusterKey) -> Self {
        let name = |purpose| KeyName::of(purpose, &[key.as_bytes()]);
        Self { endpoint: name("endpoint"), replica: name("replica"), renewal: name("renewal") }
    }
}

/// An endpoint of this cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Endpoint {
    pub address: Option<SocketAddr>,
    /// It tells the gateways where it is.
    pub registers: bool,
    /// Older ones are gone.
    pub min_incarnation: u8,
    /// The whole block is.
    pub gone: bool,
    /// Its holder may come back by the renewal key with this salt.
    pub renewal: Option<NonZeroU32>,
}

impl Endpoint {
    /// Whether it says that this incarnation is no more.
    pub fn ends(&self, endpoint: EndpointId) -> bool {
        self.gone || endpoint.incarnation().value() < self.min_incarnation
    }

    /// A joiner: known by its registration alone.
    const PROVISIONAL: Self =
        Self { address: None, registers: true, min_incarnation: 0, gone: false, renewal: None };
}

/// What a handle admits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    Service,
    Control,
    Join,
    Renewal,
    /// Of a cluster that is to be linked: its federator's, until it is.
    FirstContact,
}

/// What importers may reach here by one handle.
#[derive(Debug)]
pub struct InboundHandle {
    pub handle: Handle,
    pub class: Class,
    /// The link that it was allotted on; the own tag for local callers and joiners.
    pub importer: ClusterTag,
    /// Healthy endpoints.
    pub endpoints: Vec<EndpointId>,
    pub initials_per_second: u32,
    pub bucket: Arc<Bucket>,
    key: HandleKey,
}

/// How a handle's key is derived.
#[derive(Clone, Debug)]
struct HandleKey {
    name: KeyName,
    source: KeySource,
}

#[derive(Clone, Debug)]
enum KeySource {
    Link(Arc<LinkKey>, Arc<HandleBinding>),
    Reserved(ClusterKey),
}

impl HandleKey {
    fn of_link(key: &Arc<LinkKey>, binding: HandleBinding) -> Self {
        let parts: [&[u8]; 4] = [
            key.as_bytes(),
            binding.importer.as_str().as_bytes(),
            binding.service.as_bytes(),
            &binding.export_uid,
        ];
        Self {
            name: KeyName::of("handle", &parts),
            source: KeySource::Link(Arc::clone(key), Arc::new(binding)),
        }
    }

    fn get<'a>(&self, keys: &'a mut KeyCache, handle: Handle, hour: Hour, now: Hour) -> &'a CidKey {
        keys.get(self.name, handle.value(), hour, now, || match &self.source {
            KeySource::Link(key, binding) => key.handle_key(binding, hour),
            KeySource::Reserved(key) => key.reserved_key(handle, hour),
        })
    }
}

impl InboundHandle {
    pub fn key<'a>(&self, keys: &'a mut KeyCache, hour: Hour, now: Hour) -> &'a CidKey {
        self.key.get(keys, self.handle, hour, now)
    }
}

/// A linked cluster; the own one too, for what leaves and comes back.
#[derive(Debug)]
pub struct Link {
    pub peer: ClusterName,
    pub tag: ClusterTag,
    pub own: bool,
    pub gateways: Vec<Replica>,
    key: Arc<LinkKey>,
    probe: KeyName,
    across: KeyName,
    outbound: HashMap<Handle, HandleKey>,
}

impl Link {
    /// The key of a handle of the peer that this cluster may call.
    pub fn outbound_key<'a>(
        &self,
        handle: Handle,
        keys: &'a mut KeyCache,
        hour: Hour,
        now: Hour,
    ) -> Option<&'a CidKey> {
        Some(self.outbound.get(&handle)?.get(keys, handle, hour, now))
    }
    /// The key of control datagrams with an endpoint of the peer that reaches these gateways past its own.
    pub fn across_key(
        &self,
        own: ClusterTag,
        prober: Block,
        keys: &mut KeyCache,
        hour: Hour,
        now: Hour,
    ) -> CidKey {
        let derive = || self.key.across_key(own, AcrossTarget::Gateways, hour);
        keys.get(self.across, 0, hour, now, derive).of_prober(self.tag, prober)
    }
    /// The key of control datagrams between the gateways of both clusters.
    pub fn probe_key<'a>(&self, keys: &'a mut KeyCache, hour: Hour, now: Hour) -> &'a CidKey {
        keys.get(self.probe, 0, hour, now, || self.key.probe_key(hour))
    }
}

/// A gateway: a peer's by its border address, a sibling by its inner one.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Replica {
    pub name: String,
    pub address: SocketAddr,
    pub balanced: bool,
}

/// A record that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// A metric label.
    pub record: &'static str,
    pub error: FieldError,
}

/// Why a whole snapshot does not count.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("it is of another cluster: {0}")]
    OtherCluster(FieldError),
    #[error("{0}")]
    ClusterKey(FieldError),
    #[error("it is empty: its federator has lost its store; what is known stays in use")]
    Empty,
}

impl SnapshotError {
    /// A metric label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::OtherCluster(_) => "other_cluster",
            Self::ClusterKey(_) => "cluster_key",
            Self::Empty => "empty",
        }
    }
}

impl Tables {
    /// The block's record, a joiner's included.
    pub fn endpoint(&self, block: Block, unix: Duration) -> Option<Endpoint> {
        self.endpoints.get(&block).copied().or_else(|| {
            let until = self.provisional.get(&block)?;
            (unix.as_secs() < *until).then_some(Endpoint::PROVISIONAL)
        })
    }

    pub fn endpoint_key<'a>(
        &self,
        block: Block,
        keys: &'a mut KeyCache,
        hour: Hour,
        now: Hour,
    ) -> &'a CidKey {
        let derive = || self.cluster_key.endpoint_key(block, hour);
        keys.get(self.key_names.endpoint, block.value(), hour, now, derive)
    }

    /// The key by which the block's holder comes back when its hourly ones have run out, if it may.
    pub fn renewal_key<'a>(
        &self,
        block: Block,
        record: Endpoint,
        keys: &'a mut KeyCache,
        now: Hour,
    ) -> Option<&'a CidKey> {
        let salt = record.renewal?.get();
        // Cached by the salt too: a block that is given out again has another one.
        let name = KeyName::of("renewal of", &[&self.key_names.renewal.to_bytes(), &salt.to_be_bytes()]);
        Some(keys.get(name, block.value(), now, now, || self.cluster_key.renewal_key(block, salt)))
    }

    /// The key of control datagrams between the replicas of this cluster.
    pub fn replica_key<'a>(&self, keys: &'a mut KeyCache, hour: Hour, now: Hour) -> &'a CidKey {
        keys.get(self.key_names.replica, 0, hour, now, || self.cluster_key.probe_key(hour))
    }

    /// What was known before the federator lost its store, while its keys may still be in use.
    pub fn carried(&self, unix: Duration) -> Option<&Arc<Tables>> {
        self.carried.as_ref().filter(|(_, until)| unix.as_secs() < *until).map(|(tables, _)| tables)
    }

    /// This snapshot, then what is carried along.
    pub fn generations(&self, unix: Duration) -> impl Iterator<Item = &Tables> {
        std::iter::once(self).chain(self.carried(unix).map(|carried| &**carried))
    }

    /// A linked cluster other than the own one.
    pub fn peer(&self, tag: ClusterTag, unix: Duration) -> Option<&Arc<Link>> {
        let find = |tables: &'_ Tables| tables.links.contains_key(&tag);
        let generation = self.generations(unix).find(|tables| find(tables))?;
        generation.links.get(&tag).filter(|link| !link.own)
    }

    /// Every linked cluster, the own one included, each once.
    pub fn all_links(&self, unix: Duration) -> Vec<&Arc<Link>> {
        let mut links: Vec<&Arc<Link>> = self.links.values().collect();
        if let Some(old) = self.carried(unix) {
            links.extend(old.links.values().filter(|link| !self.links.contains_key(&link.tag)));
        }
        links
    }

    /// Federators of this cluster that can be reached directly.
    pub fn federators(&self) -> Vec<(EndpointId, Option<SocketAddr>)> {
        let own = self.handles.values().filter(|h| h.class == Class::Control && h.importer == self.tag);
        let mut federators: Vec<_> = own.flat_map(|handle| handle.endpoints.iter().copied()).collect();
        federators.sort_unstable();
        federators.dedup();
        let address = |id: EndpointId| self.endpoints.get(&id.block()).and_then(|e| e.address);
        federators.into_iter().map(|id| (id, address(id))).collect()
    }

    fn is_empty(&self) -> bool {
        self.endpoints.is_empty() && self.handles.is_empty() && self.links.is_empty()
    }
}
