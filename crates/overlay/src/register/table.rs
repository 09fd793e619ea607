//! A replica's table of registered endpoints.

use std::collections::HashMap;
use std::hash::Hasher;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use siphasher::sip::SipHasher24;
use tombolo_model::ids::{Block, EndpointId, Incarnation};

use super::{HELD, REGISTER_EVERY};
use crate::datagram::{Announce, Challenge, MAX_ANNOUNCED, Register, StartNumber};
use crate::keys::CidKey;

/// A token is good for this period and the next: an echo comes within a round trip.
const TOKEN_PERIOD: Duration = Duration::from_secs(10);
/// A process, the one before it while that is not forgotten, and a copy of the machine that asks to be let in.
const PER_BLOCK: usize = 3;
/// Changes are announced together, at most this often.
const ANNOUNCE_GAP: Duration = Duration::from_millis(50);

/// The socket a datagram came in on: answers leave from the address and port that was contacted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Side {
    Border,
    Inner,
}

/// Where a registered endpoint is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Registration {
    pub endpoint: EndpointId,
    pub address: SocketAddr,
    pub side: Side,
    counter: u64,
    expires: Instant,
}

/// What to do with a REGISTER whose MAC held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Answer REGISTERED, held for this long. `changed`: announce to siblings.
    Accepted { changed: bool, held: Duration },
    /// Answer CHALLENGE to the address it came from.
    Challenge(Challenge),
    /// Count and drop.
    Refused(Refusal),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Refusal {
    /// Meant for another replica, or for an earlier start of this one: a PROBE-ACK tells the right number.
    WrongReplica,
    /// The counter is not above the last one: replayed or reordered.
    Replayed,
    /// The table is at its capacity.
    Full,
}

/// How many REGISTERs were refused, by reason.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Refusals {
    pub wrong_replica: u64,
    pub replayed: u64,
    pub full: u64,
}

/// The bounded table: at most `capacity` endpoints, about 120 bytes each, and [`PER_BLOCK`] of one block.
#[derive(Debug)]
pub struct Registrations {
    start: StartNumber,
    secret: CidKey,
    origin: Instant,
    capacity: usize,
    /// By endpoint and not by block: a copy of a machine, which has another incarnation, takes nothing from it.
    by_endpoint: HashMap<EndpointId, Registration>,
    /// How many registrations have this address.
    sources: HashMap<SocketAddr, u32>,
    refusals: Refusals,
    announce_due: Instant,
    announce_counter: u64,
    next_sweep: Instant,
}

impl Registrations {
    /// `secret` is random per process; `capacity` bounds the memory.
    pub fn new(now: Instant, start: StartNumber, secret: CidKey, capacity: usize) -> Self {
        Self {
            start,
            secret,
            origin: now,
            capacity,
            by_endpoint: HashMap::new(),
            sources: HashMap::new(),
            refusals: Refusals::default(),
            announce_due: now,
            announce_counter: 0,
            next_sweep: now,
        }
    }

    /// A REGISTER whose MAC held by the key of `endpoint`'s block; `counter` is its sequence.
    pub fn on_register(
        &mut self,
        now: Instant,
        from: SocketAddr,
        side: Side,
        endpoint: EndpointId,
        counter: u64,
        register: &Register,
    ) -> Verdict {
        if register.replica != self.start {
            self.refusals.wrong_replica += 1;
            return Verdict::Refused(Refusal::WrongReplica);
        }
        let known = self.get(endpoint, now).copied();
        if known.is_some_and(|known| counter <= known.counter) {
            self.refusals.replayed += 1;
            return Verdict::Refused(Refusal::Replayed);
        }
        let moved = known.is_none_or(|known| known.address != from);
        if moved && !self.is_token(now, from, endpoint, register.challenge) {
            let challenge = self.token(from, endpoint, self.period(now));
            return Verdict::Challenge(Challenge { replica: self.start, challenge });
        }
        if !self.by_endpoint.contains_key(&endpoint) {
            self.make_room(endpoint.block());
        }
        if known.is_none()
            && !self.by_endpoint.contains_key(&endpoint)
            && self.by_endpoint.len() >= self.capacity
        {
            self.sweep(now);
            if self.by_endpoint.len() >= self.capacity {
                self.refusals.full += 1;
                return Verdict::Refused(Refusal::Full);
            }
        }
        let changed = known.is_none_or(|known| (known.endpoint, known.address) != (endpoint, from));
        let registration = Registration { endpoint, address: from, side, counter, expires: now + HELD };
        if let Some(old) = self.by_endpoint.insert(endpoint, registration) {
            self.release(old.address);
        }
        *self.sources.entry(from).or_default() += 1;
        if changed {
            self.announce_due = self.announce_due.min(now + ANNOUNCE_GAP);
        }
        Verdict::Accepted { changed, held: HELD }
    }

