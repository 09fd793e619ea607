//! The loop of a session with an API server: events and facts in, writes out. What it knows is in its tables; whatever
//! it is to do follows from them, so that it may begin anew at any time.

use std::collections::{BTreeSet, HashMap};
use std::pin::Pin;
use std::time::Duration;

use futures::stream::{BoxStream, FuturesUnordered, SelectAll};
use futures::{FutureExt, StreamExt};
use kube::core::DynamicObject;
use kube::runtime::watcher::{self, Event};
use tokio::sync::watch;
use tokio::time::Instant;
use tombolo_model::names::ServiceKey;
use tombolo_runtime::clock;

use super::client::ConnectError;
use super::metrics::Metrics;
use super::plan::{Plan, Surroundings, Write, plan};
use super::tables::{Kind, Tables};
use super::write::{Failure, Outcome, Writer};
use crate::core::kubernetes::KubernetesChanges;
use crate::core::{Core, CoreGone, CoreHandle, Moment};
use crate::view::kubernetes::{Changed, Inputs, Services};
use crate::view::rfc3339_seconds;

/// Services that are written at the same time: a few milliseconds each, and an API server's fair share.
const AT_ONCE: usize = 16;
/// Changes of the facts are looked at this often at most: at 300 changes/s each look is at six of them.
const PACE: Duration = Duration::from_millis(20);
/// Events of a watch that are taken over before the next look.
const BATCH: usize = 256;
/// What was refused or did not settle is tried again after 1 s, then twice as long, up to this.
const SLOWEST: Duration = Duration::from_secs(60);

/// Why a session with an API server ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionEnd {
    #[error(transparent)]
    Gone(#[from] CoreGone),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the API server does not know this federator: {0}")]
    Unauthenticated(String),
    #[error("the lease's task has ended")]
    Lease,
}

/// What a watch brings.
pub(super) type Watched = (Kind, Result<Event<DynamicObject>, watcher::Error>);

/// A service whose writes did not lead where they should.
#[derive(Clone, Debug)]
struct Trouble {
    attempts: u32,
    not_before: Instant,
    /// What was written last: the same again means that something undoes it.
    last: Vec<Write>,
    refusal: Option<String>,
}

impl Trouble {
    fn pause(attempts: u32) -> Duration {
        Duration::from_secs(1 << attempts.min(6)).min(SLOWEST)
    }
}

pub(super) struct Driver {
    core: CoreHandle,
    writer: Writer,
    leading: watch::Receiver<Option<Instant>>,
    metrics: Metrics,
    /// Watches have failed since one brought anything.
    away: bool,
    tables: Tables,
    /// Of the facts, as they were last looked at.
    inputs: Inputs,
    /// Exports to hand to the core.
    exports: BTreeSet<ServiceKey>,
    /// Services to look at.
    dirty: BTreeSet<ServiceKey>,
    /// Services that are being written.
    busy: BTreeSet<ServiceKey>,
    trouble: HashMap<ServiceKey, Trouble>,
    /// The core knows every export there is.
    told: bool,
}

type Writing = FuturesUnordered<Pin<Box<dyn Future<Output = Outcome> + Send>>>;

impl Driver {
    pub fn new(
        core: CoreHandle,
        writer: Writer,
        leading: watch::Receiver<Option<Instant>>,
        metrics: Metrics,
    ) -> Self {
        Self {
            core,
            writer,
            leading,
            metrics,
            away: false,
            tables: Tables::default(),
            inputs: Inputs::default(),
            exports: BTreeSet::new(),
            dirty: BTreeSet::new(),
            busy: BTreeSet::new(),
            trouble: HashMap::new(),
            told: false,
        }
    }

