//! `tombolo sidecar`: the data plane of one workload.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use ipnet::IpNet;
use serde::Deserialize;
use tombolo_overlay::member::{EntryPoints, ServiceAccountToken};
use tombolo_runtime::{admin, dirs::Dirs};
use tombolo_sidecar::config::{
    self, Mapping, ServiceConfig, SidecarConfig, UpstreamConfig, services_from, upstreams_from,
};
use tombolo_sidecar::inbound::InboundLimits;
use tombolo_sidecar::pool::PoolLimits;
use tombolo_sidecar::workload_api::WorkloadApiConfig;

use super::names;
use super::role::{self, Span, layered};
use tombolo_runtime::signals;
use tombolo_runtime::tasks::TaskGroup;
use tombolo_sidecar::role::Sidecar;

use self::threads::Threads;
use crate::failure::{Exit, Failure};

pub mod capture;
mod captured;
pub mod dns;
mod shared;
mod threads;
mod udp;
mod workload;

/// Run the data plane of one workload
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo token create --role sidecar --name web -n shop > web.token      where the federator runs
  tombolo sidecar --name web --join-token-file web.token \\
      --service shop/web:80=127.0.0.1:8080 --health shop/web=http:/healthz
  tombolo sidecar --name client --join-token-file client.token --upstream shop/web:80=127.0.0.1:9080
  tombolo sidecar --name db-1 --join-token-file vm.token --workload db.yaml

In Kubernetes, as the pod's service account (docs/operations.md shows the pod):
  tombolo sidecar --name web --join-token-file /etc/tombolo/pods.token \\
      --service-account-token /var/run/secrets/tombolo/token --service shop/web:80=127.0.0.1:8080

With the SPIFFE Workload API, for applications that do their own mTLS or carry tokens; these are told where it is by
SPIFFE_ENDPOINT_SOCKET=unix:///run/tombolo/web/workload.sock:
  tombolo sidecar --name web --service shop/web:80=127.0.0.1:8080 \\
      --workload-api /run/tombolo/web/workload.sock --workload-api-uid 1000

With callers that know nothing of the mesh; `tombolo sidecar capture` puts the rules in place:
  tombolo sidecar capture apply --address 10.0.0.7:5432
  tombolo sidecar --name client --capture-listen 127.0.0.1:7447 --capture-address 10.0.0.7:5432=shop/db

A UDP service, and a caller's address for it:
  tombolo sidecar --name dns --join-token-file dns.token --service shop/dns:53/udp=127.0.0.1:5353
  tombolo sidecar --name client --join-token-file client.token --upstream shop/dns:53/udp=127.0.0.1:9053

With names for local applications; `tombolo sidecar dns` points the machine's resolver at it:
  tombolo sidecar --name client --upstream shop/web:80=127.0.0.1:9080 --dns-listen 127.0.0.54:53
  tombolo sidecar dns install --resolver 127.0.0.54")]
pub struct SidecarArgs {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    settings: Settings,
    /// YAML file with settings, named as the flags are but in camelCase; unknown keys are errors
    #[arg(long, env = "TOMBOLO_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Capture(capture::CaptureArgs),
    Dns(dns::DnsArgs),
    Shared(Box<shared::SharedArgs>),
}

