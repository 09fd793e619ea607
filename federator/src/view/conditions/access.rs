//! `AccessPolicy`: `Accepted` (it has a say about a service) and `ResolvedRefs` (what it names exists).

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use tombolo_model::names::{ClusterName, Namespace, ServiceKey};
use tombolo_model::resource::access_policy::Source;
use tombolo_model::resource::{AccessPolicySpec, Condition, Object};

use super::super::View;
use super::super::text::{listed, sentences};
use super::condition;
use crate::exports::{export_of, exports};
use crate::policies::properties_of;

/// Services shown in the status; the condition counts the rest.
const MAX_SHOWN: usize = 100;

/// Conditions, and the status: which services it has a say about, on how many endpoints.
pub fn of(view: &View<'_>, object: &Object, spec: &AccessPolicySpec) -> (Vec<Condition>, Value) {
    let namespace = object.metadata.namespace.as_deref().unwrap_or_default();
    let Ok(namespace) = namespace.parse::<Namespace>() else {
        let text = format!("metadata.namespace: {namespace:?} is no namespace");
        return (vec![condition("Accepted", false, "Invalid", text)], json!({}));
    };
    let selected = selected(view, &namespace, spec);
    let missing = missing(view, &namespace, spec, &selected);
    let endpoints: BTreeSet<_> =
        selected.iter().flat_map(|service| view.serving(service)).map(|member| member.block).collect();
    let shown: Vec<String> = selected.iter().take(MAX_SHOWN).map(ToString::to_string).collect();
    let status = json!({ "services": shown, "endpoints": endpoints.len() });
    (vec![accepted(object, spec, &namespace, &selected), resolved(&missing)], status)
}

/// The services that it selects and that somebody here serves, or that this cluster exports.
fn selected(view: &View<'_>, namespace: &Namespace, spec: &AccessPolicySpec) -> BTreeSet<ServiceKey> {
    let here = |service: &ServiceKey| service.namespace == *namespace && spec.selects(&service.name);
    let served = view.serving.keys().copied().filter(|service| here(service)).cloned();
    let exported = exports(view.facts).map(|export| export.service).filter(here);
    served.chain(exported).collect()
}

fn accepted(
    object: &Object,
    spec: &AccessPolicySpec,
    namespace: &Namespace,
    selected: &BTreeSet<ServiceKey>,
) -> Condition {
    if selected.is_empty() && spec.target_refs.is_some() {
        let text = format!(
            "spec.targetRefs: no sidecar of this cluster serves any of them in namespace {namespace}, and none is exported: the policy decides nothing"
        );
        return condition("Accepted", false, "TargetNotFound", text);
    }
    let about = match (selected.is_empty(), &spec.target_refs) {
        (true, _) => format!("nothing is served in namespace {namespace} yet"),
        (false, None) => {
            format!("{} about every service of namespace {namespace}: {}", spec.action, listed(selected))
        }
        (false, Some(_)) => format!("{} about {}", spec.action, listed(selected)),
    };
    let dry =
        spec.dry_run.then(|| "dry run: what it would deny is logged and counted, nothing is".to_owned());
    let text = sentences(std::iter::once(about).chain(dry).chain(object.warnings()));
    condition("Accepted", true, if spec.dry_run { "DryRun" } else { "Accepted" }, text)
}

/// What the policy names and there is not.
struct Missing {
    reason: &'static str,
    text: String,
}

fn resolved(missing: &[Missing]) -> Condition {
    match missing.first() {
        None => condition("ResolvedRefs", true, "ResolvedRefs", "everything that it names is there"),
        Some(first) => {
            let text = sentences(missing.iter().map(|missing| &missing.text));
            condition("ResolvedRefs", false, first.reason, text)
        }
    }
}

