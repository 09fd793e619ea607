//! `tombolo federator`: the control plane of one cluster.

mod etcd;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use serde::Deserialize;

use tombolo_federator::core::audit::Retention;
use tombolo_federator::foreign::client::WebRoots;
use tombolo_federator::role::{DEFAULT_LISTEN, Federator, FederatorConfig};
use tombolo_model::names::ClusterName;
use tombolo_runtime::dirs::Dirs;
use tombolo_runtime::tasks::TaskGroup;
use tombolo_runtime::{admin, signals};

use self::injected::Injected;
pub use self::kubernetes::api_server;
use self::kubernetes::{Work, driven};
use self::values::{endpoint, property, ranges};
use super::names;
use super::role::{self, layered};
use crate::failure::{Exit, Failure};

mod advertise;
mod injected;
mod kubernetes;
mod pods;
mod values;

/// Run the control plane of one cluster
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo federator --cluster east
  tombolo federator --cluster east --trust-dir /etc/tombolo/east --listen 10.0.0.5:7443
  tombolo federator --config /etc/tombolo/federator.yaml --log-format json
  tombolo federator --cluster east --bundle-endpoint 0.0.0.0:8443
  tombolo federator --cluster east --kubernetes in-cluster          pods join as their service account
  tombolo federator --cluster east --kubernetes in-cluster --kubernetes-services --kubernetes-objects --kubernetes-inject
  tombolo federator --cluster east --etcd-endpoint http://10.0.0.5:2379 --etcd-endpoint http://10.0.0.6:2379
  tombolo federator --cluster east --dns-listen 10.0.0.5 --virtual-range 10.96.0.0/16 --virtual-range fd00:96::/112")]
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
    /// Keep the store in etcd instead of in a file, at this member; may be repeated. Of several federators of a cluster one
    /// works, the others stand by
    #[arg(
        long = "etcd-endpoint",
        env = "TOMBOLO_ETCD_ENDPOINTS",
        value_delimiter = ',',
        value_name = "URL",
        help_heading = "Store in etcd"
    )]
    etcd_endpoints: Option<Vec<String>>,
    /// Before every key [default: /tombolo/<cluster>]
    #[arg(long, env = "TOMBOLO_ETCD_PREFIX", value_name = "PREFIX", help_heading = "Store in etcd")]
    etcd_prefix: Option<String>,
    /// CA certificates (PEM) by which etcd is verified
    #[arg(long, env = "TOMBOLO_ETCD_CA", value_name = "FILE", help_heading = "Store in etcd")]
    etcd_ca: Option<PathBuf>,
    /// Certificate (PEM) that is shown to etcd
    #[arg(long, env = "TOMBOLO_ETCD_CERTIFICATE", value_name = "FILE", help_heading = "Store in etcd")]
    etcd_certificate: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, env = "TOMBOLO_ETCD_KEY", value_name = "FILE", help_heading = "Store in etcd")]
    etcd_key: Option<PathBuf>,
    /// User of etcd; the password is in --etcd-password-file
    #[arg(long, env = "TOMBOLO_ETCD_USER", value_name = "NAME", help_heading = "Store in etcd")]
    etcd_user: Option<String>,
    /// File with the user's password
    #[arg(long, env = "TOMBOLO_ETCD_PASSWORD_FILE", value_name = "FILE", help_heading = "Store in etcd")]
    etcd_password_file: Option<PathBuf>,
    /// An owner that etcd does not hear for so many seconds is replaced [default: 10]
    #[arg(long, env = "TOMBOLO_ETCD_LEASE_SECONDS", value_name = "SECONDS", help_heading = "Store in etcd")]
    etcd_lease_seconds: Option<u16>,
    /// Begin an empty store in etcd with what the state directory's file holds
    #[arg(long, env = "TOMBOLO_ETCD_IMPORT", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL", help_heading = "Store in etcd")]
    etcd_import: Option<bool>,
    /// Overlay socket [default: 0.0.0.0:7443]
    #[arg(long, env = "TOMBOLO_LISTEN", value_name = "ADDRESS:PORT/udp")]
    listen: Option<SocketAddr>,
    /// Where this cluster's gateways and sidecars reach it; a name is resolved when it starts [default: --listen, or this
    /// machine's address]
    #[arg(long, env = "TOMBOLO_ADVERTISE", value_name = "ADDRESS:PORT")]
    advertise: Option<String>,
    /// A `ClusterProperty` of this cluster, which policies may match; may be repeated
    #[arg(long = "property", env = "TOMBOLO_PROPERTIES", value_delimiter = ',', value_name = "NAME=VALUE")]
    properties: Option<Vec<String>>,
    /// Entries of the audit log that are kept; the oldest are dropped [default: 100000]
    #[arg(long, env = "TOMBOLO_AUDIT_ENTRIES", value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1000..=10_000_000))]
    audit_entries: Option<u64>,
    /// Days for which entries of the audit log are kept [default: 400]
    #[arg(long, env = "TOMBOLO_AUDIT_DAYS", value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..=36_500))]
    audit_days: Option<u64>,
    /// Range of the virtual addresses that services get; one of IPv4, one of IPv6 (off unless given). Nothing else may use
    /// it where callers are [default: 241.64.0.0/16]
    #[arg(
        long = "virtual-range",
        env = "TOMBOLO_VIRTUAL_RANGES",
        value_delimiter = ',',
        value_name = "CIDR"
    )]
    virtual_ranges: Option<Vec<String>>,
    /// Serve names of the cluster over DNS here, UDP and TCP; the port may be left out [default port: 7453]. Off unless given
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
    /// Metrics and readiness [default: 127.0.0.1:7445]
    #[arg(long, env = "TOMBOLO_ADMIN", value_name = "ADDRESS:PORT")]
    admin: Option<SocketAddr>,
    /// Serve this trust domain's SPIFFE bundle over HTTPS here, for foreign trust domains. Off unless given. Shows the
    /// federator's own SVID (profile https_spiffe) unless --bundle-endpoint-certificate is given
    #[arg(
        long,
        env = "TOMBOLO_BUNDLE_ENDPOINT",
        value_name = "ADDRESS:PORT",
        help_heading = "Bundle endpoint"
    )]
    bundle_endpoint: Option<SocketAddr>,
    /// Certificate chain (PEM) of a public CA, for profile https_web; read again when it changes
    #[arg(
        long,
        env = "TOMBOLO_BUNDLE_ENDPOINT_CERTIFICATE",
        value_name = "FILE",
        help_heading = "Bundle endpoint"
    )]
    bundle_endpoint_certificate: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, env = "TOMBOLO_BUNDLE_ENDPOINT_KEY", value_name = "FILE", help_heading = "Bundle endpoint")]
    bundle_endpoint_key: Option<PathBuf>,
    /// Let pods join as their service account, by the word of this Kubernetes API server: `in-cluster`, or a kubeconfig
    #[arg(long, env = "TOMBOLO_KUBERNETES", value_name = "in-cluster|FILE")]
    kubernetes: Option<String>,
    /// Export and import the services of that Kubernetes (ServiceExport, ServiceImport): needs the rights of
    /// deploy/kubernetes/rbac.yaml and the CRDs of `tombolo kube crds`
    #[arg(long, env = "TOMBOLO_KUBERNETES_SERVICES", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    kubernetes_services: Option<bool>,
    /// Keep Tombolo's own objects (FailoverPolicy, AccessPolicy, ClusterLink, ...) of that Kubernetes, as `tombolo apply` would:
    /// needs the same rights and CRDs
    #[arg(long, env = "TOMBOLO_KUBERNETES_OBJECTS", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    kubernetes_objects: Option<bool>,
    /// Namespace of the Lease by which federators agree on who writes [default: the pod's, else tombolo-system]
    #[arg(long, env = "TOMBOLO_KUBERNETES_NAMESPACE", value_name = "NAMESPACE")]
    kubernetes_namespace: Option<String>,
    /// Let pods of this service account be gateways, by the name of the pod: `tombolo gateway --service-account-token`
    #[arg(long, env = "TOMBOLO_KUBERNETES_GATEWAYS", value_name = "NAMESPACE/SERVICEACCOUNT")]
    kubernetes_gateways: Option<String>,
    /// Write what joiners in the cluster need to know (pods.token with this address of the federator, bundle.pem) into the
    /// ConfigMap tombolo-trust-bundle of --kubernetes-namespace
    #[arg(long, env = "TOMBOLO_KUBERNETES_PUBLISH", value_name = "HOST:PORT")]
    kubernetes_publish: Option<String>,
    /// Service of the shared sidecars (`tombolo sidecar shared --kubernetes`): imports' derived Services lead there, so that
    /// pods without a sidecar can call them. Off unless given
    #[arg(long, env = "TOMBOLO_KUBERNETES_SHARED", value_name = "NAMESPACE/NAME")]
    kubernetes_shared: Option<String>,
    /// Put sidecars into pods of that Kubernetes: serve its mutating webhook here, HTTPS. Needs deploy/kubernetes/webhook.yaml
    /// and the rights of rbac.yaml [default without a value: 0.0.0.0:9443]
    #[arg(long, env = "TOMBOLO_KUBERNETES_INJECT", num_args = 0..=1, default_missing_value = "0.0.0.0:9443", value_name = "ADDRESS:PORT", help_heading = "Injected sidecars")]
    kubernetes_inject: Option<SocketAddr>,
    /// Image of injected sidecars [default: tombolo:<version>]
    #[arg(long, env = "TOMBOLO_INJECT_IMAGE", value_name = "IMAGE", help_heading = "Injected sidecars")]
    inject_image: Option<String>,
    /// Image of the container that makes the rules where connections are captured: needs nft and ip beside tombolo, which
    /// an image from scratch lacks [default: --inject-image]
    #[arg(
        long,
        env = "TOMBOLO_INJECT_CAPTURE_IMAGE",
        value_name = "IMAGE",
        help_heading = "Injected sidecars"
    )]
    inject_capture_image: Option<String>,
    /// Where they reach a federator [default: tombolo-federator.<namespace>.svc:7443]
    #[arg(
        long,
        env = "TOMBOLO_INJECT_FEDERATOR",
        value_name = "HOST:PORT",
        help_heading = "Injected sidecars"
    )]
    inject_federator: Option<String>,
    /// Resources that they ask for [default: cpu=10m,memory=32Mi]
    #[arg(long, env = "TOMBOLO_INJECT_REQUESTS", value_name = "AMOUNTS", help_heading = "Injected sidecars")]
    inject_requests: Option<String>,
    /// Resources that they get at most [default: memory=256Mi]
    #[arg(long, env = "TOMBOLO_INJECT_LIMITS", value_name = "AMOUNTS", help_heading = "Injected sidecars")]
    inject_limits: Option<String>,
    /// CA certificates (PEM) by which foreign bundle endpoints of profile https_web are verified [default: the system's]
    #[arg(
        long,
        env = "TOMBOLO_BUNDLE_CLIENT_ROOTS",
        value_name = "FILE",
        help_heading = "Foreign trust domains"
    )]
    bundle_client_roots: Option<PathBuf>,
    /// Level, or `target=level,...` [default: info]
    #[arg(long, env = "TOMBOLO_LOG", value_name = "FILTER", help_heading = "Logs")]
    log_level: Option<String>,
    /// human or json [default: human]
    #[arg(long, env = "TOMBOLO_LOG_FORMAT", value_name = "FORMAT", help_heading = "Logs")]
    log_format: Option<String>,
}

