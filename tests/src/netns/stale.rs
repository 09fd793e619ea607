//! Removal of namespaces whose test process is gone without having dropped them (killed, aborted).
//!
//! The owner is alive only if its process ID exists *and* started when the name says: anything else is stale. What
//! still runs inside a stale namespace was started by the dead test and is killed by its process ID.

use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{NETNS_DIR, run};

/// Removes every stale `tb-*` namespace. Never touches a namespace that a live process owns or that is not ours.
pub fn reap_stale() {
    let Ok(entries) = std::fs::read_dir(NETNS_DIR) else { return };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let Some((pid, started)) = owner(&name) else { continue };
        if crate::usage::start_time(pid).is_some_and(|actual| actual == started) {
            continue;
        }
        for pid in pids_inside(&name) {
            let _ = kill(pid, Signal::SIGKILL);
        }
        if let Err(error) = run(Command::new("ip").args(["netns", "del", &name])) {
            tracing::warn!(namespace = %name, "could not remove a stale namespace: {error:#}");
        }
    }
}

/// `(process ID, its start time)` from a name of ours.
fn owner(name: &str) -> Option<(u32, u64)> {
    let mut parts = name.strip_prefix("tb-")?.splitn(4, '-');
    let pid = parts.next()?.parse().ok()?;
    let started = parts.next()?.parse().ok()?;
    parts.next()?.parse::<u64>().ok()?;
    parts.next()?;
    Some((pid, started))
}

fn pids_inside(name: &str) -> Vec<Pid> {
    let Ok(output) = Command::new("ip").args(["netns", "pids", name]).output() else { return Vec::new() };
    String::from_utf8_lossy(&output.stdout)
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .map(Pid::from_raw)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::owner;

    #[test]
    fn only_a_complete_name_of_ours_has_an_owner() {
        assert_eq!(owner("tb-12-3456-0-east"), Some((12, 3456)));
        for foreign in
            ["east", "tb-12", "tb-x-1-0-a", "tb-1-x-0-a", "tb-1-2-x-a", "tb-1-2-3", "cni-12-34-5-x"]
        {
            assert_eq!(owner(foreign), None, "{foreign}");
        }
    }
}
