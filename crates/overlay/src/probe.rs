//! Whether one hop lives, how far it is, what it loses and what fits through it: one [`ProbeState`] per hop (a
//! sidecar and a gateway replica, or two gateways). Pure: time is passed in, the owner sends what [`ProbeState::on_tick`] returns
//! and passes PROBE-ACKs whose MAC held to [`ProbeState::on_ack`].
//!
//! **Pace.** 100 ms with traffic, 1 s without. A probe that is unanswered for max(2 srtt, 50 ms) makes the hop suspect
//! and the pace fast, also when idle; three such in a row make it dead. So death shows within 100 + 2 x 100 ms + the
//! allowance with traffic (350 ms on a LAN), within 1.3 s without. With 1 % loss each way three in a row are
//! lost once in hours, for 100 ms: any one ack revives.
//! **Own stalls.** A process that was itself stopped finds its probes old and their acks still in the socket: after
//! a late tick no verdict falls for one allowance.
//! **MTU.** See [`mtu`](self::mtu): padded probes, retried, counted only while small probes pass.
//!
//! Memory: at most [`MAX_OUTSTANDING`] probes, one list of unreachable clusters as the last ACK gave it.

mod mtu;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tombolo_model::ids::ClusterTag;

use crate::datagram::{PROBE_BYTES, Probe, ProbeAck, StartNumber};
use mtu::MtuSearch;

/// Pace with traffic, and while a hop is suspect: three unanswered are then under half a second.
pub const FAST: Duration = Duration::from_millis(100);
/// Pace without traffic: 256 bytes a second per hop.
pub const SLOW: Duration = Duration::from_secs(1);
/// Unanswered probes in a row that make a hop dead.
pub const DEAD_AFTER: u32 = 3;
/// Scheduling noise of a busy machine: an answer is not called missing before this.
const LEAST_ALLOWANCE: Duration = Duration::from_millis(50);
/// Before the first round trip is known: the longest plausible path on Earth and then some.
const FIRST_ALLOWANCE: Duration = Duration::from_millis(400);
/// Longer round trips than 1 s are not waited for twice.
const MOST_ALLOWANCE: Duration = Duration::from_secs(2);
/// A tick that comes this much late means that this process was stopped or starved.
const LATE_TICK: Duration = Duration::from_millis(100);
/// A new or just died hop is asked quickly for this long, then at the slow pace: most outages are short.
const EAGER: Duration = Duration::from_secs(5);
/// When a probe's answer is given up for the loss figure; later ones still prove life.
const GIVE_UP: Duration = Duration::from_secs(3);
/// 3 s of fast probes, and the MTU's.
const MAX_OUTSTANDING: usize = 64;
/// Events nobody took are dropped beyond this, oldest first: states can be read at any time.
const MAX_EVENTS: usize = 64;
const LOSS_WINDOW: u32 = 100;

/// What is known of a hop.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Health {
    /// No ACK yet, and not yet three unanswered.
    Untested,
    Alive,
    /// The oldest probe since the last ACK is overdue: prefer another hop.
    Suspect,
    Dead,
}

/// A change that the owner acts on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// The first ACK, or the first one after [`Event::Dead`].
    Alive,
    Dead,
    /// The replica at the other end started anew: registrations there are lost.
    Restarted(StartNumber),
    /// The far end sees us at another address (a NAT rebound, a balancer moved us).
    AddressChanged {
        old: Option<SocketAddr>,
        new: SocketAddr,
    },
    /// See [`ProbeState::unreachable`].
    UnreachableChanged,
    MtuChanged(u16),
}

/// A PROBE to send now: `sequence` is the datagram's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutgoingProbe {
    pub sequence: u64,
    pub probe: Probe,
}

#[derive(Clone, Copy, Debug)]
struct Outstanding {
    sequence: u64,
    sent: Instant,
    sent_micros: u64,
    bytes: u16,
    /// Looks for the MTU: its loss says nothing about life.
    searches: bool,
    overdue: bool,
}

