//! Health of the local application: checks with thresholds, so that one lost packet shifts nothing. The decision is
//! pure ([`Judge`]); [`watch_service`] drives it and publishes changes.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tombolo_runtime::drain::Drain;

mod command;

/// A status line is shorter; the rest of an answer is nobody's business here.
const MAX_STATUS_LINE_BYTES: u64 = 1024;

/// What is asked of the application.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// It accepts a TCP connection.
    Tcp,
    /// It answers `GET path` with a status in 200..400.
    Http { path: String },
    /// A program, by its path, with arguments: it ends with 0. No shell is involved unless it is the program.
    Command { command: Vec<String> },
    /// It is taken for healthy.
    None,
}

/// How an application is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    pub probe: Probe,
    /// Another address than that of the service's first TCP port.
    pub target: Option<SocketAddr>,
    pub interval: Duration,
    pub timeout: Duration,
    /// Successes in a row before it is healthy again.
    pub healthy_after: u32,
    /// Failures in a row before it is unhealthy.
    pub unhealthy_after: u32,
}

impl Default for HealthCheck {
    fn default() -> Self {
        Self {
            probe: Probe::Tcp,
            target: None,
            // Two failures half a second apart and a report: out of rotation within the promised 3 s.
            interval: Duration::from_millis(500),
            timeout: Duration::from_secs(1),
            healthy_after: 2,
            unhealthy_after: 2,
        }
    }
}

/// What is known of an application.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub healthy: bool,
    pub reason: String,
}

/// Counts results in a row. The first result of all decides at once: there is no earlier state to protect.
#[derive(Clone, Debug)]
pub struct Judge {
    healthy_after: u32,
    unhealthy_after: u32,
    healthy: Option<bool>,
    streak: u32,
}

impl Judge {
    pub fn new(check: &HealthCheck) -> Self {
        Self {
            healthy_after: check.healthy_after.max(1),
            unhealthy_after: check.unhealthy_after.max(1),
            healthy: None,
            streak: 0,
        }
    }

    /// Takes one result; the verdict when it changed.
    pub fn observe(&mut self, result: Result<(), String>) -> Option<Verdict> {
        let ok = result.is_ok();
        let verdict = |reason| Some(Verdict { healthy: ok, reason });
        let Some(healthy) = self.healthy else {
            self.healthy = Some(ok);
            return verdict(result.err().unwrap_or_else(|| "first check passed".to_owned()));
        };
        if healthy == ok {
            self.streak = 0;
            return None;
        }
        self.streak += 1;
        let needed = if ok { self.healthy_after } else { self.unhealthy_after };
        if self.streak < needed {
            return None;
        }
        let streak = std::mem::take(&mut self.streak);
        self.healthy = Some(ok);
        verdict(match result {
            Ok(()) => format!("{streak} checks in a row passed"),
            Err(why) => format!("{streak} checks in a row failed: {why}"),
        })
    }
}

/// Checks until the drain starts; then says unhealthy once more, so that nobody is sent here.
pub async fn watch_service(
    check: HealthCheck,
    target: SocketAddr,
    verdict: watch::Sender<Option<Verdict>>,
    drain: Drain,
) {
    let mut judge = Judge::new(&check);
    let checks = async {
        loop {
            if let Some(change) = judge.observe(probe(&check, target).await) {
                tracing::info!(%target, healthy = change.healthy, reason = change.reason, "local application");
                verdict.send_replace(Some(change));
            }
            tokio::time::sleep(check.interval).await;
        }
    };
    tokio::select! {
        () = checks => {}
        () = drain.started() => {
            verdict.send_replace(Some(Verdict { healthy: false, reason: "draining".to_owned() }));
        }
    }
}

