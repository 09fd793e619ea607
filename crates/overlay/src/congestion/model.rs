//! How the window moves: a model of the path (bandwidth, minimum RTT) and a cycle that keeps it fresh.
//!
//! ```text
//!  Startup   x2 a round, until the bandwidth stops growing (3 rounds; 1 when the RTT grows with it)
//!  Drain     0.75 BDP until what Startup queued is gone
//!  Down      0.85 BDP until that is in flight, then a round: shows the RTT without our own queue
//!  Cruise    1.1 BDP, 5 rounds
//!  Up        1.25 BDP, 1 to 3 rounds, as long as no queue shows: finds bandwidth that came free
//!  ProbeRtt  0.5 BDP for a round, only when no RTT near the minimum was seen for 10 s
//! ```
//! - **Bandwidth** is the highest delivery rate of the last 10 rounds that had data to send; application-limited
//!   samples only raise it. **Minimum RTT** is the lowest of the last 10 s.
//! - **Loss** alone says little on a WAN: 1 % at random changes nothing, nor do one or two packets in a round. Over 2 % while the RTT grows, in two rounds running
//!   or around Up, over 12 % in one, or an ECN mark lower a cap on the window by 15 %; rounds without raise it again.
//! - **Crowded.** A loss-based flow fills the buffer and would starve one that keeps out of it. When Down still sees
//!   1.35 x the minimum RTT the queue is somebody else's, and Cruise holds as many BDP as that RTT is longer, up to 2.
//!   Flows of our own kind that find each other so come down together: each sees less than all hold.
//! - **LAN.** Below 2 ms the bandwidth is the CPU's: the product counts with at least 250 us, and the window has a
//!   floor of up to 4 ms, which losses lower to a quarter (a socket buffer overflows before any queue shows).
//!
//! All in bytes; time is passed in.

use std::time::{Duration, Instant};

use super::ModelConfig;
use super::delivery::{Delivery, Sample};

const BANDWIDTH_ROUNDS: usize = 10;
const MIN_RTT_WINDOW: Duration = Duration::from_secs(10);
const MIN_PACKETS: u64 = 4;
/// A little over 2, so that a noisy estimate does not slow doubling.
const STARTUP_GAIN: f64 = 2.3;
const GROWTH: f64 = 1.25;
const DRAIN_GAIN: f64 = 0.75;
const DOWN_GAIN: f64 = 0.85;
const CRUISE_GAIN: f64 = 1.1;
const UP_GAIN: f64 = 1.25;
const PROBE_RTT_GAIN: f64 = 0.5;
/// A buffer of one BDP is common: with 2 BDP we hold half of what is there.
const MOST_CROWDED: f64 = 2.0;
/// Up in a crowd: the same relation to Cruise as without one.
const CROWDED_UP: f64 = UP_GAIN / CRUISE_GAIN;
const CROWDED_RTT: f64 = 1.35;
const CRUISE_ROUNDS: u32 = 5;
const CROWDED_CRUISE_ROUNDS: u32 = 12;
/// A longer drain than this means that the queue is not ours.
const DRAIN_ROUNDS: u32 = 4;
/// So few lost in a round are chance: at 1 % at random, a round of 20 packets has three in one of 1000.
const FEW_LOST_PACKETS: u64 = 2;
const LOSSY: f64 = 0.02;
const VERY_LOSSY: f64 = 0.12;
const CAP_STEP: f64 = 0.85;
/// Per round without losses: a cap that was too low is gone within seconds, one that is right costs little loss.
const CAP_RISE: f64 = 1.01;
const CAP_RISE_UP: f64 = 1.04;
/// Rounds of a LAN are too short to forget an overflow in sixteen of them.
const CAP_RISE_EVERY: Duration = Duration::from_millis(20);
/// Below this minimum RTT a path is a LAN.
const LAN_RTT: Duration = Duration::from_millis(2);
/// The floor on a LAN makes no longer queue than this: at 100 Mbit/s, 512 KB would be 40 ms, and whoever comes to that path
/// later, and takes a part of the queue for its length, would starve beside it. Twice [`LAN_RTT`] is what a crowd is
/// answered up to.
const LAN_QUEUE: Duration = Duration::from_millis(4);
/// Queues shorter than this are not worth limiting: the scheduler's noise is as large. At 4 Gbit/s this is 125 KB, what a
/// default socket buffer holds.
const SHORTEST_RTT: Duration = Duration::from_micros(250);
/// Beyond a share of the BDP, clumped acknowledgements are a queue.
const AGGREGATION_SHARE: f64 = 0.25;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    Startup,
    Drain,
    Down,
    Cruise,
    Up,
    ProbeRtt,
}