#[derive(Debug, Default, Args, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Settings {
    /// Its name in the cluster, as the join token has it
    #[arg(long, env = "TOMBOLO_NAME")]
    name: Option<String>,
    /// File with the token of `tombolo token create` or `tombolo vm token`; needed for the first start only
    #[arg(long, env = "TOMBOLO_JOIN_TOKEN_FILE", value_name = "FILE")]
    join_token_file: Option<PathBuf>,
    /// In Kubernetes: the file with this pod's projected service account token. It joins as its service account then, and
    /// --join-token-file is one of `tombolo token pods`
    #[arg(long, env = "TOMBOLO_SERVICE_ACCOUNT_TOKEN", value_name = "FILE")]
    service_account_token: Option<PathBuf>,
    /// Identity, lease and last configuration [default: <state directory>/sidecar/<name>]
    #[arg(long, env = "TOMBOLO_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Overlay socket [default: 0.0.0.0:7442]
    #[arg(long, env = "TOMBOLO_BIND", value_name = "ADDRESS:PORT/udp")]
    bind: Option<SocketAddr>,
    /// Where gateways and neighbours reach it. Left out with an unspecified --bind: it has no such address (NAT), and
    /// keeps itself registered with the gateways
    #[arg(long, env = "TOMBOLO_ANNOUNCE", value_name = "ADDRESS:PORT")]
    announce: Option<SocketAddr>,
    /// In Kubernetes: this pod's address (the downward API's status.podIP). --bind and --admin are there then unless they are
    /// given, and services that the cluster's Kubernetes sends to the pod are served without a --service
    #[arg(long, env = "TOMBOLO_POD_IP", value_name = "ADDRESS")]
    pod_ip: Option<IpAddr>,
    /// Where this workload runs, e.g. eu-west-1a: gateways of the same zone are used first
    #[arg(long, env = "TOMBOLO_ZONE", value_name = "ZONE")]
    zone: Option<String>,
    /// Where a gateway of the cluster may be found if none of those last known answers, e.g. when this machine comes back
    /// after weeks: HOST:PORT, resolved anew each time; may be repeated
    #[arg(long = "gateway", env = "TOMBOLO_GATEWAYS", value_delimiter = ',', value_name = "HOST:PORT")]
    gateways: Option<Vec<String>>,
    /// Largest UDP payload tried on a path, in bytes; 8952 on a network with 9000-byte frames [default: 1452]
    #[arg(long, env = "TOMBOLO_MAX_UDP_PAYLOAD", value_name = "BYTES")]
    max_udp_payload: Option<u16>,
    /// Served here: NAMESPACE/NAME:PORT=ADDRESS:PORT, of UDP NAMESPACE/NAME:PORT/udp=ADDRESS:PORT; may be repeated
    #[arg(long = "service", env = "TOMBOLO_SERVICES", value_delimiter = ',', value_name = "SERVICE")]
    services: Option<Vec<String>>,
    /// How a service is checked: NAMESPACE/NAME=tcp, =http:/path or =none; may be repeated [default: tcp, and none where it
    /// has UDP ports alone]
    #[arg(long = "health", env = "TOMBOLO_HEALTH", value_delimiter = ',', value_name = "CHECK")]
    health: Option<Vec<String>>,
    /// Called from here: NAMESPACE/NAME:PORT=ADDRESS:PORT to listen on, of UDP NAMESPACE/NAME:PORT/udp=ADDRESS:PORT; may be
    /// repeated
    #[arg(long = "upstream", env = "TOMBOLO_UPSTREAMS", value_delimiter = ',', value_name = "UPSTREAM")]
    upstreams: Option<Vec<String>>,
    /// A `Workload` manifest with services, upstreams and health checks, beside the flags
    #[arg(long, env = "TOMBOLO_WORKLOAD", value_name = "FILE")]
    workload: Option<PathBuf>,
    /// Threads that carry bytes: a number, or `auto` for as many as the CPU quota allows [default: 1]
    #[arg(long, env = "TOMBOLO_THREADS", value_name = "N|auto")]
    threads: Option<Threads>,
    /// Serve the SPIFFE Workload API on this Unix socket: X.509 and JWT identities for the application itself. Off unless
    /// given, because it hands out a private key to every process of the users that may ask
    #[arg(long, env = "TOMBOLO_WORKLOAD_API", value_name = "PATH")]
    workload_api: Option<PathBuf>,
    /// A user, by number, who may ask there beside root and the sidecar's own; may be repeated
    #[arg(
        long = "workload-api-uid",
        env = "TOMBOLO_WORKLOAD_API_UIDS",
        value_delimiter = ',',
        value_name = "UID"
    )]
    workload_api_uids: Option<Vec<u32>>,
    /// Where the machine's rules (`tombolo sidecar capture`) redirect applications' connections to: 127.0.0.1:7447, and
    /// [::1]:7447 for IPv6; may be repeated
    #[arg(
        long,
        env = "TOMBOLO_CAPTURE_LISTEN",
        value_delimiter = ',',
        value_name = "ADDRESS:PORT",
        help_heading = "Captured connections"
    )]
    capture_listen: Option<Vec<SocketAddr>>,
    /// An address that stands for a service: ADDRESS:PORT=NAMESPACE/NAME, with :PORT of the service behind it where that
    /// is another; of UDP ADDRESS:PORT/udp=NAMESPACE/NAME; may be repeated
    #[arg(
        long = "capture-address",
        env = "TOMBOLO_CAPTURE_ADDRESSES",
        value_delimiter = ',',
        value_name = "MAPPING",
        help_heading = "Captured connections"
    )]
    capture_addresses: Option<Vec<String>>,
    /// Mark on own connections, so that the rules let them through [default: 0x7462]
    #[arg(long, env = "TOMBOLO_CAPTURE_MARK", value_name = "MARK", help_heading = "Captured connections")]
    capture_mark: Option<String>,
    /// Range of virtual addresses, as the federator has it; may be repeated [default: 241.64.0.0/16]
    #[arg(
        long = "virtual-range",
        env = "TOMBOLO_VIRTUAL_RANGES",
        value_delimiter = ',',
        value_name = "CIDR",
        help_heading = "Captured connections"
    )]
    virtual_ranges: Option<Vec<String>>,
    /// What becomes of captured connections from outside, which do not come through the mesh: strict resets them,
    /// permissive hands them to the application
    #[arg(
        long,
        env = "TOMBOLO_INBOUND",
        value_name = "strict|permissive",
        help_heading = "Captured connections"
    )]
    inbound: Option<String>,
    /// Where the rules hand them over: 127.0.0.1:7448, and [::1]:7448 for IPv6; needs CAP_NET_RAW; may be repeated
    #[arg(
        long,
        env = "TOMBOLO_INBOUND_LISTEN",
        value_delimiter = ',',
        value_name = "ADDRESS:PORT",
        help_heading = "Captured connections"
    )]
    inbound_listen: Option<Vec<SocketAddr>>,
    /// Resolve names for local applications over DNS here, UDP and TCP; the port may be left out [default port: 7453]. Off
    /// unless given. `tombolo sidecar dns install` points the machine's resolver at it
    #[arg(long, env = "TOMBOLO_DNS_LISTEN", value_name = "ADDRESS[:PORT]", help_heading = "Names")]
    dns_listen: Option<String>,
    /// Resolver that answers for other names; may be repeated; `none`: they are refused [default: those of
    /// /etc/resolv.conf]
    #[arg(
        long = "dns-upstream",
        env = "TOMBOLO_DNS_UPSTREAMS",
        value_delimiter = ',',
        value_name = "ADDRESS[:PORT]",
        help_heading = "Names"
    )]
    dns_upstreams: Option<Vec<String>>,
    /// Where backends of a manifest may be although it is this machine itself, link-local or multicast: a CIDR or an address;
    /// may be repeated. Ports of this sidecar never
    #[arg(
        long = "agentless-allow",
        env = "TOMBOLO_AGENTLESS_ALLOW",
        value_delimiter = ',',
        value_name = "CIDR"
    )]
    agentless_allow: Option<Vec<String>>,
    /// Time for open streams to end after SIGTERM [default: 10s]
    #[arg(long, env = "TOMBOLO_DRAIN", value_name = "DURATION")]
    drain: Option<Span>,
    /// Distinct endpoints of a service to hold connections to [default: 4]
    #[arg(long, env = "TOMBOLO_CONNECTIONS", value_name = "N")]
    connections: Option<NonZeroUsize>,
    /// A connection without streams is closed after this [default: 60s]
    #[arg(long, env = "TOMBOLO_IDLE", value_name = "DURATION")]
    idle: Option<Span>,
    /// Connections of applications at a time, each way [default: 10000]
    #[arg(long, env = "TOMBOLO_MAX_APP_CONNECTIONS", value_name = "N")]
    max_app_connections: Option<NonZeroUsize>,
    /// A UDP flow ends after this time without a datagram [default: 60s]
    #[arg(long, env = "TOMBOLO_UDP_IDLE", value_name = "DURATION", help_heading = "UDP")]
    udp_idle: Option<Span>,
    /// UDP flows at a time, each way; datagrams of further ones are dropped and counted [default: 4096]
    #[arg(long, env = "TOMBOLO_MAX_UDP_FLOWS", value_name = "N", help_heading = "UDP")]
    max_udp_flows: Option<NonZeroUsize>,
    /// UDP flows of one caller at a time, by its identity [default: 1024]
    #[arg(long, env = "TOMBOLO_MAX_UDP_FLOWS_PER_PEER", value_name = "N", help_heading = "UDP")]
    max_udp_flows_per_peer: Option<NonZeroUsize>,
    /// Metrics and readiness [default: 127.0.0.1:7445]
    #[arg(long, env = "TOMBOLO_ADMIN", value_name = "ADDRESS:PORT")]
    admin: Option<SocketAddr>,
    /// Level, or `target=level,...` [default: info]
    #[arg(long, env = "TOMBOLO_LOG", value_name = "FILTER", help_heading = "Logs")]
    log_level: Option<String>,
    /// human or json [default: human]
    #[arg(long, env = "TOMBOLO_LOG_FORMAT", value_name = "FORMAT", help_heading = "Logs")]
    log_format: Option<String>,
}

