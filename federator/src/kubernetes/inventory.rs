//! The cluster inventory of SIG Multicluster in Kubernetes, where its definitions are installed: `ClusterProperty` objects are
//! properties of this cluster, beside those of `--property`, and its name and its cluster set are published as two of them;
//! each linked cluster has a `ClusterProfile` in the federator's namespace.
//!
//! One task. What is to be written is [`desired`]'s, and pure; the leader writes it. What has one of these names and is not
//! labelled as ours is somebody else's: it is left alone, and said.

mod desired;
mod tables;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;
use tombolo_kubernetes::pauses::Pauses;
use tombolo_runtime::clock;

use super::client::{ConnectError, LONGEST, served_groups};
use super::driver::SessionEnd;
use super::labels::TOMBOLO;
use super::trouble::unauthenticated;
use super::write::{Failure, judge};
use crate::core::{CoreGone, CoreHandle, Moment};
use crate::view::rfc3339_seconds;
use desired::{CLUSTER_ID, CLUSTER_SET, VERSION, Write};
use tables::{Kind, Tables};

/// Definitions may be installed later: they are looked for this often, by three requests at most.
const DISCOVERED: Duration = Duration::from_secs(60);
/// Facts change with every heartbeat.
const PACE: Duration = Duration::from_secs(1);
/// Without an answer.
const AGAIN: Duration = Duration::from_secs(5);

/// Keeps the inventory for one session with an API server.
pub(super) struct InventoryTask {
    pub core: CoreHandle,
    pub client: Client,
    pub namespace: String,
    pub leading: watch::Receiver<Option<Instant>>,
}

/// Which versions are served; `None`: the kind is not installed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Served {
    properties: Option<String>,
    profiles: Option<String>,
}

type Watched = (Kind, Result<Event<DynamicObject>, watcher::Error>);

impl InventoryTask {
    /// Until the session ends. What fails here is tried again by itself: services do not wait for it.
    pub async fn run_on(self) -> Result<Infallible, SessionEnd> {
        loop {
            match self.run().await {
                Err(SessionEnd::Connect(error)) => {
                    tracing::warn!(%error, "the cluster inventory is not kept now, and is tried again");
                    tokio::time::sleep(AGAIN).await;
                }
                end => return end,
            }
        }
    }

    async fn run(&self) -> Result<Infallible, SessionEnd> {
        loop {
            let served = self.discover().await?;
            let found = served != Served::default();
            if !found {
                tracing::debug!("no ClusterProperty and no ClusterProfile is defined here");
                tokio::time::sleep(DISCOVERED).await;
                continue;
            }
            self.keep(served).await?;
        }
    }

