//! What `vm join` is asked for, checked by the very code that will read it: the settings files of sidecar and rules.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use tombolo_sidecar::capture::settings::DEFAULT_PORT as CAPTURE_PORT;
use tombolo_sidecar::config::{DEFAULT_PORT, SidecarConfig};

use super::place::Place;
use crate::cmd::names::address;
use crate::cmd::sidecar;
use crate::cmd::sidecar::capture::Prepared;
use crate::failure::Failure;

const HEADER: &str = "# Written by `tombolo vm join`; `tombolo vm leave` takes it away.\n";
/// Of a resolver that a resolv.conf can name, beside systemd-resolved's own stubs.
const RESOLVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 54)), 53);
/// systemd-resolved serves on the address above itself, and can be given a port.
const RESOLVER_BEHIND_RESOLVED: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7453);
const DNS: u16 = 53;

#[derive(Clone, Debug, Args)]
pub struct Wishes {
    /// A `Workload` manifest: services with their health checks, and upstreams; a copy of it is kept
    #[arg(long, value_name = "FILE")]
    workload: Option<PathBuf>,
    /// An address to take over for a service, ADDRESS:PORT=NAMESPACE/NAME; may be repeated
    #[arg(long = "capture-address", value_name = "MAPPING")]
    capture_addresses: Vec<String>,
    /// Range of virtual addresses, as the federator has it; may be repeated [default: 241.64.0.0/16]
    #[arg(long = "virtual-range", value_name = "CIDR")]
    virtual_ranges: Vec<String>,
    /// Leave the machine's rules alone: applications use --workload's upstreams
    #[arg(long, conflicts_with_all = ["capture_addresses", "virtual_ranges"])]
    no_capture: bool,
    /// Leave the machine's resolver alone
    #[arg(long, conflicts_with_all = ["dns_listen", "search"])]
    no_dns: bool,
    /// Where the sidecar serves names [default: 127.0.0.54:53, 127.0.0.1:7453 with systemd-resolved]
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    dns_listen: Option<String>,
    /// A domain in which short names are looked up; may be repeated
    #[arg(long, value_name = "DOMAIN")]
    search: Vec<String>,
    /// Overlay socket [default: 0.0.0.0:7442]
    #[arg(long, value_name = "ADDRESS:PORT/udp")]
    bind: Option<SocketAddr>,
    /// Metrics and readiness of the sidecar [default: 127.0.0.1:7445]
    #[arg(long, value_name = "ADDRESS:PORT")]
    admin: Option<SocketAddr>,
    /// Where this machine is, e.g. eu-west-1a: gateways of the same zone are used first
    #[arg(long, value_name = "ZONE")]
    zone: Option<String>,
    /// Where a gateway of the cluster may be found after a long time off: HOST:PORT; may be repeated
    #[arg(long = "gateway", value_name = "HOST:PORT")]
    gateways: Vec<String>,
}

/// The sidecar's settings file.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct SidecarFile {
    name: String,
    state_dir: PathBuf,
    bind: SocketAddr,
    admin: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    zone: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    gateways: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    workload: Option<PathBuf>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    capture_listen: Vec<SocketAddr>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    capture_addresses: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    virtual_ranges: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dns_listen: Option<String>,
}

/// The rules' settings file.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct CaptureFile {
    port: u16,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    addresses: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    virtual_ranges: Vec<String>,
}

/// Checked, and as text.
#[derive(Debug)]
pub struct Chosen {
    pub sidecar: String,
    pub config: SidecarConfig,
    /// The rules, and the text of their settings.
    pub capture: Option<(Prepared, String)>,
    pub workload: Option<String>,
    pub resolver: Option<SocketAddr>,
    pub resolved: bool,
    pub search: Vec<String>,
}