    /// Until the session ends.
    pub async fn run(
        mut self,
        mut watched: SelectAll<BoxStream<'static, Watched>>,
    ) -> Result<std::convert::Infallible, SessionEnd> {
        let mut facts = self.core.watch();
        facts.mark_changed();
        let mut writing: Writing = FuturesUnordered::new();
        let mut looked = Instant::now();
        let mut news = false;
        loop {
            let next = self.next_due();
            tokio::select! {
                event = watched.next() => {
                    if let Some((kind, event)) = event {
                        self.take(kind, event)?;
                    }
                    for _ in 1..BATCH {
                        let Some(Some((kind, event))) = watched.next().now_or_never() else { break };
                        self.take(kind, event)?;
                    }
                }
                changed = facts.changed(), if !news => {
                    changed.map_err(|_| CoreGone)?;
                    news = true;
                }
                () = tokio::time::sleep_until(looked + PACE), if news => {
                    news = false;
                    looked = Instant::now();
                    self.look_at_facts();
                }
                Some(outcome) = writing.next(), if !writing.is_empty() => self.done(outcome)?,
                changed = self.leading.changed() => {
                    changed.map_err(|_| SessionEnd::Lease)?;
                    if self.leading.borrow().is_some() {
                        self.everything();
                    }
                }
                () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            }
            self.hand_over().await?;
            self.write(&mut writing);
            self.metrics.leads.set(self.leads().into());
            self.metrics.waiting.set(i64::try_from(self.dirty.len()).unwrap_or(i64::MAX));
        }
    }

    /// When a service is to be tried again.
    fn next_due(&self) -> Option<Instant> {
        if !self.leads() {
            return None;
        }
        let waits = |service: &&ServiceKey| !self.busy.contains(*service);
        self.dirty
            .iter()
            .filter(waits)
            .filter_map(|service| Some(self.trouble.get(service)?.not_before))
            .min()
    }

    fn leads(&self) -> bool {
        self.leading.borrow().is_some_and(|until| until > Instant::now())
    }

    /// Every service that is known anywhere is looked at.
    fn everything(&mut self) {
        let facts = self.core.facts();
        let Moment { monotonic, unix } = self.core.now();
        self.dirty.extend(Services::new(&facts, monotonic, unix).exported());
        self.dirty.extend(self.tables.known());
    }

    fn look_at_facts(&mut self) {
        let facts = self.core.facts();
        let Moment { monotonic, unix } = self.core.now();
        let now = Inputs::of(&facts, monotonic, unix);
        match now.since(&self.inputs) {
            Changed::All => self.everything(),
            Changed::Only(services) => self.dirty.extend(services),
        }
        self.inputs = now;
    }

    fn take(
        &mut self,
        kind: Kind,
        event: Result<Event<DynamicObject>, watcher::Error>,
    ) -> Result<(), SessionEnd> {
        let event = match event {
            Ok(event) => {
                // Init is said before anything was asked.
                if self.away && !matches!(event, Event::Init) {
                    self.away = false;
                    tracing::info!("the API server answers again");
                }
                event
            }
            Err(error) => {
                self.metrics.watch_errors.inc();
                if !std::mem::replace(&mut self.away, true) {
                    tracing::warn!(kind = kind.as_str(), %error,
                        "the API server can't be watched now; what is known stays, and it is tried again");
                }
                if let Some(reason) = unauthenticated(&error) {
                    return Err(SessionEnd::Unauthenticated(reason));
                }
                return Ok(());
            }
        };
        self.touch(kind, event);
        Ok(())
    }

    fn touch(&mut self, kind: Kind, event: Event<DynamicObject>) {
        let touched = self.tables.apply(kind, event);
        self.exports.extend(touched.exports);
        self.dirty.extend(touched.services);
        if !touched.namespaces.is_empty() {
            let facts = self.core.facts();
            let Moment { monotonic, unix } = self.core.now();
            let services = Services::new(&facts, monotonic, unix);
            let inside = |service: &ServiceKey| touched.namespaces.contains(service.namespace.as_str());
            self.dirty.extend(services.exported().filter(inside));
            self.dirty.extend(self.tables.known().into_iter().filter(inside));
        }
    }