/// The state machine of one hop.
#[derive(Debug)]
pub struct ProbeState {
    origin: Instant,
    health: Health,
    /// Since when the health is what it is.
    since: Instant,
    next_sequence: u64,
    next_due: Instant,
    last_probe: Option<Instant>,
    no_verdict_before: Instant,
    outstanding: VecDeque<Outstanding>,
    newest_acked: Option<u64>,
    /// Probes of life that are overdue, all sent after the last ACKed one.
    overdue: u32,
    last_ack: Option<Instant>,
    /// When the first probe was sent that was answered: what was lost before shows when the peer came, not how the path is.
    answered_from: Option<Instant>,
    srtt: Option<Duration>,
    rttvar: Duration,
    latest_rtt: Option<Duration>,
    /// Outcomes, newest in bit 0, 1 = lost.
    losses: u128,
    outcomes: u32,
    start: Option<StartNumber>,
    observed: Option<SocketAddr>,
    unreachable: Vec<ClusterTag>,
    unreachable_total: u16,
    search: MtuSearch,
    events: VecDeque<Event>,
}

impl ProbeState {
    /// `first_sequence` should be random (below 2^63), so that an earlier life's ACKs match nothing.
    pub fn new(now: Instant, first_sequence: u64) -> Self {
        Self {
            origin: now,
            health: Health::Untested,
            since: now,
            next_sequence: first_sequence & (u64::MAX >> 1),
            next_due: now,
            last_probe: None,
            no_verdict_before: now,
            outstanding: VecDeque::new(),
            newest_acked: None,
            overdue: 0,
            last_ack: None,
            answered_from: None,
            srtt: None,
            rttvar: Duration::ZERO,
            latest_rtt: None,
            losses: 0,
            outcomes: 0,
            start: None,
            observed: None,
            unreachable: Vec::new(),
            unreachable_total: 0,
            search: MtuSearch::new(now),
            events: VecDeque::new(),
        }
    }

    /// Call at [`Self::next_tick`] or more often, again until it returns `None`. `has_traffic`: packets went through
    /// this hop since about a second.
    pub fn on_tick(&mut self, now: Instant, has_traffic: bool) -> Option<OutgoingProbe> {
        if now.saturating_duration_since(self.next_tick_planned()) > LATE_TICK {
            self.no_verdict_before = now + self.allowance();
        }
        self.judge(now);
        let pace = self.pace(now, has_traffic);
        let due = self.last_probe.map_or(now, |last| last + pace);
        if due <= now {
            self.last_probe = Some(now);
            self.next_due = now + pace;
            return Some(self.send(now, PROBE_BYTES, false));
        }
        self.next_due = due;
        // Searching needs answers: not while it is unclear whether anything passes.
        if self.health == Health::Alive
            && let Some(bytes) = self.search.on_tick(now, self.allowance(), has_traffic)
        {
            self.report_mtu();
            return Some(self.send(now, bytes, true));
        }
        self.report_mtu();
        None
    }

    /// When [`Self::on_tick`] has something to do at the latest.
    pub fn next_tick(&self) -> Instant {
        self.next_tick_planned()
    }

    fn next_tick_planned(&self) -> Instant {
        let allowance = self.allowance();
        let overdue_at =
            self.outstanding.iter().filter(|o| !o.searches && !o.overdue).map(|o| o.sent + allowance).min();
        let search = (self.health == Health::Alive).then(|| self.search.next_tick()).flatten();
        let planned = [overdue_at, search].into_iter().flatten().fold(self.next_due, Instant::min);
        // A verdict that was put off is due when the wait ends.
        if self.outstanding.is_empty() {
            planned
        } else {
            planned.max(self.no_verdict_before.min(self.next_due))
        }
    }