/// Maximum over the last rounds that had a valid sample.
#[derive(Clone, Debug, Default)]
struct BandwidthFilter {
    rounds: [f64; BANDWIDTH_ROUNDS],
    at: usize,
    fresh: bool,
}

impl BandwidthFilter {
    fn max(&self) -> f64 {
        self.rounds.iter().copied().fold(0.0, f64::max)
    }
    fn note(&mut self, bandwidth: f64) {
        self.fresh = true;
        if let Some(slot) = self.rounds.get_mut(self.at) {
            *slot = slot.max(bandwidth);
        }
    }
    /// A round has ended; one without samples does not age the others.
    fn turn(&mut self) {
        if std::mem::take(&mut self.fresh) {
            self.at = (self.at + 1) % BANDWIDTH_ROUNDS;
            if let Some(slot) = self.rounds.get_mut(self.at) {
                *slot = 0.0;
            }
        }
    }
}

/// What happened since the round began.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    delivered_before: u64,
    lost: u64,
    marked: bool,
    min_rtt: Option<Duration>,
    max_in_flight: u64,
    app_limited: bool,
}

/// How much more was acknowledged than the bandwidth explains, since `since`.
#[derive(Clone, Copy, Debug)]
struct Aggregation {
    since: Instant,
    acked: u64,
    extra: [f64; 2],
    rounds: u32,
}

#[derive(Clone, Debug)]
pub(super) struct Model {
    config: ModelConfig,
    mtu: u64,
    window: u64,
    delivery: Delivery,
    bandwidth: BandwidthFilter,
    min_rtt: Option<Duration>,
    min_rtt_at: Instant,
    phase: Phase,
    /// Rounds that have ended in this phase.
    phase_rounds: u32,
    /// Down and ProbeRtt have reached their target: a full round is measured from here.
    settled: bool,
    phase_min_rtt: Option<Duration>,
    full_bandwidth: f64,
    full_rounds: u32,
    cap: Option<f64>,
    cap_moved: Instant,
    lossy_rounds: u32,
    /// How many BDP a crowd makes us hold; `None` without one.
    crowd: Option<f64>,
    crowded_before: bool,
    round: Round,
    aggregation: Aggregation,
    in_flight: u64,
}

impl Model {
    pub fn new(config: ModelConfig, now: Instant, mtu: u16) -> Self {
        let mtu = u64::from(mtu.max(1));
        let window = config.initial_packets.max(MIN_PACKETS) * mtu;
        Self {
            config,
            mtu,
            window,
            delivery: Delivery::new(now),
            bandwidth: BandwidthFilter::default(),
            min_rtt: None,
            min_rtt_at: now,
            phase: Phase::Startup,
            phase_rounds: 0,
            settled: false,
            phase_min_rtt: None,
            full_bandwidth: 0.0,
            full_rounds: 0,
            cap: None,
            cap_moved: now,
            lossy_rounds: 0,
            crowd: None,
            crowded_before: false,
            round: Round::default(),
            aggregation: Aggregation { since: now, acked: 0, extra: [0.0; 2], rounds: 0 },
            in_flight: 0,
        }
    }

    pub fn window(&self) -> u64 {
        self.window
    }
    pub fn initial_window(&self) -> u64 {
        self.config.initial_packets.max(MIN_PACKETS) * self.mtu
    }
    /// Bytes per second.
    pub fn bandwidth(&self) -> Option<f64> {
        let bandwidth = self.bandwidth.max();
        (bandwidth > 0.0).then_some(bandwidth)
    }
    #[cfg(test)]
    pub fn phase(&self) -> Phase {
        self.phase
    }
    #[cfg(test)]
    pub fn is_crowded(&self) -> bool {
        self.crowd.is_some()
    }