layered!(Settings {
    name,
    join_token_file,
    service_account_token,
    state_dir,
    bind,
    announce,
    pod_ip,
    zone,
    gateways,
    max_udp_payload,
    services,
    health,
    upstreams,
    workload,
    threads,
    workload_api,
    workload_api_uids,
    capture_listen,
    capture_addresses,
    capture_mark,
    virtual_ranges,
    inbound,
    inbound_listen,
    dns_listen,
    dns_upstreams,
    agentless_allow,
    drain,
    connections,
    idle,
    max_app_connections,
    udp_idle,
    max_udp_flows,
    max_udp_flows_per_peer,
    admin,
    log_level,
    log_format,
});

pub fn run(args: SidecarArgs) -> Result<Exit, Failure> {
    let SidecarArgs { verb, settings, config } = args;
    match verb {
        Some(Verb::Capture(args)) => return capture::run(args),
        Some(Verb::Dns(args)) => return dns::run(args),
        Some(Verb::Shared(args)) => return shared::run(*args),
        None => {}
    }
    let mut settings = settings.over(role::file(config.as_deref())?);
    role::logging(settings.log_format.take(), settings.log_level.take())?;
    let config = settings.config(true)?;
    role::run("sidecar", async move {
        let tasks = TaskGroup::new();
        let drain = signals::process_drain(&tasks)?;
        let bound = Sidecar::build(config).await?;
        Ok::<_, Box<dyn std::error::Error>>(bound.run(drain).await?)
    })
}

