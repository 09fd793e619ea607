//! How long to wait before the next attempt: doubling, capped, jittered, so that a thousand members whose federator
//! restarts do not come back at once. Pure: the random number is passed in.

use std::time::Duration;

/// Attempts so far that failed in a row.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    failures: u32,
}

impl Backoff {
    pub const fn new(first: Duration, most: Duration) -> Self {
        Self { first, most, failures: 0 }
    }

    /// The wait after one more failure; `random` in 0..1. Between half and all of the doubled time.
    pub fn failed(&mut self, random: f64) -> Duration {
        let doubled = self.first.saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        doubled.min(self.most).mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0))
    }

    pub fn worked(&mut self) {
        self.failures = 0;
    }

    pub fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap_and_start_again_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let waits: Vec<_> = (0..5).map(|_| backoff.failed(1.0).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1000]);
        backoff.worked();
        assert_eq!(backoff.failed(0.0), Duration::from_millis(50));
        for _ in 0..100 {
            assert!(backoff.failed(1.0) <= Duration::from_secs(1));
        }
    }
}
