//! Delivery-rate samples (draft-cheng-iccrg-delivery-rate-estimation), from what quinn tells a controller: send times,
//! but no packet numbers.
//!
//! Between two batches of acknowledgements the delivery state does not change, so all packets sent between them share
//! one [`Segment`], found again by send time. Memory: one segment per batch of acknowledgements in flight, capped.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// 40 bytes each; beyond it the oldest go, and their packets give no sample.
const MAX_SEGMENTS: usize = 4096;

/// The delivery state in which packets from `since` on were sent.
#[derive(Clone, Copy, Debug)]
struct Segment {
    since: Instant,
    delivered: u64,
    delivered_at: Instant,
    first_sent: Instant,
    app_limited: bool,
}

/// One batch of acknowledgements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    /// Bytes per second; `None` when the batch says nothing about it.
    pub bandwidth: Option<f64>,
    /// Round trip of the packet sent last of those acknowledged, the peer's ACK delay included.
    pub rtt: Duration,
    /// The application had nothing to send when these packets left: the path may carry more.
    pub app_limited: bool,
    /// A packet sent after the last round began was acknowledged: a new round begins.
    pub round_start: bool,
    pub acked: u64,
}

#[derive(Clone, Debug)]
pub(super) struct Delivery {
    delivered: u64,
    delivered_at: Instant,
    first_sent: Instant,
    app_limited_until: u64,
    next_round: u64,
    segments: VecDeque<Segment>,
    newest_sent: Option<Instant>,
    acked: u64,
}

impl Delivery {
    pub fn new(now: Instant) -> Self {
        Self {
            delivered: 0,
            delivered_at: now,
            first_sent: now,
            app_limited_until: 0,
            next_round: 0,
            segments: VecDeque::new(),
            newest_sent: None,
            acked: 0,
        }
    }

    pub fn delivered(&self) -> u64 {
        self.delivered
    }

    pub fn on_sent(&mut self, now: Instant, in_flight_before: u64) {
        if in_flight_before == 0 {
            // After a pause the clock of the rate starts anew.
            self.first_sent = now;
            self.delivered_at = now;
        }
        let app_limited = self.delivered < self.app_limited_until;
        let same = |last: &Segment| {
            last.delivered == self.delivered && last.app_limited == app_limited && in_flight_before != 0
        };
        if self.segments.back().is_some_and(same) {
            return;
        }
        if self.segments.len() >= MAX_SEGMENTS {
            self.segments.pop_front();
        }
        self.segments.push_back(Segment {
            since: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            first_sent: self.first_sent,
            app_limited,
        });
    }

    pub fn on_ack(&mut self, sent: Instant, bytes: u64) {
        self.delivered += bytes;
        self.acked += bytes;
        self.newest_sent = Some(self.newest_sent.map_or(sent, |newest| newest.max(sent)));
    }

    /// Ends a batch; `None` when it acknowledged no data.
    pub fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool) -> Option<Sample> {
        if app_limited {
            self.app_limited_until = (self.delivered + in_flight).max(1);
        }
        let newest_sent = self.newest_sent.take()?;
        let acked = std::mem::take(&mut self.acked);
        let after = self.segments.partition_point(|segment| segment.since <= newest_sent);
        let segment = after.checked_sub(1).and_then(|at| self.segments.get(at)).copied();
        let mut sample = Sample {
            bandwidth: None,
            rtt: now.saturating_duration_since(newest_sent),
            app_limited: segment.is_none_or(|segment| segment.app_limited),
            round_start: false,
            acked,
        };
        if let Some(segment) = segment {
            let send_elapsed = newest_sent.saturating_duration_since(segment.first_sent);
            let ack_elapsed = now.saturating_duration_since(segment.delivered_at);
            let elapsed = send_elapsed.max(ack_elapsed);
            if !elapsed.is_zero() {
                sample.bandwidth = Some((self.delivered - segment.delivered) as f64 / elapsed.as_secs_f64());
            }
            if segment.delivered >= self.next_round {
                self.next_round = self.delivered;
                sample.round_start = true;
            }
            self.segments.drain(..after - 1);
        }
        self.delivered_at = now;
        self.first_sent = newest_sent;
        Some(sample)
    }
}
