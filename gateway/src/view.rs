//! What the forwarding threads look at: the tables, and what the control thread has learned. Replaced whole by that thread,
//! its one writer; parts that did not change are shared with the one before.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tombolo_model::ids::{Block, ClusterTag, EndpointId, Incarnation};
pub use tombolo_overlay::register::Side;

use crate::counters::{Counters, Slot};
use crate::port::Port;
use crate::tables::{Link, Tables};

/// One moment's knowledge.
#[derive(Clone, Debug)]
pub struct View {
    pub tables: Arc<Tables>,
    /// Endpoints that are registered at this replica.
    pub registered: Arc<HashMap<EndpointId, Registered>>,
    /// Endpoints that the tables call gone and that are heard all the same: their probes carry their own key, which the
    /// federator's word is older than. A sidecar that drains, or that redials its federator through us, is such.
    pub heard: Arc<HashMap<Block, EndpointId>>,
    /// Siblings that hold the registrations which this replica lacks.
    pub holders: Arc<HashMap<EndpointId, Holder>>,
    /// Who sends from where, by the tables.
    pub known: Arc<HashMap<SocketAddr, Origin>>,
    /// Who sends from where, by what was proven with a key; goes before `known`.
    pub learned: Arc<HashMap<SocketAddr, Origin>>,
    /// Machines of the cluster: a sidecar behind a balancer's address uses more source ports than its own.
    pub inner_ips: Arc<HashSet<IpAddr>>,
    pub links: Arc<HashMap<ClusterTag, LinkView>>,
    /// Further source ports, towards balanced peers.
    pub ports: Arc<HashMap<PortId, Arc<Port>>>,
}

/// Names a source port beside the two groups; never used again for another socket.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PortId(pub u32);

/// Which socket a packet comes in or leaves by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Via {
    Side(Side),
    /// One of [`View::ports`]; they belong to the border.
    Port(PortId),
}

impl Via {
    pub fn side(self) -> Side {
        match self {
            Self::Side(side) => side,
            Self::Port(_) => Side::Border,
        }
    }
}

/// Where a registered endpoint is, and how it is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Registered {
    pub endpoint: EndpointId,
    pub address: SocketAddr,
    pub side: Side,
    /// The address of ours that it contacted: answers come from there.
    pub contacted: Option<IpAddr>,
}

/// A sibling that announced a registration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Holder {
    pub address: SocketAddr,
    pub hop: Slot,
}

/// Who sends from an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Origin {
    pub who: Who,
    /// Counters of this previous hop.
    pub hop: Slot,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    /// An endpoint of this cluster; `registered`: by its REGISTER, so also from outside.
    Endpoint {
        block: Block,
        registered: bool,
    },
    /// Somebody on a machine of this cluster.
    Neighbour,
    /// A gateway of a linked cluster.
    Peer(ClusterTag),
    /// An endpoint of a linked cluster, past its own gateways.
    Foreign {
        tag: ClusterTag,
        endpoint: EndpointId,
    },
    /// Another replica of this cluster.
    Sibling,
    Stranger,
}

/// A link with the paths to its gateways.
#[derive(Clone, Debug)]
pub struct LinkView {
    pub link: Arc<Link>,
    pub slot: Slot,
    pub paths: Vec<PathView>,
}

/// How good a path is; the better goes first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Standing {
    /// Never answered: not used, whatever is announced (its address may be a victim's).
    Unproven,
    /// Answered once, and does not now.
    Dead,
    /// Late with an answer, or draining.
    Reserve,
    Alive,
}

/// One way to a peer's gateway.
#[derive(Clone, Debug)]
pub struct PathView {
    /// Feeds the rendezvous hash; stable for the path's life.
    pub id: u64,
    pub address: SocketAddr,
    pub via: Via,
    pub standing: Standing,
    /// Counters of this next hop.
    pub hop: Slot,
    pub flags: Arc<PathFlags>,
}

/// What forwarding threads tell the control thread about a path.
#[derive(Debug, Default)]
pub struct PathFlags {
    /// Packets went out: probe it faster. Cleared by each look.
    pub traffic: AtomicBool,
    /// An ICMP error says that nobody is there. Cleared once the standing says so.
    pub refused: AtomicBool,
}

impl View {
    /// Who sends from `source` on this side.
    pub fn origin(&self, side: Side, source: SocketAddr) -> Origin {
        if let Some(origin) = self.learned.get(&source).or_else(|| self.known.get(&source)) {
            return *origin;
        }
        if side == Side::Inner && self.inner_ips.contains(&source.ip()) {
            return Origin { who: Who::Neighbour, hop: Counters::ENDPOINTS };
        }
        Origin { who: Who::Stranger, hop: Slot::UNKNOWN }
    }

    /// The counters of the link that packets from this origin belong to.
    pub fn link_slot_of(&self, origin: Origin) -> Slot {
        let tag = match origin.who {
            Who::Peer(tag) | Who::Foreign { tag, .. } => tag,
            Who::Endpoint { .. } | Who::Neighbour => self.tables.tag,
            Who::Sibling | Who::Stranger => return Slot::UNKNOWN,
        };
        self.link_slot(tag)
    }

    /// Where an endpoint is registered.
    pub fn registered(&self, endpoint: EndpointId) -> Option<&Registered> {
        self.registered.get(&endpoint)
    }

    /// The sibling that has its registration.
    pub fn holder(&self, endpoint: EndpointId) -> Option<&Holder> {
        self.holders.get(&endpoint)
    }

    /// Where another incarnation of its block is registered: it says what became of an endpoint that nobody has.
    pub fn registered_beside(&self, endpoint: EndpointId) -> Option<&Registered> {
        of_block(&self.registered, endpoint)
    }

    /// The sibling that has another incarnation of its block.
    pub fn holder_beside(&self, endpoint: EndpointId) -> Option<&Holder> {
        of_block(&self.holders, endpoint)
    }

    /// Whether an endpoint is heard although the tables call it gone.
    pub fn is_heard(&self, endpoint: EndpointId) -> bool {
        self.heard.get(&endpoint.block()) == Some(&endpoint)
    }

    pub fn link_slot(&self, tag: ClusterTag) -> Slot {
        self.links.get(&tag).map_or(Slot::UNKNOWN, |link| link.slot)
    }
}

fn of_block<T>(table: &HashMap<EndpointId, T>, endpoint: EndpointId) -> Option<&T> {
    let mut incarnations = (0..Incarnation::COUNT).rev().filter_map(Incarnation::new);
    incarnations.find_map(|incarnation| table.get(&endpoint.block().endpoint(incarnation)))
}
