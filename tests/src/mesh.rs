//! Linked clusters of real `tombolo` processes in network namespaces, driven through the command line as an operator
//! would: trust, federators, gateways, sidecars, tokens, links, manifests.
//!
//! Each cluster has a namespace of its own; its processes listen on addresses `10.<net>.0.<host>` on `lo` (host 1 is the
//! federator, 11 and up gateways, 21 and up sidecars and applications). Clusters are joined by an emulated link. A
//! machine outside sits behind a router that masquerades and lets nothing in. Dropping a [`Mesh`] ends its processes and
//! removes its namespaces; set `TOMBOLO_KEEP=1` to keep the logs.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::link::{Link, LinkEnd, Shape};
use crate::netns::Namespace;
use crate::process::{Process, ProcessSpec};

const TRUST_DOMAIN: &str = "acme.example";
/// Directory of the other federation's root.
const FOREIGN: &str = "foreign-trust";
const READY: Duration = Duration::from_secs(30);
const CONNECT: Duration = Duration::from_secs(2);

mod roles;

/// The binary under test: `TOMBOLO_BIN`, or the one built beside the running test.
pub fn binary() -> Result<PathBuf> {
    #[allow(clippy::disallowed_methods)] // the harness's own settings
    if let Ok(path) = std::env::var("TOMBOLO_BIN") {
        return Ok(path.into());
    }
    let test = std::env::current_exe()?;
    let profile = test.parent().and_then(Path::parent).context("the test binary has no target directory")?;
    let path = profile.join("tombolo");
    ensure!(path.exists(), "{} is missing: run `cargo build --workspace --bins` first", path.display());
    Ok(path)
}

/// One cluster.
pub struct Cluster {
    pub name: String,
    pub namespace: Namespace,
    net: u8,
    gateways: Vec<String>,
    sidecars: u8,
    balanced: bool,
    clock_off: i64,
}

impl Cluster {
    /// An address of this cluster.
    pub fn address(&self, host: u8, port: u16) -> SocketAddr {
        SocketAddr::from(([10, self.net, 0, host], port))
    }

    /// Where a balancer in front of the gateways' border is reached.
    pub fn balancer(&self) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::new(10, self.net, 1, 1), 7440)
    }

    pub fn gateways(&self) -> &[String] {
        &self.gateways
    }
}

/// Clusters, what connects them, and their processes by name, such as `east/gw-1`.
pub struct Mesh {
    // Dropped in this order: processes, links, then the namespaces they are in.
    processes: BTreeMap<String, Process>,
    specs: BTreeMap<String, ProcessSpec>,
    links: BTreeMap<(String, String), Link>,
    clusters: BTreeMap<String, Cluster>,
    outside: Vec<Namespace>,
    threads: u8,
    /// Seconds that every clock was moved on by ([`Mesh::pass`]).
    passed: i64,
    dir: tempfile::TempDir,
    bin: PathBuf,
}

/// What to set up.
#[derive(Clone, Debug)]
pub struct Layout<'a> {
    pub clusters: &'a [&'a str],
    /// Replicas per cluster.
    pub gateways: usize,
    /// Between each pair of clusters.
    pub shape: Shape,
    /// This cluster's gateways are reached through a balancer, sticky by 5-tuple, at [`Cluster::balancer`] only.
    pub balanced: Option<&'a str>,
    /// This cluster's clocks are off by so many seconds.
    pub clock_off: Option<(&'a str, i64)>,
    /// This cluster belongs to another federation, under a root of its own.
    pub foreign: Option<&'a str>,
    /// Of each sidecar's byte path.
    pub threads: u8,
}

impl Default for Layout<'_> {
    fn default() -> Self {
        Self {
            clusters: &["east", "west"],
            gateways: 2,
            shape: Shape::PERFECT,
            balanced: None,
            clock_off: None,
            foreign: None,
            threads: 1,
        }
    }
}

impl Mesh {
    /// Federators and gateways of every cluster, each pair connected and linked.
    pub fn start(layout: &Layout<'_>) -> Result<Self> {
        let mut mesh = Self::unlinked(layout)?;
        for (index, inviter) in layout.clusters.iter().enumerate() {
            for joiner in layout.clusters.iter().skip(index + 1) {
                mesh.link_clusters(inviter, joiner)?;
            }
        }
        Ok(mesh)
    }

