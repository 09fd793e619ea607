//! Choosing among connections: power of two choices over peak-EWMA latency and load (pure).
//!
//! Peak-EWMA follows rises at once and falls slowly, so that a connection that has just become slow is left at once. A
//! failure counts as a slow answer, or an endpoint that fails fast would attract everything.

use std::time::Duration;

/// Half of a spike is forgotten after about 7 s.
const DECAY: Duration = Duration::from_secs(10);
/// What a failure weighs: a call that took this long.
const FAILURE: Duration = Duration::from_secs(2);
/// Before the first answer: neither attractive nor shunned.
const UNKNOWN: Duration = Duration::from_millis(30);

/// Latency and load of one connection. Times are since any fixed origin.
#[derive(Clone, Debug)]
pub struct PeakEwma {
    latency_seconds: f64,
    updated: Duration,
    pending: u32,
}

impl PeakEwma {
    pub fn new(now: Duration) -> Self {
        Self { latency_seconds: UNKNOWN.as_secs_f64(), updated: now, pending: 0 }
    }
    pub fn start(&mut self) {
        self.pending += 1;
    }
    /// A call ended after `latency`.
    pub fn finish(&mut self, latency: Duration, now: Duration) {
        self.pending = self.pending.saturating_sub(1);
        self.observe(latency, now);
    }
    /// A call failed.
    pub fn fail(&mut self, now: Duration) {
        self.pending = self.pending.saturating_sub(1);
        self.observe(FAILURE, now);
    }
    /// A latency seen beside any call, e.g. the connection's round trip.
    pub fn observe(&mut self, latency: Duration, now: Duration) {
        let latency = latency.as_secs_f64();
        let decayed = self.decayed(now);
        let elapsed = now.saturating_sub(self.updated).as_secs_f64();
        let weight = (-elapsed / DECAY.as_secs_f64()).exp();
        self.latency_seconds =
            if latency > decayed { latency } else { decayed * weight + latency * (1.0 - weight) };
        self.updated = now;
    }
    fn decayed(&self, now: Duration) -> f64 {
        let elapsed = now.saturating_sub(self.updated).as_secs_f64();
        self.latency_seconds * (-elapsed / DECAY.as_secs_f64()).exp().max(0.01)
    }
    /// Lower is better: expected latency times the calls it would share it with.
    pub fn cost(&self, now: Duration) -> f64 {
        self.decayed(now).max(1e-6) * f64::from(self.pending + 1)
    }
    pub fn pending(&self) -> u32 {
        self.pending
    }
}

/// The better of two different candidates drawn by `random`; `None` when there are none.
pub fn choose(costs: &[f64], random: u64) -> Option<usize> {
    let count = costs.len() as u64;
    match count {
        0 => None,
        1 => Some(0),
        _ => {
            let first = random % count;
            let second = (first + 1 + (random >> 32) % (count - 1)) % count;
            let (first, second) = (first as usize, second as usize);
            let better = costs.get(first)? <= costs.get(second)?;
            Some(if better { first } else { second })
        }
    }
}

/// An index drawn in proportion to `weights`; `None` when all are 0.
pub fn weighted(weights: impl Iterator<Item = u32> + Clone, random: u64) -> Option<usize> {
    let total: u64 = weights.clone().map(u64::from).sum();
    let mut draw = random.checked_rem(total)?;
    for (index, weight) in weights.enumerate() {
        if draw < u64::from(weight) {
            return Some(index);
        }
        draw -= u64::from(weight);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_or_failing_connection_is_left_at_once_and_forgiven_slowly() {
        let second = Duration::from_secs(1);
        let (mut slow, mut good) = (PeakEwma::new(Duration::ZERO), PeakEwma::new(Duration::ZERO));
        for connection in [&mut slow, &mut good] {
            connection.start();
            connection.finish(Duration::from_millis(5), second);
        }
        slow.start();
        slow.fail(2 * second);
        good.start();
        good.finish(Duration::from_millis(5), 2 * second);
        assert!(slow.cost(3 * second) > 10.0 * good.cost(3 * second));
        assert!(slow.cost(120 * second) < slow.cost(3 * second) / 10.0);
    }

    #[test]
    fn pending_calls_make_a_connection_dearer() {
        let mut connection = PeakEwma::new(Duration::ZERO);
        let idle = connection.cost(Duration::ZERO);
        connection.start();
        assert_eq!(connection.cost(Duration::ZERO), 2.0 * idle);
    }

    #[test]
    fn two_different_candidates_are_compared() {
        assert_eq!(choose(&[], 7), None);
        for random in 0..1000u64 {
            let random = random.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            assert_eq!(choose(&[1.0, 0.5], random), Some(1));
            assert_ne!(choose(&[0.1, 9.0, 0.1], random), Some(1));
        }
    }

    #[test]
    fn weights_are_honoured() {
        let counts = (0..1000u64).fold([0; 3], |mut counts, random| {
            counts[weighted([80, 0, 20].into_iter(), random).unwrap()] += 1;
            counts
        });
        assert_eq!(counts, [800, 0, 200]);
        assert_eq!(weighted([0, 0].into_iter(), 3), None);
    }
}
