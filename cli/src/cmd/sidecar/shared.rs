//! `tombolo sidecar shared`: one process for many applications that have no sidecar of their own.

mod kubernetes;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use clap::Args;
use ipnet::IpNet;
use serde::Deserialize;
use tombolo_runtime::tasks::TaskGroup;
use tombolo_runtime::{admin, settings, signals};
use tombolo_sidecar::config::{Mapping, upstreams_from};
use tombolo_sidecar::shared::config::{Application, SharedConfig, Start};
use tombolo_sidecar::shared::{Shared, Source};

use self::kubernetes::KubernetesArgs;
use super::Settings;
use crate::cmd::role;
use crate::failure::{Exit, Failure};

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Run the sidecars of many applications that have none of their own, in one process
#[derive(Debug, Args)]
#[command(after_help = "\
Each application has an identity, a key and an overlay socket of its own. Which application calls is told by the address
that it calls from; what is not among anybody's sources is reset. The last hop, between an application and this process,
is plain: keep both on one machine or one trusted network.

FILE is YAML; applications that are added, changed or removed there are taken over within seconds, the others are left alone:
  upstreams: [ 'shop/web:80=10.0.0.5:9080' ]          # every application calls shop/web here
  applications:
    - sources: [ 10.0.0.11 ]                          # or networks
      sidecar:                                        # as in the file of `tombolo sidecar --config`
        name: cart
        bind: 10.0.0.5:7450
        joinTokenFile: cart.token
    - sidecar:
        name: db
        bind: 10.0.0.5:7451
        joinTokenFile: db.token
        services: [ 'shop/db:5432=10.0.0.12:5432' ]   # what it serves, where it really is

In Kubernetes there is no file: each service account whose pods have no sidecar is an application, exports are what it
serves, and derived Services lead here (docs/kubernetes.md shows the Deployment).

Examples:
  tombolo sidecar shared --config shared.yaml
  tombolo sidecar shared --kubernetes in-cluster --trust-domain acme.example --address $(POD_IP) \\
      --join-token-file /etc/tombolo/pods.token")]
