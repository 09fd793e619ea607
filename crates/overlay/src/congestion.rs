//! Congestion control for lossy WANs and short LAN queues: our own model-based controller for quinn.
//!
//! Loss-based control collapses at 1 % random loss (docs: a 300 Mbit/s path gives 5), quinn's own BBR floods (half of
//! its datagrams lost to its own queue). This one estimates the bottleneck's bandwidth and the path's minimum RTT and
//! keeps about their product in flight. quinn paces at 1.25 x window / srtt, so the window is the only control:
//! [`model`] says how it moves.
//!
//! Owners: quinn owns one [`ModelController`] per connection; [`ControllerState`] is shared with the overlay's
//! liveness task, which reads when the last acknowledgement came and lifts the window for a kick (protocol.md section
//! 3). Clones (quinn clones for `congestion_state()`) share that state but not the model.

mod delivery;
mod model;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory, ControllerMetrics};

use model::Model;

/// What differs between deployments.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// Window at the start, in packets: RFC 9002 recommends 10, large deployments use 32; each hop here is paced.
    pub initial_packets: u64,
    /// Not less than this while the minimum RTT is below 2 ms and nothing is lost: there the bandwidth is the CPU's,
    /// acknowledgements come in clumps, and what is in flight is what each hop can take in one go. 512 KB is 1 ms at
    /// 4 Gbit/s. Losses lower the floor to a quarter, which fits the default UDP socket buffer of 208 KB (it counts
    /// overhead too). Also at least 16 packets (jumbo frames).
    pub lan_floor_bytes: u64,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self { initial_packets: 20, lan_floor_bytes: 512 * 1024 }
    }
}

/// Builds a [`ModelController`] per connection.
#[derive(Clone, Debug, Default)]
pub struct ModelControllerFactory {
    config: ModelConfig,
}

impl ModelControllerFactory {
    pub fn new(config: ModelConfig) -> Self {
        Self { config }
    }
}

impl ControllerFactory for ModelControllerFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(ModelController::new(self.config.clone(), now, current_mtu))
    }
}

/// What the overlay may know and do beside quinn; lock-free.
#[derive(Debug)]
pub struct ControllerState {
    origin: Instant,
    /// Nanoseconds since `origin`, plus 1; 0 for never.
    last_ack: AtomicU64,
    last_send: AtomicU64,
    /// When something was sent while nothing was in flight.
    busy_since: AtomicU64,
    in_flight: AtomicU64,
    mtu: AtomicU16,
    lifted: AtomicBool,
    /// quinn asks for the window only before it sends what demands an acknowledgement: tells data from pure ACKs.
    asked: AtomicBool,
    window: AtomicU64,
    lost_bytes: AtomicU64,
}

impl ControllerState {
    fn new(origin: Instant, mtu: u16) -> Self {
        Self {
            origin,
            last_ack: AtomicU64::new(0),
            last_send: AtomicU64::new(0),
            busy_since: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            mtu: AtomicU16::new(mtu),
            lifted: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            window: AtomicU64::new(0),
            lost_bytes: AtomicU64::new(0),
        }
    }

