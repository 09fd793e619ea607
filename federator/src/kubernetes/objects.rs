//! Tombolo's own kinds in Kubernetes (`--kubernetes-objects`): what their objects say goes the way of `tombolo apply`, and
//! what `tombolo describe` shows is written back as their status.
//!
//! One task. It watches every own kind ([`rows`]), hands each object to the core ([`crate::core::objects`]), which validates
//! and stores it as Kubernetes', and writes statuses ([`plan`]) and Events while this federator leads. Objects stay in the
//! store while the API server is away. Without the definitions it waits, and says so once.

mod plan;
mod rows;

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::time::Duration;

use futures::stream::{BoxStream, SelectAll};
use futures::{FutureExt, StreamExt};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::{Patch, PatchParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::WatchStreamExt;
use kube::runtime::events::Recorder;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::Instant;
use tombolo_kubernetes::pauses::Pauses;
use tombolo_model::resource::{KindInfo, ObjectKey};
use tombolo_runtime::clock;

use super::client::LONGEST;
use super::crds::own;
use super::driver::SessionEnd;
use super::labels::TOMBOLO;
use super::metrics::Metrics;
use super::trouble::unauthenticated;
use super::write::{Failure, judge, tell};
use crate::core::{Core, CoreError, CoreHandle, Moment};
use crate::view::{self, rfc3339_seconds};
use plan::{Shown, Write, Written, plan};
use rows::{Rows, Task};

/// Without the definitions they are looked for again; one request each time.
const AGAIN: Duration = Duration::from_secs(10);
/// Facts change with every heartbeat; what they come to in a status is looked at this often.
const PACE: Duration = Duration::from_millis(250);
/// Messages that are due to be written anew are looked for although nothing happens; and what was not accepted is tried again.
const LOOKED: Duration = Duration::from_secs(60);
/// Events of watches that are taken over before the next look.
const BATCH: usize = 256;
/// The store or the core can't take an object now.
const RETRY: Duration = Duration::from_secs(2);

type Watched = (&'static KindInfo, Result<Event<DynamicObject>, watcher::Error>);

/// Keeps our own kinds for one session with an API server.
pub(super) struct ObjectsTask {
    pub core: CoreHandle,
    pub client: Client,
    pub recorder: Recorder,
    pub leading: watch::Receiver<Option<Instant>>,
    pub metrics: Metrics,
}

fn resource(info: &KindInfo) -> ApiResource {
    ApiResource::from_gvk_with_plural(
        &GroupVersionKind::gvk(own::GROUP, own::VERSION, info.kind),
        info.plural,
    )
}

impl ObjectsTask {
    /// Until the session ends.
    pub async fn run(self) -> Result<Infallible, SessionEnd> {
        self.wait_for_definitions().await?;
        tracing::info!("objects of Kubernetes of group {} are kept", own::GROUP);
        let stream = |info: &'static KindInfo| {
            let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource(info));
            let events = watcher(api, watcher::Config::default()).backoff(Pauses::default());
            events.map(move |event| (info, event)).boxed()
        };
        let watched = futures::stream::select_all(own::kinds().map(stream));
        let now = Instant::now();
        let driver = Driver {
            task: self,
            rows: Rows::default(),
            tasks: BTreeMap::new(),
            again: BTreeMap::new(),
            written: HashMap::new(),
            start: now,
            not_before: now,
            away: false,
            complete: Vec::new(),
        };
        driver.run(watched).await
    }

    async fn wait_for_definitions(&self) -> Result<(), SessionEnd> {
        let mut said = false;
        loop {
            let group_version = format!("{}/{}", own::GROUP, own::VERSION);
            let asked = tokio::time::timeout(LONGEST, self.client.list_api_group_resources(&group_version));
            let served = match asked.await.map_err(|_| super::client::ConnectError::Late)? {
                Ok(served) => served.resources,
                Err(kube::Error::Api(status)) if status.code == 404 => Vec::new(),
                Err(error) => return Err(super::client::ConnectError::from(error).into()),
            };
            let has = |info: &&KindInfo| served.iter().any(|resource| resource.name == info.plural);
            let missing: Vec<&str> = own::kinds().filter(|info| !has(info)).map(|info| info.kind).collect();
            if missing.is_empty() {
                return Ok(());
            }
            if !std::mem::replace(&mut said, true) {
                tracing::warn!(
                    missing = missing.join(", "),
                    "the API server does not serve all of {group_version}: install the CRDs with `tombolo kube crds | kubectl apply --server-side -f -`; looked for again every {} s",
                    AGAIN.as_secs()
                );
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
}

struct Driver {
    task: ObjectsTask,
    rows: Rows,
    /// What the core has still to be told.
    tasks: BTreeMap<ObjectKey, Task>,
    /// What it did not accept: there may be room, say, after others have gone.
    again: BTreeMap<ObjectKey, Task>,
    written: HashMap<ObjectKey, Written>,
    start: Instant,
    /// The API server or the core can't be asked before.
    not_before: Instant,
    /// Watches have failed since one brought anything.
    away: bool,
    /// Kinds of which the core is to forget what is not there any more.
    complete: Vec<&'static str>,
}

impl Driver {
    async fn run(
        mut self,
        mut watched: SelectAll<BoxStream<'static, Watched>>,
    ) -> Result<Infallible, SessionEnd> {
        let mut facts = self.task.core.watch();
        let mut leading = self.task.leading.clone();
        let mut looked = Instant::now();
        let mut retry = tokio::time::interval(LOOKED);
        // Whether anything has happened that a status may show.
        let mut news = true;
        loop {
            tokio::select! {
                event = watched.next() => {
                    news = true;
                    if let Some((info, event)) = event {
                        self.take(info, event)?;
                    }
                    for _ in 1..BATCH {
                        let Some(Some((info, event))) = watched.next().now_or_never() else { break };
                        self.take(info, event)?;
                    }
                }
                changed = facts.changed(), if !news => {
                    changed.map_err(|_| crate::core::CoreGone)?;
                    news = true;
                }
                changed = leading.changed() => {
                    changed.map_err(|_| SessionEnd::Lease)?;
                    news = true;
                }
                () = tokio::time::sleep_until((looked + PACE).max(self.not_before)), if news => {
                    looked = Instant::now();
                    news = self.write().await?;
                }
                () = tokio::time::sleep_until(looked + LOOKED) => news = true,
                _ = retry.tick() => {
                    for (key, task) in std::mem::take(&mut self.again) {
                        // What has changed since is no longer wanted, also where the change does not read.
                        let now = self.rows.get(&key).map(|row| &row.kept);
                        if matches!(&task, Task::Apply(_, kept) if now != Some(kept)) {
                            continue;
                        }
                        self.tasks.entry(key).or_insert(task);
                    }
                }
            }
            self.hand_over().await?;
        }
    }

    fn take(
        &mut self,
        info: &'static KindInfo,
        event: Result<Event<DynamicObject>, watcher::Error>,
    ) -> Result<(), SessionEnd> {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                self.task.metrics.watch_errors.inc();
                if !std::mem::replace(&mut self.away, true) {
                    tracing::warn!(kind = info.kind, %error,
                        "objects of Kubernetes can't be watched now; what is known stays, and it is tried again");
                }
                return match unauthenticated(&error) {
                    Some(reason) => Err(SessionEnd::Unauthenticated(reason)),
                    None => Ok(()),
                };
            }
        };
        // Init is said before anything was asked.
        if self.away && !matches!(event, Event::Init) {
            self.away = false;
            tracing::info!("objects of Kubernetes are watched again");
        }
        if matches!(event, Event::InitDone) {
            self.complete.push(info.kind);
        }
        let tasks = self.rows.apply(info, event);
        self.tasks.extend(tasks);
        Ok(())
    }

    /// Tells the core what has changed, in the order of kinds and names.
    async fn hand_over(&mut self) -> Result<(), SessionEnd> {
        if Instant::now() < self.not_before {
            return Ok(());
        }
        for kind in std::mem::take(&mut self.complete) {
            // Deleted while nobody watched, perhaps while this federator was not running.
            let facts = self.task.core.facts();
            let kept = facts.objects.iter().filter(|(key, stored)| key.kind == kind && stored.in_kubernetes);
            let gone = kept.filter(|(key, _)| self.rows.get(key).is_none());
            self.tasks.extend(gone.map(|(key, _)| (key.clone(), Task::Delete)));
        }
        while let Some((key, task)) = self.tasks.pop_first() {
            self.again.remove(&key);
            let (about, again) = (key.clone(), task.clone());
            let told =
                self.task.core.attempt(move |core, moment| tell_core(core, &about, task, moment)).await;
            match told {
                Ok(()) => self.rows.handed_over(&key, None),
                Err(CoreError::Gone) => return Err(crate::core::CoreGone.into()),
                Err(CoreError::Store(error)) => {
                    tracing::warn!(%error, object = %key, "an object of Kubernetes can't be stored now; tried again");
                    self.tasks.insert(key, again);
                    self.not_before = Instant::now() + RETRY;
                    return Ok(());
                }
                Err(error) => {
                    let refused = error.to_string();
                    if self.rows.get(&key).is_some_and(|row| row.refused.as_ref() != Some(&refused)) {
                        tracing::warn!(%error, object = %key, "an object of Kubernetes is not accepted");
                    }
                    self.rows.handed_over(&key, Some(refused));
                    self.again.insert(key, again);
                }
            }
        }
        self.task.metrics.refused_objects.set(i64::try_from(self.rows.refused()).unwrap_or(i64::MAX));
        Ok(())
    }

    fn leads(&self) -> bool {
        self.task.leading.borrow().is_some_and(|until| until > Instant::now())
    }

    /// Writes the statuses that are due; whether there may be more.
    async fn write(&mut self) -> Result<bool, SessionEnd> {
        self.written.retain(|key, _| self.rows.get(key).is_some());
        if !self.leads() {
            return Ok(false);
        }
        let clock = rfc3339_seconds(clock::unix_seconds());
        let writes = plan(&self.rows, &self.shown(), &self.written, (self.start, Instant::now()), &clock);
        let more = !writes.is_empty();
        for Write { key, document, changed } in writes {
            // Each one anew: a write may have taken as long as the lease.
            if !self.leads() {
                return Ok(false);
            }
            let failure = self.patch(&key, &document, &changed).await;
            self.task.metrics.status_write(failure.as_ref());
            let failures = self.written.get(&key).map_or(0, |written| written.failures);
            let failures = if failure.is_some() { failures.saturating_add(1) } else { 0 };
            self.written.insert(key.clone(), Written { at: Instant::now(), failures });
            match failure {
                None => {}
                Some(Failure::Unauthenticated(reason)) => return Err(SessionEnd::Unauthenticated(reason)),
                Some(Failure::Away(reason)) => {
                    tracing::debug!(object = %key, reason, "a status can't be written now");
                    self.not_before = Instant::now() + RETRY;
                    return Ok(true);
                }
                Some(Failure::Refused(reason)) => {
                    tracing::warn!(object = %key, reason, "the API server refuses a status");
                }
            }
        }
        Ok(more)
    }

    /// What the core's objects are to show.
    fn shown(&self) -> HashMap<ObjectKey, Shown> {
        let facts = self.task.core.facts();
        let Moment { monotonic, unix } = self.task.core.now();
        let all = view::kept_in_kubernetes(&facts, monotonic, unix);
        all.into_iter()
            .filter_map(|(key, (conditions, status))| {
                let stored = facts.objects.get(&key)?;
                let shown =
                    Shown { uid: stored.uid.clone(), generation: stored.generation, conditions, status };
                Some((key, shown))
            })
            .collect()
    }

    async fn patch(
        &mut self,
        key: &ObjectKey,
        document: &serde_json::Value,
        changed: &[tombolo_model::resource::Condition],
    ) -> Option<Failure> {
        let info = own::kinds().find(|info| info.kind == key.kind)?;
        let api: Api<DynamicObject> = match key.namespace.as_str() {
            "" => Api::all_with(self.task.client.clone(), &resource(info)),
            namespace => Api::namespaced_with(self.task.client.clone(), namespace, &resource(info)),
        };
        let ours = PatchParams::apply(TOMBOLO).force();
        let patch = Patch::Apply(document);
        let asked = tokio::time::timeout(LONGEST, api.patch_status(&key.name, &ours, &patch)).await;
        match asked {
            Err(_) => Some(Failure::Away(format!("no answer within {} s", LONGEST.as_secs()))),
            // It is gone, or another has its name: the watch says so.
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => None,
            Ok(Err(error)) => Some(judge(&error)),
            Ok(Ok(object)) => {
                let reference = ObjectReference {
                    api_version: Some(format!("{}/{}", own::GROUP, own::VERSION)),
                    kind: Some(key.kind.to_owned()),
                    name: Some(key.name.clone()),
                    namespace: Some(key.namespace.clone()).filter(|namespace| !namespace.is_empty()),
                    uid: object.metadata.uid.clone(),
                    ..ObjectReference::default()
                };
                tell(&self.task.recorder, &reference, changed).await;
                let tasks = self.rows.apply(info, Event::Apply(object));
                self.tasks.extend(tasks);
                None
            }
        }
    }
}

/// One object's news.
fn tell_core(core: &mut Core, key: &ObjectKey, task: Task, moment: Moment) -> Result<(), CoreError> {
    match task {
        Task::Apply(object, kept) => core.apply_of_kubernetes(*object, kept, moment).map(drop),
        Task::Delete => core.delete_of_kubernetes(key, moment).map(drop),
    }
}
