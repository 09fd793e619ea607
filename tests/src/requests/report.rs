//! What has come of a load of requests: how many, how long they took, and each failure with its reason. Bounded but for a duration
//! per answer.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::times::Times;

/// Failures of a reason of which the moments are kept.
const SHOWN: usize = 12;
/// An answer that took longer is a part of a stall.
const SLOW: Duration = Duration::from_millis(300);
/// Stalls that are told apart.
const STALLS: usize = 40;

/// Requests of a kind.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// From the moment that it was due, in the order of answers.
    times: Times,
    /// By reason.
    pub failed: BTreeMap<String, Failures>,
}

/// Of one reason: how many, and of the first ones when they were due and when they had failed, since the load began.
#[derive(Clone, Debug, Default)]
pub struct Failures {
    pub count: u64,
    pub first: Vec<(Duration, Duration)>,
}

/// What has come of a load.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// On connections that are kept, and on new ones.
    pub kept: Tally,
    pub new: Tally,
    /// Connections that were made to be kept: one that breaks is made anew.
    pub kept_connections: u64,
    /// That this machine was too late for.
    pub not_sent: u64,
    pub took: Duration,
    /// The longest time in which no request was answered.
    pub longest_silence: Duration,
    /// When answers took long, since the load began: from the first such request's moment to the last one's answer.
    pub stalls: Vec<(Duration, Duration)>,
}

impl Tally {
    pub fn answered(&self) -> u64 {
        self.times.count() as u64
    }

    pub fn failures(&self) -> u64 {
        self.failed.values().map(|of| of.count).sum()
    }
}

impl Report {
    /// Takes in a request that was due and has ended so long after the load began.
    pub(super) fn note(
        &mut self,
        kept: bool,
        (due, ended): (Duration, Duration),
        outcome: Result<(), String>,
    ) {
        let tally = if kept { &mut self.kept } else { &mut self.new };
        let took = ended.saturating_sub(due);
        match outcome {
            Ok(()) => {
                tally.times.push(took);
                if took > SLOW {
                    stalled(&mut self.stalls, due, ended);
                }
            }
            Err(reason) => {
                let reason = format!("{}: {reason}", if kept { "kept" } else { "new" });
                let of = tally.failed.entry(reason).or_default();
                of.count += 1;
                if of.first.len() < SHOWN {
                    of.first.push((due, ended));
                }
            }
        }
    }

    pub fn requests(&self) -> u64 {
        [&self.kept, &self.new].into_iter().map(|tally| tally.answered() + tally.failures()).sum()
    }

    pub fn failures(&self) -> u64 {
        self.kept.failures() + self.new.failures()
    }

    /// Requests per second.
    pub fn rate(&self) -> f64 {
        self.requests() as f64 / self.took.as_secs_f64().max(0.001)
    }

    /// The time that `share` (0 to 1) of the answers took at most.
    pub fn percentile(&self, share: f64) -> Duration {
        self.kept.times.with(&self.new.times).percentile(share)
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} requests ({:.0}/s), {} failed, p50 {:.1?}, p99 {:.1?}, longest {:.1?}, longest without any answer {:.1?}, {} not sent; \
             kept connections: {} answered by {}, {} failed; new ones: {} answered, {} failed",
            self.requests(),
            self.rate(),
            self.failures(),
            self.percentile(0.5),
            self.percentile(0.99),
            self.percentile(1.0),
            self.longest_silence,
            self.not_sent,
            self.kept.answered(),
            self.kept_connections,
            self.kept.failures(),
            self.new.answered(),
            self.new.failures(),
        )?;
        for (reason, Failures { count, first }) in self.kept.failed.iter().chain(&self.new.failed) {
            write!(f, "\n  {count} x {reason}; due and failed after {first:.2?}")?;
        }
        for (from, to) in &self.stalls {
            write!(f, "\n  slow from {from:.2?} to {to:.2?}")?;
        }
        Ok(())
    }
}

/// Adds a slow answer to the stall that it is a part of. Pure.
fn stalled(stalls: &mut Vec<(Duration, Duration)>, from: Duration, to: Duration) {
    // Answers come in their own order; the one before is as old as the patience at most.
    if let Some(last) = stalls.last_mut().filter(|last| from <= last.1) {
        *last = (last.0.min(from), last.1.max(to));
    } else if stalls.len() < STALLS {
        stalls.push((from, to));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_answers_at_the_same_time_are_one_stall() {
        let mut stalls = Vec::new();
        for (from, to) in [(10, 12), (11, 13), (9, 13), (20, 21)] {
            stalled(&mut stalls, Duration::from_secs(from), Duration::from_secs(to));
        }
        let seconds = |(from, to): &(Duration, Duration)| (from.as_secs(), to.as_secs());
        assert_eq!(stalls.iter().map(seconds).collect::<Vec<_>>(), [(9, 13), (20, 21)]);
    }
}
