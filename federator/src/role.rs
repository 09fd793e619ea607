//! A federator: built (store opened, everything bound, so that a clash fails at start), then run until it is told to end.
//!
//! Owner of every task of the process. On SIGTERM the operator's socket closes and the overlay's peers are told; members
//! and peers keep what they know, so there is nothing to drain.

mod errors;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry as MetricsRegistry;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tombolo_identity::authority::ClusterMaterial;
use tombolo_identity::authority::adopt::Upstream;
use tombolo_identity::bundle::BundleSet;
use tombolo_identity::issuer::KeyAndCsr;
use tombolo_identity::{Svid, SvidHandle, tls};
use tombolo_model::names::ClusterName;
use tombolo_model::virtual_ranges::VirtualRanges;
use tombolo_names::metrics as names_metrics;
use tombolo_names::server::{self as names_server, NamesConfig};
use tombolo_names::table::TableHandle;
use tombolo_overlay::cid::Kind;
use tombolo_overlay::grpc::{GrpcAcceptor, GrpcIncoming};
use tombolo_overlay::member;
use tombolo_overlay::member::renewal::due_at;
use tombolo_overlay::revoking::Enforcer;
use tombolo_overlay::{FirstContactTls, HandleClass, Limits, Overlay, OverlayConfig, ServerTls};
use tombolo_proto::v1;
use tombolo_proto::v1::admin_server::AdminServer;
use tombolo_proto::v1::config_server::ConfigServer;
use tombolo_proto::v1::federation_server::FederationServer;
use tombolo_proto::v1::join_server::JoinServer;
use tombolo_proto::v1::linking_server::LinkingServer;
use tombolo_proto::v1::renewal_server::RenewalServer;
use tombolo_proto::v1::workload_server::WorkloadServer;
use tombolo_runtime::admin::Admin;
use tombolo_runtime::clock;
use tombolo_runtime::dirs::{self};
use tombolo_runtime::drain::Drain;
use tombolo_runtime::readiness::{BlockReady, Readiness};
use tombolo_runtime::tasks::TaskGroup;
use tonic::transport::Server;

pub use self::errors::{BuildError, RunError};
use crate::bundle_endpoint::{BundleEndpoint, BundleEndpointConfig};
use crate::core::audit::Retention;
use crate::core::{Core, CoreError, CoreHandle};
use crate::crl::{self, CrlTask};
use crate::facts::FederatorEndpoint;
use crate::first_contact::FirstContactTask;
use crate::foreign::client::{Patience, WebRoots};
use crate::foreign::task::FederationTask;
use crate::inject::metrics::Metrics as InjectMetrics;
use crate::inject::{Inject, InjectConfig};
use crate::kubernetes::metrics::Metrics as KubernetesMetrics;
use crate::kubernetes::published::PublishTask;
use crate::kubernetes::{KubernetesConfig, KubernetesTask, PodsConfig};
use crate::metrics::Metrics;
use crate::peers::PeersTask;
use crate::registry::HeldTrust;
use crate::revocations;
use crate::service::admin::{AdminService, check_operator};
use crate::service::config::ConfigService;
use crate::service::federation::{FederationService, Logs};
use crate::service::join::JoinService;
use crate::service::linking::LinkingService;
use crate::service::names::Names;
use crate::service::renewal::RenewalService;
use crate::service::workload::WorkloadService;
use crate::snapshot::rings::Rings;
use crate::store::etcd::{EtcdConfig, EtcdStore};
use crate::token_review::access::KubernetesAccess;
use crate::token_review::api::ApiReviewer;
use crate::token_review::{NoReviewer, TokenReviewer};
use crate::{opening, wiring};

/// Where the overlay listens unless told otherwise (design section 3).
pub const DEFAULT_LISTEN: SocketAddr =
    SocketAddr::V4(std::net::SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 7443));
/// Half of the registry's patience for reports would be too coarse; a quarter second is a hundredth of a core.
const TICK: Duration = Duration::from_millis(250);
/// Every cluster's members and its peers' federators; each connection is 40 KB.
const MAX_PENDING: usize = 1024;
const END_PATIENCE: Duration = Duration::from_secs(2);

