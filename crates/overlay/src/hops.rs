//! The hops task: probes each gateway path and those [`across`] links, registers where the endpoint has no address of its own, keeps the route
//! table's view of the paths, and takes control datagrams off the socket.
//!
//! Owns the paths; publishes [`RouteState`] to the socket, [`HopReport`]s and the set of unreachable clusters to
//! readers. A hop behind a balancer gets several source ports, so that several of its replicas are in use, and a port
//! whose replica died is replaced. Ends with its task group.

use std::collections::HashSet;
use std::hash::Hasher;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use siphasher::sip::SipHasher13;
use tokio::sync::{mpsc, watch};
use tombolo_model::ids::{ClusterTag, EndpointId};
use tombolo_runtime::clock;
use tombolo_runtime::tasks::TaskGroup;

use crate::across;
use crate::cid::Kind;
use crate::datagram::{self, Body, Datagram, ProbeAck, Selector};
use crate::keys::KeyRing;
use crate::liveness::Hints;
use crate::probe::{Event, Health, ProbeState};
use crate::register::ClientState;
use crate::routes::{GatewayHop, PathView, RouteState, Routes};
use crate::socket::{ControlPacket, OverlaySocket, Slot};

/// Source ports kept towards a balancer: with two replicas behind it, all four land on one of them once in eight.
const BALANCED_SLOTS: usize = 4;
/// Probe states ask for less; this bounds how stale a report or a new registration may be.
const LONGEST_SLEEP: Duration = Duration::from_millis(500);
/// A gateway that says so many clusters are unreachable is draining: it still forwards, but take another.
pub const DRAINING: u16 = u16::MAX;

/// What is known of one gateway path, for status and metrics.
#[derive(Clone, Debug)]
pub struct HopReport {
    pub name: String,
    /// The linked cluster that it leads to past the own gateways; `None`: a gateway of the own one.
    pub across: Option<String>,
    pub address: SocketAddr,
    /// Which source port; 0 is the endpoint's own.
    pub slot: usize,
    pub alive: bool,
    pub draining: bool,
    pub rtt: Option<Duration>,
    pub loss_per_mille: u32,
    /// Largest UDP payload known to pass.
    pub mtu: u16,
    pub last_ack: Option<Instant>,
    pub unreachable: Arc<[ClusterTag]>,
    pub registered: bool,
}

pub(crate) struct HopsConfig {
    pub tag: ClusterTag,
    pub endpoint: EndpointId,
    pub keys: Arc<ArcSwap<KeyRing>>,
    pub registers: bool,
    pub bind: SocketAddr,
    pub kind: Kind,
}

#[derive(Clone, Debug)]
pub(crate) struct HopsHandle {
    routes: watch::Sender<Arc<Routes>>,
    reports: Arc<ArcSwap<Vec<HopReport>>>,
    unreachable: watch::Receiver<Arc<HashSet<ClusterTag>>>,
}

impl HopsHandle {
    pub fn set_routes(&self, routes: Routes) {
        self.routes.send_replace(Arc::new(routes));
    }
    pub fn reports(&self) -> Vec<HopReport> {
        self.reports.load().to_vec()
    }
    pub fn unreachable(&self) -> watch::Receiver<Arc<HashSet<ClusterTag>>> {
        self.unreachable.clone()
    }
}

pub(crate) fn spawn(
    config: HopsConfig,
    socket: Arc<OverlaySocket>,
    control: mpsc::Receiver<ControlPacket>,
    hints: Hints,
    tasks: &TaskGroup,
) -> HopsHandle {
    let (routes, routes_receiver) = watch::channel(Arc::new(Routes::empty(config.tag)));
    let (unreachable_sender, unreachable) = watch::channel(Arc::default());
    let reports = Arc::new(ArcSwap::from_pointee(Vec::new()));
    let across = across::Paths::new(config.tag, config.endpoint);
    let task = HopsTask {
        config,
        socket,
        hints,
        routes: routes_receiver,
        reports: Arc::clone(&reports),
        unreachable: unreachable_sender,
        paths: Vec::new(),
        across,
        news: false,
    };
    tasks.spawn("overlay hops", task.run(control));
    HopsHandle { routes, reports, unreachable }
}

/// One way to a gateway: hop and source port.
struct Path {
    hop: GatewayHop,
    slot: usize,
    id: u64,
    probe: ProbeState,
    register: Option<ClientState>,
    traffic: Arc<AtomicBool>,
    unreachable: Arc<[ClusterTag]>,
}