/// What a settings file makes of a sidecar; nothing is bound or joined.
pub fn config_of(text: &str) -> Result<SidecarConfig, Failure> {
    serde_saphyr::from_str::<Settings>(text).map_err(Failure::usage)?.config(true)
}

impl Settings {
    /// A setting that is given and has no meaning for one of the sidecars of a process.
    fn of_the_process(&self) -> Option<&'static str> {
        let given = [
            ("admin", self.admin.is_some()),
            ("podIp", self.pod_ip.is_some()),
            ("logLevel", self.log_level.is_some()),
            ("logFormat", self.log_format.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(setting, _)| setting)
    }

    /// `alone`: in a process of its own, where a sidecar must have something to do.
    fn config(self, alone: bool) -> Result<SidecarConfig, Failure> {
        let Self {
            name,
            join_token_file,
            service_account_token,
            state_dir,
            bind,
            announce,
            pod_ip,
            zone,
            gateways,
            max_udp_payload,
            services,
            health,
            upstreams,
            workload,
            threads,
            workload_api,
            workload_api_uids,
            capture_listen,
            capture_addresses,
            capture_mark,
            virtual_ranges,
            inbound: inbound_mode,
            inbound_listen,
            dns_listen,
            dns_upstreams,
            agentless_allow,
            drain,
            connections,
            idle,
            max_app_connections,
            udp_idle,
            max_udp_flows,
            max_udp_flows_per_peer,
            admin,
            log_level: _,
            log_format: _,
        } = self;
        let name = role::required(name, "--name", "web")?;
        let (services, upstreams) = work(&name, services, health, upstreams, workload)?;
        let (mut inbound, mut pool) = (InboundLimits::default(), PoolLimits::default());
        if let Some(most) = max_app_connections {
            (inbound.max_app_connections, pool.max_app_connections) = (most.get(), most.get());
        }
        if let Some(connections) = connections {
            pool.connections = connections.get();
        }
        if let Some(Span(idle)) = idle {
            pool.idle = idle;
        }
        let config = SidecarConfig {
            state_dir: match state_dir {
                Some(dir) => dir,
                None => Dirs::from_environment().map_err(Failure::new)?.role_state("sidecar", &name),
            },
            token: join_token_file.as_deref().map(role::join_token).transpose()?.flatten(),
            service_account_token: service_account_token.map(ServiceAccountToken::File),
            name,
            bind: bind.unwrap_or_else(|| match pod_ip {
                Some(address) => (address, config::DEFAULT_PORT).into(),
                None => (Ipv4Addr::UNSPECIFIED, config::DEFAULT_PORT).into(),
            }),
            announce,
            zone: role::zone(zone)?,
            gateways: entry_points(gateways)?,
            max_udp_payload_bytes: max_udp_payload.unwrap_or(config::DEFAULT_UDP_PAYLOAD),
            services,
            provided: None,
            upstreams,
            admin: admin.unwrap_or_else(|| match pod_ip {
                Some(address) => (address, admin::DEFAULT_PORT).into(),
                None => admin::DEFAULT_ADDRESS,
            }),
            threads: threads.map_or(NonZeroUsize::MIN, Threads::count),
            drain: drain.map_or(config::DEFAULT_DRAIN, |Span(drain)| drain),
            inbound,
            pool,
            udp: udp::limits(udp_idle, max_udp_flows, max_udp_flows_per_peer)?,
            workload_api: workload_api_config(workload_api, workload_api_uids)?,
            capture: captured::Captured {
                listen: capture_listen,
                addresses: capture_addresses,
                virtual_ranges,
                mark: capture_mark,
                inbound: inbound_mode,
                inbound_listen,
            }
            .config()?,
            names: names::config(dns_listen, dns_upstreams)?,
            agentless_allow: cidrs("--agentless-allow", agentless_allow)?,
            pod_ip,
        };
        if alone {
            config.check().map_err(Failure::usage)?;
        }
        Ok(config)
    }
}

