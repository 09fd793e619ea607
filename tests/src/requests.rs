//! HTTP requests at a fixed rate from inside a namespace, whatever their answers take (an open loop), on connections that are
//! kept, on new ones, or on both by turns.
//!
//! A request is due at its moment, and its time counts from then, so that a stall shows in every request that it holds up.
//! Nothing is tried again: whatever is not answered in full, with what was expected, inside [`PATIENCE`], has failed, and is
//! counted with its reason. What the machine itself was too late for is not sent, and is counted for itself.
//!
//! Ends with [`OpenLoad::finish`], or with the value.

mod report;

use std::collections::VecDeque;
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
pub use report::{Failures, Report, Tally};

/// Longer than anything that a client would wait out.
const PATIENCE: Duration = Duration::from_secs(10);
/// A moment that this process itself is later for is let go: a burst afterwards would measure itself.
const LATE: Duration = Duration::from_secs(1);
/// Open at a time: what comes within eight seconds of 500 a second.
const OPEN: usize = 4000;
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
        if outcome.is_ok() {
            report.longest_silence = report.longest_silence.max(now - *last);
            *last = now;
        } else {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        report.note(keep, (due - self.begun, now - self.begun), outcome);
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
}
