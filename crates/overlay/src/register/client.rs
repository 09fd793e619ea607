//! One endpoint's registration at one replica.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::REGISTER_EVERY;
use crate::datagram::{Challenge, Register, Registered, StartNumber};

/// First retry of an unanswered REGISTER; doubles from there.
const RETRY: Duration = Duration::from_millis(500);
const LONGEST_RETRY: Duration = Duration::from_secs(4);
/// Challenges answered at once between two intervals; a replica that asks more often waits for the next retry.
const CHALLENGES: u32 = 4;

/// Registers again every 15 s, when challenged, and at once when a PROBE-ACK shows a new start number or observed address.
#[derive(Debug)]
pub struct ClientState {
    counter: u64,
    replica: Option<StartNumber>,
    observed: Option<SocketAddr>,
    token: u64,
    due: Instant,
    retry: Duration,
    challenges: u32,
    held_until: Option<Instant>,
}

impl ClientState {
    /// `first_counter` must exceed those of earlier lives of the same block: microseconds since the Unix epoch do.
    pub fn new(now: Instant, first_counter: u64) -> Self {
        Self {
            counter: first_counter,
            replica: None,
            observed: None,
            token: 0,
            due: now,
            retry: RETRY,
            challenges: 0,
            held_until: None,
        }
    }

    /// The REGISTER to send now, with its sequence. Nothing until a PROBE-ACK has named the replica's start number.
    pub fn on_tick(&mut self, now: Instant) -> Option<(u64, Register)> {
        let replica = self.replica?;
        if now < self.due {
            return None;
        }
        self.due = now + self.retry;
        self.retry = (self.retry * 2).min(LONGEST_RETRY);
        self.counter = self.counter.saturating_add(1);
        Some((self.counter, Register { replica, challenge: self.token }))
    }

    /// When [`Self::on_tick`] has something to send; `None` while the replica is unknown.
    pub fn next_tick(&self) -> Option<Instant> {
        self.replica.map(|_| self.due)
    }

    /// Every PROBE-ACK of this replica: `true` when it makes the endpoint register again at once.
    pub fn on_probe_ack(&mut self, now: Instant, start: StartNumber, observed: SocketAddr) -> bool {
        let changed = self.replica != Some(start) || self.observed != Some(observed);
        if self.replica != Some(start) {
            self.token = 0;
            self.held_until = None;
        }
        self.replica = Some(start);
        self.observed = Some(observed);
        if changed {
            self.at_once(now);
        }
        changed
    }

    /// A CHALLENGE whose MAC held; `sequence` must be the last REGISTER's.
    pub fn on_challenge(&mut self, now: Instant, sequence: u64, challenge: &Challenge) {
        if sequence != self.counter || Some(challenge.replica) != self.replica {
            return;
        }
        self.token = challenge.challenge;
        self.challenges += 1;
        if self.challenges <= CHALLENGES {
            self.due = now;
        }
    }

    /// A REGISTERED whose MAC held. An answer to an older REGISTER of this replica counts as well, but does not delay the
    /// next one. `true` when the endpoint was not registered before.
    pub fn on_registered(&mut self, now: Instant, sequence: u64, registered: &Registered) -> bool {
        if sequence > self.counter || Some(registered.replica) != self.replica {
            return false;
        }
        let new = !self.registered(now);
        if sequence == self.counter {
            self.held_until = Some(now + registered.held);
            self.observed = Some(registered.observed);
            self.due = now + REGISTER_EVERY.min(registered.held / 3).max(RETRY);
            self.retry = RETRY;
            self.challenges = 0;
        }
        new && self.registered(now)
    }

    /// Whether the replica holds a registration of ours now.
    pub fn registered(&self, now: Instant) -> bool {
        self.held_until.is_some_and(|until| now < until)
    }

    fn at_once(&mut self, now: Instant) {
        self.due = now;
        self.retry = RETRY;
        self.challenges = 0;
    }
}
