//! Paths to linked clusters past the own gateways: to their gateways (`egress: remote`) and straight to their endpoints
//! (`flat`). Pure: time is passed in, packets leave through a closure.
//!
//! A path is used only while PROBEs over it are answered with its key; else packets take the own gateways. An endpoint that
//! is called does not know its callers' addresses: it learns them from their keyed PROBEs, inside the link's ranges, and uses one
//! after it has itself been answered there, so that nobody can point its answers at a third party. A caller's newest
//! PROBE says where it is; an older one, replayed from elsewhere, does not count.
//!
//! Owned by the hops task, which publishes [`Paths::view`] with the routes.

#[cfg(test)]
mod tests;
mod wire;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tombolo_model::ids::{Block, ClusterTag, EndpointId, Handle};
use tombolo_model::ranges::AllowedRanges;
use tombolo_runtime::clock;

use crate::datagram::{
    Body, Datagram, DecodeError, Gone, Probe, ProbeAck, Selector, StartNumber, Unverified,
};
use crate::hops::{DRAINING, HopReport};
use crate::keys::{CidKey, KeyRing};
use crate::probe::{Event, Health, ProbeState};
use crate::rendezvous;
use crate::routes::{AcrossView, GatewayHop, PathView};

/// Callers whose address is known, of all links together: 2 KB each, and each is probed. Others are answered by the gateways.
pub(crate) const MAX_CALLERS: usize = 1024;
/// Paths of one link that are told of: a thousand callers are nobody's reading.
const MAX_REPORTED: usize = 16;
/// A caller probes at least once a second.
const CALLER_LIFE: Duration = Duration::from_secs(10);

/// How one linked cluster is reached past the own gateways.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Across {
    /// Its cluster's name, for reports.
    pub cluster: String,
    /// Its gateways at their borders, used before the own ones; empty unless the link's egress is `remote`.
    pub gateways: Vec<GatewayHop>,
    /// Of control datagrams with those gateways.
    pub gateway_keys: Arc<KeyRing>,
    /// Set where the link is flat.
    pub flat: Option<Flat>,
}

/// A link on which endpoints reach each other directly.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Flat {
    /// Endpoints of the peer that are called from here.
    pub endpoints: HashMap<Block, FlatEndpoint>,
    /// The peer's services: handle to healthy endpoints.
    pub services: HashMap<Handle, Vec<EndpointId>>,
    /// What the keys of callers derive from ([`CidKey::of_prober`]).
    pub caller_keys: KeyRing,
    /// Where callers may be.
    pub ranges: AllowedRanges,
}

/// An endpoint of the peer.
#[derive(Clone, PartialEq, Debug)]
pub struct FlatEndpoint {
    pub address: SocketAddr,
    pub keys: Arc<KeyRing>,
}

/// Sends one control datagram.
pub(crate) type Sender<'a> = dyn FnMut(SocketAddr, &[u8]) -> io::Result<()> + 'a;

/// When: the monotonic and the wall clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub now: Instant,
    pub unix: Duration,
}

/// A control datagram that names an endpoint across a link, and where it came from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received<'a> {
    pub unverified: &'a Unverified<'a>,
    pub source: SocketAddr,
    pub bytes: usize,
}

#[derive(Debug)]
struct Path {
    name: String,
    address: SocketAddr,
    zone: String,
    id: u64,
    keys: Arc<KeyRing>,
    probe: ProbeState,
    traffic: Arc<AtomicBool>,
}

impl Path {
    fn new(name: String, address: SocketAddr, zone: String, keys: Arc<KeyRing>, now: Instant) -> Self {
        let id = rendezvous::key_of(address.to_string().as_bytes());
        // Grows from life to life: who is probed believes the newest.
        let first = u64::try_from(clock::since_unix_epoch().as_micros()).unwrap_or(0);
        let probe = ProbeState::new(now, first);
        Self { name, address, zone, id, keys, probe, traffic: Arc::default() }
    }

    fn view(&self, own_zone: &str) -> PathView {
        PathView {
            address: self.address,
            slot: 0,
            id: self.id,
            alive: self.probe.health() == Health::Alive && self.probe.unreachable_total() != DRAINING,
            near: !own_zone.is_empty() && self.zone == own_zone,
            unreachable: Arc::from([]),
            traffic: Arc::clone(&self.traffic),
        }
    }

