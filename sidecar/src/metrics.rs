//! What `/metrics` shows of a sidecar. Labels are bounded sets: services of the configuration, clusters, closed reasons.

mod own;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use tombolo_overlay::OverlayStats;

pub use self::own::{Own, OwnByApplication};
use crate::capture::metrics::CaptureMetrics;
use crate::udp::metrics::UdpMetrics;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ServiceLabels {
    pub direction: &'static str,
    pub service: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct EndLabels {
    pub direction: &'static str,
    pub service: String,
    pub reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct BackendLabels {
    pub service: String,
    pub cluster: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DialLabels {
    pub service: String,
    pub cluster: String,
    pub result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct UpstreamLabels {
    pub service: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct AttestationLabels {
    /// `ok`, or why it was refused.
    pub result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PacketLabels {
    pub reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RejectLabels {
    pub record: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct AccessLabels {
    pub service: String,
    pub verdict: &'static str,
    /// `namespace/name`, or `-` where no policy decided.
    pub policy: String,
}

/// What access policies did to a stream.
pub const VERDICTS: [&str; 4] = [ALLOWED, DENIED, CUT, WOULD_DENY];
pub const ALLOWED: &str = "allowed";
pub const DENIED: &str = "denied";
/// Admitted once, no longer.
pub const CUT: &str = "cut";
/// Admitted, and a dry run would not.
pub const WOULD_DENY: &str = "would_deny";

/// Handles of every metric; clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub sent: Family<ServiceLabels, Counter>,
    pub received: Family<ServiceLabels, Counter>,
    pub open_streams: Family<ServiceLabels, Gauge>,
    pub ended: Family<EndLabels, Counter>,
    pub connections: Family<BackendLabels, Gauge>,
    pub inbound_connections: Gauge,
    pub dials: Family<DialLabels, Counter>,
    pub handshake: Histogram,
    pub retries: Family<UpstreamLabels, Counter>,
    pub tier: Family<UpstreamLabels, Gauge>,
    pub shifts: Family<UpstreamLabels, Counter>,
    pub healthy: Family<UpstreamLabels, Gauge>,
    pub own: Own,
    pub rejected_records: Family<RejectLabels, Counter>,
    pub access: Family<AccessLabels, Counter>,
    attestations: Family<AttestationLabels, Counter>,
    expired_connections: Counter,
    revoked_connections: Counter,
    dropped_packets: Family<PacketLabels, Counter>,
    pub capture: CaptureMetrics,
    pub udp: UdpMetrics,
}

impl Metrics {
    /// Registers everything under `tombolo_sidecar_`.
    pub fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("tombolo_sidecar");
        let own = Own::register(registry);
        Self::common(registry, own)
    }

    /// The same for a process of many sidecars: what each says of itself is told apart by application, and `own` of what
    /// is returned shows nowhere.
    pub fn register_shared(registry: &mut Registry) -> (Self, OwnByApplication) {
        let registry = registry.sub_registry_with_prefix("tombolo_sidecar");
        let own = OwnByApplication::register(registry);
        (Self::common(registry, Own::default()), own)
    }

    /// The same handles, but for what one sidecar says of itself.
    pub fn with(&self, own: Own) -> Self {
        Self { own, ..self.clone() }
    }

    fn common(registry: &mut Registry, own: Own) -> Self {
        let metrics = Self {
            sent: Family::default(),
            received: Family::default(),
            open_streams: Family::default(),
            ended: Family::default(),
            connections: Family::default(),
            inbound_connections: Gauge::default(),
            dials: Family::default(),
            // 1 ms to 8 s: a handshake takes two round trips.
            handshake: Histogram::new(exponential_buckets(0.001, 2.0, 14)),
            retries: Family::default(),
            tier: Family::default(),
            shifts: Family::default(),
            healthy: Family::default(),
            own,
            rejected_records: Family::default(),
            access: Family::default(),
            attestations: Family::default(),
            expired_connections: Counter::default(),
            revoked_connections: Counter::default(),
            dropped_packets: Family::default(),
            capture: CaptureMetrics::register(registry),
            udp: UdpMetrics::register(registry),
        };
        let m = &metrics;
        registry.register_with_unit(
            "sent",
            "Application bytes sent to the peer",
            Unit::Bytes,
            m.sent.clone(),
        );
        registry.register_with_unit(
            "received",
            "Application bytes received from the peer",
            Unit::Bytes,
            m.received.clone(),
        );
        registry.register("open_streams", "Application streams open now", m.open_streams.clone());
        registry.register("streams_ended", "Application streams by how they ended", m.ended.clone());
        registry.register(
            "connections",
            "Overlay connections open to a cluster's service",
            m.connections.clone(),
        );
        registry.register(
            "inbound_connections",
            "Overlay connections of callers",
            m.inbound_connections.clone(),
        );
        registry.register("dials", "Dials by result", m.dials.clone());
        registry.register_with_unit(
            "handshake",
            "Duration of dials that worked",
            Unit::Seconds,
            m.handshake.clone(),
        );
        registry.register("retries", "Streams given to another endpoint", m.retries.clone());
        registry.register("tier", "Failover tier that serves now, 0 the first", m.tier.clone());
        registry.register("shifts", "Failover decisions", m.shifts.clone());
        registry.register("local_healthy", "Whether the local application is healthy", m.healthy.clone());
        registry.register(
            "rejected_records",
            "Records of the configuration that were refused",
            m.rejected_records.clone(),
        );
        registry.register(
            "access",
            "Streams of callers by what access policies say of them, and which",
            m.access.clone(),
        );
        registry.register(
            "attestations",
            "New chains that peers showed on live connections, by result",
            m.attestations.clone(),
        );
        registry.register(
            "expired_connections",
            "Connections ended because their peer's identity had, and it showed no new one",
            m.expired_connections.clone(),
        );
        registry.register(
            "revoked_connections",
            "Connections cut because their peer is revoked",
            m.revoked_connections.clone(),
        );
        registry.register(
            "dropped_packets",
            "Packets that the overlay's sockets dropped, by reason",
            m.dropped_packets.clone(),
        );
        metrics
    }

    /// What this sidecar's overlay has counted by now.
    pub fn overlay(&self, stats: &OverlayStats) {
        let results = stats.attestations_refused.iter().chain([("ok", stats.attested)]);
        for (result, count) in results {
            let more = self.own.more(result, count);
            self.attestations.get_or_create(&AttestationLabels { result }).inc_by(more);
        }
        self.expired_connections.inc_by(self.own.more("expired", stats.expired_closed));
        self.revoked_connections.inc_by(self.own.more("revoked", stats.revoked_closed));
        for (reason, count) in [
            ("no_route", stats.no_route),
            ("send_error", stats.send_errors),
            ("control_overflow", stats.control_overflow),
            ("part_overflow", stats.part_overflow),
            ("malformed", stats.malformed),
        ] {
            let more = self.own.more(reason, count);
            self.dropped_packets.get_or_create(&PacketLabels { reason }).inc_by(more);
        }
    }

    pub fn count_access(&self, service: &str, verdict: &'static str, policy: &str) {
        let labels = AccessLabels { service: service.to_owned(), verdict, policy: policy.to_owned() };
        self.access.get_or_create(&labels).inc();
    }

    /// Forgets a policy that is no more, so that label sets do not grow with all that ever were.
    pub fn forget_policy(&self, service: &str, policy: &str) {
        for verdict in VERDICTS {
            let labels = AccessLabels { service: service.to_owned(), verdict, policy: policy.to_owned() };
            self.access.remove(&labels);
        }
    }

    /// Cached handles of one service and direction.
    pub fn service(&self, direction: &'static str, service: &str) -> ServiceMetrics {
        let labels = ServiceLabels { direction, service: service.to_owned() };
        ServiceMetrics {
            sent: self.sent.get_or_create_owned(&labels),
            received: self.received.get_or_create_owned(&labels),
            open: self.open_streams.get_or_create_owned(&labels),
            ended: self.ended.clone(),
            labels,
        }
    }
}

/// Handles of one service and direction.
#[derive(Clone, Debug)]
pub struct ServiceMetrics {
    pub sent: Counter,
    pub received: Counter,
    pub open: Gauge,
    ended: Family<EndLabels, Counter>,
    labels: ServiceLabels,
}

impl ServiceMetrics {
    pub fn ended(&self, reason: &'static str) {
        let labels =
            EndLabels { direction: self.labels.direction, service: self.labels.service.clone(), reason };
        self.ended.get_or_create(&labels).inc();
    }
}

/// Counts something open for as long as it is held.
#[derive(Debug)]
pub struct Held(Gauge);

impl Held {
    pub fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.dec();
    }
}
