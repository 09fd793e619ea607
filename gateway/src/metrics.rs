//! What `/metrics` shows of a gateway. Labels are bounded: links and gateways of the configuration, closed reasons.
//!
//! Forwarding threads count in plain atomics ([`crate::counters`]); they are summed when scraped.

use std::fmt::Error;
use std::sync::atomic::AtomicU64;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::{MetricType, counter::Counter};
use prometheus_client::registry::Registry;

use crate::counters::{Figures, Name};
use crate::dataplane::DataPlaneHandle;

/// The link name of packets that belong to none; no cluster can be called so.
pub const NO_LINK: &str = "-";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RejectLabels {
    pub record: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LinkLabels {
    link: String,
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DropLabels {
    link: String,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HopLabels {
    cluster: String,
    hop: String,
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HopDropLabels {
    cluster: String,
    hop: String,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GatewayLabels {
    cluster: String,
    gateway: String,
}

/// Handles of what the control side counts; clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub config_revision: Gauge<u64, AtomicU64>,
    pub rejected_records: Family<RejectLabels, Counter>,
    pub rejected_snapshots: Family<RejectLabels, Counter>,
    pub control_connected: Gauge,
}

impl Metrics {
    /// Registers everything under `tombolo_gateway_`.
    pub fn register(registry: &mut Registry, plane: DataPlaneHandle) -> Self {
        let registry = registry.sub_registry_with_prefix("tombolo_gateway");
        let metrics = Self {
            config_revision: Gauge::default(),
            rejected_records: Family::default(),
            rejected_snapshots: Family::default(),
            control_connected: Gauge::default(),
        };
        let m = &metrics;
        registry.register(
            "config_revision",
            "Revision of the configuration in use",
            m.config_revision.clone(),
        );
        registry.register(
            "rejected_records",
            "Records of the configuration that were refused",
            m.rejected_records.clone(),
        );
        registry.register(
            "rejected_snapshots",
            "Whole configurations that were refused",
            m.rejected_snapshots.clone(),
        );
        registry.register(
            "control_connected",
            "Whether a federator is connected",
            m.control_connected.clone(),
        );
        registry.register_collector(Box::new(PlaneCollector(plane)));
        metrics
    }
}

#[derive(Debug)]
struct PlaneCollector(DataPlaneHandle);

impl Collector for PlaneCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let read = self.0.counters().read();
        let links: Vec<(String, &Figures)> = read
            .iter()
            .filter_map(|(name, figures)| match name {
                Name::Link(cluster) => Some((cluster.clone(), figures)),
                Name::Unknown => Some((NO_LINK.to_owned(), figures)),
                Name::Gateway(..) | Name::Endpoints => None,
            })
            .collect();
        let hops: Vec<(String, String, &Figures)> = read
            .iter()
            .filter_map(|(name, figures)| match name {
                Name::Gateway(cluster, gateway) => Some((cluster.clone(), gateway.clone(), figures)),
                Name::Endpoints => Some((String::new(), "endpoints".to_owned(), figures)),
                Name::Link(_) | Name::Unknown => None,
            })
            .collect();
        let directions =
            |f: &Figures| [("in", f.packets_in, f.bytes_in), ("out", f.packets_out, f.bytes_out)];
        let link_rows = |pick: fn((&'static str, u64, u64)) -> u64| -> Vec<(LinkLabels, u64)> {
            let row = |(link, f): &(String, &Figures)| {
                let link = link.clone();
                directions(f).map(|d| (LinkLabels { link: link.clone(), direction: d.0 }, pick(d)))
            };
            links.iter().flat_map(row).collect()
        };
        let hop_rows = |pick: fn((&'static str, u64, u64)) -> u64| -> Vec<(HopLabels, u64)> {
            let row = |(cluster, hop, f): &(String, String, &Figures)| {
                let (cluster, hop) = (cluster.clone(), hop.clone());
                directions(f).map(|d| {
                    (HopLabels { cluster: cluster.clone(), hop: hop.clone(), direction: d.0 }, pick(d))
                })
            };
            hops.iter().flat_map(row).collect()
        };
        counters(&mut encoder, "packets", "Packets forwarded, by link", link_rows(|d| d.1))?;
        counters(&mut encoder, "bytes", "UDP payload forwarded, by link", link_rows(|d| d.2))?;
        let drops = links.iter().flat_map(|(link, figures)| {
            let labels = |reason: &'static str| DropLabels { link: link.clone(), reason };
            figures
                .drops
                .iter()
                .map(move |(reason, count)| (labels(reason.as_str()), *count))
                .collect::<Vec<_>>()
        });
        counters(&mut encoder, "drops", "Packets dropped, by link and reason", drops.collect())?;
        counters(&mut encoder, "hop_packets", "Packets from and to a neighbouring hop", hop_rows(|d| d.1))?;
        counters(&mut encoder, "hop_bytes", "UDP payload from and to a neighbouring hop", hop_rows(|d| d.2))?;
        let drops = hops.iter().flat_map(|(cluster, hop, figures)| {
            let labels =
                |reason: &'static str| HopDropLabels { cluster: cluster.clone(), hop: hop.clone(), reason };
            figures
                .drops
                .iter()
                .map(move |(reason, count)| (labels(reason.as_str()), *count))
                .collect::<Vec<_>>()
        });
        counters(
            &mut encoder,
            "hop_drops",
            "Packets dropped, by the hop that they came from or went to",
            drops.collect(),
        )?;
        self.status(&mut encoder)
    }
}

impl PlaneCollector {
    fn status(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let status = self.0.status();
        let rows = |of: &dyn Fn(&crate::control::HopStatus) -> f64| -> Vec<(GatewayLabels, f64)> {
            let labels = |hop: &crate::control::HopStatus| GatewayLabels {
                cluster: hop.cluster.clone(),
                gateway: hop.name.clone(),
            };
            status.hops.iter().map(|hop| (labels(hop), of(hop))).collect()
        };
        let alive = rows(&|hop| f64::from(u8::from(hop.alive)));
        gauges(encoder, "peer_alive", "Whether a gateway of a peer, or a sibling, answers", alive)?;
        let rtt = rows(&|hop| hop.rtt.map_or(0.0, |rtt| rtt.as_secs_f64()));
        gauges(encoder, "peer_rtt_seconds", "Round trip to it", rtt)?;
        let loss = rows(&|hop| f64::from(hop.loss_per_mille) / 1000.0);
        gauges(encoder, "peer_loss_ratio", "Share of probes lost, both ways together", loss)?;
        gauges(
            encoder,
            "peer_mtu_bytes",
            "Largest UDP payload known to pass",
            rows(&|hop| f64::from(hop.mtu)),
        )?;
        let single = |value: usize| vec![(Vec::<(String, String)>::new(), value as f64)];
        gauges(encoder, "registered_endpoints", "Endpoints registered here", single(status.registered))?;
        gauges(encoder, "announced_endpoints", "Endpoints registered at siblings", single(status.announced))?;
        gauges(
            encoder,
            "unreachable_clusters",
            "Linked clusters that no path reaches",
            single(status.unreachable.len()),
        )?;
        let draining = usize::from(self.0.is_draining());
        gauges(encoder, "draining", "Whether this replica is about to go", single(draining))?;
        let none = Vec::<(String, String)>::new;
        counters(
            encoder,
            "register_refusals",
            "REGISTERs refused",
            vec![(none(), status.refused_registers)],
        )?;
        counters(encoder, "gone_sent", "GONE hints sent", vec![(none(), status.gone_sent)])?;
        counters(
            encoder,
            "gone_received",
            "GONE hints of other gateways",
            vec![(none(), status.gone_received)],
        )
    }
}

fn counters<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    rows: Vec<(L, u64)>,
) -> Result<(), Error> {
    if rows.is_empty() {
        return Ok(());
    }
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    rows.iter()
        .try_for_each(|(labels, count)| ConstCounter::new(*count).encode(family.encode_family(labels)?))
}

fn gauges<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    rows: Vec<(L, f64)>,
) -> Result<(), Error> {
    if rows.is_empty() {
        return Ok(());
    }
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    rows.iter().try_for_each(|(labels, value)| ConstGauge::new(*value).encode(family.encode_family(labels)?))
}
