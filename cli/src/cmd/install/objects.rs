//! Objects in a Kubernetes cluster as the installing commands handle them: JSON documents, applied by server-side apply, found
//! by label, deleted and waited for.

use std::time::Duration;

use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, Client};
use serde_json::Value;

use crate::chart::{MANAGED_BY, RELEASE};
use crate::failure::Failure;
use crate::kube_client::failed;
use crate::output::objects::text;

/// Server-side apply's field manager of what a person installs; the federator's is `tombolo`.
const MANAGER: &str = "tombolo-install";
/// Of one request.
const LONGEST: Duration = Duration::from_secs(30);
const MANAGED: &str = "app.kubernetes.io/managed-by";

/// Every kind that the chart may render, in the order in which they are made; the webhook comes when who answers it is there.
pub const KINDS: [(&str, &str); 16] = [
    ("v1", "Namespace"),
    ("v1", "ServiceAccount"),
    ("v1", "Secret"),
    ("v1", "ConfigMap"),
    ("rbac.authorization.k8s.io/v1", "ClusterRole"),
    ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"),
    ("rbac.authorization.k8s.io/v1", "Role"),
    ("rbac.authorization.k8s.io/v1", "RoleBinding"),
    ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy"),
    ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicyBinding"),
    ("v1", "Service"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("policy/v1", "PodDisruptionBudget"),
    ("apps/v1", "StatefulSet"),
    ("apps/v1", "Deployment"),
    ("admissionregistration.k8s.io/v1", "MutatingWebhookConfiguration"),
];
/// Rendered only when asked for, and only where its definition is installed.
pub const OPTIONAL: [(&str, &str); 1] = [("monitoring.coreos.com/v1", "ServiceMonitor")];
const CLUSTER_WIDE: [&str; 7] = [
    "Namespace",
    "ClusterRole",
    "ClusterRoleBinding",
    "MutatingWebhookConfiguration",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
    "CustomResourceDefinition",
];

/// One kind of objects: of the cluster, of a namespace, or (`namespace` empty) of every namespace.
#[derive(Clone, Debug)]
pub struct Kind {
    pub resource: ApiResource,
    pub namespace: String,
}

impl Kind {
    pub fn new(api_version: &str, kind: &str, namespace: &str) -> Self {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        let namespace = if CLUSTER_WIDE.contains(&kind) { "" } else { namespace };
        Self { resource, namespace: namespace.to_owned() }
    }
}

/// What is applied is ours to find again.
pub fn label(object: &mut Value) {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        let labels = metadata.entry("labels").or_insert_with(|| Value::Object(serde_json::Map::new()));
        if let Some(labels) = labels.as_object_mut() {
            labels.insert(MANAGED.to_owned(), MANAGED_BY.into());
            labels.insert("app.kubernetes.io/instance".to_owned(), RELEASE.into());
        }
    }
}

/// `Kind/name`, with the namespace where it is one's.
pub fn shown(object: &Value) -> String {
    let kind = text(object, "/kind").to_ascii_lowercase();
    match text(object, "/metadata/namespace") {
        "" => format!("{kind}/{}", text(object, "/metadata/name")),
        namespace => format!("{kind}/{} in {namespace}", text(object, "/metadata/name")),
    }
}

/// Where a kind comes in [`KINDS`].
pub fn rank(object: &Value) -> usize {
    let kind = text(object, "/kind");
    KINDS.iter().position(|(_, known)| *known == kind).unwrap_or(KINDS.len())
}

/// A cluster, as whoever installs.
#[derive(Clone)]
pub struct Cluster {
    pub client: Client,
}

impl Cluster {
    fn api(&self, kind: &Kind) -> Api<DynamicObject> {
        match kind.namespace.as_str() {
            "" => Api::all_with(self.client.clone(), &kind.resource),
            namespace => Api::namespaced_with(self.client.clone(), namespace, &kind.resource),
        }
    }

    fn of(object: &Value) -> Kind {
        let (version, kind) = (text(object, "/apiVersion"), text(object, "/kind"));
        Kind::new(version, kind, text(object, "/metadata/namespace"))
    }

