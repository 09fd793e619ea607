//! What one stream has moved: read by idle limits, the access log and the pool's bulk separation.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;

/// A stream that has moved more than this is bulk: requests should not wait behind it. A usual web page or query result
/// is below; at 1 Gbit/s it is 2 ms of the link.
pub const BULK_BYTES: u64 = 256 * 1024;

/// Counts of one stream. Dropped with it, which takes it off its connection's bulk count.
#[derive(Debug, Default)]
pub struct Meter {
    sent: AtomicU64,
    received: AtomicU64,
    answered: OnceLock<Instant>,
    bulk: AtomicBool,
    bulk_streams: Option<Arc<AtomicU32>>,
    sent_total: Counter,
    received_total: Counter,
}

impl Meter {
    /// `sent_total` and `received_total` are the process's metrics; `bulk_streams` counts the bulk streams of a
    /// connection.
    pub fn new(sent_total: Counter, received_total: Counter, bulk_streams: Option<Arc<AtomicU32>>) -> Self {
        let mut meter = Self::default();
        meter.sent_total = sent_total;
        meter.received_total = received_total;
        meter.bulk_streams = bulk_streams;
        meter
    }

    /// Application to peer.
    pub fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Relaxed);
        self.sent_total.inc_by(bytes as u64);
        self.moved();
    }
    /// Peer to application.
    pub fn received(&self, bytes: usize) {
        if self.received.load(Relaxed) == 0 {
            let _ = self.answered.set(Instant::now());
        }
        self.received.fetch_add(bytes as u64, Relaxed);
        self.received_total.inc_by(bytes as u64);
        self.moved();
    }
    pub fn bytes_sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }
    pub fn bytes_received(&self) -> u64 {
        self.received.load(Relaxed)
    }
    pub fn total(&self) -> u64 {
        self.bytes_sent() + self.bytes_received()
    }
    /// From `opened` to the peer's first byte.
    pub fn first_answer(&self, opened: Instant) -> Option<Duration> {
        self.answered.get().map(|at| at.saturating_duration_since(opened))
    }

    fn moved(&self) {
        if self.total() > BULK_BYTES
            && !self.bulk.load(Relaxed)
            && let Some(streams) = &self.bulk_streams
        {
            self.bulk.store(true, Relaxed);
            streams.fetch_add(1, Relaxed);
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let (true, Some(streams)) = (self.bulk.load(Relaxed), &self.bulk_streams) {
            streams.fetch_sub(1, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_bulk_once_it_has_moved_enough_and_stops_counting_when_it_ends() {
        let bulk = Arc::new(AtomicU32::new(0));
        let meter = Meter::new(Counter::default(), Counter::default(), Some(Arc::clone(&bulk)));
        meter.sent(BULK_BYTES as usize);
        assert_eq!(bulk.load(Relaxed), 0);
        meter.received(1);
        meter.received(1);
        assert_eq!(bulk.load(Relaxed), 1);
        drop(meter);
        assert_eq!(bulk.load(Relaxed), 0);
    }
}
