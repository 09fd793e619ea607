//! Owns the demo's child processes: starts them in groups of their own, notices when one dies, ends all of them.
//!
//! Ctrl-C at a terminal reaches only the demo, which ends its children in order; should the demo itself be killed, the
//! kernel kills them (PR_SET_PDEATHSIG). That signal follows the *thread* that forked, so children are started from the
//! main thread only, which the demo's one-thread runtime keeps to.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use super::plan::Process;
use crate::failure::Failure;

/// Time for a graceful end; a role drains for less than this when it has nothing open.
const PATIENCE: Duration = Duration::from_secs(5);

struct Running {
    child: Child,
    process: Process,
    order: usize,
}

/// Every process that the demo has started and not yet seen end.
pub struct Supervisor {
    program: PathBuf,
    running: BTreeMap<String, Running>,
    started: usize,
}

impl Supervisor {
    pub fn new(program: PathBuf) -> Self {
        Self { program, running: BTreeMap::new(), started: 0 }
    }

    pub fn program(&self) -> &Path {
        &self.program
    }

    /// A command of this binary, as the demo runs all of them.
    pub fn command(&self, args: &[String]) -> Command {
        let mut command = std::process::Command::new(&self.program);
        command.args(args).process_group(0);
        // The operator's own settings are not the demo's.
        for name in
            ["TOMBOLO_CONTEXT", "TOMBOLO_SOCKET", "TOMBOLO_CONFIG", "TOMBOLO_NAMESPACE", "TOMBOLO_OUTPUT"]
        {
            command.env_remove(name);
        }
        let parent = Pid::this();
        // SAFETY: between fork and exec only async-signal-safe calls are made: prctl and getppid.
        unsafe {
            command.pre_exec(move || {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                // The parent may have died before the call above.
                if nix::unistd::getppid() != parent {
                    Err(std::io::ErrorKind::BrokenPipe.into())
                } else {
                    Ok(())
                }
            });
        }
        let mut command = Command::from(command);
        command.kill_on_drop(true);
        command
    }

    /// Starts a process; its output is appended to its log.
    pub fn start(&mut self, process: &Process) -> Result<(), Failure> {
        let failed = |e: std::io::Error| Failure::new(e).at(format_args!("starting {}", process.name));
        let log =
            OpenOptions::new().create(true).append(true).mode(0o600).open(&process.log).map_err(failed)?;
        let mut command = self.command(&process.args);
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(failed)?).stderr(log);
        let child = command.spawn().map_err(failed)?;
        self.started += 1;
        let running = Running { child, process: process.clone(), order: self.started };
        self.running.insert(process.name.clone(), running);
        Ok(())
    }

    pub fn pid(&self, name: &str) -> Option<u32> {
        self.running.get(name)?.child.id()
    }

    /// Kills a process at once (SIGKILL) and waits for its end.
    pub async fn kill(&mut self, name: &str) -> Result<(), Failure> {
        let Some(mut running) = self.running.remove(name) else {
            return Err(Failure::new(format_args!("{name} is not running")));
        };
        running.child.kill().await.map_err(|e| Failure::new(e).at(format_args!("killing {name}")))
    }

    /// Whoever ended without being asked to, with the end of its log.
    pub fn casualties(&mut self) -> Vec<String> {
        let mut dead = Vec::new();
        self.running.retain(|name, running| match running.child.try_wait() {
            Ok(Some(status)) => {
                dead.push(format!(
                    "{name} ended ({status}); its log ends with:\n{}",
                    tail(&running.process.log)
                ));
                false
            }
            _ => true,
        });
        dead
    }

    /// Ends everything, the last started first, and waits until all are gone.
    pub async fn stop(&mut self) {
        let mut running: Vec<_> = std::mem::take(&mut self.running).into_values().collect();
        running.sort_by_key(|r| std::cmp::Reverse(r.order));
        for one in &running {
            signal(&one.child, Signal::SIGTERM);
        }
        let deadline = tokio::time::Instant::now() + PATIENCE;
        for mut one in running {
            if tokio::time::timeout_at(deadline, one.child.wait()).await.is_err() {
                let _ = one.child.kill().await;
            }
        }
    }
}

fn signal(child: &Child, signal: Signal) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// The last lines of a log.
pub fn tail(log: &Path) -> String {
    const LINES: usize = 8;
    let text =
        std::fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    let from = lines.len().saturating_sub(LINES);
    lines.iter().skip(from).map(|line| format!("    {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(name: &str, log: PathBuf, seconds: &str) -> Process {
        Process {
            name: name.to_owned(),
            args: vec![seconds.to_owned()],
            ready: ([127, 0, 0, 1], 1).into(),
            log,
        }
    }

    #[tokio::test]
    async fn a_process_that_ends_by_itself_is_noticed_and_the_rest_is_ended() {
        let log = std::env::temp_dir().join(format!("tombolo-supervisor-{}.log", std::process::id()));
        let mut supervisor = Supervisor::new("/bin/sleep".into());
        supervisor.start(&sleeper("long", log.clone(), "600")).unwrap();
        supervisor.start(&sleeper("wrong", log.clone(), "not-a-number")).unwrap();
        let pid = i32::try_from(supervisor.pid("long").unwrap()).unwrap();
        let dead = loop {
            let dead = supervisor.casualties();
            if !dead.is_empty() {
                break dead;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        assert!(dead.len() == 1 && dead[0].contains("wrong") && dead[0].contains("not-a-number"), "{dead:?}");
        supervisor.stop().await;
        std::fs::remove_file(&log).unwrap();
        assert_eq!(kill(Pid::from_raw(pid), None), Err(nix::errno::Errno::ESRCH));
    }
}
