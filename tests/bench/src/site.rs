//! Where topologies run: one namespace for the local scenario, two with an emulated link between them for the
//! wide-area ones, or the machine's own network where namespaces cannot be had. Also the origins behind every topology.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tombolo_tests::capability::find_program;
use tombolo_tests::link::{Link, LinkEnd, Shape};
use tombolo_tests::netns::{Namespace, VethEnd, veth};
use tombolo_tests::process::{Process, ProcessSpec};

use crate::certificates::Certificates;

/// Ports are fixed: inside a namespace nobody else has them.
const ORIGIN_HTTP_PORT: u16 = 20080;
const ORIGIN_BULK_PORT: u16 = 20081;
/// Where clients enter a topology.
pub const ENTRY_HTTP_PORT: u16 = 21080;
pub const ENTRY_BULK_PORT: u16 = 21081;

/// How long a started process may take until its sockets are bound.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Which half of a path a process is in. Locally both are the same place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// With the client.
    Near,
    /// With the origin.
    Far,
}

#[derive(Debug)]
enum Network {
    Machine,
    Local(Namespace),
    Cable { near: Namespace, far: Namespace },
    // The link's devices go before the namespaces they are in.
    WideArea { link: Link, near: Namespace, far: Namespace },
}

/// One place to run topologies in, one after the other.
#[derive(Debug)]
pub struct Site {
    network: Network,
    dir: PathBuf,
    pub certificates: Certificates,
}

impl Site {
    /// Everything over loopback, in a namespace if the machine allows one.
    pub fn local(dir: &Path) -> Result<Self> {
        let network = match tombolo_tests::capability::netns() {
            Ok(_) => Network::Local(quiet(Namespace::create("bench")?)?),
            Err(reason) => {
                eprintln!("note: measuring in the machine's own network: {reason}");
                Network::Machine
            }
        };
        Self::with(network, dir)
    }

    /// Client and origin on the two ends of a link of this shape.
    pub fn wide_area(dir: &Path, shape: Shape) -> Result<Self> {
        let (near, far) = (quiet(Namespace::create("near")?)?, quiet(Namespace::create("far")?)?);
        let link = Link::start(
            LinkEnd { namespace: &near, device: "wan0", address: NEAR_ADDRESS },
            LinkEnd { namespace: &far, device: "wan0", address: FAR_ADDRESS },
            shape,
            1,
        )?;
        Self::with(Network::WideArea { link, near, far }, dir)
    }

    /// Client and origin in two namespaces, joined by a cable that is as fast as the kernel.
    pub fn cable(dir: &Path) -> Result<Self> {
        let (near, far) = (quiet(Namespace::create("near")?)?, quiet(Namespace::create("far")?)?);
        veth(
            VethEnd { namespace: &near, device: "cable", address: &format!("{NEAR_ADDRESS}/24") },
            VethEnd { namespace: &far, device: "cable", address: &format!("{FAR_ADDRESS}/24") },
            1500,
        )?;
        Self::with(Network::Cable { near, far }, dir)
    }

    fn with(network: Network, dir: &Path) -> Result<Self> {
        let dir = dir.to_owned();
        let certificates = Certificates::create(&dir)?;
        Ok(Self { network, dir, certificates })
    }

    /// The kernel's congestion control for TCP sockets made from now on. Nothing to choose in the machine's network.
    pub fn set_congestion_control(&self, algorithm: &str) -> Result<()> {
        match &self.network {
            Network::Machine => Ok(()),
            Network::Local(namespace) => namespace.set_congestion_control(algorithm),
            Network::WideArea { near, far, .. } | Network::Cable { near, far } => {
                near.set_congestion_control(algorithm)?;
                far.set_congestion_control(algorithm)
            }
        }
    }

    pub fn link(&self) -> Option<&Link> {
        match &self.network {
            Network::WideArea { link, .. } => Some(link),
            Network::Machine | Network::Local(_) | Network::Cable { .. } => None,
        }
    }

    pub fn namespace(&self, side: Side) -> Option<&Namespace> {
        match (&self.network, side) {
            (Network::Machine, _) => None,
            (Network::Local(namespace), _) => Some(namespace),
            (Network::WideArea { near, .. } | Network::Cable { near, .. }, Side::Near) => Some(near),
            (Network::WideArea { far, .. } | Network::Cable { far, .. }, Side::Far) => Some(far),
        }
    }