fn missing(
    view: &View<'_>,
    namespace: &Namespace,
    spec: &AccessPolicySpec,
    selected: &BTreeSet<ServiceKey>,
) -> Vec<Missing> {
    let mut missing = Vec::new();
    for (index, target) in spec.target_refs.iter().flatten().enumerate() {
        let known = target.name.parse().is_ok_and(|name| {
            let service = ServiceKey::new(namespace.clone(), name);
            !view.serving(&service).is_empty() || export_of(view.facts, &service).is_some()
        });
        if !known {
            let text = format!(
                "spec.targetRefs[{index}].name: no sidecar of this cluster serves {namespace}/{}, and it is not exported",
                target.name
            );
            missing.push(Missing { reason: "TargetNotFound", text });
        }
    }
    missing.extend(ports(view, spec, selected));
    for (path, source) in spec.sources() {
        clusters(view, &path, source, &mut missing);
        missing.extend(properties(view, &path, source));
    }
    missing
}

/// Ports that no selected service has; with no endpoint nobody knows.
fn ports(view: &View<'_>, spec: &AccessPolicySpec, selected: &BTreeSet<ServiceKey>) -> Vec<Missing> {
    let served: BTreeSet<u32> = selected
        .iter()
        .flat_map(|service| view.serving(service).iter().filter_map(|member| member.services.get(service)))
        .flat_map(|served| served.ports.iter().map(|port| u32::from(port.port)))
        .collect();
    let named = spec.ports.iter().flatten().enumerate();
    named
        .filter(|(_, port)| !served.is_empty() && !served.contains(port))
        .map(|(index, port)| Missing {
            reason: "PortNotFound",
            text: format!(
                "spec.ports[{index}]: none of the services has port {port}, but {}",
                listed(&served)
            ),
        })
        .collect()
}

fn clusters(view: &View<'_>, path: &str, source: &Source, missing: &mut Vec<Missing>) {
    let own = &view.facts.cluster.name;
    let unknown = |name: &str| {
        let cluster = name.parse::<ClusterName>().ok()?;
        let known = cluster == *own || view.facts.links.contains_key(&cluster);
        (!known).then(|| format!("{cluster} is not linked: run `tombolo link token {cluster}`"))
    };
    for (index, name) in source.clusters.iter().flatten().enumerate().filter(|(_, name)| *name != "@self") {
        if let Some(text) = unknown(name) {
            missing.push(Missing {
                reason: "ClusterNotFound",
                text: format!("{path}.clusters[{index}]: {text}"),
            });
        }
    }
    let domain = view.facts.cluster.trust_domain.as_str();
    for (index, id) in source.identities.iter().flatten().enumerate() {
        let path = format!("{path}.identities[{index}]");
        let mut parts = id.trim_start_matches("spiffe://").split('/');
        let found = parts.next().unwrap_or_default();
        if view.facts.federations.keys().any(|foreign| foreign.as_str() == found) {
            continue;
        }
        if found != domain {
            let text = format!(
                "{path}: nobody of trust domain {found:?} can call; this one is {domain}, and no TrustDomainFederation names it"
            );
            missing.push(Missing { reason: "TrustDomainNotFound", text });
            continue;
        }
        if let (Some("cluster"), Some(name)) = (parts.next(), parts.next())
            && let Some(text) = unknown(name)
        {
            missing.push(Missing { reason: "ClusterNotFound", text: format!("{path}: {text}") });
        }
    }
}

fn properties(view: &View<'_>, path: &str, source: &Source) -> Option<Missing> {
    let wanted = source.cluster_properties.as_ref()?;
    let matches = |properties: &BTreeMap<String, String>| {
        wanted.iter().all(|(key, value)| properties.get(key) == Some(value))
    };
    let mut peers = view.facts.links.values().map(|link| properties_of(view.facts, link));
    if matches(&view.facts.cluster.properties) || peers.any(matches) {
        return None;
    }
    let wanted = sentences(wanted.iter().map(|(key, value)| format!("{key}={value}")));
    let text = format!("{path}.clusterProperties: no linked cluster has {wanted}");
    Some(Missing { reason: "NoClusterMatches", text })
}
