//! `tombolo sidecar shared --kubernetes`: applications are the cluster's service accounts whose pods have no sidecar.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use futures::FutureExt;
use tombolo_federator::kubernetes::client::{self, Resources};
use tombolo_federator::token_review::access::KubernetesAccess;
use tombolo_federator::token_review::audience;
use tombolo_identity::TrustDomain;
use tombolo_model::names::Namespace;
use tombolo_runtime::{admin, dirs::Dirs, settings, signals, tasks::TaskGroup};
use tombolo_sidecar::config::{DEFAULT_DRAIN, DEFAULT_UDP_PAYLOAD, SidecarConfig};
use tombolo_sidecar::shared::Shared;
use tombolo_sidecar::shared::kubernetes::{Connect, KubernetesConfig, KubernetesSource, Session};

use crate::cmd::federator::api_server;
use crate::cmd::role::{self, Span};
use crate::failure::{Exit, Failure};

/// Between the ports that applications usually serve and the numbers of derived Services.
const OVERLAY_PORTS: RangeInclusive<u16> = 10_000..=10_999;
/// An outage of the API server that is not noticed by callers: nodes start no pods meanwhile, so addresses stay whose they were.
const STALE_AFTER: Duration = Duration::from_secs(3600);

/// What only `--kubernetes` takes.
#[derive(Debug, Args)]
pub struct KubernetesArgs {
    /// Applications are the service accounts of this Kubernetes cluster whose pods have no sidecar: `in-cluster`, or a
    /// kubeconfig
    #[arg(long, env = "TOMBOLO_KUBERNETES", value_name = "in-cluster|FILE", help_heading = "Kubernetes")]
    kubernetes: Option<String>,
    /// Namespaces whose pods call and serve here, and whose derived Services are answered [default: all]
    #[arg(
        long,
        env = "TOMBOLO_NAMESPACES",
        value_delimiter = ',',
        value_name = "NAMESPACE",
        help_heading = "Kubernetes"
    )]
    namespaces: Vec<String>,
    /// The federation's, as the federator has it: tokens of service accounts are for its audience
    #[arg(long, env = "TOMBOLO_TRUST_DOMAIN", value_name = "DOMAIN", help_heading = "Kubernetes")]
    trust_domain: Option<String>,
    /// File with what `tombolo token pods` prints
    #[arg(long, env = "TOMBOLO_JOIN_TOKEN_FILE", value_name = "FILE", help_heading = "Kubernetes")]
    join_token_file: Option<PathBuf>,
    /// This pod's address, where gateways and neighbours reach every application's overlay socket
    #[arg(long, env = "TOMBOLO_ADDRESS", value_name = "IP", help_heading = "Kubernetes")]
    address: Option<IpAddr>,
    /// Ports of those sockets, one each; NetworkPolicies have to let UDP through to them [default: 10000-10999]
    #[arg(long, env = "TOMBOLO_OVERLAY_PORTS", value_name = "FIRST-LAST", help_heading = "Kubernetes")]
    overlay_ports: Option<String>,
    /// Where pods call, at the numbers of derived Services (TCP and UDP 20000-29999); may be repeated [default: every address]
    #[arg(
        long,
        env = "TOMBOLO_FRONT",
        value_delimiter = ',',
        value_name = "IP",
        help_heading = "Kubernetes"
    )]
    front: Vec<IpAddr>,
    /// A directory per service account with its identity and last configuration [default: <state directory>/sidecar/shared]
    #[arg(long, env = "TOMBOLO_STATE_DIR", value_name = "DIR", help_heading = "Kubernetes")]
    state_dir: Option<PathBuf>,
    /// Where it runs, e.g. eu-west-1a: gateways of the same zone are used first
    #[arg(long, env = "TOMBOLO_ZONE", value_name = "ZONE", help_heading = "Kubernetes")]
    zone: Option<String>,
    /// What this replica calls itself, unlike others [default: the host's name, which is the pod's]
    #[arg(long, env = "TOMBOLO_NAME", value_name = "NAME", help_heading = "Kubernetes")]
    name: Option<String>,
    /// After so long without the API server pods' addresses are not believed any more, and new calls are refused [default: 1h]
    #[arg(long, env = "TOMBOLO_STALE_AFTER", value_name = "DURATION", help_heading = "Kubernetes")]
    stale_after: Option<Span>,
    /// Time for open streams to end after SIGTERM, or when a service account is gone [default: 10s]
    #[arg(long, env = "TOMBOLO_DRAIN", value_name = "DURATION", help_heading = "Kubernetes")]
    drain: Option<Span>,
}