    /// Address of a side as the other side reaches it.
    pub fn address(&self, side: Side) -> IpAddr {
        match (&self.network, side) {
            (Network::Machine | Network::Local(_), _) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            (_, Side::Near) => NEAR_ADDRESS,
            (_, Side::Far) => FAR_ADDRESS,
        }
    }

    pub fn socket(&self, side: Side, port: u16) -> SocketAddr {
        SocketAddr::new(self.address(side), port)
    }

    pub fn origin_http(&self) -> SocketAddr {
        self.socket(Side::Far, ORIGIN_HTTP_PORT)
    }

    pub fn origin_bulk(&self) -> SocketAddr {
        self.socket(Side::Far, ORIGIN_BULK_PORT)
    }

    /// Directory for configuration and logs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// Starts a process on a side and waits until it has bound `ports`.
    pub fn start(&self, side: Side, spec: ProcessSpec, ports: &[Port]) -> Result<Process> {
        let process = spec.within_optional(self.namespace(side)).spawn(&self.dir)?;
        let deadline = Instant::now() + START_LIMIT;
        while !ports.iter().all(|port| port.is_bound(process.pid())) {
            if process.has_exited() || Instant::now() >= deadline {
                bail!("{} did not bind {ports:?}:\n{}", process.name(), process.tail());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(process)
    }

    /// nginx with a static 1 KiB file, and the bulk origin.
    pub fn start_origins(&self) -> Result<Vec<Process>> {
        let root = self.dir.join("www");
        std::fs::create_dir_all(&root)?;
        std::fs::write(root.join("1k"), vec![b'x'; 1024])?;
        let config = self.write("origin.conf", &nginx_origin(&self.dir, self.origin_http(), &root))?;
        let nginx =
            ProcessSpec::new("origin-http", program("nginx")?).arg("-c").arg(config).arg("-p").arg(&self.dir);
        let listen = self.origin_bulk().to_string();
        let bulk = ProcessSpec::new("origin-bulk", own_program()?).args(["origin", "--listen", &listen]);
        Ok(vec![
            self.start(Side::Far, nginx, &[Port::Tcp(ORIGIN_HTTP_PORT)])?,
            self.start(Side::Far, bulk, &[Port::Tcp(ORIGIN_BULK_PORT)])?,
        ])
    }
}

const NEAR_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 78, 0, 1));
const FAR_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 78, 0, 2));

/// Room for tens of thousands of short connections. Socket buffer limits stay the system's defaults on purpose.
fn quiet(namespace: Namespace) -> Result<Namespace> {
    namespace.sysctl("net.ipv4.ip_local_port_range", "23000 65535")?;
    namespace.sysctl("net.core.somaxconn", "8192")?;
    namespace.sysctl("net.ipv4.tcp_max_syn_backlog", "8192")?;
    Ok(namespace)
}

fn nginx_origin(dir: &Path, listen: SocketAddr, root: &Path) -> String {
    format!(
        "daemon off; worker_processes 1; error_log stderr warn; pid {dir}/origin.pid; user root;
events {{ worker_connections 20000; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000; keepalive_timeout 300s;
  open_file_cache max=100;
  client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3;
  uwsgi_temp_path {dir}/t4; scgi_temp_path {dir}/t5;
  server {{ listen {listen} backlog=8192; root {root}; }}
}}
",
        dir = dir.display(),
        root = root.display(),
    )
}

pub fn program(name: &str) -> Result<PathBuf> {
    find_program(name).with_context(|| format!("`{name}` is not installed (tests/setup.sh installs it)"))
}

/// This very binary, for its internal subcommands.
pub fn own_program() -> Result<PathBuf> {
    std::env::current_exe().context("find this program's own path")
}

/// A port that a process listens on.
#[derive(Debug, Clone, Copy)]
pub enum Port {
    Tcp(u16),
    Udp(u16),
}

impl Port {
    /// Looked up in the kernel's table of the process's namespace: nothing is sent, so nothing gets warm by asking.
    fn is_bound(self, pid: u32) -> bool {
        let (table, port, state) = match self {
            // Listening is state 0A, an unconnected UDP socket 07 (include/net/tcp_states.h).
            Self::Tcp(port) => ("tcp", port, "0A"),
            Self::Udp(port) => ("udp", port, "07"),
        };
        let text = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        text.lines().skip(1).any(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let local =
                fields.next().and_then(|local| local.rsplit_once(':')).map(|(_, port)| port.to_owned());
            local.is_some_and(|hex| u16::from_str_radix(&hex, 16) == Ok(port)) && fields.nth(1) == Some(state)
        })
    }
}
