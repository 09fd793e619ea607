//! One process that is the sidecar of many applications which have none of their own.
//!
//! ```text
//!  application 10.0.0.11 --TCP, UDP--> front 10.0.0.5:9080 --by the caller's address--> its sidecar ==overlay==> peer
//!  peer ==overlay==> its sidecar --TCP, UDP--> application 10.0.0.11:8080
//! ```
//! Each application keeps an identity, a key, an overlay socket and a lease of its own, as if its sidecar ran beside it:
//! what is shared is the process, its metrics and the front's listeners. [`front`] tells callers apart; [`config`] is what the
//! operator says, and may say anew while it runs. Tasks: one per application, which starts its sidecar again when that ends
//! or does not start, so that one application's trouble is nobody else's; one per listener; one that follows the
//! configuration.

mod calls;
pub mod config;
mod front;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::task::JoinHandle;
use tombolo_runtime::admin::{Admin, AdminError};
use tombolo_runtime::drain::{self, Drain, DrainTrigger};
use tombolo_runtime::readiness::{BlockReady, Readiness};
use tombolo_runtime::tasks::TaskGroup;

pub(crate) use self::calls::{CallsTask, Datagrams};
use self::config::{Application, SharedConfig, SharedConfigError};
use self::front::{Front, Fronts};
pub(crate) use self::front::{Handed, SharedPort};
use crate::config::SidecarConfig;
use crate::listening::ListenError;
use crate::metrics::{Metrics, OwnByApplication};
use crate::role::{Among, Sidecar};
use crate::udp::{self, queue::Budget};

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How often the configuration is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Of tasks that have nothing open any more.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// Why a shared sidecar did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    #[error(transparent)]
    Config(#[from] SharedConfigError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error("the front can't be served: {0}")]
    Front(std::io::Error),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ApplicationLabels {
    application: String,
}

/// Whose front is bound.
#[derive(Debug)]
pub struct Shared {
    config: SharedConfig,
    fronts: Fronts,
    admin: Admin,
    readiness: Readiness,
    metrics: Metrics,
    own: OwnByApplication,
    up: Family<ApplicationLabels, Gauge>,
}

/// The sidecars that run, by application.
struct Running {
    applications: HashMap<String, Kept>,
    /// Those that are not wanted any more and have not ended. Their triggers are kept: one that is gone would cut them.
    ending: HashMap<String, (DrainTrigger, JoinHandle<()>)>,
    context: Context,
}

struct Kept {
    trigger: DrainTrigger,
    task: JoinHandle<()>,
    fingerprint: String,
    /// As last read: a start that is tried again goes by it.
    sidecar: Arc<Mutex<SidecarConfig>>,
}

#[derive(Clone)]
struct Context {
    front: Front,
    metrics: Metrics,
    own: OwnByApplication,
    /// What waits in flows of datagrams of all applications together.
    budget: Budget,
    up: Family<ApplicationLabels, Gauge>,
    /// An application could not be started since the configuration was read.
    failed: Arc<AtomicBool>,
    tasks: TaskGroup,
}

impl Shared {
    /// Binds the front and the admin endpoint. Needs a one-thread runtime, which then runs it.
    pub async fn build(config: SharedConfig) -> Result<Self, SharedError> {
        config.check()?;
        let mut registry = Registry::default();
        let (metrics, own) = Metrics::register_shared(&mut registry);
        let shared = registry.sub_registry_with_prefix("tombolo_sidecar_shared");
        let up = Family::<ApplicationLabels, Gauge>::default();
        shared.register(
            "application_up",
            "Whether the application's sidecar runs (1) or is to be started again (0)",
            up.clone(),
        );
        let fronts = Fronts::bind(&config.upstreams, shared)?;
        let readiness = Readiness::new();
        let admin = Admin::bind(config.admin, registry, readiness.clone()).await?;
        tracing::info!(applications = config.applications.len(), admin = %admin.local_addr(), "shared sidecar bound");
        Ok(Self { config, fronts, admin, readiness, metrics, own, up })
    }

    /// Runs until `shutdown` starts and every application's drain is over. `again` reads the configuration anew: `None`
    /// while it has not changed, unless it is asked for all the same (what it names, such as a token, may have changed).
    pub async fn run(
        self,
        shutdown: Drain,
        mut again: impl FnMut(bool) -> Result<Option<SharedConfig>, String>,
    ) -> Result<(), SharedError> {
        let Self { config, fronts, admin, readiness, metrics, own, up } = self;
        let tasks = TaskGroup::new();
        let front = fronts.start(&metrics, &shutdown, &tasks).map_err(SharedError::Front)?;
        let failed = Arc::new(AtomicBool::new(false));
        let context = Context {
            front,
            metrics,
            own,
            budget: udp::shared_budget(),
            up,
            failed: Arc::clone(&failed),
            tasks: tasks.clone(),
        };
        let mut running = Running { applications: HashMap::new(), ending: HashMap::new(), context };
        running.follow(&config.applications, |name| Some(readiness.block(format!("application {name}"))));

        let (bound, upstreams) = (config.admin, config.upstreams);
        let follow = async {
            let mut refused = String::new();
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                let read = again(failed.swap(false, Relaxed)).and_then(|read| match read {
                    Some(config) => config.check().map(|()| Some(config)).map_err(|e| e.to_string()),
                    None => Ok(None),
                });
                match read {
                    Ok(Some(config)) => {
                        refused.clear();
                        if config.upstreams != upstreams || config.admin != bound {
                            tracing::warn!("what the front listens on has changed: that takes a restart");
                        }
                        running.follow(&config.applications, |_| None);
                    }
                    Ok(None) => {}
                    Err(error) if error == refused => {}
                    Err(error) => {
                        tracing::error!(%error, "the configuration can't be taken over; the last one stays");
                        refused = error;
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
        running.end(&shutdown).await;
        tasks.shutdown(END_PATIENCE).await;
        result
    }
}

impl Running {
    /// Starts what is new, ends what is gone, leaves the rest alone.
    fn follow(&mut self, applications: &[Application], block: impl Fn(&str) -> Option<BlockReady>) {
        let known: HashMap<&str, &Application> =
            applications.iter().map(|application| (application.name(), application)).collect();
        self.ending.retain(|_, (_, task)| !task.is_finished());
        let stays =
            |kept: &Kept, name: &str| known.get(name).is_some_and(|new| new.fingerprint == kept.fingerprint);
        let gone = self.applications.extract_if(|name, kept| !stays(kept, name));
        for (name, kept) in gone {
            tracing::info!(application = name, "the application's sidecar ends");
            kept.trigger.start();
            self.ending.insert(name, (kept.trigger, kept.task));
        }
        for application in applications {
            match self.applications.get(application.name()) {
                Some(kept) => {
                    *kept.sidecar.lock().unwrap_or_else(PoisonError::into_inner) =
                        application.sidecar.clone();
                }
                None => self.start(application, block(application.name())),
            }
        }
        self.context.front.know(applications);
    }

    fn start(&mut self, application: &Application, block: Option<BlockReady>) {
        let (trigger, drain) = drain::channel();
        let sidecar = Arc::new(Mutex::new(application.sidecar.clone()));
        // Of the same name: it has the state directory and the socket until its drain is over.
        let before = self.ending.remove(application.name());
        let (context, name, config) =
            (self.context.clone(), application.name().to_owned(), Arc::clone(&sidecar));
        let task = self.context.tasks.spawn("application", async move {
            if let Some((_trigger, before)) = before {
                let _ = before.await;
            }
            context.keep(name, config, drain, block).await;
        });
        let kept = Kept { trigger, task, fingerprint: application.fingerprint.clone(), sidecar };
        self.applications.insert(application.name().to_owned(), kept);
    }

    /// Every drain at once; each application's own patience bounds it.
    async fn end(self, shutdown: &Drain) {
        let wanted = self.applications.into_values().map(|kept| (kept.trigger, kept.task));
        let (triggers, tasks): (Vec<_>, Vec<_>) = wanted.chain(self.ending.into_values()).unzip();
        for trigger in &triggers {
            trigger.start();
        }
        let drained = async {
            for task in tasks {
                let _ = task.await;
            }
        };
        tokio::select! {
            () = drained => {}
            () = shutdown.forced() => triggers.iter().for_each(DrainTrigger::force),
        }
    }
}

impl Context {
    /// Runs an application's sidecar, and starts it again for as long as it is wanted.
    async fn keep(
        self,
        application: String,
        sidecar: Arc<Mutex<SidecarConfig>>,
        drain: Drain,
        mut block: Option<BlockReady>,
    ) {
        let labels = ApplicationLabels { application: application.clone() };
        let mut pause = FIRST_PAUSE;
        while drain.phase() == drain::Phase::Serving {
            let (serving, handed) = front::hand_over();
            let config = sidecar.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let metrics = self.metrics.with(self.own.of(&application));
            let among = Among { metrics, handed, configured: block.take(), budget: self.budget.clone() };
            match Sidecar::build_among(config, among).await {
                Ok(bound) => {
                    self.front.serve(&application, Some(serving));
                    self.up.get_or_create(&labels).set(1);
                    let ended = bound.run(drain.clone()).await;
                    self.up.get_or_create(&labels).set(0);
                    // Only its reports would say that it is connected no more.
                    self.own.forget(&application);
                    self.front.serve(&application, None);
                    if let Err(error) = ended {
                        tracing::error!(%application, %error, "the application's sidecar has ended");
                    }
                    pause = FIRST_PAUSE;
                }
                Err(error) => {
                    self.up.get_or_create(&labels).set(0);
                    self.failed.store(true, Relaxed);
                    tracing::error!(%application, error = %chain(&error), again_in = ?pause,
                        "the application's sidecar can't be started");
                }
            }
            tokio::select! {
                () = drain.started() => {}
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        self.up.remove(&labels);
        self.own.forget(&application);
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
