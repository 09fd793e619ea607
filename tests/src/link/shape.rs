//! The decision about one packet: when it arrives at the other end, or why it never does. Pure; time is passed in.
//!
//! Order per packet: random loss, then MTU, then the rate (a queue drained at the rate, drop-tail once it holds more
//! than `buffer` of time), then delay and jitter. Jitter alone never reorders; only `reorder` does.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How one direction of a link treats packets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// One-way propagation delay.
    pub delay: Duration,
    /// Each packet's delay varies by up to this much either way.
    pub jitter: Duration,
    /// Probability of losing a packet, 0 to 1.
    pub loss: f64,
    /// Probability that a packet is held back by `reorder_hold`, so that later ones overtake it.
    pub reorder: f64,
    pub reorder_hold: Duration,
    /// `None`: no limit.
    pub rate_bits_per_second: Option<u64>,
    /// Longest time a packet may wait for the rate; more is dropped at the tail.
    pub buffer: Duration,
    /// Largest IP packet carried, in bytes. Larger ones are dropped without an ICMP message, as on a path whose MTU
    /// shrank. At the start both devices get this MTU.
    pub mtu: u16,
}

impl Shape {
    /// A perfect cable: no delay, no loss, no rate limit.
    pub const PERFECT: Self = Self {
        delay: Duration::ZERO,
        jitter: Duration::ZERO,
        loss: 0.0,
        reorder: 0.0,
        reorder_hold: Duration::from_millis(5),
        rate_bits_per_second: None,
        buffer: Duration::from_millis(50),
        mtu: 1500,
    };

    /// The wide-area link of the project's figures: 50 ms round trip, 300 Mbit/s, 50 ms of drop-tail buffer, and
    /// `loss` (0 to 1) in each direction.
    pub const fn wide_area(loss: f64) -> Self {
        Self {
            delay: Duration::from_millis(25),
            loss,
            rate_bits_per_second: Some(300_000_000),
            ..Self::PERFECT
        }
    }

    pub(super) fn checked(self) -> Result<Self> {
        for (name, value) in [("loss", self.loss), ("reorder", self.reorder)] {
            if !(0.0..=1.0).contains(&value) {
                bail!("link shape: {name} is {value}, a probability from 0 to 1 is needed");
            }
        }
        if self.rate_bits_per_second == Some(0) {
            bail!("link shape: a rate of 0 carries nothing, use the black hole for that");
        }
        if self.mtu < 68 {
            bail!("link shape: an MTU of {} is below the 68 bytes that IPv4 demands (RFC 791)", self.mtu);
        }
        Ok(self)
    }
}

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Deliver { at: Instant, reordered: bool },
    Lost,
    TooBig,
    QueueFull,
}

/// The state of one direction between packets.
#[derive(Debug)]
pub(super) struct Shaper {
    /// When the transmitter has sent everything admitted so far.
    busy_until: Instant,
    /// Delivery of the latest packet that was not reordered; later ones are not delivered before it.
    latest: Instant,
    random: SplitMix64,
}

impl Shaper {
    pub(super) fn new(seed: u64, now: Instant) -> Self {
        Self { busy_until: now, latest: now, random: SplitMix64(seed) }
    }

    pub(super) fn admit(&mut self, shape: &Shape, bytes: usize, now: Instant) -> Verdict {
        if shape.loss > 0.0 && self.random.fraction() < shape.loss {
            return Verdict::Lost;
        }
        if bytes > usize::from(shape.mtu) {
            return Verdict::TooBig;
        }
        let sent = match shape.rate_bits_per_second {
            None => now,
            Some(rate) => {
                let start = self.busy_until.max(now);
                if start.duration_since(now) > shape.buffer {
                    return Verdict::QueueFull;
                }
                // At most 64 KiB per packet and a rate above 0: neither overflow nor division by zero.
                let nanos = (bytes as u64).saturating_mul(8_000_000_000) / rate.max(1);
                self.busy_until = start + Duration::from_nanos(nanos);
                self.busy_until
            }
        };
        let mut at = sent + shape.delay;
        if !shape.jitter.is_zero() {
            let span = shape.jitter.mul_f64(2.0 * self.random.fraction());
            at = (at + span).checked_sub(shape.jitter).unwrap_or(now).max(now);
        }
        if shape.reorder > 0.0 && self.random.fraction() < shape.reorder {
            return Verdict::Deliver { at: at + shape.reorder_hold, reordered: true };
        }
        self.latest = self.latest.max(at);
        Verdict::Deliver { at: self.latest, reordered: false }
    }
}

