//! A gateway: built (everything bound, so that a port clash fails at start), then run until its drain is over.
//!
//! Owner of the data plane and of every task of the process. On SIGTERM: PROBE-ACKs say that it drains and the federator
//! is told, so that sidecars, peers and siblings use other replicas; it forwards on for the drain time, because packets
//! are under way and tables elsewhere are a moment behind; then it ends.

use std::net::SocketAddr;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tombolo_overlay::cid::Kind;
use tombolo_overlay::datagram::StartNumber;
use tombolo_overlay::lease::LeaseError;
use tombolo_overlay::member::{
    EntryPoints, JoinError, JoinOptions, Member, MemberError, PodRole, ServiceAccountToken,
};
use tombolo_overlay::revoking::Enforcer;
use tombolo_overlay::{BindError, GatewayHop, Limits, Overlay, OverlayConfig};
use tombolo_proto::v1;
use tombolo_runtime::admin::{Admin, AdminError};
use tombolo_runtime::clock;
use tombolo_runtime::drain::{self, Drain};
use tombolo_runtime::readiness::{BlockReady, Readiness};
use tombolo_runtime::tasks::TaskGroup;

use crate::client::{ControlTask, ReportTask, routes};
use crate::config::{ConfigError, GatewayConfig};
use crate::dataplane::{BoundDataPlane, DataPlane, DataPlaneConfig, DataPlaneError, DataPlaneHandle};
use crate::looped;
use crate::metrics::Metrics;