impl Path {
    fn new(hop: GatewayHop, slot: usize, registers: bool, now: Instant) -> Self {
        let mut hasher = SipHasher13::new_with_keys(0x746f_6d62_6f6c_6f31, 0x7061_7468_0000_0001);
        hasher.write(hop.address.to_string().as_bytes());
        hasher.write_u64(slot as u64);
        Self {
            hop,
            slot,
            id: hasher.finish(),
            probe: ProbeState::new(now, rand::random()),
            register: registers.then(|| ClientState::new(now, clock::since_unix_epoch().as_micros() as u64)),
            traffic: Arc::default(),
            unreachable: Arc::from([]),
        }
    }
    /// Whether this is the path to `hop` from `slot`. What is known of a path survives news of its zone.
    fn leads_to(&self, hop: &GatewayHop, slot: usize) -> bool {
        let own = &self.hop;
        (&own.name, own.address, own.balanced, self.slot) == (&hop.name, hop.address, hop.balanced, slot)
    }
    fn draining(&self) -> bool {
        self.probe.unreachable_total() == DRAINING
    }
}

struct HopsTask {
    config: HopsConfig,
    socket: Arc<OverlaySocket>,
    hints: Hints,
    routes: watch::Receiver<Arc<Routes>>,
    reports: Arc<ArcSwap<Vec<HopReport>>>,
    unreachable: watch::Sender<Arc<HashSet<ClusterTag>>>,
    paths: Vec<Path>,
    across: across::Paths,
    /// A datagram has brought something that a tick acts on.
    news: bool,
}

impl HopsTask {
    async fn run(mut self, mut control: mpsc::Receiver<ControlPacket>) {
        let mut wake = Instant::now();
        loop {
            tokio::select! {
                packet = control.recv() => {
                    let Some(packet) = packet else { return };
                    self.on_control(&packet);
                    // Looking at every path is not for every datagram, whoever sends them.
                    if !self.news && !self.across.has_changed() && Instant::now() < wake {
                        continue;
                    }
                }
                changed = self.routes.changed() => {
                    if changed.is_err() {
                        return; // the overlay is gone
                    }
                    self.adopt_routes();
                }
                () = tokio::time::sleep_until(wake.into()) => {}
            }
            self.news = false;
            self.tick(Instant::now());
            wake = self.next_wake(Instant::now());
        }
    }

    fn next_wake(&self, now: Instant) -> Instant {
        let latest = now + LONGEST_SLEEP;
        if !self.probes() {
            return latest;
        }
        // Not in a tight loop when a probe is overdue but rate-limited: at least a millisecond.
        let due = |p: &Path| {
            let register = p.register.as_ref().and_then(|r| r.next_tick());
            register.map_or(p.probe.next_tick(), |at| at.min(p.probe.next_tick()))
        };
        let unix = clock::since_unix_epoch();
        // Without a key for this hour nothing can be sent, and an overdue probe must not keep this task awake.
        let keyed = self.config.keys.load().current(unix).is_some();
        let own = self.paths.iter().filter(|_| keyed).map(due);
        let probes = own.chain(self.across.next_tick(unix)).min().unwrap_or(latest);
        probes.clamp(now + Duration::from_millis(1), latest)
    }

    /// A joiner without a lease has no key to probe with: its only path is used as it is.
    fn probes(&self) -> bool {
        self.config.kind == Kind::Endpoint
    }

    fn adopt_routes(&mut self) {
        let now = Instant::now();
        let routes = Arc::clone(&self.routes.borrow_and_update());
        // Several parts share one address: a balancer's is one path for them, since only the first could use further ports.
        let spread = |hop: &GatewayHop| hop.balanced && !self.socket.has_parts();
        if routes.gateways.iter().any(spread) {
            self.open_slots();
        }
        let wanted: Vec<(GatewayHop, usize)> = routes
            .gateways
            .iter()
            .flat_map(|hop| {
                let slots = if spread(hop) { 1..1 + BALANCED_SLOTS } else { 0..1 };
                slots.map(move |slot| (hop.clone(), slot))
            })
            .collect();
        self.paths.retain(|path| wanted.iter().any(|(hop, slot)| path.leads_to(hop, *slot)));
        for (hop, slot) in wanted {
            match self.paths.iter_mut().find(|path| path.leads_to(&hop, slot)) {
                Some(path) => path.hop = hop,
                None => self.paths.push(Path::new(hop, slot, self.config.registers, now)),
            }
        }
        if self.probes() {
            self.across.adopt(&routes.across, now);
        }
        self.publish(routes);
    }

