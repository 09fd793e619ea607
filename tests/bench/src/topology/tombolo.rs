//! The mesh's own path: app -> sidecar -> gateway -> gateway -> sidecar -> app, two linked clusters of the real
//! `tombolo` binary, set up through its command line as an operator would.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use tombolo_tests::process::{Process, ProcessSpec};

use super::{Running, Topology};
use crate::mesh::{tombolo, tombolo_binary};
use crate::site::{ENTRY_BULK_PORT, ENTRY_HTTP_PORT, Port, Side, Site};

const READY: Duration = Duration::from_secs(20);
const EXPORTS: &str = "apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: { name: http, namespace: bench }
---
apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: { name: bulk, namespace: bench }
---
apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: { name: udp, namespace: bench }
";

/// The path, with packets of up to this many bytes of UDP payload.
pub(crate) struct Tombolo {
    pub max_udp_payload: u16,
    /// Addresses at which both services are captured, beside their explicit listeners.
    pub captured: Option<Captured>,
    /// A UDP service as well, from [`ENTRY_UDP_PORT`] to [`ORIGIN_UDP_PORT`].
    pub datagrams: bool,
}

pub(crate) const ORIGIN_UDP_PORT: u16 = 20082;
pub(crate) const ENTRY_UDP_PORT: u16 = 21082;

/// What stands for the services.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Captured {
    pub listen: SocketAddr,
    pub http: SocketAddr,
    pub bulk: SocketAddr,
}

impl Captured {
    fn flags(&self) -> Vec<String> {
        let Self { listen, http, bulk } = self;
        let address = |address, service| ["--capture-address".to_owned(), format!("{address}={service}")];
        let addresses = [address(http, "bench/http:80"), address(bulk, "bench/bulk:81")].concat();
        ["--capture-listen".to_owned(), listen.to_string()].into_iter().chain(addresses).collect()
    }
}

/// The product's default.
pub(crate) const USUAL: u16 = 1452;
/// Of a 9000-byte network.
pub(super) const JUMBO: u16 = 8952;

/// One cluster's place: ports differ because both may share an address.
struct Place<'a> {
    site: &'a Site,
    cluster: &'static str,
    side: Side,
    base: u16,
    dir: PathBuf,
    max_udp_payload: u16,
}

impl Place<'_> {
    fn at(&self, port: u16) -> String {
        self.site.socket(self.side, self.base + port).to_string()
    }
    fn path(&self, name: &str) -> String {
        self.dir.join(self.cluster).join(name).display().to_string()
    }
    fn socket(&self) -> String {
        self.path("admin.sock")
    }
    fn start(&self, role: &str, args: &[&str], port: Port) -> Result<Process> {
        let spec = ProcessSpec::new(role, tombolo_binary()?).args(args).args(["--log-level", "warn"]);
        self.site.start(self.side, spec, &[port])
    }
    fn token(&self, role: &str, name: &str) -> Result<String> {
        let args =
            ["--socket", &self.socket(), "token", "create", "--role", role, "--name", name, "-n", "bench"];
        let path = self.path(&format!("{name}.token"));
        std::fs::write(&path, tombolo(&args, "")?)?;
        Ok(path)
    }

    fn federator(&self, trust: &str) -> Result<Process> {
        tombolo(&["trust", "cluster", self.cluster, "--dir", trust, "--out", &self.path("trust")], "")?;
        let (trust, state, socket) = (self.path("trust"), self.path("federator"), self.socket());
        let (listen, admin) = (self.at(1), self.at(2));
        let args = ["federator", "--cluster", self.cluster, "--trust-dir", &trust, "--state-dir", &state];
        let args = [&args[..], &["--listen", &listen, "--admin", &admin, "--socket", &socket]].concat();
        let process = self.start(&format!("federator-{}", self.cluster), &args, Port::Udp(self.base + 1))?;
        wait("the federator's socket", || std::fs::exists(&socket).unwrap_or(false).then_some(()))?;
        Ok(process)
    }

    fn gateway(&self, role: &str) -> Result<Process> {
        let (token, state) = (self.token("gateway", "gw-1")?, self.path("gw-1"));
        let (border, inner, admin) = (self.at(3), self.at(4), self.at(5));
        let args = ["gateway", "--name", "gw-1", "--join-token-file", &token, "--state-dir", &state];
        // One worker: what one core forwards. The path's other three processes have one thread each as well.
        let args =
            [&args[..], &["--border", &border, "--inner", &inner, "--admin", &admin, "--workers", "1"]]
                .concat();
        self.start(role, &args, Port::Udp(self.base + 3))
    }

    fn sidecar(&self, role: &str, name: &str, at: u16, extra: &[&str], port: Port) -> Result<Process> {
        let (token, state) = (self.token("sidecar", name)?, self.path(name));
        let (overlay, admin) = (self.at(at), self.at(at + 1));
        let payload = self.max_udp_payload.to_string();
        let args = ["sidecar", "--name", name, "--join-token-file", &token, "--state-dir", &state];
        let args = [&args[..], &["--max-udp-payload", &payload]].concat();
        let args = [&args[..], &["--bind", &overlay, "--announce", &overlay, "--admin", &admin]].concat();
        self.start(role, &[&args[..], extra].concat(), port)
    }
}