/// Everything that a federator is told.
#[derive(Clone, Debug)]
pub struct FederatorConfig {
    pub cluster: ClusterName,
    pub trust_dir: PathBuf,
    pub state_dir: PathBuf,
    /// `None`: a file in the state directory.
    pub etcd: Option<EtcdConfig>,
    /// Begin an empty store in etcd with what that file holds.
    pub etcd_import: bool,
    pub listen: SocketAddr,
    /// Where members of the cluster reach the overlay socket; found by itself where `listen` names an address.
    pub advertise: Option<SocketAddr>,
    pub admin: SocketAddr,
    pub socket: PathBuf,
    pub properties: BTreeMap<String, String>,
    /// How much of the audit log is kept.
    pub audit: Retention,
    /// Where foreign trust domains fetch this one's bundle; `None`: nowhere.
    pub bundle_endpoint: Option<BundleEndpointConfig>,
    /// Whom to ask about pods' tokens; `None`: pods do not join.
    pub kubernetes: Option<KubernetesAccess>,
    /// Whose services are exported and imported, and whose objects are kept; `None`: those of no Kubernetes.
    pub kubernetes_services: Option<KubernetesConfig>,
    /// Where its API server asks about new pods; `None`: nowhere.
    pub inject: Option<InjectConfig>,
    pub pods: PodsConfig,
    /// The web's CAs, for foreign bundle endpoints of profile `https_web`.
    pub web_roots: WebRoots,
    /// Where services get their virtual addresses from.
    pub virtual_ranges: VirtualRanges,
    /// Where names are served to the cluster; `None`: nowhere.
    pub names: Option<NamesConfig>,
}

/// Builds federators.
#[derive(Debug)]
pub struct Federator;

/// A federator whose addresses are bound and known.
pub struct Bound {
    core: CoreHandle,
    /// Where others stand by for it.
    etcd: Option<Arc<EtcdStore>>,
    overlay: Overlay,
    svid: SvidHandle,
    enforcer: Enforcer,
    admin: Admin,
    operators: UnixListener,
    socket: PathBuf,
    metrics: Metrics,
    crl: crl::Published,
    bundle_endpoint: Option<BundleEndpoint>,
    reviewer: Arc<dyn TokenReviewer>,
    kubernetes_services: Option<(KubernetesConfig, KubernetesMetrics)>,
    inject: Option<Inject>,
    publish: Option<(KubernetesConfig, String)>,
    web_roots: WebRoots,
    names: Option<(names_server::Bound, names_metrics::Metrics)>,
    bind: IpAddr,
    trust_dir: PathBuf,
    /// Dropped when everything serves.
    serving: BlockReady,
    tasks: TaskGroup,
}

