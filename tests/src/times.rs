//! How long things of one kind took.

use std::fmt;
use std::time::Duration;

#[derive(Clone, Debug, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    pub fn push(&mut self, took: Duration) {
        self.0.push(took);
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The time that `share` (0 to 1) of them took at most (nearest rank); zero of none.
    pub fn percentile(&self, share: f64) -> Duration {
        let mut times = self.0.clone();
        times.sort_unstable();
        let last = times.len().saturating_sub(1);
        times.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
    }

    /// Of these and others.
    pub fn with(&self, others: &Self) -> Self {
        Self([&self.0[..], &others.0[..]].concat())
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p50 {:.1?}, p99 {:.1?} of {}", self.percentile(0.5), self.percentile(0.99), self.count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_times_in_order() {
        let times = |millis: &[u64]| Times(millis.iter().copied().map(Duration::from_millis).collect());
        assert_eq!(times(&[3, 1, 2]).percentile(0.5), Duration::from_millis(2));
        assert_eq!(times(&[3, 1]).with(&times(&[2])).percentile(1.0), Duration::from_millis(3));
        assert_eq!(Times::default().percentile(0.5), Duration::ZERO);
    }
}
