//! Which sibling replica has an endpoint's registration, as they announced it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Instant;

use tombolo_model::ids::EndpointId;

use super::HELD;
use crate::datagram::{Announce, StartNumber};

/// A bounded table, filled by ANNOUNCEs from siblings whose MAC held (the owner passes only configured ones).
#[derive(Debug)]
pub struct Siblings {
    capacity: usize,
    /// Per sibling: its start number and last announce counter.
    known: HashMap<SocketAddr, (StartNumber, u64)>,
    by_endpoint: HashMap<EndpointId, (SocketAddr, Instant)>,
    dropped: u64,
}

impl Siblings {
    pub fn new(capacity: usize) -> Self {
        Self { capacity, known: HashMap::new(), by_endpoint: HashMap::new(), dropped: 0 }
    }

    /// `false` when it is a replay. `start` is what this sibling's last PROBE-ACK said, `None` while unknown.
    pub fn on_announce(
        &mut self,
        now: Instant,
        sibling: SocketAddr,
        start: Option<StartNumber>,
        sequence: u64,
        announce: &Announce,
    ) -> bool {
        if start.is_some_and(|start| start != announce.replica) {
            return false;
        }
        let last = self.known.get(&sibling).filter(|(start, _)| *start == announce.replica);
        if last.is_some_and(|(_, last)| sequence <= *last) {
            return false;
        }
        self.known.insert(sibling, (announce.replica, sequence));
        for endpoint in &announce.endpoints {
            if !self.by_endpoint.contains_key(endpoint) && self.by_endpoint.len() >= self.capacity {
                self.expire(now);
                if self.by_endpoint.len() >= self.capacity {
                    self.dropped += 1;
                    continue;
                }
            }
            self.by_endpoint.insert(*endpoint, (sibling, now + HELD));
        }
        true
    }

    /// The sibling that announced the endpoint last, unless that was too long ago.
    pub fn get(&self, endpoint: EndpointId, now: Instant) -> Option<SocketAddr> {
        self.by_endpoint.get(&endpoint).filter(|(_, expires)| now < *expires).map(|(sibling, _)| *sibling)
    }

    /// A sibling has died, restarted or left the configuration: what it had is unknown.
    pub fn forget(&mut self, sibling: SocketAddr) {
        self.known.remove(&sibling);
        self.by_endpoint.retain(|_, (holder, _)| *holder != sibling);
    }

    /// Call about once a second.
    pub fn expire(&mut self, now: Instant) {
        self.by_endpoint.retain(|_, (_, expires)| now < *expires);
    }

    /// Every endpoint that a sibling has announced lately, with that sibling.
    pub fn iter(&self, now: Instant) -> impl Iterator<Item = (EndpointId, SocketAddr)> {
        let live = self.by_endpoint.iter().filter(move |(_, (_, expires))| now < *expires);
        live.map(|(endpoint, (sibling, _))| (*endpoint, *sibling))
    }

    /// Announced endpoints that did not fit.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
    pub fn len(&self) -> usize {
        self.by_endpoint.len()
    }
    pub fn is_empty(&self) -> bool {
        self.by_endpoint.is_empty()
    }
}
