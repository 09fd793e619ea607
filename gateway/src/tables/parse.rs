//! From the wire to [`Tables`].

use std::collections::HashMap;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use tombolo_model::ids::{Block, ClusterTag, EndpointId, Handle, Incarnation};
use tombolo_model::names::ClusterName;
use tombolo_overlay::keys::{ClusterKey, HOURS_AHEAD, HandleBinding, LinkKey};
use tombolo_proto::convert::{self, FieldError};
use tombolo_proto::v1;

use super::{
    Class, DEFAULT_INITIALS_PER_SECOND, Endpoint, HandleKey, InboundHandle, KeyNames, KeySource, Link,
    Rejected, Replica, SnapshotError, Tables,
};
use crate::keys::KeyName;

/// Collects what parsed and why the rest did not.
#[derive(Default)]
struct Sieve(Vec<Rejected>);

impl Sieve {
    fn take<T>(&mut self, record: &'static str, parsed: Result<T, FieldError>) -> Option<T> {
        parsed.map_err(|error| self.0.push(Rejected { record, error })).ok()
    }
}

impl Tables {
    /// Parses a snapshot that is for a gateway of `own`. `previous`: what is known until now.
    pub fn parse(
        wire: &v1::GatewaySnapshot,
        own: &ClusterName,
        tag: ClusterTag,
        previous: Option<&Arc<Tables>>,
        unix: Duration,
    ) -> Result<Self, SnapshotError> {
        if wire.cluster != own.as_str() || wire.tag != tag.value() {
            let found = format!("{} (tag {:06x})", wire.cluster, wire.tag);
            return Err(SnapshotError::OtherCluster(FieldError::new(
                "cluster",
                found,
                format!("{own} (tag {tag})"),
            )));
        }
        let cluster_key =
            convert::bytes("cluster_key", &wire.cluster_key).map_err(SnapshotError::ClusterKey)?;
        let cluster_key = ClusterKey::from_bytes(cluster_key);
        let mut sieve = Sieve::default();

        let mut endpoints = HashMap::with_capacity(wire.endpoints.len());
        for wire in &wire.endpoints {
            if let Some((block, endpoint)) = sieve.take("endpoint", endpoint(wire)) {
                endpoints.insert(block, endpoint);
            }
        }
        let mut provisional = HashMap::with_capacity(wire.provisional.len());
        for wire in &wire.provisional {
            if let Some((block, until)) = sieve.take("provisional", provisional_lease(wire)) {
                provisional.insert(block, until);
            }
        }
        let mut links = HashMap::with_capacity(wire.links.len());
        for wire in &wire.links {
            if let Some(link) = link(wire, own, tag, &links, &mut sieve) {
                links.insert(link.tag, Arc::new(link));
            }
        }
        let mut handles = HashMap::with_capacity(wire.handles.len());
        for wire in &wire.handles {
            let parsed = inbound(wire, own, tag, &cluster_key, &links, previous.map(|p| &**p));
            let Some(handle) = sieve.take("handle", parsed) else { continue };
            if handles.contains_key(&handle.handle) {
                let error = FieldError::new("handles.binding.handle", handle.handle, "given once");
                sieve.0.push(Rejected { record: "handle", error });
                continue;
            }
            handles.insert(handle.handle, handle);
        }
        let siblings = wire.siblings.iter().filter(|sibling| sibling.name != wire.name);
        let siblings =
            siblings.filter_map(|s| sieve.take("sibling", replica("siblings.address", s))).collect();

        let tables = Self {
            revision: wire.revision,
            epoch: wire.epoch,
            cluster: own.clone(),
            tag,
            carried: carried(wire.epoch, previous, unix),
            key_names: KeyNames::of(&cluster_key),
            cluster_key,
            endpoints,
            provisional,
            handles,
            links,
            siblings,
            rejected: sieve.0,
        };
        if tables.is_empty() && previous.is_some_and(|previous| !previous.is_empty()) {
            return Err(SnapshotError::Empty);
        }
        Ok(tables)
    }
}

