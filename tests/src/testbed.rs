//! Whole Kubernetes clusters on one machine: etcd, API server, controller manager, scheduler, kube-proxy and CoreDNS are the
//! real ones, pods' processes really run ([`crate::pods`]). Nobody downloads an image.
//!
//! Every node has a network namespace; the first one of a cluster has the control plane in it too. Nodes of all clusters
//! reach each other through the link namespace; pods' and Services' addresses lead nowhere outside their own cluster.
//! API servers are reached from the machine itself by [`Testbed::kubeconfig`].
//!
//! Everything ends with a [`Testbed`], in order; what a killed one left is taken away by the next.

pub mod addresses;
mod directory;
mod dns;
mod forward;
mod install;
mod nodes;
mod plane;
mod programs;
mod storage;
pub mod up;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use crate::kube::{Api, Object};
use crate::netns::{Namespace, NamespaceHandle};
use crate::pods::enter;
use crate::process::{Process, ProcessSpec};
use addresses::Addresses;
use directory::Directory;
pub use dns::Dns;
use forward::Forward;
pub use install::{NAMESPACE, TRUST_DOMAIN};
pub use programs::Programs;

/// A control plane and its first pods on a busy machine.
const READY: Duration = Duration::from_secs(120);

/// What to start.
#[derive(Clone, Copy, Debug)]
pub struct Layout<'a> {
    /// Names; also those of the contexts.
    pub clusters: &'a [&'a str],
    /// Of each cluster.
    pub nodes: u8,
}

impl Default for Layout<'_> {
    fn default() -> Self {
        Self { clusters: &["east", "west"], nodes: 1 }
    }
}

/// Clusters that run.
pub struct Testbed {
    pub clusters: Vec<Cluster>,
    /// Between the clusters: every packet from one to another goes through its forward hook.
    pub link: Namespace,
    pub programs: Programs,
    // Last, so that what is in it has ended.
    dir: Directory,
}

/// One of them.
pub struct Cluster {
    pub name: String,
    pub addresses: Addresses,
    /// As its administrator.
    pub api: Api,
    // Ends in this order.
    processes: Vec<Process>,
    _forward: Forward,
    pub nodes: Vec<Namespace>,
    /// From the machine itself.
    kubeconfig: PathBuf,
    kubectl: PathBuf,
    dir: PathBuf,
}

impl Testbed {
    pub fn start(programs: Programs, layout: &Layout<'_>) -> Result<Self> {
        let dir = Directory::make()?;
        let link = Namespace::create("link")?;
        link.enable_forwarding()?;
        let mut begun = Vec::new();
        for (index, name) in (1..).zip(layout.clusters) {
            let addresses = Addresses::of(index)?;
            let cluster = dir.0.join(name);
            begun.push(plane::begin(&programs, &link, name, addresses, &cluster, layout.nodes)?);
        }
        let mut clusters = Vec::new();
        for plane in begun {
            clusters.push(plane.finish(&programs, &dir.0)?);
        }
        let testbed = Self { clusters, link, programs, dir };
        for cluster in &testbed.clusters {
            cluster.set_dns(&Dns::Plain)?;
            cluster.nodes_ready().with_context(|| cluster.logs())?;
        }
        for cluster in &testbed.clusters {
            cluster.dns_ready().with_context(|| cluster.logs())?;
        }
        Ok(testbed)
    }

    pub fn cluster(&self, name: &str) -> Result<&Cluster> {
        self.clusters
            .iter()
            .find(|cluster| cluster.name == name)
            .with_context(|| format!("no cluster {name}"))
    }

    /// One file with a context for each cluster, of its name.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.0.join("kubeconfig")
    }

    /// For what a caller wants to keep beside the clusters.
    pub fn dir(&self) -> &Path {
        &self.dir.0
    }

    /// Runs a program of the machine with `KUBECONFIG` set: what it wrote.
    pub fn run(&self, program: &Path, args: &[&str]) -> Result<String> {
        run(program, args, &self.kubeconfig())
    }
}

