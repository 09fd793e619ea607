//! Source addresses of joiners and of the own cluster's members that dialled this socket directly.
//!
//! Pods dial their federator with a join-kind source ID before they have a lease, and a restarted member's address is
//! unknown until its hello has arrived: for 30 s after a long-header packet, its connection ID is answered to where
//! the packet came from. Bounded: a flood evicts the oldest entries and costs no more memory.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// A handshake ends within a few seconds; afterwards the member is known by its lease.
const LIFE: Duration = Duration::from_secs(30);
/// 64 bytes each; more joiners than this in 30 s are turned away by the token rate limit anyway.
const CAPACITY: usize = 4096;

/// Target of a join- or endpoint-kind ID of the own cluster, to its last source address.
#[derive(Debug, Default)]
pub(crate) struct Learned {
    entries: HashMap<u32, (SocketAddr, Instant)>,
    order: VecDeque<(u32, Instant)>,
}

impl Learned {
    pub fn learn(&mut self, target: u32, source: SocketAddr, now: Instant) {
        while let Some((oldest, at)) = self.order.front().copied() {
            let expired = now.duration_since(at) > LIFE;
            if !expired && self.order.len() < CAPACITY {
                break;
            }
            self.order.pop_front();
            if self.entries.get(&oldest).is_some_and(|(_, learned)| *learned == at) {
                self.entries.remove(&oldest);
            }
        }
        match self.entries.get_mut(&target) {
            // A packet a millisecond need not grow the order queue: refresh once a second.
            Some((address, at)) if *address == source && now.duration_since(*at) < Duration::from_secs(1) => {
            }
            _ => {
                self.entries.insert(target, (source, now));
                self.order.push_back((target, now));
            }
        }
    }

    pub fn address(&self, target: u32, now: Instant) -> Option<SocketAddr> {
        self.entries
            .get(&target)
            .filter(|(_, at)| now.duration_since(*at) <= LIFE)
            .map(|(address, _)| *address)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.entries.len().max(self.order.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], n))
    }

    #[test]
    fn the_last_source_answers_for_thirty_seconds() {
        let mut learned = Learned::default();
        let start = Instant::now();
        learned.learn(7, address(1), start);
        learned.learn(7, address(2), start + Duration::from_secs(5));
        assert_eq!(learned.address(7, start + Duration::from_secs(34)), Some(address(2)));
        assert_eq!(learned.address(7, start + Duration::from_secs(36)), None);
    }

    #[test]
    fn a_flood_does_not_grow_the_table() {
        let mut learned = Learned::default();
        let start = Instant::now();
        (0..100_000).for_each(|n| learned.learn(n, address(1), start));
        assert!(learned.len() <= CAPACITY);
        assert_eq!(learned.address(99_999, start), Some(address(1)));
    }
}
