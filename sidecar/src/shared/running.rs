//! The sidecars of a shared one: which run, which are drained, and which are started when somebody calls.
//!
//! Owned by the shared sidecar's loop. One task per application that runs, which starts its sidecar again when that ends or
//! does not start. What is called meanwhile is held for [`HOLD`] at most, then reset.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tombolo_runtime::drain::{self, Drain, DrainTrigger};
use tombolo_runtime::readiness::BlockReady;
use tombolo_runtime::tasks::TaskGroup;

use super::config::{Application, MAX_APPLICATIONS, Start};
use super::front::{self, Call, Calls, Front, Handed};
use crate::config::SidecarConfig;
use crate::metrics::{Metrics, OwnByApplication};
use crate::role::{Among, Bound, BuildError, Sidecar};
use crate::udp::queue::Budget;

/// A sidecar that is started by a call joins within a second; a client waits for a connection about as long as this.
const HOLD: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// One that was started by a call ends when nothing was open for so long: longer than most jobs' intervals.
const IDLE: Duration = Duration::from_secs(3600);
/// Where there is no room, the one that has been idle for longest makes some, but not before this.
const IDLE_ENOUGH: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ApplicationLabels {
    pub application: String,
}

/// The sidecars that run, by application.
pub(super) struct Running {
    /// All of them, as told last.
    known: HashMap<String, Application>,
    applications: HashMap<String, Kept>,
    /// Those that are not wanted any more and have not ended. Their triggers are kept: one that is gone would cut them.
    ending: HashMap<String, Ending>,
    /// Overlay ports for those that are given none.
    ports: Option<RangeInclusive<u16>>,
    /// That there is no room was said.
    full: bool,
    context: Context,
}

struct Kept {
    trigger: DrainTrigger,
    task: JoinHandle<()>,
    port: Option<u16>,
    /// As last read: a start that is tried again goes by it.
    application: Arc<Mutex<Application>>,
}

struct Ending {
    trigger: DrainTrigger,
    task: JoinHandle<()>,
    port: Option<u16>,
}

#[derive(Clone)]
pub(super) struct Context {
    pub front: Front,
    pub calls: Calls,
    pub metrics: Metrics,
    pub own: OwnByApplication,
    /// What waits in flows of datagrams of all applications together.
    pub budget: Budget,
    pub up: Family<ApplicationLabels, Gauge>,
    /// An application could not be started since the configuration was read.
    pub failed: Arc<AtomicBool>,
    pub tasks: TaskGroup,
}

impl Running {
    pub fn new(ports: Option<RangeInclusive<u16>>, context: Context) -> Self {
        let (known, applications, ending) = (HashMap::new(), HashMap::new(), HashMap::new());
        Self { known, applications, ending, ports, full: false, context }
    }

