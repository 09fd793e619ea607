//! Child processes of a test: each in a process group of its own, optionally inside a namespace, its output in a file.
//!
//! A [`Process`] ends when dropped: SIGTERM to its group, SIGKILL after a grace, both by the group's own ID and never
//! by name. Should the test process itself be killed, the kernel kills the child (parent-death signal). That signal
//! follows the *thread* that started the child, so all children are started from one thread that never ends.

mod spawner;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use crate::netns::{Namespace, NamespaceHandle};
use crate::usage::{self, Usage};

/// How long a process may take to end by itself after SIGTERM. Roles drain within 5 s when idle; tests that watch a
/// longer drain call [`Process::signal`] and [`Process::wait`] themselves.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// How often an exit or a log line is looked for.
const POLL: Duration = Duration::from_millis(10);

/// What to start, and where.
#[derive(Debug, Clone)]
pub struct ProcessSpec {
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    namespace: Option<NamespaceHandle>,
    directory: Option<PathBuf>,
    stop_grace: Duration,
}

impl ProcessSpec {
    /// `name` names the log file and shows in errors.
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            namespace: None,
            directory: None,
            stop_grace: STOP_GRACE,
        }
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Runs inside `namespace` instead of the test's own.
    pub fn within(mut self, namespace: &Namespace) -> Self {
        self.namespace = Some(namespace.handle());
        self
    }

    /// Runs inside the namespace if there is one.
    pub fn within_optional(mut self, namespace: Option<&Namespace>) -> Self {
        self.namespace = namespace.map(Namespace::handle);
        self
    }

    /// Sets the working directory.
    pub fn current_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// How long the process may take to end after SIGTERM before it is killed.
    pub fn stop_grace(mut self, grace: Duration) -> Self {
        self.stop_grace = grace;
        self
    }

    /// Runs it to its end inside `timeout`: what it wrote. Anything but success is an error that shows it.
    pub fn run(self, log_dir: &Path, timeout: Duration) -> Result<String> {
        let (log_dir, name) = (log_dir.join("runs"), self.name.clone());
        std::fs::create_dir_all(&log_dir)?;
        let _ = std::fs::remove_file(log_dir.join(format!("{name}.log")));
        let mut process = self.spawn(&log_dir)?;
        let status = process.wait(timeout)?;
        if !status.success() {
            bail!("{name} ended with {status}\n{}", process.tail());
        }
        Ok(process.log())
    }

    /// Runs it as another user (`setpriv` of util-linux), for servers that refuse to be root.
    pub fn as_user(mut self, user: &str) -> Self {
        let program = std::mem::replace(&mut self.program, "setpriv".into());
        let ids = [format!("--reuid={user}"), format!("--regid={user}"), "--init-groups".to_owned()];
        let before = ids.into_iter().map(OsString::from).chain([program.into_os_string()]);
        self.args.splice(0..0, before);
        self
    }

    /// Starts it; output of both kinds goes to `<log_dir>/<name>.log`, appended.
    pub fn spawn(self, log_dir: &Path) -> Result<Process> {
        let log = log_dir.join(format!("{}.log", self.name));
        let out = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("open {}", log.display()))?;
        let child = spawner::spawn(&self, out)
            .with_context(|| format!("start {} ({})", self.name, self.program.display()))?;
        Ok(Process { name: self.name, pid: child.id(), child, log, stop_grace: self.stop_grace, ended: None })
    }
}

/// A running (or ended, not yet dropped) child process.
#[derive(Debug)]
pub struct Process {
    name: String,
    pid: u32,
    child: Child,
    log: PathBuf,
    stop_grace: Duration,
    ended: Option<ExitStatus>,
}

impl Process {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Everything it has written so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// CPU and memory of the process and its descendants together. `None` once it has ended.
    pub fn usage(&self) -> Option<Usage> {
        let parts: Vec<Usage> = usage::with_descendants(self.pid).into_iter().filter_map(usage::of).collect();
        (!parts.is_empty()).then(|| {
            parts.iter().fold(Usage::default(), |sum, part| Usage {
                cpu: sum.cpu + part.cpu,
                rss_bytes: sum.rss_bytes + part.rss_bytes,
                pss_bytes: sum.pss_bytes + part.pss_bytes,
            })
        })
    }

    /// Signals the process alone (SIGSTOP, SIGCONT, SIGTERM, SIGKILL...).
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if self.ended.is_some() {
            bail!("{} has ended already", self.name);
        }
        kill(raw(self.pid), signal).with_context(|| format!("send {signal} to {}", self.name))
    }

    /// `kill -9` of the whole group, and waits until it is gone.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        if self.ended.is_none() {
            let _ = killpg(raw(self.pid), Signal::SIGKILL);
        }
        self.reap()
    }

    /// SIGTERM, the grace, then SIGKILL for whatever of the group is left. Idempotent.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        let _ = killpg(raw(self.pid), Signal::SIGTERM);
        // A stopped process acts on SIGTERM only once it runs again.
        let _ = killpg(raw(self.pid), Signal::SIGCONT);
        let deadline = Instant::now() + self.stop_grace;
        while !self.has_exited() && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        // The leader is not reaped yet, so its ID still names this group and nothing else.
        let _ = killpg(raw(self.pid), Signal::SIGKILL);
        self.reap()
    }

    /// Waits for it to end by itself.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        while !self.has_exited() {
            if Instant::now() >= deadline {
                bail!("{} still runs after {timeout:?}\n{}", self.name, self.tail());
            }
            std::thread::sleep(POLL);
        }
        self.reap()
    }

    /// Whether it has ended; does not reap.
    pub fn has_exited(&self) -> bool {
        if self.ended.is_some() {
            return true;
        }
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        !matches!(waitid(Id::Pid(raw(self.pid)), flags), Ok(WaitStatus::StillAlive))
    }

    /// Waits until its output holds `needle`; fails early when it ends first.
    pub fn wait_for_log(&self, needle: &str, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            // Asked first: what was written before the exit must still be looked at.
            let exited = self.has_exited();
            if self.log().contains(needle) {
                return Ok(());
            }
            if exited {
                bail!("{} ended before it wrote {needle:?}\n{}", self.name, self.tail());
            }
            if Instant::now() >= deadline {
                bail!("{} did not write {needle:?} within {timeout:?}\n{}", self.name, self.tail());
            }
            std::thread::sleep(POLL);
        }
    }

    /// The last lines of its output, for error messages.
    pub fn tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n")
    }

    fn reap(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        let status = self.child.wait().with_context(|| format!("wait for {}", self.name))?;
        self.ended = Some(status);
        if let Some(signal) = status.signal() {
            tracing::debug!(process = %self.name, signal, "ended by a signal");
        }
        Ok(status)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

fn raw(pid: u32) -> Pid {
    // Process IDs are at most 2^22 on Linux.
    Pid::from_raw(pid as i32)
}
