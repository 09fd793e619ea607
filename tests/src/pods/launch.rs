//! A container's process: started by the node as the first one of a process namespace ([`start`]), it makes itself at home
//! ([`run`]) and becomes the container's program.
//!
//! Each has a thread of the node's that starts it, waits for it, and whose end is its end: the kernel kills a first process,
//! and with it its whole namespace, when the thread that started it is gone.

use std::fs::{self, File};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns, unshare};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::privileges::Privileges;
use super::root::Root;

/// What a shell would look in.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A container's first process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Launch {
    /// File of the network namespace.
    pub network: PathBuf,
    pub hostname: String,
    pub root: Root,
    pub command_line: Vec<String>,
    pub env: Vec<(String, String)>,
    pub directory: String,
    pub privileges: Privileges,
}

/// One that runs.
pub struct Started {
    /// Of the first process.
    pub pid: i32,
    /// Its end, once.
    pub ended: oneshot::Receiver<ExitStatus>,
}

/// The code that a container's status has: of one killed by a signal, 128 and its number.
pub fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Starts it; `plan` is a file to hand it over by, `log` takes its output.
pub fn start(launch: &Launch, plan: &Path, log: &Path) -> Result<Started> {
    fs::write(plan, serde_json::to_vec(launch)?).with_context(|| format!("write {}", plan.display()))?;
    fs::create_dir_all(&launch.root.base)?;
    let out = File::options().create(true).append(true).open(log).context("open the log")?;
    // Not by its path: another build may be there by now.
    let mut command = Command::new("/proc/self/exe");
    command.arg("launch").arg(plan).env_clear().stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
    let prepare = || {
        nix::unistd::setsid()?;
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes only async-signal-safe system calls and allocates nothing.
    unsafe { command.pre_exec(prepare) };
    let (told, ended) = oneshot::channel();
    let (reply, answer) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().name("container".into()).stack_size(128 << 10);
    thread.spawn(move || {
        // Of this thread's children, from now on; it starts one.
        let spawned =
            unshare(CloneFlags::CLONE_NEWPID).map_err(std::io::Error::from).and_then(|()| command.spawn());
        match spawned {
            Ok(mut child) => {
                let _ = reply.send(Ok(child.id()));
                if let Ok(status) = child.wait() {
                    let _ = told.send(status);
                }
            }
            Err(error) => drop(reply.send(Err(error))),
        }
    })?;
    let pid = answer.recv().context("the container's thread has ended")?.context("start the container")?;
    Ok(Started { pid: i32::try_from(pid)?, ended })
}

/// In the new process: makes it the container's. Comes back only with an error.
pub fn run(plan: &Path) -> Result<std::convert::Infallible> {
    let launch: Launch = serde_json::from_slice(&fs::read(plan)?)?;
    let network =
        File::open(&launch.network).with_context(|| format!("open {}", launch.network.display()))?;
    setns(network, CloneFlags::CLONE_NEWNET).context("enter the pod's network")?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC)?;
    // SAFETY: the kernel reads as many bytes as it is told, of a string that outlives the call.
    if unsafe { libc::sethostname(launch.hostname.as_ptr().cast(), launch.hostname.len()) } != 0 {
        return Err(std::io::Error::last_os_error()).context("set the host name");
    }
    launch.root.enter()?;
    let _ = fs::create_dir_all(&launch.directory);
    Err(launch.exec(&launch.command_line))
}

impl Launch {
    /// Becomes `command_line` with the container's environment and privileges; the reason why not.
    pub fn exec(&self, command_line: &[String]) -> anyhow::Error {
        let setpriv = self.privileges.setpriv();
        let Some((program, options)) = setpriv.split_first() else { return anyhow::anyhow!("no setpriv") };
        let mut command = Command::new(program);
        command.args(options).args(command_line).env_clear().env("PATH", PATH).env("HOME", "/");
        command.env("HOSTNAME", &self.hostname).current_dir(&self.directory);
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        anyhow::Error::new(command.exec()).context(format!("run {}", command_line.join(" ")))
    }
}