    fn fresh_slot(&self) -> Option<Arc<Slot>> {
        let address = SocketAddr::new(self.config.bind.ip(), 0);
        match Slot::bind(address) {
            Ok(slot) => Some(Arc::new(slot)),
            Err(error) => {
                tracing::warn!(%error, %address, "no further source port for a balanced gateway");
                None
            }
        }
    }

    fn open_slots(&self) {
        let mut slots = self.socket.slots().to_vec();
        while slots.len() < 1 + BALANCED_SLOTS {
            let Some(slot) = self.fresh_slot() else { return };
            slots.push(slot);
        }
        self.socket.set_slots(slots);
    }

    fn replace_slot(&mut self, slot: usize, now: Instant) {
        let Some(fresh) = self.fresh_slot() else { return };
        let mut slots = self.socket.slots().to_vec();
        let Some(entry) = slots.get_mut(slot) else { return };
        *entry = fresh;
        self.socket.set_slots(slots);
        for path in self.paths.iter_mut().filter(|path| path.slot == slot) {
            *path = Path::new(path.hop.clone(), slot, self.config.registers, now);
        }
    }

    fn on_control(&mut self, packet: &ControlPacket) {
        let handled = match datagram::decode(&packet.bytes) {
            Ok(unverified) if matches!(unverified.selector, Selector::Across { .. }) => {
                self.on_across(packet, &unverified)
            }
            Ok(unverified) => self.verified(&unverified).map(|datagram| self.on_verified(packet, datagram)),
            Err(error) => Err(error),
        };
        if let Err(error) = handled {
            self.socket.counters.malformed.fetch_add(1, Relaxed);
            tracing::trace!(%error, source = %packet.source, "control datagram dropped");
        }
    }

    fn on_across(
        &mut self,
        packet: &ControlPacket,
        unverified: &datagram::Unverified<'_>,
    ) -> Result<(), datagram::DecodeError> {
        let slots = self.socket.slots();
        let received = across::Received { unverified, source: packet.source, bytes: packet.bytes.len() };
        let mut send = |to, bytes: &[u8]| slots.first().map_or(Ok(()), |slot| slot.send_control(to, bytes));
        if let Some(gone) = self.across.on_datagram(received, moment(), &mut send)? {
            self.hints.gone(gone.tag, gone.endpoint);
        }
        Ok(())
    }

    fn on_verified(&mut self, packet: &ControlPacket, datagram: Datagram) {
        let now = Instant::now();
        match &datagram.body {
            Body::ProbeAck(ack) => self.on_ack(packet, datagram.sequence, ack, now),
            Body::Gone(gone) => self.hints.gone(gone.tag, gone.endpoint),
            Body::Challenge(challenge) => {
                if let Some(register) = self.path_of(packet).and_then(|path| path.register.as_mut()) {
                    register.on_challenge(now, datagram.sequence, challenge);
                    self.news = true;
                }
            }
            Body::Registered(registered) => {
                if let Some(register) = self.path_of(packet).and_then(|path| path.register.as_mut()) {
                    register.on_registered(now, datagram.sequence, registered);
                    self.news = true;
                }
            }
            // Nobody probes or registers at an endpoint.
            Body::Probe(_) | Body::Register(_) | Body::Announce(_) => {}
        }
    }

    fn path_of(&mut self, packet: &ControlPacket) -> Option<&mut Path> {
        self.paths.iter_mut().find(|path| path.hop.address == packet.source && path.slot == packet.slot)
    }

    fn verified(&self, unverified: &datagram::Unverified<'_>) -> Result<Datagram, datagram::DecodeError> {
        let ours = matches!(unverified.selector, Selector::Endpoint { tag, endpoint }
            if tag == self.config.tag && endpoint.block() == self.config.endpoint.block());
        if !ours {
            return Err(datagram::DecodeError::Field("selector"));
        }
        let keys = self.config.keys.load();
        let key = keys
            .for_phase(unverified.phase, clock::since_unix_epoch())
            .ok_or(datagram::DecodeError::Field("phase"))?;
        unverified.verify(key)
    }

    fn on_ack(&mut self, packet: &ControlPacket, sequence: u64, ack: &ProbeAck, now: Instant) {
        let Some(path) = self.path_of(packet) else { return };
        let before = path.probe.health();
        let mut news = false;
        if path.probe.on_ack(now, sequence, ack)
            && let Some(register) = &mut path.register
        {
            register.on_probe_ack(now, ack.start, ack.observed);
            news = true;
        }
        self.news |= news || path.probe.health() != before || path.probe.has_news();
    }

