//! The sidecars of a shared one: which run, which are drained, and which are started when somebody calls.
//!
//! Owned by the shared sidecar's loop. One task per application that runs ([`keeping`](super::keeping)). One that is called
//! and does not run is started where only calls start it; who has been idle for long ends, or makes room.

use std::collections::{HashMap, HashSet};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tombolo_runtime::drain::{self, Drain, DrainTrigger};
use tombolo_runtime::readiness::BlockReady;

use super::config::{Application, MAX_APPLICATIONS, Start};
use super::front::{self, Call};
use super::keeping::{Context, Keeper};

/// One that was started by a call ends when nothing was open for so long: longer than most jobs' intervals.
const IDLE: Duration = Duration::from_secs(3600);
/// Where there is no room, the one that has been idle for longest makes some, but not before this.
const IDLE_ENOUGH: Duration = Duration::from_secs(60);

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
        // Those that found no room before, or that ended as ones that are only called.
        let missing = self
            .known
            .iter()
            .filter(|(name, known)| known.start == Start::Now && !self.applications.contains_key(*name));
        let missing: Vec<String> = missing.map(|(name, _)| name.clone()).collect();
        for name in missing {
            self.start(&name, None);
        }
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
        let taken: HashSet<u16> = kept.chain(self.ending.values().filter_map(|ending| ending.port)).collect();
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
