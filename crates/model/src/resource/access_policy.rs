//! `AccessPolicy` (tombolo.dev): who may open streams to services of the policy's namespace, after the shape of GEP-3779.
//!
//! What a policy means is [`crate::access`]'s; reading it there is also its validation, so that nothing is accepted that
//! can't be decided by. Lists that are given but empty, and `null`, are refused: in an authorisation policy "nobody" and
//! "everybody" must not be one template mistake apart.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::failover_policy::TargetRef;
use super::fields::FieldError;
use super::schema::{CLUSTER_OR_SELF, IDENTITY_PATTERN, LABEL};
use crate::access;
use crate::names::{Namespace, ServiceName};

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("required" = ["action"], "x-kubernetes-validations" = [
    { "rule": "!has(self.targetRefs) || self.targetRefs.all(t, t.kind == 'Service')",
      "message": "targetRefs are of kind Service", "fieldPath": ".targetRefs" },
]))]
pub struct AccessPolicySpec {
    /// Services of the policy's namespace; absent: every one.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub target_refs: Option<Vec<TargetRef>>,
    /// Ports of those services, as callers name them; absent: every one.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), inner(range(min = 1, max = 65535)))]
    pub ports: Option<Vec<u32>>,
    /// `ALLOW` or `DENY`.
    #[serde(default)]
    #[schemars(extend("enum" = ["ALLOW", "DENY"]))]
    pub action: String,
    /// One that matches is enough. None at all: nobody is allowed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub rules: Vec<Rule>,
    /// What it would deny is logged and counted; nothing is denied.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [
    { "rule": "!has(self.requests)",
      "message": "is reserved: requests are not authorised one by one yet; leave it out", "fieldPath": ".requests" },
]))]
pub struct Rule {
    /// Callers; one source that matches is enough. Absent: every caller.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub from: Option<Vec<Source>>,
    /// Methods, paths and headers: reserved, refused until requests are authorised one by one.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "super::schema::anything")]
    pub requests: Option<Value>,
}

/// Callers. Each field that is given must match, by one of its values.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [
    { "rule": "has(self.identities) || has(self.clusters) || has(self.namespaces) || has(self.clusterProperties)",
      "message": "a source says who: give identities, clusters, namespaces or clusterProperties; for every caller leave from out" },
]))]
pub struct Source {
    /// SPIFFE IDs; one that ends in `/*` stands for all below.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), inner(length(max = 2048), regex(pattern = IDENTITY_PATTERN)))]
    pub identities: Option<Vec<String>>,
    /// Names; `@self` is the cluster of the service.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), inner(length(max = 127), regex(pattern = CLUSTER_OR_SELF)))]
    pub clusters: Option<Vec<String>>,
    /// Of pods; a machine has none.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), inner(length(max = 63), regex(pattern = LABEL)))]
    pub namespaces: Option<Vec<String>>,
    /// Properties that the caller's cluster must have, all of them.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minProperties" = 1, "maxProperties" = 256))]
    pub cluster_properties: Option<BTreeMap<String, String>>,
}

/// `null` is refused: a template's empty value must not widen a policy.
fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

impl AccessPolicySpec {
    /// Whether a service of the policy's namespace is a target.
    pub fn selects(&self, service: &ServiceName) -> bool {
        self.target_refs
            .as_ref()
            .is_none_or(|targets| targets.iter().any(|target| target.name == service.as_str()))
    }

    /// Every source of every rule, with its path.
    pub fn sources(&self) -> impl Iterator<Item = (String, &Source)> {
        self.rules.iter().enumerate().flat_map(|(rule, Rule { from, .. })| {
            let sources = from.iter().flatten().enumerate();
            sources.map(move |(index, source)| (format!("spec.rules[{rule}].from[{index}]"), source))
        })
    }

    /// Whether any source asks for properties of the caller's cluster.
    pub fn uses_properties(&self) -> bool {
        self.rules.iter().flat_map(|rule| rule.from.iter().flatten()).any(|s| s.cluster_properties.is_some())
    }

    pub(super) fn validate(&self, namespace: &str, errors: &mut Vec<FieldError>) {
        // A namespace that is none has been reported; any other will do to go on with.
        let namespace = namespace.parse().or_else(|_| "default".parse::<Namespace>());
        if let Ok(namespace) = namespace {
            access::Policy::read("", &namespace, self, errors);
        }
    }

    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.action == "ALLOW" && self.rules.is_empty() && !self.dry_run {
            warnings.push(
                "spec.rules is empty: nobody is admitted but by another ALLOW policy of the same service"
                    .to_owned(),
            );
        }
        warnings
    }
}

#[cfg(test)]
mod tests;
