//! Who is there: sidecars and gateways with what they serve and when they were last heard (pure, time passed in).
//!
//! An endpoint is in rotation for a service while it is live and its sidecar reports the service healthy. Out of
//! rotation at once when it says that it leaves or its control connection closes; after [`Patience::silent`] without a
//! report. A federator that was itself held up (stopped, swapped out) credits everybody its own absence: nobody is
//! thrown out because we did not listen. `now` is a monotonic time since any origin.

mod members;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tombolo_identity::SpiffeId;
use tombolo_model::ids::{Block, EndpointId};
use tombolo_model::names::ServiceKey;
use tombolo_proto::v1;

use self::members::GONE_AFTER;
pub use self::members::{Gateway, HeldTrust, Member, Presence, Served};
use crate::clones::{Instance, Seen};
use crate::facts::{GatewayRecord, LeaseRecord, Port, Role, ServedRecord};

/// How long silence is borne.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Reports come at least once a second.
    pub silent: Duration,
    /// After a restart of the federator everybody needs to find it again: 5 s of backoff at most, and a handshake.
    pub restart: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { silent: Duration::from_secs(2), restart: Duration::from_secs(10) }
    }
}

/// One that is not heard any more counts as unhealthy for this long; then its service is simply smaller.
const COUNTED: Duration = Duration::from_secs(60);
/// Ticks come every 250 ms: a gap beyond this is our own absence.
const OWN_ABSENCE: Duration = Duration::from_millis(1000);

/// What a sidecar said about itself, checked.
#[derive(Clone, Debug)]
pub struct SidecarHello {
    pub block: Block,
    pub spiffe_id: SpiffeId,
    pub role: Role,
    pub ids: Vec<EndpointId>,
    pub address: Option<SocketAddr>,
    pub services: BTreeMap<ServiceKey, (Vec<Port>, u32)>,
    pub refused: BTreeMap<String, String>,
    pub watch: u64,
    pub version: String,
    pub instance: Option<Instance>,
    pub host: String,
    pub answers: bool,
    pub plain: BTreeMap<ServiceKey, Vec<String>>,
}

/// What a gateway said about itself, checked.
#[derive(Clone, Debug)]
pub struct GatewayHello {
    pub name: String,
    pub border: SocketAddr,
    pub inner: SocketAddr,
    pub balanced: bool,
    pub zone: String,
    pub start_number: u64,
    pub endpoint: Option<(EndpointId, Option<SocketAddr>)>,
    pub watch: u64,
}

/// What happens to the registry.
#[derive(Clone, Debug)]
pub enum Event {
    Sidecar(SidecarHello),
    Gateway(GatewayHello),
    SidecarReport {
        block: Block,
        report: Box<v1::StatusReport>,
    },
    GatewayReport {
        name: String,
        report: Box<v1::StatusReport>,
    },
    /// A configuration stream ended.
    Closed {
        watch: u64,
    },
    /// This federator has enforced revocations on its own connections.
    OwnEnforced(BTreeMap<String, i64>),
    /// This federator's own SVID has been swapped.
    OwnTrust(HeldTrust),
    Tick,
}

/// The tables.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    pub members: BTreeMap<Block, Member>,
    pub gateways: BTreeMap<String, Gateway>,
    /// Who serves what, so that a look-up does not go over every member. Follows `members`: [`Registry::enter`].
    by_service: BTreeMap<ServiceKey, BTreeSet<Block>>,
    last_tick: Option<Duration>,
    patience: Patience,
    /// As [`Member::enforced`], of this federator.
    pub own_enforced: Arc<BTreeMap<String, i64>>,
    /// Of this federator.
    pub own_trust: HeldTrust,
}

impl Registry {
    pub fn new(patience: Patience) -> Self {
        Self { patience, ..Self::default() }
    }