    /// The same, ready to be linked.
    pub fn unlinked(layout: &Layout<'_>) -> Result<Self> {
        let mut mesh = Self {
            processes: BTreeMap::new(),
            specs: BTreeMap::new(),
            links: BTreeMap::new(),
            clusters: BTreeMap::new(),
            outside: Vec::new(),
            threads: layout.threads,
            passed: 0,
            dir: tempfile::tempdir()?,
            bin: binary()?,
        };
        for root in ["trust", FOREIGN].iter().take(1 + usize::from(layout.foreign.is_some())) {
            let root = text(&mesh.path(root));
            mesh.tombolo(&["trust", "init", "--trust-domain", TRUST_DOMAIN, "--dir", &root])?;
        }
        for (index, name) in layout.clusters.iter().enumerate() {
            let root = if layout.foreign == Some(name) { FOREIGN } else { "trust" };
            mesh.add_cluster(name, 61 + u8::try_from(index)?, root)?;
            let cluster = mesh.clusters.get_mut(*name).context("no such cluster")?;
            cluster.balanced = layout.balanced == Some(name);
            cluster.clock_off =
                layout.clock_off.filter(|(of, _)| of == name).map_or(0, |(_, seconds)| seconds);
        }
        mesh.set_clocks()?;
        mesh.connect(layout.shape)?;
        for name in layout.clusters {
            mesh.federator(name)?;
            for number in 1..=layout.gateways {
                mesh.gateway(name, &format!("gw-{number}"))?;
            }
        }
        for name in layout.clusters {
            mesh.all_ready(name)?;
        }
        Ok(mesh)
    }

    fn add_cluster(&mut self, name: &str, net: u8, root: &str) -> Result<()> {
        let namespace = Namespace::create(name)?;
        for host in [1, 2].into_iter().chain(11..=14).chain(21..=40) {
            namespace.add_address("lo", &format!("10.{net}.0.{host}/32"))?;
        }
        let out = self.path(&format!("{name}/trust"));
        let trust = self.path(root);
        self.tombolo(&["trust", "cluster", name, "--dir", &text(&trust), "--out", &text(&out)])?;
        let cluster = Cluster {
            name: name.into(),
            namespace,
            net,
            gateways: Vec::new(),
            sidecars: 0,
            balanced: false,
            clock_off: 0,
        };
        self.clusters.insert(name.into(), cluster);
        Ok(())
    }

    fn connect(&mut self, shape: Shape) -> Result<()> {
        let names: Vec<String> = self.clusters.keys().cloned().collect();
        for (index, a) in names.iter().enumerate() {
            for (b_index, b) in names.iter().enumerate().skip(index + 1) {
                let (near, far) = (self.cluster(a)?, self.cluster(b)?);
                let device = format!("wan{index}{b_index}");
                let end = |cluster: &Cluster, other: &Cluster| -> Result<_> {
                    Ok(format!("10.60.{}.{}", cluster.net, other.net).parse()?)
                };
                let (near_end, far_end) = (
                    LinkEnd { namespace: &near.namespace, device: &device, address: end(near, far)? },
                    LinkEnd { namespace: &far.namespace, device: &device, address: end(far, near)? },
                );
                let link = Link::start(near_end, far_end, shape, 7 + b_index as u64)?;
                near.namespace.add_device_route(&format!("10.{}.0.0/16", far.net), &device)?;
                far.namespace.add_device_route(&format!("10.{}.0.0/16", near.net), &device)?;
                self.links.insert((a.clone(), b.clone()), link);
            }
        }
        Ok(())
    }

    /// The link between two clusters, named in alphabetical order.
    pub fn wire(&self, a: &str, b: &str) -> Result<&Link> {
        self.links.get(&(a.to_owned(), b.to_owned())).with_context(|| format!("no link {a} - {b}"))
    }

