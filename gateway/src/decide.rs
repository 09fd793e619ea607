//! What happens to one packet: a pure choice from its head, where it came from, and the [`View`]. No IO, no clock.
//!
//! ```text
//!  own tag      inward: known target? -> MAC -> endpoint: its address, registration, or the sibling that has it
//!                                           -> service, control: bucket (first packets only), rendezvous among the healthy
//!  other tag    outward: an endpoint of ours? -> service, control: handle and MAC of the link -> live path of the peer
//! ```
//! Invariants: what is for no known target is dropped before any key is derived; nothing leaves for another cluster but
//! what comes from an endpoint of this one, so a gateway is no open relay; a packet is handed to a sibling at most once;
//! a path is used only after its gateway has answered with the link's key.

#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tombolo_model::ids::{Block, ClusterTag, EndpointId};
use tombolo_overlay::cid::{Cid, Kind, Packet};
use tombolo_overlay::keys::Hour;
use tombolo_overlay::{rendezvous, renewal_holder};

use crate::counters::{Counters, Reason, Slot};
use crate::keys::KeyCache;
use crate::tables::{Class, Endpoint, InboundHandle, Tables};
use crate::view::{Holder, LinkView, Origin, PathView, Registered, Side, Standing, Via, View, Who};

/// The two clocks, read once per batch.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Since a fixed moment of this process.
    pub since_start: Duration,
    pub unix: Duration,
}

impl Now {
    pub fn hour(&self) -> Hour {
        Hour::at(self.unix)
    }
}

/// What to do with a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    Forward(Forward),
    /// A control datagram: for the control thread.
    Control,
    Drop(Reason, Slot),
    /// Drop it, and tell whoever sent it that the endpoint is no more.
    Gone(Gone, Slot),
}

/// Where a packet goes. Neighbouring packets with equal ones leave in one batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Forward {
    pub to: SocketAddr,
    pub via: Via,
    /// The address of ours that it must come from.
    pub from: Option<IpAddr>,
    /// To the own cluster: what the hand-over bit must be. `None`: left as it is.
    pub handed_over: Option<bool>,
    pub flow: Flow,
    /// Counters of the link and of the next hop.
    pub link: Slot,
    pub hop: Slot,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flow {
    In,
    Out,
}

/// An endpoint that is no more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gone {
    pub endpoint: EndpointId,
    pub only_this_incarnation: bool,
}

/// Decides about one packet; `packet` as [`tombolo_overlay::cid::classify`] reads it.
pub fn decide(
    packet: Option<&Packet<'_>>,
    side: Side,
    origin: Origin,
    view: &View,
    keys: &mut KeyCache,
    now: Now,
) -> Action {
    let (dcid, first_flight) = match packet {
        None => return Action::Drop(Reason::Malformed, view.link_slot_of(origin)),
        Some(Packet::Datagram) => return Action::Control,
        Some(Packet::Long { dcid, first_flight, .. }) => (dcid, *first_flight),
        Some(Packet::Short { dcid }) => (dcid, false),
    };
    let Some(tag) = dcid.tag() else {
        return Action::Drop(Reason::Malformed, view.link_slot_of(origin));
    };
    let mut context = Context { dcid, first_flight, view, keys, now };
    if tag == view.tables.tag { context.inward(origin) } else { context.outward(tag, side, origin) }
}

struct Context<'a> {
    dcid: &'a Cid,
    first_flight: bool,
    view: &'a View,
    keys: &'a mut KeyCache,
    now: Now,
}

/// Why a packet for the own cluster stays here.
enum Stop {
    Drop(Reason),
    Gone(Gone),
}

impl From<Reason> for Stop {
    fn from(reason: Reason) -> Self {
        Self::Drop(reason)
    }
}