    /// Tells the core which exports there are, once all are known, and then what changes.
    async fn hand_over(&mut self) -> Result<(), SessionEnd> {
        if !self.tables.is_synced() || (self.told && self.exports.is_empty()) {
            return Ok(());
        }
        let complete = !self.told;
        if complete {
            self.exports.extend(self.tables.exported());
        }
        let services = std::mem::take(&mut self.exports);
        let changes: KubernetesChanges =
            services.iter().map(|service| (service.clone(), self.tables.export(service))).collect();
        let handed = move |core: &mut Core, moment| core.set_kubernetes_exports(changes, complete, moment);
        match self.core.call(handed).await? {
            Ok(()) => self.told = true,
            Err(error) => {
                tracing::warn!(%error, "exports of Kubernetes can't be stored now");
                self.exports = services;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        if complete {
            self.everything();
        }
        Ok(())
    }

    /// Starts writing what is due.
    fn write(&mut self, writing: &mut Writing) {
        if !self.leads() || !self.told || self.dirty.is_empty() || self.busy.len() >= AT_ONCE {
            return;
        }
        let now = Instant::now();
        let facts = self.core.facts();
        let Moment { monotonic, unix } = self.core.now();
        let services = Services::new(&facts, monotonic, unix);
        let clock = rfc3339_seconds(clock::unix_seconds());
        let due = |service: &&ServiceKey| {
            !self.busy.contains(*service) && self.trouble.get(*service).is_none_or(|t| t.not_before <= now)
        };
        let due: Vec<ServiceKey> = self.dirty.iter().filter(due).cloned().collect();
        for service in due {
            if self.busy.len() >= AT_ONCE {
                break;
            }
            self.dirty.remove(&service);
            let trouble = self.trouble.get(&service);
            let with = Surroundings {
                api_version: &self.writer.resources.api_version,
                cluster: &facts.cluster.name,
                now: &clock,
                refusal: trouble.and_then(|trouble| trouble.refusal.as_deref()),
            };
            let Plan { writes, obstacle } = plan(&service, &services.of(&service), &self.tables, &with);
            if writes.is_empty() {
                if obstacle.is_none() {
                    self.trouble.remove(&service);
                }
                continue;
            }
            if let Some(trouble) = self.trouble.get_mut(&service)
                && trouble.last == writes
            {
                // Written already, and not as it should be: somebody undoes it, or the server sees it otherwise.
                trouble.attempts += 1;
                trouble.not_before = now + Trouble::pause(trouble.attempts);
                if trouble.attempts == 3 {
                    tracing::warn!(%service, "what is written to Kubernetes for this service does not stay as it was written");
                }
            }
            let attempts = self.trouble.get(&service).map_or(0, |trouble| trouble.attempts);
            let refusal = self.trouble.get(&service).and_then(|trouble| trouble.refusal.clone());
            let not_before = self.trouble.get(&service).map_or(now, |trouble| trouble.not_before);
            let last = writes.clone();
            self.trouble.insert(service.clone(), Trouble { attempts, not_before, last, refusal });
            if not_before > now {
                self.dirty.insert(service);
                continue;
            }
            self.busy.insert(service.clone());
            writing.push(Box::pin(self.writer.clone().perform(service, writes)));
        }
    }

    fn done(&mut self, outcome: Outcome) -> Result<(), SessionEnd> {
        let Outcome { service, answers, failure } = outcome;
        self.metrics.step(failure.as_ref());
        self.busy.remove(&service);
        self.dirty.insert(service.clone());
        for (kind, event) in answers {
            self.touch(kind, event);
        }
        let Some(failure) = failure else {
            if let Some(trouble) = self.trouble.get_mut(&service) {
                trouble.refusal = None;
            }
            return Ok(());
        };
        let now = Instant::now();
        let trouble = self.trouble.entry(service.clone()).or_insert_with(|| Trouble {
            attempts: 0,
            not_before: now,
            last: Vec::new(),
            refusal: None,
        });
        trouble.attempts += 1;
        trouble.not_before = now + Trouble::pause(trouble.attempts);
        trouble.last.clear();
        match failure {
            Failure::Unauthenticated(reason) => return Err(SessionEnd::Unauthenticated(reason)),
            Failure::Away(reason) => {
                tracing::debug!(%service, reason, "the API server can't be written to now");
            }
            Failure::Refused(reason) => {
                if trouble.refusal.as_ref() != Some(&reason) {
                    tracing::warn!(%service, reason, "the API server refuses what is written for this service");
                }
                trouble.refusal = Some(reason);
            }
        }
        Ok(())
    }
}

pub(super) fn unauthenticated(error: &watcher::Error) -> Option<String> {
    let error = match error {
        watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error) => error,
        watcher::Error::WatchError(status) => {
            return (status.code == 401).then(|| status.message.clone());
        }
        _ => return None,
    };
    match error {
        kube::Error::Api(status) if status.code == 401 => Some(status.message.clone()),
        _ => None,
    }
}
