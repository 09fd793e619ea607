//! Tombolo in the clusters, as a person would put it there: `tombolo install`, then a link between each two.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::{Cluster, Testbed, eventually};
use crate::scenario::flat_link;

pub const TRUST_DOMAIN: &str = "acme.example";
pub const NAMESPACE: &str = "tombolo-system";

impl Testbed {
    /// Installs into every cluster, and links them. `values` are more values of the chart (`key=value`).
    pub fn install(&self, values: &[&str]) -> Result<()> {
        let root = self.dir().join("trust").display().to_string();
        self.tombolo(&["trust", "init", "--trust-domain", TRUST_DOMAIN, "--dir", &root], "")?;
        // Side by side: each waits until what it has installed is ready.
        let installed = std::thread::scope(|scope| {
            let begun: Vec<_> = self
                .clusters
                .iter()
                .map(|cluster| scope.spawn(|| self.install_one(cluster, &root, values)))
                .collect();
            begun
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| bail!("it panicked")))
                .collect::<Result<Vec<()>>>()
        });
        installed?;
        for (index, inviter) in self.clusters.iter().enumerate() {
            for joiner in self.clusters.iter().skip(index + 1) {
                let token = self.operate(inviter, &["link", "token", &joiner.name], "")?;
                self.operate(joiner, &["link", "join", "-"], &token)?;
            }
        }
        Ok(())
    }

    fn install_one(&self, cluster: &Cluster, root: &str, values: &[&str]) -> Result<()> {
        let mut args =
            vec!["install", "--cluster", &cluster.name, "--trust-root", root, "--preset", "node-port"];
        for value in values {
            args.extend(["--set", value]);
        }
        let pods = || cluster.kubectl(&["get", "pods,events", "-n", NAMESPACE]).unwrap_or_default();
        self.operate(cluster, &args, "")
            .map(drop)
            .with_context(|| format!("install into {}: {}", cluster.name, pods()))
    }

    /// `tombolo` for a cluster's federator, reached through its API server.
    pub fn operate(&self, cluster: &Cluster, args: &[&str], stdin: &str) -> Result<String> {
        let kubeconfig = self.kubeconfig().display().to_string();
        let to = ["--kubeconfig", &kubeconfig, "--kube-context", &cluster.name];
        self.tombolo(&[args, &to].concat(), stdin)
    }

    fn tombolo(&self, args: &[&str], stdin: &str) -> Result<String> {
        use std::io::Write as _;
        let mut command = Command::new(&self.programs.tombolo);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("start tombolo")?;
        child.stdin.take().context("no standard input")?.write_all(stdin.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("tombolo {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Has each cluster tell the others its pods' addresses: what headless services and `EndpointSlice`s of imports need.
    pub fn flatten(&self) -> Result<()> {
        for cluster in &self.clusters {
            for peer in self.clusters.iter().filter(|peer| peer.name != cluster.name) {
                self.operate(cluster, &["apply", "-f", "-"], &flat_link(&peer.name).to_string())?;
            }
        }
        Ok(())
    }

    /// Waits until every cluster hears every other one.
    pub fn linked(&self) -> Result<()> {
        for cluster in &self.clusters {
            eventually("links are up", std::time::Duration::from_secs(60), || {
                let status: serde_json::Value =
                    serde_json::from_str(&self.operate(cluster, &["status", "-o", "json"], "")?)?;
                let links = status["links"].as_array().cloned().unwrap_or_default();
                for other in self.clusters.iter().filter(|other| other.name != cluster.name) {
                    let up =
                        links.iter().any(|link| link["peer"] == other.name && link["state"] == "connected");
                    anyhow::ensure!(up, "{} is not linked to {}: {links:?}", cluster.name, other.name);
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}
