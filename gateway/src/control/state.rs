//! What the control thread knows and decides, without IO: time is passed in, [`Effect`]s come out.
//!
//! Owns registrations, what siblings announced, the paths to other gateways, and who was proven to send from where; builds
//! the [`View`] of it. All tables are bounded. An answer is never larger than its question.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use tombolo_model::ids::{Block, ClusterTag, EndpointId};
use tombolo_overlay::DRAINING;
use tombolo_overlay::datagram::{
    self, Body, Datagram, DecodeError, ProbeAck, Registered as RegisteredBody, Selector, StartNumber,
    Unverified,
};
use tombolo_overlay::keys::CidKey;
use tombolo_overlay::register::{Registrations, Siblings, Verdict};

use super::hops::{Event, Hops, PortChange, Whose};
use super::status::Status;
use crate::bucket::Bucket;
use crate::counters::{Counters, Name};
use crate::decide::{self, Now};
use crate::forward::Arrival;
use crate::keys::KeyCache;
use crate::port::Port;
use crate::recent::Recent;
use crate::tables::Tables;
use crate::view::{Holder, LinkView, Origin, PortId, Registered, Via, View, Who};

/// Blocks that may be registered here, and as many announced by siblings: 16 MB when full.
const REGISTRATIONS: usize = 65_536;
/// Addresses proven by a PROBE. Each needs a key of a known endpoint; 64 bytes each.
const LEARNED: usize = 65_536;
/// Probes come at least once a second.
const LEARNED_LIFE: Duration = Duration::from_secs(10);
/// How long a PROBE or REGISTER outweighs the federator's word that an endpoint is gone: three probes at the slow pace.
const HEARD_LIFE: Duration = Duration::from_secs(3);
/// Expiries are looked at this often.
const SWEEP: Duration = Duration::from_secs(1);
/// What the driver is to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    Send(Send),
    /// Bind a source port.
    Open(PortId),
    Close(PortId),
}

/// One control datagram to send.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Send {
    pub via: Via,
    pub to: SocketAddr,
    /// The address of ours that was contacted, of an answer.
    pub from: Option<IpAddr>,
    pub bytes: Vec<u8>,
    /// Path and sequence of a PROBE: it may turn out too large.
    pub probe: Option<(u64, u64)>,
}

/// The state.
#[derive(Debug)]
pub struct State {
    start: StartNumber,
    counters: Arc<Counters>,
    pub(super) recent: Arc<Recent>,
    pub(super) keys: KeyCache,
    pub(super) tables: Option<Arc<Tables>>,
    pub(super) registrations: Registrations,
    /// Which address of ours each registered endpoint contacted.
    pub(super) contacted: HashMap<EndpointId, Option<IpAddr>>,
    siblings: Siblings,
    pub(super) hops: Hops,
    learned: HashMap<SocketAddr, (Who, Instant)>,
    /// Endpoints by their last keyed datagram; as many as the tables have blocks.
    heard: HashMap<Block, (EndpointId, Instant)>,
    pub(super) gone_bucket: Bucket,
    pub(super) gone_sent: u64,
    gone_received: u64,
    pub(super) draining: bool,
    next_sweep: Instant,
    pub(super) dirty: bool,
    pub(super) known: Arc<HashMap<SocketAddr, Origin>>,
    inner_ips: Arc<HashSet<IpAddr>>,
    unix: Duration,
}

impl State {
    pub fn new(start: StartNumber, counters: Arc<Counters>, recent: Arc<Recent>, now: Instant) -> Self {
        Self {
            start,
            counters,
            recent,
            keys: KeyCache::default(),
            tables: None,
            registrations: Registrations::new(now, start, CidKey::generate(), REGISTRATIONS),
            contacted: HashMap::new(),
            siblings: Siblings::new(REGISTRATIONS),
            hops: Hops::default(),
            learned: HashMap::new(),
            heard: HashMap::new(),
            gone_bucket: Bucket::default(),
            gone_sent: 0,
            gone_received: 0,
            draining: false,
            next_sweep: now,
            dirty: false,
            known: Arc::default(),
            inner_ips: Arc::default(),
            unix: Duration::ZERO,
        }
    }