    /// Starts what is new, ends what is gone, leaves the rest alone.
    pub fn follow(&mut self, applications: Vec<Application>, block: impl Fn(&str) -> Option<BlockReady>) {
        self.context.front.know(&applications);
        self.known = applications.into_iter().map(|new| (new.name().to_owned(), new)).collect();
        self.ending.retain(|_, ending| !ending.task.is_finished());
        let gone: Vec<String> = self
            .applications
            .iter()
            .filter(|(name, kept)| self.is_over(name, kept))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            self.end_one(&name);
        }
        let mut starting = Vec::new();
        for (name, new) in &self.known {
            match self.applications.get(name) {
                Some(kept) => *kept.application.lock().unwrap_or_else(PoisonError::into_inner) = new.clone(),
                None if new.start == Start::Now => starting.push(name.clone()),
                None => {}
            }
        }
        starting.sort_unstable();
        for name in starting {
            self.start(&name, block(&name));
        }
    }

    /// Whether it is not wanted any more, or not as it is.
    fn is_over(&self, name: &str, kept: &Kept) -> bool {
        let fingerprint = &kept.application.lock().unwrap_or_else(PoisonError::into_inner).fingerprint;
        self.known.get(name).is_none_or(|new| new.fingerprint != *fingerprint)
    }

    fn end_one(&mut self, name: &str) {
        let Some(Kept { trigger, task, port, .. }) = self.applications.remove(name) else { return };
        tracing::info!(application = name, "the application's sidecar ends");
        self.context.front.serve(name, None);
        trigger.start();
        self.ending.insert(name.to_owned(), Ending { trigger, task, port });
    }

    /// A call for an application whose sidecar did not run when it came; none: datagrams, which are sent again.
    pub fn wake(&mut self, name: &str, call: Option<Call>) {
        self.reap();
        if !self.applications.contains_key(name) {
            let sleeps = self.known.get(name).is_some_and(|known| known.start == Start::WhenCalled);
            if !sleeps || !self.start(name, None) {
                self.context.calls.count("not_running");
                return call.map(Call::refuse).unwrap_or_default();
            }
        }
        if let Some(call) = call {
            self.context.front.pass_on(name, call);
        }
    }

    /// Ends what nobody has called for long. About once a second.
    pub fn rest(&mut self) {
        self.reap();
        let idle = self.idle_for(IDLE);
        idle.iter().for_each(|(name, _)| self.end_one(name));
    }

    /// Those that only calls keep, and that have been idle for so long.
    fn idle_for(&self, least: Duration) -> Vec<(String, Duration)> {
        let kept = self
            .applications
            .keys()
            .filter(|name| self.known.get(*name).is_some_and(|known| known.start == Start::WhenCalled));
        let idle = kept.filter_map(|name| Some((name.clone(), self.context.front.idle(name)?)));
        idle.filter(|(_, idle)| *idle >= least).collect()
    }

    /// Forgets those that have ended by themselves.
    fn reap(&mut self) {
        self.ending.retain(|_, ending| !ending.task.is_finished());
        self.applications.retain(|_, kept| !kept.task.is_finished());
    }

    /// Whether there was room for it.
    fn start(&mut self, name: &str, block: Option<BlockReady>) -> bool {
        let Some(application) = self.known.get(name).cloned() else { return false };
        let port = match self.room(&application) {
            Ok(port) => port,
            Err(reason) => {
                if !std::mem::replace(&mut self.full, true) {
                    tracing::error!(
                        application = name,
                        "{reason}: its sidecar is not started, nor those of others"
                    );
                }
                return false;
            }
        };
        self.full = false;
        let (trigger, drain) = drain::channel();
        let application = Arc::new(Mutex::new(application));
        // Of the same name: it has the state directory and the socket until its drain is over.
        let before = self.ending.remove(name);
        let keeper = Keeper { name: name.to_owned(), application: Arc::clone(&application), port, drain };
        let context = self.context.clone();
        let (serving, handed) = front::hand_over();
        context.front.serve(name, Some(serving));
        let task = self.context.tasks.spawn("application", async move {
            if let Some(Ending { trigger: _trigger, task, .. }) = before {
                let _ = task.await;
            }
            context.keep(keeper, handed, block).await;
        });
        self.applications.insert(name.to_owned(), Kept { trigger, task, port, application });
        true
    }

    /// The overlay port of one more, if it is to be given one; who has been idle makes room.
    fn room(&mut self, application: &Application) -> Result<Option<u16>, String> {
        if self.applications.len() >= MAX_APPLICATIONS {
            let longest = self.idle_for(IDLE_ENOUGH).into_iter().max_by_key(|(_, idle)| *idle);
            let (idle, _) =
                longest.ok_or_else(|| format!("{MAX_APPLICATIONS} applications' sidecars run"))?;
            self.end_one(&idle);
        }
        let Some(ports) = self.ports.clone().filter(|_| application.sidecar.bind.port() == 0) else {
            return Ok(None);
        };
        match self.free_port(ports.clone()) {
            Some(port) => Ok(Some(port)),
            None => Err(format!("every overlay port of {ports:?} is taken")),
        }
    }

    fn free_port(&self, mut ports: RangeInclusive<u16>) -> Option<u16> {
        let kept = self.applications.values().filter_map(|kept| kept.port);
        let taken: std::collections::HashSet<u16> =
            kept.chain(self.ending.values().filter_map(|ending| ending.port)).collect();
        ports.find(|port| !taken.contains(port))
    }

    /// Every drain at once; each application's own patience bounds it.
    pub async fn end(self, shutdown: &Drain) {
        let wanted = self.applications.into_values().map(|kept| (kept.trigger, kept.task));
        let ending = self.ending.into_values().map(|ending| (ending.trigger, ending.task));
        let (triggers, tasks): (Vec<_>, Vec<_>) = wanted.chain(ending).unzip();
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

/// What an application's task is given.
struct Keeper {
    name: String,
    application: Arc<Mutex<Application>>,
    /// Of its overlay socket, where the configuration leaves it open.
    port: Option<u16>,
    drain: Drain,
}

impl Keeper {
    fn read(&self) -> (SidecarConfig, Start) {
        let application = self.application.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut sidecar, start) = (application.sidecar.clone(), application.start);
        if let Some(port) = self.port {
            sidecar.bind = SocketAddr::new(sidecar.bind.ip(), port);
        }
        (sidecar, start)
    }
}

