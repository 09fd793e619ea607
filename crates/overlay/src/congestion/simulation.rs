//! A deterministic bottleneck in virtual time: rate, round trip, drop-tail buffer, random loss; senders that behave as
//! quinn does (window check, its pacer, packet and time threshold loss detection) around our model or a plain cubic.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::model::Model;
use super::{ModelConfig, ModelController};

pub(super) const MTU: u64 = 1452;

/// What steers a simulated sender.
pub(super) enum Control {
    Ours(Box<ModelController>),
    Cubic(Cubic),
}

/// RFC 9438 in packets, with slow start; the competitor whom our model must neither starve nor obey.
pub(super) struct Cubic {
    window: f64,
    threshold: f64,
    w_max: f64,
    epoch: Option<Instant>,
    recovery: Option<Instant>,
}

impl Cubic {
    fn on_ack(&mut self, now: Instant, sent: Instant) {
        if self.recovery.is_some_and(|recovery| sent <= recovery) {
            return;
        }
        if self.window < self.threshold {
            self.window += 1.0;
            return;
        }
        let epoch = *self.epoch.get_or_insert(now);
        let k = (self.w_max * 0.3 / 0.4).cbrt();
        let t = (now - epoch).as_secs_f64() - k;
        let target = (0.4 * t.powi(3) + self.w_max).clamp(self.window, 1.5 * self.window);
        self.window += ((target - self.window) / self.window).max(0.01 / self.window);
    }
    fn on_loss(&mut self, now: Instant, sent: Instant) {
        if self.recovery.is_some_and(|recovery| sent <= recovery) {
            return;
        }
        self.recovery = Some(now);
        self.epoch = None;
        self.w_max = self.window;
        self.window = (self.window * 0.7).max(2.0);
        self.threshold = self.window;
    }
}

struct Packet {
    number: u64,
    sent: Instant,
}

struct Flow {
    control: Control,
    begins: Instant,
    /// Bytes per second that the application offers; `None` for as much as goes.
    offered: Option<f64>,
    offered_from: Instant,
    submitted: u64,
    unacked: VecDeque<Packet>,
    next_number: u64,
    largest_acked: u64,
    srtt: Option<Duration>,
    tokens: f64,
    tokens_at: Instant,
    app_limited: bool,
    /// Acknowledgements on their way back, in order: arrival and packet number.
    acks: VecDeque<(Instant, u64)>,
    last_progress: Instant,
    delivered: u64,
    lost: u64,
    sent: u64,
}

impl Flow {
    fn window(&self) -> u64 {
        match &self.control {
            Control::Ours(ours) => ours.model.window(),
            Control::Cubic(cubic) => (cubic.window * MTU as f64) as u64,
        }
    }
    fn in_flight(&self) -> u64 {
        self.unacked.len() as u64 * MTU
    }
    fn has_data(&self, now: Instant) -> bool {
        let Some(offered) = self.offered else { return true };
        let available = offered * now.saturating_duration_since(self.offered_from).as_secs_f64();
        self.submitted as f64 + MTU as f64 <= available
    }
}

/// What a flow got between two looks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    pub megabits: f64,
    pub loss: f64,
}

pub(super) struct Link {
    pub now: Instant,
    start: Instant,
    bytes_per_second: f64,
    round_trip: Duration,
    buffer: u64,
    loss: f64,
    seed: u64,
    /// When the bottleneck has sent what is queued.
    free_at: Instant,
    flows: Vec<Flow>,
    /// Per packet that got in: how long it queued.
    queued: Vec<Duration>,
    up: bool,
}

impl Link {
    /// `buffer` in bandwidth-delay products.
    pub fn new(megabits: f64, round_trip: Duration, buffer: f64, loss: f64) -> Self {
        let now = Instant::now();
        let bytes_per_second = megabits * 1e6 / 8.0;
        Self {
            now,
            start: now,
            bytes_per_second,
            round_trip,
            buffer: (bytes_per_second * round_trip.as_secs_f64() * buffer) as u64,
            loss,
            seed: 0x9e37_79b9_7f4a_7c15,
            free_at: now,
            flows: Vec::new(),
            queued: Vec::new(),
            up: true,
        }
    }

