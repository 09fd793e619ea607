//! HTTP requests at a fixed rate from inside a namespace, whatever their answers take (an open loop), on connections that are
//! kept, on new ones, or on both by turns.
//!
//! A request is due at its moment, and its time counts from then, so that a stall shows in every request that it holds up.
//! Nothing is tried again: whatever is not answered in full, with what was expected, inside [`PATIENCE`], has failed, and is
//! counted with its reason. What the machine itself was too late for is not sent, and is counted for itself.
//!
//! Ends with [`OpenLoad::finish`], or with the value.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use crate::netns::NamespaceHandle;

/// Longer than anything that a client would wait out.
const PATIENCE: Duration = Duration::from_secs(10);
/// A moment that this process itself is later for is let go: a burst afterwards would measure itself.
const LATE: Duration = Duration::from_secs(1);
/// Open at a time: what comes within eight seconds of 500 a second.
const OPEN: usize = 4000;
/// Failures of a reason of which the moments are kept.
const SHOWN: usize = 12;
/// An answer that took longer is a part of a stall.
const SLOW: Duration = Duration::from_millis(300);
/// Stalls that are told apart.
const STALLS: usize = 40;
/// An answer's head and its short body.
const ANSWER_BYTES: usize = 8192;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Load {
    pub address: SocketAddr,
    pub path: String,
    /// A part of the body of a right answer.
    pub expect: String,
    pub per_second: u32,
    pub connections: Connections,
}

/// What the requests go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connections {
    /// A new one each.
    New,
    /// Ones that are kept, as many as are needed.
    Kept,
    /// Every other one's is kept.
    Both,
}

/// Requests of a kind.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// From the moment that it was due, in the order of answers.
    times: Vec<Duration>,
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

/// A load that runs.
pub struct OpenLoad {
    // Its threads are inside the namespace: a connection is made where its task runs.
    runtime: Runtime,
    task: JoinHandle<Duration>,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    load: Load,
    stop: AtomicBool,
    begun: Instant,
    /// First in, first out: none lies unused for long.
    idle: Mutex<VecDeque<TcpStream>>,
    report: Mutex<(Report, Instant)>,
    failed: AtomicU64,
}

impl Tally {
    pub fn answered(&self) -> u64 {
        self.times.len() as u64
    }

    pub fn failures(&self) -> u64 {
        self.failed.values().map(|of| of.count).sum()
    }

    /// The time that `share` (0 to 1) of the answers took at most.
    pub fn percentile(&self, share: f64) -> Duration {
        percentile(self.times.clone(), share)
    }
}

fn percentile(mut times: Vec<Duration>, share: f64) -> Duration {
    times.sort_unstable();
    let last = times.len().saturating_sub(1);
    times.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
}

impl Report {
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