    pub fn set_draining(&mut self, draining: bool) {
        self.draining = draining;
    }

    /// A new configuration.
    pub fn on_tables(&mut self, tables: Arc<Tables>, now: Instant, clocks: Now, out: &mut Vec<Effect>) {
        self.unix = clocks.unix;
        let changes = self.hops.adopt(&tables, clocks.unix, &self.counters, now);
        push_changes(changes, out);
        let gone: Vec<Block> = self
            .registrations
            .iter()
            .map(|registration| registration.endpoint.block())
            .filter(|block| {
                let mut generations = tables.generations(clocks.unix);
                !generations.any(|t| t.endpoint(*block, clocks.unix).is_some())
            })
            .collect();
        for block in gone {
            self.registrations.remove(block);
            self.contacted.retain(|endpoint, _| endpoint.block() != block);
        }
        let mut known = HashMap::new();
        let mut inner_ips = HashSet::new();
        for tables in tables.generations(clocks.unix) {
            for (block, record) in tables.endpoints.iter().filter(|(_, record)| !record.gone) {
                let Some(address) = record.address else { continue };
                let who = Who::Endpoint { block: *block, registered: false };
                known.entry(address).or_insert(Origin { who, hop: Counters::ENDPOINTS });
                inner_ips.insert(address.ip());
            }
        }
        for hop in self.hops.iter() {
            let who = who_of(hop.whose);
            known.insert(hop.replica.address, Origin { who, hop: hop.slot });
        }
        (self.known, self.inner_ips) = (Arc::new(known), Arc::new(inner_ips));
        self.tables = Some(tables);
        self.dirty = true;
    }

    /// A control datagram. An error: nothing came of it.
    pub fn on_datagram(
        &mut self,
        arrival: &Arrival,
        now: Instant,
        clocks: Now,
        out: &mut Vec<Effect>,
    ) -> Result<(), DecodeError> {
        let unverified = datagram::decode(&arrival.bytes)?;
        let tables = self.tables.clone().ok_or(DecodeError::Field("selector"))?;
        match unverified.selector {
            Selector::Endpoint { tag, endpoint } if tag == tables.tag => {
                self.on_endpoint_datagram(&tables, endpoint, &unverified, arrival, now, clocks, out)
            }
            Selector::Endpoint { .. } => Err(DecodeError::Field("selector")),
            Selector::Gateway { tag } => {
                self.on_gateway_datagram(&tables, tag, &unverified, arrival, now, clocks, out)
            }
            Selector::Across { tag, endpoint } => {
                self.on_across_datagram(&tables, (tag, endpoint), &unverified, arrival, now, clocks, out)
            }
        }
    }

    #[allow(clippy::too_many_arguments)] // one caller, which passes its own arguments on
    fn on_endpoint_datagram(
        &mut self,
        tables: &Tables,
        endpoint: EndpointId,
        unverified: &Unverified<'_>,
        arrival: &Arrival,
        now: Instant,
        clocks: Now,
        out: &mut Vec<Effect>,
    ) -> Result<(), DecodeError> {
        let block = endpoint.block();
        let hour = unverified.phase.hour(clocks.unix);
        let mut verified = Err(DecodeError::Field("selector"));
        for tables in tables.generations(clocks.unix) {
            // Unknown ones are dropped before any derivation.
            let Some(record) = tables.endpoint(block, clocks.unix) else { continue };
            verified = unverified.verify(tables.endpoint_key(block, &mut self.keys, hour, clocks.hour()));
            let mut key = tables.endpoint_key(block, &mut self.keys, clocks.hour(), clocks.hour()).clone();
            if verified.is_err()
                && let Some(renewal) = tables.renewal_key(block, record, &mut self.keys, clocks.hour())
            {
                // Its holder comes back, and knows no other key.
                verified = unverified.verify(renewal);
                key = renewal.clone();
            }
            if verified.is_ok() {
                let datagram = verified?;
                self.hear(endpoint, record.ends(endpoint), now);
                let answer =
                    Answer { arrival, selector: datagram.selector, sequence: datagram.sequence, key, clocks };
                return self.asked_by_endpoint(endpoint, &datagram, &answer, now, out);
            }
        }
        verified.map(drop)
    }

