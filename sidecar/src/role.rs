//! A sidecar: built (everything bound, so that a port clash fails at start), then run until its drain is over.
//!
//! Owner of every task of the process. On SIGTERM: the federator is told, listeners close, new streams are refused so
//! that callers go elsewhere, open ones have the drain time to end; then the rest is cut and connections are closed.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::sync::{Semaphore, watch};
use tombolo_identity::tls;
use tombolo_model::names::ServiceKey;
use tombolo_names::metrics as names_metrics;
use tombolo_names::server::{self as names_server, NamesError};
use tombolo_names::table::TableHandle;
use tombolo_overlay::cid::Kind;
use tombolo_overlay::lease::LeaseError;
use tombolo_overlay::member::{JoinError, JoinOptions, Member, MemberError, ServiceAccountToken};
use tombolo_overlay::revoking::Enforcer;
use tombolo_overlay::{BindError, Limits, Overlay, OverlayConfig, Part, Routes, ServerTls};
use tombolo_proto::v1;
use tombolo_runtime::admin::{Admin, AdminError};
use tombolo_runtime::clock;
use tombolo_runtime::drain::{self, Drain, DrainTrigger};
use tombolo_runtime::readiness::{BlockReady, Readiness};
use tombolo_runtime::tasks::TaskGroup;

use crate::access::Admission;
use crate::agentless;
use crate::capture;
use crate::capture::pass::Dialler;
use crate::capture::targets::Targets;
use crate::capture::wanted::Wanted;
use crate::carry::Carry;
use crate::client::{ControlTask, ReportTask};
use crate::config::{ConfigError, ServiceConfig, SidecarConfig};
use crate::data_path::{Capture, DataPath, Further, Threads};
use crate::failover::ShiftLog;
use crate::health;
use crate::listening::{ListenError, Listening};
use crate::metrics::Metrics;
use crate::names::NamesTask;
use crate::shared::{Call, Handed};
use crate::tables::Tables;
use crate::udp::UdpContext;
use crate::udp::queue::Budget;
use crate::workload_api::{self, WorkloadApi};

/// What this machine is called, for people.
const HOSTNAME: &str = "/proc/sys/kernel/hostname";
/// The last report and the closing frames.
const GOODBYE: Duration = Duration::from_secs(2);
/// After the drain is forced, tasks see it at once; what does not is aborted.
const FORCED_PATIENCE: Duration = Duration::from_millis(500);

