//! What a process used so far, read from `/proc`: CPU time, resident and proportional memory.

use std::time::Duration;

/// Consumption of one process at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// User and system time of all its threads, live and ended.
    pub cpu: Duration,
    pub rss_bytes: u64,
    /// Resident memory with each shared page split among its users; equals RSS where the kernel does not tell.
    pub pss_bytes: u64,
}

/// `None` when the process is gone.
pub fn of(pid: u32) -> Option<Usage> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields = after_command_name(&stat);
    // proc(5): utime and stime are fields 14 and 15 of the line, 12th and 13th after the command's name.
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    let memory = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let rss_bytes = kilobytes(&memory, "Rss:").unwrap_or(0);
    Some(Usage {
        cpu: Duration::from_nanos(ticks.saturating_mul(1_000_000_000 / ticks_per_second())),
        rss_bytes,
        pss_bytes: kilobytes(&memory, "Pss:").unwrap_or(rss_bytes),
    })
}

/// Memory that a process has made itself: without pages of its program's file, which come in as code first runs.
pub fn anonymous_bytes(pid: u32) -> Option<u64> {
    kilobytes(&std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?, "Anonymous:")
}

/// Resident memory of a process, as the kernel counts it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Memory {
    pub rss_bytes: u64,
    /// What it has made itself: RSS without its program's file.
    pub anonymous_bytes: u64,
    /// The most that RSS has been since the start.
    pub peak_bytes: u64,
}

/// `None` when the process is gone.
pub fn memory(pid: u32) -> Option<Memory> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(Memory {
        rss_bytes: kilobytes(&status, "VmRSS:")?,
        anonymous_bytes: kilobytes(&status, "RssAnon:")?,
        peak_bytes: kilobytes(&status, "VmHWM:")?,
    })
}

/// CPU time only; cheaper than [`of`], which walks every mapping.
pub fn cpu(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields = after_command_name(&stat);
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(Duration::from_nanos(ticks.saturating_mul(1_000_000_000 / ticks_per_second())))
}

/// When the process started, in clock ticks since boot. With the process ID it names a process for good.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    after_command_name(&stat).get(19)?.parse().ok()
}

/// `pid` and all its living descendants: a master process's workers are part of it.
pub fn with_descendants(pid: u32) -> Vec<u32> {
    let mut parents = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(child) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{child}/stat")) else { continue };
        if let Some(parent) = after_command_name(&stat).get(1).and_then(|field| field.parse::<u32>().ok()) {
            parents.push((child, parent));
        }
    }
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(
            parents.iter().filter(|(child, of)| *of == parent && *child != pid).map(|(child, _)| *child),
        );
        next += 1;
    }
    found
}

/// The fields after `(comm)`, which may itself hold spaces and parentheses.
fn after_command_name(stat: &str) -> Vec<&str> {
    stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default()
}

fn kilobytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

fn ticks_per_second() -> u64 {
    // SAFETY: sysconf takes a constant and touches no memory of ours.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    u64::try_from(ticks).ok().filter(|ticks| *ticks > 0).unwrap_or(100)
}

#[cfg(test)]
mod tests {
    use super::{of, start_time, with_descendants};

    #[test]
    fn this_process_has_used_memory_and_started_once() {
        let pid = std::process::id();
        let usage = of(pid).unwrap();
        assert!(usage.rss_bytes > 100_000, "{usage:?}");
        let own = super::anonymous_bytes(std::process::id()).unwrap();
        assert!(own > 10_000 && own < usage.rss_bytes, "{own} of {usage:?}");
        assert!(usage.pss_bytes <= usage.rss_bytes, "{usage:?}");
        let memory = super::memory(pid).unwrap();
        assert!(memory.anonymous_bytes > 10_000 && memory.peak_bytes >= memory.anonymous_bytes, "{memory:?}");
        assert_eq!(start_time(pid), start_time(pid));
        assert!(start_time(pid).is_some());
    }

    #[test]
    fn a_child_is_found_and_a_process_that_is_gone_has_no_usage() {
        let mut child = std::process::Command::new("sleep").arg("30").spawn().unwrap();
        assert!(with_descendants(std::process::id()).contains(&child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(of(child.id()), None);
    }
}
