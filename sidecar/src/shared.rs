//! One process that is the sidecar of many applications which have none of their own.
//!
//! ```text
//!  application 10.0.0.11 --TCP, UDP--> front 10.0.0.5:9080 --by the caller's address--> its sidecar ==overlay==> peer
//!  peer ==overlay==> its sidecar --TCP, UDP--> application 10.0.0.11:8080
//! ```
//! Each application keeps an identity, a key, an overlay socket and a lease of its own, as if its sidecar ran beside it:
//! what is shared is the process, its metrics and the front's listeners. [`front`] tells callers apart; [`config`] is what a
//! [`Source`] says, and may say anew while it runs: an operator's file, or [`kubernetes`]. Tasks: one per application that
//! runs ([`running`]), one per listener, and the loop here, which follows the source.

mod calls;
pub mod config;
mod front;
mod keeping;
pub mod kubernetes;
mod running;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::mpsc;
use tombolo_runtime::admin::{Admin, AdminError};
use tombolo_runtime::drain::Drain;
use tombolo_runtime::readiness::Readiness;
use tombolo_runtime::tasks::TaskGroup;

pub(crate) use self::calls::{CallsTask, Datagrams};
use self::config::{Register, SharedConfig, SharedConfigError};
pub(crate) use self::front::{Call, Handed, OpenCall, SharedPort};
use self::front::{Calls, Front, Fronts, Waking};
use self::keeping::{ApplicationLabels, Context};
use self::running::Running;
use crate::listening::ListenError;
use crate::metrics::{Metrics, OwnByApplication};
use crate::udp;

/// Calls for applications that are to be started: a burst of new pods' first ones.
const WAKING: usize = 1024;
/// How often listeners are tried again, and idle applications looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Of tasks that have nothing open any more.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// Where the configuration comes from while it runs.
pub trait Source {
    /// Waits for the next one. `failed`: an application could not be started since the last; what a configuration names, such
    /// as a file with a token, may have changed without it. The future may be dropped at any time.
    fn next(&mut self, failed: &AtomicBool) -> impl Future<Output = Result<SharedConfig, String>>;
}

/// Why a shared sidecar did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    #[error(transparent)]
    Config(#[from] SharedConfigError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Admin(#[from] AdminError),
}

/// Whose front is bound.
#[derive(Debug)]
pub struct Shared {
    config: SharedConfig,
    front: Front,
    fronts: Fronts,
    calls: Calls,
    waking: mpsc::Receiver<Waking>,
    admin: Admin,
    readiness: Readiness,
    metrics: Metrics,
    own: OwnByApplication,
    up: Family<ApplicationLabels, Gauge>,
    tasks: TaskGroup,
}

impl Shared {
    /// Binds the front and the admin endpoint. Needs a one-thread runtime, which then runs it.
    pub async fn build(config: SharedConfig) -> Result<Self, SharedError> {
        let mut registry = Registry::default();
        let (metrics, own) = Metrics::register_shared(&mut registry);
        let shared = registry.sub_registry_with_prefix("tombolo_sidecar_shared");
        let up = Family::<ApplicationLabels, Gauge>::default();
        shared.register(
            "application_up",
            "Whether the application's sidecar runs (1) or is to be started again (0)",
            up.clone(),
        );
        let (sender, waking) = mpsc::channel(WAKING);
        let calls = Calls::register(shared, sender);
        if let Some(Register(register)) = &config.register {
            register(shared);
        }
        let tasks = TaskGroup::new();
        let front = Front::default();
        let fronts = Fronts::start(front.clone(), &config.upstreams, calls.clone(), &metrics, tasks.clone())?;
        let readiness = Readiness::new();
        let admin = Admin::bind(config.admin, registry, readiness.clone()).await?;
        tracing::info!(applications = config.applications.len(), admin = %admin.local_addr(), "shared sidecar bound");
        Ok(Self { config, front, fronts, calls, waking, admin, readiness, metrics, own, up, tasks })
    }

    /// Runs until `shutdown` starts and every application's drain is over.
    pub async fn run(self, shutdown: Drain, mut source: impl Source) -> Result<(), SharedError> {
        let Self { config, front, mut fronts, calls, mut waking, admin, readiness, metrics, own, up, tasks } =
            self;
        let failed = Arc::new(AtomicBool::new(false));
        let tasks_of_applications = tasks.clone();
        let context = Context {
            front,
            calls,
            metrics,
            own,
            budget: udp::shared_budget(),
            up,
            failed: Arc::clone(&failed),
            tasks: tasks_of_applications,
        };
        let mut running = Running::new(config.overlay_ports, context);
        let mut unsettled = config.incomplete.then(|| readiness.block("configuration"));
        running.follow(config.applications, |name| Some(readiness.block(format!("application {name}"))));

        let bound = config.admin;
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let follow = async {
            let mut refused = String::new();
            loop {
                tokio::select! {
                    read = source.next(&failed) => match read {
                        Ok(config) => {
                            refused.clear();
                            if config.admin != bound {
                                tracing::warn!("`admin` has changed: that takes a restart");
                            }
                            fronts.follow(&config.upstreams);
                            running.follow(config.applications, |name| {
                                unsettled.as_ref().map(|_| readiness.block(format!("application {name}")))
                            });
                            if !config.incomplete {
                                unsettled = None;
                            }
                        }
                        Err(error) if error == refused => {}
                        Err(error) => {
                            tracing::error!(%error, "the configuration can't be taken over; the last one stays");
                            refused = error;
                        }
                    },
                    Some(Waking { name, call }) = waking.recv() => running.wake(&name, call),
                    _ = look.tick() => {
                        fronts.tend();
                        running.rest();
                    }
                }
            }
        };
        let serve = admin.run(shutdown.clone());
        let result = tokio::select! {
            served = serve => served.map_err(SharedError::from),
            () = shutdown.started() => Ok(()),
            () = follow => Ok(()),
        };
        fronts.end().await;
        running.end(&shutdown).await;
        tasks.shutdown(END_PATIENCE).await;
        result
    }
}