/// Sebastiano Vigna's SplitMix64: enough for packet loss, and the same on every machine and release.
#[derive(Debug)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn fraction(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deliveries(shape: Shape, packets: usize, gap: Duration) -> Vec<Verdict> {
        let start = Instant::now();
        let mut shaper = Shaper::new(7, start);
        (0..packets).map(|n| shaper.admit(&shape, 1500, start + gap * n as u32)).collect()
    }

    #[test]
    fn loss_takes_about_its_share_and_the_same_packets_for_the_same_seed() {
        let shape = Shape { loss: 0.01, ..Shape::PERFECT };
        let first = deliveries(shape, 100_000, Duration::from_micros(10));
        let lost = first.iter().filter(|verdict| **verdict == Verdict::Lost).count();
        assert!((800..1200).contains(&lost), "{lost} of 100000");
        let lost_at =
            |verdicts: &[Verdict]| -> Vec<bool> { verdicts.iter().map(|v| *v == Verdict::Lost).collect() };
        assert_eq!(lost_at(&first), lost_at(&deliveries(shape, 100_000, Duration::from_micros(10))));
    }

    #[test]
    fn the_rate_spaces_packets_and_a_full_buffer_drops_the_tail() {
        let shape = Shape {
            rate_bits_per_second: Some(12_000_000),
            buffer: Duration::from_millis(10),
            delay: Duration::from_millis(3),
            ..Shape::PERFECT
        };
        // 1500 bytes at 12 Mbit/s take 1 ms: of a burst, 11 are sent within 10 ms of waiting, the others dropped.
        let start = Instant::now();
        let mut shaper = Shaper::new(1, start);
        let verdicts: Vec<Verdict> = (0..20).map(|_| shaper.admit(&shape, 1500, start)).collect();
        for (n, verdict) in verdicts.iter().enumerate() {
            let expected = if n < 11 {
                Verdict::Deliver { at: start + Duration::from_millis(n as u64 + 4), reordered: false }
            } else {
                Verdict::QueueFull
            };
            assert_eq!(*verdict, expected, "packet {n}");
        }
    }

    #[test]
    fn jitter_alone_keeps_the_order_and_reordering_breaks_it() {
        let jitter =
            Shape { delay: Duration::from_millis(20), jitter: Duration::from_millis(10), ..Shape::PERFECT };
        let times = |shape| -> Vec<Instant> {
            deliveries(shape, 5000, Duration::from_micros(100))
                .into_iter()
                .filter_map(|v| if let Verdict::Deliver { at, .. } = v { Some(at) } else { None })
                .collect()
        };
        assert!(times(jitter).is_sorted());
        let reordered = times(Shape { reorder: 0.1, ..jitter });
        assert_eq!(reordered.len(), 5000);
        assert!(!reordered.is_sorted());
    }

    #[test]
    fn a_packet_above_the_mtu_is_dropped_and_impossible_shapes_are_refused() {
        let now = Instant::now();
        let mut shaper = Shaper::new(1, now);
        let shape = Shape { mtu: 1420, ..Shape::PERFECT };
        assert_eq!(shaper.admit(&shape, 1421, now), Verdict::TooBig);
        assert!(matches!(shaper.admit(&shape, 1420, now), Verdict::Deliver { .. }));
        for bad in [
            Shape { loss: 1.1, ..shape },
            Shape { reorder: f64::NAN, ..shape },
            Shape { rate_bits_per_second: Some(0), ..shape },
            Shape { mtu: 10, ..shape },
        ] {
            assert!(bad.checked().is_err(), "{bad:?}");
        }
    }
}
