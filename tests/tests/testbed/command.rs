//! `tombolo-testbed up` as a person uses it: what it prints works; SIGTERM, and the next start after SIGKILL, leave nothing.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tombolo_tests::capability::require_netns;
use tombolo_tests::process::{Process, ProcessSpec};
use tombolo_tests::testbed::{Programs, eventually};

const READY: Duration = Duration::from_secs(120);

fn up(programs: &Programs, name: &str, logs: &Path) -> Result<Process> {
    let spec = ProcessSpec::new(name, programs.testbed()).args(["up", "--bare", "--clusters", "1"]);
    let process = spec.stop_grace(Duration::from_secs(20)).spawn(logs)?;
    process.wait_for_log("It stays until Ctrl-C", READY)?;
    Ok(process)
}

/// Namespaces and directories of a process.
fn left(pid: u32) -> Result<Vec<String>> {
    let named = |dir: &Path, start: String| -> Result<Vec<String>> {
        let names =
            std::fs::read_dir(dir)?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        Ok(names.filter(|name| name.starts_with(&start)).collect())
    };
    let namespaces = named(Path::new("/run/netns"), format!("tb-{pid}-"))?;
    Ok([namespaces, named(&std::env::temp_dir(), format!("tombolo-testbed-{pid}-"))?].concat())
}

/// Programs that run below a directory of the process's.
fn running(pid: u32) -> Result<String> {
    let output = Command::new("pgrep").args(["-af", &format!("tombolo-testbed-{pid}-")]).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn the_command_leaves_nothing_behind_even_when_it_was_killed() -> Result<()> {
    let test = "the_command_leaves_nothing_behind_even_when_it_was_killed";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let Some(programs) = Programs::require(test) else { return Ok(()) };
    let logs = tempfile::tempdir()?;
    let mut killed = up(&programs, "killed", logs.path())?;
    let line = |log: &str| log.lines().find_map(|line| line.strip_prefix("KUBECONFIG=").map(str::to_owned));
    let kubeconfig = line(&killed.log()).context("no kubeconfig was printed")?;
    let kubectl = Command::new(&programs.kubectl)
        .args(["--kubeconfig", &kubeconfig, "--context", "east", "get", "nodes"])
        .output()?;
    ensure!(String::from_utf8_lossy(&kubectl.stdout).contains("east-1   Ready"), "{kubectl:?}");
    let pid = killed.pid();
    ensure!(left(pid)?.len() > 2, "{:?}", left(pid)?);
    killed.signal(Signal::SIGKILL)?;
    killed.wait(READY)?;
    eventually("everything that it had started has ended", Duration::from_secs(10), || {
        let running = running(pid)?;
        ensure!(running.is_empty(), "{running}");
        Ok(())
    })?;
    let mut next = up(&programs, "next", logs.path())?;
    ensure!(left(pid)?.is_empty(), "the next one leaves {:?}", left(pid)?);
    let pid = next.pid();
    let status = next.stop()?;
    ensure!(status.success(), "{status}: {}", next.tail());
    ensure!(
        left(pid)?.is_empty() && running(pid)?.is_empty(),
        "it leaves {:?} {}",
        left(pid)?,
        running(pid)?
    );
    Ok(())
}
