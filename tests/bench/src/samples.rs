//! Every latency of a run, kept exactly: percentiles are of what happened, not of buckets.

use std::time::Duration;

/// Latencies in 100 ns steps; `u32` reaches 7 minutes. At 300,000 requests/s for 10 s this is 12 MB.
#[derive(Debug, Default)]
pub struct Samples(Vec<u32>);

impl Samples {
    pub fn record(&mut self, latency: Duration) {
        self.0.push(u32::try_from(latency.as_nanos() / 100).unwrap_or(u32::MAX));
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Latency in ms that a share `q` (0 to 1) of all samples does not exceed; `None` without samples.
    pub fn quantile_ms(&mut self, q: f64) -> Option<f64> {
        let last = self.0.len().checked_sub(1)?;
        self.0.sort_unstable();
        let index = ((last as f64) * q).ceil() as usize;
        self.0.get(index.min(last)).map(|steps| f64::from(*steps) / 10_000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_samples_themselves() {
        let mut samples = Samples::default();
        assert_eq!(samples.quantile_ms(0.5), None);
        for millis in (1..=100).rev() {
            samples.record(Duration::from_millis(millis));
        }
        assert_eq!(samples.len(), 100);
        assert_eq!(samples.quantile_ms(0.0), Some(1.0));
        assert_eq!(samples.quantile_ms(0.99), Some(100.0));
        assert_eq!(samples.quantile_ms(0.5), Some(51.0));
    }
}
