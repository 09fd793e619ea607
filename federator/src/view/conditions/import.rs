//! `ServiceImport`: `Ready`, with each exporter's share.

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
    vec![ready]
}

/// Exports of the service that peers sent and we did not accept.
fn refusals(view: &View<'_>, service: &ServiceKey) -> String {
    let key = format!("export/{service}");
    let refused = view.facts.imports.iter().filter_map(|(peer, import)| {
        import.rejected.get(&key).map(|reason| format!("{peer}'s export is not accepted: {reason}"))
    });
    super::super::text::sentences(refused)
}
