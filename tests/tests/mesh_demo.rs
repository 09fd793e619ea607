//! `tombolo demo --scenario`, as a newcomer runs it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::mesh::binary;
use tombolo_tests::process::ProcessSpec;

/// A loopback prefix of its own, so that no other demo on this machine is disturbed.
const PREFIX: &str = "127.181";
const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn the_demo_plays_its_scenario_and_leaves_nothing_behind() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let state = dir.path().join("state");
    let started = Instant::now();
    let mut demo = ProcessSpec::new("demo", binary()?)
        .args(["demo", "--scenario", "--loopback", PREFIX])
        .env("XDG_STATE_HOME", &state)
        .env("XDG_RUNTIME_DIR", dir.path())
        .spawn(dir.path())?;
    let status = demo.wait(LIMIT)?;
    let log = demo.log();
    println!("{log}");
    ensure!(status.success(), "the demo ended with {status}\n{log}");
    let summary = log.lines().find(|line| line.contains(" steps held")).context("no summary")?;
    println!("{summary} after {:?}", started.elapsed());
    let left = processes_with(PREFIX)?;
    ensure!(left.is_empty(), "processes are left: {left:?}");
    let kept: Vec<_> = walk(&state);
    ensure!(kept.is_empty(), "files are left: {kept:?}");
    Ok(())
}

/// Command lines of living processes that name an address of the prefix.
fn processes_with(prefix: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        // The demo itself is gone; whoever else names the prefix was started by it.
        if line.contains(&format!("{prefix}.")) {
            found.push(line);
        }
    }
    Ok(found)
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.flat_map(|e| if e.path().is_dir() { walk(&e.path()) } else { vec![e.path()] }).collect()
}