    pub fn percentile(&self, share: f64) -> Duration {
        percentile([&self.kept.times[..], &self.new.times[..]].concat(), share)
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

impl OpenLoad {
    pub fn start(inside: &NamespaceHandle, load: Load) -> Result<Self> {
        anyhow::ensure!(load.per_second > 0, "a load of no requests");
        let runtime = inside.runtime(1)?;
        let state = Arc::new(State {
            load,
            stop: AtomicBool::new(false),
            begun: Instant::now(),
            idle: Mutex::default(),
            report: Mutex::new((Report::default(), Instant::now())),
            failed: AtomicU64::new(0),
        });
        let task = runtime.spawn(pace(Arc::clone(&state)));
        Ok(Self { runtime, task, state })
    }

    /// How many have failed until now.
    pub fn failed(&self) -> u64 {
        self.state.failed.load(Ordering::Relaxed)
    }

    /// Since it began.
    pub fn elapsed(&self) -> Duration {
        self.state.begun.elapsed()
    }

    /// Sends no more, waits for what is open, and says what has come of it.
    pub fn finish(self) -> Result<Report> {
        self.state.stop.store(true, Ordering::Relaxed);
        let took = self.runtime.block_on(self.task).context("the load has panicked")?;
        let mut report = self.state.report.lock().unwrap_or_else(PoisonError::into_inner).0.clone();
        report.took = took;
        Ok(report)
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

/// Sends each request at its moment: how long it did.
async fn pace(state: Arc<State>) -> Duration {
    let open = Arc::new(Semaphore::new(OPEN));
    let mut requests = JoinSet::new();
    let mut number = 0u32;
    while !state.stop.load(Ordering::Relaxed) {
        let due = state.begun + Duration::from_secs(1) * number / state.load.per_second;
        number += 1;
        tokio::time::sleep_until(due).await;
        while requests.try_join_next().is_some() {}
        let place = Arc::clone(&open).try_acquire_owned();
        let Some(place) = place.ok().filter(|_| due.elapsed() < LATE) else {
            state.report().0.not_sent += 1;
            continue;
        };
        let keep = match state.load.connections {
            Connections::New => false,
            Connections::Kept => true,
            Connections::Both => number.is_multiple_of(2),
        };
        let state = Arc::clone(&state);
        requests.spawn(async move {
            let outcome = tokio::time::timeout(PATIENCE, state.request(keep)).await;
            state.note(keep, due, outcome.unwrap_or_else(|_| Err(format!("no answer within {PATIENCE:?}"))));
            drop(place);
        });
    }
    let took = state.begun.elapsed();
    while requests.join_next().await.is_some() {}
    took
}

impl State {
    fn report(&self) -> std::sync::MutexGuard<'_, (Report, Instant)> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, VecDeque<TcpStream>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, keep: bool, due: Instant, outcome: Result<(), String>) {
        let now = Instant::now();
        let mut report = self.report();
        let (report, last) = &mut *report;
        let tally = if keep { &mut report.kept } else { &mut report.new };
        match outcome {
            Ok(()) => {
                tally.times.push(now - due);
                if now - due > SLOW {
                    stalled(&mut report.stalls, due - self.begun, now - self.begun);
                }
                report.longest_silence = report.longest_silence.max(now - *last);
                *last = now;
            }
            Err(reason) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                let reason = format!("{}: {reason}", if keep { "kept" } else { "new" });
                let of = tally.failed.entry(reason).or_default();
                of.count += 1;
                if of.first.len() < SHOWN {
                    of.first.push((due - self.begun, now - self.begun));
                }
            }
        }
    }

    async fn request(&self, keep: bool) -> Result<(), String> {
        let idle = if keep { self.idle().pop_front() } else { None };
        let mut stream = match idle {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(self.load.address).await;
                let stream = stream.map_err(|error| format!("connect: {error}"))?;
                let _ = stream.set_nodelay(true);
                if keep {
                    self.report().0.kept_connections += 1;
                }
                stream
            }
        };
        let again = exchange(&mut stream, &self.load, keep).await?;
        if keep && again {
            self.idle().push_back(stream);
        }
        Ok(())
    }
}

/// Whether the connection may be used again.
async fn exchange(stream: &mut TcpStream, load: &Load, keep: bool) -> Result<bool, String> {
    let end = if keep { "" } else { "Connection: close\r\n" };
    let request = format!("GET {} HTTP/1.1\r\nHost: mesh\r\n{end}\r\n", load.path);
    stream.write_all(request.as_bytes()).await.map_err(|error| format!("write: {error}"))?;
    let mut answer = Vec::with_capacity(512);
    loop {
        let read = stream.read_buf(&mut answer).await.map_err(|error| format!("read: {error}"))?;
        if let Some(again) = complete(&answer, &load.expect)? {
            return Ok(again);
        }
        if read == 0 {
            return Err(format!("closed after {} bytes of the answer", answer.len()));
        }
        if answer.len() > ANSWER_BYTES {
            return Err(format!("an answer of more than {ANSWER_BYTES} bytes"));
        }
    }
}

/// `None`: there is more to come. Otherwise whether the connection stays. Pure.
fn complete(answer: &[u8], expect: &str) -> Result<Option<bool>, String> {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return Ok(None) };
    let status = head.lines().next().unwrap_or_default();
    if !status.starts_with("HTTP/1.1 200") {
        return Err(format!("answered {status:?}"));
    }
    let field = |name: &str| {
        head.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    };
    let length: usize = field("content-length")
        .and_then(|length| length.parse().ok())
        .ok_or_else(|| "an answer without a length".to_owned())?;
    if body.len() < length {
        return Ok(None);
    }
    if !body.contains(expect) {
        return Err(format!("a wrong body: {body:?}"));
    }
    Ok(Some(!field("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_by_its_length_and_right_by_its_body() {
        let head = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n";
        let of = |text: String| complete(text.as_bytes(), "west");
        assert_eq!(of(format!("{head}\r\nwes")), Ok(None));
        assert_eq!(of(head.to_owned()), Ok(None));
        assert_eq!(of(format!("{head}\r\nwest\n")), Ok(Some(true)));
        assert_eq!(of(format!("{head}Connection: Close\r\n\r\nwest\n")), Ok(Some(false)));
        assert!(of(format!("{head}\r\neast\n")).unwrap_err().contains("wrong body"));
        assert!(of("HTTP/1.1 502 Bad\r\n\r\n".to_owned()).unwrap_err().contains("502"));
        assert!(of("HTTP/1.1 200 OK\r\n\r\nwest".to_owned()).unwrap_err().contains("length"));
    }

    #[test]
    fn slow_answers_at_the_same_time_are_one_stall() {
        let mut stalls = Vec::new();
        for (from, to) in [(10, 12), (11, 13), (9, 13), (20, 21)] {
            stalled(&mut stalls, Duration::from_secs(from), Duration::from_secs(to));
        }
        let seconds = |(from, to): &(Duration, Duration)| (from.as_secs(), to.as_secs());
        assert_eq!(stalls.iter().map(seconds).collect::<Vec<_>>(), [(9, 13), (20, 21)]);
    }

    #[test]
    fn percentiles_are_of_the_times_in_order() {
        let times = |millis: &[u64]| millis.iter().copied().map(Duration::from_millis).collect::<Vec<_>>();
        assert_eq!(percentile(times(&[3, 1, 2]), 0.5), Duration::from_millis(2));
        assert_eq!(percentile(times(&[3, 1, 2]), 1.0), Duration::from_millis(3));
        assert_eq!(percentile(Vec::new(), 0.5), Duration::ZERO);
    }
}
