//! Network namespaces: made, entered, wired together and removed.
//!
//! A name is `tb-<pid>-<start time of pid>-<n>-<label>`, so that parallel test processes never meet and the namespaces
//! of a dead process can be told from those of a live one even after its process ID was used again.
//! A namespace ends with its [`Namespace`] value; [`reap_stale`] runs before the first one is made and removes what
//! dead test processes left.

mod stale;
mod wiring;

use std::fs::File;
use std::future::Future;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};

pub use stale::reap_stale;
pub use wiring::{VethEnd, veth};

/// Where `ip netns` keeps the mounted namespaces.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// One network namespace with its loopback device up. Dropping it removes it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    handle: NamespaceHandle,
}

/// A cheap, shared way into a namespace; it keeps the kernel's namespace alive but not its name.
#[derive(Debug, Clone)]
pub struct NamespaceHandle(Arc<File>);

impl NamespaceHandle {
    /// Of a namespace by its file, e.g. `/proc/PID/ns/net`.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self(Arc::new(File::open(path).with_context(|| format!("open {}", path.display()))?)))
    }

    /// Moves the calling thread into the namespace for good. Give it a thread of its own.
    pub fn enter(&self) -> std::io::Result<()> {
        setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from)
    }

    /// A multi-thread runtime whose every thread (blocking ones too) is inside the namespace, for a whole role run
    /// in-process. `Runtime::block_on` polls on the caller's thread: use `spawn` for whatever opens sockets.
    pub fn runtime(&self, worker_threads: usize) -> Result<tokio::runtime::Runtime> {
        let handle = self.clone();
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(worker_threads)
            .thread_name("in-netns")
            .enable_all()
            .on_thread_start(move || {
                if let Err(error) = handle.enter() {
                    // A worker outside the namespace would test the wrong network without a word.
                    panic!("a runtime thread could not enter its namespace: {error}");
                }
            })
            .build()
            .context("build a runtime inside a namespace")
    }
}

impl Namespace {
    /// Makes a namespace; `label` shows in its name (letters, digits and `_`).
    pub fn create(label: &str) -> Result<Self> {
        static REAP: Once = Once::new();
        static NEXT: AtomicU64 = AtomicU64::new(0);
        REAP.call_once(reap_stale);
        if label.is_empty()
            || label.len() > 24
            || !label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        {
            bail!("namespace label {label:?}: use 1 to 24 letters, digits and underscores");
        }
        let pid = std::process::id();
        let started = crate::usage::start_time(pid).context("read this process's start time")?;
        let name = format!("tb-{pid}-{started}-{}-{label}", NEXT.fetch_add(1, Ordering::Relaxed));
        run(Command::new("ip").args(["netns", "add", &name]))?;
        let path = format!("{NETNS_DIR}/{name}");
        let file = File::open(&path).with_context(|| format!("open {path}"))?;
        let namespace = Self { name, handle: NamespaceHandle(Arc::new(file)) };
        namespace.ip(&["link", "set", "lo", "up"])?;
        // Where the machine's default is another one, what a test measures must not depend on the machine.
        namespace.set_congestion_control("cubic")?;
        Ok(namespace)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn handle(&self) -> NamespaceHandle {
        self.handle.clone()
    }

    /// Runs `ip -n <this> <args>`.
    pub fn ip(&self, args: &[&str]) -> Result<()> {
        run(Command::new("ip").args(["-n", &self.name]).args(args))
    }

    /// Feeds `ruleset` to `nft -f -` inside the namespace, all or nothing.
    pub fn nft(&self, ruleset: &str) -> Result<()> {
        use std::io::Write as _;
        let mut child = Command::new("ip")
            .args(["netns", "exec", &self.name, "nft", "-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start nft")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(ruleset.as_bytes()).context("write the ruleset to nft")?;
        }
        let output = child.wait_with_output().context("wait for nft")?;
        if !output.status.success() {
            bail!("nft in {}: {}", self.name, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Sets a `net.*` sysctl of this namespace only.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        if !key.starts_with("net.") {
            bail!("sysctl {key}: only net.* belongs to a network namespace");
        }
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        self.run(|| std::fs::write(&path, value).with_context(|| format!("set {key} to {value}")))?
    }

    /// Sets the congestion control of TCP connections made here from now on (`cubic`, `bbr`, `reno`).
    ///
    /// The kernel lets a namespace choose only among the machine's *allowed* algorithms, which are the machine's
    /// default and `reno` unless told otherwise. One that is missing is added to that list, the only setting outside
    /// its own namespaces that the harness touches: it changes nothing for anyone who does not ask for it.
    pub fn set_congestion_control(&self, algorithm: &str) -> Result<()> {
        const KEY: &str = "net.ipv4.tcp_congestion_control";
        const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
        if self.sysctl(KEY, algorithm).is_ok() {
            return Ok(());
        }
        let allowed = std::fs::read_to_string(ALLOWED).with_context(|| format!("read {ALLOWED}"))?;
        std::fs::write(ALLOWED, format!("{} {algorithm}", allowed.trim()))
            .with_context(|| format!("allow the congestion control {algorithm}"))?;
        self.sysctl(KEY, algorithm)
    }

    /// Runs `work` on a thread of its own inside the namespace. Sockets it opens stay in the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.handle.enter().with_context(|| format!("enter namespace {}", self.name))?;
                    Ok(work())
                })
                .join()
                .map_err(|panic| {
                    anyhow!("work in namespace {} panicked: {}", self.name, panic_text(&panic))
                })?
        })
    }

    /// Runs a future to its end on a current-thread runtime of its own inside the namespace.
    pub fn block_on<T, Fut>(&self, make: impl FnOnce() -> Fut + Send) -> Result<T>
    where
        T: Send,
        Fut: Future<Output = T>,
    {
        self.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("build a runtime")?;
            Ok(runtime.block_on(make()))
        })?
    }

    /// As [`NamespaceHandle::runtime`].
    pub fn runtime(&self, worker_threads: usize) -> Result<tokio::runtime::Runtime> {
        self.handle.runtime(worker_threads)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("ip").args(["netns", "del", &self.name])) {
            tracing::warn!(namespace = %self.name, "could not remove a namespace: {error:#}");
        }
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "no message".to_owned())
}

/// Runs a short command to its end; its standard error becomes the error's text.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
