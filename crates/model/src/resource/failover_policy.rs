//! `FailoverPolicy` (tombolo.dev): ordered tiers of clusters for one service, and when to move between them.

use std::collections::BTreeMap;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::duration::{DurationText, Percent};
use super::fields::FieldError;
use super::schema::{LABEL, TIER_CLUSTER};
use crate::names::ClusterName;

const MAX_TIERS: usize = 16;

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [
    { "rule": "(has(self.failback) ? double(self.failback.whenHealthyAbove.replace('%', '')) : 50.0) >= (has(self.failover) ? double(self.failover.whenHealthyBelow.replace('%', '')) : 0.0)",
      "message": "failback.whenHealthyAbove (50% when absent) must be at least failover.whenHealthyBelow, or traffic would move back and forth",
      "fieldPath": ".failback" },
]))]
pub struct FailoverPolicySpec {
    pub target_ref: TargetRef,
    #[schemars(length(min = 1, max = 16))]
    pub tiers: Vec<Tier>,
    #[serde(default)]
    pub failover: Failover,
    #[serde(default)]
    pub failback: Failback,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spill: Option<Spill>,
}

/// The service that the policy is for; in the policy's namespace.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TargetRef {
    /// `Service` (its ordinary name fails over too) or `ServiceImport`.
    #[schemars(extend("enum" = ["Service", "ServiceImport"]))]
    pub kind: String,
    #[schemars(length(max = 63), regex(pattern = LABEL))]
    pub name: String,
}

/// Clusters that serve together; a cluster belongs to the first tier that selects it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [
    { "rule": "(has(self.clusters) && size(self.clusters) > 0) || (has(self.matchProperties) && size(self.matchProperties) > 0)",
      "message": "a tier names clusters, or matchProperties", "fieldPath": ".clusters" },
    { "rule": "!has(self.weights) || (has(self.matchProperties) && size(self.matchProperties) > 0) || self.weights.all(w, has(self.clusters) && self.clusters.exists(c, c == w || c == '*'))",
      "message": "weights are for clusters of this tier only", "fieldPath": ".weights" },
    { "rule": "!has(self.weights) || size(self.weights) == 0 || self.weights.exists(w, self.weights[w] > 0)",
      "message": "at least one weight is above 0", "fieldPath": ".weights" },
    { "rule": "!has(self.weights) || self.weights.all(w, self.weights[w] <= 1000000)",
      "message": "weights are 0 to 1000000", "fieldPath": ".weights" },
]))]
pub struct Tier {
    /// Names; `@self` is the importing cluster, `*` every cluster.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), inner(length(max = 127), regex(pattern = TIER_CLUSTER)))]
    pub clusters: Vec<String>,
    /// Per cluster name; clusters without one get nothing when any is given.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 100))]
    pub weights: BTreeMap<String, u32>,
    /// After KEP-5939: cluster properties that must match; `@SameAsImporter@` is the importing cluster's value.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub match_properties: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Failover {
    pub when_healthy_below: Percent,
    #[serde(default)]
    pub r#for: DurationText,
}

impl Default for Failover {
    /// Leave a tier when its last endpoint is gone.
    fn default() -> Self {
        Self { when_healthy_below: Percent::new_const(0), r#for: DurationText(Duration::ZERO) }
    }
}

impl Failover {
    pub fn hold(&self) -> Duration {
        self.r#for.0
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Failback {
    pub when_healthy_above: Percent,
    #[serde(default = "Failback::default_hold")]
    pub r#for: DurationText,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ramp: Option<DurationText>,
}

impl Default for Failback {
    fn default() -> Self {
        Self { when_healthy_above: Percent::new_const(50), r#for: Self::default_hold(), ramp: None }
    }
}

impl Failback {
    /// Long enough that a crash loop does not take traffic back.
    fn default_hold() -> DurationText {
        DurationText(Duration::from_secs(30))
    }
    pub fn hold(&self) -> Duration {
        self.r#for.0
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spill {
    #[schemars(range(min = 1))]
    pub max_requests_per_second: u32,
}

impl FailoverPolicySpec {
    /// What holds for a service without a policy: the own cluster first, then every other.
    pub fn standard(name: &str) -> Self {
        let tier = |cluster: &str| Tier { clusters: vec![cluster.into()], ..Tier::default() };
        Self {
            target_ref: TargetRef { kind: "ServiceImport".into(), name: name.into() },
            tiers: vec![tier("@self"), tier("*")],
            ..Self::default()
        }
    }

    pub(super) fn validate(&self, errors: &mut Vec<FieldError>) {
        if !matches!(self.target_ref.kind.as_str(), "Service" | "ServiceImport") {
            errors.push(FieldError::new(
                "spec.targetRef.kind",
                &self.target_ref.kind,
                "Service or ServiceImport",
            ));
        }
        if let Err(error) = self.target_ref.name.parse::<crate::names::ServiceName>() {
            errors.push(FieldError::new("spec.targetRef.name", &self.target_ref.name, error));
        }
        if self.tiers.is_empty() || self.tiers.len() > MAX_TIERS {
            errors.push(FieldError::new("spec.tiers", self.tiers.len(), format!("1 to {MAX_TIERS} tiers")));
        }
        for (index, tier) in self.tiers.iter().enumerate() {
            tier.validate(&format!("spec.tiers[{index}]"), errors);
        }
        if self.failback.when_healthy_above < self.failover.when_healthy_below {
            let path = "spec.failback.whenHealthyAbove";
            let accepted = format!(
                "at least spec.failover.whenHealthyBelow ({}), or traffic would move back and forth",
                self.failover.when_healthy_below
            );
            errors.push(FieldError::new(path, self.failback.when_healthy_above, accepted));
        }
        if self.spill.as_ref().is_some_and(|s| s.max_requests_per_second == 0) {
            errors.push(FieldError::new("spec.spill.maxRequestsPerSecond", 0, "at least 1"));
        }
    }

    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.failback.ramp.is_some() {
            warnings.push("spec.failback.ramp is stored, but failback is not ramped yet".to_owned());
        }
        if self.spill.is_some() {
            warnings.push("spec.spill is stored, but not enforced yet".to_owned());
        }
        warnings
    }
}

impl Tier {
    fn validate(&self, path: &str, errors: &mut Vec<FieldError>) {
        if self.clusters.is_empty() && self.match_properties.is_empty() {
            errors.push(FieldError::missing(format!("{path}.clusters"), "cluster names, or matchProperties"));
        }
        for (index, cluster) in self.clusters.iter().enumerate() {
            if !matches!(cluster.as_str(), "@self" | "*")
                && let Err(error) = cluster.parse::<ClusterName>()
            {
                let accepted = format!("a cluster name, @self or * ({error})");
                errors.push(FieldError::new(format!("{path}.clusters[{index}]"), cluster, accepted));
            }
        }
        for (cluster, weight) in &self.weights {
            let path = format!("{path}.weights.{cluster}");
            let named = self.clusters.iter().any(|c| c == cluster || c == "*");
            if !named && self.match_properties.is_empty() {
                errors.push(FieldError::new(path, weight, "weights for clusters of this tier only"));
            } else if *weight > 1_000_000 {
                errors.push(FieldError::new(path, weight, "0 to 1000000"));
            }
        }
        if !self.weights.is_empty() && self.weights.values().all(|w| *w == 0) {
            errors.push(FieldError::new(format!("{path}.weights"), "0", "at least one weight above 0"));
        }
    }
}