impl Context<'_> {
    /// For the own cluster, from wherever: the MAC admits.
    fn inward(&mut self, origin: Origin) -> Action {
        let view = self.view;
        let mut link = view.link_slot_of(origin);
        let mut result = Err(Stop::Drop(Reason::UnknownEndpoint));
        for tables in view.tables.generations(self.now.unix) {
            result = self.admit(tables, &mut link);
            let try_older = matches!(
                result,
                Err(Stop::Drop(Reason::UnknownEndpoint | Reason::UnknownHandle | Reason::Mac))
            );
            if !try_older {
                break;
            }
        }
        match result {
            Ok(forward) => Action::Forward(Forward { link, ..forward }),
            Err(Stop::Drop(reason)) => Action::Drop(reason, link),
            Err(Stop::Gone(gone)) => Action::Gone(gone, link),
        }
    }

    fn admit(&mut self, tables: &Tables, link: &mut Slot) -> Result<Forward, Stop> {
        match self.dcid.kind() {
            Kind::Join => Err(Reason::Kind.into()),
            Kind::Endpoint => self.admit_endpoint(tables),
            kind @ (Kind::Service | Kind::Control) => {
                if !self.first_flight {
                    return Err(Reason::NotInitial.into());
                }
                let handle = tables.handles.get(&self.dcid.handle()).ok_or(Reason::UnknownHandle)?;
                if (kind == Kind::Service) != (handle.class == Class::Service) {
                    return Err(Reason::UnknownHandle.into());
                }
                *link = self.view.link_slot(handle.importer);
                self.admit_first_packet(tables, handle)
            }
        }
    }

    fn admit_endpoint(&mut self, tables: &Tables) -> Result<Forward, Stop> {
        let endpoint = self.dcid.endpoint();
        let block = endpoint.block();
        let record = tables.endpoint(block, self.now.unix).ok_or(Reason::UnknownEndpoint)?;
        let (hour, now) = (self.hour(), self.now.hour());
        if !self.dcid.verify(tables.endpoint_key(block, self.keys, hour, now))
            && !self.by_renewal_key(tables, block, record)
        {
            return Err(Reason::Mac.into());
        }
        if record.ends(endpoint) && !self.view.is_heard(endpoint) {
            return Err(Stop::Gone(Gone { endpoint, only_this_incarnation: !record.gone }));
        }
        Ok(self.route(endpoint, record).ok_or(Reason::Unregistered)?)
    }

    /// Whether the ID was made by a holder that comes back.
    fn by_renewal_key(&mut self, tables: &Tables, block: Block, record: Endpoint) -> bool {
        let key = tables.renewal_key(block, record, self.keys, self.now.hour());
        key.is_some_and(|key| self.dcid.verify(key))
    }

    /// Whether whoever dials a handle holds its key. The renewal handle has none: each caller has a key of its own.
    fn holds_key(&mut self, tables: &Tables, handle: &InboundHandle) -> Result<(), Reason> {
        let held = if handle.class == Class::Renewal {
            let holder = renewal_holder(&self.dcid.nonce());
            let known = holder.and_then(|block| Some((block, tables.endpoint(block, self.now.unix)?)));
            let (block, record) = known.ok_or(Reason::UnknownEndpoint)?;
            self.by_renewal_key(tables, block, record)
        } else {
            let (hour, now) = (self.hour(), self.now.hour());
            self.dcid.verify(handle.key(self.keys, hour, now))
        };
        if held { Ok(()) } else { Err(Reason::Mac) }
    }

    fn admit_first_packet(&mut self, tables: &Tables, handle: &InboundHandle) -> Result<Forward, Stop> {
        self.holds_key(tables, handle)?;
        // By nonce alone, so that a retransmission, and the second half of a ClientHello, reach the same endpoint.
        let nonce = rendezvous::key_of(&self.dcid.nonce());
        let candidates = handle.endpoints.iter().filter_map(|id| {
            let record = tables.endpoint(id.block(), self.now.unix)?;
            if record.gone && !self.view.is_heard(*id) {
                return None;
            }
            let forward = self.route(*id, record)?;
            Some((rendezvous::weight(nonce, id.value().into()), id.value(), forward))
        });
        let best = candidates.max_by_key(|(weight, id, _)| (*weight, *id));
        let (_, _, forward) = best.ok_or(Reason::NoEndpoint)?;
        if !handle.bucket.take(self.now.since_start, handle.initials_per_second) {
            return Err(Reason::RateLimited.into());
        }
        Ok(forward)
    }

    /// Where an endpoint of this cluster is reached.
    fn route(&self, endpoint: EndpointId, record: Endpoint) -> Option<Forward> {
        let forward = |to, via, from, hop, handed_over| Forward {
            to,
            via,
            from,
            handed_over: Some(handed_over),
            flow: Flow::In,
            link: Slot::UNKNOWN,
            hop,
        };
        if let Some(address) = record.address.filter(|_| !record.registers) {
            return Some(forward(address, Via::Side(Side::Inner), None, Counters::ENDPOINTS, false));
        }
        let here = |at: &Registered| {
            forward(at.address, Via::Side(at.side), at.contacted, Counters::ENDPOINTS, false)
        };
        let there = |holder: &Holder| forward(holder.address, Via::Side(Side::Inner), None, holder.hop, true);
        let handed_over = self.dcid.handed_over();
        // Itself, wherever it is, before another process of its machine.
        if let Some(at) = self.view.registered(endpoint) {
            return Some(here(at));
        }
        if let Some(holder) = self.view.holder(endpoint).filter(|_| !handed_over) {
            return Some(there(holder));
        }
        if let Some(at) = self.view.registered_beside(endpoint) {
            return Some(here(at));
        }
        self.view.holder_beside(endpoint).filter(|_| !handed_over).map(there)
    }

    /// For another cluster.
    fn outward(&mut self, tag: ClusterTag, side: Side, origin: Origin) -> Action {
        let view = self.view;
        let Some(link) = view.tables.peer(tag, self.now.unix) else {
            return Action::Drop(Reason::NoLink, view.link_slot_of(origin));
        };
        let Some(link_view) = view.links.get(&tag) else {
            return Action::Drop(Reason::NoPath, Slot::UNKNOWN);
        };
        let drop = |reason| Action::Drop(reason, link_view.slot);
        let ours = match origin.who {
            Who::Endpoint { registered, .. } => registered || side == Side::Inner,
            Who::Neighbour => side == Side::Inner,
            Who::Peer(_) | Who::Foreign { .. } | Who::Sibling | Who::Stranger => false,
        };
        if !ours {
            return drop(Reason::Source);
        }
        match self.dcid.kind() {
            Kind::Join => return drop(Reason::Kind),
            // Keyed by the peer's cluster key, which only its own gateways hold.
            Kind::Endpoint => {}
            Kind::Service | Kind::Control => {
                if !self.first_flight {
                    return drop(Reason::NotInitial);
                }
                let (hour, now) = (self.hour(), self.now.hour());
                match link.outbound_key(self.dcid.handle(), self.keys, hour, now) {
                    None => return drop(Reason::UnknownHandle),
                    Some(key) if !self.dcid.verify(key) => return drop(Reason::Mac),
                    Some(_) => {}
                }
            }
        }
        best_path(link_view, self.dcid).map_or(drop(Reason::NoPath), Action::Forward)
    }

    fn hour(&self) -> Hour {
        self.dcid.phase().hour(self.now.unix)
    }
}

/// The path to a peer for this connection ID: rendezvous among the best that there are.
pub fn best_path(link: &LinkView, dcid: &Cid) -> Option<Forward> {
    let standing = |path: &PathView| {
        if path.flags.refused.load(Relaxed) { path.standing.min(Standing::Dead) } else { path.standing }
    };
    let usable = link.paths.iter().map(|path| (standing(path), path));
    let usable = usable.filter(|(standing, _)| *standing > Standing::Unproven);
    let nonce = rendezvous::key_of(&dcid.nonce());
    let best = usable.max_by_key(|(standing, path)| (*standing, rendezvous::weight(nonce, path.id), path.id));
    let (_, path) = best?;
    if !path.flags.traffic.load(Relaxed) {
        path.flags.traffic.store(true, Relaxed);
    }
    Some(Forward {
        to: path.address,
        via: path.via,
        from: None,
        handed_over: None,
        flow: Flow::Out,
        link: link.slot,
        hop: path.hop,
    })
}
