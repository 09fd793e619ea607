//! A sidecar: built (everything bound, so that a port clash fails at start), then run until its drain is over.
//!
//! Owner of every task of the process. On SIGTERM: the federator is told, listeners close, new streams are refused so
//! that callers go elsewhere, open ones have the drain time to end; then the rest is cut and connections are closed.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tombolo_identity::tls;
use tombolo_overlay::cid::Kind;
use tombolo_overlay::lease::LeaseError;
use tombolo_overlay::member::{JoinError, Member, MemberError};
use tombolo_overlay::revoking::Enforcer;
use tombolo_overlay::{BindError, Limits, Overlay, OverlayConfig, Routes, ServerTls};
use tombolo_proto::v1;
use tombolo_runtime::admin::{Admin, AdminError};
use tombolo_runtime::drain::{self, Drain, DrainTrigger};
use tombolo_runtime::readiness::{BlockReady, Readiness};
use tombolo_runtime::tasks::TaskGroup;

use crate::access::Admission;
use crate::carry::Carry;
use crate::client::{ControlTask, ReportTask};
use crate::config::{ConfigError, ServiceConfig, SidecarConfig};
use crate::failover::{Router, ShiftLog};
use crate::health;
use crate::inbound::{InboundTask, LocalTarget};
use crate::metrics::Metrics;
use crate::outbound::{OutboundContext, UpstreamTask};
use crate::pool::PoolContext;
use crate::tables::Tables;

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
        "{dir} holds no identity yet, and no join token is given: make one with `tombolo token create --role sidecar` (or `tombolo vm token`) and give it with --join-token-file"
    )]
    NotJoined { dir: String },
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
    #[error(
        "upstream {service}: cannot listen on {listen} ({source}): choose another address with --upstream"
    )]
    Upstream { service: String, listen: SocketAddr, source: std::io::Error },
    #[error(transparent)]
    Admin(#[from] AdminError),
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
    upstreams: Vec<(usize, TcpListener)>,
    admin: Admin,
    metrics: Metrics,
    configured: BlockReady,
    tasks: TaskGroup,
}

impl Sidecar {
    /// Joins if need be, burns an incarnation, binds every socket. Needs a one-thread runtime, which then runs it.
    pub async fn build(config: SidecarConfig) -> Result<Bound, BuildError> {
        config.check()?;
        let dir = config.state_dir.clone();
        // Cheap and local first: a taken port must not use up a join token.
        let mut upstreams = Vec::with_capacity(config.upstreams.len());
        for (index, upstream) in config.upstreams.iter().enumerate() {
            let listener =
                TcpListener::bind(upstream.listen).await.map_err(|source| BuildError::Upstream {
                    service: upstream.service.to_string(),
                    listen: upstream.listen,
                    source,
                })?;
            upstreams.push((index, listener));
        }
        let readiness = Readiness::new();
        let configured = readiness.block("configuration");
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let admin = Admin::bind(config.admin, registry, readiness).await?;

        let member = match (Member::load(&dir)?, &config.token) {
            (Some(member), _) => member,
            (None, Some(token)) => Member::join(token, &dir, Some(&config.name), config.bind).await?,
            (None, None) => return Err(BuildError::NotJoined { dir: dir.display().to_string() }),
        };
        if member.name() != config.name {
            return Err(BuildError::OtherName {
                dir: dir.display().to_string(),
                found: member.name().to_owned(),
                expected: config.name.clone(),
            });
        }
        let tasks = TaskGroup::new();
        let endpoint = member.burn_endpoint()?;
        let overlay = Overlay::bind(
            OverlayConfig {
                tag: member.tag(),
                endpoint,
                keys: member.lease().keys.clone(),
                kind: Kind::Endpoint,
                bind: config.bind,
                registers: config.registers(),
                learns: false,
                server: Some(ServerTls { mesh: tls::mesh_server_config(member.svid())?, join: None }),
                svid: Some(member.svid().clone()),
                limits: Limits {
                    bidi_streams: config.inbound.initial_streams,
                    max_udp_payload_bytes: config.max_udp_payload_bytes,
                    ..Limits::default()
                },
            },
            &tasks,
        )?;
        overlay.set_routes(Routes { zone: config.zone.clone(), ..member.first_routes() });
        tracing::info!(spiffe_id = %member.spiffe_id(), endpoint = %overlay.endpoint_id(),
            overlay = %overlay.local_addr(), admin = %admin.local_addr(), "sidecar bound");
        Ok(Bound { config, member, overlay, upstreams, admin, metrics, configured, tasks })
    }
}

impl Bound {
    pub fn overlay_addr(&self) -> SocketAddr {
        self.overlay.local_addr()
    }
    pub fn admin_addr(&self) -> SocketAddr {
        self.admin.local_addr()
    }
    /// Where the upstreams listen, in the order of the configuration.
    pub fn upstream_addrs(&self) -> Vec<SocketAddr> {
        self.upstreams.iter().filter_map(|(_, listener)| listener.local_addr().ok()).collect()
    }

