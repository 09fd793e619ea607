//! The `tombolo` binary beside this program, and its command line.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::site::own_program;

/// The binary of the same profile.
pub fn tombolo_binary() -> Result<PathBuf> {
    let path = own_program()?.with_file_name("tombolo");
    ensure!(path.exists(), "{} is missing: run `cargo build --release --bins`", path.display());
    Ok(path)
}

/// Runs a command to its end; its standard output.
pub fn tombolo(args: &[&str], stdin: &str) -> Result<String> {
    let mut child = Command::new(tombolo_binary()?)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("no standard input")?.write_all(stdin.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "tombolo {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}
