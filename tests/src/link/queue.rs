//! Packets under way in one direction, ordered by arrival time and bounded in bytes, and what became of the others.

use std::cmp::{Ordering as Order, Reverse};
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Bytes under way per direction. 300 Mbit/s for 25 ms + 50 ms are 2.8 MB; this carries 5 Gbit/s for 100 ms.
const IN_FLIGHT_LIMIT_BYTES: usize = 64 << 20;

/// Buffers kept for reuse; above that they go back to the allocator.
const SPARE_BUFFERS: usize = 4096;

/// What happened to packets of one direction since the link started. Written by the forwarding thread only.
#[derive(Debug, Default)]
pub struct Counters {
    pub(super) delivered: AtomicU64,
    pub(super) delivered_bytes: AtomicU64,
    pub(super) lost: AtomicU64,
    pub(super) too_big: AtomicU64,
    pub(super) queue_full: AtomicU64,
    pub(super) black_holed: AtomicU64,
    pub(super) reordered: AtomicU64,
    pub(super) refused_by_kernel: AtomicU64,
}

/// [`Counters`] at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CountersSnapshot {
    pub delivered: u64,
    pub delivered_bytes: u64,
    /// By random loss.
    pub lost: u64,
    pub too_big: u64,
    /// By the drop-tail buffer.
    pub queue_full: u64,
    pub black_holed: u64,
    /// Held back so that others overtook; also counted as delivered.
    pub reordered: u64,
    /// The receiving device was down or out of memory: a harness fault if it is not 0.
    pub refused_by_kernel: u64,
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> CountersSnapshot {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CountersSnapshot {
            delivered: read(&self.delivered),
            delivered_bytes: read(&self.delivered_bytes),
            lost: read(&self.lost),
            too_big: read(&self.too_big),
            queue_full: read(&self.queue_full),
            black_holed: read(&self.black_holed),
            reordered: read(&self.reordered),
            refused_by_kernel: read(&self.refused_by_kernel),
        }
    }
}

/// Packets under way, earliest first; equal times keep the order of arrival.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    heap: BinaryHeap<Reverse<Packet>>,
    bytes: usize,
    sequence: u64,
    spare: Vec<Vec<u8>>,
}

impl InFlight {
    /// `false` when the packet does not fit into the limit.
    pub(super) fn push(&mut self, at: Instant, data: &[u8]) -> bool {
        if self.bytes + data.len() > IN_FLIGHT_LIMIT_BYTES {
            return false;
        }
        let mut buffer = self.spare.pop().unwrap_or_else(|| Vec::with_capacity(2048));
        buffer.clear();
        buffer.extend_from_slice(data);
        self.bytes += data.len();
        self.sequence += 1;
        self.heap.push(Reverse(Packet { at, sequence: self.sequence, data: buffer }));
        true
    }

    pub(super) fn next_due(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse(packet)| packet.at)
    }

    pub(super) fn pop_due(&mut self, now: Instant) -> Option<Vec<u8>> {
        if self.next_due()? > now {
            return None;
        }
        let Reverse(packet) = self.heap.pop()?;
        self.bytes -= packet.data.len();
        Some(packet.data)
    }

    pub(super) fn recycle(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < SPARE_BUFFERS {
            self.spare.push(buffer);
        }
    }
}

#[derive(Debug)]
struct Packet {
    at: Instant,
    sequence: u64,
    data: Vec<u8>,
}

impl Packet {
    fn key(&self) -> (Instant, u64) {
        (self.at, self.sequence)
    }
}

impl PartialEq for Packet {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Packet {}

impl PartialOrd for Packet {
    fn partial_cmp(&self, other: &Self) -> Option<Order> {
        Some(self.cmp(other))
    }
}

impl Ord for Packet {
    fn cmp(&self, other: &Self) -> Order {
        self.key().cmp(&other.key())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn packets_leave_by_time_then_by_arrival_and_never_early() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut queue = InFlight::default();
        for (millis, byte) in [(5, 1), (3, 2), (5, 3), (9, 4)] {
            assert!(queue.push(at(millis), &[byte]));
        }
        assert_eq!(queue.pop_due(at(2)), None);
        let left: Vec<u8> = std::iter::from_fn(|| queue.pop_due(at(5))).flatten().collect();
        assert_eq!(left, [2, 1, 3]);
        assert_eq!(queue.next_due(), Some(at(9)));
    }

    #[test]
    fn bytes_under_way_are_bounded_and_freed_when_delivered() {
        let now = Instant::now();
        let mut queue = InFlight::default();
        let packet = vec![0; 1 << 16];
        let fitting =
            std::iter::repeat_with(|| queue.push(now, &packet)).take(2000).filter(|fits| *fits).count();
        assert_eq!(fitting, IN_FLIGHT_LIMIT_BYTES / packet.len());
        assert!(queue.pop_due(now).is_some());
        assert!(queue.push(now, &packet));
    }
}
