//! Linked clusters of real `tombolo` processes in network namespaces, driven through the command line as an operator
//! would: trust, federators, gateways, sidecars, tokens, links, manifests.
//!
//! Each cluster has a namespace of its own; its processes listen on addresses `10.<net>.0.<host>` on `lo` (host 1 is the
//! federator, 11 and up gateways, 21 and up sidecars and applications). Clusters are joined by an emulated link. A
//! machine outside sits behind a router that masquerades and lets nothing in. Dropping a [`Mesh`] ends its processes and
//! removes its namespaces; set `TOMBOLO_KEEP=1` to keep the logs.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::link::{Link, LinkEnd, Shape};
use crate::nat;
use crate::netns::{Namespace, VethEnd, veth};
use crate::process::{Process, ProcessSpec};

const TRUST_DOMAIN: &str = "acme.example";
const READY: Duration = Duration::from_secs(30);

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

/// What `tombolo <role>` says of a role that this binary does not have yet.
const NOT_BUILT: &str = "not built into this binary";

/// Whether every role is there to be driven; where one is missing, the test is listed as skipped and counted.
pub fn require_roles(test: &str) -> Option<()> {
    let missing = binary().and_then(|bin| {
        let lacks = |role: &&str| -> Result<bool> {
            let output = Command::new(&bin).args([role, "--help"]).output()?;
            Ok(String::from_utf8_lossy(&output.stdout).contains(NOT_BUILT))
        };
        let roles = ["federator", "gateway", "sidecar"].into_iter();
        roles.map(|role| Ok((role, lacks(&role)?))).collect::<Result<Vec<_>>>()
    });
    let reason = match missing {
        Ok(roles) => {
            let lacking: Vec<_> = roles.iter().filter(|(_, lacks)| *lacks).map(|(role, _)| *role).collect();
            if lacking.is_empty() {
                return Some(());
            }
            format!("{} not built into the binary yet", lacking.join(" and "))
        }
        Err(error) => error.to_string(),
    };
    crate::capability::skipped(test, &reason);
    None
}

/// One cluster.
pub struct Cluster {
    pub name: String,
    pub namespace: Namespace,
    net: u8,
    gateways: Vec<String>,
    sidecars: u8,
}

impl Cluster {
    /// An address of this cluster.
    pub fn address(&self, host: u8, port: u16) -> SocketAddr {
        SocketAddr::from(([10, self.net, 0, host], port))
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
    dir: tempfile::TempDir,
    bin: PathBuf,
}

impl Mesh {
    /// Federators and gateways of `clusters`, each pair connected by `shape` and linked.
    pub fn start(clusters: &[&str], gateways: usize, shape: Shape) -> Result<Self> {
        let mut mesh = Self {
            processes: BTreeMap::new(),
            specs: BTreeMap::new(),
            links: BTreeMap::new(),
            clusters: BTreeMap::new(),
            outside: Vec::new(),
            dir: tempfile::tempdir()?,
            bin: binary()?,
        };
        let trust = mesh.path("trust");
        mesh.tombolo(&["trust", "init", "--trust-domain", TRUST_DOMAIN, "--dir", &text(&trust)])?;
        for (index, name) in clusters.iter().enumerate() {
            mesh.add_cluster(name, 61 + u8::try_from(index)?)?;
        }
        mesh.connect(shape)?;
        for name in clusters {
            mesh.federator(name)?;
            for number in 1..=gateways {
                mesh.gateway(name, &format!("gw-{number}"))?;
            }
        }
        for name in clusters {
            mesh.all_ready(name)?;
        }
        for (index, inviter) in clusters.iter().enumerate() {
            for joiner in clusters.iter().skip(index + 1) {
                mesh.link_clusters(inviter, joiner)?;
            }
        }
        Ok(mesh)
    }

