//! Walks the plan: runs its commands, starts its processes, waits until they are ready, and ends them.

use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::time::Instant;

use super::http;
use super::plan::{Plan, Step};
use super::progress::Progress;
use super::supervisor::Supervisor;
use super::workspace::Workspace;
use crate::failure::Failure;

/// A command of the demo answers in well under a second; linking crosses both federators.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);
/// Starting is a second or two; a loaded machine gets more.
const READY_LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
/// A readiness answer over loopback that takes longer is asked for again.
const PROBE_LIMIT: Duration = Duration::from_secs(1);

/// The running demo.
pub struct Stage {
    pub plan: Plan,
    pub supervisor: Supervisor,
    pub workspace: Workspace,
}

impl Stage {
    pub fn new(plan: Plan, workspace: Workspace) -> Result<Self, Failure> {
        let program = std::env::current_exe().map_err(|e| Failure::new(e).at("finding this program"))?;
        Ok(Self { plan, supervisor: Supervisor::new(program), workspace })
    }

    /// Brings everything up.
    pub async fn up(&mut self, progress: &Progress) -> Result<(), Failure> {
        for step in self.plan.steps.clone() {
            match step {
                Step::Run { what, args, stdin, stdout } => {
                    progress.doing(&what);
                    self.run(&args, stdin.as_deref(), stdout.as_deref()).await.map_err(|f| f.at(&what))?;
                    progress.done(&what);
                }
                Step::Write { path, text } => {
                    std::fs::write(&path, text).map_err(|e| Failure::new(e).at(path.display()))?;
                }
                Step::Start(process) => self.supervisor.start(&process)?,
                Step::Ready { what, names } => {
                    for name in &names {
                        self.ready(name, progress).await?;
                    }
                    progress.done(&format!("{what} ready"));
                }
            }
        }
        Ok(())
    }

    async fn run(&self, args: &[String], stdin: Option<&Path>, stdout: Option<&Path>) -> Result<(), Failure> {
        let failed = |e: std::io::Error| Failure::new(format_args!("tombolo {}: {e}", args.join(" ")));
        let mut command = self.supervisor.command(args);
        let input = stdin.map(std::fs::File::open).transpose().map_err(failed)?;
        command
            .stdin(input.map_or_else(Stdio::null, Stdio::from))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let output = command.spawn().map_err(failed)?.wait_with_output();
        let output = tokio::time::timeout(COMMAND_LIMIT, output)
            .await
            .map_err(|_| {
                Failure::timed_out(format_args!("tombolo {} took over {COMMAND_LIMIT:?}", args.join(" ")))
            })?
            .map_err(failed)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(Failure::new(format_args!(
                "tombolo {} ended with {}:\n{}",
                args.join(" "),
                output.status,
                said.trim()
            )));
        }
        if let Some(path) = stdout {
            // Tokens are secrets.
            let file =
                std::fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path);
            file.and_then(|mut file| file.write_all(&output.stdout))
                .map_err(|e| Failure::new(e).at(path.display()))?;
        }
        Ok(())
    }

    /// Waits until a process says it is ready; fails as soon as any process has died.
    pub async fn ready(&mut self, name: &str, progress: &Progress) -> Result<(), Failure> {
        let Some(process) = self.plan.process(name).cloned() else {
            return Err(Failure::new(format_args!("the plan has no process {name}")));
        };
        let deadline = Instant::now() + READY_LIMIT;
        loop {
            let dead = self.supervisor.casualties();
            if !dead.is_empty() {
                return Err(Failure::new(dead.join("\n"))
                    .remedy("the lines above say why; a taken address is avoided with --loopback 127.1"));
            }
            let state = match readiness(process.ready).await {
                Ok(None) => return Ok(()),
                Ok(Some(blockers)) => format!("waiting for {blockers}"),
                Err(error) => error,
            };
            if Instant::now() > deadline {
                let tail = super::supervisor::tail(&process.log);
                return Err(Failure::timed_out(format_args!(
                    "{name} is not ready after {READY_LIMIT:?}: {state}; its log ends with:\n{tail}"
                )));
            }
            progress.doing(&format!("{name}: {state}"));
            tokio::time::sleep(POLL).await;
        }
    }

    /// Starts a process of the plan again.
    pub async fn restart(&mut self, name: &str, progress: &Progress) -> Result<(), Failure> {
        if let Some(process) = self.plan.process(name).cloned() {
            self.supervisor.start(&process)?;
        }
        self.ready(name, progress).await
    }

    /// Starts whatever is not running.
    pub async fn bring_back(&mut self, progress: &Progress) -> Result<(), Failure> {
        let _ = self.supervisor.casualties();
        let dead: Vec<_> =
            self.plan.processes().filter(|p| self.supervisor.pid(&p.name).is_none()).cloned().collect();
        for process in &dead {
            self.supervisor.start(process)?;
        }
        for process in &dead {
            self.ready(&process.name, progress).await?;
            progress.line(&format!("{} is back", process.name));
        }
        Ok(())
    }

    /// Ends everything; the directory goes with the stage.
    pub async fn down(mut self) {
        self.supervisor.stop().await;
    }
}

/// `None` when ready, else what is waited for.
async fn readiness(address: SocketAddr) -> Result<Option<String>, String> {
    let answer = http::get(address, "/ready", PROBE_LIMIT).await?;
    if answer.status == 200 {
        return Ok(None);
    }
    let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    let blockers = body.get("blockedBy").and_then(|b| b.as_array()).into_iter().flatten();
    let names: Vec<_> = blockers.filter_map(serde_json::Value::as_str).collect();
    Ok(Some(if names.is_empty() { format!("status {}", answer.status) } else { names.join(", ") }))
}
