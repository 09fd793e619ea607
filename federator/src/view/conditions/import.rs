//! `ServiceImport`: `Ready`, with each exporter's share; `Addressed`, when it lacks a virtual address.

use tombolo_model::names::ServiceKey;
use tombolo_model::resource::Condition;

use super::super::View;
use super::super::supply::{self, Share};
use super::condition;

pub fn of(view: &View<'_>, service: &ServiceKey) -> Vec<Condition> {
    let shares = supply::shares(view, service);
    let pending = |text: String| condition("Ready", false, "Pending", text);
    let sentence = supply::sentence(&shares);
    let counting: Vec<&Share> = shares.iter().filter(|share| share.state.counts()).collect();
    let ready = if shares.is_empty() {
        let refused = refusals(view, service);
        if refused.is_empty() {
            pending(format!("no cluster exports {service} to {}", view.facts.cluster.name))
        } else {
            pending(refused)
        }
    } else if counting.is_empty() {
        pending(format!("no exporter is heard ({sentence}): see `tombolo get clusterlinks`"))
    } else if counting.iter().all(|share| share.healthy == 0) {
        pending(format!("no endpoint is healthy ({sentence}): look at the exporters' `tombolo status`"))
    } else {
        condition("Ready", true, "Ready", sentence)
    };
    std::iter::once(ready).chain(unaddressed(view, service)).collect()
}

/// `Addressed` is false when no virtual address is left for the service; nothing is said of those that have theirs.
fn unaddressed(view: &View<'_>, service: &ServiceKey) -> Option<Condition> {
    let addresses = &view.facts.addresses;
    addresses.wanting.contains(service).then(|| {
        let text = format!(
            "the virtual range {} is used up ({} services have an address, {} addresses are held for a day after their service): give the federator a larger --virtual-range",
            addresses.ranges,
            addresses.of.len(),
            addresses.held
        );
        condition("Addressed", false, "RangeExhausted", text)
    })
}

/// Exports of the service that peers sent and we did not accept.
fn refusals(view: &View<'_>, service: &ServiceKey) -> String {
    let key = format!("export/{service}");
    let refused = view.facts.imports.iter().filter_map(|(peer, import)| {
        import.rejected.get(&key).map(|reason| format!("{peer}'s export is not accepted: {reason}"))
    });
    super::super::text::sentences(refused)
}