impl Federator {
    /// Opens the store and binds every socket. Needs a one-thread runtime, which then runs it.
    pub async fn build(config: FederatorConfig) -> Result<Bound, BuildError> {
        let FederatorConfig {
            cluster,
            trust_dir,
            state_dir,
            etcd,
            etcd_import,
            listen,
            advertise,
            admin,
            socket,
            properties,
            audit,
            bundle_endpoint,
            kubernetes,
            kubernetes_services,
            inject,
            pods: PodsConfig { gateways, publish },
            web_roots,
            virtual_ranges,
            names,
        } = config;
        let trust = |source| BuildError::Trust { cluster: cluster.clone(), dir: trust_dir.clone(), source };
        let material = ClusterMaterial::load(&trust_dir).map_err(trust)?;
        if material.cluster != cluster {
            let found = material.cluster;
            return Err(BuildError::OtherCluster { dir: trust_dir, found, expected: cluster });
        }
        let upstream = Upstream::load(&trust_dir).map_err(trust)?;
        let tag = material.tag;
        dirs::ensure_private(&state_dir)?;
        let (store, etcd) = opening::store(&state_dir, etcd, etcd_import).await?;
        let readiness = Readiness::new();
        let serving = readiness.block("serving");
        let mut registry = MetricsRegistry::default();
        let metrics = Metrics::register(&mut registry);
        let crl = crl::Published::register(&mut registry);
        let kubernetes_services =
            kubernetes_services.map(|config| (config, KubernetesMetrics::register(&mut registry)));
        let inject = match inject {
            Some(config) => Some(Inject::bind(config, InjectMetrics::register(&mut registry)).await?),
            None => None,
        };
        let names = match &names {
            Some(config) => {
                let metrics = names_metrics::Metrics::register(&mut registry);
                Some((names_server::Bound::bind(config, metrics.clone())?, metrics))
            }
            None => None,
        };
        let admin = Admin::bind(admin, registry, readiness).await?.with_routes(crl::routes(crl.clone()));
        let operators = bind_socket(&socket).await?;

        let mut core = Core::load(store, material, properties, clock::since_unix_epoch())?;
        core.set_audit_retention(audit);
        core.set_upstream(upstream);
        core.note_trust_at_start(clock::since_unix_epoch())?;
        core.set_virtual_ranges(virtual_ranges);
        if !kubernetes_services.as_ref().is_some_and(|(config, _)| config.objects) {
            // Nobody reads them any more.
            core.set_kubernetes_properties(BTreeMap::new())?;
        }
        core.set_gateways(gateways);
        let core = core.start().map_err(BuildError::Thread)?;
        let svid = SvidHandle::by(clock::since_unix_epoch, own_svid(&core).await?);
        let bundle_endpoint = match &bundle_endpoint {
            Some(config) => Some(BundleEndpoint::bind(config, &svid).await?),
            None => None,
        };
        // Before anybody can connect.
        let enforcer = Enforcer::new(svid.clone());
        enforcer.learn(&revocations::in_force(&core.facts()));
        let (endpoint, keys) = core.attempt(|core, moment| core.own_endpoint(moment)).await?;
        let tasks = TaskGroup::new();
        let reviewer: Arc<dyn TokenReviewer> = match kubernetes {
            Some(access) => Arc::new(ApiReviewer::new(access, tasks.clone())?),
            None => Arc::new(NoReviewer),
        };
        let overlay = Overlay::bind(
            OverlayConfig {
                tag,
                endpoint: endpoint.endpoint,
                keys,
                kind: Kind::Endpoint,
                bind: listen,
                registers: false,
                learns: true,
                server: Some(ServerTls {
                    mesh: tls::mesh_server_config(&svid)?,
                    join: Some(FirstContactTls {
                        join: tls::join_server_config(&svid)?,
                        renewal: tls::renewal_server_config(&svid)?,
                    }),
                }),
                svid: Some(svid.clone()),
                limits: Limits { max_pending: MAX_PENDING, ..Limits::default() },
            },
            &tasks,
        )?;
        let address = advertise.unwrap_or_else(|| reachable(overlay.local_addr()));
        let endpoint = FederatorEndpoint { address, ..endpoint };
        core.call(move |core, _| core.set_own_endpoint(endpoint)).await.map_err(|_| CoreError::Gone)?;
        tracing::info!(%cluster, %tag, overlay = %overlay.local_addr(), advertised = %address,
            admin = %admin.local_addr(), socket = %socket.display(), "federator bound");
        Ok(Bound {
            core,
            etcd,
            overlay,
            svid,
            enforcer,
            admin,
            operators,
            socket,
            metrics,
            crl,
            bundle_endpoint,
            reviewer,
            kubernetes_services,
            inject,
            publish,
            web_roots,
            names,
            bind: listen.ip(),
            trust_dir,
            serving,
            tasks,
        })
    }
}

impl Bound {
    pub fn overlay_addr(&self) -> SocketAddr {
        self.overlay.local_addr()
    }
    pub fn admin_addr(&self) -> SocketAddr {
        self.admin.local_addr()
    }
    /// For tests, and for whoever embeds a federator.
    pub fn core(&self) -> &CoreHandle {
        &self.core
    }