    fn tick(&mut self, now: Instant) {
        if !self.probes() {
            return;
        }
        let slots = self.socket.slots();
        let mut send = |to, bytes: &[u8]| slots.first().map_or(Ok(()), |slot| slot.send_control(to, bytes));
        let mut changed = self.across.tick(moment(), &mut send);
        let mut dead_slots = Vec::new();
        for index in 0..self.paths.len() {
            changed |= self.tick_path(index, now, &mut dead_slots);
        }
        dead_slots.sort_unstable();
        dead_slots.dedup();
        for slot in dead_slots {
            self.replace_slot(slot, now);
            changed = true;
        }
        if changed {
            let routes = Arc::clone(&self.routes.borrow());
            self.publish(routes);
        } else {
            self.reports.store(Arc::new(self.report()));
        }
    }

    fn tick_path(&mut self, index: usize, now: Instant, dead_slots: &mut Vec<usize>) -> bool {
        let slots = self.socket.slots();
        let keys = self.config.keys.load_full();
        let selector = Selector::Endpoint { tag: self.config.tag, endpoint: self.config.endpoint };
        let Some(path) = self.paths.get_mut(index) else { return false };
        let Some(slot) = slots.get(path.slot) else { return false };
        let Some((hour, key)) = keys.current(clock::since_unix_epoch()) else { return false };
        let before = path.probe.health();
        let has_traffic = path.traffic.swap(false, Relaxed);
        // Two probes at most per tick: one for life, one for the MTU.
        for _ in 0..2 {
            let Some(probe) = path.probe.on_tick(now, has_traffic) else { break };
            let packet = Datagram { selector, sequence: probe.sequence, body: Body::Probe(probe.probe) };
            if let Err(error) = slot.send_control(path.hop.address, &packet.encode(hour, key))
                && error.raw_os_error() == Some(libc::EMSGSIZE)
            {
                path.probe.on_too_large(now, probe.sequence);
            }
        }
        if let Some(register) = &mut path.register
            && let Some((sequence, register)) = register.on_tick(now)
        {
            let packet = Datagram { selector, sequence, body: Body::Register(register) };
            let _ = slot.send_control(path.hop.address, &packet.encode(hour, key));
        }
        let mut changed = path.probe.health() != before;
        for event in path.probe.take_events() {
            changed = true;
            match event {
                Event::UnreachableChanged => path.unreachable = Arc::from(path.probe.unreachable()),
                Event::Dead if path.slot > 0 => dead_slots.push(path.slot),
                Event::Dead => {
                    tracing::info!(gateway = path.hop.name, address = %path.hop.address, "gateway does not answer")
                }
                Event::Alive => {
                    tracing::info!(gateway = path.hop.name, address = %path.hop.address, "gateway answers")
                }
                _ => {}
            }
        }
        changed
    }

    fn publish(&self, routes: Arc<Routes>) {
        let probed = self.probes();
        let paths = self.paths.iter().map(|path| PathView {
            address: path.hop.address,
            slot: path.slot,
            id: path.id,
            // A suspect is left at once: packets then take a replica that answers, and come back with the next ACK.
            alive: !probed || (path.probe.health() == Health::Alive && !path.draining()),
            near: !routes.zone.is_empty() && path.hop.zone == routes.zone,
            unreachable: Arc::clone(&path.unreachable),
            traffic: Arc::clone(&path.traffic),
        });
        let paths = paths.collect();
        let across = Arc::new(self.across.view(&routes.zone));
        let state = RouteState { routes, paths, across };
        let tags = state.unreachable_tags();
        self.socket.routes.store(Arc::new(state));
        self.unreachable.send_if_modified(|current| {
            let changed = **current != tags;
            if changed {
                *current = Arc::new(tags);
            }
            changed
        });
        self.reports.store(Arc::new(self.report()));
    }

    fn report(&self) -> Vec<HopReport> {
        let report = |path: &Path| HopReport {
            name: path.hop.name.clone(),
            across: None,
            address: path.hop.address,
            slot: path.slot,
            alive: path.probe.alive(),
            draining: path.draining(),
            rtt: path.probe.rtt(),
            loss_per_mille: path.probe.loss_per_mille(),
            mtu: path.probe.mtu(),
            last_ack: path.probe.last_ack(),
            unreachable: Arc::clone(&path.unreachable),
            registered: path.register.as_ref().is_some_and(|r| r.registered(Instant::now())),
        };
        self.paths.iter().map(report).chain(self.across.reports()).collect()
    }
}

fn moment() -> across::Moment {
    across::Moment { now: Instant::now(), unix: clock::since_unix_epoch() }
}
