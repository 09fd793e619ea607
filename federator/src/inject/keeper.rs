//! Keeps the webhook's certificates: the Secret that every replica shows from, and the `caBundle` by which the API server trusts
//! it. [`certificate`](super::certificate) decides; here is what asks and writes.
//!
//! Every replica does the same. A write carries the version that it follows from, so that of two replicas one is refused and
//! looks again. Of the MutatingWebhookConfiguration nothing is written but `caBundle`, of webhooks whose name is ours. Without
//! an API server there is nobody to ask the webhook either: it is tried again.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use futures::StreamExt;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watch_object};
use kube::{Api, Client, Error};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use serde_json::{Value, json};
use tombolo_identity::tls;
use tombolo_kubernetes::pauses::Pauses;
use tombolo_runtime::clock;

use super::certificate::{Generation, ROTATED, Step, Stored};
use super::metrics::Metrics;
use super::{CONFIGURATION, WEBHOOK};
use crate::kubernetes::client::{self, ConnectError, LONGEST};
use crate::kubernetes::labels::{MANAGED_BY, TOMBOLO};
use crate::token_review::access::KubernetesAccess;

/// Without an answer, and after a refusal.
const AGAIN: Duration = Duration::from_secs(5);
/// Certificates are looked at this often at least: the clock may have been set.
const LOOK: Duration = Duration::from_secs(3600);
/// Webhooks of the configuration that are ours.
const SUFFIX: &str = ".inject.tombolo.dev";

/// What is shown to callers; clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Shown(Arc<ArcSwapOption<CertifiedKey>>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
    }
}

