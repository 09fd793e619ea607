//! The loop of a session with an API server: events and facts in, writes out. What it knows is in its tables; whatever
//! it is to do follows from them, so that it may begin anew at any time.

use std::collections::{BTreeSet, HashMap};
use std::pin::Pin;
use std::time::Duration;

use futures::future::OptionFuture;
use futures::stream::{BoxStream, FuturesUnordered, SelectAll};
use futures::{FutureExt, StreamExt};
use kube::core::DynamicObject;
use kube::runtime::watcher::{self, Event};
use tokio::sync::watch;
use tokio::time::Instant;
use tombolo_kubernetes::table::Place;
use tombolo_model::names::ServiceKey;
use tombolo_runtime::clock;

use super::client::ConnectError;
use super::desired;
use super::metrics::Metrics;
use super::plan::{Front, Plan, Surroundings, Write, plan};
use super::queue::Queue;
use super::tables::{Kind, Tables};
use super::trouble::{Trouble, unauthenticated};
use super::write::{Failure, Outcome, Writer};
use crate::core::{CoreGone, CoreHandle, Moment};
use crate::view::kubernetes::{Changed, Inputs, Services};
use crate::view::rfc3339_seconds;
use handing::Handing;

mod handing;

/// Services that are written at the same time: a few milliseconds each, and an API server's fair share.
const AT_ONCE: usize = 16;
/// Changes of the facts are looked at this often at most: at 300 changes/s each look is at six of them.
const PACE: Duration = Duration::from_millis(20);
/// Events of a watch that are taken over before the next look.
const BATCH: usize = 256;

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
    /// Services whose addresses may have changed.
    addresses: BTreeSet<ServiceKey>,
    /// Services to look at.
    queue: Queue,
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
        shared: Option<Place>,
    ) -> Self {
        Self {
            core,
            writer,
            leading,
            metrics,
            away: false,
            tables: Tables::new(shared),
            inputs: Inputs::default(),
            exports: BTreeSet::new(),
            addresses: BTreeSet::new(),
            queue: Queue::default(),
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
        // The core may be busy: what comes meanwhile is handed over together.
        let mut handing: Option<Handing> = None;
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
                handed = OptionFuture::from(handing.as_mut()), if handing.is_some() => {
                    handing = None;
                    if let Some(handed) = handed {
                        self.handed_over(handed)?;
                    }
                }
                changed = self.leading.changed() => {
                    changed.map_err(|_| SessionEnd::Lease)?;
                    if self.leading.borrow().is_some() {
                        self.tables.recount_targets();
                        self.everything();
                    }
                }
                () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            }
            if handing.is_none() {
                handing = self.hand_over();
            }
            self.write(&mut writing);
            self.metrics.leads.set(self.leads().into());
            self.metrics.waiting.set(i64::try_from(self.queue.waiting()).unwrap_or(i64::MAX));
        }
    }

    /// When a service is to be tried again.
    fn next_due(&self) -> Option<Instant> {
        self.queue.next_time().filter(|_| self.leads())
    }

    /// These are to be looked at.
    fn look_at(&mut self, services: impl IntoIterator<Item = ServiceKey>) {
        let now = Instant::now();
        for service in services {
            let not_before = self.trouble.get(&service).map(|trouble| trouble.not_before);
            self.queue.touch(service, not_before, now);
        }
    }

    fn leads(&self) -> bool {
        self.leading.borrow().is_some_and(|until| until > Instant::now())
    }

    /// Every service that is known anywhere is looked at.
    fn everything(&mut self) {
        let facts = self.core.facts();
        let Moment { monotonic, unix } = self.core.now();
        self.look_at(Services::new(&facts, monotonic, unix).exported());
        self.look_at(self.tables.known());
    }

    fn look_at_facts(&mut self) {
        let facts = self.core.facts();
        let Moment { monotonic, unix } = self.core.now();
        let now = Inputs::of(&facts, monotonic, unix);
        match now.since(&self.inputs) {
            Changed::All => self.everything(),
            Changed::Only(services) => self.look_at(services),
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
        self.addresses.extend(touched.exports.iter().chain(&touched.services).cloned());
        self.exports.extend(touched.exports);
        self.look_at(touched.services);
        if touched.fronts {
            self.everything();
        }
        if !touched.namespaces.is_empty() {
            let facts = self.core.facts();
            let Moment { monotonic, unix } = self.core.now();
            let services = Services::new(&facts, monotonic, unix);
            let inside = |service: &ServiceKey| touched.namespaces.contains(service.namespace.as_str());
            self.look_at(services.exported().filter(inside));
            self.look_at(self.tables.known().into_iter().filter(inside));
        }
    }

    /// Starts writing what is due.
    fn write(&mut self, writing: &mut Writing) {
        if !self.leads() || !self.told {
            return;
        }
        let now = Instant::now();
        let facts = self.core.facts();
        let Moment { monotonic, unix } = self.core.now();
        let services = Services::new(&facts, monotonic, unix);
        let clock = rfc3339_seconds(clock::unix_seconds());
        let addresses = self.tables.shared_addresses();
        while self.queue.busy() < AT_ONCE
            && let Some(service) = self.queue.next(now)
        {
            let shown = services.of(&service);
            let ports = shown.import.as_ref().map(|import| desired::numbered_ports(&import.merged));
            let numbers =
                self.tables.allot(&service, &ports.unwrap_or_default(), (monotonic, unix.as_secs()));
            let trouble = self.trouble.get(&service);
            let with = Surroundings {
                api_version: &self.writer.resources.api_version,
                cluster: &facts.cluster.name,
                now: &clock,
                refusal: trouble.and_then(|trouble| trouble.refusal.as_deref()),
                front: addresses.as_ref().map(|addresses| Front { numbers: &numbers, addresses }),
            };
            let Plan { writes, obstacle } = plan(&service, &shown, &self.tables, &with);
            if writes.is_empty() {
                let refused = with.refusal.is_some();
                if obstacle.is_none() {
                    self.trouble.remove(&service);
                }
                // What was refused is not wanted any more: its condition is to say so.
                if refused && obstacle.is_none() {
                    self.queue.touch(service, None, now);
                }
                continue;
            }
            self.start(service, writes, now, writing);
        }
    }

    fn start(&mut self, service: ServiceKey, writes: Vec<Write>, now: Instant, writing: &mut Writing) {
        let before = self.trouble.remove(&service);
        let mut trouble = before.unwrap_or_else(|| Trouble::none(now));
        if trouble.last == writes {
            // Written already, and not as it should be: somebody undoes it, or the server sees it otherwise.
            trouble.attempts += 1;
            trouble.not_before = now + Trouble::pause(trouble.attempts);
            if trouble.attempts == 3 {
                tracing::warn!(%service, "what is written to Kubernetes for this service does not stay as it was written");
            }
        }
        trouble.last.clone_from(&writes);
        let not_before = trouble.not_before;
        self.trouble.insert(service.clone(), trouble);
        if not_before > now {
            return self.queue.touch(service, Some(not_before), now);
        }
        self.queue.begin(service.clone());
        writing.push(Box::pin(self.writer.clone().perform(service, writes)));
    }

    fn done(&mut self, outcome: Outcome) -> Result<(), SessionEnd> {
        let Outcome { service, answers, failure } = outcome;
        self.metrics.step(failure.as_ref());
        for (kind, event) in answers {
            self.touch(kind, event);
        }
        let now = Instant::now();
        let Some(failure) = failure else {
            if let Some(trouble) = self.trouble.get_mut(&service) {
                trouble.refusal = None;
            }
            let not_before = self.trouble.get(&service).map(|trouble| trouble.not_before);
            self.queue.end(service, not_before, now);
            return Ok(());
        };
        let trouble = self.trouble.entry(service.clone()).or_insert_with(|| Trouble::none(now));
        trouble.attempts += 1;
        trouble.not_before = now + Trouble::pause(trouble.attempts);
        trouble.last.clear();
        self.queue.end(service.clone(), Some(trouble.not_before), now);
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
