//! A health check by a program of the machine. It runs with an environment of its own (`PATH` alone), reads nothing, and
//! its whole process group is killed when the check is given up, so that one that hangs leaves nothing behind.

use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

/// What a check says about its failure is a line for people.
const MAX_SAID_BYTES: u64 = 200;
/// Nothing but the pipe's contents is waited for.
const LAST_WORDS: Duration = Duration::from_millis(100);
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Kills the group when the future that waits for it is dropped.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

/// Runs the program to its end; the caller bounds the time.
pub(super) async fn check(command: &[String]) -> Result<(), String> {
    let (program, args) = command.split_first().ok_or("there is no program to run")?;
    let mut starting = Command::new(program);
    starting.args(args).env_clear().env("PATH", PATH).current_dir("/");
    starting.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    starting.process_group(0).kill_on_drop(true);
    let mut child = starting.spawn().map_err(|error| format!("{program} can't be run: {error}"))?;
    let group = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
    let group = Group(group);
    let stderr = child.stderr.take();
    let said = async {
        let mut said = Vec::new();
        if let Some(stderr) = stderr {
            let mut limited = stderr.take(MAX_SAID_BYTES);
            let _ = limited.read_to_end(&mut said).await;
            // Whoever writes more must not be held up, nor fail for it.
            let _ = tokio::io::copy(&mut limited.into_inner(), &mut tokio::io::sink()).await;
        }
        said
    };
    tokio::pin!(said);
    // What it has started itself may keep its standard error open: only its own end counts.
    let mut heard = None;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status.map_err(|error| error.to_string())?,
            bytes = &mut said, if heard.is_none() => heard = Some(bytes),
        }
    };
    // What it has left running ends with it.
    drop(group);
    // What it said last may still be in the pipe.
    let heard = match heard {
        Some(bytes) => bytes,
        None => tokio::time::timeout(LAST_WORDS, said).await.unwrap_or_default(),
    };
    judge(program, status, &heard)
}

fn judge(program: &str, status: ExitStatus, said: &[u8]) -> Result<(), String> {
    if status.success() {
        return Ok(());
    }
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with {code}"),
        (None, signal) => format!("was killed by signal {}", signal.unwrap_or_default()),
    };
    let said = String::from_utf8_lossy(said);
    let line = said.lines().find(|line| !line.trim().is_empty()).unwrap_or_default().trim();
    let line: String = line.chars().filter(|c| !c.is_control()).collect();
    Err(if line.is_empty() { format!("{program} {how}") } else { format!("{program} {how}: {line}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(parts: &[&str]) -> Vec<String> {
        parts.iter().map(|part| (*part).to_owned()).collect()
    }

    #[tokio::test]
    async fn a_program_is_believed_by_its_exit_status_and_quoted_when_it_fails() {
        assert_eq!(check(&command(&["/bin/true"])).await, Ok(()));
        let failed = check(&command(&["/bin/sh", "-c", "echo no primary >&2; exit 3"])).await.unwrap_err();
        assert!(failed.contains("ended with 3") && failed.contains("no primary"), "{failed}");
        let absent = check(&command(&["/nonexistent/check"])).await.unwrap_err();
        assert!(absent.contains("/nonexistent/check"), "{absent}");
    }

    #[tokio::test]
    async fn arguments_are_not_a_shells_and_the_environment_is_not_ours() {
        let literal = check(&command(&["/usr/bin/test", "$PATH", "=", "$PATH"])).await;
        assert_eq!(literal, Ok(()));
        let foreign = check(&command(&["/bin/sh", "-c", "test -z \"$HOME$CARGO_PKG_NAME\""])).await;
        assert_eq!(foreign, Ok(()));
    }

    #[tokio::test]
    async fn one_that_hangs_is_killed_with_all_that_it_has_started() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("alive");
        let script = format!("(sleep 1; touch {}) & sleep 60", mark.display());
        let hanging = command(&["/bin/sh", "-c", &script]);
        let given_up = tokio::time::timeout(Duration::from_millis(200), check(&hanging)).await;
        assert!(given_up.is_err());
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(!mark.exists(), "its child went on");
    }
}
