//! An application on go-spiffe (`tests/spiffe-go`), built here and run inside a namespace, so that the sockets of sidecars
//! are judged by the library that SPIFFE users have.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::capability::{find_program, require_programs, skipped};
use crate::mesh;
use crate::netns::Namespace;

/// The built program.
#[derive(Clone, Debug)]
pub struct Probe(PathBuf);

/// As `spiffe-go/go.mod` has it; Debian 12 packages an older one.
const LEAST_GO: u32 = 25;

/// The 26 of `go version go1.26.1 linux/amd64`.
fn go_minor(said: &str) -> Option<u32> {
    said.split_once("go1.")?.1.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// `None` after listing `test` as skipped, where there is no Go, or too old a one. A build that fails fails the test.
pub fn require_probe(test: &str) -> Option<Result<Probe>> {
    require_programs(test, &["go"])?;
    let said = find_program("go").and_then(|go| Command::new(go).arg("version").output().ok());
    let said = said.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let said = said.unwrap_or_default();
    if go_minor(&said).is_none_or(|minor| minor < LEAST_GO) {
        skipped(test, &format!("Go 1.{LEAST_GO} or newer is needed, this is {said:?}"));
        return None;
    }
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| build().map_err(|error| format!("{error:#}")));
    Some(built.clone().map(Probe).map_err(anyhow::Error::msg))
}

/// Beside the binary under test; Go's own cache makes the second build a matter of a second.
fn build() -> Result<PathBuf> {
    let program = mesh::binary()?.with_file_name("spiffe-probe");
    let go = find_program("go").context("go is not installed")?;
    let built = Command::new(go)
        .args(["build", "-buildvcs=false", "-o"])
        .arg(&program)
        .arg(".")
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("spiffe-go"))
        .output()?;
    ensure!(built.status.success(), "go build: {}", String::from_utf8_lossy(&built.stderr));
    Ok(program)
}

impl Probe {
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Runs a command that ends by itself; the last line that it printed.
    pub fn run(&self, namespace: &Namespace, args: &[&str]) -> Result<Value> {
        Self::finish(namespace, Command::new(&self.0).args(args))
    }

    /// The same as another user. The program is copied into `dir`, which that user must be able to enter.
    pub fn run_as(&self, uid: u32, dir: &Path, namespace: &Namespace, args: &[&str]) -> Result<Value> {
        let copy = dir.join("spiffe-probe");
        std::fs::copy(&self.0, &copy)?;
        Self::finish(namespace, Command::new(&copy).args(args).uid(uid).gid(uid))
    }

    fn finish(namespace: &Namespace, command: &mut Command) -> Result<Value> {
        let output = namespace.run(|| command.output())??;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{command:?}: {errors}");
        let text = String::from_utf8(output.stdout)?;
        let last = text.lines().last().with_context(|| format!("{command:?} printed nothing: {errors}"))?;
        serde_json::from_str(last).with_context(|| format!("not JSON: {last}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gos_version_is_read() {
        assert_eq!(go_minor("go version go1.26.1 linux/amd64"), Some(26));
        assert_eq!(go_minor("go version go1.19 linux/amd64"), Some(19));
        assert_eq!(go_minor("nonsense"), None);
    }
}
