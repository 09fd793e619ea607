//! What `/metrics` shows of UDP flows. Flows that end are counted with the streams that hold them.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Why a datagram was dropped: a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// As many flows as may be are open.
    FlowsFull,
    /// Older than what came while the flow was being opened, or than other large ones.
    Queue,
    /// Older than what came while the path carried no more.
    Congestion,
    /// The flow was refused, or there is nobody to carry it to, and the next try is not due yet.
    Refused,
    /// Older than what the peer sent before this process could read it.
    Receive,
    /// Of a flow that is not open (any more).
    UnknownFlow,
    /// The local application's socket took no more, or did not take this one.
    Application,
    /// Larger than a UDP datagram can be.
    TooLarge,
    /// Captured, and it stands for nothing of the mesh.
    Unknown,
    /// To a listener of many applications, from an address that is nobody's.
    UnknownCaller,
}

impl Dropped {
    pub const ALL: [Self; 10] = [
        Self::FlowsFull,
        Self::Queue,
        Self::Congestion,
        Self::Refused,
        Self::Receive,
        Self::UnknownFlow,
        Self::Application,
        Self::TooLarge,
        Self::Unknown,
        Self::UnknownCaller,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::FlowsFull => "flows_full",
            Self::Queue => "queue",
            Self::Congestion => "congestion",
            Self::Refused => "refused",
            Self::Receive => "receive",
            Self::UnknownFlow => "unknown_flow",
            Self::Application => "application",
            Self::TooLarge => "too_large",
            Self::Unknown => "unknown",
            Self::UnknownCaller => "unknown_caller",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DatagramLabels {
    pub direction: &'static str,
    pub service: String,
    /// `peer` or `application`.
    pub to: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DroppedLabels {
    pub direction: &'static str,
    pub reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FlowLabels {
    pub direction: &'static str,
    pub service: String,
}

/// Handles; clones share them.
#[derive(Clone, Debug, Default)]
pub struct UdpMetrics {
    datagrams: Family<DatagramLabels, Counter>,
    dropped: Family<DroppedLabels, Counter>,
    flows: Family<FlowLabels, Gauge>,
}

impl UdpMetrics {
    /// Registers everything under the given registry's prefix.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("udp_datagrams", "Datagrams of UDP flows carried on", metrics.datagrams.clone());
        registry.register(
            "udp_dropped",
            "Datagrams of UDP flows dropped, by reason",
            metrics.dropped.clone(),
        );
        registry.register("udp_flows", "UDP flows open now", metrics.flows.clone());
        metrics
    }

    pub fn direction(&self, direction: &'static str) -> Drops {
        let counter = |reason: Dropped| {
            let labels = DroppedLabels { direction, reason: reason.name() };
            self.dropped.get_or_create_owned(&labels)
        };
        Drops(Dropped::ALL.map(counter).into())
    }

    /// Cached handles of one service and direction.
    pub fn service(&self, direction: &'static str, service: &str) -> FlowMetrics {
        let datagrams = |to| {
            let labels = DatagramLabels { direction, service: service.to_owned(), to };
            self.datagrams.get_or_create_owned(&labels)
        };
        FlowMetrics {
            to_peer: datagrams("peer"),
            to_application: datagrams("application"),
            open: self.flows.get_or_create_owned(&FlowLabels { direction, service: service.to_owned() }),
            drops: self.direction(direction),
        }
    }
}

/// Counters of drops of one direction, by reason.
#[derive(Clone, Debug)]
pub struct Drops(std::sync::Arc<[Counter]>);

impl Drops {
    pub fn count(&self, reason: Dropped, datagrams: u64) {
        let at = Dropped::ALL.iter().position(|known| *known == reason);
        if let Some(counter) = at.and_then(|at| self.0.get(at))
            && datagrams > 0
        {
            counter.inc_by(datagrams);
        }
    }
}

/// Handles of one service and direction.
#[derive(Clone, Debug)]
pub struct FlowMetrics {
    pub to_peer: Counter,
    pub to_application: Counter,
    pub open: Gauge,
    pub drops: Drops,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_counter_of_its_own() {
        let metrics = UdpMetrics::default();
        let drops = metrics.direction("inbound");
        for (count, reason) in (1..).zip(Dropped::ALL) {
            drops.count(reason, count);
        }
        for (count, reason) in (1..).zip(Dropped::ALL) {
            let labels = DroppedLabels { direction: "inbound", reason: reason.name() };
            assert_eq!(metrics.dropped.get_or_create(&labels).get(), count);
        }
    }
}