/// Why a sidecar did not start.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Member(#[from] MemberError),
    #[error(
        "{dir} holds no identity yet, and no join token is given: make one with `tombolo token create --role sidecar` (or `tombolo vm token`, or `tombolo token pods` in Kubernetes) and give it with --join-token-file"
    )]
    NotJoined { dir: String },
    #[error("{dir} can't be cleared: {source}")]
    Clear { dir: String, source: std::io::Error },
    #[error(transparent)]
    Join(#[from] JoinError),
    #[error("{dir} belongs to {found:?}, not to {expected:?}: give each sidecar a state directory of its own", dir = dir)]
    OtherName { dir: String, found: String, expected: String },
    #[error(transparent)]
    Lease(#[from] LeaseError),
    #[error(transparent)]
    Overlay(#[from] BindError),
    #[error("the TLS configuration can't be made: {0}")]
    Tls(#[from] rustls::Error),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error(transparent)]
    WorkloadApi(#[from] workload_api::BindError),
    #[error(transparent)]
    Names(#[from] NamesError),
}

/// Why a running sidecar ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error(transparent)]
    Overlay(#[from] BindError),
    #[error("the TLS configuration can't be made: {0}")]
    Tls(#[from] rustls::Error),
    #[error("an upstream's listener can't be served: {0}")]
    Listener(std::io::Error),
    #[error("names can't be served: {0}")]
    Names(std::io::Error),
}

/// Builds sidecars.
#[derive(Debug)]
pub struct Sidecar;

/// A sidecar whose addresses are bound and known.
#[derive(Debug)]
pub struct Bound {
    config: SidecarConfig,
    member: Member,
    overlay: Overlay,
    /// By thread.
    listening: Vec<Listening>,
    /// What the threads after the first serve.
    parts: Vec<Part>,
    /// What it has to itself in a process of its own.
    around: Around,
    metrics: Metrics,
    tasks: TaskGroup,
}

/// What a sidecar gets from a process that has many.
#[derive(Debug)]
pub(crate) struct Among {
    pub metrics: Metrics,
    pub configured: Option<BlockReady>,
    /// Of what waits in flows of datagrams.
    pub budget: Budget,
}

/// What a sidecar has around its data path.
#[derive(Debug, Default)]
struct Around {
    admin: Option<Admin>,
    workload_api: Option<WorkloadApi>,
    /// Followed for the name server, and for captured connections.
    names: Option<(Option<names_server::Bound>, names_metrics::Metrics)>,
    configured: Option<BlockReady>,
    budget: Option<Budget>,
}

impl Sidecar {
    /// Joins if need be, burns an incarnation, binds every socket. Needs a one-thread runtime, which then runs it.
    pub async fn build(config: SidecarConfig) -> Result<Bound, BuildError> {
        config.check()?;
        // Cheap and local first: a taken port must not use up a join token.
        let listening = Listening::bind(&config, config.threads.get())?;
        let readiness = Readiness::new();
        let configured = readiness.block("configuration");
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let workload_api = match &config.workload_api {
            Some(api) => Some(WorkloadApi::bind(api, &mut registry).await?),
            None => None,
        };
        let names = match (&config.names, &config.capture) {
            (None, None) => None,
            (served, _) => {
                let metrics = names_metrics::Metrics::register(&mut registry);
                let served = served.as_ref().map(|names| names_server::Bound::bind(names, metrics.clone()));
                Some((served.transpose()?, metrics))
            }
        };
        let admin = Some(Admin::bind(config.admin, registry, readiness).await?);
        let around = Around { admin, workload_api, names, configured: Some(configured), budget: None };
        Self::join(config, listening, around, metrics).await
    }

    /// One of the sidecars of a process that shows metrics and readiness for all of them, and hands it its calls
    /// ([`Bound::hand`]).
    pub(crate) async fn build_among(config: SidecarConfig, among: Among) -> Result<Bound, BuildError> {
        let Among { metrics, configured, budget } = among;
        let listening = Listening::bind(&config, 1)?;
        let around = Around { configured, budget: Some(budget), ..Around::default() };
        Self::join(config, listening, around, metrics).await
    }

    async fn join(
        config: SidecarConfig,
        listening: Vec<Listening>,
        around: Around,
        metrics: Metrics,
    ) -> Result<Bound, BuildError> {
        let dir = config.state_dir.clone();
        let known = match &config.service_account_token {
            Some(ServiceAccountToken::Asked { .. }) => known_or_nobody(&dir)?,
            _ => Member::load(&dir)?,
        };
        let member = match (known, &config.token, &config.service_account_token) {
            (Some(member), _, _) => member,
            (None, Some(token), Some(account)) => {
                let options = JoinOptions { name: config.name.clone(), bind: config.bind };
                Member::join_pod(token, account, &dir, &options).await?
            }
            (None, Some(token), None) => Member::join(token, &dir, Some(&config.name), config.bind).await?,
            (None, None, _) => return Err(BuildError::NotJoined { dir: dir.display().to_string() }),
        };
        if member.name() != config.name {
            return Err(BuildError::OtherName {
                dir: dir.display().to_string(),
                found: member.name().to_owned(),
                expected: config.name.clone(),
            });
        }
        member.check_renewable(clock::since_unix_epoch())?;
        let tasks = TaskGroup::new();
        let endpoint = member.burn_endpoint()?;
        let mut parts = Part::bind(config.bind, listening.len())
            .map_err(|source| BindError::Socket { address: config.bind, source })?;
        let first = parts.remove(0);
        let overlay = Overlay::bind_first(
            OverlayConfig {
                tag: member.tag(),
                endpoint,
                keys: member.lease().keys.clone(),
                kind: Kind::Endpoint,
                bind: config.bind,
                registers: config.registers(),
                learns: false,
                server: Some(server_tls(&member)?),
                svid: Some(member.svid().clone()),
                limits: limits(&config),
            },
            first,
            &tasks,
        )?;
        overlay.set_routes(Routes { zone: config.zone.clone(), ..member.first_routes() });
        tracing::info!(spiffe_id = %member.spiffe_id(), endpoint = %overlay.endpoint_id(),
            overlay = %overlay.local_addr(), admin = around.admin.as_ref().map(|admin| admin.local_addr().to_string()),
            "sidecar bound");
        Ok(Bound { config, member, overlay, listening, parts, around, metrics, tasks })
    }
}

impl Bound {
    /// Connections that a front has accepted for it: those that have waited, and those to come.
    pub(crate) fn hand(&mut self, held: VecDeque<Call>, handed: Handed) {
        if let Some(first) = self.listening.first_mut() {
            first.handed = Some((held, handed));
        }
    }

    pub fn overlay_addr(&self) -> SocketAddr {
        self.overlay.local_addr()
    }
    /// Where names are served.
    pub fn names_addr(&self) -> Option<SocketAddr> {
        self.around.names.as_ref().and_then(|(bound, _)| bound.as_ref()).map(names_server::Bound::listen_addr)
    }
    /// Where the upstreams listen, in the order of the configuration.
    pub fn upstream_addrs(&self) -> Vec<SocketAddr> {
        let listeners = self.listening.first().map(|listening| listening.upstreams.as_slice());
        listeners.unwrap_or_default().iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// Runs until `shutdown` starts and the drain is over. A forced `shutdown` ends at once.
    pub async fn run(self, shutdown: Drain) -> Result<(), RunError> {
        let Self {
            config,
            member,
            overlay,
            listening,
            parts,
            around: Around { admin, workload_api, names, configured, budget },
            metrics,
            tasks,
        } = self;
        let (trigger, watcher) = drain::channel();
        let log = ShiftLog::open(member.dir());
        let (tables, received) = watch::channel(None);
        let (question, asked) = watch::channel(0);

        let enforcer = Enforcer::new(member.svid().clone());
        let wanted = Wanted::new(asked_for(&config).collect());
        let mut control = ControlTask {
            hello: hello(&config, &overlay),
            member: member.clone(),
            overlay: overlay.clone(),
            tables,
            metrics: metrics.clone(),
            carry: Carry::default(),
            zone: config.zone.clone(),
            enforcer: enforcer.clone(),
            wanted: wanted.clone(),
            question,
            provided: config.provided.clone(),
            greeted: watch::Sender::new(0),
        };
        let greeted = control.greeted.subscribe();
        control.restore();
        tasks.spawn("ready once configured", ready_once_configured(received.clone(), configured));
        tasks.spawn("control", control.run());
        member.spawn_renewal(vec![overlay.clone()], config.gateways.clone(), &tasks);

        if let Some(api) = workload_api {
            api.spawn(&member, &overlay, received.clone(), &tasks);
        }

        // Served to the end: applications that drain resolve names, too.
        let (_serving_names, names) = match names {
            Some((bound, metrics)) => {
                let table = TableHandle::default();
                let task = NamesTask::new(member.clone(), overlay.clone(), table.clone(), metrics);
                let whole = task.whole();
                tasks.spawn("names", task.run());
                let serving = bound.map(|bound| bound.start(table.clone())).transpose();
                (serving.map_err(RunError::Names)?, Some((table, whole)))
            }
            None => (None, None),
        };

        let (admitted_sender, admitted) =
            watch::channel(Arc::new(Admission::nobody(member.cluster().clone())));
        let follow = follow_admission(received.clone(), admitted_sender, metrics.clone());
        tasks.spawn("admission", follow);
        let config = Arc::new(config);
        let (dialler, capture) = match (&config.capture, names) {
            (Some(capture), Some((table, whole))) => {
                let (sender, targets) = watch::channel(Arc::new(Targets::new(capture)));
                let follow = capture::names::follow(received.clone(), table, whole, sender);
                tasks.spawn("captured addresses", follow);
                let pass_slots = Arc::new(Semaphore::new(config.pool.max_app_connections));
                (Dialler::marking(capture.mark), Some(Capture { targets, pass_slots }))
            }
            _ => (Dialler::plain(), None),
        };
        let (watched, agentless) = agentless::watch::of(&config);
        let udp = UdpContext::new(config.udp, budget.as_ref(), metrics.udp.clone());
        let path = DataPath {
            config: Arc::clone(&config),
            member: member.clone(),
            tables: received.clone(),
            admitted,
            metrics: metrics.clone(),
            drain: watcher.clone(),
            inbound_slots: Arc::new(Semaphore::new(config.inbound.max_app_connections)),
            outbound_slots: Arc::new(Semaphore::new(config.pool.max_app_connections)),
            udp: udp.clone(),
            dialler,
            wanted,
            capture,
            agentless: Arc::new(agentless),
            tasks: tasks.clone(),
        };
        let mut threads = Threads::default();
        let mut listening = listening.into_iter();
        let own = listening.next().unwrap_or_default();
        let mut routes = vec![path.start(&overlay, own, log.clone()).map_err(RunError::Listener)?];
        for (part, listening) in parts.into_iter().zip(listening) {
            let server = server_tls(&member)?;
            let further = Further { part, listening, server, limits: limits(&config) };
            routes.push(threads.start(further, &overlay, &path, log.reader()).await?);
        }
        let mut slots = vec![
            (Arc::clone(&path.inbound_slots), config.inbound.max_app_connections),
            (Arc::clone(&path.outbound_slots), config.pool.max_app_connections),
            (udp.inbound, config.udp.max_flows),
            (udp.outbound, config.udp.max_flows),
        ];
        let passed = path.capture.as_ref().map(|capture| Arc::clone(&capture.pass_slots));
        slots.extend(passed.map(|slots| (slots, config.pool.max_app_connections)));
        drop(path);
        let mut verdicts = Vec::new();
        for watched in watched {
            verdicts.push((watched.service.clone(), watched.verdict.subscribe()));
            tasks.spawn("agentless backends", agentless::watch::run(watched, watcher.clone()));
        }
        for service in config.services.iter().filter(|service| service.backends.is_empty()) {
            let Some((check, target)) = service.checked() else { continue };
            let (verdict, seen) = watch::channel(None);
            verdicts.push((service.service.clone(), seen));
            let check = health::watch_service(check, target, verdict, watcher.clone());
            tasks.spawn("health", check);
        }
        let report = ReportTask {
            member,
            overlay: overlay.clone(),
            health: verdicts,
            provided: config.provided.clone(),
            greeted,
            routes,
            log,
            tables: received,
            metrics,
            drain: watcher.clone(),
            enforcer,
            asked,
        };
        let report = tasks.spawn("report", report.run());
        drop(watcher);

        let serve = async {
            match admin {
                Some(admin) => admin.run(shutdown.clone()).await,
                None => {
                    shutdown.started().await;
                    Ok(())
                }
            }
        };
        let drained = async {
            shutdown.started().await;
            finish(&shutdown, trigger, report, &overlay, slots, config.drain).await;
        };
        tokio::pin!(serve, drained);
        let result = tokio::select! {
            served = &mut serve => match served {
                // The admin endpoint went with the drain; what is in flight goes on.
                Ok(()) => { drained.await; Ok(()) }
                Err(error) => Err(error.into()),
            },
            () = &mut drained => Ok(()),
        };
        tasks.shutdown(FORCED_PATIENCE).await;
        threads.end();
        result
    }
}

/// The member of a directory, unless it can't be used any more: whoever may ask for tokens joins anew then.
fn known_or_nobody(dir: &Path) -> Result<Option<Member>, BuildError> {
    let known = Member::load(dir).and_then(|member| match member {
        Some(member) => member.check_renewable(clock::since_unix_epoch()).map(|()| Some(member)),
        None => Ok(None),
    });
    match known {
        Err(error @ (MemberError::Damaged { .. } | MemberError::TooLate(_) | MemberError::Lease(_))) => {
            tracing::warn!(%error, "an identity of before can't be used: it is asked for anew");
            std::fs::remove_dir_all(dir)
                .map_err(|source| BuildError::Clear { dir: dir.display().to_string(), source })?;
            Ok(None)
        }
        known => Ok(known?),
    }
}

/// The drain: refuse what is new, wait for what is open, then cut.
async fn finish(
    shutdown: &Drain,
    trigger: DrainTrigger,
    report: tokio::task::JoinHandle<()>,
    overlay: &Overlay,
    slots: Vec<(Arc<Semaphore>, usize)>,
    patience: Duration,
) {
    tracing::info!(patience_ms = patience.as_millis() as u64, "draining");
    trigger.start();
    let quiet = async {
        // Told first, so that nobody is sent here while open streams end.
        let _ = tokio::time::timeout(GOODBYE, report).await;
        // Every inbound stream and every outbound connection holds a slot.
        for (slots, all) in &slots {
            let _ = slots.acquire_many(u32::try_from(*all).unwrap_or(u32::MAX)).await;
        }
    };
    tokio::select! {
        () = quiet => tracing::info!("everything open has ended"),
        () = tokio::time::sleep(patience) => tracing::info!("the drain time is over; what is open is cut"),
        () = shutdown.forced() => tracing::info!("ending at once"),
    }
    trigger.force();
    // The resets must leave before the connections close over them.
    tokio::time::sleep(Duration::from_millis(50)).await;
    overlay.close().await;
}

async fn ready_once_configured(
    mut tables: watch::Receiver<Option<Arc<Tables>>>,
    configured: Option<BlockReady>,
) {
    let _ = tables.wait_for(Option::is_some).await;
    drop(configured);
}

/// Passes on to live inbound connections and streams what each configuration admits, where that has changed: thousands of
/// them wake up for it.
async fn follow_admission(
    mut tables: watch::Receiver<Option<Arc<Tables>>>,
    admitted: watch::Sender<Arc<Admission>>,
    metrics: Metrics,
) {
    loop {
        if let Some(tables) = tables.borrow_and_update().as_ref() {
            let (inbound, access) = (Arc::clone(&tables.inbound), Arc::clone(&tables.access));
            admitted.send_if_modified(|admission| {
                if admission.inbound == inbound && admission.access == access {
                    return false;
                }
                for (service, policy) in admission.access.names().difference(&access.names()) {
                    metrics.forget_policy(&service.to_string(), policy);
                }
                *admission = Arc::new(Admission { inbound, access });
                true
            });
        }
        if tables.changed().await.is_err() {
            return;
        }
    }
}

fn server_tls(member: &Member) -> Result<ServerTls, rustls::Error> {
    Ok(ServerTls { mesh: tls::mesh_server_config(member.svid())?, join: None })
}

fn limits(config: &SidecarConfig) -> Limits {
    Limits {
        bidi_streams: config.inbound.initial_streams,
        max_udp_payload_bytes: config.max_udp_payload_bytes,
        ..Limits::default()
    }
}

/// Services that the configuration says are called.
fn asked_for(config: &SidecarConfig) -> impl Iterator<Item = ServiceKey> {
    let upstreams = config.upstreams.iter().map(|upstream| upstream.service.clone());
    let addresses = config.capture.iter().flat_map(|capture| &capture.addresses);
    upstreams.chain(addresses.map(|address| address.service.clone()))
}

/// What the federator is told about this process.
fn hello(config: &SidecarConfig, overlay: &Overlay) -> v1::SidecarHello {
    let bound = overlay.local_addr();
    let address = match config.announce {
        Some(address) => address.to_string(),
        None if config.registers() => String::new(),
        None => bound.to_string(),
    };
    let service = |service: &ServiceConfig| v1::LocalService {
        service: service.service.to_string(),
        ports: service
            .ports
            .iter()
            .map(|port| v1::ServicePort {
                name: port.name.clone(),
                port: port.port.into(),
                app_protocol: port.app_protocol.clone(),
                protocol: port.protocol.to_string(),
            })
            .collect(),
        weight: service.weight,
        plain: service.backends.iter().map(ToString::to_string).collect(),
    };
    let mut upstreams: Vec<_> = asked_for(config).map(|service| service.to_string()).collect();
    upstreams.sort();
    upstreams.dedup();
    v1::SidecarHello {
        endpoint_addresses: vec![address],
        endpoints: vec![overlay.endpoint_id().value()],
        services: config.services.iter().map(service).collect(),
        upstreams,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        lease: None,
        instance: rand::random::<[u8; 16]>().to_vec(),
        host: std::fs::read_to_string(HOSTNAME).unwrap_or_default().trim().to_owned(),
        answers: true,
    }
}