/// What stays known beside a snapshot: the old tables for a day after the store was made anew.
fn carried(epoch: u64, previous: Option<&Arc<Tables>>, unix: Duration) -> Option<(Arc<Tables>, u64)> {
    let previous = previous?;
    if !convert::store_is_new(previous.epoch, epoch) {
        return previous.carried.clone().filter(|(_, until)| unix.as_secs() < *until);
    }
    tracing::warn!("the federator's store was made anew; what was known is kept for a day");
    // What the old ones carried themselves is given up: two losses within a day.
    let until = unix.as_secs().saturating_add(HOURS_AHEAD as u64 * 3600);
    Some((Arc::new(previous.without_carried()), until))
}

impl Tables {
    /// A copy that carries nothing, so that generations don't pile up.
    fn without_carried(&self) -> Self {
        let handle = |handle: &InboundHandle| InboundHandle {
            handle: handle.handle,
            class: handle.class,
            importer: handle.importer,
            endpoints: handle.endpoints.clone(),
            initials_per_second: handle.initials_per_second,
            bucket: Arc::clone(&handle.bucket),
            key: handle.key.clone(),
        };
        Self {
            revision: self.revision,
            epoch: self.epoch,
            cluster: self.cluster.clone(),
            tag: self.tag,
            cluster_key: self.cluster_key.clone(),
            endpoints: self.endpoints.clone(),
            provisional: self.provisional.clone(),
            handles: self.handles.iter().map(|(id, h)| (*id, handle(h))).collect(),
            links: self.links.clone(),
            siblings: self.siblings.clone(),
            rejected: Vec::new(),
            key_names: self.key_names,
            carried: None,
        }
    }
}

fn endpoint(wire: &v1::GatewayEndpoint) -> Result<(Block, Endpoint), FieldError> {
    let block = convert::block("endpoints.block", wire.block)?;
    let incarnation = u8::try_from(wire.min_incarnation).ok().and_then(Incarnation::new);
    let incarnation = incarnation.ok_or_else(|| {
        FieldError::new("endpoints.min_incarnation", wire.min_incarnation, "an incarnation in 0..=15")
    })?;
    let endpoint = Endpoint {
        address: convert::address("endpoints.address", &wire.address)?.map(crate::port::canonical),
        registers: wire.registers,
        min_incarnation: incarnation.value(),
        gone: wire.gone,
        renewal: NonZeroU32::new(wire.renewal),
    };
    Ok((block, endpoint))
}

fn provisional_lease(wire: &v1::ProvisionalLease) -> Result<(Block, u64), FieldError> {
    let until = u64::try_from(wire.not_after_unix).map_err(|_| {
        FieldError::new("provisional.not_after_unix", wire.not_after_unix, "a time since 1970")
    })?;
    Ok((convert::block("provisional.block", wire.block)?, until))
}

fn replica(field: &'static str, wire: &v1::GatewayReplica) -> Result<Replica, FieldError> {
    let address: Option<SocketAddr> = convert::address(field, &wire.address)?;
    let usable = address.filter(|a| !a.ip().is_unspecified() && a.port() != 0);
    let address =
        usable.ok_or_else(|| FieldError::new(field, &wire.address, "an ip:port that can be sent to"))?;
    Ok(Replica { name: wire.name.clone(), address: crate::port::canonical(address), balanced: wire.balanced })
}