    async fn discover(&self) -> Result<Served, SessionEnd> {
        let groups = served_groups(&self.client).await?;
        let served = |group: &str, known: &[&'static str]| -> Vec<&'static str> {
            let found =
                groups.iter().find(|found| found.name == group).map(|found| found.versions.as_slice());
            let is_served =
                |known: &&&'static str| found.unwrap_or_default().iter().any(|v| v.version == **known);
            known.iter().filter(is_served).copied().collect()
        };
        let about = served("about.k8s.io", &["v1beta1", "v1alpha1"]);
        // MCS kinds are in the same group, and may be all that is there.
        let profiles = served("multicluster.x-k8s.io", &["v1alpha2", "v1alpha1"]);
        Ok(Served {
            properties: self.version_of("about.k8s.io", &about, "clusterproperties").await?,
            profiles: self.version_of("multicluster.x-k8s.io", &profiles, "clusterprofiles").await?,
        })
    }

    async fn version_of(
        &self,
        group: &str,
        versions: &[&str],
        plural: &str,
    ) -> Result<Option<String>, SessionEnd> {
        for version in versions {
            let name = format!("{group}/{version}");
            let asked = tokio::time::timeout(LONGEST, self.client.list_api_group_resources(&name));
            match asked.await.map_err(|_| ConnectError::Late)? {
                Ok(served) if served.resources.iter().any(|resource| resource.name == plural) => {
                    return Ok(Some((*version).to_owned()));
                }
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => return Err(ConnectError::from(error).into()),
            }
        }
        Ok(None)
    }

    fn api(&self, kind: Kind, version: &str) -> Api<DynamicObject> {
        match kind {
            Kind::Property => {
                let gvk = GroupVersionKind::gvk("about.k8s.io", version, "ClusterProperty");
                Api::all_with(
                    self.client.clone(),
                    &ApiResource::from_gvk_with_plural(&gvk, "clusterproperties"),
                )
            }
            Kind::Profile => {
                let gvk = GroupVersionKind::gvk("multicluster.x-k8s.io", version, "ClusterProfile");
                let resource = ApiResource::from_gvk_with_plural(&gvk, "clusterprofiles");
                Api::namespaced_with(self.client.clone(), &self.namespace, &resource)
            }
        }
    }

    /// Works with what is served, until something else may be.
    async fn keep(&self, served: Served) -> Result<(), SessionEnd> {
        let kinds = [(Kind::Property, &served.properties), (Kind::Profile, &served.profiles)];
        let stream = |(kind, version): (Kind, &Option<String>)| -> Option<BoxStream<'static, Watched>> {
            let events = watcher(self.api(kind, version.as_ref()?), watcher::Config::default());
            Some(events.backoff(Pauses::default()).map(move |event| (kind, event)).boxed())
        };
        let mut watched = futures::stream::select_all(kinds.into_iter().filter_map(stream));
        let kubernetes = self.kubernetes_version().await?;
        let mut tables = Tables::default();
        let mut facts = self.core.watch();
        let mut leading = self.leading.clone();
        let until = Instant::now() + DISCOVERED;
        let complete = served.properties.is_some() && served.profiles.is_some();
        let mut next = Instant::now();
        let mut news = true;
        let mut told: Option<BTreeMap<String, String>> = None;
        let mut said = BTreeSet::new();
        loop {
            tokio::select! {
                event = watched.next() => {
                    let Some((kind, event)) = event else { return Ok(()) };
                    news = true;
                    match event {
                        Ok(event) => tables.take(kind, event),
                        Err(error) => match unauthenticated(&error) {
                            Some(reason) => return Err(SessionEnd::Unauthenticated(reason)),
                            None => tracing::debug!(?kind, %error, "the inventory can't be watched now"),
                        },
                    }
                }
                changed = facts.changed(), if !news => {
                    changed.map_err(|_| CoreGone)?;
                    news = true;
                }
                changed = leading.changed() => {
                    changed.map_err(|_| SessionEnd::Lease)?;
                    news = true;
                }
                () = tokio::time::sleep_until(next), if news => {
                    news = false;
                    next = Instant::now() + PACE;
                    if served.properties.is_some() && tables.properties_synced {
                        let own = self.properties(&tables, &kubernetes);
                        if told.as_ref() != Some(&own) {
                            let handed = own.clone();
                            let set = self.core.attempt(move |core, _| core.set_kubernetes_properties(handed)).await;
                            match set {
                                Ok(()) => told = Some(own),
                                Err(error) => {
                                    tracing::warn!(%error, "properties of Kubernetes can't be stored now");
                                    (news, next) = (true, Instant::now() + AGAIN);
                                }
                            }
                        }
                    }
                    if !self.write(&served, &mut tables, &mut said).await? {
                        (news, next) = (true, Instant::now() + AGAIN);
                    }
                }
                () = tokio::time::sleep_until(until), if !complete => return Ok(()),
            }
        }
    }

    /// Of the API server, for peers' `ClusterProfile`s.
    async fn kubernetes_version(&self) -> Result<String, SessionEnd> {
        let asked = tokio::time::timeout(LONGEST, self.client.apiserver_version()).await;
        Ok(asked.map_err(|_| ConnectError::Late)?.map_err(ConnectError::from)?.git_version)
    }