    /// Sends what is due; whether something changed that a packet's way depends on.
    fn tick(&mut self, selector: Selector, at: Moment, send: &mut Sender<'_>) -> bool {
        let Some((hour, key)) = self.keys.current(at.unix) else { return false };
        let before = self.probe.health();
        let has_traffic = self.traffic.swap(false, Relaxed);
        // One for life, one for the MTU.
        for _ in 0..2 {
            let Some(probe) = self.probe.on_tick(at.now, has_traffic) else { break };
            let packet = Datagram { selector, sequence: probe.sequence, body: Body::Probe(probe.probe) };
            if let Err(error) = send(self.address, &packet.encode(hour, key))
                && error.raw_os_error() == Some(libc::EMSGSIZE)
            {
                self.probe.on_too_large(at.now, probe.sequence);
            }
        }
        let mut changed = self.probe.health() != before;
        for event in self.probe.take_events() {
            match event {
                Event::Dead => {
                    tracing::info!(path = self.name, address = %self.address, "path does not answer")
                }
                Event::Alive => tracing::info!(path = self.name, address = %self.address, "path answers"),
                // A gateway that drains says so with its list.
                Event::UnreachableChanged => {}
                _ => continue,
            }
            changed = true;
        }
        changed
    }

    /// Whether the way of packets may be another one now.
    fn on_ack(&mut self, now: Instant, sequence: u64, ack: &ProbeAck) -> bool {
        let before = self.probe.health();
        self.probe.on_ack(now, sequence, ack);
        self.probe.health() != before || self.probe.has_news()
    }

    fn report(&self, cluster: &str) -> HopReport {
        HopReport {
            name: self.name.clone(),
            across: Some(cluster.to_owned()),
            address: self.address,
            slot: 0,
            alive: self.probe.alive(),
            draining: self.probe.unreachable_total() == DRAINING,
            rtt: self.probe.rtt(),
            loss_per_mille: self.probe.loss_per_mille(),
            mtu: self.probe.mtu(),
            last_ack: self.probe.last_ack(),
            unreachable: Arc::from([]),
            registered: false,
        }
    }
}

#[derive(Debug)]
struct Caller {
    endpoint: EndpointId,
    path: Path,
    newest: u64,
    heard: Instant,
}

#[derive(Debug, Default)]
struct Link {
    across: Across,
    gateways: Vec<Path>,
    endpoints: HashMap<Block, Path>,
    callers: HashMap<Block, Caller>,
}

/// Every path past the own gateways.
#[derive(Debug)]
pub(crate) struct Paths {
    own: Selector,
    start: StartNumber,
    links: HashMap<ClusterTag, Link>,
    /// Something changed since the last tick.
    changed: bool,
}

impl Paths {
    pub fn new(tag: ClusterTag, endpoint: EndpointId) -> Self {
        Self {
            own: Selector::Across { tag, endpoint },
            start: StartNumber(rand::random()),
            links: HashMap::new(),
            changed: false,
        }
    }

    /// New routes: what is known of a path that stays is kept.
    pub fn adopt(&mut self, wanted: &HashMap<ClusterTag, Across>, now: Instant) {
        self.links.retain(|tag, _| wanted.contains_key(tag));
        for (tag, across) in wanted {
            let link = self.links.entry(*tag).or_default();
            if link.across != *across {
                link.adopt(*tag, across, now);
            }
        }
    }

    /// When [`Self::tick`] has something to do. What has no key for this hour can't be probed, and waits for one.
    pub fn next_tick(&self, unix: Duration) -> Option<Instant> {
        let paths = self.links.values().flat_map(Link::paths);
        paths.filter(|path| path.keys.current(unix).is_some()).map(|path| path.probe.next_tick()).min()
    }

    /// Sends what is due; whether [`Self::view`] is another one now.
    pub fn tick(&mut self, at: Moment, send: &mut Sender<'_>) -> bool {
        let mut changed = std::mem::take(&mut self.changed);
        for (tag, link) in &mut self.links {
            for path in link.gateways.iter_mut().chain(link.endpoints.values_mut()) {
                changed |= path.tick(self.own, at, send);
            }
            let before = link.callers.len();
            link.callers.retain(|_, c| at.now.saturating_duration_since(c.heard) < CALLER_LIFE);
            changed |= link.callers.len() != before;
            for caller in link.callers.values_mut() {
                let selector = Selector::Across { tag: *tag, endpoint: caller.endpoint };
                changed |= caller.path.tick(selector, at, send);
            }
        }
        changed
    }