impl KubernetesArgs {
    pub fn is_given(&self) -> bool {
        self.kubernetes.is_some()
    }

    pub fn run(self, admin: Option<SocketAddr>) -> Result<Exit, Failure> {
        let place = role::required(self.kubernetes.clone(), "--kubernetes", "in-cluster")?;
        let connect = connect(api_server(&place)?);
        let config = self.config(admin.unwrap_or(admin::DEFAULT_ADDRESS))?;
        role::run("sidecar shared", async move {
            let tasks = TaskGroup::new();
            let drain = signals::process_drain(&tasks)?;
            let (source, first) = KubernetesSource::start(config, connect, &tasks);
            let shared = Shared::build(first).await?;
            Ok::<_, Box<dyn std::error::Error>>(shared.run(drain, source).await?)
        })
    }

    fn config(self, admin: SocketAddr) -> Result<KubernetesConfig, Failure> {
        let Self {
            kubernetes: _,
            namespaces,
            trust_domain,
            join_token_file,
            address,
            overlay_ports,
            front,
            state_dir,
            zone,
            name,
            stale_after,
            drain,
        } = self;
        for namespace in &namespaces {
            let parsed: Result<Namespace, _> = namespace.parse();
            parsed.map_err(|error| Failure::usage(format_args!("--namespaces: {error}")))?;
        }
        let trust_domain = role::required(trust_domain, "--trust-domain", "acme.example")?;
        let trust_domain: TrustDomain =
            trust_domain.parse().map_err(|e| Failure::usage(format_args!("--trust-domain: {e}")))?;
        let address = role::required(address, "--address", "$(POD_IP)")?;
        if address.is_unspecified() {
            return Err(Failure::usage(format_args!("--address {address} reaches nobody"))
                .remedy("give the pod's own address, by a fieldRef to status.podIP"));
        }
        let token = role::required(join_token_file, "--join-token-file", "/etc/tombolo/pods.token")?;
        let token_text = role::join_token(&token)?.ok_or_else(|| {
            Failure::usage("there is no such file")
                .at(token.display())
                .remedy("put there what `tombolo token pods` prints where the federator runs")
        })?;
        let overlay_ports = overlay_ports.as_deref().map_or(Ok(OVERLAY_PORTS), ports)?;
        let state_dir = match state_dir {
            Some(dir) => dir,
            None => Dirs::from_environment().map_err(Failure::new)?.role_state("sidecar", "shared"),
        };
        let holder = match name.or_else(|| settings::environment("HOSTNAME")) {
            Some(name) => name,
            None => {
                std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
            }
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        if holder.is_empty() || holder.len() > 253 || !holder.chars().all(plain) {
            return Err(Failure::usage(format_args!("--name {holder:?} is not the name of a pod"))
                .remedy("give letters, digits, '-' and '.', by a fieldRef to metadata.name"));
        }
        let drain = drain.map_or(DEFAULT_DRAIN, |Span(drain)| drain);
        let sidecar = SidecarConfig {
            // What follows is each application's own.
            name: String::new(),
            state_dir: PathBuf::new(),
            service_account_token: None,
            services: Vec::new(),
            provided: None,
            upstreams: Vec::new(),
            token: Some(token_text),
            // The port is one of `overlay_ports`; announced is what was bound.
            bind: SocketAddr::new(address, 0),
            announce: None,
            zone: role::zone(zone)?,
            gateways: Default::default(),
            max_udp_payload_bytes: DEFAULT_UDP_PAYLOAD,
            admin,
            threads: NonZeroUsize::MIN,
            drain,
            inbound: Default::default(),
            pool: Default::default(),
            udp: Default::default(),
            workload_api: None,
            capture: None,
            names: None,
            agentless_allow: Vec::new(),
            pod_ip: None,
        };
        Ok(KubernetesConfig {
            namespaces,
            front: if front.is_empty() { vec![every_address()] } else { front },
            overlay_ports,
            sidecar,
            state_dir,
            audience: audience(&trust_domain),
            holder,
            stale_after: stale_after.map_or(STALE_AFTER, |Span(after)| after),
            admin,
        })
    }
}

/// Both families where there are both.
fn every_address() -> IpAddr {
    match UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)) {
        Ok(_) => Ipv6Addr::UNSPECIFIED.into(),
        Err(_) => Ipv4Addr::UNSPECIFIED.into(),
    }
}

