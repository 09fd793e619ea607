//! `tombolo gateway`: one replica of a cluster's packet forwarders.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use serde::Deserialize;
use tombolo_gateway::config::{self, GatewayConfig};
use tombolo_gateway::role::Gateway;
use tombolo_runtime::tasks::TaskGroup;
use tombolo_runtime::{admin, dirs::Dirs, drain, rt, signals};

mod service;

use super::role::{self, Span, layered};
use crate::failure::{Exit, Failure};
use service::BorderService;

/// Run one replica of a cluster's packet forwarders
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo token create --role gateway --name gw-1 > gw-1.token      where the federator runs
  tombolo gateway --name gw-1 --join-token-file gw-1.token
  tombolo gateway --name gw-1 --advertise-border 203.0.113.7:7440 --workers 2
  tombolo gateway --name gw-0 --join-token-file pods.token --service-account-token /var/run/secrets/tombolo/token \\
      --border-service tombolo-gateway-0                                                  in a pod of Kubernetes")]
pub struct GatewayArgs {
    #[command(flatten)]
    settings: Settings,
    /// YAML file with settings, named as the flags are but in camelCase; unknown keys are errors
    #[arg(long, env = "TOMBOLO_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Default, Args, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Settings {
    /// Name of the replica, unique in its cluster
    #[arg(long, env = "TOMBOLO_NAME")]
    name: Option<String>,
    /// File with the token of `tombolo token create --role gateway`; needed for the first start only
    #[arg(long, env = "TOMBOLO_JOIN_TOKEN_FILE", value_name = "FILE")]
    join_token_file: Option<PathBuf>,
    /// File with the pod's projected service account token, by which it joins as the gateway that its pod is called; the join
    /// token is then that of `tombolo token pods`
    #[arg(long, env = "TOMBOLO_SERVICE_ACCOUNT_TOKEN", value_name = "FILE")]
    service_account_token: Option<PathBuf>,
    /// Identity, lease and last configuration [default: <state directory>/gateway/<name>]
    #[arg(long, env = "TOMBOLO_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Socket towards other clusters [default: 0.0.0.0:7440]
    #[arg(long, env = "TOMBOLO_BORDER", value_name = "ADDRESS:PORT/udp")]
    border: Option<SocketAddr>,
    /// Socket towards this cluster [default: 0.0.0.0:7441]
    #[arg(long, env = "TOMBOLO_INNER", value_name = "ADDRESS:PORT/udp")]
    inner: Option<SocketAddr>,
    /// Address that other clusters reach the border socket by [default: --border]
    #[arg(long, env = "TOMBOLO_ADVERTISE_BORDER", value_name = "ADDRESS:PORT")]
    advertise_border: Option<SocketAddr>,
    /// Advertise the address that Kubernetes gives to this Service of the own namespace: its load balancer's, or a port of
    /// --node-address
    #[arg(long, env = "TOMBOLO_BORDER_SERVICE", value_name = "NAME", conflicts_with = "advertise_border")]
    border_service: Option<String>,
    /// Address of this machine that other clusters reach the border socket by, with its own port, or with that of a
    /// --border-service of type NodePort
    #[arg(long, env = "TOMBOLO_NODE_ADDRESS", value_name = "ADDRESS")]
    node_address: Option<IpAddr>,
    /// Address that this cluster reaches the inner socket by [default: --inner]
    #[arg(long, env = "TOMBOLO_ADVERTISE_INNER", value_name = "ADDRESS:PORT")]
    advertise_inner: Option<SocketAddr>,
    /// The advertised border address is a balancer's, shared by several replicas
    #[arg(long, env = "TOMBOLO_BALANCED", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    balanced: Option<bool>,
    /// Where this replica runs, e.g. eu-west-1a: sidecars of the same zone use it first
    #[arg(long, env = "TOMBOLO_ZONE", value_name = "ZONE")]
    zone: Option<String>,
    /// Forwarding threads [default: what the CPU quota allows]
    #[arg(long, env = "TOMBOLO_WORKERS", value_name = "N")]
    workers: Option<NonZeroUsize>,
    /// Time that packets are still forwarded after SIGTERM, while others are told to use another replica [default: 10s]
    #[arg(long, env = "TOMBOLO_DRAIN", value_name = "DURATION")]
    drain: Option<Span>,
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
    border,
    inner,
    advertise_border,
    border_service,
    node_address,
    advertise_inner,
    balanced,
    zone,
    workers,
    drain,
    admin,
    log_level,
    log_format
});

pub fn run(args: GatewayArgs) -> Result<Exit, Failure> {
    let GatewayArgs { settings, config } = args;
    let mut settings = settings.over(role::file(config.as_deref())?);
    role::logging(settings.log_format.take(), settings.log_level.take())?;
    let service =
        settings.border_service.take().map(|name| BorderService::try_new(name, settings.node_address));
    let service = service.transpose()?;
    let mut config = settings.config()?;
    role::run("gateway", async move {
        let tasks = TaskGroup::new();
        let drain = signals::process_drain(&tasks)?;
        let Some(service) = service else {
            return Ok::<_, Box<dyn std::error::Error>>(Gateway::build(config).await?.run(drain).await?);
        };
        let address = tokio::select! {
            address = service.address() => address,
            () = drain.started() => return Ok(()),
        };
        config.advertise_border = Some(address);
        let bound = Gateway::build(config).await?;
        // Another address is another start: peers are told of it by the hello.
        let (moved, watcher) = drain::channel();
        tasks.spawn("border service", service.watch(address, moved, drain));
        Ok(bound.run(watcher).await?)
    })
}

impl Settings {
    fn config(self) -> Result<GatewayConfig, Failure> {
        let Self {
            name,
            join_token_file,
            service_account_token,
            state_dir,
            border,
            inner,
            advertise_border,
            border_service: _,
            node_address,
            advertise_inner,
            balanced,
            zone,
            workers,
            drain,
            admin,
            log_level: _,
            log_format: _,
        } = self;
        let name = role::required(name, "--name", "gw-1")?;
        let border = border.unwrap_or_else(|| (Ipv4Addr::UNSPECIFIED, config::DEFAULT_BORDER_PORT).into());
        let config = GatewayConfig {
            state_dir: match state_dir {
                Some(dir) => dir,
                None => Dirs::from_environment().map_err(Failure::new)?.role_state("gateway", &name),
            },
            service_account_token,
            token: join_token_file.as_deref().map(role::join_token).transpose()?.flatten(),
            name,
            border,
            inner: inner.unwrap_or_else(|| (Ipv4Addr::UNSPECIFIED, config::DEFAULT_INNER_PORT).into()),
            advertise_border: advertise_border
                .or_else(|| node_address.map(|address| SocketAddr::new(address, border.port()))),
            advertise_inner,
            balanced: balanced.unwrap_or(false),
            zone: role::zone(zone)?,
            workers: rt::threads(workers),
            admin: admin.unwrap_or(admin::DEFAULT_ADDRESS),
            drain: drain.map_or(config::DEFAULT_DRAIN, |Span(drain)| drain),
        };
        config.check().map_err(Failure::usage)?;
        Ok(config)
    }
}