    fn asked_by_endpoint(
        &mut self,
        endpoint: EndpointId,
        datagram: &Datagram,
        answer: &Answer<'_>,
        now: Instant,
        out: &mut Vec<Effect>,
    ) -> Result<(), DecodeError> {
        let arrival = answer.arrival;
        match &datagram.body {
            Body::Probe(probe) => {
                let who = Who::Endpoint { block: endpoint.block(), registered: false };
                self.learn(arrival.source, who, now);
                out.push(answer.with(Body::ProbeAck(self.ack(probe, arrival))));
                Ok(())
            }
            Body::Register(register) => {
                let side = arrival.via.side();
                let (source, counter) = (arrival.source, datagram.sequence);
                match self.registrations.on_register(now, source, side, endpoint, counter, register) {
                    Verdict::Accepted { changed, held } => {
                        let before = self.contacted.insert(endpoint, arrival.contacted);
                        self.dirty |= changed || before != Some(arrival.contacted);
                        let body = RegisteredBody { replica: self.start, observed: source, held };
                        out.push(answer.with(Body::Registered(body)));
                    }
                    Verdict::Challenge(challenge) => out.push(answer.with(Body::Challenge(challenge))),
                    Verdict::Refused(refusal) => {
                        tracing::trace!(?refusal, %endpoint, "REGISTER refused");
                    }
                }
                Ok(())
            }
            _ => Err(DecodeError::Field("type")),
        }
    }

    #[allow(clippy::too_many_arguments)] // one caller, which passes its own arguments on
    fn on_gateway_datagram(
        &mut self,
        tables: &Tables,
        tag: ClusterTag,
        unverified: &Unverified<'_>,
        arrival: &Arrival,
        now: Instant,
        clocks: Now,
        out: &mut Vec<Effect>,
    ) -> Result<(), DecodeError> {
        let hour = unverified.phase.hour(clocks.unix);
        let (whose, datagram) = if tag == tables.tag {
            let key = tables.replica_key(&mut self.keys, hour, clocks.hour());
            (Whose::Sibling, unverified.verify(key)?)
        } else {
            let link = tables.peer(tag, clocks.unix).ok_or(DecodeError::Field("selector"))?;
            (Whose::Peer(tag), unverified.verify(link.probe_key(&mut self.keys, hour, clocks.hour()))?)
        };
        match &datagram.body {
            Body::Probe(probe) => {
                self.learn(arrival.source, who_of(whose), now);
                let key = self.gateway_key(tables, whose, clocks).ok_or(DecodeError::Field("selector"))?;
                let selector = Selector::Gateway { tag: tables.tag };
                let answer = Answer { arrival, selector, sequence: datagram.sequence, key, clocks };
                out.push(answer.with(Body::ProbeAck(self.ack(probe, arrival))));
                Ok(())
            }
            Body::ProbeAck(ack) => {
                let matched =
                    self.hops.on_ack(whose, arrival.via, arrival.source, datagram.sequence, ack, now);
                matched.then_some(()).ok_or(DecodeError::Field("sequence"))
            }
            Body::Announce(announce) if whose == Whose::Sibling => {
                // By its start number, wherever it sends from: a sibling's own address need not be its announced one.
                let siblings = || self.hops.iter().filter(|hop| hop.whose == Whose::Sibling);
                let sibling = siblings()
                    .find(|hop| hop.probe.start() == Some(announce.replica))
                    .or_else(|| siblings().find(|hop| hop.replica.address == arrival.source))
                    .map(|hop| (hop.replica.address, hop.probe.start()));
                let (address, start) = sibling.ok_or(DecodeError::Field("selector"))?;
                let news = self.siblings.on_announce(now, address, start, datagram.sequence, announce);
                self.dirty |= news;
                Ok(())
            }
            Body::Gone(gone) => {
                // A peer speaks for its own endpoints, a sibling for ours.
                if gone.tag != tag {
                    return Err(DecodeError::Field("tag"));
                }
                self.gone_received += 1;
                let hint = decide::Gone {
                    endpoint: gone.endpoint,
                    only_this_incarnation: gone.only_this_incarnation,
                };
                self.tell_listeners(tables, gone.tag, hint, clocks, out);
                Ok(())
            }
            _ => Err(DecodeError::Field("type")),
        }
    }

