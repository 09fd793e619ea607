//! What users write: typed objects, parsed strictly, every error naming the field, the value and what would be accepted.
//!
//! The same documents work on Kubernetes (custom resources) and outside. Text formats are the callers' business:
//! [`Object::from_json`] takes a JSON value. Sizes are bounded by [`MAX_OBJECT_BYTES`] and [`MAX_OBJECTS`].

pub mod access_policy;
pub mod cluster_link;
pub mod condition;
pub mod duration;
pub mod failover_policy;
pub mod fields;
pub mod join_policy;
pub mod revocation;
pub mod schema;
pub mod service_export;
pub mod service_import;
pub mod trust_domain_federation;
pub mod workload;

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::names::{Namespace, ObjectName};
pub use access_policy::AccessPolicySpec;
pub use cluster_link::ClusterLinkSpec;
pub use condition::Condition;
pub use duration::DurationText;
pub use failover_policy::FailoverPolicySpec;
pub use fields::{FieldError, ObjectError};
pub use join_policy::JoinPolicySpec;
pub use revocation::{RevocationSpec, RevocationTarget};
pub use service_export::ServiceExportSpec;
pub use service_import::ServiceImportSpec;
pub use trust_domain_federation::TrustDomainFederationSpec;
pub use workload::WorkloadSpec;

/// etcd's own limit is 1.5 MB.
pub const MAX_OBJECT_BYTES: usize = 1024 * 1024;
/// Objects in one apply.
pub const MAX_OBJECTS: usize = 10_000;
/// `AccessPolicy` objects of one namespace: all that select a service are weighed for each of its streams.
pub const MAX_ACCESS_POLICIES: usize = 128;

const TOMBOLO: &[&str] = &["tombolo.dev/v1alpha1"];
const MCS: &[&str] = &["multicluster.x-k8s.io/v1alpha1", "multicluster.x-k8s.io/v1beta1"];

/// A kind of object and the names it goes by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KindInfo {
    pub kind: &'static str,
    pub plural: &'static str,
    pub short: &'static [&'static str],
    pub namespaced: bool,
    pub api_versions: &'static [&'static str],
}

/// Every kind there is.
pub const KINDS: &[KindInfo] = &[
    KindInfo {
        kind: "Workload",
        plural: "workloads",
        short: &["wl"],
        namespaced: true,
        api_versions: TOMBOLO,
    },
    KindInfo {
        kind: "ServiceExport",
        plural: "serviceexports",
        short: &["svcex", "svcexport"],
        namespaced: true,
        api_versions: MCS,
    },
    KindInfo {
        kind: "ServiceImport",
        plural: "serviceimports",
        short: &["svcim", "svcimport"],
        namespaced: true,
        api_versions: MCS,
    },
    KindInfo {
        kind: "FailoverPolicy",
        plural: "failoverpolicies",
        short: &["fop"],
        namespaced: true,
        api_versions: TOMBOLO,
    },
    KindInfo {
        kind: "AccessPolicy",
        plural: "accesspolicies",
        short: &["ap"],
        namespaced: true,
        api_versions: TOMBOLO,
    },
    KindInfo {
        kind: "ClusterLink",
        plural: "clusterlinks",
        short: &["clink"],
        namespaced: false,
        api_versions: TOMBOLO,
    },
    KindInfo {
        kind: "Revocation",
        plural: "revocations",
        short: &["rev"],
        namespaced: false,
        api_versions: TOMBOLO,
    },
    KindInfo {
        kind: "JoinPolicy",
        plural: "joinpolicies",
        short: &["jp"],
        namespaced: false,
        api_versions: TOMBOLO,
    },
    KindInfo {
        kind: "TrustDomainFederation",
        plural: "trustdomainfederations",
        short: &["tdf"],
        namespaced: false,
        api_versions: TOMBOLO,
    },
];

impl KindInfo {
    /// By kind, singular, plural or short name, in any case.
    pub fn find(name: &str) -> Option<&'static KindInfo> {
        let name = name.to_ascii_lowercase();
        KINDS.iter().find(|k| {
            k.kind.to_ascii_lowercase() == name || k.plural == name || k.short.contains(&name.as_str())
        })
    }
}

/// The best match for a mistyped word, if there is a close one.
pub fn suggestion<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let scored =
        known.into_iter().map(|k| (strsim::jaro_winkler(&word.to_lowercase(), &k.to_lowercase()), k));
    scored.filter(|(score, _)| *score > 0.8).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, k)| k)
}