layered!(Settings {
    cluster,
    trust_dir,
    state_dir,
    etcd_endpoints,
    etcd_prefix,
    etcd_ca,
    etcd_certificate,
    etcd_key,
    etcd_user,
    etcd_password_file,
    etcd_lease_seconds,
    etcd_import,
    listen,
    advertise,
    properties,
    audit_entries,
    audit_days,
    admin,
    bundle_endpoint,
    bundle_endpoint_certificate,
    bundle_endpoint_key,
    kubernetes,
    kubernetes_services,
    kubernetes_objects,
    kubernetes_namespace,
    kubernetes_gateways,
    kubernetes_publish,
    kubernetes_shared,
    kubernetes_inject,
    inject_image,
    inject_capture_image,
    inject_federator,
    inject_requests,
    inject_limits,
    bundle_client_roots,
    virtual_ranges,
    dns_listen,
    dns_upstreams,
    log_level,
    log_format
});

pub fn run(args: FederatorArgs, socket: Option<PathBuf>) -> Result<Exit, Failure> {
    let FederatorArgs { settings, config } = args;
    let mut settings = settings.over(role::file(config.as_deref())?);
    role::logging(settings.log_format.take(), settings.log_level.take())?;
    let advertise = settings.advertise.take().map(|text| advertise::parse(&text)).transpose()?;
    let mut config = settings.config(socket)?;
    role::run("federator", async move {
        let tasks = TaskGroup::new();
        let drain = signals::process_drain(&tasks)?;
        let bound = async {
            if let Some(advertise) = advertise {
                config.advertise = Some(advertise::resolve(advertise).await.map_err(|e| e.to_string())?);
            }
            Ok::<_, Box<dyn std::error::Error>>(Federator::build(config).await?)
        };
        // It may have to wait for a name, or for another federator's end, before it is built.
        tokio::select! {
            bound = bound => Ok(bound?.run(drain.clone()).await?),
            () = drain.started() => Ok(()),
        }
    })
}

