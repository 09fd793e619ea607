//! `tombolo federator`: the control plane of one cluster.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use serde::Deserialize;

use super::role::{self, layered};
use crate::failure::{Exit, Failure};

/// Run the control plane of one cluster
#[derive(Debug, Args)]
#[command(after_help = "\
Note: the federator is not built into this binary yet; only its settings are checked.

Examples:
  tombolo federator --cluster east
  tombolo federator --cluster east --trust-dir /etc/tombolo/east --listen 10.0.0.5:7443
  tombolo federator --config /etc/tombolo/federator.yaml --log-format json")]
pub struct FederatorArgs {
    #[command(flatten)]
    settings: Settings,
    /// YAML file with settings, named as the flags are but in camelCase; unknown keys are errors
    #[arg(long, env = "TOMBOLO_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Default, Args, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Settings {
    /// Name of the cluster, as `tombolo trust cluster` signed it
    #[arg(long, env = "TOMBOLO_CLUSTER")]
    cluster: Option<String>,
    /// What `tombolo trust cluster` wrote [default: <state directory>/trust/clusters/<cluster>]
    #[arg(long, env = "TOMBOLO_TRUST_DIR", value_name = "DIR")]
    trust_dir: Option<PathBuf>,
    /// Store, keys and leases [default: <state directory>/<cluster>/federator]
    #[arg(long, env = "TOMBOLO_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Overlay socket [default: 0.0.0.0:7443]
    #[arg(long, env = "TOMBOLO_LISTEN", value_name = "ADDRESS:PORT/udp")]
    listen: Option<SocketAddr>,
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

layered!(Settings { cluster, trust_dir, state_dir, listen, admin, log_level, log_format });

pub fn run(args: FederatorArgs, socket: Option<PathBuf>) -> Result<Exit, Failure> {
    let FederatorArgs { settings, config } = args;
    let Settings { cluster, trust_dir, state_dir, listen, admin, log_level, log_format } =
        settings.over(role::file(config.as_deref())?);
    role::logging(log_format, log_level)?;
    let _ = (role::required(cluster, "--cluster", "east")?, trust_dir, state_dir, listen, admin, socket);
    Err(Failure::new("federator: not built into this binary"))
}