    /// When the peer last acknowledged something new.
    pub fn last_ack(&self) -> Option<Instant> {
        self.instant(&self.last_ack)
    }
    /// When something that demands an acknowledgement was last sent.
    pub fn last_send(&self) -> Option<Instant> {
        self.instant(&self.last_send)
    }
    /// How long something has been in flight without any acknowledgement; zero while nothing is.
    pub fn silence(&self, now: Instant) -> Duration {
        if self.bytes_in_flight() == 0 {
            return Duration::ZERO;
        }
        let since = self.last_ack().max(self.instant(&self.busy_since));
        since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
    /// Unacknowledged bytes: exact after each acknowledgement, plus what was sent and minus what was lost since.
    pub fn bytes_in_flight(&self) -> u64 {
        self.in_flight.load(Relaxed)
    }
    /// The window without a lift.
    pub fn window(&self) -> u64 {
        self.window.load(Relaxed)
    }
    /// Bytes declared lost since the connection began.
    pub fn lost_bytes(&self) -> u64 {
        self.lost_bytes.load(Relaxed)
    }
    /// Makes room for one packet beyond the window, for the next transmission only: a kick must not wait for a window
    /// that is full of packets which died with a gateway.
    pub fn lift_for_one_packet(&self) {
        self.lifted.store(true, Relaxed);
    }

    fn instant(&self, cell: &AtomicU64) -> Option<Instant> {
        let nanos = cell.load(Relaxed).checked_sub(1)?;
        self.origin.checked_add(Duration::from_nanos(nanos))
    }
    fn stamp(&self, cell: &AtomicU64, now: Instant) {
        let nanos =
            u64::try_from(now.saturating_duration_since(self.origin).as_nanos()).unwrap_or(u64::MAX - 1);
        cell.store(nanos.saturating_add(1), Relaxed);
    }
    /// quinn's question, answered with room for one packet while lifted. quinn counts a started packet as a
    /// full one beside the one to send, hence two.
    fn answer(&self, window: u64) -> u64 {
        self.asked.store(true, Relaxed);
        if self.lifted.load(Relaxed) {
            return window.max(self.bytes_in_flight() + 2 * u64::from(self.mtu.load(Relaxed)) + 1);
        }
        window
    }
}

/// quinn's view of the model. `into_any().downcast::<ModelController>()` gives the overlay its [`ControllerState`].
#[derive(Clone, Debug)]
pub struct ModelController {
    model: Model,
    state: Arc<ControllerState>,
}

impl ModelController {
    fn new(config: ModelConfig, now: Instant, mtu: u16) -> Self {
        let model = Model::new(config, now, mtu);
        let state = ControllerState::new(now, mtu);
        state.window.store(model.window(), Relaxed);
        Self { model, state: Arc::new(state) }
    }

    pub fn state(&self) -> Arc<ControllerState> {
        self.state.clone()
    }

    fn sent(&mut self, now: Instant, bytes: u64) {
        // Pure ACKs are never acknowledged by themselves: they are not in flight.
        if self.state.asked.swap(false, Relaxed) {
            self.state.lifted.store(false, Relaxed);
            self.state.stamp(&self.state.last_send, now);
            let before = self.state.in_flight.fetch_add(bytes, Relaxed);
            if before == 0 {
                self.state.stamp(&self.state.busy_since, now);
            }
            self.model.on_sent(now, before);
        }
    }

    fn acked(&mut self, sent: Instant, bytes: u64) {
        self.model.on_ack(sent, bytes);
    }

    fn acks_end(&mut self, now: Instant, in_flight: u64, app_limited: bool) {
        self.state.stamp(&self.state.last_ack, now);
        self.state.in_flight.store(in_flight, Relaxed);
        self.model.on_end_acks(now, in_flight, app_limited);
        self.state.window.store(self.model.window(), Relaxed);
    }

    fn lost(&mut self, now: Instant, persistent: bool, bytes: u64) {
        self.state.lost_bytes.fetch_add(bytes, Relaxed);
        let left = self.state.bytes_in_flight().saturating_sub(bytes);
        self.state.in_flight.store(left, Relaxed);
        self.model.on_loss(now, persistent, bytes);
        self.state.window.store(self.model.window(), Relaxed);
    }
}

impl Controller for ModelController {
    fn on_sent(&mut self, now: Instant, bytes: u64, _last_packet_number: u64) {
        self.sent(now, bytes);
    }
    fn on_ack(&mut self, _now: Instant, sent: Instant, bytes: u64, _app_limited: bool, _rtt: &RttEstimator) {
        self.acked(sent, bytes);
    }
    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, _largest: Option<u64>) {
        self.acks_end(now, in_flight, app_limited);
    }
    fn on_congestion_event(
        &mut self,
        now: Instant,
        _sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.lost(now, is_persistent_congestion, lost_bytes);
    }
    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.state.mtu.store(new_mtu, Relaxed);
        self.model.on_mtu_update(new_mtu);
        self.state.window.store(self.model.window(), Relaxed);
    }
    fn window(&self) -> u64 {
        self.state.answer(self.model.window())
    }
    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.model.window();
        metrics.pacing_rate = self.model.bandwidth().map(|bytes_per_second| (bytes_per_second * 8.0) as u64);
        metrics
    }
    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }
    fn initial_window(&self) -> u64 {
        self.model.initial_window()
    }
    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
