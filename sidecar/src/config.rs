//! What a sidecar is told to do: parsed here, checked before anything is bound.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use tombolo_model::names::{NameError, ServiceKey};
use tombolo_model::protocol::Protocol;
use tombolo_names::server::NamesConfig;
use tombolo_overlay::MAX_PARTS;
use tombolo_overlay::member::{EntryPoints, ServiceAccountToken};

use crate::agentless::Backend;
use crate::capture::CaptureConfig;
use crate::capture::settings::MAX_ADDRESSES;
use crate::health::{HealthCheck, Probe};
use crate::inbound::InboundLimits;
use crate::pool::PoolLimits;
use crate::provided::Provided;
use crate::udp::UdpLimits;
use crate::workload_api::WorkloadApiConfig;

/// Where the overlay listens unless told otherwise (design section 3).
pub const DEFAULT_PORT: u16 = 7442;
/// Fits a path of 1500 bytes over IPv6.
pub const DEFAULT_UDP_PAYLOAD: u16 = 1452;
/// Fits a path of 9000 bytes; receive buffers grow with it (18 MB at this size).
pub const MAX_UDP_PAYLOAD: u16 = 8972;
/// Long enough for requests, short enough for a pod's usual 30 s of grace.
pub const DEFAULT_DRAIN: Duration = Duration::from_secs(10);

/// A service of the local application, on one port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPort {
    pub name: String,
    /// As callers name it.
    pub port: u16,
    pub protocol: Protocol,
    /// Where the application listens.
    pub target: SocketAddr,
    pub app_protocol: String,
}

/// A service that the local application provides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceConfig {
    pub service: ServiceKey,
    pub ports: Vec<LocalPort>,
    /// Without a sidecar of their own, behind this one: then its one port leads to them and not to its target.
    pub backends: Vec<Backend>,
    /// How the application is checked; a TCP connect to its first port unless told otherwise.
    pub health: HealthCheck,
    /// Capacity relative to others; 100 is usual.
    pub weight: u32,
}

impl ServiceConfig {
    /// How and where the application is checked: at the address that the check names, else at its first TCP port. One that
    /// has UDP ports alone is taken for healthy.
    pub fn checked(&self) -> Option<(HealthCheck, SocketAddr)> {
        let first = self.ports.first()?;
        let tcp = self.ports.iter().find(|port| port.protocol == Protocol::Tcp).map(|port| port.target);
        match self.health.target.or(tcp) {
            Some(target) => Some((self.health.clone(), target)),
            // Asks no port at all.
            None if matches!(self.health.probe, Probe::Command { .. }) => {
                Some((self.health.clone(), first.target))
            }
            None => Some((HealthCheck { probe: Probe::None, ..self.health.clone() }, first.target)),
        }
    }
}

/// A service that the local application calls, at a local address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamConfig {
    pub service: ServiceKey,
    pub port: u16,
    pub protocol: Protocol,
    /// Where the application connects to.
    pub listen: SocketAddr,
    /// Connections kept open although nothing uses them.
    pub warm: usize,
}

/// Everything that a sidecar is told.
#[derive(Clone, Debug)]
pub struct SidecarConfig {
    /// Name and, with namespace, identity in the cluster; must be the token's.
    pub name: String,
    pub state_dir: PathBuf,
    /// A join token's text; needed once, while the state directory is empty.
    pub token: Option<String>,
    /// The token of the service account that it joins as; `token` is one for pods then.
    pub service_account_token: Option<ServiceAccountToken>,
    pub bind: SocketAddr,
    /// Where gateways and neighbours reach this sidecar: `None` with an unspecified bind address means that it has none
    /// (a VM behind NAT) and REGISTERs.
    pub announce: Option<SocketAddr>,
    /// As cloud providers name them; empty when unknown. Gateways of the same zone are preferred.
    pub zone: String,
    /// Where gateways may be found when none of those last known answers.
    pub gateways: EntryPoints,
    /// Largest UDP payload that is tried on a path; what fits is found out.
    pub max_udp_payload_bytes: u16,
    pub services: Vec<ServiceConfig>,
    /// Beside those: services that come, go and change while it runs; `None`: there are none.
    pub provided: Option<Provided>,
    pub upstreams: Vec<UpstreamConfig>,
    pub admin: SocketAddr,
    /// Of the byte path, each with a runtime of its own.
    pub threads: NonZeroUsize,
    pub drain: Duration,
    pub inbound: InboundLimits,
    pub pool: PoolLimits,
    pub udp: UdpLimits,
    /// Where the application gets its own identity; `None`: nowhere.
    pub workload_api: Option<WorkloadApiConfig>,
    /// Connections that the machine's rules hand over; `None`: none are taken.
    pub capture: Option<CaptureConfig>,
    /// Where local applications resolve names; `None`: nowhere.
    pub names: Option<NamesConfig>,
    /// Where agentless backends may be although it is dangerous.
    pub agentless_allow: Vec<IpNet>,
}