    /// Another course of losses.
    pub fn seed(&mut self, seed: u64) {
        self.seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    }
    pub fn ours(&mut self) -> usize {
        let controller = ModelController::new(ModelConfig::default(), self.now, MTU as u16);
        self.add(Control::Ours(Box::new(controller)))
    }
    pub fn cubic(&mut self) -> usize {
        let cubic = Cubic { window: 10.0, threshold: f64::MAX, w_max: 0.0, epoch: None, recovery: None };
        self.add(Control::Cubic(cubic))
    }
    pub fn offer(&mut self, flow: usize, megabits: Option<f64>) {
        self.flows[flow].offered = megabits.map(|m| m * 1e6 / 8.0);
        self.flows[flow].offered_from = self.now;
        self.flows[flow].submitted = 0;
    }
    pub fn set_rate(&mut self, megabits: f64) {
        self.bytes_per_second = megabits * 1e6 / 8.0;
    }
    pub fn set_up(&mut self, up: bool) {
        self.up = up;
    }
    pub fn model(&self, flow: usize) -> &Model {
        match &self.flows[flow].control {
            Control::Ours(ours) => &ours.model,
            Control::Cubic(_) => panic!("flow {flow} is cubic"),
        }
    }
    /// The queueing delay that this share of the packets since the last `run` did not exceed.
    pub fn queue_at(&mut self, quantile: f64) -> Duration {
        self.queued.sort_unstable();
        let at = ((self.queued.len() as f64 * quantile) as usize).min(self.queued.len().saturating_sub(1));
        self.queued.get(at).copied().unwrap_or_default()
    }

    fn add(&mut self, control: Control) -> usize {
        let now = self.now;
        self.flows.push(Flow {
            control,
            begins: now,
            offered: None,
            offered_from: now,
            submitted: 0,
            unacked: VecDeque::new(),
            next_number: 1,
            largest_acked: 0,
            srtt: None,
            tokens: 10.0 * MTU as f64,
            tokens_at: now,
            app_limited: false,
            acks: VecDeque::new(),
            last_progress: now,
            delivered: 0,
            lost: 0,
            sent: 0,
        });
        self.flows.len() - 1
    }

    /// Runs for `time`; what each flow got in it.
    pub fn run(&mut self, time: Duration) -> Vec<Share> {
        let end = self.now + time;
        let before: Vec<(u64, u64, u64)> = self.flows.iter().map(|f| (f.delivered, f.lost, f.sent)).collect();
        self.queued.clear();
        // Fine enough for 50 ms paths, and for LANs of a few hundred microseconds.
        let step = Duration::from_micros(200).min(self.round_trip / 8);
        while self.now < end {
            self.now += step;
            for flow in 0..self.flows.len() {
                self.receive(flow);
                self.send(flow);
            }
        }
        let seconds = time.as_secs_f64();
        self.flows
            .iter()
            .zip(before)
            .map(|(f, (delivered, lost, sent))| Share {
                megabits: (f.delivered - delivered) as f64 * 8.0 / 1e6 / seconds,
                loss: (f.lost - lost) as f64 / (f.sent - sent).max(1) as f64,
            })
            .collect()
    }

    pub fn elapsed(&self) -> Duration {
        self.now - self.start
    }