/// `metadata`. What Kubernetes adds is kept, not interpreted.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ObjectMeta {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creation_timestamp: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_version: Option<String>,
    #[serde(default, skip_serializing)]
    managed_fields: Option<Value>,
    #[serde(default, skip_serializing)]
    owner_references: Option<Value>,
    #[serde(default, skip_serializing)]
    finalizers: Option<Value>,
}

/// An object's spec, by kind.
#[derive(Clone, PartialEq, Debug)]
pub enum Spec {
    Workload(WorkloadSpec),
    ServiceExport(ServiceExportSpec),
    ServiceImport(ServiceImportSpec),
    FailoverPolicy(FailoverPolicySpec),
    AccessPolicy(AccessPolicySpec),
    ClusterLink(ClusterLinkSpec),
    Revocation(RevocationSpec),
    JoinPolicy(JoinPolicySpec),
    TrustDomainFederation(TrustDomainFederationSpec),
}

/// A validated object. Its status is not read from users: federators fill it in.
#[derive(Clone, PartialEq, Debug)]
pub struct Object {
    pub api_version: String,
    pub metadata: ObjectMeta,
    pub spec: Spec,
}

/// What identifies an object within one cluster.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ObjectKey {
    pub kind: &'static str,
    /// Empty for cluster-scoped kinds.
    pub namespace: String,
    pub name: String,
}

impl std::fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{}/{}", self.kind, self.name)
        } else {
            write!(f, "{}/{}/{}", self.kind, self.namespace, self.name)
        }
    }
}