impl Context {
    /// Runs an application's sidecar, and starts it again for as long as it is wanted.
    async fn keep(self, keeper: Keeper, mut handed: Handed, mut block: Option<BlockReady>) {
        let Keeper { name, drain, .. } = &keeper;
        let labels = ApplicationLabels { application: name.clone() };
        let mut pause = FIRST_PAUSE;
        while drain.phase() == drain::Phase::Serving {
            let (config, start) = keeper.read();
            match self.build(name, config, &mut handed.calls, block.take(), drain).await {
                None => break,
                Some(Ok((mut bound, held))) => {
                    bound.hand(held, std::mem::replace(&mut handed, front::hand_over().1));
                    self.up.get_or_create(&labels).set(1);
                    let ended = bound.run(drain.clone()).await;
                    self.up.get_or_create(&labels).set(0);
                    // Only its reports would say that it is connected no more.
                    self.own.forget(name);
                    if let Err(error) = ended {
                        tracing::error!(application = name, %error, "the application's sidecar has ended");
                    }
                    pause = FIRST_PAUSE;
                }
                Some(Err(error)) => {
                    self.up.get_or_create(&labels).set(0);
                    self.failed.store(true, Relaxed);
                    tracing::error!(application = name, error = %chain(&error), again_in = ?pause,
                        "the application's sidecar can't be started");
                }
            }
            if drain.phase() != drain::Phase::Serving {
                break;
            }
            self.front.serve(name, None);
            refuse_all(&mut handed.calls);
            tokio::select! {
                () = drain.started() => break,
                () = tokio::time::sleep(pause) => {}
            }
            if start == Start::WhenCalled {
                // The next call starts it again.
                break;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
            let (serving, next) = front::hand_over();
            handed = next;
            self.front.serve(name, Some(serving));
        }
        refuse_all(&mut handed.calls);
        self.up.remove(&labels);
        self.own.forget(name);
    }

    /// Starts a sidecar; holds what is called meanwhile, each for as long as [`HOLD`]. `None`: it is not wanted any more.
    async fn build(
        &self,
        name: &str,
        config: SidecarConfig,
        calls: &mut mpsc::Receiver<Call>,
        block: Option<BlockReady>,
        drain: &Drain,
    ) -> Option<Result<(Bound, VecDeque<Call>), BuildError>> {
        let mut held: VecDeque<Call> = VecDeque::new();
        let metrics = self.metrics.with(self.own.of(name));
        let among = Among { metrics, configured: block, budget: self.budget.clone() };
        let build = Sidecar::build_among(config, among);
        tokio::pin!(build);
        let built = loop {
            let oldest = held.front().map(|call| tokio::time::Instant::from_std(call.at + HOLD));
            tokio::select! {
                built = &mut build => break Some(built),
                () = drain.started() => break None,
                Some(call) = calls.recv(), if held.len() < front::HANDED => held.push_back(call),
                () = tokio::time::sleep_until(oldest.unwrap_or_else(tokio::time::Instant::now)), if oldest.is_some() => {
                    if let Some(call) = held.pop_front() {
                        self.calls.count("held_too_long");
                        call.refuse();
                    }
                }
            }
        };
        match built {
            Some(Ok(bound)) => Some(Ok((bound, held))),
            other => {
                held.into_iter().for_each(Call::refuse);
                other.map(|built| built.map(|bound| (bound, VecDeque::new())))
            }
        }
    }
}

fn refuse_all(calls: &mut mpsc::Receiver<Call>) {
    calls.close();
    while let Ok(call) = calls.try_recv() {
        call.refuse();
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
