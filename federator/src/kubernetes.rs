//! The cluster's Kubernetes: its `ServiceExport`s feed the same code as applied ones, and what follows from them is
//! written back: `ServiceImport`s, derived `Service`s, `EndpointSlice`s, conditions, Events. Objects of our own kinds
//! likewise ([`objects`]).
//!
//! One task owns everything about services ([`driver`]). It watches five kinds ([`tables`]), hands exports to the core
//! ([`crate::core::kubernetes`]), and looks at each service that has changed, here or in the facts: what it is to look like
//! ([`desired`], [`status`]; [`targets`] for its numbers at the shared sidecars), what of it is to be written next ([`plan`]),
//! and writes that ([`write`]), a few services at a time ([`queue`]). Only
//! the leader writes ([`lease`]); every replica watches. The API server may be away for as long as it likes: what is known
//! stays, and peers keep what they have been told. When our credentials are refused everything begins anew with those
//! that the files hold now.

pub mod client;
pub mod crds;
mod desired;
mod driver;
mod inventory;
pub(crate) mod labels;
pub mod lease;
pub mod metrics;
mod objects;
mod plan;
pub mod published;
mod queue;
mod rows;
mod status;
mod tables;
mod targets;
mod trouble;
mod write;

use std::time::Duration;

use futures::StreamExt;
use futures::stream::{BoxStream, SelectAll};
use kube::Client;
use kube::runtime::WatchStreamExt;
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::watcher::{self, watcher};
use tokio::sync::watch;
use tokio::time::Instant;
use tombolo_kubernetes::pauses::Pauses;
use tombolo_model::names::ServiceKey;
use tombolo_runtime::tasks::TaskGroup;

use crate::core::CoreHandle;
use crate::core::pods::ServiceAccount;
use crate::token_review::access::KubernetesAccess;
use client::{ConnectError, Resources};
use driver::{Driver, SessionEnd, Watched};
use inventory::InventoryTask;
use lease::LeaseTask;
use metrics::Metrics;
use objects::ObjectsTask;
use tables::Kind;
use write::Writer;

/// Without an answer, and without the CRDs, it is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// What the federator has to do with its Kubernetes beside reviewing tokens.
#[derive(Clone, Debug)]
pub struct KubernetesConfig {
    pub access: KubernetesAccess,
    /// Where the `Lease` is.
    pub namespace: String,
    /// Services are exported and imported.
    pub services: bool,
    /// Objects of our own kinds are kept.
    pub objects: bool,
    /// The `Service` of the shared sidecars, which derived `Service`s lead to; `None`: they lead nowhere.
    pub shared: Option<ServiceKey>,
}

/// What pods of the cluster may join as beside their service account, and what they are told.
#[derive(Clone, Debug, Default)]
pub struct PodsConfig {
    /// Whose pods may be gateways; `None`: no pods may.
    pub gateways: Option<ServiceAccount>,
    /// Whom joiners are told of this cluster's federators, `HOST:PORT`, by a ConfigMap; `None`: there is none.
    pub publish: Option<(KubernetesConfig, String)>,
}

/// Works with the cluster's Kubernetes, as it is configured to.
pub struct KubernetesTask {
    pub core: CoreHandle,
    pub config: KubernetesConfig,
    pub metrics: Metrics,
    pub tasks: TaskGroup,
}

impl KubernetesTask {
    /// Runs until the core has ended.
    pub async fn run(self) {
        let mut said = String::new();
        loop {
            let end = match self.session().await {
                Ok(never) => match never {},
                Err(SessionEnd::Gone(_)) => return,
                Err(end) => end.to_string(),
            };
            // Once per reason: this may last for days.
            if end != said {
                tracing::warn!(
                    error = end,
                    "Kubernetes can't be used now; tried again every {} s",
                    AGAIN.as_secs()
                );
                said = end;
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn session(&self) -> Result<std::convert::Infallible, SessionEnd> {
        let client = client::connect(&self.config.access).await?;
        // Before anything is begun that an absent API server would make complain.
        client::served_groups(&client).await?;
        let facts = self.core.facts();
        let identity = format!("{}-{:x}", hostname(), facts.cluster.epoch.0);
        let (leads, leading) = watch::channel(None);
        let task = LeaseTask {
            client: client.clone(),
            namespace: self.config.namespace.clone(),
            identity: identity.clone(),
            leads,
        };
        let lease = self.tasks.spawn("Kubernetes lease", task.run());
        let _ends_with_the_session = AbortOnDrop(lease.abort_handle());
        let reporter = Reporter { controller: "tombolo.dev/federator".to_owned(), instance: Some(identity) };
        let recorder = Recorder::new(client.clone(), reporter);
        let objects = ObjectsTask {
            core: self.core.clone(),
            client: client.clone(),
            recorder: recorder.clone(),
            leading: leading.clone(),
            metrics: self.metrics.clone(),
        };
        let inventory = InventoryTask {
            core: self.core.clone(),
            client: client.clone(),
            namespace: self.config.namespace.clone(),
            leading: leading.clone(),
        };
        let services = async {
            match self.config.services {
                true => self.services(client, recorder, leading).await,
                false => std::future::pending().await,
            }
        };
        let objects = async {
            match self.config.objects {
                true => objects.run().await,
                false => std::future::pending().await,
            }
        };
        let inventory = async {
            match self.config.objects {
                true => inventory.run_on().await,
                false => std::future::pending().await,
            }
        };
        tokio::select! {
            end = services => end,
            end = objects => end,
            end = inventory => end,
        }
    }

    /// Services alone: the definitions of MCS may come late.
    async fn services(
        &self,
        client: Client,
        recorder: Recorder,
        leading: watch::Receiver<Option<Instant>>,
    ) -> Result<std::convert::Infallible, SessionEnd> {
        let mut said = false;
        let resources = loop {
            match Resources::discover(&client).await {
                Ok(resources) => break resources,
                Err(error @ ConnectError::NoCrds) => {
                    if !std::mem::replace(&mut said, true) {
                        tracing::warn!(%error, "no service can be exported or imported; tried again every {} s", AGAIN.as_secs());
                    }
                    tokio::time::sleep(AGAIN).await;
                }
                Err(error) => return Err(error.into()),
            }
        };
        tracing::info!(mcs = resources.api_version, "services of Kubernetes are exported and imported");
        let writer = Writer { client: client.clone(), resources: resources.clone(), recorder };
        let shared = self.config.shared.as_ref();
        let shared = shared.map(|service| (service.namespace.to_string(), service.name.to_string()));
        let driver = Driver::new(self.core.clone(), writer, leading, self.metrics.clone(), shared);
        driver.run(watches(&client, &resources)).await
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// In a pod, its name.
fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "federator".to_owned() } else { name.trim().to_owned() }
}

/// A stream per kind, which begins anew after whatever ends it, ever more slowly.
fn watches(client: &Client, resources: &Resources) -> SelectAll<BoxStream<'static, Watched>> {
    let stream = |kind: Kind| {
        let config = watcher::Config::default();
        let events = watcher(resources.all(client, kind), config).backoff(Pauses::default());
        events.map(move |event| (kind, event)).boxed()
    };
    futures::stream::select_all(Kind::ALL.map(stream))
}
