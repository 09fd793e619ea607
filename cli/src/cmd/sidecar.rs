//! `tombolo sidecar`: the data plane of one workload.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use serde::Deserialize;

use super::role::{self, layered};
use crate::failure::{Exit, Failure};

/// Run the data plane of one workload
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo sidecar --join-token-file web.token --service shop/web:80=127.0.0.1:8080,http=/healthz
  tombolo sidecar --join-token-file client.token --upstream shop/web:80=127.0.0.1:9080
  tombolo sidecar --join-token-file vm.token --registers --service shop/db:5432=127.0.0.1:5432")]
pub struct SidecarArgs {
    #[command(flatten)]
    settings: Settings,
    /// YAML file with settings, named as the flags are but in camelCase; unknown keys are errors
    #[arg(long, env = "TOMBOLO_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Default, Args, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Settings {
    /// File with the token of `tombolo token create` or `tombolo vm token`; needed for the first start only
    #[arg(long, env = "TOMBOLO_JOIN_TOKEN_FILE", value_name = "FILE")]
    join_token_file: Option<PathBuf>,
    /// Identity, lease and last configuration [default: <state directory>/sidecar]
    #[arg(long, env = "TOMBOLO_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Overlay socket [default: 0.0.0.0:7442]
    #[arg(long, env = "TOMBOLO_LISTEN", value_name = "ADDRESS:PORT/udp")]
    listen: Option<SocketAddr>,
    /// Nobody can send to this machine first (NAT, firewall): keep registered with the gateways
    #[arg(long, env = "TOMBOLO_REGISTERS", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    registers: Option<bool>,
    /// Served here: NAMESPACE/NAME:PORT=ADDRESS:PORT[,tcp|,http=/path]; may be repeated
    #[arg(long = "service", env = "TOMBOLO_SERVICES", value_delimiter = ';', value_name = "SERVICE")]
    services: Option<Vec<String>>,
    /// Called from here: NAMESPACE/NAME:PORT=LISTEN-ADDRESS:PORT; may be repeated
    #[arg(long = "upstream", env = "TOMBOLO_UPSTREAMS", value_delimiter = ';', value_name = "UPSTREAM")]
    upstreams: Option<Vec<String>>,
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
    join_token_file,
    state_dir,
    listen,
    registers,
    services,
    upstreams,
    admin,
    log_level,
    log_format
});

pub fn run(args: SidecarArgs) -> Result<Exit, Failure> {
    let SidecarArgs { settings, config } = args;
    let Settings {
        join_token_file,
        state_dir,
        listen,
        registers,
        services,
        upstreams,
        admin,
        log_level,
        log_format,
    } = settings.over(role::file(config.as_deref())?);
    role::logging(log_format, log_level)?;
    let _ = (join_token_file, state_dir, listen, registers, services, upstreams, admin);
    Err(Failure::new("sidecar: not built into this binary"))
}
