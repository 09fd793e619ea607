//! The programs that a testbed runs: Kubernetes' own from the tools' cache, and this build's.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use crate::capability::{skipped, tool_dir};

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    pub(super) kubernetes: PathBuf,
    pub(super) kube_proxy: PathBuf,
    pub(super) kubelet: PathBuf,
    pub(super) coredns: PathBuf,
    pub kubectl: PathBuf,
    pub helm: PathBuf,
    /// The build under test.
    pub tombolo: PathBuf,
    pub(super) testbed: PathBuf,
}

impl Programs {
    /// Fails with what is missing and how it is got.
    pub fn find() -> Result<Self> {
        let tool = |dir: &str, program: &str| {
            let path = tool_dir(dir).join(program);
            ensure!(
                path.is_file(),
                "{program} is not built: tests/setup.sh builds it (with Go 1.26 or newer)"
            );
            Ok(path)
        };
        let kubernetes = tool("kubernetes-1.37.2-1", "kube-scheduler")?;
        Ok(Self {
            kubernetes: kubernetes.parent().context("no directory")?.to_owned(),
            kube_proxy: tool("kube-proxy-1.37.2-1", "kube-proxy")?,
            kubelet: tool("kubelet-2", "kubelet")?,
            coredns: tool("coredns-1.15.0", "coredns")?,
            kubectl: tool("kubectl-1.37.1-4.3.1-1", "kubectl")?,
            helm: tool("kubectl-1.37.1-4.3.1-1", "helm")?,
            tombolo: built("tombolo")?,
            testbed: built("tombolo-testbed")?,
        })
    }

    /// `tombolo-testbed` itself.
    pub fn testbed(&self) -> &std::path::Path {
        &self.testbed
    }

    /// `None` after listing `test` as skipped.
    pub fn require(test: &str) -> Option<Self> {
        Self::find().inspect_err(|error| skipped(test, &format!("{error:#}"))).ok()
    }
}

/// A program of this workspace, beside the running one; `TOMBOLO_BIN` names another `tombolo`.
fn built(name: &str) -> Result<PathBuf> {
    #[allow(clippy::disallowed_methods)] // the harness's own settings
    if let (Ok(path), "tombolo") = (std::env::var("TOMBOLO_BIN"), name) {
        return Ok(path.into());
    }
    let own = std::env::current_exe()?;
    let found = own.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} is missing: run `cargo build --workspace --bins` first"))
}