    /// Runs until `shutdown` starts and the drain is over. A forced `shutdown` ends at once.
    pub async fn run(self, shutdown: Drain) -> Result<(), AdminError> {
        let Self { config, member, overlay, upstreams, admin, metrics, configured, tasks } = self;
        let (trigger, watcher) = drain::channel();
        let log = ShiftLog::open(member.dir());
        let (tables, received) = watch::channel(None);

        let enforcer = Enforcer::new(member.svid().clone());
        let mut control = ControlTask {
            hello: hello(&config, &overlay),
            member: member.clone(),
            overlay: overlay.clone(),
            tables,
            metrics: metrics.clone(),
            carry: Carry::default(),
            zone: config.zone.clone(),
            enforcer: enforcer.clone(),
        };
        control.restore();
        tasks.spawn("ready once configured", ready_once_configured(received.clone(), configured));
        tasks.spawn("control", control.run());
        member.spawn_renewal(vec![overlay.clone()], &tasks);

        let (admitted_sender, admitted) =
            watch::channel(Arc::new(Admission::nobody(member.cluster().clone())));
        let follow = follow_admission(received.clone(), admitted_sender, metrics.clone());
        tasks.spawn("admission", follow);
        let inbound = InboundTask::new(
            overlay.clone(),
            targets(&config.services, &metrics),
            admitted,
            config.inbound,
            metrics.clone(),
            watcher.clone(),
            tasks.clone(),
        );
        let inbound_slots = (inbound.slots(), config.inbound.max_app_connections);
        tasks.spawn("inbound", inbound.run());

        let pools = PoolContext {
            overlay: overlay.clone(),
            svid: member.svid().clone(),
            limits: config.pool,
            metrics: metrics.clone(),
            tasks: tasks.clone(),
        };
        let warm = config.upstreams.iter().map(|u| (u.service.clone(), u.warm)).collect();
        let router = Router::new(member.cluster().clone(), pools, warm, log.clone());
        let routes = router.routes();
        tasks.spawn("failover", router.run(received.clone()));

        let outbound = OutboundContext {
            routes: routes.clone(),
            idle: config.inbound.idle,
            slots: Arc::new(Semaphore::new(config.pool.max_app_connections)),
            metrics: metrics.clone(),
            drain: watcher.clone(),
            tasks: tasks.clone(),
        };
        for (index, listener) in upstreams {
            if let Some(upstream) = config.upstreams.get(index) {
                let task =
                    UpstreamTask::new(listener, upstream.service.clone(), upstream.port, outbound.clone());
                tasks.spawn("upstream", task.run());
            }
        }
        let mut verdicts = Vec::new();
        for service in &config.services {
            let Some(port) = service.ports.first() else { continue };
            let (verdict, seen) = watch::channel(None);
            verdicts.push((service.service.clone(), seen));
            let check = health::watch_service(service.health.clone(), port.target, verdict, watcher.clone());
            tasks.spawn("health", check);
        }
        let report = ReportTask {
            member,
            overlay: overlay.clone(),
            health: verdicts,
            routes: routes.clone(),
            log,
            tables: received,
            metrics,
            drain: watcher.clone(),
            enforcer,
        };
        let report = tasks.spawn("report", report.run());
        let slots = [inbound_slots, (Arc::clone(&outbound.slots), config.pool.max_app_connections)];
        drop((outbound, watcher));

        let serve = admin.run(shutdown.clone());
        let drained = async {
            shutdown.started().await;
            finish(&shutdown, trigger, report, &overlay, slots, config.drain).await;
        };
        tokio::pin!(serve, drained);
        let result = tokio::select! {
            served = &mut serve => match served {
                // The admin endpoint went with the drain; what is in flight goes on.
                Ok(()) => { drained.await; Ok(()) }
                Err(error) => Err(error),
            },
            () = &mut drained => Ok(()),
        };
        tasks.shutdown(FORCED_PATIENCE).await;
        result
    }
}

/// The drain: refuse what is new, wait for what is open, then cut.
async fn finish(
    shutdown: &Drain,
    trigger: DrainTrigger,
    report: tokio::task::JoinHandle<()>,
    overlay: &Overlay,
    slots: [(Arc<Semaphore>, usize); 2],
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

async fn ready_once_configured(mut tables: watch::Receiver<Option<Arc<Tables>>>, configured: BlockReady) {
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

fn targets(services: &[ServiceConfig], metrics: &Metrics) -> HashMap<Arc<str>, Arc<LocalTarget>> {
    let target = |service: &ServiceConfig| {
        let name = service.service.to_string();
        let ports = service.ports.iter().map(|port| (port.port, port.target)).collect();
        let metrics = metrics.service("inbound", &name);
        let service = service.service.clone();
        (Arc::from(name), Arc::new(LocalTarget { service, ports, metrics }))
    };
    services.iter().map(target).collect()
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
                protocol: "TCP".to_owned(),
            })
            .collect(),
        weight: service.weight,
    };
    let mut upstreams: Vec<_> = config.upstreams.iter().map(|u| u.service.to_string()).collect();
    upstreams.sort();
    upstreams.dedup();
    v1::SidecarHello {
        endpoint_addresses: vec![address],
        endpoints: vec![overlay.endpoint_id().value()],
        services: config.services.iter().map(service).collect(),
        upstreams,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        lease: None,
    }
}