    /// Runs until `shutdown` starts.
    pub async fn run(self, shutdown: Drain) -> Result<(), RunError> {
        let Self {
            core,
            etcd,
            overlay,
            svid,
            enforcer,
            admin,
            operators,
            socket,
            metrics,
            crl,
            bundle_endpoint,
            reviewer,
            kubernetes_services,
            inject,
            publish,
            web_roots,
            names: bound_names,
            bind,
            trust_dir,
            serving,
            tasks,
        } = self;
        tasks.spawn("ticks", tick(core.clone()));
        tasks.spawn("own SVID", renew_own_svid(core.clone(), svid.clone()));
        tasks.spawn("own overlay", wiring::follow(core.clone(), overlay.clone()));
        tasks.spawn("revocations", wiring::enforce(core.clone(), overlay.clone(), enforcer));
        if let Some(endpoint) = bundle_endpoint {
            endpoint.spawn(&core, &svid, &tasks);
        }
        let federations = FederationTask { core: core.clone(), web_roots, patience: Patience::default() };
        tasks.spawn("foreign bundles", federations.run());
        if let Some((config, metrics)) = kubernetes_services {
            let task = KubernetesTask { core: core.clone(), config, metrics, tasks: tasks.clone() };
            tasks.spawn("Kubernetes", task.run());
        }
        if let Some(inject) = inject {
            inject.spawn(&core, &tasks);
        }
        if let Some((config, federator)) = publish {
            let task = PublishTask { core: core.clone(), config, federator };
            tasks.spawn("what joiners are told", task.run());
        }
        let names = Names::new(&core.facts());
        tasks.spawn("names", names.clone().follow(core.clone()));
        let _serving_names = match bound_names {
            Some((bound, metrics)) => {
                let table = TableHandle::default();
                tasks.spawn("names table", names.clone().fill(table.clone(), metrics));
                Some(bound.start(table).map_err(RunError::Names)?)
            }
            None => None,
        };
        tasks.spawn("CRL", CrlTask { core: core.clone(), published: crl }.run());
        tasks.spawn("metrics", metrics.clone().follow(core.clone(), overlay.clone()));
        let peers = PeersTask {
            core: core.clone(),
            overlay: overlay.clone(),
            svid: svid.clone(),
            tasks: tasks.clone(),
        };
        tasks.spawn("peers", peers.run());

        let (control, control_incoming) = GrpcIncoming::new(&tasks);
        let (join, join_incoming) = GrpcIncoming::new(&tasks);
        let config_service = ConfigService {
            core: core.clone(),
            rings: Arc::new(Rings::default()),
            metrics: metrics.clone(),
            names: names.clone(),
            tasks: tasks.clone(),
        };
        let federation =
            FederationService { core: core.clone(), logs: Arc::new(Logs::default()), tasks: tasks.clone() };
        let server = Server::builder()
            .add_service(ConfigServer::new(config_service))
            .add_service(FederationServer::new(federation))
            .add_service(WorkloadServer::new(WorkloadService::new(core.clone(), metrics.clone())));
        tasks.spawn("control services", served("control", server.serve_with_incoming(control_incoming)));
        let (renewal, renewal_incoming) = GrpcIncoming::new(&tasks);
        let renewals = RenewalService::new(core.clone(), svid.clone(), metrics.clone());
        let server = Server::builder().add_service(RenewalServer::new(renewals));
        tasks.spawn("renewal service", served("renewal", server.serve_with_incoming(renewal_incoming)));
        let (linking, linking_incoming) = GrpcIncoming::new(&tasks);
        let links = LinkingService::new(core.clone(), svid.clone());
        let server = Server::builder().add_service(LinkingServer::new(links));
        tasks.spawn("linking service", served("linking", server.serve_with_incoming(linking_incoming)));
        let contacts = FirstContactTask { core: core.clone(), overlay: overlay.clone(), svid: svid.clone() };
        tasks.spawn("first contact", contacts.run());
        let joins = JoinService::new(core.clone(), reviewer, svid.clone(), metrics);
        let server = Server::builder().add_service(JoinServer::new(joins));
        tasks.spawn("join service", served("join", server.serve_with_incoming(join_incoming)));
        tasks.spawn("connections", accept(overlay.clone(), control, join, renewal, linking));
        let ending = core.clone();
        let service = AdminService { core, svid, bind, trust_dir, tasks: tasks.clone() };
        let server = Server::builder().add_service(AdminServer::with_interceptor(service, check_operator));
        let operators = server.serve_with_incoming(UnixListenerStream::new(operators));
        tasks.spawn("operators", served("operators", operators));
        drop(serving);

        let result = tokio::select! {
            served = admin.run(shutdown.clone()) => served.map_err(RunError::from),
            owner = opening::replaced(etcd.as_deref()) => Err(RunError::Replaced { owner }),
            () = shutdown.started() => Ok(()),
        };
        tracing::info!("ending; members and peers keep what they know");
        let _ = std::fs::remove_file(&socket);
        let _ = tokio::time::timeout(END_PATIENCE, ending.call(|core, moment| core.end(moment))).await;
        overlay.close().await;
        tasks.shutdown(END_PATIENCE).await;
        if let Some(etcd) = etcd {
            etcd.resign().await;
        }
        result
    }
}

async fn served(
    what: &'static str,
    server: impl Future<Output = Result<(), tonic::transport::Error>> + Send,
) {
    if let Err(error) = server.await {
        tracing::error!(%error, what, "a service has ended");
    }
}

