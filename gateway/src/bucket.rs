//! A token bucket in one word, shared by every worker without a lock (the generic cell rate algorithm).
//!
//! The word is the theoretical arrival time of the next packet, in nanoseconds since the owner's origin; time is passed in.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Burst of one second's worth.
const BURST: Duration = Duration::from_secs(1);

/// Full when made.
#[derive(Debug, Default)]
pub struct Bucket(AtomicU64);

impl Bucket {
    /// Takes a token at `now` (since any fixed origin), at most `per_second` of them.
    pub fn take(&self, now: Duration, per_second: u32) -> bool {
        let Some(step) = 1_000_000_000u64.checked_div(u64::from(per_second)) else { return false };
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX / 2);
        let burst = u64::try_from(BURST.as_nanos()).unwrap_or(u64::MAX / 2);
        let taken = self.0.fetch_update(Relaxed, Relaxed, |due| {
            let next = due.max(now).saturating_add(step);
            (next <= now.saturating_add(burst)).then_some(next)
        });
        taken.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_burst_then_the_rate() {
        let bucket = Bucket::default();
        let at = |millis: u64| Duration::from_millis(5000 + millis);
        assert_eq!((0..50).filter(|_| bucket.take(at(0), 10)).count(), 10);
        assert!(!bucket.take(at(99), 10) && bucket.take(at(100), 10) && !bucket.take(at(100), 10));
        assert_eq!(
            (0..50).filter(|_| bucket.take(at(60_000), 10)).count(),
            10,
            "it never holds more than a second's"
        );
        assert!(!Bucket::default().take(at(0), 0));
    }
}
