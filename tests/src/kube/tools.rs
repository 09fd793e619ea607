//! kubectl and helm, as `tests/setup.sh` fetches them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::documents;
use crate::capability::{skipped, tool_dir};
use crate::mesh::Mesh;
use crate::process::ProcessSpec;

/// kubectl's, helm's, and how often the way they are fetched has changed.
const VERSION: &str = "1.37.1-4.3.1-1";
const PATIENCE: Duration = Duration::from_secs(60);

/// The two programs.
#[derive(Clone, Debug)]
pub struct Tools(PathBuf);

/// `None` after listing `test` as skipped where they are not there.
pub fn require_tools(test: &str) -> Option<Tools> {
    let dir = tool_dir(&format!("kubectl-{VERSION}"));
    if ["kubectl", "helm"].iter().all(|program| dir.join(program).is_file()) {
        return Some(Tools(dir));
    }
    skipped(test, &format!("kubectl and helm {VERSION} are not there (tests/setup.sh fetches them)"));
    None
}

impl Tools {
    /// helm, which needs no cluster for what the tests ask: its standard output, or what it says is wrong.
    pub fn helm(&self, args: &[&str]) -> Result<String> {
        let output = Command::new(self.0.join("helm")).args(args).output().context("helm")?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// What helm renders of a chart.
    pub fn template(&self, chart: &Path, args: &[&str]) -> Result<Vec<Value>> {
        let chart = chart.display().to_string();
        let text = self
            .helm(&[&["template", "tombolo", &chart, "-n", "tombolo-system", "--no-hooks"], args].concat())?;
        documents(&text)
    }

    /// kubectl inside a cluster's namespace: everything that it says.
    pub fn kubectl(&self, mesh: &Mesh, cluster: &str, kubeconfig: &Path, args: &[&str]) -> Result<String> {
        let kubeconfig = kubeconfig.display().to_string();
        let spec = ProcessSpec::new(format!("{cluster}-kubectl"), self.0.join("kubectl"))
            .args([&["--kubeconfig", &kubeconfig], args].concat())
            .within(&mesh.cluster(cluster)?.namespace);
        spec.run(&mesh.logs()?, PATIENCE)
    }
}