    /// A datagram with an [`Selector::Across`]: what it hints at, if it is a GONE.
    pub fn on_datagram(
        &mut self,
        received: Received<'_>,
        at: Moment,
        send: &mut Sender<'_>,
    ) -> Result<Option<Gone>, DecodeError> {
        let Selector::Across { tag, endpoint } = received.unverified.selector else {
            return Err(DecodeError::Field("selector"));
        };
        if received.unverified.selector == self.own {
            return self.on_answer(received, at, send);
        }
        let callers: usize = self.links.values().map(|link| link.callers.len()).sum();
        let link = self.links.get_mut(&tag).ok_or(DecodeError::Field("selector"))?;
        let flat = link.across.flat.as_ref().ok_or(DecodeError::Field("selector"))?;
        let phase = received.unverified.phase;
        let key = flat.caller_keys.for_phase(phase, at.unix).ok_or(DecodeError::Field("phase"))?;
        let key = key.of_prober(tag, endpoint.block());
        let datagram = received.unverified.verify(&key)?;
        match &datagram.body {
            Body::Probe(probe) => {
                if !flat.ranges.allows(received.source) {
                    return Err(DecodeError::Field("source"));
                }
                let known = link.callers.contains_key(&endpoint.block());
                if known || callers < MAX_CALLERS {
                    self.changed |= link.note_caller(tag, endpoint, &datagram, received.source, at.now);
                }
                answer(self.start, received, &datagram, probe, &key, at, send);
                Ok(None)
            }
            Body::ProbeAck(ack) => {
                let caller = link.callers.get_mut(&endpoint.block());
                let caller = caller.filter(|c| c.path.address == received.source);
                let caller = caller.ok_or(DecodeError::Field("source"))?;
                self.changed |= caller.path.on_ack(at.now, datagram.sequence, ack);
                Ok(None)
            }
            _ => Err(DecodeError::Field("type")),
        }
    }

    /// From somebody whom this endpoint probes: an answer, or a question back.
    fn on_answer(
        &mut self,
        received: Received<'_>,
        at: Moment,
        send: &mut Sender<'_>,
    ) -> Result<Option<Gone>, DecodeError> {
        let start = self.start;
        let mut verified = Err(DecodeError::Field("source"));
        // One address may stand for several paths while an endpoint is replaced: the key tells which.
        let probed = self.links.iter_mut().flat_map(|(tag, link)| link.probed().map(|path| (*tag, path)));
        for (tag, (of, path)) in probed.filter(|(_, (_, path))| path.address == received.source) {
            let Some(key) = path.keys.for_phase(received.unverified.phase, at.unix) else {
                verified = Err(DecodeError::Field("phase"));
                continue;
            };
            verified = received.unverified.verify(key);
            let Ok(datagram) = &verified else { continue };
            match &datagram.body {
                Body::ProbeAck(ack) => {
                    self.changed |= path.on_ack(at.now, datagram.sequence, ack);
                    return Ok(None);
                }
                Body::Probe(probe) => {
                    answer(start, received, datagram, probe, key, at, send);
                    return Ok(None);
                }
                // A peer speaks for its own endpoints, an endpoint for itself.
                Body::Gone(gone) => {
                    let theirs = gone.tag == tag && of.is_none_or(|block| gone.endpoint.block() == block);
                    return if theirs { Ok(Some(*gone)) } else { Err(DecodeError::Field("tag")) };
                }
                _ => return Err(DecodeError::Field("type")),
            }
        }
        verified.map(|_| None)
    }

    /// Something has changed since the last [`Self::tick`], which need not be due.
    pub fn has_changed(&self) -> bool {
        self.changed
    }

    /// For the socket.
    pub fn view(&self, own_zone: &str) -> HashMap<ClusterTag, AcrossView> {
        let view = |(tag, link): (&ClusterTag, &Link)| {
            let callers = link.callers.iter().map(|(block, caller)| (*block, caller.path.view(own_zone)));
            let mut endpoints: HashMap<Block, PathView> = callers.collect();
            // Who is called and calls has two paths; the one that is used is the one that lives.
            for (block, path) in &link.endpoints {
                let path = path.view(own_zone);
                if path.alive || !endpoints.get(block).is_some_and(|caller| caller.alive) {
                    endpoints.insert(*block, path);
                }
            }
            let view = AcrossView {
                gateways: link.gateways.iter().map(|path| path.view(own_zone)).collect(),
                endpoints,
                services: link.across.flat.as_ref().map(|flat| flat.services.clone()).unwrap_or_default(),
            };
            (*tag, view)
        };
        self.links.iter().map(view).collect()
    }