    /// What Kubernetes says of this cluster.
    fn properties(&self, tables: &Tables, kubernetes: &str) -> BTreeMap<String, String> {
        let value = |object: &Value| object.pointer("/spec/value").and_then(Value::as_str).map(str::to_owned);
        let mut properties: BTreeMap<String, String> = tables
            .properties
            .iter()
            .filter_map(|(name, object)| Some((name.clone(), value(object)?)))
            .collect();
        // Who we are is no object's to say.
        let facts = self.core.facts();
        properties.insert(CLUSTER_ID.to_owned(), facts.cluster.name.to_string());
        properties.insert(CLUSTER_SET.to_owned(), facts.cluster.trust_domain.to_string());
        properties.insert(VERSION.to_owned(), kubernetes.to_owned());
        properties
    }

    fn leads(&self) -> bool {
        self.leading.borrow().is_some_and(|until| until > Instant::now())
    }

    /// Writes what differs; false: it has to be tried again.
    async fn write(
        &self,
        served: &Served,
        tables: &mut Tables,
        said: &mut BTreeSet<String>,
    ) -> Result<bool, SessionEnd> {
        if !self.leads() {
            return Ok(true);
        }
        let facts = self.core.facts();
        let Moment { monotonic, unix } = self.core.now();
        let clock = rfc3339_seconds(clock::unix_seconds());
        let mut writes = Vec::new();
        if let Some(version) = served.properties.as_ref().filter(|_| tables.properties_synced) {
            let (own, foreign) = desired::properties(&facts, version, &tables.properties);
            writes.extend(own.into_iter().map(|write| (Kind::Property, version, write)));
            for text in foreign {
                if said.insert(text.clone()) {
                    tracing::warn!("{text}");
                }
            }
        }
        if let Some(version) = served.profiles.as_ref().filter(|_| tables.profiles_synced) {
            let shown = crate::view::peers(&facts, monotonic, unix);
            let own = desired::profiles(&shown, version, &self.namespace, &tables.profiles, &clock);
            writes.extend(own.into_iter().map(|write| (Kind::Profile, version, write)));
        }
        let mut all = true;
        for (kind, version, write) in writes {
            if !self.leads() {
                return Ok(true);
            }
            match self.perform(&self.api(kind, version), &write).await {
                Ok(Some(object)) => tables.take(kind, Event::Apply(object)),
                Ok(None) => {}
                Err(Failure::Unauthenticated(reason)) => return Err(SessionEnd::Unauthenticated(reason)),
                Err(Failure::Away(reason)) => {
                    tracing::debug!(reason, "the inventory can't be written now");
                    return Ok(false);
                }
                Err(Failure::Refused(reason)) => {
                    if said.insert(reason.clone()) {
                        tracing::warn!(
                            reason,
                            ?kind,
                            "the API server refuses what is written of the inventory"
                        );
                    }
                    // One that is refused keeps no other from its own.
                    all = false;
                }
            }
        }
        Ok(all)
    }

    async fn perform(
        &self,
        api: &Api<DynamicObject>,
        write: &Write,
    ) -> Result<Option<DynamicObject>, Failure> {
        let late = |_| Failure::Away(format!("no answer within {} s", LONGEST.as_secs()));
        let ours = PatchParams::apply(TOMBOLO);
        match write {
            // Not by force where there is none: whoever was faster keeps it.
            Write::Apply { name, document, force } => {
                let params = if *force { ours.force() } else { ours };
                let asked =
                    tokio::time::timeout(LONGEST, api.patch(name, &params, &Patch::Apply(document))).await;
                asked.map_err(late)?.map(Some).map_err(|error| judge(&error))
            }
            Write::Status { name, document } => {
                let asked = tokio::time::timeout(
                    LONGEST,
                    api.patch_status(name, &ours.force(), &Patch::Apply(document)),
                )
                .await;
                asked.map_err(late)?.map(Some).map_err(|error| judge(&error))
            }
            Write::Delete { name, uid } => {
                let this = Preconditions { uid: Some(uid.clone()), resource_version: None };
                let params = DeleteParams::background().preconditions(this);
                match tokio::time::timeout(LONGEST, api.delete(name, &params)).await.map_err(late)? {
                    Ok(_) => Ok(None),
                    Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(None),
                    Err(error) => Err(judge(&error)),
                }
            }
        }
    }
}