/// Why keeping has to begin anew.
#[derive(Debug, thiserror::Error)]
enum KeeperError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("Secret {WEBHOOK}: {0}")]
    Secret(Error),
    #[error("MutatingWebhookConfiguration {CONFIGURATION}: {0}")]
    Configuration(Error),
    #[error("{0} can't be watched: {1}")]
    Watch(&'static str, watcher::Error),
    #[error("no answer within {} s", LONGEST.as_secs())]
    Late,
    #[error("a certificate can't be made: {0}")]
    Issue(#[from] tombolo_identity::issuer::IssueError),
    #[error("a watch has ended")]
    Ended,
}

/// Keeps certificates and trust.
pub(super) struct Keeper {
    pub access: KubernetesAccess,
    pub namespace: String,
    pub shown: Shown,
    /// For whoever asks the API server while there is a session.
    pub client: Arc<ArcSwapOption<Client>>,
    pub metrics: Metrics,
}

impl Keeper {
    /// For ever.
    pub async fn run(self) {
        let mut said = String::new();
        loop {
            let Err(error) = self.session().await;
            let error = error.to_string();
            if error != said {
                tracing::warn!(
                    error,
                    "the webhook's certificates can't be kept now; tried again every {} s",
                    AGAIN.as_secs()
                );
                said = error;
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Names by which API servers call a Service.
    fn names(&self) -> Vec<String> {
        ["svc", "svc.cluster.local"].map(|end| format!("{WEBHOOK}.{}.{end}", self.namespace)).to_vec()
    }

    async fn session(&self) -> Result<std::convert::Infallible, KeeperError> {
        let client = client::connect(&self.access).await?;
        self.client.store(Some(Arc::new(client.clone())));
        let secrets: Api<Secret> = Api::namespaced(client.clone(), &self.namespace);
        let configurations: Api<MutatingWebhookConfiguration> = Api::all(client);
        let mut watched_secret = watch_object(secrets.clone(), WEBHOOK).backoff(Pauses::default()).boxed();
        let mut watched_configuration =
            watch_object(configurations.clone(), CONFIGURATION).backoff(Pauses::default()).boxed();
        // `None`: not heard of yet.
        let mut secret: Option<Option<Secret>> = None;
        let mut configuration: Option<Option<MutatingWebhookConfiguration>> = None;
        let names = self.names();
        loop {
            let mut wait = LOOK;
            if let Some(secret) = &secret {
                let stored = read(secret.as_ref());
                self.show(stored.current.as_ref());
                let bundle = stored.bundle();
                let found: Option<&MutatingWebhookConfiguration> =
                    configuration.as_ref().and_then(Option::as_ref);
                let untold = found.map(|configuration| untold(configuration, &bundle)).unwrap_or_default();
                if let (false, Some(configuration)) = (untold.is_empty() || bundle.is_empty(), found) {
                    tell(&configurations, configuration, &untold, &bundle).await?;
                }
                let trusted = found.is_some() && untold.is_empty();
                let now = clock::since_unix_epoch();
                match stored.step(&names, now.as_secs(), trusted) {
                    Step::Wait { until } => {
                        wait = Duration::from_secs(until.saturating_sub(now.as_secs()).max(1)).min(LOOK);
                    }
                    step => {
                        let after = stored.after(step, &names, now)?;
                        if self.store(&secrets, secret.as_ref(), &after).await? {
                            tracing::info!(?step, secret = WEBHOOK, "the webhook's certificates are renewed");
                            self.metrics.rotations.inc();
                        }
                    }
                }
            }
            tokio::select! {
                next = watched_secret.next() => secret = Some(taken("Secret", next)?),
                next = watched_configuration.next() => configuration = Some(taken("MutatingWebhookConfiguration", next)?),
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// False: another replica was faster.
    async fn store(
        &self,
        api: &Api<Secret>,
        before: Option<&Secret>,
        after: &Stored,
    ) -> Result<bool, KeeperError> {
        let mut metadata = before.map(|secret| secret.metadata.clone()).unwrap_or_else(|| ObjectMeta {
            name: Some(WEBHOOK.to_owned()),
            labels: Some([(MANAGED_BY.to_owned(), TOMBOLO.to_owned())].into()),
            ..ObjectMeta::default()
        });
        metadata.managed_fields = None;
        metadata.annotations.get_or_insert_default().insert(ROTATED.to_owned(), after.rotated().to_owned());
        let secret = Secret {
            metadata,
            data: Some(after.data()),
            type_: Some("Opaque".to_owned()),
            ..before.cloned().unwrap_or_default()
        };
        let params = PostParams { field_manager: Some(TOMBOLO.to_owned()), ..PostParams::default() };
        let written = async {
            match before {
                None => api.create(&params, &secret).await,
                Some(_) => api.replace(WEBHOOK, &params, &secret).await,
            }
        };
        match tokio::time::timeout(LONGEST, written).await.map_err(|_| KeeperError::Late)? {
            Ok(_) => Ok(true),
            Err(Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(KeeperError::Secret(error)),
        }
    }

    /// Shows a certificate, if it is of use.
    fn show(&self, generation: Option<&Generation>) {
        let Some(generation) = generation else { return };
        match certified(generation) {
            Ok(certified) => {
                self.metrics
                    .certificate_ends
                    .set(i64::try_from(generation.described.not_after).unwrap_or(i64::MAX));
                self.shown.0.store(Some(Arc::new(certified)));
            }
            Err(reason) => tracing::error!(
                reason,
                secret = WEBHOOK,
                "the webhook's certificate can't be used; delete the Secret to have a new one"
            ),
        }
    }
}

fn read(secret: Option<&Secret>) -> Stored {
    let (data, annotations) =
        secret.map(|secret| (secret.data.clone(), secret.metadata.annotations.clone())).unwrap_or_default();
    Stored::read(&data.unwrap_or_default(), &annotations.unwrap_or_default())
}

fn certified(generation: &Generation) -> Result<CertifiedKey, String> {
    let chain: Result<Vec<_>, _> =
        CertificateDer::pem_slice_iter(generation.certificate.as_bytes()).collect();
    let chain = chain.map_err(|e| format!("the certificate: {e:?}"))?;
    let key =
        PrivateKeyDer::from_pem_slice(generation.key.as_bytes()).map_err(|e| format!("the key: {e:?}"))?;
    CertifiedKey::from_der(chain, key, &tls::provider()).map_err(|e| e.to_string())
}

fn taken<K>(
    what: &'static str,
    next: Option<Result<Option<K>, watcher::Error>>,
) -> Result<Option<K>, KeeperError> {
    next.ok_or(KeeperError::Ended)?.map_err(|error| KeeperError::Watch(what, error))
}

/// Our webhooks that don't trust exactly `bundle`, by name.
fn untold(configuration: &MutatingWebhookConfiguration, bundle: &str) -> Vec<String> {
    let ours = configuration.webhooks.iter().flatten().filter(|webhook| webhook.name.ends_with(SUFFIX));
    let told = |told: Option<&ByteString>| told.is_some_and(|told| told.0 == bundle.as_bytes());
    ours.filter(|webhook| !told(webhook.client_config.ca_bundle.as_ref()))
        .map(|webhook| webhook.name.clone())
        .collect()
}

/// Writes `caBundle` and nothing else, if the configuration is still the one that was read.
async fn tell(
    api: &Api<MutatingWebhookConfiguration>,
    configuration: &MutatingWebhookConfiguration,
    untold: &[String],
    bundle: &str,
) -> Result<(), KeeperError> {
    let params = PatchParams { field_manager: Some(TOMBOLO.to_owned()), ..PatchParams::default() };
    let patch = Patch::Strategic(trust(configuration, untold, bundle));
    let written = tokio::time::timeout(LONGEST, api.patch(CONFIGURATION, &params, &patch));
    match written.await.map_err(|_| KeeperError::Late)? {
        Ok(_) => {
            tracing::info!(
                configuration = CONFIGURATION,
                webhooks = untold.len(),
                "the API server is told whom to trust"
            );
            Ok(())
        }
        // Changed meanwhile, or gone: the watch brings it.
        Err(Error::Api(status)) if matches!(status.code, 404 | 409 | 422) => {
            tracing::debug!(message = status.message, "the webhook configuration has changed meanwhile");
            Ok(())
        }
        Err(error) => Err(KeeperError::Configuration(error)),
    }
}

/// A strategic merge patch: webhooks are merged by their names, and the version lets nothing be written to another one.
fn trust(configuration: &MutatingWebhookConfiguration, untold: &[String], bundle: &str) -> Value {
    let bundle = ByteString(bundle.as_bytes().to_vec());
    let webhook = |name: &String| json!({ "name": name, "clientConfig": { "caBundle": bundle } });
    let webhooks: Vec<Value> = untold.iter().map(webhook).collect();
    json!({ "metadata": { "resourceVersion": configuration.metadata.resource_version }, "webhooks": webhooks })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configuration() -> MutatingWebhookConfiguration {
        let webhook = |name: &str, bundle: Option<&str>| {
            let bundle = bundle.map(|bundle| json!(ByteString(bundle.as_bytes().to_vec())));
            json!({
                "name": name, "clientConfig": { "caBundle": bundle, "url": "https://x" }, "sideEffects": "None",
                "admissionReviewVersions": ["v1"], "failurePolicy": "Ignore",
            })
        };
        serde_json::from_value(json!({
            "metadata": { "name": CONFIGURATION, "resourceVersion": "7" },
            "webhooks": [
                webhook("namespace.inject.tombolo.dev", None), webhook("pod.inject.tombolo.dev", Some("new")),
                webhook("other.example.com", None),
            ],
        }))
        .unwrap()
    }

    #[test]
    fn nothing_is_written_but_the_bundle_of_our_webhooks_in_the_version_that_was_read() {
        let configuration = configuration();
        let untold = untold(&configuration, "new");
        assert_eq!(untold, ["namespace.inject.tombolo.dev"]);
        let bundle = json!(ByteString(b"new".to_vec()));
        let expected = json!({
            "metadata": { "resourceVersion": "7" },
            "webhooks": [{ "name": "namespace.inject.tombolo.dev", "clientConfig": { "caBundle": bundle } }],
        });
        assert_eq!(trust(&configuration, &untold, "new"), expected);
    }
}
