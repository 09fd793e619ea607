//! Sidecars for pods: a mutating admission webhook of the cluster's Kubernetes (admission.k8s.io/v1) that this federator serves.
//!
//! What becomes of a pod is pure: [`wishes`] reads what it and its namespace ask for, [`pod`] changes it, [`review`] reads
//! requests and writes answers. [`serve`] is HTTPS around that, [`keeper`] keeps certificates ([`certificate`] decides which) in a
//! Secret that every replica reads, and tells the API server whom to trust. No replica leads: each may issue or rotate, and
//! the Secret's version lets one of them win. Nothing here knows or can do anything secret for a pod: its identity is what
//! its projected token proves later.

pub mod certificate;
mod keeper;
pub mod metrics;
mod places;
pub mod pod;
pub mod review;
mod serve;
pub mod settings;
pub mod wishes;

use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use tokio::net::TcpListener;
use tombolo_identity::tls;
use tombolo_runtime::tasks::TaskGroup;

use crate::core::CoreHandle;
use crate::kubernetes::KubernetesConfig;
use keeper::{Keeper, Shown};
use metrics::Metrics;
use serve::Webhook;
use settings::InjectSettings;

/// The Service by which the API server finds the webhook, in the federator's namespace; the Secret with its certificates, too.
pub const WEBHOOK: &str = "tombolo-webhook";
/// The MutatingWebhookConfiguration that is told whom to trust.
pub const CONFIGURATION: &str = "tombolo-inject";

/// Where the webhook is served, and what it puts into pods.
#[derive(Clone, Debug)]
pub struct InjectConfig {
    pub listen: SocketAddr,
    pub kubernetes: KubernetesConfig,
    pub settings: InjectSettings,
}

/// Why there is no webhook.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    #[error("--kubernetes-inject {listen}: cannot listen ({source}): choose another address")]
    Listen { listen: SocketAddr, source: std::io::Error },
    #[error("the webhook's TLS configuration can't be made: {0}")]
    Tls(#[from] rustls::Error),
}

/// A bound webhook.
pub struct Inject {
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    shown: Shown,
    config: InjectConfig,
    metrics: Metrics,
}

impl Inject {
    pub async fn bind(config: InjectConfig, metrics: Metrics) -> Result<Self, InjectError> {
        let listen = config.listen;
        let shown = Shown::default();
        let tls = tls::https_server_config_with(Arc::new(shown.clone()))?;
        let failed = |source| InjectError::Listen { listen, source };
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        tracing::info!(listen = ?listener.local_addr().ok(), image = config.settings.image, "injection webhook bound");
        Ok(Self { listener, tls, shown, config, metrics })
    }

    /// Serves until the group ends.
    pub fn spawn(self, core: &CoreHandle, tasks: &TaskGroup) {
        let Self { listener, tls, shown, config: InjectConfig { listen: _, kubernetes, settings }, metrics } =
            self;
        let client = Arc::new(ArcSwapOption::empty());
        let keeper = Keeper {
            access: kubernetes.access,
            namespace: kubernetes.namespace.clone(),
            shown,
            client: Arc::clone(&client),
            metrics: metrics.clone(),
        };
        tasks.spawn("webhook's certificates", keeper.run());
        let webhook =
            Webhook { core: core.clone(), client, own_namespace: kubernetes.namespace, settings, metrics };
        tasks.spawn("injection webhook", serve::accept(listener, tls, Arc::new(webhook), tasks.clone()));
    }
}