impl Settings {
    fn config(self, socket: Option<PathBuf>) -> Result<FederatorConfig, Failure> {
        let Self {
            cluster,
            trust_dir,
            state_dir,
            etcd_endpoints,
            etcd_prefix,
            etcd_ca,
            etcd_certificate,
            etcd_key,
            etcd_user,
            etcd_password_file,
            etcd_lease_seconds,
            etcd_import,
            listen,
            advertise: _,
            properties,
            audit_entries,
            audit_days,
            admin,
            bundle_endpoint,
            bundle_endpoint_certificate,
            bundle_endpoint_key,
            kubernetes,
            kubernetes_services,
            kubernetes_objects,
            kubernetes_namespace,
            kubernetes_gateways,
            kubernetes_publish,
            kubernetes_shared,
            kubernetes_inject,
            inject_image,
            inject_capture_image,
            inject_federator,
            inject_requests,
            inject_limits,
            bundle_client_roots,
            virtual_ranges,
            dns_listen,
            dns_upstreams,
            log_level: _,
            log_format: _,
        } = self;
        let name = role::required(cluster, "--cluster", "east")?;
        let cluster: ClusterName =
            name.parse().map_err(|e| Failure::usage(format_args!("--cluster: {e}")))?;
        let kept = Retention::default();
        let audit = Retention {
            entries: audit_entries.unwrap_or(kept.entries),
            days: audit_days.unwrap_or(kept.days),
        };
        // A file is not held to the flags' bounds: less would drop what was just written.
        if audit.entries < 1000 || audit.days == 0 {
            return Err(Failure::usage(format_args!(
                "auditEntries {} and auditDays {}: at least 1000 entries and one day are kept",
                audit.entries, audit.days
            )));
        }
        let dirs = Dirs::from_environment().map_err(Failure::new);
        let place = |given: Option<PathBuf>, default: &dyn Fn(&Dirs) -> PathBuf| match (given, &dirs) {
            (Some(path), _) => Ok(path),
            (None, Ok(dirs)) => Ok(default(dirs)),
            (None, Err(failure)) => Err(Failure::new(failure)),
        };
        let kubernetes = kubernetes.map(|place| api_server(&place)).transpose()?;
        let work = Work {
            services: kubernetes_services.unwrap_or(false),
            objects: kubernetes_objects.unwrap_or(false),
            injects: kubernetes_inject.is_some(),
        };
        let pods = pods::config(
            kubernetes.as_ref(),
            kubernetes_gateways,
            kubernetes_publish,
            kubernetes_namespace.as_ref(),
        )?;
        let driven = driven(kubernetes.as_ref(), work, kubernetes_namespace, kubernetes_shared)?;
        let injected = Injected {
            listen: kubernetes_inject,
            image: inject_image,
            capture_image: inject_capture_image,
            federator: inject_federator,
            requests: inject_requests,
            limits: inject_limits,
        };
        let inject = injected.config(driven.as_ref())?;
        let kubernetes_services = driven.filter(|_| work.services || work.objects);
        let etcd = etcd::Settings {
            endpoints: etcd_endpoints.unwrap_or_default(),
            prefix: etcd_prefix,
            ca: etcd_ca,
            certificate: etcd_certificate,
            key: etcd_key,
            user: etcd_user,
            password_file: etcd_password_file,
            lease_seconds: etcd_lease_seconds,
        };
        let (etcd, etcd_import) = etcd.config(&name, etcd_import.unwrap_or(false))?;
        Ok(FederatorConfig {
            etcd,
            etcd_import,
            trust_dir: place(trust_dir, &|dirs| dirs.trust().join("clusters").join(&name))?,
            state_dir: place(state_dir, &|dirs| dirs.role_state(&name, "federator"))?,
            socket: place(socket, &|dirs| dirs.admin_socket(&name))?,
            cluster,
            listen: listen.unwrap_or(DEFAULT_LISTEN),
            advertise: None,
            admin: admin.unwrap_or(admin::DEFAULT_ADDRESS),
            audit,
            properties: properties
                .unwrap_or_default()
                .iter()
                .map(|text| property(text))
                .collect::<Result<_, _>>()?,
            bundle_endpoint: endpoint(bundle_endpoint, bundle_endpoint_certificate, bundle_endpoint_key)?,
            kubernetes,
            kubernetes_services,
            inject,
            pods,
            web_roots: WebRoots::new(bundle_client_roots),
            virtual_ranges: ranges(virtual_ranges)?,
            names: names::config(dns_listen, dns_upstreams)?,
        })
    }
}