impl Cluster {
    /// `kubectl` as the cluster's administrator: what it wrote.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        let args = [&["--context", &self.name], args].concat();
        run(&self.kubectl, &args, &self.kubeconfig)
    }

    /// `kubectl exec`: what the command wrote. An error has both outputs.
    pub fn exec(&self, namespace: &str, pod: &str, container: &str, command: &[&str]) -> Result<String> {
        let args = ["exec", "-n", namespace, pod, "-c", container, "--"];
        self.kubectl(&[&args, command].concat())
    }

    /// The process of a container that runs, as this machine knows it.
    pub fn process_of(&self, namespace: &str, pod: &str, container: &str) -> Result<u32> {
        let file = |number| {
            let node = self.dir.join(format!("node-{number}"));
            enter::directory(&node, namespace, pod).join(format!("{container}.json"))
        };
        let files = (1..=self.nodes.len()).map(file);
        let text = files.map(fs::read).find_map(Result::ok);
        let text = text.with_context(|| format!("{namespace}/{pod} {container} does not run"))?;
        Ok(u32::try_from(serde_json::from_slice::<enter::Inside>(&text)?.pid)?)
    }

    /// A pod's network, by one of its containers that runs.
    pub fn network_of(&self, namespace: &str, pod: &str, container: &str) -> Result<NamespaceHandle> {
        let pid = self.process_of(namespace, pod, container)?;
        NamespaceHandle::open(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// Waits until a Deployment's, StatefulSet's or DaemonSet's pods are all the ones it wants, and ready.
    pub fn rolled_out(&self, namespace: &str, what: &str) -> Result<()> {
        let args = ["rollout", "status", "-n", namespace, what, "--timeout=90s"];
        self.kubectl(&args)
            .map(drop)
            .with_context(|| self.kubectl(&["describe", "pods", "-n", namespace]).unwrap_or_default())
    }

    /// Waits until a pod is ready.
    pub fn pod_ready(&self, namespace: &str, name: &str) -> Result<()> {
        let pod = Object::new("v1", "Pod", namespace, name);
        self.api.until(&pod, READY, |pod| {
            let pod = pod.context("there is no such pod")?;
            let (ready, why) = crate::kube::condition(pod, "Ready");
            ensure!(ready.starts_with("True"), "{ready}: {why} {}", pod["status"]);
            Ok(())
        })
    }

    /// Addresses of a Service.
    pub fn service_ip(&self, namespace: &str, name: &str) -> Result<String> {
        let service =
            self.api.get(&Object::new("v1", "Service", namespace, name))?.context("no such service")?;
        Ok(service["spec"]["clusterIP"].as_str().context("it has no address")?.to_owned())
    }

    fn nodes_ready(&self) -> Result<()> {
        eventually("nodes are ready", READY, || {
            for process in &self.processes {
                // Nothing to wait for any longer.
                if process.has_exited() {
                    return Ok(false);
                }
            }
            let nodes = self.api.list(&Object::new("v1", "Node", "", ""))?;
            let ready =
                nodes.iter().filter(|node| crate::kube::condition(node, "Ready").0.starts_with("True"));
            ensure!(ready.count() == self.nodes.len(), "{nodes:?}");
            Ok(true)
        })
        .and_then(|well| if well { Ok(()) } else { bail!("a program has ended") })
    }

    pub fn namespace(&self, name: &str) -> Result<()> {
        self.api
            .apply(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } }))
            .map(drop)
    }

    /// The last lines of everything that runs for it.
    pub fn logs(&self) -> String {
        let one = |process: &Process| format!("--- {}\n{}\n", process.name(), process.tail());
        self.processes.iter().map(one).collect()
    }

    /// A process by its name, such as `east-apiserver`.
    pub fn process(&mut self, name: &str) -> Result<&mut Process> {
        let name = format!("{}-{name}", self.name);
        self.processes
            .iter_mut()
            .find(|process| process.name() == name)
            .with_context(|| format!("no process {name}"))
    }

    pub fn kubectl_program(&self) -> &Path {
        &self.kubectl
    }

    /// The merged one.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A file below the directory that `hostPath`s mean.
    pub fn host_file(&self, path: &str) -> Result<String> {
        let path = self.dir.join("host").join(path);
        std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }

    /// With which the API server signs tokens of service accounts (PEM).
    pub fn service_account_key(&self) -> Result<String> {
        let path = self.dir.join("sa.key");
        std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }

    /// For processes beside the pods, on the first node.
    pub fn spec(&self, name: &str, program: &Path) -> Result<ProcessSpec> {
        let node = self.nodes.first().context("no node")?;
        Ok(ProcessSpec::new(format!("{}-{name}", self.name), program).within(node))
    }

    /// A kubeconfig of the administrator for programs on a node.
    pub fn inner_kubeconfig(&self) -> PathBuf {
        self.dir.join("admin.kubeconfig")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        #[allow(clippy::disallowed_methods)] // the harness's own settings
        if std::env::var_os("TOMBOLO_KEEP").is_some() || std::thread::panicking() {
            let kept =
                std::env::temp_dir().join(format!("tombolo-logs-{}-{}", self.name, std::process::id()));
            let nodes = (1..=self.nodes.len()).map(|number| self.dir.join(format!("node-{number}")));
            let pods = nodes.flat_map(|node| ["running", "ended"].map(|name| node.join(name)));
            let _ = Command::new("cp").arg("-r").arg(self.dir.join("logs")).arg(&kept).status();
            let _ = Command::new("cp").arg("-r").args(pods).arg(&kept).status();
            eprintln!("logs kept in {}", kept.display());
        }
        for process in &mut self.processes {
            // Nodes take their namespaces away; of the others nothing is kept, and SIGTERM would have them wait for peers.
            let ended = if process.name().contains("-node-") { process.stop() } else { process.kill() };
            if let Err(error) = ended {
                tracing::warn!("{error:#}");
            }
        }
    }
}

fn run(program: &Path, args: &[&str], kubeconfig: &Path) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args).env("KUBECONFIG", kubeconfig).stdin(std::process::Stdio::null());
    let output = command.output().with_context(|| format!("start {}", program.display()))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if !output.status.success() {
        let name = program.file_name().unwrap_or_default().display();
        bail!("{name} {}: {}{}", args.join(" "), text(&output.stdout), text(&output.stderr));
    }
    Ok(text(&output.stdout))
}

/// Logs of the testbed's own programs, on standard error.
pub fn log() {
    #[allow(clippy::disallowed_methods)] // the harness's own settings
    let filter = std::env::var("TOMBOLO_LOG").unwrap_or_else(|_| "info".to_owned());
    if let Err(error) =
        tombolo_runtime::telemetry::init(tombolo_runtime::telemetry::LogFormat::Human, &filter)
    {
        eprintln!("{error}");
    }
}

/// Polls until `check` holds, or fails with what it last said.
pub fn eventually<T>(what: &str, limit: Duration, check: impl Fn() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match check() {
            Ok(found) => return Ok(found),
            Err(error) if start.elapsed() > limit => {
                return Err(error.context(format!("not within {limit:?}: {what}")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