    pub fn on_sent(&mut self, now: Instant, in_flight_before: u64) {
        self.delivery.on_sent(now, in_flight_before);
    }

    pub fn on_ack(&mut self, sent: Instant, bytes: u64) {
        self.delivery.on_ack(sent, bytes);
    }

    pub fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool) {
        self.in_flight = in_flight;
        let Some(sample) = self.delivery.on_end_acks(now, in_flight, app_limited) else { return };
        self.note_rtt(now, &sample, in_flight);
        self.note_bandwidth(&sample);
        self.note_aggregation(now, &sample);
        self.round.max_in_flight = self.round.max_in_flight.max(in_flight + sample.acked);
        self.round.app_limited |= sample.app_limited;
        if sample.round_start {
            self.end_round(now);
        }
        self.check_target(now);
        self.set_window(sample.acked);
    }

    /// `bytes` is 0 for an ECN mark.
    pub fn on_loss(&mut self, now: Instant, persistent: bool, bytes: u64) {
        self.round.lost += bytes;
        self.round.marked |= bytes == 0;
        if persistent {
            // Nothing came through for three PTOs: what was known of the path is void, its length aside.
            self.bandwidth = BandwidthFilter::default();
            self.window = self.initial_window();
            self.cap = None;
            self.crowd = None;
            self.full_bandwidth = 0.0;
            self.full_rounds = 0;
            self.enter(Phase::Startup, now);
        }
    }

    pub fn on_mtu_update(&mut self, mtu: u16) {
        let in_startup_without_model = self.bandwidth.max() == 0.0;
        self.mtu = u64::from(mtu.max(1));
        let least = if in_startup_without_model { self.initial_window() } else { MIN_PACKETS * self.mtu };
        self.window = self.window.max(least);
    }

    fn note_rtt(&mut self, now: Instant, sample: &Sample, in_flight: u64) {
        let least = |known: Option<Duration>| Some(known.map_or(sample.rtt, |known| known.min(sample.rtt)));
        self.round.min_rtt = least(self.round.min_rtt);
        self.phase_min_rtt = least(self.phase_min_rtt);
        // 2 % and 50 us above count as seen again: timers are no finer.
        let near = self.min_rtt.is_none_or(|min| sample.rtt <= min + min / 50 + Duration::from_micros(50));
        self.min_rtt = least(self.min_rtt);
        if near {
            self.min_rtt_at = now;
            return;
        }
        if now.saturating_duration_since(self.min_rtt_at) < MIN_RTT_WINDOW {
            return;
        }
        let bdp = self.bdp();
        if self.is_lan() || (in_flight as f64) <= PROBE_RTT_GAIN * bdp {
            // Too little in flight to queue (or too near for it to matter): this is the path.
            self.min_rtt = self.round.min_rtt;
            self.min_rtt_at = now;
        } else if self.phase != Phase::ProbeRtt && self.phase != Phase::Startup {
            self.enter(Phase::ProbeRtt, now);
        }
    }

    fn note_bandwidth(&mut self, sample: &Sample) {
        let Some(bandwidth) = sample.bandwidth else { return };
        if !sample.app_limited || bandwidth > self.bandwidth.max() {
            self.bandwidth.note(bandwidth);
        }
    }

    fn note_aggregation(&mut self, now: Instant, sample: &Sample) {
        let expected =
            self.bandwidth.max() * now.saturating_duration_since(self.aggregation.since).as_secs_f64();
        if self.aggregation.acked as f64 <= expected {
            self.aggregation.since = now;
            self.aggregation.acked = 0;
        }
        self.aggregation.acked += sample.acked;
        let expected =
            self.bandwidth.max() * now.saturating_duration_since(self.aggregation.since).as_secs_f64();
        let extra = (self.aggregation.acked as f64 - expected).max(0.0);
        let [current, _] = &mut self.aggregation.extra;
        *current = current.max(extra);
    }

    fn end_round(&mut self, now: Instant) {
        let delivered = self.delivery.delivered() - self.round.delivered_before;
        // Fewer say nothing of a rate: of four packets a round one lost at random is 25 %.
        let lost = if self.round.lost > FEW_LOST_PACKETS * self.mtu { self.round.lost } else { 0 };
        let loss = lost as f64 / (lost + delivered).max(1) as f64;
        let stretch = self.stretch(self.round.min_rtt);
        self.phase_rounds = self.phase_rounds.saturating_add(1);
        self.react_to_loss(now, loss, stretch);
        match self.phase {
            Phase::Startup => self.check_full(now, loss, stretch),
            Phase::Drain if self.phase_rounds >= DRAIN_ROUNDS => self.enter(Phase::Cruise, now),
            Phase::Down if self.phase_rounds >= DRAIN_ROUNDS || (self.settled && self.phase_rounds >= 1) => {
                let stretch = self.stretch(self.phase_min_rtt);
                let more = self.phase_min_rtt.zip(self.min_rtt).map(|(seen, min)| seen.saturating_sub(min));
                let crowded =
                    !self.is_lan() && stretch > CROWDED_RTT && more.is_some_and(|more| more > LAN_RTT);
                // Twice running: two of our own kind may meet in one Down.
                self.crowd = (crowded && self.crowded_before).then_some(stretch.min(MOST_CROWDED));
                self.crowded_before = crowded;
                self.enter(Phase::Cruise, now);
            }
            Phase::Cruise => {
                let rounds = if self.crowd.is_some() { CROWDED_CRUISE_ROUNDS } else { CRUISE_ROUNDS };
                if self.phase_rounds >= rounds {
                    self.enter(Phase::Up, now);
                }
            }
            Phase::Up => {
                // The first round only sends more; what comes of it shows in the second.
                let queue = stretch > self.crowd.unwrap_or(UP_GAIN - 0.1);
                if self.phase_rounds >= 3 || (self.phase_rounds >= 2 && queue) || loss > LOSSY {
                    self.enter(Phase::Down, now);
                }
            }
            Phase::ProbeRtt
                if self.phase_rounds >= DRAIN_ROUNDS || (self.settled && self.phase_rounds >= 1) =>
            {
                self.min_rtt = self.phase_min_rtt.or(self.min_rtt);
                self.min_rtt_at = now;
                self.enter(Phase::Cruise, now);
            }
            Phase::Drain | Phase::Down | Phase::ProbeRtt => {}
        }
        self.bandwidth.turn();
        self.aggregation.rounds += 1;
        if self.aggregation.rounds >= BANDWIDTH_ROUNDS as u32 / 2 {
            self.aggregation.rounds = 0;
            let [current, _] = self.aggregation.extra;
            self.aggregation.extra = [0.0, current];
        }
        self.round = Round { delivered_before: self.delivery.delivered(), ..Round::default() };
    }

    fn check_full(&mut self, now: Instant, loss: f64, stretch: f64) {
        let bandwidth = self.bandwidth.max();
        if bandwidth >= self.full_bandwidth * GROWTH {
            self.full_bandwidth = bandwidth;
            self.full_rounds = 0;
            return;
        }
        if self.round.app_limited {
            return;
        }
        self.full_rounds += 1;
        let queue = !self.is_lan() && stretch > GROWTH;
        if self.full_rounds >= 3 || queue || loss > LOSSY {
            self.enter(Phase::Drain, now);
        }
    }

    fn react_to_loss(&mut self, now: Instant, loss: f64, stretch: f64) {
        if loss > LOSSY && stretch > 1.05 {
            self.lossy_rounds += 1;
        } else {
            self.lossy_rounds = 0;
        }
        // The losses of Up show while it lasts and in the round after it.
        let enough = if matches!(self.phase, Phase::Up | Phase::Down) { 1 } else { 2 };
        let overflow = self.is_lan() && loss > LOSSY;
        let congested = self.round.marked || overflow || loss > VERY_LOSSY || self.lossy_rounds >= enough;
        if congested && (self.phase != Phase::Startup || self.is_lan()) {
            let held = self.round.max_in_flight.min(self.window) as f64;
            // On a LAN clumped acknowledgements make the bandwidth look higher than it is.
            let model = if self.is_lan() { self.lan_floor() as f64 / 4.0 } else { DRAIN_GAIN * self.bdp() };
            let least = model.max((MIN_PACKETS * self.mtu) as f64);
            self.cap = Some((CAP_STEP * held).max(least).min(self.cap.unwrap_or(f64::MAX)));
            self.cap_moved = now;
            self.lossy_rounds = 0;
        } else if let Some(cap) = self.cap
            && loss <= LOSSY
            && !self.round.app_limited
            && now.saturating_duration_since(self.cap_moved) >= CAP_RISE_EVERY
        {
            self.cap_moved = now;
            let raised = cap * if self.phase == Phase::Up { CAP_RISE_UP } else { CAP_RISE };
            self.cap = (raised < CROWDED_UP * MOST_CROWDED * self.bdp().max(self.lan_floor() as f64))
                .then_some(raised);
        }
    }

    /// Ends Drain, and starts the measured round of Down and ProbeRtt, once the target is in flight.
    fn check_target(&mut self, now: Instant) {
        let bdp = self.bdp();
        let below = |gain: f64, model: &Self| (model.in_flight as f64) <= gain * bdp + (2 * model.mtu) as f64;
        match self.phase {
            Phase::Drain if below(1.0, self) => self.enter(Phase::Cruise, now),
            Phase::Down if !self.settled && below(DOWN_GAIN, self) => self.settle(),
            Phase::ProbeRtt if !self.settled && below(PROBE_RTT_GAIN, self) => self.settle(),
            _ => {}
        }
    }

    fn settle(&mut self) {
        self.settled = true;
        self.phase_rounds = 0;
    }

    fn enter(&mut self, phase: Phase, now: Instant) {
        self.phase = phase;
        self.phase_rounds = 0;
        self.settled = false;
        self.phase_min_rtt = None;
        if phase == Phase::ProbeRtt {
            self.min_rtt_at = now;
        }
    }

    fn set_window(&mut self, acked: u64) {
        let bdp = self.bdp();
        let [a, b] = self.aggregation.extra;
        let clumps = a.max(b).min(AGGREGATION_SHARE * bdp);
        let headroom = (2 * self.mtu) as f64;
        let target = match self.phase {
            Phase::Startup => STARTUP_GAIN * bdp + clumps,
            Phase::Drain => DRAIN_GAIN * bdp,
            Phase::Down => DOWN_GAIN * bdp,
            Phase::Cruise => self.crowd.unwrap_or(CRUISE_GAIN) * bdp + clumps,
            Phase::Up => self.crowd.map_or(UP_GAIN, |crowd| CROWDED_UP * crowd) * bdp + clumps,
            Phase::ProbeRtt => PROBE_RTT_GAIN * bdp,
        } + headroom;
        let grown = (self.window + acked) as f64;
        let window = match self.phase {
            Phase::Startup if bdp == 0.0 => grown,
            Phase::Startup => grown.min(target).max(self.window as f64),
            _ => grown.min(target),
        };
        let floored = window.max(self.lan_floor() as f64);
        let capped =
            if self.phase == Phase::Startup { floored } else { floored.min(self.cap.unwrap_or(f64::MAX)) };
        self.window = (capped as u64).max(MIN_PACKETS * self.mtu);
    }

    fn bdp(&self) -> f64 {
        let rtt = self.min_rtt.unwrap_or_default().max(SHORTEST_RTT);
        self.bandwidth.max() * rtt.as_secs_f64()
    }

    /// How many times the minimum an RTT is.
    fn stretch(&self, rtt: Option<Duration>) -> f64 {
        rtt.zip(self.min_rtt).map_or(1.0, |(rtt, min)| rtt.as_secs_f64() / min.as_secs_f64().max(1e-6))
    }

    fn is_lan(&self) -> bool {
        self.min_rtt.is_some_and(|min| min < LAN_RTT)
    }

    fn lan_floor(&self) -> u64 {
        if !self.is_lan() {
            return 0;
        }
        let short = (self.bandwidth.max() * LAN_QUEUE.as_secs_f64()) as u64;
        self.config.lan_floor_bytes.min(short).max(16 * self.mtu)
    }
}
