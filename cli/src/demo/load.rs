//! Request load on one address: a few workers, a new connection for every request, every outcome kept.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tombolo_runtime::tasks::TaskGroup;

use super::http;

/// Longer than any promised failover, so that a stall shows as latency and only a real loss as a failure.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);
/// A scenario is minutes at most; a runaway load stops growing here.
const MAX_SAMPLES: usize = 1_000_000;

/// One request.
#[derive(Clone, Debug)]
pub struct Sample {
    pub started: Instant,
    pub took: Duration,
    /// Who answered, or why nobody did.
    pub outcome: Result<String, String>,
}

/// Running load; its tasks end when it is dropped or finished.
pub struct Load {
    samples: Arc<Mutex<Vec<Sample>>>,
    tasks: TaskGroup,
}

impl Load {
    /// `workers` loops, each pausing between its requests.
    pub fn start(address: SocketAddr, workers: usize, pause: Duration) -> Self {
        let load = Self { samples: Arc::default(), tasks: TaskGroup::new() };
        for _ in 0..workers {
            let samples = load.samples.clone();
            let stop = load.tasks.stop_token();
            load.tasks.spawn("load", async move {
                while !stop.is_cancelled() {
                    let sample = one(address).await;
                    {
                        let mut kept = samples.lock().unwrap_or_else(PoisonError::into_inner);
                        if kept.len() < MAX_SAMPLES {
                            kept.push(sample);
                        }
                    }
                    tokio::time::sleep(pause).await;
                }
            });
        }
        load
    }

    /// A copy of what there is so far.
    pub fn so_far(&self) -> Samples {
        Samples(self.samples.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Lets every request in flight end.
    pub async fn finish(self) -> Samples {
        self.tasks.shutdown(REQUEST_LIMIT + Duration::from_secs(1)).await;
        self.so_far()
    }
}

/// One request; who answered.
pub async fn one(address: SocketAddr) -> Sample {
    let started = Instant::now();
    let outcome = match http::get(address, "/", REQUEST_LIMIT).await {
        Ok(answer) if answer.status == 200 => served_by(&answer.body),
        Ok(answer) => Err(format!("status {}", answer.status)),
        Err(error) => Err(error),
    };
    Sample { started, took: started.elapsed(), outcome }
}

fn served_by(body: &[u8]) -> Result<String, String> {
    let value: serde_json::Value = serde_json::from_slice(body).map_err(|e| format!("answer: {e}"))?;
    value
        .get("servedBy")
        .and_then(|name| name.as_str())
        .map(str::to_owned)
        .ok_or_else(|| "answer: nobody's name".to_owned())
}

/// Finished requests.
#[derive(Clone, Debug, Default)]
pub struct Samples(pub Vec<Sample>);

impl Samples {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn failed(&self) -> usize {
        self.0.iter().filter(|sample| sample.outcome.is_err()).count()
    }

    pub fn failed_percent(&self) -> f64 {
        if self.0.is_empty() { 100.0 } else { 100.0 * self.failed() as f64 / self.len() as f64 }
    }

    /// How many requests each server answered.
    pub fn by_server(&self) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for name in self.0.iter().filter_map(|sample| sample.outcome.as_deref().ok()) {
            *counts.entry(name).or_insert(0) += 1;
        }
        counts
    }

    /// The kinds of failure, for a report.
    pub fn failures(&self) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for reason in self.0.iter().filter_map(|sample| sample.outcome.as_ref().err()) {
            *counts.entry(reason.as_str()).or_insert(0) += 1;
        }
        counts
    }

    /// When, after `from`, the first answer by one of `servers` was complete.
    pub fn first_answer(&self, from: Instant, servers: &[&str]) -> Option<Duration> {
        let answers = self.0.iter().filter(|sample| {
            sample.started + sample.took >= from
                && sample.outcome.as_deref().is_ok_and(|name| servers.contains(&name))
        });
        answers.map(|sample| (sample.started + sample.took).duration_since(from)).min()
    }

    /// When, after `from`, the last request that failed or was answered by one of `servers` began; zero when none.
    /// Everything begun later went elsewhere and well.
    pub fn settled(&self, from: Instant, servers: &[&str]) -> Duration {
        let unsettled = self.0.iter().filter(|sample| {
            sample.started >= from && sample.outcome.as_deref().map_or(true, |name| servers.contains(&name))
        });
        unsettled.map(|sample| sample.started.duration_since(from)).max().unwrap_or_default()
    }

    /// Latency of the answered ones, `share` in 0..=1.
    pub fn quantile(&self, share: f64) -> Duration {
        let mut times: Vec<_> = self.0.iter().filter(|s| s.outcome.is_ok()).map(|s| s.took).collect();
        times.sort_unstable();
        let at = ((times.len().saturating_sub(1)) as f64 * share.clamp(0.0, 1.0)).round() as usize;
        times.get(at).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(from: Instant, at_ms: u64, outcome: Result<&str, &str>) -> Sample {
        let outcome = outcome.map(str::to_owned).map_err(str::to_owned);
        Sample { started: from + Duration::from_millis(at_ms), took: Duration::from_millis(10), outcome }
    }

    #[test]
    fn failover_is_timed_from_the_kill_to_the_first_answer_and_to_the_last_trouble() {
        let kill = Instant::now();
        let samples = Samples(vec![
            sample(kill, 0, Ok("west")),
            sample(kill, 100, Err("reset")),
            sample(kill, 200, Ok("east")),
            sample(kill, 300, Err("reset")),
            sample(kill, 400, Ok("east")),
        ]);
        assert_eq!(samples.first_answer(kill, &["east"]), Some(Duration::from_millis(210)));
        assert_eq!(samples.settled(kill, &["west"]), Duration::from_millis(300));
        assert_eq!((samples.failed(), samples.failed_percent()), (2, 40.0));
        assert_eq!(samples.by_server().get("east"), Some(&2));
    }

    #[test]
    fn no_requests_at_all_is_no_success() {
        assert_eq!(Samples::default().failed_percent(), 100.0);
        assert_eq!(Samples::default().quantile(0.99), Duration::ZERO);
    }
}
