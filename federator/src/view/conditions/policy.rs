//! `FailoverPolicy`: `Accepted` (it holds for its target) and `ResolvedRefs` (what its tiers name exists).

use std::collections::BTreeMap;

use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::resource::failover_policy::Tier;
use tombolo_model::resource::{Condition, FailoverPolicySpec};

use super::super::View;
use super::super::supply::{self, Share};
use super::super::text::sentences;
use super::condition;
use crate::facts::StoredObject;
use crate::policies::policy_for;

/// KEP-5939: the importing cluster's own value.
const SAME: &str = "@SameAsImporter@";

pub fn of(view: &View<'_>, stored: &StoredObject, spec: &FailoverPolicySpec) -> Vec<Condition> {
    let namespace = stored.object.metadata.namespace.as_deref().unwrap_or_default();
    let target = format!("{namespace}/{}", spec.target_ref.name);
    let Ok(service) = target.parse::<ServiceKey>() else {
        let text = format!("spec.targetRef.name: {target} is no service");
        return vec![condition("Accepted", false, "Invalid", text)];
    };
    let shares = supply::shares(view, &service);
    vec![accepted(view, stored, &service, &shares), resolved(view, spec, &service, &shares)]
}

fn accepted(view: &View<'_>, stored: &StoredObject, service: &ServiceKey, shares: &[Share]) -> Condition {
    let name = &stored.object.metadata.name;
    if let Some((holds, _)) = policy_for(view.facts, service)
        && holds.object.metadata.name != *name
    {
        let older = &holds.object.metadata.name;
        let text = format!(
            "FailoverPolicy {older} is older and holds for {service}: delete one of them, or give one another spec.targetRef.name"
        );
        return condition("Accepted", false, "Conflicted", text);
    }
    if shares.is_empty() {
        let text = format!(
            "spec.targetRef.name: no cluster exports {service} to {}, and no sidecar here serves it",
            view.facts.cluster.name
        );
        return condition("Accepted", false, "TargetNotFound", text);
    }
    let holds = format!("holds for {service}");
    let text = sentences(std::iter::once(holds).chain(stored.object.warnings()));
    condition("Accepted", true, "Accepted", text)
}

/// What a tier names and there is not.
struct Missing {
    reason: &'static str,
    text: String,
}

fn resolved(view: &View<'_>, spec: &FailoverPolicySpec, service: &ServiceKey, shares: &[Share]) -> Condition {
    let missing: Vec<Missing> = spec
        .tiers
        .iter()
        .enumerate()
        .flat_map(|(index, tier)| {
            let path = format!("spec.tiers[{index}]");
            let mut missing = clusters(view, tier, &path, service, shares);
            missing.extend(properties(view, tier, &path));
            missing
        })
        .collect();
    match missing.first() {
        None => condition("ResolvedRefs", true, "ResolvedRefs", "every tier names what there is"),
        Some(first) => {
            let text = sentences(missing.iter().map(|missing| &missing.text));
            condition("ResolvedRefs", false, first.reason, text)
        }
    }
}

fn clusters(
    view: &View<'_>,
    tier: &Tier,
    path: &str,
    service: &ServiceKey,
    shares: &[Share],
) -> Vec<Missing> {
    let own = &view.facts.cluster.name;
    let named = tier.clusters.iter().enumerate().filter(|(_, name)| !matches!(name.as_str(), "@self" | "*"));
    named
        .filter_map(|(index, name)| {
            let path = format!("{path}.clusters[{index}]");
            let missing = |reason, text: String| Some(Missing { reason, text: format!("{path}: {text}") });
            let Ok(cluster) = name.parse::<ClusterName>() else {
                return missing("ClusterNotFound", format!("{name:?} is no cluster name"));
            };
            if cluster != *own && !view.facts.links.contains_key(&cluster) {
                let text = format!("{cluster} is not linked: run `tombolo link token {cluster}`");
                return missing("ClusterNotFound", text);
            }
            // Without any exporter the target is missing, and that is said once.
            if !shares.is_empty() && shares.iter().all(|share| share.cluster != cluster) {
                let text = if cluster == *own {
                    format!("no sidecar of this cluster serves {service}")
                } else {
                    format!("{cluster} does not export {service} to {own}")
                };
                return missing("NotExported", text);
            }
            None
        })
        .collect()
}

fn properties(view: &View<'_>, tier: &Tier, path: &str) -> Option<Missing> {
    if tier.match_properties.is_empty() {
        return None;
    }
    let missing =
        |reason, text: String| Some(Missing { reason, text: format!("{path}.matchProperties: {text}") });
    let own = &view.facts.cluster;
    let mut wanted = BTreeMap::new();
    for (key, value) in &tier.match_properties {
        let value = if value == SAME { own.properties.get(key) } else { Some(value) };
        let Some(value) = value else {
            let text = format!("{key} is {SAME}, but {} has no property {key}: give it one", own.name);
            return missing("PropertyNotFound", text);
        };
        wanted.insert(key, value);
    }
    let matches = |properties: &BTreeMap<String, String>| {
        wanted.iter().all(|(key, value)| properties.get(*key) == Some(*value))
    };
    // The peer's own record replaces what was told when the link was made.
    let peers = view.facts.links.values().map(|link| match view.facts.imports.get(&link.peer) {
        Some(import) if !import.properties.is_empty() => &import.properties,
        _ => &link.properties,
    });
    if matches(&own.properties) || peers.into_iter().any(matches) {
        return None;
    }
    let wanted = sentences(wanted.iter().map(|(key, value)| format!("{key}={value}")));
    missing("NoClusterMatches", format!("no linked cluster has {wanted}"))
}