impl Object {
    pub fn kind(&self) -> &'static str {
        match self.spec {
            Spec::Workload(_) => "Workload",
            Spec::ServiceExport(_) => "ServiceExport",
            Spec::ServiceImport(_) => "ServiceImport",
            Spec::FailoverPolicy(_) => "FailoverPolicy",
            Spec::AccessPolicy(_) => "AccessPolicy",
            Spec::ClusterLink(_) => "ClusterLink",
            Spec::Revocation(_) => "Revocation",
            Spec::JoinPolicy(_) => "JoinPolicy",
            Spec::TrustDomainFederation(_) => "TrustDomainFederation",
        }
    }

    pub fn key(&self) -> ObjectKey {
        ObjectKey {
            kind: self.kind(),
            namespace: self.metadata.namespace.clone().unwrap_or_default(),
            name: self.metadata.name.clone(),
        }
    }

    /// Parses and validates; all field errors of the spec are reported together.
    pub fn from_json(value: Value) -> Result<Self, ObjectError> {
        Self::read(value, true)
    }

    /// Parses what is kept elsewhere, and was admitted there: types hold, rules between fields may not.
    pub fn from_json_unchecked(value: Value) -> Result<Self, ObjectError> {
        Self::read(value, false)
    }

    fn read(value: Value, checked: bool) -> Result<Self, ObjectError> {
        let Value::Object(mut document) = value else {
            return Err(ObjectError::document("an object needs apiVersion, kind and metadata"));
        };
        let text = |field: &str| document.get(field).and_then(Value::as_str).map(str::to_owned);
        let kind = text("kind").ok_or_else(|| ObjectError::document("kind is missing"))?;
        let api_version = text("apiVersion").ok_or_else(|| ObjectError::document("apiVersion is missing"))?;
        let Some(info) = KINDS.iter().find(|k| k.kind == kind) else {
            let known = KINDS.iter().map(|k| k.kind);
            return Err(ObjectError::unknown_kind(&kind, suggestion(&kind, known.clone()), known));
        };
        let name = document.get("metadata").and_then(|m| m.get("name")).and_then(Value::as_str).unwrap_or("");
        let subject = format!("{kind}/{name}");
        let fail = |errors: Vec<FieldError>| Err(ObjectError::fields(&subject, errors));
        if !info.api_versions.contains(&api_version.as_str()) {
            return fail(vec![FieldError::new("apiVersion", &api_version, info.api_versions.join(" or "))]);
        }
        let metadata = document.remove("metadata").unwrap_or(Value::Null);
        let mut metadata: ObjectMeta = match typed("metadata", metadata) {
            Ok(metadata) => metadata,
            Err(error) => return fail(vec![error]),
        };
        let spec = document.remove("spec").unwrap_or_else(|| Value::Object(Default::default()));
        document.remove("status");
        if let Some(field) = document.keys().find(|k| !matches!(k.as_str(), "kind" | "apiVersion")) {
            return fail(vec![FieldError::unknown(
                field,
                ["apiVersion", "kind", "metadata", "spec", "status"],
            )]);
        }
        let mut errors = Vec::new();
        if let Err(error) = metadata.name.parse::<ObjectName>() {
            errors.push(FieldError::new("metadata.name", &metadata.name, error));
        }
        if info.namespaced {
            let namespace = metadata.namespace.get_or_insert_with(|| "default".to_owned());
            if let Err(error) = namespace.parse::<Namespace>() {
                errors.push(FieldError::new("metadata.namespace", namespace.clone(), error));
            }
        } else if let Some(namespace) = &metadata.namespace {
            errors.push(FieldError::new(
                "metadata.namespace",
                namespace,
                "absent: this kind belongs to the cluster",
            ));
        }
        let spec = match info.kind {
            "Workload" => typed("spec", spec).map(Spec::Workload),
            "ServiceExport" => typed("spec", spec).map(Spec::ServiceExport),
            "ServiceImport" => typed("spec", spec).map(Spec::ServiceImport),
            "FailoverPolicy" => typed("spec", spec).map(Spec::FailoverPolicy),
            "AccessPolicy" => typed("spec", spec).map(Spec::AccessPolicy),
            "Revocation" => typed("spec", spec).map(Spec::Revocation),
            "JoinPolicy" => typed("spec", spec).map(Spec::JoinPolicy),
            "TrustDomainFederation" => typed("spec", spec).map(Spec::TrustDomainFederation),
            _ => typed("spec", spec).map(Spec::ClusterLink),
        };
        let spec = match spec {
            Ok(spec) => spec,
            Err(error) => {
                errors.push(error);
                return fail(errors);
            }
        };
        match &spec {
            _ if !checked => {}
            Spec::Workload(spec) => spec.validate(&mut errors),
            Spec::ServiceExport(spec) => spec.validate(&metadata, &mut errors),
            Spec::ServiceImport(_) => {}
            Spec::FailoverPolicy(spec) => spec.validate(&mut errors),
            Spec::AccessPolicy(spec) => {
                spec.validate(metadata.namespace.as_deref().unwrap_or_default(), &mut errors);
            }
            Spec::ClusterLink(spec) => spec.validate(&mut errors),
            Spec::Revocation(spec) => spec.validate(&mut errors),
            Spec::JoinPolicy(spec) => spec.validate(&mut errors),
            Spec::TrustDomainFederation(spec) => spec.validate(&mut errors),
        }
        if errors.is_empty() { Ok(Self { api_version, metadata, spec }) } else { fail(errors) }
    }

    /// As users see it; `status` is added by whoever knows it.
    pub fn to_json(&self) -> Value {
        let spec = match &self.spec {
            Spec::Workload(spec) => serde_json::to_value(spec),
            Spec::ServiceExport(spec) => serde_json::to_value(spec),
            Spec::ServiceImport(spec) => serde_json::to_value(spec),
            Spec::FailoverPolicy(spec) => serde_json::to_value(spec),
            Spec::AccessPolicy(spec) => serde_json::to_value(spec),
            Spec::ClusterLink(spec) => serde_json::to_value(spec),
            Spec::Revocation(spec) => serde_json::to_value(spec),
            Spec::JoinPolicy(spec) => serde_json::to_value(spec),
            Spec::TrustDomainFederation(spec) => serde_json::to_value(spec),
        };
        serde_json::json!({
            "apiVersion": self.api_version,
            "kind": self.kind(),
            "metadata": self.metadata,
            "spec": spec.unwrap_or_default(),
        })
    }

    /// What is accepted but has no effect yet: said, not silently ignored.
    pub fn warnings(&self) -> Vec<String> {
        match &self.spec {
            Spec::FailoverPolicy(spec) => spec.warnings(),
            Spec::AccessPolicy(spec) => spec.warnings(),
            Spec::TrustDomainFederation(spec) => spec.warnings(),
            _ => Vec::new(),
        }
    }
}

/// Deserialises with an error that carries the field's path.
fn typed<T: DeserializeOwned>(root: &str, value: Value) -> Result<T, FieldError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let path = if path == "." { root.to_owned() } else { format!("{root}.{path}") };
        FieldError::from_serde(&path, &error.into_inner().to_string())
    })
}

#[cfg(test)]
mod tests;