/// After the drain is forced, tasks see it at once; what does not is aborted.
const FORCED_PATIENCE: Duration = Duration::from_millis(500);
/// Readiness follows the data plane's first view within this.
const READY_POLL: Duration = Duration::from_millis(5);

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    DataPlane(#[from] DataPlaneError),
    #[error(transparent)]
    Member(#[from] MemberError),
    #[error(
        "{dir} holds no identity yet, and no join token is given: make one with `tombolo token create --role gateway` and give it with --join-token-file"
    )]
    NotJoined { dir: String },
    #[error(transparent)]
    Join(#[from] JoinError),
    #[error(
        "{dir} belongs to {found:?}, not to {expected:?}: give each gateway a state directory of its own"
    )]
    OtherName { dir: String, found: String, expected: String },
    #[error(transparent)]
    Lease(#[from] LeaseError),
    #[error(transparent)]
    Overlay(#[from] BindError),
    #[error(transparent)]
    Admin(#[from] AdminError),
}

/// Builds gateways.
#[derive(Debug)]
pub struct Gateway;

/// A gateway whose addresses are bound and known. It forwards nothing before it has a configuration.
#[derive(Debug)]
pub struct Bound {
    drain: Duration,
    start: StartNumber,
    hello: v1::GatewayHello,
    own_hop: GatewayHop,
    plane: DataPlane,
    member: Member,
    overlay: Overlay,
    admin: Admin,
    metrics: Metrics,
    ready: Ready,
    tasks: TaskGroup,
}

/// What a gateway has to have before it is ready.
#[derive(Debug)]
struct Ready {
    readiness: Readiness,
    configured: BlockReady,
    looped: BlockReady,
}

impl Gateway {
    /// Binds every socket, joins if need be, burns an incarnation.
    pub async fn build(config: GatewayConfig) -> Result<Bound, BuildError> {
        config.check()?;
        let dir = config.state_dir.clone();
        let start = StartNumber(rand::random());
        // Cheap and local first: a taken port must not use up a join token.
        let plane = BoundDataPlane::bind(DataPlaneConfig {
            border: config.border,
            inner: config.inner,
            workers: config.workers,
            start,
        })?
        .start()?;
        let readiness = Readiness::new();
        let configured = readiness.block("configuration");
        let looped = readiness.block("looped-back probe");
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry, plane.handle());
        let admin = Admin::bind(config.admin, registry, readiness.clone()).await?;

        let bind = SocketAddr::new(config.inner.ip(), 0);
        let member = match (Member::load(&dir)?, &config.token, &config.service_account_token) {
            (Some(member), _, _) => member,
            (None, Some(token), Some(file)) => {
                let options = JoinOptions { name: config.name.clone(), bind };
                let account = ServiceAccountToken::File(file.clone());
                Member::join_pod_as(token, (&account, PodRole::Gateway), &dir, &options).await?
            }
            (None, Some(token), None) => Member::join(token, &dir, Some(&config.name), bind).await?,
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
        let control = member.control();
        let towards = control.federators.iter().filter_map(|(_, address)| *address);
        let towards = towards.chain(control.gateways.iter().map(|hop| hop.address));
        let (border, inner) = config.advertised(plane.border_addr(), plane.inner_addr(), towards)?;
        let tasks = TaskGroup::new();
        let endpoint = member.burn_endpoint()?;
        let overlay = Overlay::bind(
            OverlayConfig {
                tag: member.tag(),
                endpoint,
                keys: member.lease().keys.clone(),
                kind: Kind::Endpoint,
                bind,
                registers: false,
                learns: false,
                server: None,
                svid: Some(member.svid().clone()),
                limits: Limits::default(),
            },
            &tasks,
        )?;
        let own_hop = GatewayHop { name: config.name.clone(), ..GatewayHop::at(own_inner(&plane)) };
        overlay.set_routes(routes(&member, &own_hop, None));
        let local = overlay.local_addr();
        // A socket on every address is reached where the inner one is.
        let reached =
            if local.ip().is_unspecified() { SocketAddr::new(inner.ip(), local.port()) } else { local };
        let hello = v1::GatewayHello {
            name: config.name.clone(),
            border_address: border.to_string(),
            inner_address: inner.to_string(),
            start_number: start.0,
            balanced: config.balanced,
            zone: config.zone.clone(),
            endpoint: overlay.endpoint_id().value(),
            endpoint_address: reached.to_string(),
            lease: None,
        };
        tracing::info!(spiffe_id = %member.spiffe_id(), border = %plane.border_addr(), inner = %plane.inner_addr(),
            advertised_border = %border, advertised_inner = %inner, workers = config.workers.get(),
            admin = %admin.local_addr(), "gateway bound");
        let drain = config.drain;
        let ready = Ready { readiness, configured, looped };
        Ok(Bound { drain, start, hello, own_hop, plane, member, overlay, admin, metrics, ready, tasks })
    }
}

/// Where this machine reaches the own inner socket.
fn own_inner(plane: &DataPlane) -> SocketAddr {
    looped::own(plane.inner_addr())
}

impl Bound {
    pub fn border_addr(&self) -> SocketAddr {
        self.plane.border_addr()
    }
    pub fn inner_addr(&self) -> SocketAddr {
        self.plane.inner_addr()
    }
    pub fn admin_addr(&self) -> SocketAddr {
        self.admin.local_addr()
    }

    /// Runs until `shutdown` starts and the drain is over. A forced `shutdown` ends at once.
    pub async fn run(self, shutdown: Drain) -> Result<(), AdminError> {
        let Self { drain, start, hello, own_hop, plane, member, overlay, admin, metrics, ready, tasks } =
            self;
        let Ready { readiness, configured, looped } = ready;
        let (trigger, watcher) = drain::channel();
        let (tables, received) = watch::channel(None);
        let control = ControlTask {
            hello,
            own_hop,
            member: member.clone(),
            overlay: overlay.clone(),
            plane: plane.handle(),
            tables,
            metrics,
            enforcer: Enforcer::new(member.svid().clone()),
        };
        control.restore();
        tasks.spawn(
            "ready once configured",
            ready_once_configured(received.clone(), plane.handle(), configured),
        );
        let sockets = [plane.border_addr(), plane.inner_addr()];
        tasks.spawn("looped-back probe", looped::watch(received.clone(), sockets, readiness, looped));
        tasks.spawn("control", control.run());
        member.spawn_renewal(vec![overlay.clone()], EntryPoints::default(), &tasks);
        let report = ReportTask {
            member,
            overlay: overlay.clone(),
            plane: plane.handle(),
            start,
            tables: received,
            drain: watcher,
        };
        tasks.spawn("report", report.run());

        let draining = plane.handle();
        let serve = admin.run(shutdown.clone());
        let drained = async {
            shutdown.started().await;
            tracing::info!(
                drain_ms = drain.as_millis() as u64,
                "draining: others are told, packets are still forwarded"
            );
            draining.drain();
            trigger.start();
            tokio::select! {
                () = tokio::time::sleep(drain) => {}
                () = shutdown.forced() => tracing::info!("ending at once"),
            }
            trigger.force();
            overlay.close().await;
        };
        tokio::pin!(serve, drained);
        let result = tokio::select! {
            served = &mut serve => match served {
                // The admin endpoint went with the drain; forwarding goes on.
                Ok(()) => { drained.await; Ok(()) }
                Err(error) => Err(error),
            },
            () = &mut drained => Ok(()),
        };
        tasks.shutdown(FORCED_PATIENCE).await;
        plane.stop();
        result
    }
}

async fn ready_once_configured(
    mut tables: watch::Receiver<Option<std::sync::Arc<crate::tables::Tables>>>,
    plane: DataPlaneHandle,
    configured: BlockReady,
) {
    let _ = tables.wait_for(Option::is_some).await;
    while !plane.is_configured() {
        tokio::time::sleep(READY_POLL).await;
    }
    drop(configured);
}
