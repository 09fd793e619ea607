//! Definitions of `ClusterProperty` (about.k8s.io, KEP-2149) and `ClusterProfile` (multicluster.x-k8s.io, KEP-4322): for
//! clusters that have none. They are the SIG's, and other controllers' too: one that somebody else installed is left alone.

use schemars::JsonSchema;
use serde_json::{Value, json};

use super::own::RELEASE;
use super::{Condition, age, column, condition, schema};

#[derive(JsonSchema)]
#[allow(dead_code)] // read by the schema alone
struct ClusterPropertyBody {
    spec: Option<ClusterPropertySpec>,
}

#[derive(JsonSchema)]
#[allow(dead_code)]
struct ClusterPropertySpec {
    #[schemars(length(min = 1, max = 128_000))]
    value: String,
}

/// A cluster of the cluster set, as its manager sees it.
#[derive(JsonSchema)]
#[allow(dead_code)]
struct ClusterProfileBody {
    spec: Option<ClusterProfileSpec>,
    status: Option<ClusterProfileStatus>,
}

#[derive(JsonSchema)]
#[allow(dead_code)]
#[schemars(rename_all = "camelCase")]
struct ClusterProfileSpec {
    display_name: Option<String>,
    #[schemars(extend("x-kubernetes-validations" = [{ "rule": "self == oldSelf", "message": "clusterManager is immutable" }]))]
    cluster_manager: ClusterManager,
}

#[derive(JsonSchema)]
#[allow(dead_code)]
struct ClusterManager {
    name: String,
}

#[derive(JsonSchema)]
#[allow(dead_code)]
#[schemars(rename_all = "camelCase", extend("x-kubernetes-preserve-unknown-fields" = true))]
struct ClusterProfileStatus {
    /// `ControlPlaneHealthy` and `Joined`.
    conditions: Option<Vec<Condition>>,
    version: Option<ClusterVersion>,
    properties: Option<Vec<Property>>,
}

#[derive(JsonSchema)]
#[allow(dead_code)]
struct ClusterVersion {
    kubernetes: Option<String>,
}

#[derive(JsonSchema)]
#[allow(dead_code)]
struct Property {
    #[schemars(length(min = 1, max = 253))]
    name: String,
    #[schemars(length(min = 1, max = 1024))]
    value: String,
}

/// Both.
pub fn all() -> Vec<Value> {
    let mut property = schema::<ClusterPropertyBody>();
    let mut profile = schema::<ClusterProfileBody>();
    property["required"] = json!(["spec"]);
    profile["required"] = json!(["spec"]);
    let property = definition(
        ("about.k8s.io", "ClusterProperty", "clusterproperties", "Cluster"),
        &["v1alpha1", "v1beta1"],
        &property,
        vec![column("Value", ".spec.value"), age()],
    );
    let profile = definition(
        ("multicluster.x-k8s.io", "ClusterProfile", "clusterprofiles", "Namespaced"),
        &["v1alpha1", "v1alpha2"],
        &profile,
        vec![
            condition("Joined"),
            condition("ControlPlaneHealthy"),
            column("Version", ".status.version.kubernetes"),
            age(),
        ],
    );
    vec![property, profile]
}

/// The last version is stored.
fn definition(
    (group, kind, plural, scope): (&str, &str, &str, &str),
    versions: &[&str],
    schema: &Value,
    columns: Vec<Value>,
) -> Value {
    let version = |name: &&str| {
        json!({
            "name": name, "served": true, "storage": versions.last() == Some(name),
            "schema": { "openAPIV3Schema": schema },
            "subresources": { "status": {} },
            "additionalPrinterColumns": columns,
        })
    };
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{plural}.{group}"), "labels": RELEASE.labels(),
            "annotations": { "api-approved.kubernetes.io": "https://github.com/kubernetes/enhancements/pull/2149" },
        },
        "spec": {
            "group": group, "scope": scope,
            "names": { "kind": kind, "listKind": format!("{kind}List"), "plural": plural, "singular": kind.to_ascii_lowercase() },
            "versions": versions.iter().map(version).collect::<Vec<_>>(),
        },
    })
}

/// Whether an installed definition is one of these, and not from us.
pub fn is_foreign(installed: &Value, ours: &Value) -> bool {
    let is_of_sig = ours
        .pointer("/spec/names/kind")
        .is_some_and(|kind| kind == "ClusterProperty" || kind == "ClusterProfile");
    let labels = installed.pointer("/metadata/labels");
    is_of_sig && labels.and_then(|labels| labels.get(RELEASE.release.0)).is_none()
}
