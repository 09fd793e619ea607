//! `ServiceExport`: `Valid` (there is something to export), `Ready` (peers can use it), `Conflict` (exporters disagree).

use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::resource::service_export::{EXPORT_TO, ExportTo};
use tombolo_model::resource::{Condition, Spec};

use super::super::text::{listed, sentences};
use super::super::{View, links, members};
use super::condition;
use crate::exports::{Export, exporters, merge};
use crate::facts::KubernetesService;

pub fn of(view: &View<'_>, export: &Export<'_>) -> Vec<Condition> {
    let valid = match &export.stored.kubernetes {
        Some(found) => valid_in_kubernetes(&export.service, found),
        None => valid(view, &export.service),
    };
    let ready = if valid.status == "True" {
        ready(view, export)
    } else {
        condition("Ready", false, "Pending", "waits for something to export: see Valid")
    };
    vec![valid, ready, conflict(view, &export.service)]
}

fn valid(view: &View<'_>, service: &ServiceKey) -> Condition {
    let serving = view.serving(service).len();
    if serving > 0 {
        let (noun, verb) = if serving == 1 { ("endpoint", "serves") } else { ("endpoints", "serve") };
        return condition(
            "Valid",
            true,
            "Valid",
            format!("{serving} {noun} of this cluster {verb} {service}"),
        );
    }
    let refused = view.facts.registry.members.values().find_map(|member| {
        let reason = member.refused.get(&service.to_string())?;
        Some(format!(
            "{} offers {service}, which is not accepted: {reason}",
            members::holder(&member.spiffe_id)
        ))
    });
    let promised = || {
        view.facts.objects.values().find_map(|stored| {
            let Spec::Workload(spec) = &stored.object.spec else { return None };
            let metadata = &stored.object.metadata;
            let here = metadata.namespace.as_deref() == Some(service.namespace.as_str());
            let named = here && spec.services.iter().any(|offered| offered.name == service.name.as_str());
            let sidecar = spec.holder(&metadata.name);
            named.then(|| {
                format!(
                    "Workload {} is to serve {service}, but its sidecar {sidecar} does not",
                    metadata.name
                )
            })
        })
    };
    let text = refused.or_else(promised).unwrap_or_else(|| {
        format!(
            "no sidecar of this cluster serves {service}: start one with `tombolo sidecar --service {service}:PORT=HOST:PORT`"
        )
    });
    condition("Valid", false, "NoService", text)
}

/// What becomes of the clusters that an export names.
#[derive(Default)]
struct Reach {
    usable: Vec<ClusterName>,
    /// Not told of changes now.
    unheard: Vec<ClusterName>,
    blocked: Vec<String>,
    waiting: Vec<ClusterName>,
}

fn ready(view: &View<'_>, export: &Export<'_>) -> Condition {
    if let Err(name) = ExportTo::of(&export.stored.object.metadata) {
        let text = format!(
            "metadata.annotations[{EXPORT_TO}]: {name:?} is no cluster name: give names separated by commas, or *"
        );
        return condition("Ready", false, "Failed", text);
    }
    let targets = match &export.to {
        ExportTo::Everyone if view.facts.links.is_empty() => {
            let text = "no cluster is linked yet: run `tombolo link token PEER`";
            return condition("Ready", false, "Pending", text);
        }
        ExportTo::Everyone => view.facts.links.keys().cloned().collect(),
        ExportTo::Clusters(names) if names.is_empty() => {
            let text = format!("the annotation {EXPORT_TO} names no cluster: give names, or * for all");
            return condition("Ready", false, "Pending", text);
        }
        ExportTo::Clusters(names) => names.clone(),
    };
    let reach = reach(view, &export.service, &targets);
    let waiting = |reach: &Reach| {
        let names = listed(&reach.waiting);
        if view.facts.store_writable {
            format!("{names} can't call it yet: a handle is being allotted")
        } else {
            format!("{names} can't call it: no handle can be allotted while the store can't be written")
        }
    };
    let waiting = (!reach.waiting.is_empty()).then(|| waiting(&reach));
    if reach.usable.is_empty() {
        let failed = waiting.is_some() && !view.facts.store_writable;
        let text = sentences(waiting.into_iter().chain(reach.blocked));
        let text = if text.is_empty() { "names no cluster but this one".to_owned() } else { text };
        return condition("Ready", false, if failed { "Failed" } else { "Pending" }, text);
    }
    let unheard = (!reach.unheard.is_empty()).then(|| {
        format!("{} can't be told of changes now: see `tombolo get clusterlinks`", listed(&reach.unheard))
    });
    if export.kubernetes().is_some() {
        // Without counts: every one of them would be a write to the API server.
        let told = format!("exported to {}", listed(&reach.usable));
        let text = sentences(std::iter::once(told).chain(unheard).chain(waiting).chain(reach.blocked));
        return condition("Ready", true, "Exported", text);
    }
    let (healthy, total) = view.local_counts(&export.service);
    if healthy == 0 {
        let text = format!(
            "none of {total} endpoints is in rotation ({})",
            sentences(members::troubles(view, &export.service))
        );
        return condition("Ready", false, "Pending", text);
    }
    let usable = format!("{} can use {healthy} of {total} endpoints", listed(&reach.usable));
    let text = sentences(std::iter::once(usable).chain(unheard).chain(waiting).chain(reach.blocked));
    condition("Ready", true, "Exported", text)
}

fn reach(view: &View<'_>, service: &ServiceKey, targets: &[ClusterName]) -> Reach {
    let mut reach = Reach::default();
    for peer in targets.iter().filter(|peer| **peer != view.facts.cluster.name) {
        let standing = links::standing(view, peer);
        if matches!(standing.reason, "NotLinked" | "EndedByPeer" | "Recreated") {
            reach.blocked.push(standing.message);
        } else if view.facts.handle(peer, &service.to_string()).is_none() {
            reach.waiting.push(peer.clone());
        } else {
            reach.usable.push(peer.clone());
            if !standing.is_connected() {
                reach.unheard.push(peer.clone());
            }
        }
    }
    reach
}

/// Each property on which exporters disagree; several reasons are joined by commas, as the MCS API has it.
fn conflict(view: &View<'_>, service: &ServiceKey) -> Condition {
    let merged = merge(&exporters(view.facts, service, view.serving(service).iter().copied()));
    if merged.conflicts.is_empty() {
        return condition("Conflict", false, "NoConflicts", "no exporter disagrees");
    }
    condition("Conflict", true, &merged.reasons(), merged.messages())
}

/// By the word of Kubernetes: there is a service of a type that can be exported.
fn valid_in_kubernetes(service: &ServiceKey, found: &KubernetesService) -> Condition {
    match found {
        KubernetesService::Found(_) => {
            condition("Valid", true, "Valid", format!("Service {service} can be exported"))
        }
        KubernetesService::TooLarge(why) => {
            condition("Valid", false, "TooLarge", format!("ServiceExport {service}: {why}"))
        }
        KubernetesService::Missing => condition(
            "Valid",
            false,
            "NoService",
            format!("there is no Service {service}: make it, or delete this export"),
        ),
        KubernetesService::ExternalName => condition(
            "Valid",
            false,
            "InvalidServiceType",
            format!(
                "Service {service} is of type ExternalName, a name elsewhere: it has no endpoints to export"
            ),
        ),
    }
}
