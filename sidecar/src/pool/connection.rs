//! One pooled connection and the leases of its streams.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tombolo_model::balance::PeakEwma;
use tombolo_model::resource::workload::DEFAULT_WEIGHT;
use tombolo_overlay::{PeerConnection, Stall};
use tombolo_runtime::clock;

use super::choice::View;
use crate::tables::Backend;
use crate::udp::demux::Demux;
use crate::udp::metrics::Drops;

#[derive(Debug)]
struct Timing {
    ewma: PeakEwma,
    last_stream_ended: Instant,
}

/// A live connection of a pool.
#[derive(Debug)]
pub struct Pooled {
    connection: PeerConnection,
    open: AtomicU32,
    bulk: Arc<AtomicU32>,
    saturated: AtomicBool,
    retired: AtomicBool,
    timing: Mutex<Timing>,
    demux: Demux,
}

impl Pooled {
    /// `drops`: of datagrams from the peer.
    pub fn new(connection: PeerConnection, drops: Drops) -> Self {
        let now = Instant::now();
        let mut ewma = PeakEwma::new(clock::since_unix_epoch());
        ewma.observe(connection.rtt(), clock::since_unix_epoch());
        Self {
            demux: Demux::new(connection.quic().clone(), drops),
            connection,
            open: AtomicU32::new(0),
            bulk: Arc::default(),
            saturated: AtomicBool::new(false),
            retired: AtomicBool::new(false),
            timing: Mutex::new(Timing { ewma, last_stream_ended: now }),
        }
    }

    pub fn connection(&self) -> &PeerConnection {
        &self.connection
    }
    /// Of UDP flows.
    pub fn demux(&self) -> &Demux {
        &self.demux
    }
    /// Distinguishes connections of this process.
    pub fn id(&self) -> usize {
        self.connection.quic().stable_id()
    }
    pub fn open_streams(&self) -> u32 {
        self.open.load(Relaxed)
    }
    pub fn bulk_streams(&self) -> &Arc<AtomicU32> {
        &self.bulk
    }
    pub fn set_saturated(&self, saturated: bool) {
        self.saturated.store(saturated, Relaxed);
    }
    /// Gets no more streams; closed when the last one ends.
    pub fn retire(&self) {
        self.retired.store(true, Relaxed);
    }
    /// Also where the peer's identity has ended.
    pub fn is_retired(&self) -> bool {
        self.retired.load(Relaxed) || self.connection.expired()
    }

    /// The time from opening a stream to its first answer.
    pub fn answered(&self, after: Duration) {
        self.lock().ewma.observe(after, clock::since_unix_epoch());
    }
    /// The endpoint refused a stream: counts as a slow answer, or failing fast would attract everything.
    pub fn refused(&self) {
        self.lock().ewma.fail(clock::since_unix_epoch());
    }

    /// For how long no stream has been open; `None` while one is.
    pub fn idle_since(&self, now: Instant) -> Option<Duration> {
        let last = self.lock().last_stream_ended;
        (self.open_streams() == 0).then(|| now.saturating_duration_since(last))
    }

    pub fn view(&self, avoid: &[usize], backend: &Backend) -> View {
        let peer = self.connection.identity().filter(|_| backend.is_weighted());
        // One that has not announced itself is an endpoint of its own: ids take 32 bits.
        let endpoint = self.connection.peer_endpoint().map(|(_, endpoint)| u64::from(endpoint.value()));
        let counts = !self.connection.is_closed() && !self.is_retired();
        let stall = self.connection.stall();
        View {
            endpoint: endpoint.unwrap_or(!(self.id() as u64)),
            weight: peer.map_or(DEFAULT_WEIGHT, |peer| backend.weight(&peer.spiffe_id)),
            usable: counts && !avoid.contains(&self.id()),
            counts,
            open_streams: self.open_streams(),
            bulk_streams: self.bulk.load(Relaxed),
            saturated: self.saturated.load(Relaxed),
            silent: stall != Stall::NONE,
            stalled: stall.unanswered_kicks() > 0,
            latency: self.lock().ewma.cost(clock::since_unix_epoch()),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Timing> {
        self.timing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Held for as long as a stream is open on a connection.
#[derive(Debug)]
pub struct StreamLease(Arc<Pooled>);

impl StreamLease {
    pub(super) fn new(pooled: Arc<Pooled>) -> Self {
        pooled.open.fetch_add(1, Relaxed);
        Self(pooled)
    }
    pub fn pooled(&self) -> &Arc<Pooled> {
        &self.0
    }
}

impl Drop for StreamLease {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
        self.0.set_saturated(false);
        self.0.lock().last_stream_ended = Instant::now();
    }
}