    /// Where the endpoint is registered, unless expired.
    pub fn get(&self, endpoint: EndpointId, now: Instant) -> Option<&Registration> {
        self.by_endpoint.get(&endpoint).filter(|registration| now < registration.expires)
    }

    /// Whether packets from this address come from a registered endpoint, and so count as inner.
    pub fn is_source(&self, address: SocketAddr) -> bool {
        self.sources.contains_key(&address)
    }

    /// The newest registration of a block.
    pub fn newest(&self, block: Block) -> Option<&Registration> {
        self.of_block(block).max_by_key(|registration| registration.expires)
    }

    /// Ends a block's registrations (revoked, its provisional lease ended).
    pub fn remove(&mut self, block: Block) -> bool {
        let endpoints: Vec<EndpointId> = self.of_block(block).map(|r| r.endpoint).collect();
        for endpoint in &endpoints {
            self.take(*endpoint);
        }
        !endpoints.is_empty()
    }

    fn of_block(&self, block: Block) -> impl Iterator<Item = &Registration> {
        let incarnations = (0..Incarnation::COUNT).filter_map(Incarnation::new);
        incarnations.filter_map(move |incarnation| self.by_endpoint.get(&block.endpoint(incarnation)))
    }

    /// A block that has as many as it may loses the one that was not renewed for the longest.
    fn make_room(&mut self, block: Block) {
        if self.of_block(block).count() >= PER_BLOCK
            && let Some(oldest) = self.of_block(block).min_by_key(|r| r.expires).map(|r| r.endpoint)
        {
            self.take(oldest);
        }
    }

    fn take(&mut self, endpoint: EndpointId) {
        if let Some(old) = self.by_endpoint.remove(&endpoint) {
            self.release(old.address);
        }
    }

    /// Call about once a second: drops what has expired, and returns the ANNOUNCEs to send to every sibling, with
    /// their sequences: all endpoints every 15 s and at once when one has changed.
    pub fn on_tick(&mut self, now: Instant) -> Vec<(u64, Announce)> {
        if now >= self.next_sweep {
            self.sweep(now);
            self.next_sweep = now + Duration::from_secs(1);
        }
        if now < self.announce_due {
            return Vec::new();
        }
        self.announce_due = now + REGISTER_EVERY;
        let endpoints: Vec<EndpointId> = self.by_endpoint.values().map(|r| r.endpoint).collect();
        let announce = |chunk: &[EndpointId]| {
            self.announce_counter += 1;
            (self.announce_counter, Announce { replica: self.start, endpoints: chunk.to_vec() })
        };
        endpoints.chunks(MAX_ANNOUNCED).map(announce).collect()
    }

    /// A sibling is new or has started anew: everything is announced with the next tick.
    pub fn announce_now(&mut self, now: Instant) {
        self.announce_due = self.announce_due.min(now);
    }

    /// When [`Self::on_tick`] has something to announce.
    pub fn next_announce(&self) -> Instant {
        self.announce_due
    }
    pub fn len(&self) -> usize {
        self.by_endpoint.len()
    }
    pub fn is_empty(&self) -> bool {
        self.by_endpoint.is_empty()
    }
    pub fn refusals(&self) -> Refusals {
        self.refusals
    }
    pub fn iter(&self) -> impl Iterator<Item = &Registration> {
        self.by_endpoint.values()
    }

    fn sweep(&mut self, now: Instant) {
        let expired: Vec<EndpointId> = self
            .by_endpoint
            .iter()
            .filter(|(_, r)| now >= r.expires)
            .map(|(endpoint, _)| *endpoint)
            .collect();
        for endpoint in expired {
            self.take(endpoint);
        }
    }

    fn release(&mut self, address: SocketAddr) {
        if let Some(count) = self.sources.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.sources.remove(&address);
            }
        }
    }

    fn period(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.origin).as_secs() / TOKEN_PERIOD.as_secs()
    }

    /// Bound to address, endpoint and time, so nothing is kept for those who never echo. Never 0.
    fn token(&self, from: SocketAddr, endpoint: EndpointId, period: u64) -> u64 {
        let mut hasher = SipHasher24::new_with_key(self.secret.as_bytes());
        match from.ip().to_canonical() {
            std::net::IpAddr::V4(ip) => hasher.write(&ip.octets()),
            std::net::IpAddr::V6(ip) => hasher.write(&ip.octets()),
        }
        hasher.write(&from.port().to_be_bytes());
        hasher.write(&endpoint.value().to_be_bytes());
        hasher.write(&period.to_be_bytes());
        hasher.finish() | 1
    }

    fn is_token(&self, now: Instant, from: SocketAddr, endpoint: EndpointId, token: u64) -> bool {
        let period = self.period(now);
        token == self.token(from, endpoint, period)
            || (period > 0 && token == self.token(from, endpoint, period - 1))
    }
}
