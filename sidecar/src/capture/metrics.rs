//! What `/metrics` shows of captured connections.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

/// What became of a captured connection: a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Carried to a service.
    Service,
    /// Not ours: went on to where it was going.
    Passed,
    /// Not ours, and where it was going nobody answered.
    PassFailed,
    /// A virtual address, or a port of one, that stands for nothing.
    Unknown,
    /// More services are in use than a federator sends to one sidecar.
    TooManyServices,
    /// More connections than there are slots.
    Overloaded,
    /// Nobody has redirected it: somebody speaks to the listener itself.
    Direct,
    /// The sidecar's own connection, caught by rules that do not exclude it.
    Loop,
    /// From outside, not through the mesh, and handed to the application.
    PlainAllowed,
    /// From outside, not through the mesh, and reset.
    PlainRefused,
    /// From outside, not through the mesh, and the application did not answer.
    PlainFailed,
}

impl Outcome {
    pub fn name(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Passed => "passed",
            Self::PassFailed => "pass_failed",
            Self::Unknown => "unknown",
            Self::TooManyServices => "too_many_services",
            Self::Overloaded => "overloaded",
            Self::Direct => "direct",
            Self::Loop => "loop",
            Self::PlainAllowed => "plain_allowed",
            Self::PlainRefused => "plain_refused",
            Self::PlainFailed => "plain_failed",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CapturedLabels {
    pub direction: &'static str,
    pub result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DirectionLabels {
    pub direction: &'static str,
}

/// Handles; clones share them.
#[derive(Clone, Debug, Default)]
pub struct CaptureMetrics {
    captured: Family<CapturedLabels, Counter>,
    plain_open: Family<DirectionLabels, Gauge>,
    plain_bytes: Family<DirectionLabels, Counter>,
}

impl CaptureMetrics {
    /// Registers everything under the given registry's prefix.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "captured",
            "Connections that the machine's rules handed over, by what became of them",
            metrics.captured.clone(),
        );
        registry.register(
            "plain_open",
            "Captured connections open now that do not go through the mesh",
            metrics.plain_open.clone(),
        );
        registry.register_with_unit(
            "plain",
            "Bytes of captured connections that do not go through the mesh, both ways",
            Unit::Bytes,
            metrics.plain_bytes.clone(),
        );
        metrics
    }

    pub fn direction(&self, direction: &'static str) -> Captured {
        let labels = DirectionLabels { direction };
        Captured {
            direction,
            captured: self.captured.clone(),
            open: self.plain_open.get_or_create_owned(&labels),
            bytes: self.plain_bytes.get_or_create_owned(&labels),
        }
    }
}

/// Handles of one direction.
#[derive(Clone, Debug)]
pub struct Captured {
    direction: &'static str,
    captured: Family<CapturedLabels, Counter>,
    /// Of what does not go through the mesh.
    pub open: Gauge,
    pub bytes: Counter,
}

impl Captured {
    pub fn count(&self, outcome: Outcome) {
        let labels = CapturedLabels { direction: self.direction, result: outcome.name() };
        self.captured.get_or_create(&labels).inc();
    }
}