pub struct SharedArgs {
    /// Applications, and where they call
    #[arg(long, env = "TOMBOLO_CONFIG", value_name = "FILE", required_unless_present = "kubernetes")]
    config: Option<PathBuf>,
    #[command(flatten)]
    kubernetes: KubernetesArgs,
    /// Metrics and readiness of all of them [default: 127.0.0.1:7445]
    #[arg(long, env = "TOMBOLO_ADMIN", value_name = "ADDRESS:PORT")]
    admin: Option<SocketAddr>,
    /// Level, or `target=level,...` [default: info]
    #[arg(long, env = "TOMBOLO_LOG", value_name = "FILTER", help_heading = "Logs")]
    log_level: Option<String>,
    /// human or json [default: human]
    #[arg(long, env = "TOMBOLO_LOG_FORMAT", value_name = "FORMAT", help_heading = "Logs")]
    log_format: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct File {
    applications: Vec<FileApplication>,
    upstreams: Vec<String>,
    admin: Option<SocketAddr>,
    log_level: Option<String>,
    log_format: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileApplication {
    #[serde(default)]
    sources: Vec<String>,
    sidecar: Settings,
}

pub fn run(args: SharedArgs) -> Result<Exit, Failure> {
    let SharedArgs { config, kubernetes, admin, log_level, log_format } = args;
    let path = match config {
        None => {
            role::logging(log_format, log_level)?;
            return kubernetes.run(admin);
        }
        Some(_) if kubernetes.is_given() => {
            return Err(Failure::usage("--config and --kubernetes: applications come from one of them")
                .remedy("leave one out; run a second shared sidecar for the others"));
        }
        Some(path) => path,
    };
    let file: File = role::file(Some(&path))?;
    role::logging(log_format.or(file.log_format.clone()), log_level.or(file.log_level.clone()))?;
    let seen = std::fs::read(&path).ok();
    let config = read(file, admin).map_err(|failure| failure.at(path.display()))?;
    config.check().map_err(|error| Failure::usage(error).at(path.display()))?;
    role::run("sidecar shared", async move {
        let tasks = TaskGroup::new();
        let drain = signals::process_drain(&tasks)?;
        let shared = Shared::build(config).await?;
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let source = Watched { path, admin, seen, look };
        Ok::<_, Box<dyn std::error::Error>>(shared.run(drain, source).await?)
    })
}

/// The file, looked at every second.
struct Watched {
    path: PathBuf,
    admin: Option<SocketAddr>,
    /// As it was read last.
    seen: Option<Vec<u8>>,
    look: tokio::time::Interval,
}

impl Source for Watched {
    async fn next(&mut self, failed: &AtomicBool) -> Result<SharedConfig, String> {
        loop {
            self.look.tick().await;
            let all_the_same = failed.swap(false, Relaxed);
            let now = std::fs::read(&self.path).map_err(|e| format!("{}: {e}", self.path.display()))?;
            if self.seen.as_ref() == Some(&now) && !all_the_same {
                continue;
            }
            let config = again(&self.path, self.admin)?;
            config.check().map_err(|e| e.to_string())?;
            self.seen = Some(now);
            return Ok(config);
        }
    }
}

fn again(path: &Path, admin: Option<SocketAddr>) -> Result<SharedConfig, String> {
    let file = settings::load::<File>(path).map_err(|e| e.to_string())?;
    read(file, admin).map_err(|failure| failure.to_string())
}

fn read(file: File, admin: Option<SocketAddr>) -> Result<SharedConfig, Failure> {
    let File { applications, upstreams, admin: filed, log_level: _, log_format: _ } = file;
    let mapping = |text: &String| Mapping::parse("upstreams", text).map_err(Failure::usage);
    let upstreams: Vec<Mapping> = upstreams.iter().map(mapping).collect::<Result<_, _>>()?;
    let applications =
        applications.into_iter().enumerate().map(|(number, FileApplication { sources, sidecar })| {
            let at = format!("applications[{number}]");
            if let Some(setting) = sidecar.of_the_process() {
                return Err(Failure::usage(format_args!("{at}.sidecar.{setting} is for the whole process"))
                    .remedy("give it once, beside `applications`"));
            }
            let fingerprint = format!("{sidecar:?}");
            let sources = sources.iter().map(|text| network(&at, text)).collect::<Result<_, _>>()?;
            let sidecar = sidecar.config(false).map_err(|failure| failure.at(&at))?;
            Ok(Application { sources, sidecar, fingerprint, start: Start::Now })
        });
    Ok(SharedConfig {
        applications: applications.collect::<Result<_, _>>()?,
        upstreams: upstreams_from(upstreams),
        admin: admin.or(filed).unwrap_or(admin::DEFAULT_ADDRESS),
        overlay_ports: None,
        incomplete: false,
        register: None,
    })
}

/// An address stands for itself alone.
fn network(at: &str, text: &str) -> Result<IpNet, Failure> {
    let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
    text.parse().ok().or_else(address).ok_or_else(|| {
        Failure::usage(format_args!("{at}.sources: {text:?} is neither an address nor a network"))
            .remedy("write 10.0.0.11 or 10.0.1.0/24")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<SharedConfig, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shared.yaml");
        std::fs::write(&path, text).unwrap();
        again(&path, None)
    }

    #[test]
    fn the_file_of_the_help_text_is_understood() {
        let help = <SharedArgs as clap::Args>::augment_args(clap::Command::new("shared"));
        let help = help.get_after_help().unwrap().to_string();
        let yaml: Vec<&str> = help.lines().skip_while(|line| !line.starts_with("  upstreams")).collect();
        let yaml: Vec<&str> =
            yaml.into_iter().take_while(|line| !line.is_empty()).map(|line| &line[2..]).collect();
        let config = parsed(&yaml.join("\n")).unwrap();
        assert_eq!(config.check(), Ok(()));
        assert_eq!((config.applications.len(), config.upstreams.len()), (2, 1));
        assert_eq!(config.applications[0].sources, ["10.0.0.11/32".parse().unwrap()]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        let application = |sidecar: &str, sources: &str| {
            format!("applications:\n- sources: [{sources}]\n  sidecar: {{ name: cart, {sidecar} }}\n")
        };
        let cases = [
            (application("", "ten"), "applications[0].sources: \"ten\""),
            (application("admin: '127.0.0.1:1'", "10.0.0.1"), "applications[0].sidecar.admin"),
            (application("colour: red", "10.0.0.1"), "colour"),
            ("applications:\n- sidecar: {}\n".to_owned(), "applications[0]"),
            ("upstreams: [web]\n".to_owned(), "web"),
        ];
        for (text, named) in cases {
            let error = parsed(&text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