    /// What the store remembers of a gateway, used until it would have come back.
    pub fn restore_gateway(&mut self, lease: &LeaseRecord, record: &GatewayRecord, now: Duration) {
        let gateway = Gateway {
            name: record.name.clone(),
            border: record.border,
            inner: record.inner,
            balanced: record.balanced,
            zone: record.zone.clone(),
            start_number: record.start_number,
            endpoint: lease.ids.first().map(|id| (*id, lease.address)),
            presence: Presence::Live,
            draining: false,
            registered: 0,
            heard: (now + self.patience.restart).saturating_sub(self.patience.silent),
            heard_unix: 0,
            watch: 0,
            links: Vec::new(),
            hops: Vec::new(),
            trust: HeldTrust::default(),
        };
        self.gateways.insert(record.name.clone(), gateway);
    }

    /// What the store remembers of a member: in rotation until it would have come back, if it was when last seen.
    pub fn restore(&mut self, lease: &LeaseRecord, id: SpiffeId, now: Duration) {
        let was_there = lease.services.is_empty() || lease.services.iter().any(|s| s.healthy);
        let served = |s: &ServedRecord| {
            let served = Served {
                ports: s.ports.clone(),
                weight: s.weight,
                healthy: s.healthy,
                reason: "as before the federator's restart".to_owned(),
            };
            (s.service.clone(), served)
        };
        let member = Member {
            block: lease.block,
            spiffe_id: id,
            role: lease.role,
            ids: lease.ids.clone(),
            address: lease.address,
            services: lease.services.iter().map(served).collect(),
            refused: BTreeMap::new(),
            presence: if was_there { Presence::Live } else { Presence::Silent },
            leaving: false,
            reason: "not heard yet since the federator's restart".to_owned(),
            heard: (now + self.patience.restart).saturating_sub(self.patience.silent),
            heard_unix: 0,
            watch: 0,
            version: String::new(),
            instance: None,
            host: String::new(),
            spoke: Duration::ZERO,
            clones: Seen::default(),
            answers: false,
            asked: 0,
            answered: 0,
            plain: BTreeMap::new(),
            upstreams: Vec::new(),
            hops: Vec::new(),
            enforced: Arc::default(),
            trust: HeldTrust::default(),
        };
        self.enter(member);
    }

    /// The one way in: keeps the index.
    fn enter(&mut self, member: Member) {
        self.forget(member.block);
        for service in member.services.keys() {
            self.by_service.entry(service.clone()).or_default().insert(member.block);
        }
        self.members.insert(member.block, member);
    }

    /// Applies an event; returns whether anything that snapshots are made of has changed.
    pub fn step(&mut self, event: Event, now: Duration, unix: u64) -> bool {
        match event {
            Event::Sidecar(hello) => {
                self.sidecar(hello, now, unix);
                true
            }
            Event::Gateway(hello) => {
                self.gateway(hello, now, unix);
                true
            }
            Event::SidecarReport { block, report } => self.sidecar_report(block, *report, now, unix),
            Event::GatewayReport { name, report } => self.gateway_report(&name, *report, now, unix),
            Event::Closed { watch } => self.closed(watch),
            Event::OwnEnforced(enforced) => {
                let changed = *self.own_enforced != enforced;
                self.own_enforced = Arc::new(enforced);
                changed
            }
            Event::OwnTrust(held) => {
                let changed = self.own_trust != held;
                self.own_trust = held;
                changed
            }
            Event::Tick => self.tick(now),
        }
    }

    fn sidecar(&mut self, hello: SidecarHello, now: Duration, unix: u64) {
        let SidecarHello {
            block,
            spiffe_id,
            role,
            ids,
            address,
            services,
            refused,
            watch,
            version,
            instance,
            host,
            answers,
            plain,
        } = hello;
        let old = self.members.get(&block).cloned();
        let same_start = old.as_ref().is_some_and(|old| old.ids == ids);
        let services = services.into_iter().map(|(service, (ports, weight))| {
            // Health is the sidecar's to report; a reconnecting one keeps what it said last.
            let before = old.as_ref().filter(|_| same_start).and_then(|old| old.services.get(&service));
            let healthy = before.is_some_and(|s| s.healthy);
            let reason = before.map_or_else(|| "no health report yet".to_owned(), |s| s.reason.clone());
            (service, Served { ports, weight, healthy, reason })
        });
        let (upstreams, hops) =
            old.as_ref().map(|o| (o.upstreams.clone(), o.hops.clone())).unwrap_or_default();
        let enforced = old.as_ref().filter(|_| same_start).map(|o| o.enforced.clone()).unwrap_or_default();
        let trust = old.as_ref().filter(|_| same_start).map(|o| o.trust).unwrap_or_default();
        let member = Member {
            block,
            spiffe_id,
            role,
            ids,
            address,
            services: services.collect(),
            refused,
            presence: Presence::Live,
            leaving: false,
            reason: String::new(),
            heard: now,
            heard_unix: unix,
            watch,
            version,
            instance,
            host,
            spoke: now,
            answers,
            asked: 0,
            answered: 0,
            plain,
            clones: old.as_ref().map(|old| old.clones.clone()).unwrap_or_default(),
            upstreams,
            hops,
            enforced,
            trust,
        };
        self.enter(member);
    }