impl Topology for Tombolo {
    fn name(&self) -> String {
        if self.max_udp_payload == USUAL { "tombolo" } else { "tombolo-9000" }.to_owned()
    }

    fn description(&self) -> String {
        format!(
            "tombolo x4: sidecar -> gateway -> gateway -> sidecar, two linked clusters, end-to-end mTLS QUIC in \
             packets of up to {} bytes",
            self.max_udp_payload
        )
    }

    fn start(&self, site: &Site) -> Result<Running> {
        let dir = site.dir().join("tombolo");
        // Each start is a new federation: state of an earlier one has other keys.
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(dir.join("east"))?;
        std::fs::create_dir_all(dir.join("west"))?;
        let trust = dir.join("root").display().to_string();
        tombolo(&["trust", "init", "--trust-domain", "bench.example", "--dir", &trust], "")?;
        let max_udp_payload = self.max_udp_payload;
        let east =
            Place { site, cluster: "east", side: Side::Near, base: 22300, dir: dir.clone(), max_udp_payload };
        let west = Place { site, cluster: "west", side: Side::Far, base: 22400, dir, max_udp_payload };

        let mut support = vec![east.federator(&trust)?, west.federator(&trust)?];
        let gateway_near = east.gateway("gateway-near")?;
        let gateway_far = west.gateway("gateway-far")?;
        std::thread::sleep(Duration::from_secs(1));
        let token = tombolo(&["--socket", &east.socket(), "link", "token", "west"], "")?;
        tombolo(&["--socket", &west.socket(), "link", "join", "-"], &token)?;

        let serves = [
            format!("bench/http:80={}", site.origin_http()),
            format!("bench/bulk:81={}", site.origin_bulk()),
        ];
        let datagrams = |flag: &str, side, port| match self.datagrams {
            true => vec![flag.to_owned(), format!("bench/udp:82/udp={}", site.socket(side, port))],
            false => Vec::new(),
        };
        let served = datagrams("--service", Side::Far, ORIGIN_UDP_PORT);
        let served: Vec<&str> = served.iter().map(String::as_str).collect();
        let [http, bulk] = &serves;
        let sidecar_in = west.sidecar(
            "sidecar-in",
            "origin",
            10,
            &[&["--service", http, "--service", bulk], &served[..]].concat(),
            Port::Udp(west.base + 10),
        )?;
        tombolo(&["--socket", &west.socket(), "apply", "-f", "-"], EXPORTS)?;
        let entry = (site.socket(Side::Near, ENTRY_HTTP_PORT), site.socket(Side::Near, ENTRY_BULK_PORT));
        let calls = [format!("bench/http:80={}", entry.0), format!("bench/bulk:81={}", entry.1)];
        let [http, bulk] = &calls;
        let captured = self.captured.map(|captured| captured.flags()).unwrap_or_default();
        let called = datagrams("--upstream", Side::Near, ENTRY_UDP_PORT);
        let called: Vec<&str> = called.iter().map(String::as_str).collect();
        let captured: Vec<&str> = captured.iter().map(String::as_str).collect();
        let sidecar_out = east.sidecar(
            "sidecar-out",
            "client",
            10,
            &[&["--upstream", http, "--upstream", bulk], &captured[..], &called[..]].concat(),
            Port::Tcp(entry.0.port()),
        )?;
        wait("the first answer through the mesh", || answers(site, entry.0).ok())?;
        support.shrink_to_fit();
        Ok(Running {
            http: entry.0,
            bulk: entry.1,
            hops: vec![sidecar_out, gateway_near, gateway_far, sidecar_in],
            support,
        })
    }
}

fn wait(what: &str, check: impl Fn() -> Option<()>) -> Result<()> {
    let deadline = Instant::now() + READY;
    while Instant::now() < deadline {
        if check().is_some() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("not within {READY:?}: {what}")
}

/// Whether a request gets through.
fn answers(site: &Site, entry: SocketAddr) -> Result<()> {
    let ask = || -> Result<()> {
        let mut stream = TcpStream::connect_timeout(&entry, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        stream.write_all(b"GET /1k HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        ensure!(answer.starts_with(b"HTTP/1.1 200"), "another answer");
        Ok(())
    };
    match site.namespace(Side::Near) {
        Some(namespace) => namespace.run(ask)?,
        None => ask(),
    }
}
