//! What `/metrics` shows of the Workload API. Labels are closed sets.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tonic::{Code, Status};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    call: &'static str,
    result: &'static str,
}

/// Handles of every metric; clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Metrics {
    calls: Family<CallLabels, Counter>,
    pub open: Gauge,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("tombolo_sidecar_workload_api");
        registry.register("calls", "Calls of the Workload API, by outcome", metrics.calls.clone());
        registry.register(
            "open_calls",
            "Calls and streams of the Workload API open now",
            metrics.open.clone(),
        );
        metrics
    }

    /// Counts a call; what it ended with.
    pub fn called<T>(&self, call: &'static str, outcome: Result<T, Status>) -> Result<T, Status> {
        let result = match outcome.as_ref().map_err(Status::code) {
            Ok(_) => "ok",
            Err(Code::InvalidArgument) => "invalid",
            Err(Code::PermissionDenied) => "denied",
            Err(Code::ResourceExhausted) => "exhausted",
            Err(_) => "unavailable",
        };
        self.calls.get_or_create_owned(&CallLabels { call, result }).inc();
        outcome
    }
}