pub(crate) async fn probe(check: &HealthCheck, target: SocketAddr) -> Result<(), String> {
    let asked = async {
        match &check.probe {
            Probe::None => Ok(()),
            Probe::Tcp => TcpStream::connect(target).await.map(drop).map_err(|e| e.to_string()),
            Probe::Http { path } => get(target, path).await,
            Probe::Command { command } => command::check(command).await,
        }
    };
    let late = format!("no answer within {} ms", check.timeout.as_millis());
    tokio::time::timeout(check.timeout, asked).await.unwrap_or(Err(late))
}

async fn get(target: SocketAddr, path: &str) -> Result<(), String> {
    let mut tcp = TcpStream::connect(target).await.map_err(|e| e.to_string())?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {target}\r\nUser-Agent: tombolo-health\r\nConnection: close\r\n\r\n"
    );
    tcp.write_all(request.as_bytes()).await.map_err(|e| e.to_string())?;
    let mut answer = Vec::new();
    let mut limited = tcp.take(MAX_STATUS_LINE_BYTES);
    while !answer.contains(&b'\n') {
        if limited.read_buf(&mut answer).await.map_err(|e| e.to_string())? == 0 {
            break;
        }
    }
    let status = status_of(&answer).ok_or("the answer is not HTTP")?;
    if (200..400).contains(&status) { Ok(()) } else { Err(format!("GET {path} answered {status}")) }
}

fn status_of(answer: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(answer.split(|b| *b == b'\r' || *b == b'\n').next()?).ok()?;
    let mut parts = line.split(' ');
    parts.next().filter(|version| version.starts_with("HTTP/1."))?;
    parts.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed() -> Result<(), String> {
        Err("refused".to_owned())
    }

    #[test]
    fn the_first_result_decides_and_later_changes_need_their_threshold() {
        let mut judge =
            Judge::new(&HealthCheck { healthy_after: 3, unhealthy_after: 2, ..Default::default() });
        assert!(judge.observe(Ok(())).unwrap().healthy);
        assert_eq!(judge.observe(failed()), None);
        assert_eq!(judge.observe(Ok(())), None, "a success starts the count again");
        assert_eq!(judge.observe(failed()), None);
        let change = judge.observe(failed()).unwrap();
        assert!(!change.healthy && change.reason.contains("refused"), "{change:?}");
        assert_eq!(judge.observe(Ok(())), None);
        assert_eq!(judge.observe(Ok(())), None);
        assert!(judge.observe(Ok(())).unwrap().healthy);
    }

    #[test]
    fn only_an_http_status_line_has_a_status() {
        assert_eq!(status_of(b"HTTP/1.1 204 No Content\r\n"), Some(204));
        for bad in [&b""[..], b"SSH-2.0-x\r\n", b"HTTP/1.1\r\n", b"HTTP/1.1 abc\r\n", b"\xff\xfe"] {
            assert_eq!(status_of(bad), None, "{bad:?}");
        }
    }

    async fn answering(answer: &'static [u8]) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serve = async move {
            while let Ok((mut tcp, _)) = listener.accept().await {
                let _ = tcp.write_all(answer).await;
            }
        };
        #[allow(clippy::disallowed_methods)] // ends with the test's runtime
        tokio::spawn(serve);
        address
    }

    #[tokio::test]
    async fn an_http_check_believes_the_status_alone() {
        let check = HealthCheck { probe: Probe::Http { path: "/healthz".into() }, ..Default::default() };
        assert_eq!(probe(&check, answering(b"HTTP/1.1 200 OK\r\n\r\n").await).await, Ok(()));
        let error = probe(&check, answering(b"HTTP/1.1 503 Busy\r\n\r\n").await).await.unwrap_err();
        assert!(error.contains("/healthz") && error.contains("503"), "{error}");
    }

    #[tokio::test]
    async fn a_silent_or_absent_application_fails_its_check_in_time() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let timeout = Duration::from_millis(50);
        let check = HealthCheck { probe: Probe::Http { path: "/".into() }, timeout, ..Default::default() };
        assert!(probe(&check, address).await.unwrap_err().contains("50 ms"));
        drop(listener);
        assert!(probe(&HealthCheck::default(), address).await.is_err());
    }
}