    pub fn cluster(&self, name: &str) -> Result<&Cluster> {
        self.clusters.get(name).with_context(|| format!("no cluster {name}"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where logs go.
    pub fn logs(&self) -> Result<PathBuf> {
        let logs = self.path("logs");
        std::fs::create_dir_all(&logs)?;
        Ok(logs)
    }

    pub fn socket(&self, cluster: &str) -> String {
        text(&self.path(&format!("{cluster}/admin.sock")))
    }

    /// Runs the command line to its end; its standard output.
    pub fn tombolo(&self, args: &[&str]) -> Result<String> {
        self.tombolo_with(args, "")
    }

    pub fn tombolo_with(&self, args: &[&str], stdin: &str) -> Result<String> {
        let mut child = Command::new(&self.bin)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("no standard input")?.write_all(stdin.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("tombolo {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs an operator's command against a cluster's federator.
    pub fn operate(&self, cluster: &str, args: &[&str]) -> Result<String> {
        let socket = self.socket(cluster);
        self.tombolo(&[&["--socket", &socket], args].concat())
    }

    pub fn apply(&self, cluster: &str, yaml: &str) -> Result<String> {
        let socket = self.socket(cluster);
        self.tombolo_with(&["--socket", &socket, "apply", "-f", "-"], yaml)
    }

    pub fn status(&self, cluster: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.operate(cluster, &["status", "-o", "json"])?)?)
    }

    /// Starts a process of a cluster's namespace under `name`, and remembers how, for [`Mesh::restart`].
    pub fn spawn(&mut self, name: &str, spec: ProcessSpec) -> Result<()> {
        let logs = self.logs()?;
        self.specs.insert(name.to_owned(), spec.clone());
        self.processes.insert(name.to_owned(), spec.spawn(&logs)?);
        Ok(())
    }

    pub fn process(&self, name: &str) -> Result<&Process> {
        self.processes.get(name).with_context(|| format!("no process {name}"))
    }
    pub fn process_mut(&mut self, name: &str) -> Result<&mut Process> {
        self.processes.get_mut(name).with_context(|| format!("no process {name}"))
    }

    /// Starts again what has ended.
    pub fn restart(&mut self, name: &str) -> Result<()> {
        let spec = self.specs.get(name).with_context(|| format!("no process {name}"))?.clone();
        self.spawn(name, spec)
    }

    pub fn outside(&self, index: usize) -> Result<&Namespace> {
        self.outside.get(index).context("no such machine")
    }

    fn all_ready(&self, cluster: &str) -> Result<()> {
        let gateways = &self.cluster(cluster)?.gateways;
        gateways.iter().zip(11..).try_for_each(|(name, host)| self.ready(cluster, host, name))
    }

    /// Waits for `/ready`.
    pub fn ready(&self, cluster: &str, host: u8, name: &str) -> Result<()> {
        let c = self.cluster(cluster)?;
        self.wait_ready(&c.namespace, c.address(host, 7445), &format!("{cluster}/{name}"))
    }

    fn wait_ready(&self, namespace: &Namespace, admin: SocketAddr, name: &str) -> Result<()> {
        let deadline = Instant::now() + READY;
        let mut answer = String::new();
        while Instant::now() < deadline {
            answer = http_get(namespace, admin, "/ready").unwrap_or_else(|e| e.to_string());
            if answer.starts_with("HTTP/1.1 200") {
                return Ok(());
            }
            if self.process(name)?.has_exited() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("{name} is not ready: {answer}\n{}", self.process(name)?.tail())
    }

    /// Polls `check` until it holds, or fails with what it last said.
    pub fn eventually(
        &self,
        what: &str,
        limit: Duration,
        check: impl Fn(&Self) -> Result<()>,
    ) -> Result<Duration> {
        let start = Instant::now();
        loop {
            match check(self) {
                Ok(()) => return Ok(start.elapsed()),
                Err(error) if start.elapsed() > limit => {
                    return Err(error.context(format!("not within {limit:?}: {what}")));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        #[allow(clippy::disallowed_methods)] // the harness's own settings
        if std::env::var_os("TOMBOLO_KEEP").is_some() || std::thread::panicking() {
            let kept = std::env::temp_dir().join(format!("tombolo-logs-{}", std::process::id()));
            let _ = Command::new("cp").args(["-r", &text(&self.path("logs")), &text(&kept)]).status();
            eprintln!("logs kept in {}", kept.display());
        }
    }
}

/// One HTTP/1.1 request from inside a namespace; the whole answer as text.
pub fn http_get(namespace: &Namespace, address: SocketAddr, path: &str) -> Result<String> {
    namespace.run(|| get(TcpStream::connect_timeout(&address, CONNECT)?, path))?
}

/// The same from one of the namespace's addresses.
pub fn http_get_from(namespace: &Namespace, from: IpAddr, address: SocketAddr, path: &str) -> Result<String> {
    get(connect_from(namespace, from, address)?, path)
}

/// A connection from one of the namespace's addresses.
pub fn connect_from(namespace: &Namespace, from: IpAddr, to: SocketAddr) -> Result<TcpStream> {
    namespace.run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(from, 0).into())?;
        socket.connect_timeout(&to.into(), CONNECT)?;
        Ok(socket.into())
    })?
}

fn get(mut stream: TcpStream, path: &str) -> Result<String> {
    // Shorter than what callers wait: one that hangs is tried again.
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: mesh\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