    /// A PROBE-ACK whose MAC held. Unknown sequences (too late, replayed, never sent) are ignored: `false`.
    pub fn on_ack(&mut self, now: Instant, sequence: u64, ack: &ProbeAck) -> bool {
        let Some(at) = self.outstanding.iter().position(|o| o.sequence == sequence) else { return false };
        let matches = self.outstanding.get(at).is_some_and(|o| o.sent_micros == ack.sent_micros);
        let Some(probe) = (if matches { self.outstanding.remove(at) } else { None }) else { return false };
        self.last_ack = Some(now);
        if self.answered_from.is_none() {
            self.answered_from = Some(probe.sent);
            (self.losses, self.outcomes) = (0, 0);
        }
        let rtt = now.saturating_duration_since(probe.sent);
        self.note_rtt(rtt);
        if probe.searches {
            self.search.on_passed(now, probe.bytes.min(ack.received_bytes));
            self.report_mtu();
        } else {
            self.note_outcome(false);
        }
        // An older ACK that was overtaken proves life, but its news is stale.
        if self.newest_acked.is_none_or(|newest| sequence > newest) {
            self.newest_acked = Some(sequence);
            // What was sent before this one and is still missing was lost or reordered, not a sign of death.
            self.outstanding.iter_mut().filter(|o| o.sequence < sequence).for_each(|o| o.overdue = true);
            self.take_news(ack);
        }
        self.overdue = 0;
        self.outstanding.iter_mut().filter(|o| o.sequence > sequence).for_each(|o| o.overdue = false);
        if matches!(self.health, Health::Untested | Health::Dead) {
            self.push(Event::Alive);
        }
        self.enter(Health::Alive, now);
        true
    }

    /// The kernel refused a probe as too large for the path (EMSGSIZE): no need to wait for its loss.
    pub fn on_too_large(&mut self, now: Instant, sequence: u64) {
        if let Some(at) = self.outstanding.iter().position(|o| o.sequence == sequence && o.searches)
            && let Some(probe) = self.outstanding.remove(at)
        {
            self.search.on_refused(now, probe.bytes);
            self.report_mtu();
        }
    }

    /// ICMP said that nobody listens there: three unanswered at once, one ACK revives.
    pub fn on_refused(&mut self, now: Instant) {
        if self.health != Health::Dead {
            self.enter(Health::Dead, now);
            self.push(Event::Dead);
        }
    }

    pub fn take_events(&mut self) -> Vec<Event> {
        self.events.drain(..).collect()
    }
    /// Whether [`Self::take_events`] has any.
    pub fn has_news(&self) -> bool {
        !self.events.is_empty()
    }
    pub fn health(&self) -> Health {
        self.health
    }
    /// Whether the hop has answered and is not dead.
    pub fn alive(&self) -> bool {
        matches!(self.health, Health::Alive | Health::Suspect)
    }
    pub fn suspect(&self) -> bool {
        self.health == Health::Suspect
    }
    pub fn last_ack(&self) -> Option<Instant> {
        self.last_ack
    }
    /// Smoothed round trip (RFC 6298 weights).
    pub fn rtt(&self) -> Option<Duration> {
        self.srtt
    }
    pub fn latest_rtt(&self) -> Option<Duration> {
        self.latest_rtt
    }
    pub fn rtt_variation(&self) -> Duration {
        self.rttvar
    }
    /// Of the last 100 probes whose outcome is known, both ways together.
    pub fn loss_per_mille(&self) -> u32 {
        let window = u128::MAX >> (128 - LOSS_WINDOW);
        (self.losses & window).count_ones() * 1000 / self.outcomes.max(1)
    }
    /// Largest UDP payload that is known to pass.
    pub fn mtu(&self) -> u16 {
        self.search.passes()
    }
    pub fn start(&self) -> Option<StartNumber> {
        self.start
    }
    pub fn observed(&self) -> Option<SocketAddr> {
        self.observed
    }
    /// Clusters that the far gateway can't reach now, sorted; [`Self::unreachable_total`] may be more than fit.
    pub fn unreachable(&self) -> &[ClusterTag] {
        &self.unreachable
    }
    pub fn unreachable_total(&self) -> u16 {
        self.unreachable_total
    }

