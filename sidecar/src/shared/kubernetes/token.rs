//! Tokens of service accounts, as Kubernetes gives them to whoever has the right (authentication.k8s.io/v1 TokenRequest): for
//! the federator's audience alone, bound to no pod, and short-lived, since each is shown once and at once.

use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use k8s_openapi::api::authentication::v1::TokenRequest;
use kube::Api;
use kube::api::PostParams;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use serde_json::json;
use tokio::sync::watch;
use tombolo_overlay::member::TokenSource;
use zeroize::Zeroizing;

use super::picture::Account;
use super::watching::Session;

/// The least that Kubernetes gives.
const LIFE: Duration = Duration::from_secs(600);
/// Longer than any answer, shorter than a caller waits.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks for tokens of one service account.
#[derive(Clone, Debug)]
pub(super) struct AskedToken {
    pub session: watch::Receiver<Option<Session>>,
    pub account: Account,
    pub audience: String,
}

impl AskedToken {
    async fn ask(&self) -> Result<Zeroizing<String>, String> {
        let session = self.session.borrow().clone();
        let Session { client, .. } = session.ok_or("the API server has not been reached yet")?;
        let (namespace, name) = &self.account;
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "ServiceAccount"));
        let api: Api<DynamicObject> = Api::namespaced_with(client, namespace, &resource);
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": { "audiences": [self.audience], "expirationSeconds": LIFE.as_secs() },
        });
        let params = PostParams::default();
        let asked = api.create_subresource::<_, TokenRequest>("token", name, &params, &request);
        let answer = tokio::time::timeout(PATIENCE, asked);
        let answer = answer.await.map_err(|_| format!("no answer within {} s", PATIENCE.as_secs()))?;
        let answer = answer.map_err(|error| match error {
            kube::Error::Api(status) if status.code == 403 => format!(
                "{}: may this shared sidecar create serviceaccounts/token in namespace {namespace}?",
                status.message
            ),
            error => error.to_string(),
        })?;
        let status = answer.status.ok_or("the API server gave none")?;
        Ok(Zeroizing::new(status.token))
    }
}

impl TokenSource for AskedToken {
    fn token(&self) -> BoxFuture<'_, Result<Zeroizing<String>, String>> {
        self.ask().boxed()
    }
}