fn ports(text: &str) -> Result<RangeInclusive<u16>, Failure> {
    let parsed =
        text.split_once('-').and_then(|(first, last)| Some(first.parse().ok()?..=last.parse().ok()?));
    parsed.filter(|ports: &RangeInclusive<u16>| !ports.is_empty() && *ports.start() > 0).ok_or_else(|| {
        Failure::usage(format_args!("--overlay-ports {text:?} is not FIRST-LAST"))
            .remedy("give it as 10000-10999: one for each service account whose pods call or serve")
    })
}

fn connect(access: KubernetesAccess) -> Connect {
    Arc::new(move || {
        let access = access.clone();
        async move {
            let client = client::connect(&access).await.map_err(|e| e.to_string())?;
            let resources = Resources::discover(&client).await.map_err(|e| e.to_string())?;
            Ok(Session { client, mcs: resources.api_version })
        }
        .boxed()
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: KubernetesArgs,
    }

    fn parsed(more: &[&str]) -> Result<KubernetesConfig, String> {
        let dir = tempfile::tempdir().unwrap();
        let token = dir.path().join("pods.token");
        std::fs::write(&token, "a token\n").unwrap();
        let token = token.display().to_string();
        let mut line = vec!["shared", "--kubernetes", "in-cluster"];
        if !more.contains(&"--join-token-file") {
            line.extend(["--join-token-file", &token]);
        }
        line.extend(more);
        let config = Line::parse_from(line).args.config("127.0.0.1:0".parse().unwrap());
        config.map_err(|failure| format!("{failure:?}"))
    }

    const WHOLE: [&str; 6] =
        ["--trust-domain", "acme.example", "--address", "10.1.0.7", "--name", "tombolo-shared-1"];

    #[test]
    fn what_a_deployment_gives_is_enough() {
        let config = parsed(&WHOLE).unwrap();
        assert_eq!(config.audience, "tombolo.dev/acme.example");
        assert_eq!((config.overlay_ports, config.holder.as_str()), (OVERLAY_PORTS, "tombolo-shared-1"));
        assert_eq!(config.sidecar.bind, "10.1.0.7:0".parse().unwrap());
        assert!(config.front[0].is_unspecified() && config.namespaces.is_empty());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let with = |more: &[&'static str]| [&WHOLE[..], more].concat();
        let cases = [
            (vec!["--address", "10.1.0.7"], "--trust-domain"),
            (vec!["--trust-domain", "acme.example"], "--address"),
            (vec!["--trust-domain", "Acme", "--address", "10.1.0.7"], "--trust-domain"),
            (vec!["--trust-domain", "acme.example", "--address", "0.0.0.0"], "reaches nobody"),
            (vec!["--trust-domain", "acme.example", "--address", "10.1.0.7", "--name", "a b"], "--name"),
            (with(&["--overlay-ports", "7"]), "--overlay-ports"),
            (with(&["--overlay-ports", "9-8"]), "--overlay-ports"),
            (with(&["--namespaces", "Shop"]), "--namespaces"),
            (with(&["--join-token-file", "/nowhere/pods.token"]), "tombolo token pods"),
        ];
        for (more, named) in cases {
            let error = parsed(&more).unwrap_err();
            assert!(error.contains(named), "{more:?}: {error}");
        }
    }
}
