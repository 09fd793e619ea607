//! What `/metrics` shows of injection. Labels are closed sets.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    result: &'static str,
}

/// Handles of every metric; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    reviews: Family<Labels, Counter>,
    turned_away: Family<Labels, Counter>,
    /// When the certificate that is shown ends, Unix seconds.
    pub(super) certificate_ends: Gauge,
    pub(super) rotations: Counter,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("tombolo_federator_inject");
        registry.register(
            "reviews",
            "Pods that the API server asked about, by outcome",
            metrics.reviews.clone(),
        );
        registry.register(
            "turned_away_connections",
            "Connections that ended or were refused because others had or wanted the places, by which",
            metrics.turned_away.clone(),
        );
        registry.register(
            "certificate_not_after_seconds",
            "End of the webhook's certificate, Unix time; 0: there is none",
            metrics.certificate_ends.clone(),
        );
        registry.register(
            "rotations",
            "Certificates that this federator has put in place",
            metrics.rotations.clone(),
        );
        metrics
    }

    /// `result`: `injected`, `unchanged`, `refused`, `other`, `bad_request`, `failed`.
    pub(super) fn reviewed(&self, result: &'static str) {
        self.reviews.get_or_create_owned(&Labels { result }).inc();
    }

    /// `result`: `ended` for the sake of another, `refused`.
    pub(super) fn turned_away(&self, result: &'static str) {
        self.turned_away.get_or_create_owned(&Labels { result }).inc();
    }
}