impl Wishes {
    /// Everything that can be wrong without asking anybody is found here.
    pub fn choose(&self, name: &str, place: &Place) -> Result<Chosen, Failure> {
        let resolved = place.has_resolved();
        let resolver = match (&self.dns_listen, self.no_dns) {
            (_, true) => None,
            (Some(text), false) => Some(address("--dns-listen", text, DNS)?),
            (None, false) if resolved => Some(RESOLVER_BEHIND_RESOLVED),
            (None, false) => Some(RESOLVER),
        };
        if let Some(resolver) = resolver.filter(|resolver| !resolved && resolver.port() != DNS) {
            return Err(Failure::usage(format_args!(
                "--dns-listen {resolver}: a resolv.conf can only name port 53"
            ))
            .remedy("give a free address with port 53, or --no-dns"));
        }
        let file = |workload: Option<PathBuf>| SidecarFile {
            name: name.to_owned(),
            state_dir: place.identity(name),
            bind: self.bind.unwrap_or(SocketAddr::from((Ipv4Addr::UNSPECIFIED, DEFAULT_PORT))),
            admin: self.admin.unwrap_or(tombolo_runtime::admin::DEFAULT_ADDRESS),
            zone: self.zone.clone(),
            gateways: self.gateways.clone(),
            workload,
            capture_listen: if self.no_capture { Vec::new() } else { capture_listeners() },
            capture_addresses: self.capture_addresses.clone(),
            virtual_ranges: self.virtual_ranges.clone(),
            dns_listen: resolver.map(|resolver| resolver.to_string()),
        };
        let workload = self.workload.as_ref().map(|path| std::path::absolute(path).unwrap_or(path.clone()));
        // With the manifest where it still is; what is written names the copy.
        let config = sidecar::config_of(&yaml(&file(workload.clone()))?)?;
        let text = workload.as_deref().map(read).transpose()?;
        let kept = text.as_ref().map(|_| place.workload());
        Ok(Chosen {
            sidecar: format!("{HEADER}{}", yaml(&file(kept))?),
            config,
            capture: if self.no_capture { None } else { Some(self.capture()?) },
            workload: text,
            resolver,
            resolved,
            search: self.search.clone(),
        })
    }

    fn capture(&self) -> Result<(Prepared, String), Failure> {
        let file = CaptureFile {
            port: CAPTURE_PORT,
            addresses: self.capture_addresses.clone(),
            virtual_ranges: self.virtual_ranges.clone(),
        };
        let text = format!("{HEADER}{}", yaml(&file)?);
        Ok((Prepared::read(&text)?, text))
    }
}

fn capture_listeners() -> Vec<SocketAddr> {
    let six = SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, CAPTURE_PORT));
    // Where IPv6 is off there is nothing to capture by it.
    let six = TcpListener::bind((six.ip(), 0)).is_ok().then_some(six);
    [SocketAddr::from((Ipv4Addr::LOCALHOST, CAPTURE_PORT))].into_iter().chain(six).collect()
}

fn yaml(value: &impl Serialize) -> Result<String, Failure> {
    serde_saphyr::to_string(value).map_err(Failure::new)
}

fn read(path: &Path) -> Result<String, Failure> {
    let bytes = tombolo_identity::files::read(path, crate::manifest::MAX_FILE_BYTES);
    let bytes = bytes.map_err(|e| Failure::new(crate::failure::chain(&e)))?;
    String::from_utf8(bytes).map_err(|_| Failure::usage("is not text").at(path.display()))
}

impl Chosen {
    /// Every address that the sidecar will listen on is free: found out before a token is used up.
    pub fn ports_are_free(&self) -> Result<(), Failure> {
        let udp = |flag, at: SocketAddr| taken(flag, at, "UDP", UdpSocket::bind(at).map(drop));
        let tcp = |flag, at: SocketAddr| taken(flag, at, "TCP", TcpListener::bind(at).map(drop));
        udp("--bind", self.config.bind)?;
        tcp("--admin", self.config.admin)?;
        if let Some(capture) = &self.config.capture {
            capture.listen.iter().try_for_each(|at| tcp("captured connections", *at))?;
        }
        if let Some(resolver) = self.resolver {
            udp("--dns-listen", resolver)?;
            tcp("--dns-listen", resolver)?;
        }
        self.config
            .upstreams
            .iter()
            .try_for_each(|upstream| tcp("an upstream of --workload", upstream.listen))
    }
}

fn taken(flag: &str, at: SocketAddr, protocol: &str, bound: std::io::Result<()>) -> Result<(), Failure> {
    bound.map_err(|error| {
        Failure::new(format_args!("{flag}: {protocol} {at} can't be used: {error}; nothing was changed"))
            .remedy("stop what uses it (`ss -lnp` names it), or give another address")
    })
}