fn link(
    wire: &v1::GatewayLink,
    own: &ClusterName,
    own_tag: ClusterTag,
    known: &HashMap<ClusterTag, Arc<Link>>,
    sieve: &mut Sieve,
) -> Option<Link> {
    let head = || -> Result<_, FieldError> {
        let peer: ClusterName = convert::parse("links.peer", &wire.peer)?;
        let tag = convert::tag("links.tag", wire.tag)?;
        if wire.self_ != (tag == own_tag) || wire.self_ != (peer == *own) {
            let expected =
                format!("the own name and tag ({own}, {own_tag}) on the link to itself, and on it alone");
            return Err(FieldError::new("links.tag", format!("{tag} of {peer}"), expected));
        }
        if known.values().any(|link| link.tag == tag || link.peer == peer) {
            return Err(FieldError::new("links.tag", tag, "a name and tag that no other link has"));
        }
        Ok((peer, tag, Arc::new(LinkKey::from_bytes(convert::bytes("links.key", &wire.key)?))))
    };
    let (peer, tag, key) = sieve.take("link", head())?;
    let gateways = wire.gateways.iter();
    let gateways =
        gateways.filter_map(|g| sieve.take("peer_gateway", replica("links.gateways.address", g))).collect();
    let mut outbound = HashMap::with_capacity(wire.outbound.len());
    for wire in &wire.outbound {
        if let Some(binding) = sieve.take("outbound", HandleBinding::from_wire(wire)) {
            outbound.insert(binding.handle, HandleKey::of_link(&key, binding));
        }
    }
    let probe = KeyName::of("probe", &[key.as_bytes()]);
    let across = KeyName::of("across", &[key.as_bytes()]);
    Some(Link { peer, tag, own: wire.self_, gateways, key, probe, across, outbound })
}

fn inbound(
    wire: &v1::InboundHandle,
    own: &ClusterName,
    own_tag: ClusterTag,
    cluster_key: &ClusterKey,
    links: &HashMap<ClusterTag, Arc<Link>>,
    previous: Option<&Tables>,
) -> Result<InboundHandle, FieldError> {
    let binding =
        wire.binding.as_ref().ok_or_else(|| FieldError::new("handles.binding", "nothing", "present"))?;
    let handle = Handle::from_u32(binding.handle);
    let class = match wire.class() {
        v1::HandleClass::Service => Class::Service,
        v1::HandleClass::Control => Class::Control,
        v1::HandleClass::Join => Class::Join,
        v1::HandleClass::Renewal => Class::Renewal,
        v1::HandleClass::FirstContact => Class::FirstContact,
        v1::HandleClass::Unspecified => {
            let expected = "service, control, join, renewal or first contact";
            return Err(FieldError::new("handles.class", wire.class, expected));
        }
    };
    // The reserved handles are the same everywhere and keyed by the cluster; all others are allotted on a link.
    let reserved = match class {
        Class::Join => Some(Handle::JOIN),
        Class::Renewal => Some(Handle::RENEW),
        Class::Service | Class::Control | Class::FirstContact => None,
    };
    if reserved.map_or(handle.is_reserved(), |reserved| reserved != handle) {
        let expected = "2 for class join, 3 for renewal, an allotted handle (256 or more) for the others";
        return Err(FieldError::new("handles.binding.handle", handle, expected));
    }
    let (importer, key) = if reserved.is_some() {
        let name = KeyName::of("reserved", &[cluster_key.as_bytes()]);
        (own_tag, HandleKey { name, source: KeySource::Reserved(cluster_key.clone()) })
    } else {
        let binding = HandleBinding::from_wire(binding)?;
        let link = links.values().find(|link| link.peer == binding.importer).ok_or_else(|| {
            FieldError::new(
                "handles.binding.importer",
                &binding.importer,
                format!("{own} or a linked cluster"),
            )
        })?;
        if class == Class::FirstContact && handle != Handle::first_contact(link.tag) {
            let expected = "the handle of first contact of the importer's tag";
            return Err(FieldError::new("handles.binding.handle", handle, expected));
        }
        (link.tag, HandleKey::of_link(&link.key, binding))
    };
    // A handle keeps its bucket from snapshot to snapshot; one that was given out again has another key, hence a new one.
    let before = previous.and_then(|p| p.handles.get(&handle)).filter(|before| before.key.name == key.name);
    Ok(InboundHandle {
        handle,
        class,
        importer,
        endpoints: wire.endpoints.iter().copied().map(EndpointId::from_u32).collect(),
        initials_per_second: match wire.initials_per_second {
            0 => DEFAULT_INITIALS_PER_SECOND,
            some => some,
        },
        bucket: before.map(|before| Arc::clone(&before.bucket)).unwrap_or_default(),
        key,
    })
}