    pub fn reports(&self) -> impl Iterator<Item = HopReport> + '_ {
        self.links
            .values()
            .flat_map(|link| link.paths().take(MAX_REPORTED).map(|path| path.report(&link.across.cluster)))
    }
}

/// Never larger than the question; which clusters this one is linked to is nobody's business across a link.
fn answer(
    start: StartNumber,
    received: Received<'_>,
    question: &Datagram,
    probe: &Probe,
    key: &CidKey,
    at: Moment,
    send: &mut Sender<'_>,
) {
    let bytes = u16::try_from(received.bytes).unwrap_or(u16::MAX);
    let ack = ProbeAck::answering(probe, bytes, start, received.source, &[]);
    let packet =
        Datagram { selector: question.selector, sequence: question.sequence, body: Body::ProbeAck(ack) };
    let hour = received.unverified.phase.hour(at.unix);
    // A full buffer is a lost packet.
    let _ = send(received.source, &packet.encode(hour, key));
}

impl Link {
    fn paths(&self) -> impl Iterator<Item = &Path> {
        self.gateways.iter().chain(self.endpoints.values()).chain(self.callers.values().map(|c| &c.path))
    }

    /// Paths on which this endpoint is the prober; with the block of those that lead to an endpoint.
    fn probed(&mut self) -> impl Iterator<Item = (Option<Block>, &mut Path)> {
        let gateways = self.gateways.iter_mut().map(|path| (None, path));
        gateways.chain(self.endpoints.iter_mut().map(|(block, path)| (Some(*block), path)))
    }

    fn adopt(&mut self, tag: ClusterTag, across: &Across, now: Instant) {
        let mut old = std::mem::take(&mut self.gateways);
        self.gateways = across
            .gateways
            .iter()
            .map(|hop| {
                let known = old.iter().position(|path| path.address == hop.address);
                let mut path = known.map(|at| old.swap_remove(at)).unwrap_or_else(|| {
                    Path::new(hop.name.clone(), hop.address, String::new(), Arc::default(), now)
                });
                path.zone.clone_from(&hop.zone);
                path.keys = Arc::clone(&across.gateway_keys);
                path
            })
            .collect();
        let none = HashMap::new();
        let wanted = across.flat.as_ref().map_or(&none, |flat| &flat.endpoints);
        self.endpoints.retain(|block, path| wanted.get(block).is_some_and(|e| e.address == path.address));
        for (block, endpoint) in wanted {
            let path = self.endpoints.entry(*block).or_insert_with(|| {
                let name = format!("endpoint {:07x}", block.value());
                Path::new(name, endpoint.address, String::new(), Arc::clone(&endpoint.keys), now)
            });
            path.keys = Arc::clone(&endpoint.keys);
        }
        match &across.flat {
            None => self.callers.clear(),
            Some(flat) => {
                self.callers.retain(|_, caller| flat.ranges.allows(caller.path.address));
                for (block, caller) in &mut self.callers {
                    caller.path.keys = Arc::new(flat.caller_keys.map(|key| key.of_prober(tag, *block)));
                }
            }
        }
        self.across = across.clone();
    }

    /// A caller's PROBE held; whether its way is another one now.
    fn note_caller(
        &mut self,
        tag: ClusterTag,
        endpoint: EndpointId,
        datagram: &Datagram,
        source: SocketAddr,
        now: Instant,
    ) -> bool {
        let Some(flat) = &self.across.flat else { return false };
        let block = endpoint.block();
        if let Some(caller) = self.callers.get_mut(&block) {
            if caller.endpoint != endpoint {
                // Another incarnation, recorded and replayed, must not throw out the one that answers.
                if caller.path.probe.health() == Health::Alive {
                    return false;
                }
            } else if datagram.sequence <= caller.newest {
                return false;
            } else {
                (caller.newest, caller.heard) = (datagram.sequence, now);
                if caller.path.address == source {
                    return false;
                }
            }
        }
        let keys = Arc::new(flat.caller_keys.map(|key| key.of_prober(tag, block)));
        let name = format!("caller {:07x}", block.value());
        let path = Path::new(name, source, String::new(), keys, now);
        self.callers.insert(block, Caller { endpoint, path, newest: datagram.sequence, heard: now });
        true
    }
}