    fn random(&mut self) -> f64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        (self.seed >> 11) as f64 / (1u64 << 53) as f64
    }

    fn receive(&mut self, at: usize) {
        let now = self.now;
        let flow = &mut self.flows[at];
        let mut newest = None;
        // One datagram of the peer acknowledges what came in one step.
        while let Some((_, number)) = flow.acks.front().copied().filter(|(arrives, _)| *arrives <= now) {
            flow.acks.pop_front();
            let Ok(index) = flow.unacked.binary_search_by_key(&number, |p| p.number) else { continue };
            let Some(packet) = flow.unacked.remove(index) else { continue };
            flow.delivered += MTU;
            flow.largest_acked = flow.largest_acked.max(number);
            newest = Some(packet.sent);
            match &mut flow.control {
                Control::Ours(ours) => ours.acked(packet.sent, MTU),
                Control::Cubic(cubic) => cubic.on_ack(now, packet.sent),
            }
        }
        if let Some(sent) = newest {
            let rtt = now - sent;
            flow.srtt = Some(flow.srtt.map_or(rtt, |srtt| (7 * srtt + rtt) / 8));
            flow.last_progress = now;
            let (in_flight, limited) = (flow.in_flight(), flow.app_limited);
            if let Control::Ours(ours) = &mut flow.control {
                ours.acks_end(now, in_flight, limited);
            }
        }
        // RFC 9002 section 6.1: packet threshold 3, time threshold 9/8 RTT.
        let late = flow.srtt.unwrap_or(Duration::from_millis(333)) * 9 / 8;
        let (mut lost, mut last_sent) = (0, now);
        while let Some(packet) = flow.unacked.front() {
            let passed = packet.number + 3 <= flow.largest_acked;
            let old = packet.number < flow.largest_acked && now - packet.sent > late;
            if !(passed || old) {
                break;
            }
            lost += MTU;
            last_sent = packet.sent;
            flow.unacked.pop_front();
        }
        // The probe timeout, simplified: after 3 round trips of silence everything in flight is given up.
        let mut persistent = false;
        if !flow.unacked.is_empty() && now - flow.last_progress > late * 3 {
            lost += flow.in_flight();
            flow.unacked.clear();
            flow.last_progress = now;
            persistent = true;
        }
        if lost > 0 {
            flow.lost += lost / MTU;
            match &mut flow.control {
                Control::Ours(ours) => ours.lost(now, persistent, lost),
                Control::Cubic(cubic) => cubic.on_loss(now, last_sent),
            }
        }
    }

    fn send(&mut self, at: usize) {
        let now = self.now;
        if now < self.flows[at].begins {
            return;
        }
        let flow = &mut self.flows[at];
        let window = flow.window();
        if let Some(srtt) = flow.srtt {
            // quinn's pacer: 1.25 windows per srtt, bursts of 2 ms within 10 to 256 packets.
            let per_second = 1.25 * window as f64 / srtt.as_secs_f64();
            let capacity =
                (window as f64 * 0.002 / srtt.as_secs_f64()).clamp(10.0 * MTU as f64, 256.0 * MTU as f64);
            let refill = per_second * (now - flow.tokens_at).as_secs_f64();
            flow.tokens = (flow.tokens + refill).min(capacity);
        }
        flow.tokens_at = now;
        let mut sent = 0;
        loop {
            let flow = &mut self.flows[at];
            flow.app_limited = false;
            if flow.in_flight() + MTU >= window || flow.tokens < MTU as f64 {
                break;
            }
            if !flow.has_data(now) {
                flow.app_limited = true;
                break;
            }
            if flow.unacked.is_empty() {
                flow.last_progress = now;
            }
            flow.tokens -= MTU as f64;
            flow.submitted += MTU;
            flow.sent += 1;
            let number = flow.next_number;
            flow.next_number += 1;
            flow.unacked.push_back(Packet { number, sent: now });
            sent += MTU;
            self.transmit(at, number);
        }
        if sent > 0
            && let Control::Ours(ours) = &mut self.flows[at].control
        {
            use quinn_proto::congestion::Controller;
            let _ = ours.window(); // quinn asks before it sends
            ours.sent(now, sent);
        }
    }

    fn transmit(&mut self, at: usize, number: u64) {
        let lost = self.random() < self.loss;
        let wait = self.free_at.saturating_duration_since(self.now);
        let queued = wait.as_secs_f64() * self.bytes_per_second;
        if !self.up || lost || queued + MTU as f64 > (self.buffer.max(4 * MTU)) as f64 {
            return;
        }
        self.queued.push(wait);
        let service = Duration::from_secs_f64(MTU as f64 / self.bytes_per_second);
        self.free_at = self.free_at.max(self.now) + service;
        let arrives = self.free_at + self.round_trip;
        self.flows[at].acks.push_back((arrives, number));
    }
}