/// What is wrong with a setting, and what would be right.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error(
        "{flag} {value:?}: {reason}: write NAMESPACE/NAME:PORT=ADDRESS:PORT, e.g. shop/web:80=127.0.0.1:8080, or shop/dns:53/udp=127.0.0.1:5353"
    )]
    Mapping { flag: &'static str, value: String, reason: String },
    #[error("service {service} names port {port}/{protocol} twice: each port has one target")]
    PortTwice { service: ServiceKey, port: u16, protocol: Protocol },
    #[error("service {service} is given twice: list its ports under one entry")]
    ServiceTwice { service: ServiceKey },
    #[error("service {service} has no port: give at least one")]
    NoPort { service: ServiceKey },
    #[error("upstreams {first} and {second} both listen on {listen}: choose another address for one")]
    ListenTwice { first: ServiceKey, second: ServiceKey, listen: SocketAddr },
    #[error(
        "nothing to do: give at least one --service or --upstream, a --workload file, --capture-listen, --dns-listen, or --workload-api"
    )]
    Nothing,
    #[error(
        "--capture-address {value:?}: {reason}: write ADDRESS:PORT=NAMESPACE/NAME, e.g. 10.0.0.7:5432=shop/db, and the service's port behind it where it is another one: 10.0.0.7:5432=shop/db:5433"
    )]
    CaptureAddress { value: String, reason: String },
    #[error("--capture-address {address} stands for {first} and for {second}: one address has one service")]
    CaptureAddressTwice { address: SocketAddr, first: ServiceKey, second: ServiceKey },
    #[error("--capture-address: {count} addresses, at most {MAX_ADDRESSES}")]
    CaptureAddresses { count: usize },
    #[error(
        "--capture-address {address}: nothing listens for captured connections: give --capture-listen, e.g. 127.0.0.1:7447"
    )]
    CaptureNowhere { address: SocketAddr },
    #[error("{flag} {listen} is not loopback: others could speak to it; give 127.0.0.1 or [::1] with a port")]
    CaptureListen { flag: &'static str, listen: SocketAddr },
    #[error("captured connections are to arrive at {listen} twice: give each listener a port of its own")]
    CaptureListenTwice { listen: SocketAddr },
    #[error(
        "--max-udp-payload {bytes} is not in 1200..={MAX_UDP_PAYLOAD}: 1452 fits the usual 1500-byte paths, 8952 those of 9000 bytes"
    )]
    Payload { bytes: u16 },
    #[error("--threads {threads}: at most {MAX_PARTS} threads share one address")]
    Threads { threads: usize },
    #[error(
        "announced address {address}: 0.0.0.0 and port 0 reach nobody: give the address that gateways can send to, or leave it out on a machine behind NAT"
    )]
    Announce { address: SocketAddr },
}