    fn gateway(&mut self, hello: GatewayHello, now: Duration, unix: u64) {
        let GatewayHello { name, border, inner, balanced, zone, start_number, endpoint, watch } = hello;
        let same_start = self.gateways.get(&name).filter(|old| old.start_number == start_number);
        let trust = same_start.map(|old| old.trust).unwrap_or_default();
        let gateway = Gateway {
            name: name.clone(),
            border,
            inner,
            balanced,
            zone,
            start_number,
            endpoint,
            presence: Presence::Live,
            draining: false,
            registered: 0,
            heard: now,
            heard_unix: unix,
            watch,
            links: Vec::new(),
            hops: Vec::new(),
            trust,
        };
        self.gateways.insert(name, gateway);
    }

    fn sidecar_report(&mut self, block: Block, report: v1::StatusReport, now: Duration, unix: u64) -> bool {
        let Some(member) = self.members.get_mut(&block) else { return false };
        let mut changed = false;
        for health in &report.health {
            let Ok(service) = health.service.parse::<ServiceKey>() else { continue };
            let Some(served) = member.services.get_mut(&service) else { continue };
            let reason: String = health.reason.chars().take(300).collect();
            changed |= served.healthy != health.healthy;
            (served.healthy, served.reason) = (health.healthy, reason);
        }
        if !report.enforcements.is_empty() {
            // All of them, not only the new ones: what is revoked no more is forgotten with it.
            let all = report.enforcements.into_iter();
            let all: BTreeMap<String, i64> = all.map(|e| (e.revocation, e.at_unix_ms)).collect();
            changed |= *member.enforced != all;
            member.enforced = Arc::new(all);
        }
        if let Some(held) = report.trust.as_ref().map(HeldTrust::from_wire) {
            changed |= member.trust != held;
            member.trust = held;
        }
        if report.answer > member.answered && report.answer <= member.asked {
            member.answered = report.answer;
            changed = true;
        }
        member.upstreams = report.upstreams;
        member.hops = report.hops;
        let presence = if report.leaving { Presence::Left } else { Presence::Live };
        changed |= member.presence != presence;
        member.presence = presence;
        member.leaving = report.leaving;
        member.reason = if report.leaving { "draining".to_owned() } else { String::new() };
        member.heard = member.heard.max(now);
        member.spoke = now;
        member.heard_unix = unix;
        changed
    }

    fn gateway_report(&mut self, name: &str, report: v1::StatusReport, now: Duration, unix: u64) -> bool {
        let Some(gateway) = self.gateways.get_mut(name) else { return false };
        let counters = report.gateway.unwrap_or_default();
        let draining = counters.draining || report.leaving;
        let mut changed = gateway.presence != Presence::Live || gateway.draining != draining;
        if let Some(held) = report.trust.as_ref().map(HeldTrust::from_wire) {
            changed |= gateway.trust != held;
            gateway.trust = held;
        }
        gateway.draining = draining;
        gateway.presence = Presence::Live;
        gateway.registered = counters.registered;
        gateway.links = counters.links;
        gateway.hops = report.hops;
        gateway.heard = now;
        gateway.heard_unix = unix;
        changed
    }

    fn closed(&mut self, watch: u64) -> bool {
        let mut changed = false;
        for member in self.members.values_mut().filter(|m| m.watch == watch) {
            changed |= member.presence != Presence::Left;
            member.presence = Presence::Left;
            member.reason = "its control connection closed".to_owned();
        }
        for gateway in self.gateways.values_mut().filter(|g| g.watch == watch) {
            changed |= gateway.presence != Presence::Left;
            gateway.presence = Presence::Left;
        }
        changed
    }

