//! What `/metrics` shows of the work with Kubernetes. Labels are closed sets.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::write::Failure;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StepLabels {
    result: &'static str,
}

/// Handles of every metric; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    steps: Family<StepLabels, Counter>,
    pub(super) leads: Gauge,
    pub(super) watch_errors: Counter,
    pub(super) waiting: Gauge,
    status_writes: Family<StepLabels, Counter>,
    pub(super) refused_objects: Gauge,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("tombolo_federator_kubernetes");
        registry.register("steps", "Services written to the API server, by outcome", metrics.steps.clone());
        registry.register("leads", "1 while this federator is the one that writes", metrics.leads.clone());
        registry.register(
            "watch_errors",
            "Watches that broke or could not begin",
            metrics.watch_errors.clone(),
        );
        registry.register(
            "waiting_services",
            "Services that are to be looked at or tried again",
            metrics.waiting.clone(),
        );
        registry.register(
            "status_writes",
            "Statuses of our own kinds written to the API server, by outcome",
            metrics.status_writes.clone(),
        );
        registry.register(
            "refused_objects",
            "Objects of our own kinds in Kubernetes that are not accepted",
            metrics.refused_objects.clone(),
        );
        metrics
    }

    pub(super) fn status_write(&self, failure: Option<&Failure>) {
        self.status_writes.get_or_create_owned(&StepLabels { result: result(failure) }).inc();
    }

    pub(super) fn step(&self, failure: Option<&Failure>) {
        self.steps.get_or_create_owned(&StepLabels { result: result(failure) }).inc();
    }
}

fn result(failure: Option<&Failure>) -> &'static str {
    match failure {
        None => "ok",
        Some(Failure::Away(_)) => "away",
        Some(Failure::Refused(_)) => "refused",
        Some(Failure::Unauthenticated(_)) => "unauthenticated",
    }
}