    pub(super) fn ack(&self, probe: &datagram::Probe, arrival: &Arrival) -> ProbeAck {
        let received = u16::try_from(arrival.bytes.len()).unwrap_or(u16::MAX);
        let tables = self.tables.as_deref();
        let unreachable = tables.map(|tables| self.hops.unreachable(tables, self.unix)).unwrap_or_default();
        let ack = ProbeAck::answering(probe, received, self.start, arrival.source, &unreachable);
        if self.draining {
            return ProbeAck { unreachable_total: DRAINING, unreachable: Vec::new(), ..ack };
        }
        ack
    }

    pub(super) fn learn(&mut self, source: SocketAddr, who: Who, now: Instant) {
        // Somebody else's key says nothing about our own endpoints: a source can be forged, and theirs may send out.
        let ours = |who: &Who| matches!(who, Who::Endpoint { .. });
        let claimed = !ours(&who)
            && (self.known.get(&source).is_some_and(|origin| ours(&origin.who))
                || self.learned.get(&source).is_some_and(|(who, _)| ours(who)));
        let inside = matches!(who, Who::Foreign { .. }) && self.inner_ips.contains(&source.ip());
        if claimed || inside {
            return;
        }
        // Others' endpoints leave ours half of the room.
        let room = if matches!(who, Who::Foreign { .. }) { LEARNED / 2 } else { LEARNED };
        if !self.learned.contains_key(&source) && self.learned.len() >= room {
            return;
        }
        let before = self.learned.insert(source, (who, now));
        self.dirty |= before.is_none_or(|(before, _)| before != who);
    }

    /// An endpoint is alive; `news` when the tables think otherwise.
    fn hear(&mut self, endpoint: EndpointId, news: bool, now: Instant) {
        let before = self.heard.insert(endpoint.block(), (endpoint, now));
        self.dirty |= news && before.is_none_or(|(before, _)| before != endpoint);
    }

    pub(super) fn gateway_key(&mut self, tables: &Tables, whose: Whose, clocks: Now) -> Option<CidKey> {
        let hour = clocks.hour();
        match whose {
            Whose::Sibling => Some(tables.replica_key(&mut self.keys, hour, hour).clone()),
            Whose::Peer(tag) => {
                Some(tables.peer(tag, clocks.unix)?.probe_key(&mut self.keys, hour, hour).clone())
            }
        }
    }

    pub fn on_too_large(&mut self, hop: u64, sequence: u64, now: Instant) {
        if let Some(hop) = self.hops.get_mut(hop) {
            hop.probe.on_too_large(now, sequence);
        }
    }

    /// Call when due, or more often.
    pub fn on_tick(&mut self, now: Instant, clocks: Now, out: &mut Vec<Effect>) {
        self.unix = clocks.unix;
        let Some(tables) = self.tables.clone() else { return };
        self.dirty |= self.hops.iter().any(|hop| hop.flags.refused.load(Relaxed));
        let before: Vec<_> = self.hops.iter().map(|hop| hop.standing()).collect();
        for (id, probe) in self.hops.tick(now) {
            let Some((whose, via, to)) = self.hops.get_mut(id).map(|h| (h.whose, h.via, h.replica.address))
            else {
                continue;
            };
            let Some(key) = self.gateway_key(&tables, whose, clocks) else { continue };
            let selector = Selector::Gateway { tag: tables.tag };
            let datagram = Datagram { selector, sequence: probe.sequence, body: Body::Probe(probe.probe) };
            let bytes = datagram.encode(clocks.hour(), &key);
            out.push(Effect::Send(Send { via, to, from: None, bytes, probe: Some((id, probe.sequence)) }));
        }
        self.take_events(now);
        let changes = self.hops.replace_dead(now);
        self.dirty |= !changes.is_empty();
        push_changes(changes, out);
        self.dirty |= !before.into_iter().eq(self.hops.iter().map(|hop| hop.standing()));
        self.announce(&tables, now, clocks, out);
        if now >= self.next_sweep {
            self.next_sweep = now + SWEEP;
            self.sweep(now);
        }
    }