    fn tick(&mut self, now: Duration) -> bool {
        let absence = self.last_tick.map_or(Duration::ZERO, |last| now.saturating_sub(last));
        self.last_tick = Some(now);
        let credit = if absence > OWN_ABSENCE { absence } else { Duration::ZERO };
        let mut changed = false;
        for member in self.members.values_mut() {
            member.heard += credit;
            let silence = now.saturating_sub(member.heard);
            if member.presence == Presence::Live && silence >= self.patience.silent {
                member.presence = Presence::Silent;
                member.reason = format!("no report for {} s", self.patience.silent.as_secs_f32());
                changed = true;
            }
            // Crossing into "may be gone" is told to gateways too.
            let before = silence.saturating_sub(absence);
            changed |= member.presence == Presence::Silent && (before < GONE_AFTER) != (silence < GONE_AFTER);
        }
        for gateway in self.gateways.values_mut() {
            gateway.heard += credit;
            if gateway.presence == Presence::Live && now.saturating_sub(gateway.heard) >= self.patience.silent
            {
                gateway.presence = Presence::Silent;
                changed = true;
            }
        }
        changed
    }

    /// The member is asked whether it lives.
    pub fn ask(&mut self, block: Block, question: u64) {
        let Some(member) = self.members.get_mut(&block) else { return };
        member.asked = question;
    }

    /// Somebody else came with a member's identity; `new`: a process that had not come before.
    pub fn clone_seen(&mut self, block: Block, new: bool, unix: u64, host: &str) {
        let Some(member) = self.members.get_mut(&block) else { return };
        let Seen { refused, last_unix, host: last } = &mut member.clones;
        *refused = refused.saturating_add(u32::from(new));
        *last_unix = unix;
        host.clone_into(last);
    }

    /// Forgets a member.
    pub fn forget(&mut self, block: Block) {
        let Some(member) = self.members.remove(&block) else { return };
        for service in member.services.keys() {
            if let Some(blocks) = self.by_service.get_mut(service) {
                blocks.remove(&block);
                if blocks.is_empty() {
                    self.by_service.remove(service);
                }
            }
        }
    }

    /// Forgets gateways whose block's lease has ended; whether there were any.
    pub fn forget_gateways(&mut self, ended: impl Fn(Block) -> bool) -> bool {
        let before = self.gateways.len();
        self.gateways.retain(|_, gateway| gateway.endpoint.is_none_or(|(id, _)| !ended(id.block())));
        before != self.gateways.len()
    }

    /// Every service that somebody serves, in rotation or not.
    pub fn services(&self) -> impl Iterator<Item = &ServiceKey> {
        self.by_service.keys()
    }

    /// Every member that serves a service, in rotation or not.
    pub fn serving<'a>(&'a self, service: &'a ServiceKey) -> impl Iterator<Item = &'a Member> {
        let blocks = self.by_service.get(service).into_iter().flatten();
        blocks.filter_map(|block| self.members.get(block))
    }

    /// Endpoint ids in rotation for a service, sorted.
    pub fn healthy(&self, service: &ServiceKey) -> Vec<EndpointId> {
        let mut ids: Vec<_> = self
            .serving(service)
            .filter(|m| m.in_rotation(service))
            .filter_map(|m| m.ids.first().copied())
            .collect();
        ids.sort_unstable();
        ids
    }

    /// Endpoints in rotation and all that count: one that drained does not, one that fell silent does for a minute, so
    /// that a tier of which half is dead is seen as half healthy.
    pub fn counts(&self, service: &ServiceKey) -> (u32, u32) {
        let now = self.last_tick.unwrap_or_default();
        let counts =
            |m: &&Member| m.presence == Presence::Live || !m.leaving && now.saturating_sub(m.heard) < COUNTED;
        let healthy = self.serving(service).filter(|m| m.in_rotation(service)).count();
        let total = self.serving(service).filter(counts).count();
        (u32::try_from(healthy).unwrap_or(u32::MAX), u32::try_from(total).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests;
