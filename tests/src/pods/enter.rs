//! A command in a container that runs: what `kubectl exec` and probes do.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use serde::{Deserialize, Serialize};

use super::launch::Launch;

/// A container that runs, in a file of the node's directory.
#[derive(Debug, Serialize, Deserialize)]
pub struct Inside {
    pub pid: i32,
    pub launch: Launch,
}

/// Of a pod's containers.
pub fn directory(node: &Path, namespace: &str, pod: &str) -> PathBuf {
    node.join("running").join(format!("{namespace}_{pod}"))
}

/// Where what a pod that is gone has said stays.
pub fn ended(node: &Path, namespace: &str, pod: &str, when: &str) -> PathBuf {
    node.join("ended").join(format!("{namespace}_{pod}_{when}"))
}

/// Runs the command line to its end there: its exit code. Called in a process of its own with one thread. An empty
/// `container` is any of the pod's, and of that the network alone.
pub fn enter(node: &Path, pod: &str, container: &str, command_line: &[String]) -> Result<i32> {
    let (namespace, name) = pod.split_once('/').context("--pod is NAMESPACE/NAME")?;
    for part in [namespace, name, container] {
        ensure!(!part.contains(['/', '\\']) && part != "..", "{part} is no name");
    }
    let dir = directory(node, namespace, name);
    let path = if container.is_empty() { any(&dir)? } else { dir.join(format!("{container}.json")) };
    let text = fs::read(&path).with_context(|| format!("container {container:?} of {pod} does not run"))?;
    let inside: Inside = serde_json::from_slice(&text)?;
    let namespaces: &[(&str, CloneFlags)] = if container.is_empty() {
        &[("net", CloneFlags::CLONE_NEWNET)]
    } else {
        &[
            ("net", CloneFlags::CLONE_NEWNET),
            ("uts", CloneFlags::CLONE_NEWUTS),
            ("ipc", CloneFlags::CLONE_NEWIPC),
            ("pid", CloneFlags::CLONE_NEWPID),
            ("mnt", CloneFlags::CLONE_NEWNS),
        ]
    };
    // All are opened before the first is entered: /proc is another one inside.
    let open = |(name, flag): &(&str, CloneFlags)| {
        let path = format!("/proc/{}/ns/{name}", inside.pid);
        Ok((
            File::open(&path).with_context(|| format!("container {container:?} of {pod} does not run"))?,
            *flag,
        ))
    };
    let opened: Vec<(File, CloneFlags)> = namespaces.iter().map(open).collect::<Result<_>>()?;
    for (file, flag) in opened {
        setns(file, flag).context("enter a namespace of the container")?;
    }
    let parent = nix::unistd::getpid();
    // SAFETY: the process has one thread, so its child may do whatever it likes.
    match unsafe { fork() }? {
        ForkResult::Child => {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            let error = if container.is_empty() {
                let mut words = command_line.iter();
                let mut command = std::process::Command::new(words.next().context("no command")?);
                anyhow::Error::new(std::os::unix::process::CommandExt::exec(command.args(words)))
            } else {
                inside.launch.exec(command_line)
            };
            bail!("{error:#}")
        }
        ForkResult::Parent { child } => {
            tracing::debug!(%parent, %child, "entered");
            match waitpid(child, None)? {
                WaitStatus::Exited(_, code) => Ok(code),
                WaitStatus::Signaled(_, signal, _) => Ok(128 + signal as i32),
                other => bail!("the command ended with {other:?}"),
            }
        }
    }
}

fn any(dir: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).context("the pod does not run")?.flatten().map(|entry| entry.path());
    let mut files = entries.filter(|path| path.extension().is_some_and(|end| end == "json"));
    files.next().context("no container of the pod runs")
}