/// Hands each connection to the services that its handle is for.
async fn accept(
    overlay: Overlay,
    control: GrpcAcceptor,
    join: GrpcAcceptor,
    renewal: GrpcAcceptor,
    linking: GrpcAcceptor,
) {
    while let Some(peer) = overlay.accept().await {
        match peer.class() {
            HandleClass::Control => control.attach(peer),
            HandleClass::Join => join.attach(peer),
            HandleClass::Renewal => renewal.attach(peer),
            HandleClass::FirstContact => linking.attach(peer),
            // No mesh handle is served here.
            HandleClass::Mesh => peer.close(tombolo_overlay::close_code::NOT_ADMITTED, "no service here"),
        }
    }
}

async fn tick(core: CoreHandle) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if core.call(|core, moment| core.tick(moment)).await.is_err() {
            return;
        }
    }
}

/// A fresh key and a leaf for it; peers are judged by what the core trusts.
async fn own_svid(core: &CoreHandle) -> Result<Svid, BuildError> {
    let fresh = KeyAndCsr::generate()?;
    let csr = fresh.csr_der.clone();
    let (issued, trust) = core
        .attempt(move |core, moment| Ok((core.own_svid(&csr, moment)?, Arc::clone(&core.facts.trust))))
        .await?;
    let chain = issued.chain_der.into_iter().map(Into::into).collect();
    let bundles = BundleSet::of(trust.bundle.clone()).reissuing(Arc::clone(&trust.reissued));
    Ok(Svid::new(&fresh.key_der, chain, bundles)?)
}

/// Between two renewals of the own SVID: each is a signature, a commit and an entry of the audit log.
const RENEWED: Duration = Duration::from_secs(1);

/// What handshakes with an SVID use, as every member reports it.
fn held(svid: &Svid) -> HeldTrust {
    let v1::TrustHeld { sequence, issuer_sha256, issued_unix } = member::trust_of(svid);
    HeldTrust {
        sequence,
        issuer_sha256: issuer_sha256.try_into().unwrap_or_default(),
        issued_unix: u64::try_from(issued_unix).unwrap_or(0),
    }
}

/// Renews the federator's own SVID at half its life, and at once when what is trusted or issued with has changed.
async fn renew_own_svid(core: CoreHandle, svid: SvidHandle) {
    let mut due = due_at(clock::unix_seconds(), svid.load().not_after, rand::random());
    let mut facts = core.watch();
    let mut said = None;
    loop {
        let now = clock::unix_seconds();
        let own = held(&svid.load());
        let trust = Arc::clone(&facts.borrow_and_update().trust);
        let fits = own.sequence == trust.bundle.sequence
            && own.issuer_sha256 == trust.issuer_sha256
            && own.issued_unix >= trust.leaves_since(now);
        if now < due && fits {
            if said != Some(own) {
                if core.call(move |core, moment| core.own_trust(own, moment)).await.is_err() {
                    return;
                }
                said = Some(own);
            }
            // Looked at again: the clock may have been set.
            let looked = tokio::time::timeout(Duration::from_secs((due - now).min(300)), facts.changed());
            if let Ok(Err(_)) = looked.await {
                return;
            }
            continue;
        }
        match own_svid(&core).await {
            Ok(fresh) => {
                due = due_at(clock::unix_seconds(), fresh.not_after, rand::random());
                svid.swap(fresh);
                tracing::info!("the federator's own SVID is renewed");
                // Should it not be what is wanted still, then not at full speed.
                tokio::time::sleep(RENEWED).await;
            }
            Err(error) => {
                tracing::warn!(%error, "the federator's own SVID can't be renewed; tried again");
                tokio::time::sleep(Duration::from_secs(30)).await;
            }
        }
    }
}

/// The address to advertise for a socket: its own, or the one that packets to elsewhere leave from.
fn reachable(local: SocketAddr) -> SocketAddr {
    if !local.ip().is_unspecified() {
        return local;
    }
    // Connecting a UDP socket sends nothing: it asks the kernel for a source address (RFC 5737 test network).
    let source = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
        socket.local_addr()
    });
    let ip = source.map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |source| source.ip());
    SocketAddr::new(ip, local.port())
}

/// The operators' socket, for the own user alone. One that nobody answers on is left over and removed.
async fn bind_socket(path: &Path) -> Result<UnixListener, BuildError> {
    dirs::check_socket_path(path)?;
    let failed = |source| BuildError::Socket { path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        dirs::ensure_private(parent)?;
    }
    if path.exists() {
        if tokio::net::UnixStream::connect(path).await.is_ok() {
            return Err(BuildError::SocketInUse { path: path.to_owned() });
        }
        std::fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}