    fn allowance(&self) -> Duration {
        self.srtt.map_or(FIRST_ALLOWANCE, |srtt| (2 * srtt).clamp(LEAST_ALLOWANCE, MOST_ALLOWANCE))
    }

    fn pace(&self, now: Instant, has_traffic: bool) -> Duration {
        let eager = now.saturating_duration_since(self.since) < EAGER;
        match self.health {
            Health::Suspect => FAST,
            Health::Untested | Health::Dead if eager => FAST,
            Health::Untested | Health::Dead => SLOW,
            Health::Alive if has_traffic => FAST,
            Health::Alive => SLOW,
        }
    }

    fn judge(&mut self, now: Instant) {
        let allowance = self.allowance();
        let verdict = now >= self.no_verdict_before;
        let mut given_up = 0;
        let answered_from = self.answered_from;
        self.outstanding.retain_mut(|probe| {
            let age = now.saturating_duration_since(probe.sent);
            if verdict && !probe.overdue && !probe.searches && age >= allowance {
                probe.overdue = true;
                self.overdue = self.overdue.saturating_add(1);
            }
            let keep = age < GIVE_UP;
            let counts = !probe.searches && answered_from.is_none_or(|from| probe.sent >= from);
            given_up += u32::from(!keep && counts);
            keep
        });
        (0..given_up).for_each(|_| self.note_outcome(true));
        if self.overdue >= DEAD_AFTER && self.health != Health::Dead {
            self.enter(Health::Dead, now);
            self.push(Event::Dead);
        } else if self.overdue > 0 && self.health == Health::Alive {
            self.enter(Health::Suspect, now);
            self.search.forget_attempt(now);
        }
    }

    fn send(&mut self, now: Instant, bytes: u16, searches: bool) -> OutgoingProbe {
        if self.outstanding.len() >= MAX_OUTSTANDING {
            self.outstanding.pop_front();
        }
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let sent_micros =
            u64::try_from(now.saturating_duration_since(self.origin).as_micros()).unwrap_or(u64::MAX);
        let outstanding = Outstanding { sequence, sent: now, sent_micros, bytes, searches, overdue: false };
        self.outstanding.push_back(outstanding);
        OutgoingProbe { sequence, probe: Probe { sent_micros, bytes } }
    }

    fn note_rtt(&mut self, rtt: Duration) {
        self.latest_rtt = Some(rtt);
        match self.srtt {
            None => {
                self.srtt = Some(rtt);
                self.rttvar = rtt / 2;
            }
            Some(srtt) => {
                self.rttvar = (3 * self.rttvar + srtt.abs_diff(rtt)) / 4;
                self.srtt = Some((7 * srtt + rtt) / 8);
            }
        }
    }

    fn note_outcome(&mut self, lost: bool) {
        self.losses = (self.losses << 1) | u128::from(lost);
        self.outcomes = (self.outcomes + 1).min(LOSS_WINDOW);
    }

    fn take_news(&mut self, ack: &ProbeAck) {
        if self.start != Some(ack.start) {
            if self.start.is_some() {
                self.push(Event::Restarted(ack.start));
            }
            self.start = Some(ack.start);
        }
        if self.observed != Some(ack.observed) {
            self.push(Event::AddressChanged { old: self.observed, new: ack.observed });
            self.observed = Some(ack.observed);
        }
        let mut unreachable = ack.unreachable.clone();
        unreachable.sort_unstable();
        unreachable.dedup();
        if unreachable != self.unreachable || ack.unreachable_total != self.unreachable_total {
            self.unreachable = unreachable;
            self.unreachable_total = ack.unreachable_total;
            self.push(Event::UnreachableChanged);
        }
    }

    fn report_mtu(&mut self) {
        if let Some(mtu) = self.search.take_change() {
            self.push(Event::MtuChanged(mtu));
        }
    }

    fn enter(&mut self, health: Health, now: Instant) {
        if self.health != health {
            self.health = health;
            self.since = now;
        }
    }

    fn push(&mut self, event: Event) {
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }
}