    async fn answered<T>(
        what: impl std::fmt::Display,
        call: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, Failure> {
        match tokio::time::timeout(LONGEST, call).await {
            Ok(answer) => answer.map_err(|error| failed(what, &error)),
            Err(_) => Err(Failure::timed_out(format_args!(
                "{what}: the API server has not answered within {} s",
                LONGEST.as_secs()
            ))),
        }
    }

    /// Makes it so, whatever was there.
    pub async fn apply(&self, object: &Value) -> Result<Value, Failure> {
        let params = PatchParams::apply(MANAGER).force();
        let api = self.api(&Self::of(object));
        let name = text(object, "/metadata/name");
        let applied = Self::answered(shown(object), api.patch(name, &params, &Patch::Apply(object))).await?;
        serde_json::to_value(applied).map_err(Failure::new)
    }

    /// `None`: there is none, or no such kind.
    pub async fn find(&self, kind: &Kind, name: &str) -> Result<Option<Value>, Failure> {
        let api = self.api(kind);
        let what = format!("{}/{name}", kind.resource.kind.to_ascii_lowercase());
        let found = Self::answered(what, api.get_opt(name)).await?;
        found.map(|found| serde_json::to_value(found).map_err(Failure::new)).transpose()
    }

    /// Those with a label; none where there is no such kind.
    pub async fn list(&self, kind: &Kind, labels: &str) -> Result<Vec<Value>, Failure> {
        let api = self.api(kind);
        let params = ListParams::default().labels(labels);
        let listed = match tokio::time::timeout(LONGEST, api.list(&params)).await {
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => return Ok(Vec::new()),
            Ok(listed) => listed.map_err(|error| failed(&kind.resource.plural, &error))?,
            Err(_) => {
                return Err(Failure::timed_out(format_args!("{}: no answer", kind.resource.plural)));
            }
        };
        let typed = |mut object: Value| {
            // Lists leave them out.
            if let Some(map) = object.as_object_mut() {
                map.insert("apiVersion".to_owned(), kind.resource.api_version.clone().into());
                map.insert("kind".to_owned(), kind.resource.kind.clone().into());
            }
            object
        };
        let items =
            listed.items.into_iter().map(|item| Ok(typed(serde_json::to_value(item).map_err(Failure::new)?)));
        items.collect()
    }

    /// Deletes it and what belongs to it. False: it was not there.
    pub async fn delete(&self, object: &Value) -> Result<bool, Failure> {
        let api = self.api(&Self::of(object));
        let name = text(object, "/metadata/name");
        match tokio::time::timeout(LONGEST, api.delete(name, &DeleteParams::background())).await {
            Ok(Ok(_)) => Ok(true),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => Ok(false),
            Ok(Err(error)) => Err(failed(shown(object), &error)),
            Err(_) => Err(Failure::timed_out(format_args!("{}: no answer", shown(object)))),
        }
    }

    /// What is installed by this command, in the order of [`KINDS`], with what is rendered now and then.
    pub async fn installed(&self, namespace: &str) -> Result<Vec<Value>, Failure> {
        let labels = format!("{MANAGED}={MANAGED_BY},app.kubernetes.io/instance={RELEASE}");
        let mut found = Vec::new();
        for (version, kind) in KINDS.iter().chain(&OPTIONAL) {
            found.extend(self.list(&Kind::new(version, kind, namespace), &labels).await?);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chart;

    #[test]
    fn every_kind_that_the_chart_renders_is_found_again_to_be_removed() {
        let all = serde_json::json!({
            "cluster": "east", "trustDomain": "acme.example",
            "shared": { "enabled": true }, "inject": { "enabled": true }, "networkPolicy": { "enabled": true },
            "monitoring": { "serviceMonitor": { "enabled": true } },
            "gateway": { "exposure": "loadBalancer", "addresses": ["10.0.0.1:1", "10.0.0.2:1"] },
        });
        let rendered = chart::render(&chart::values(vec![all]).unwrap(), "mesh").unwrap();
        for object in &rendered {
            let (version, kind) = (text(object, "/apiVersion"), text(object, "/kind"));
            assert!(
                KINDS.iter().chain(&OPTIONAL).any(|known| *known == (version, kind)),
                "{version} {kind} is not removed by `tombolo uninstall`"
            );
            let namespaced = !text(object, "/metadata/namespace").is_empty();
            assert_eq!(namespaced, !CLUSTER_WIDE.contains(&kind), "{}", shown(object));
        }
        // A plural that is guessed wrong would never be found.
        let plural = |kind| Kind::new("networking.k8s.io/v1", kind, "x").resource.plural;
        assert_eq!(
            (plural("NetworkPolicy"), plural("Service")),
            ("networkpolicies".into(), "services".into())
        );
    }
}
