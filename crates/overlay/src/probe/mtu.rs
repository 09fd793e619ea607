//! The search for the largest UDP payload that passes a hop (after RFC 8899, without ICMP).
//!
//! `passes` is proven, `fails` is not passing: common sizes first, then bisection, until they are closer than
//! [`GRAIN`]. A size fails after three lost probes, counted only while the hop answers small ones. What passes is
//! confirmed again and again, because a path's MTU can shrink under it (9000 to 1420) without a word: then the search
//! starts over from the minimum. It is raised again after ten minutes.

use std::time::{Duration, Instant};

use crate::datagram::MAX_PROBE_BYTES;

/// QUIC demands this of every path (RFC 9000 section 14).
const LEAST: u16 = 1200;
/// Ethernet under IPv6, common tunnels, jumbo frames: as UDP payload.
const COMMON: [u16; 4] = [1452, 8952, 1412, 1372];
/// Closer is not worth a probe: 1 % of the smallest packet.
const GRAIN: u16 = 12;
const ATTEMPTS: u8 = 3;
/// Between a pass and the next question; the search sends at most 50 probes a second.
const STEP: Duration = Duration::from_millis(20);
/// An answer later than this counts as lost; the allowance when that is longer.
const WAIT: Duration = Duration::from_millis(150);
/// A black hole shows within 2 s + 3 waits with traffic; without traffic nobody is hurt by 10 s.
const CONFIRM_BUSY: Duration = Duration::from_secs(2);
const CONFIRM_IDLE: Duration = Duration::from_secs(10);
/// RFC 8899 section 5.1.1, PMTU_RAISE_TIMER.
const RAISE: Duration = Duration::from_secs(600);

#[derive(Clone, Copy, Debug)]
struct Attempt {
    bytes: u16,
    lost: u8,
    sent: Instant,
}

#[derive(Debug)]
pub(super) struct MtuSearch {
    passes: u16,
    fails: u16,
    attempt: Option<Attempt>,
    next: Instant,
    settled: Option<Instant>,
    confirmed: Instant,
    /// As the last tick had them: what an answer is waited for, and how long a pass is believed.
    wait: Duration,
    every: Duration,
    reported: u16,
}

impl MtuSearch {
    pub fn new(now: Instant) -> Self {
        Self {
            passes: LEAST,
            fails: MAX_PROBE_BYTES + 1,
            attempt: None,
            next: now,
            settled: None,
            confirmed: now,
            wait: WAIT,
            every: CONFIRM_BUSY,
            reported: LEAST,
        }
    }

    pub fn passes(&self) -> u16 {
        self.passes
    }

    /// The new size, once, when it has changed; a search on its way up reports only its end.
    pub fn take_change(&mut self) -> Option<u16> {
        let tell = self.settled.is_some() || self.passes < self.reported;
        if tell && self.passes != self.reported {
            self.reported = self.passes;
            return Some(self.passes);
        }
        None
    }

    pub fn next_tick(&self) -> Option<Instant> {
        match (self.attempt, self.settled) {
            (Some(attempt), _) => Some(attempt.sent + self.wait),
            (None, None) => Some(self.next),
            // At the least size there is nothing to confirm. Traffic that starts is seen by the next probe of life.
            (None, Some(settled)) if self.passes <= LEAST => Some(settled + RAISE),
            (None, Some(_)) => Some(self.confirmed + self.every),
        }
    }

    /// The size of a probe to send now.
    pub fn on_tick(&mut self, now: Instant, allowance: Duration, has_traffic: bool) -> Option<u16> {
        self.wait = allowance.max(WAIT);
        self.every = if has_traffic { CONFIRM_BUSY } else { CONFIRM_IDLE };
        if let Some(attempt) = self.attempt {
            if now.saturating_duration_since(attempt.sent) < self.wait {
                return None;
            }
            let lost = attempt.lost + 1;
            if lost < ATTEMPTS {
                self.attempt = Some(Attempt { lost, sent: now, ..attempt });
                return Some(attempt.bytes);
            }
            self.on_refused(now, attempt.bytes);
        }
        if let Some(settled) = self.settled {
            if now.saturating_duration_since(settled) >= RAISE && self.passes < MAX_PROBE_BYTES {
                self.fails = MAX_PROBE_BYTES + 1;
                self.settled = None;
            } else if self.passes > LEAST && now.saturating_duration_since(self.confirmed) >= self.every {
                return Some(self.attempt(now, self.passes));
            } else {
                return None;
            }
        }
        if now < self.next {
            return None;
        }
        match self.question() {
            Some(bytes) => Some(self.attempt(now, bytes)),
            None => {
                self.settled = Some(now);
                self.confirmed = now;
                None
            }
        }
    }

    fn attempt(&mut self, now: Instant, bytes: u16) -> u16 {
        self.attempt = Some(Attempt { bytes, lost: 0, sent: now });
        bytes
    }

    fn question(&self) -> Option<u16> {
        let open = |size: &u16| *size > self.passes && *size < self.fails;
        if self.fails.saturating_sub(self.passes) <= GRAIN {
            return None;
        }
        // Above a common size that passed lies either the next common one, or nothing usual: bisect.
        COMMON.into_iter().find(open).or(Some(self.passes + (self.fails - self.passes) / 2))
    }

    pub fn on_passed(&mut self, now: Instant, bytes: u16) {
        if bytes >= self.passes {
            self.passes = bytes;
            self.confirmed = now;
            self.fails = self.fails.max(bytes.saturating_add(1));
        }
        if self.attempt.is_some_and(|attempt| attempt.bytes <= bytes) {
            self.attempt = None;
            self.next = now + STEP;
        }
    }

    /// This size does not pass: lost three times, or refused by the kernel.
    pub fn on_refused(&mut self, now: Instant, bytes: u16) {
        self.attempt = None;
        self.next = now;
        self.fails = self.fails.min(bytes.max(LEAST + 1));
        if bytes <= self.passes {
            // A black hole: what passed before does not any more.
            self.passes = LEAST;
            self.settled = None;
        }
    }

    /// The hop stopped answering small probes too: the attempt says nothing about its size.
    pub fn forget_attempt(&mut self, now: Instant) {
        self.attempt = None;
        self.next = now;
    }
}
