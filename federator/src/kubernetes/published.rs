//! What joiners in the cluster are told, in a ConfigMap beside the federator: nothing of it is secret.
//!
//! `pods.token` is what `tombolo token pods` prints, `bundle.pem` the roots of the trust domain. Written by server-side
//! apply when the federator has started and whenever what is trusted has changed; again every few minutes, in case
//! somebody has deleted it. Every federator of the cluster writes the same.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use tombolo_proto::v1;

use super::KubernetesConfig;
use super::client::{LONGEST, connect};
use super::labels::TOMBOLO;
use crate::core::CoreHandle;

pub const NAME: &str = "tombolo-trust-bundle";
/// While the API server can't be asked: pods wait for it in order to start.
const SOON: Duration = Duration::from_secs(2);
/// A request in ten minutes is no load.
const AGAIN: Duration = Duration::from_secs(600);

/// Keeps it up to date.
pub struct PublishTask {
    pub core: CoreHandle,
    pub config: KubernetesConfig,
    /// Where pods reach this cluster's federators, `HOST:PORT`.
    pub federator: String,
}

impl PublishTask {
    /// Runs until the core has ended.
    pub async fn run(self) {
        let mut facts = self.core.watch();
        let mut said = String::new();
        loop {
            let sequence = facts.borrow_and_update().trust.bundle.sequence;
            let again = match self.publish().await {
                Ok(()) => {
                    said.clear();
                    AGAIN
                }
                Err(error) => {
                    // Once per reason: this may last for days.
                    if error != said {
                        tracing::warn!(
                            error,
                            config_map = NAME,
                            "what joiners are told can't be written; tried again"
                        );
                        said = error;
                    }
                    SOON
                }
            };
            let changed = facts.wait_for(|facts| facts.trust.bundle.sequence != sequence);
            if let Ok(Err(_)) = tokio::time::timeout(again, changed).await {
                return;
            }
        }
    }

    async fn publish(&self) -> Result<(), String> {
        let request = v1::CreateJoinTokenRequest {
            role: "pod".to_owned(),
            federator_names: vec![self.federator.clone()],
            ..v1::CreateJoinTokenRequest::default()
        };
        let made = self.core.attempt(move |core, moment| core.create_join_token(&request, moment)).await;
        let token = made.map_err(|error| error.to_string())?.text;
        let roots = self.core.facts().trust.bundle.roots.iter().map(|root| pem(root)).collect::<String>();
        let client = connect(&self.config.access).await.map_err(|error| error.to_string())?;
        let api: Api<ConfigMap> = Api::namespaced(client, &self.config.namespace);
        let ours = PatchParams::apply(TOMBOLO).force();
        let document = Patch::Apply(document(&self.config.namespace, &token, &roots));
        let applied = tokio::time::timeout(LONGEST, api.patch(NAME, &ours, &document)).await;
        let applied = applied.map_err(|_| format!("no answer within {} s", LONGEST.as_secs()))?;
        applied.map(drop).map_err(|error| error.to_string())
    }
}

fn document(namespace: &str, token: &str, roots: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {
            "name": NAME, "namespace": namespace,
            "labels": { "app.kubernetes.io/managed-by": TOMBOLO },
        },
        "data": { "pods.token": format!("{token}\n"), "bundle.pem": roots },
    })
}

/// RFC 7468.
fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.extend(line.iter().map(|byte| char::from(*byte)));
        pem.push('\n');
    }
    pem + "-----END CERTIFICATE-----\n"
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;

    use super::*;

    #[test]
    fn roots_are_written_as_others_read_them() {
        for length in [1, 48, 49, 500] {
            let der = vec![7_u8; length];
            let two = pem(&der) + &pem(&der);
            let read: Vec<_> =
                CertificateDer::pem_slice_iter(two.as_bytes()).collect::<Result<_, _>>().unwrap();
            assert_eq!(read, [CertificateDer::from(der.clone()), der.into()]);
        }
    }
}