/// Ranges, or single addresses.
fn cidrs(flag: &str, texts: Option<Vec<String>>) -> Result<Vec<IpNet>, Failure> {
    let parse = |text: &String| {
        let single = text.parse::<IpAddr>().map(IpNet::from);
        text.parse::<IpNet>().or(single).map_err(|_| {
            Failure::usage(format_args!("{flag} {text:?} is neither a CIDR nor an address"))
                .remedy("give it as 127.0.0.0/8 or 10.0.0.5")
        })
    };
    texts.unwrap_or_default().iter().map(parse).collect()
}

/// Names with a port; resolved when they are needed.
fn entry_points(gateways: Option<Vec<String>>) -> Result<EntryPoints, Failure> {
    let gateways = gateways.unwrap_or_default();
    let has_port = |entry: &&String| {
        entry
            .rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0))
    };
    match gateways.iter().find(|entry| !has_port(entry)) {
        Some(entry) => Err(Failure::usage(format_args!("--gateway {entry:?} is not HOST:PORT"))
            .remedy("give it as gateways.east.example:7440 or 203.0.113.7:7440")),
        None => Ok(EntryPoints(gateways)),
    }
}

/// Users without a socket to ask at are a mistake.
fn workload_api_config(
    path: Option<PathBuf>,
    uids: Option<Vec<u32>>,
) -> Result<Option<WorkloadApiConfig>, Failure> {
    match (path, uids) {
        (None, Some(_)) => Err(Failure::usage("--workload-api-uid: there is no --workload-api to ask at")
            .remedy("give --workload-api /run/tombolo/web/workload.sock, or leave it out")),
        (Some(path), _) if !path.is_absolute() => {
            Err(Failure::usage(format_args!("--workload-api {}: is not absolute", path.display()))
                .remedy("give it as /run/tombolo/web/workload.sock, without unix://"))
        }
        (path, uids) => Ok(path.map(|path| WorkloadApiConfig { path, uids: uids.unwrap_or_default() })),
    }
}

/// What is served and called: the flags, and the manifest beside them.
fn work(
    name: &str,
    services: Option<Vec<String>>,
    health: Option<Vec<String>>,
    upstreams: Option<Vec<String>>,
    manifest: Option<PathBuf>,
) -> Result<(Vec<ServiceConfig>, Vec<UpstreamConfig>), Failure> {
    let parse = |flag: &'static str, texts: Option<Vec<String>>| -> Result<Vec<Mapping>, Failure> {
        texts
            .unwrap_or_default()
            .iter()
            .map(|text| Mapping::parse(flag, text).map_err(Failure::usage))
            .collect()
    };
    let mut services = services_from(parse("--service", services)?);
    let mut upstreams = upstreams_from(parse("--upstream", upstreams)?);
    for text in health.unwrap_or_default() {
        workload::health_flag(&text, &mut services)?;
    }
    if let Some(path) = manifest {
        let (more_services, more_upstreams) = workload::read(&path, name)?;
        services.extend(more_services);
        upstreams.extend(more_upstreams);
    }
    Ok((services, upstreams))
}