    fn add_cluster(&mut self, name: &str, net: u8) -> Result<()> {
        let namespace = Namespace::create(name)?;
        for host in [1, 2].into_iter().chain(11..=14).chain(21..=40) {
            namespace.add_address("lo", &format!("10.{net}.0.{host}/32"))?;
        }
        let out = self.path(&format!("{name}/trust"));
        let trust = self.path("trust");
        self.tombolo(&["trust", "cluster", name, "--dir", &text(&trust), "--out", &text(&out)])?;
        let cluster = Cluster { name: name.into(), namespace, net, gateways: Vec::new(), sidecars: 0 };
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
                near.namespace.add_device_route(&format!("10.{}.0.0/24", far.net), &device)?;
                far.namespace.add_device_route(&format!("10.{}.0.0/24", near.net), &device)?;
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

    fn role(&mut self, cluster: &str, name: &str, args: &[&str]) -> Result<()> {
        let namespace = &self.cluster(cluster)?.namespace;
        let spec = ProcessSpec::new(format!("{cluster}-{name}"), &self.bin).args(args).within(namespace);
        self.spawn(&format!("{cluster}/{name}"), spec)
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

    fn federator(&mut self, cluster: &str) -> Result<()> {
        let c = self.cluster(cluster)?;
        let (listen, admin) = (c.address(1, 7443).to_string(), c.address(1, 7445).to_string());
        let (trust, state) = (
            text(&self.path(&format!("{cluster}/trust"))),
            text(&self.path(&format!("{cluster}/state/federator"))),
        );
        let socket = self.socket(cluster);
        let args = [
            "federator",
            "--cluster",
            cluster,
            "--trust-dir",
            &trust,
            "--state-dir",
            &state,
            "--listen",
            &listen,
        ];
        self.role(cluster, "federator", &[&args[..], &["--admin", &admin, "--socket", &socket]].concat())?;
        self.ready(cluster, 1, "federator")
    }

    /// A file with a join token.
    pub fn token(&self, cluster: &str, role: &str, name: &str) -> Result<PathBuf> {
        let args: Vec<&str> = match role {
            "vm" => vec!["vm", "token", name],
            role => vec!["token", "create", "--role", role, "--name", name, "-n", "shop"],
        };
        let path = self.path(&format!("{cluster}/{name}.token"));
        std::fs::write(&path, self.operate(cluster, &args)?)?;
        Ok(path)
    }

    fn gateway(&mut self, cluster: &str, name: &str) -> Result<()> {
        let token = text(&self.token(cluster, "gateway", name)?);
        let host = 11 + u8::try_from(self.cluster(cluster)?.gateways.len())?;
        let c = self.cluster(cluster)?;
        let [border, inner, admin] = [7440, 7441, 7445].map(|port| c.address(host, port).to_string());
        let state = text(&self.path(&format!("{cluster}/state/{name}")));
        let args = ["gateway", "--name", name, "--join-token-file", &token, "--state-dir", &state];
        self.role(
            cluster,
            name,
            &[&args[..], &["--border", &border, "--inner", &inner, "--admin", &admin]].concat(),
        )?;
        let cluster = self.clusters.get_mut(cluster).context("no such cluster")?;
        cluster.gateways.push(name.into());
        Ok(())
    }

    fn link_clusters(&mut self, inviter: &str, joiner: &str) -> Result<()> {
        let token = self.operate(inviter, &["link", "token", joiner])?;
        let socket = self.socket(joiner);
        self.tombolo_with(&["--socket", &socket, "link", "join", "-"], &token)?;
        Ok(())
    }

    /// A sidecar with extra arguments; returns its host number.
    pub fn sidecar(&mut self, cluster: &str, name: &str, extra: &[String]) -> Result<u8> {
        let token = text(&self.token(cluster, "sidecar", name)?);
        let entry = self.clusters.get_mut(cluster).context("no such cluster")?;
        let host = 21 + entry.sidecars;
        entry.sidecars += 1;
        let (listen, admin) = (entry.address(host, 7442).to_string(), entry.address(host, 7445).to_string());
        let state = text(&self.path(&format!("{cluster}/state/{name}")));
        let args = [
            "sidecar",
            "--join-token-file",
            &token,
            "--state-dir",
            &state,
            "--listen",
            &listen,
            "--admin",
            &admin,
        ];
        let extra: Vec<&str> = extra.iter().map(String::as_str).collect();
        self.role(cluster, name, &[&args[..], &extra].concat())?;
        self.ready(cluster, host, name)?;
        Ok(host)
    }

    /// A machine behind a masquerading router, attached to `cluster`'s network; returns its namespace's index.
    pub fn machine(&mut self, cluster: &str, name: &str, extra: &[String]) -> Result<usize> {
        let token = text(&self.token(cluster, "vm", name)?);
        let (router, machine) = (Namespace::create("router")?, Namespace::create(name)?);
        let c = self.cluster(cluster)?;
        veth(
            VethEnd { namespace: &router, device: "outside", address: "10.99.0.2/30" },
            VethEnd { namespace: &c.namespace, device: "isp", address: "10.99.0.1/30" },
            1500,
        )?;
        veth(
            VethEnd { namespace: &machine, device: "eth0", address: "192.168.77.2/24" },
            VethEnd { namespace: &router, device: "inside", address: "192.168.77.1/24" },
            1500,
        )?;
        router.add_route("default", "10.99.0.1".parse()?)?;
        machine.add_route("default", "192.168.77.1".parse()?)?;
        nat::masquerade(&router, "inside", "outside")?;
        let state = text(&self.path(&format!("vm/state/{name}")));
        let args = ["sidecar", "--join-token-file", &token, "--state-dir", &state, "--registers"];
        let args = [&args[..], &["--listen", "192.168.77.2:7442", "--admin", "127.0.0.1:7445"]].concat();
        let extra: Vec<&str> = extra.iter().map(String::as_str).collect();
        let spec = ProcessSpec::new(name, &self.bin).args([&args[..], &extra].concat()).within(&machine);
        self.spawn(&format!("vm/{name}"), spec)?;
        let admin = "127.0.0.1:7445".parse()?;
        self.wait_ready(&machine, admin, &format!("vm/{name}"))?;
        self.outside.push(machine);
        self.outside.push(router);
        Ok(self.outside.len() - 2)
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
    namespace.run(|| {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: mesh\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    })?
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