    fn take_events(&mut self, now: Instant) {
        for hop in self.hops.iter_mut() {
            let sibling = hop.whose == Whose::Sibling;
            for event in hop.probe.take_events() {
                self.dirty = true;
                match event {
                    Event::Dead => {
                        tracing::info!(cluster = hop.cluster, gateway = hop.replica.name, address = %hop.replica.address, "gateway does not answer");
                        if sibling {
                            self.siblings.forget(hop.replica.address);
                        }
                    }
                    Event::Alive => {
                        tracing::info!(cluster = hop.cluster, gateway = hop.replica.name, address = %hop.replica.address, "gateway answers");
                        if sibling {
                            self.registrations.announce_now(now);
                        }
                    }
                    Event::Restarted(_) if sibling => {
                        self.siblings.forget(hop.replica.address);
                        self.registrations.announce_now(now);
                    }
                    _ => {}
                }
            }
        }
    }

    fn announce(&mut self, tables: &Tables, now: Instant, clocks: Now, out: &mut Vec<Effect>) {
        let before = self.registrations.len();
        let announces = self.registrations.on_tick(now);
        self.dirty |= self.registrations.len() != before;
        if announces.is_empty() {
            return;
        }
        let key = tables.replica_key(&mut self.keys, clocks.hour(), clocks.hour());
        let selector = Selector::Gateway { tag: tables.tag };
        for (sequence, announce) in announces {
            let datagram = Datagram { selector, sequence, body: Body::Announce(announce) };
            let bytes = datagram.encode(clocks.hour(), key);
            for hop in self.hops.iter().filter(|hop| hop.whose == Whose::Sibling) {
                let (via, to) = (hop.via, hop.replica.address);
                out.push(Effect::Send(Send { via, to, from: None, bytes: bytes.clone(), probe: None }));
            }
        }
    }

    fn sweep(&mut self, now: Instant) {
        let before = (self.siblings.len(), self.learned.len(), self.heard.len());
        self.siblings.expire(now);
        self.heard.retain(|_, (_, at)| now.saturating_duration_since(*at) < HEARD_LIFE);
        self.learned.retain(|_, (_, at)| now.saturating_duration_since(*at) < LEARNED_LIFE);
        self.dirty |= before != (self.siblings.len(), self.learned.len(), self.heard.len());
        if self.contacted.len() > self.registrations.len() {
            let registered: HashSet<EndpointId> = self.registrations.iter().map(|r| r.endpoint).collect();
            self.contacted.retain(|endpoint, _| registered.contains(endpoint));
        }
    }

    pub fn next_tick(&self, now: Instant) -> Instant {
        let announce = (!self.registrations.is_empty()).then(|| self.registrations.next_announce());
        let due = [self.hops.next_tick(), announce, Some(self.next_sweep)];
        // A probe that is overdue but paced must not make this spin.
        due.into_iter().flatten().min().unwrap_or(self.next_sweep).max(now + Duration::from_millis(1))
    }

    pub fn is_dirty(&self) -> bool {
        self.dirty && self.tables.is_some()
    }