impl SidecarConfig {
    /// Checks what can be checked before anything is bound.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.services.is_empty()
            && self.provided.is_none()
            && self.upstreams.is_empty()
            && self.workload_api.is_none()
            && self.capture.is_none()
            && self.names.is_none()
        {
            return Err(ConfigError::Nothing);
        }
        if let Some(capture) = &self.capture {
            capture.check()?;
        }
        if let Some(address) = self.announce
            && (address.ip().is_unspecified() || address.port() == 0)
        {
            return Err(ConfigError::Announce { address });
        }
        if self.threads.get() > MAX_PARTS {
            return Err(ConfigError::Threads { threads: self.threads.get() });
        }
        if !(1200..=MAX_UDP_PAYLOAD).contains(&self.max_udp_payload_bytes) {
            return Err(ConfigError::Payload { bytes: self.max_udp_payload_bytes });
        }
        let mut seen = HashMap::new();
        for service in &self.services {
            if seen.insert(&service.service, ()).is_some() {
                return Err(ConfigError::ServiceTwice { service: service.service.clone() });
            }
            if service.ports.is_empty() {
                return Err(ConfigError::NoPort { service: service.service.clone() });
            }
            let mut ports = HashMap::new();
            for port in &service.ports {
                if ports.insert((port.protocol, port.port), ()).is_some() {
                    let service = service.service.clone();
                    return Err(ConfigError::PortTwice { service, port: port.port, protocol: port.protocol });
                }
            }
        }
        let mut listening: HashMap<(Protocol, SocketAddr), &ServiceKey> = HashMap::new();
        for upstream in self.upstreams.iter().filter(|u| u.listen.port() != 0) {
            if let Some(first) = listening.insert((upstream.protocol, upstream.listen), &upstream.service) {
                return Err(ConfigError::ListenTwice {
                    first: first.clone(),
                    second: upstream.service.clone(),
                    listen: upstream.listen,
                });
            }
        }
        Ok(())
    }

    /// Ports on which this process listens: no agentless backend is there.
    pub fn own_ports(&self) -> Vec<u16> {
        let capture = self.capture.iter().flat_map(|capture| {
            let inbound = capture.inbound.iter().flat_map(|inbound| &inbound.listen);
            capture.listen.iter().chain(inbound)
        });
        let upstreams = self.upstreams.iter().map(|upstream| upstream.listen.port());
        let names = self.names.iter().map(|names| names.listen.port());
        let fixed = [self.bind.port(), self.admin.port()].into_iter();
        fixed
            .chain(capture.map(SocketAddr::port))
            .chain(upstreams)
            .chain(names)
            .filter(|port| *port != 0)
            .collect()
    }

    /// Whether gateways have to be told by REGISTER where this sidecar is.
    pub fn registers(&self) -> bool {
        self.announce.is_none() && self.bind.ip().is_unspecified()
    }
}

/// `NAMESPACE/NAME:PORT[/udp]=ADDRESS:PORT`, as given by `--service` and `--upstream`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub service: ServiceKey,
    pub port: u16,
    pub protocol: Protocol,
    pub address: SocketAddr,
}

impl Mapping {
    /// `flag` is named in errors.
    pub fn parse(flag: &'static str, text: &str) -> Result<Self, ConfigError> {
        let failed = |reason: String| {
            let value = text.chars().take(200).collect();
            ConfigError::Mapping { flag, value, reason }
        };
        let (left, address) = text.split_once('=').ok_or_else(|| failed("there is no '='".into()))?;
        let (left, protocol) = Protocol::suffix(left);
        let (service, port) =
            left.rsplit_once(':').ok_or_else(|| failed("the service has no port".into()))?;
        let port = port.parse::<u16>().ok().filter(|p| *p != 0);
        Ok(Self {
            service: service.parse().map_err(|e: NameError| failed(e.to_string()))?,
            port: port.ok_or_else(|| failed("the service's port is not in 1..=65535".into()))?,
            protocol,
            address: address
                .parse()
                .map_err(|_| failed(format!("{address:?} is not an IP address with a port")))?,
        })
    }
}

impl FromStr for Mapping {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        Self::parse("mapping", text)
    }
}

/// Services from `--service` flags: the ports of one service are gathered.
pub fn services_from(mappings: impl IntoIterator<Item = Mapping>) -> Vec<ServiceConfig> {
    let mut services: Vec<ServiceConfig> = Vec::new();
    for Mapping { service, port, protocol, address } in mappings {
        let (name, app_protocol) = Default::default();
        let local = LocalPort { name, port, protocol, target: address, app_protocol };
        match services.iter_mut().find(|s| s.service == service) {
            Some(known) => known.ports.push(local),
            None => services.push(ServiceConfig {
                service,
                ports: vec![local],
                backends: Vec::new(),
                health: HealthCheck::default(),
                weight: 100,
            }),
        }
    }
    services
}

/// Upstreams from `--upstream` flags.
pub fn upstreams_from(mappings: impl IntoIterator<Item = Mapping>) -> Vec<UpstreamConfig> {
    let upstream = |Mapping { service, port, protocol, address }| UpstreamConfig {
        service,
        port,
        protocol,
        listen: address,
        warm: 0,
    };
    mappings.into_iter().map(upstream).collect()
}

#[cfg(test)]
mod tests;
