//! GONE hints: to whoever sent to an endpoint that is no more, and on to those who lately did (protocol.md section 3).
//!
//! A hint goes back the way that the packet came, or to the listeners that [`Recent`](crate::recent::Recent) remembers: an
//! endpoint of ours, or every live gateway of a peer, of which the one that forwarded knows for whom. Never between two
//! other clusters, never from sibling to sibling again. Bounded in rate; never larger than what it answers (33 bytes; the
//! smallest packet with a 20-byte ID has 41). Receivers check for themselves.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use tombolo_model::ids::{Block, ClusterTag, EndpointId};
use tombolo_overlay::datagram::{self, Body, Datagram, Selector};
use tombolo_overlay::register::Side;

use super::hops::Whose;
use super::state::{Effect, Send, State};
use crate::decide::{self, Now};
use crate::forward::Arrival;
use crate::recent::Listener;
use crate::tables::Tables;
use crate::view::{Origin, Via, Who};

/// Hints per second in all: an endpoint's end concerns its callers, a handful of gateways and sidecars.
const GONE_PER_SECOND: u32 = 200;

/// The way to someone: socket, address, and the address of ours to send from.
pub(super) type Way = (Via, SocketAddr, Option<IpAddr>);

impl State {
    /// A forwarding thread dropped a packet for an endpoint that is no more.
    pub fn on_gone(
        &mut self,
        gone: decide::Gone,
        origin: Origin,
        arrival: &Arrival,
        clocks: Now,
        out: &mut Vec<Effect>,
    ) {
        let Some(tables) = self.tables.clone() else { return };
        if !self.gone_bucket.take(clocks.since_start, GONE_PER_SECOND) {
            return;
        }
        let to = (arrival.via, arrival.source, arrival.contacted);
        let told = match origin.who {
            Who::Endpoint { block, .. } => {
                self.gone_to_endpoint(&tables, block, tables.tag, gone, to, clocks)
            }
            Who::Peer(tag) => self.gone_to_gateway(&tables, Whose::Peer(tag), gone, to, clocks),
            Who::Sibling => self.gone_to_gateway(&tables, Whose::Sibling, gone, to, clocks),
            Who::Foreign { tag, endpoint } => {
                self.gone_to_foreign(&tables, (tag, endpoint), gone, to, clocks)
            }
            Who::Neighbour | Who::Stranger => None,
        };
        self.gone_sent += u64::from(told.is_some());
        out.extend(told);
    }

    fn gone_to_endpoint(
        &mut self,
        tables: &Tables,
        block: Block,
        tag: ClusterTag,
        gone: decide::Gone,
        (via, to, from): Way,
        clocks: Now,
    ) -> Option<Effect> {
        tables.endpoint(block, clocks.unix)?;
        let key = tables.endpoint_key(block, &mut self.keys, clocks.hour(), clocks.hour());
        // The block is what counts: the receiver may be in any incarnation.
        let selector =
            Selector::Endpoint { tag: tables.tag, endpoint: EndpointId::from_u32(block.value() << 4) };
        let bytes = gone_datagram(selector, tag, gone).encode(clocks.hour(), key);
        Some(Effect::Send(Send { via, to, from, bytes, probe: None }))
    }

    fn gone_to_gateway(
        &mut self,
        tables: &Tables,
        whose: Whose,
        gone: decide::Gone,
        (via, to, from): Way,
        clocks: Now,
    ) -> Option<Effect> {
        let key = self.gateway_key(tables, whose, clocks)?;
        let selector = Selector::Gateway { tag: tables.tag };
        let bytes = gone_datagram(selector, tables.tag, gone).encode(clocks.hour(), &key);
        Some(Effect::Send(Send { via, to, from, bytes, probe: None }))
    }

    /// Passes a hint on to whoever lately sent to that endpoint.
    pub(super) fn tell_listeners(
        &mut self,
        tables: &Tables,
        tag: ClusterTag,
        gone: decide::Gone,
        clocks: Now,
        out: &mut Vec<Effect>,
    ) {
        let concerned = |endpoint: EndpointId| {
            endpoint == gone.endpoint
                || (!gone.only_this_incarnation && endpoint.block() == gone.endpoint.block())
        };
        for (endpoint, listener) in self.recent.listeners(tag, concerned) {
            if !self.gone_bucket.take(clocks.since_start, GONE_PER_SECOND) {
                return;
            }
            let gone = decide::Gone { endpoint, ..gone };
            let before = out.len();
            match listener {
                Listener::Endpoint(block) => {
                    let to = self.reach(tables, block, clocks);
                    let hint = to.and_then(|to| self.gone_to_endpoint(tables, block, tag, gone, to, clocks));
                    out.extend(hint);
                }
                // Of ours, to every gateway of the peer: only the one that forwarded knows for whom. Hints about
                // others' endpoints are not passed on between clusters.
                Listener::Peer(peer) if tag == tables.tag => {
                    let alive = self.hops.iter().filter(|h| h.whose == Whose::Peer(peer) && h.probe.alive());
                    let ways: Vec<_> = alive.map(|hop| (hop.via, hop.replica.address, None)).collect();
                    for to in ways {
                        out.extend(self.gone_to_gateway(tables, Whose::Peer(peer), gone, to, clocks));
                    }
                }
                Listener::Peer(_) => {}
            }
            self.gone_sent += (out.len() - before) as u64;
        }
    }

    fn reach(&self, tables: &Tables, block: Block, clocks: Now) -> Option<Way> {
        let record = tables.endpoint(block, clocks.unix)?;
        if let Some(address) = record.address.filter(|_| !record.registers) {
            return Some((Via::Side(Side::Inner), address, None));
        }
        let at = self.registrations.newest(block)?;
        Some((Via::Side(at.side), at.address, self.contacted.get(&at.endpoint).copied().flatten()))
    }

    /// ICMP says that nobody listens at an address: a path is dead at once; of an endpoint, its callers are told.
    pub fn on_refused(&mut self, address: SocketAddr, now: Instant, clocks: Now, out: &mut Vec<Effect>) {
        self.hop_refused(address, now);
        let origin = self.known.get(&address).map(|origin| origin.who);
        if let (Some(Who::Endpoint { block, .. }), Some(tables)) = (origin, self.tables.clone()) {
            // What was sent there named an incarnation that is no more; the block may be back in another one.
            let incarnations: HashSet<EndpointId> = self
                .recent
                .listeners(tables.tag, |e| e.block() == block)
                .into_iter()
                .map(|(e, _)| e)
                .collect();
            for endpoint in incarnations {
                let gone = decide::Gone { endpoint, only_this_incarnation: true };
                self.tell_listeners(&tables, tables.tag, gone, clocks, out);
            }
        }
    }

    /// The part of [`Self::on_refused`] that is about paths.
    pub fn hop_refused(&mut self, address: SocketAddr, now: Instant) {
        for hop in self.hops.iter_mut().filter(|hop| hop.replica.address == address) {
            hop.probe.on_refused(now);
            self.dirty = true;
        }
    }
}

pub(super) fn gone_datagram(selector: Selector, tag: ClusterTag, gone: decide::Gone) -> Datagram {
    let decide::Gone { endpoint, only_this_incarnation } = gone;
    Datagram {
        selector,
        sequence: 0,
        body: Body::Gone(datagram::Gone { tag, endpoint, only_this_incarnation }),
    }
}