    /// The view of now; `None` before the first tables.
    pub fn view(&self, ports: &HashMap<PortId, Arc<Port>>, now: Instant) -> Option<View> {
        let tables = self.tables.clone()?;
        let mut learned: HashMap<SocketAddr, Origin> = HashMap::with_capacity(self.learned.len());
        for (source, (who, _)) in &self.learned {
            learned.insert(*source, Origin { who: *who, hop: self.hop_slot(*source, *who) });
        }
        let mut registered = HashMap::with_capacity(self.registrations.len());
        for at in self.registrations.iter() {
            let block = at.endpoint.block();
            if self.registrations.get(at.endpoint, now).is_none() {
                continue;
            }
            let contacted = self.contacted.get(&at.endpoint).copied().flatten();
            let entry = Registered { endpoint: at.endpoint, address: at.address, side: at.side, contacted };
            registered.insert(at.endpoint, entry);
            let who = Who::Endpoint { block, registered: true };
            learned.insert(at.address, Origin { who, hop: Counters::ENDPOINTS });
        }
        let ended = |endpoint: EndpointId| {
            tables.endpoint(endpoint.block(), self.unix).is_some_and(|record| record.ends(endpoint))
        };
        let heard = self.heard.iter().filter(|(_, (endpoint, _))| ended(*endpoint));
        let heard = heard.map(|(block, (endpoint, _))| (*block, *endpoint)).collect();
        let holder = |address: SocketAddr| {
            let hop = self.hops.iter().find(|h| h.whose == Whose::Sibling && h.replica.address == address);
            Holder { address, hop: hop.map(|hop| hop.slot).unwrap_or_default() }
        };
        let holders = self.siblings.iter(now).map(|(endpoint, address)| (endpoint, holder(address)));
        let links = tables.all_links(self.unix).into_iter().map(|link| {
            let slot = self.counters.slot(Name::Link(link.peer.to_string()));
            let paths = self.hops.iter().filter(|hop| hop.whose == Whose::Peer(link.tag));
            (
                link.tag,
                LinkView { link: Arc::clone(link), slot, paths: paths.map(|hop| hop.path()).collect() },
            )
        });
        Some(View {
            registered: Arc::new(registered),
            heard: Arc::new(heard),
            holders: Arc::new(holders.collect()),
            known: Arc::clone(&self.known),
            learned: Arc::new(learned),
            inner_ips: Arc::clone(&self.inner_ips),
            links: Arc::new(links.collect()),
            ports: Arc::new(ports.clone()),
            tables,
        })
    }

    fn hop_slot(&self, source: SocketAddr, who: Who) -> crate::counters::Slot {
        let whose = match who {
            Who::Peer(tag) => Whose::Peer(tag),
            Who::Sibling => Whose::Sibling,
            _ => return Counters::ENDPOINTS,
        };
        // A peer behind a NAT or with several addresses: the machine tells which gateway it is, if any does.
        let of = |by_ip: bool| {
            self.hops.iter().find(|hop| {
                let address = hop.replica.address;
                hop.whose == whose && (address == source || (by_ip && address.ip() == source.ip()))
            })
        };
        of(false).or_else(|| of(true)).map(|hop| hop.slot).unwrap_or_default()
    }

    /// The view has been published: what the flags said is in it.
    pub fn published(&mut self) {
        self.dirty = false;
        self.hops.iter().for_each(|hop| hop.flags.refused.store(false, Relaxed));
    }

    pub fn status(&self) -> Status {
        let refusals = self.registrations.refusals();
        Status {
            hops: self.hops.status(),
            registered: self.registrations.len(),
            announced: self.siblings.len(),
            unreachable: self
                .tables
                .as_ref()
                .map(|t| self.hops.unreachable(t, self.unix))
                .unwrap_or_default(),
            refused_registers: refusals.wrong_replica + refusals.replayed + refusals.full,
            gone_sent: self.gone_sent,
            gone_received: self.gone_received,
        }
    }
}

/// How a question is answered: where it came in, to where it came from, from the address that was contacted.
pub(super) struct Answer<'a> {
    pub arrival: &'a Arrival,
    pub selector: Selector,
    pub sequence: u64,
    pub key: CidKey,
    pub clocks: Now,
}

impl Answer<'_> {
    pub fn with(&self, body: Body) -> Effect {
        let datagram = Datagram { selector: self.selector, sequence: self.sequence, body };
        let bytes = datagram.encode(self.clocks.hour(), &self.key);
        let (via, to, from) = (self.arrival.via, self.arrival.source, self.arrival.contacted);
        Effect::Send(Send { via, to, from, bytes, probe: None })
    }
}

fn who_of(whose: Whose) -> Who {
    match whose {
        Whose::Peer(tag) => Who::Peer(tag),
        Whose::Sibling => Who::Sibling,
    }
}

fn push_changes(changes: Vec<PortChange>, out: &mut Vec<Effect>) {
    out.extend(changes.into_iter().map(|change| match change {
        PortChange::Open(id) => Effect::Open(id),
        PortChange::Close(id) => Effect::Close(id),
    }));
}
