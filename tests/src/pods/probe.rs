//! Probes: what is asked, how often, and how many answers make a verdict. The streak is pure; asking is real: connections
//! come from the node, commands run in the container.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use k8s_openapi::api::core::v1::{self as core, Container, HTTPGetAction, LifecycleHandler};
use tokio::process::Command;

use super::plan::{Refusal, port};

/// What is asked of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Http { host: Option<String>, port: u16, path: String, tls: bool, headers: Vec<(String, String)> },
    Tcp { host: Option<String>, port: u16 },
    Exec(Vec<String>),
    Sleep(Duration),
}

/// A probe with its defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    pub action: Action,
    pub delay: Duration,
    pub period: Duration,
    pub timeout: Duration,
    pub successes: u32,
    pub failures: u32,
}

impl Probe {
    pub fn of(probe: &core::Probe, container: &Container) -> Result<Self, Refusal> {
        let action = if let Some(http) = &probe.http_get {
            http_action(http, container)?
        } else if let Some(tcp) = &probe.tcp_socket {
            Action::Tcp { host: tcp.host.clone(), port: port(container, &tcp.port)? }
        } else if let Some(exec) = &probe.exec {
            Action::Exec(exec.command.clone().unwrap_or_default())
        } else {
            return Err(unknown(container));
        };
        let number = |value: Option<i32>, default: u32| {
            value.and_then(|value| u32::try_from(value).ok()).filter(|value| *value > 0).unwrap_or(default)
        };
        let seconds = |value, default| Duration::from_secs(number(value, default).into());
        Ok(Self {
            action,
            delay: seconds(probe.initial_delay_seconds, 0),
            period: seconds(probe.period_seconds, 10),
            timeout: seconds(probe.timeout_seconds, 1),
            successes: number(probe.success_threshold, 1),
            failures: number(probe.failure_threshold, 3),
        })
    }
}

impl Action {
    pub fn of_hook(hook: &LifecycleHandler, container: &Container) -> Result<Self, Refusal> {
        if let Some(exec) = &hook.exec {
            return Ok(Self::Exec(exec.command.clone().unwrap_or_default()));
        }
        if let Some(sleep) = &hook.sleep {
            return Ok(Self::Sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))));
        }
        http_action(hook.http_get.as_ref().ok_or_else(|| unknown(container))?, container)
    }

    /// Whether it goes well within `limit`; what was wrong with it. `address` is the pod's, `enter` a program with
    /// arguments that runs what follows in the container.
    pub async fn ask(&self, address: IpAddr, enter: &[String], limit: Duration) -> Result<(), String> {
        let asked = async {
            match self {
                Self::Sleep(time) => {
                    tokio::time::sleep(*time).await;
                    Ok(())
                }
                Self::Tcp { host, port } => {
                    let to = target(host.as_deref(), address, *port);
                    tokio::net::TcpStream::connect(&to)
                        .await
                        .map(drop)
                        .map_err(|e| format!("connect to {to}: {e}"))
                }
                Self::Exec(command) => run(&[enter, command].concat()).await.map(drop),
                Self::Http { host, port, path, tls, headers } => {
                    let scheme = if *tls { "https" } else { "http" };
                    let url = format!("{scheme}://{}{path}", target(host.as_deref(), address, *port));
                    let fixed = [
                        "curl",
                        "--silent",
                        "--show-error",
                        "--insecure",
                        "--noproxy",
                        "*",
                        "--output",
                        "/dev/null",
                    ];
                    let mut words: Vec<String> = fixed.into_iter().map(str::to_owned).collect();
                    words.extend([
                        "--write-out".into(),
                        "%{http_code}".into(),
                        "--user-agent".into(),
                        "kube-probe/1.37".into(),
                    ]);
                    for (name, value) in headers {
                        words.extend(["--header".into(), format!("{name}: {value}")]);
                    }
                    words.push(url.clone());
                    let code = run(&words).await?;
                    let good = code.trim().parse::<u16>().is_ok_and(|code| (200..400).contains(&code));
                    if good { Ok(()) } else { Err(format!("{url} answered {code}")) }
                }
            }
        };
        tokio::time::timeout(limit, asked)
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {limit:?}")))
    }
}

fn target(host: Option<&str>, address: IpAddr, port: u16) -> String {
    match host {
        Some(host) if !host.is_empty() => format!("{host}:{port}"),
        _ => SocketAddr::new(address, port).to_string(),
    }
}

/// Its standard output; killed with the future.
async fn run(words: &[String]) -> Result<String, String> {
    let (program, args) = words.split_first().ok_or("no command")?;
    let mut command = Command::new(Path::new(program));
    command.args(args).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.map_err(|e| format!("start {program}: {e}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    Err(format!("{}: {} {}", output.status, text(&output.stdout), text(&output.stderr)))
}

fn http_action(http: &HTTPGetAction, container: &Container) -> Result<Action, Refusal> {
    let headers =
        http.http_headers.iter().flatten().map(|header| (header.name.clone(), header.value.clone()));
    let path = http.path.clone().unwrap_or_default();
    Ok(Action::Http {
        host: http.host.clone(),
        port: port(container, &http.port)?,
        path: if path.starts_with('/') { path } else { format!("/{path}") },
        tls: http.scheme.as_deref() == Some("HTTPS"),
        headers: headers.collect(),
    })
}

fn unknown(container: &Container) -> Refusal {
    Refusal::config(format!(
        "container {} has a probe or hook of a kind that is not known here",
        container.name
    ))
}

/// Answers of one kind in a row, and what they amounted to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Streak {
    last: Option<bool>,
    length: u32,
}

impl Streak {
    /// One more answer: the verdict, when there is one.
    pub fn answered(&mut self, good: bool, probe: &Probe) -> Option<bool> {
        self.length = if self.last == Some(good) { self.length.saturating_add(1) } else { 1 };
        self.last = Some(good);
        let enough = if good { probe.successes } else { probe.failures };
        (self.length >= enough).then_some(good)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_needs_as_many_answers_in_a_row_as_the_probe_says() {
        let probe = serde_json::json!({ "tcpSocket": { "port": 1 }, "failureThreshold": 2 });
        let probe = Probe::of(&serde_json::from_value(probe).unwrap(), &Container::default()).unwrap();
        assert_eq!((probe.period.as_secs(), probe.timeout.as_secs()), (10, 1));
        let mut streak = Streak::default();
        let verdicts: Vec<_> =
            [false, true, false, false, true].map(|good| streak.answered(good, &probe)).into();
        assert_eq!(verdicts, [None, Some(true), None, Some(false), Some(true)]);
    }
}
