//! What `/metrics` shows of a name server, under `tombolo_names_`. Labels are closed sets; handles are made once, since a
//! flood of questions counts each.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::message::{Outcome, Transport};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QueryLabels {
    transport: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SoughtLabels {
    result: &'static str,
}

/// What became of a question that is not ours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sought {
    Cached,
    Upstream,
    /// No upstream answered: SERVFAIL.
    Failed,
    /// Too many wait: SERVFAIL.
    Shed,
    /// A probe of ours came back.
    Loop,
    /// One attempt at an upstream that was in vain.
    Unanswered,
}

/// How a packet was dealt with, on the outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Counted {
    Ours(Outcome),
    Forwarded,
    Dropped,
}

const COUNTED: [(Counted, &str); 7] = [
    (Counted::Ours(Outcome::Answered), "answered"),
    (Counted::Ours(Outcome::NoData), "nodata"),
    (Counted::Ours(Outcome::NxDomain), "nxdomain"),
    (Counted::Ours(Outcome::Refused), "refused"),
    (Counted::Ours(Outcome::Malformed), "malformed"),
    (Counted::Forwarded, "forwarded"),
    (Counted::Dropped, "dropped"),
];
const SOUGHT: [(Sought, &str); 6] = [
    (Sought::Cached, "cached"),
    (Sought::Upstream, "upstream"),
    (Sought::Failed, "failed"),
    (Sought::Shed, "shed"),
    (Sought::Loop, "loop"),
    (Sought::Unanswered, "unanswered"),
];

/// Handles of every metric; clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    udp: Arc<[(Counted, Counter)]>,
    tcp: Arc<[(Counted, Counter)]>,
    sought: Arc<[(Sought, Counter)]>,
    pub names: Gauge,
    pub connections: Gauge,
    cached: Gauge,
    cache_bytes: Gauge,
}

impl Metrics {
    /// Registers everything.
    pub fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("tombolo_names");
        let queries: Family<QueryLabels, Counter> = Family::default();
        registry.register("queries", "Questions, by how they were dealt with", queries.clone());
        let forwarded: Family<SoughtLabels, Counter> = Family::default();
        registry.register("forwarded", "Questions about other names, by outcome", forwarded.clone());
        let of = |transport: &'static str| {
            let counter = |(counted, result): (Counted, &'static str)| {
                (counted, queries.get_or_create_owned(&QueryLabels { transport, result }))
            };
            COUNTED.into_iter().map(counter).collect()
        };
        let sought = |(sought, result): (Sought, &'static str)| {
            (sought, forwarded.get_or_create_owned(&SoughtLabels { result }))
        };
        let metrics = Self {
            udp: of("udp"),
            tcp: of("tcp"),
            sought: SOUGHT.into_iter().map(sought).collect(),
            names: Gauge::default(),
            connections: Gauge::default(),
            cached: Gauge::default(),
            cache_bytes: Gauge::default(),
        };
        registry.register("services", "Services that have names here", metrics.names.clone());
        registry.register("tcp_connections", "Open connections of askers", metrics.connections.clone());
        registry.register("cached_replies", "Replies of upstream resolvers", metrics.cached.clone());
        registry.register("cache_bytes", "Memory of those replies", metrics.cache_bytes.clone());
        metrics
    }

    pub fn count(&self, transport: Transport, counted: Counted) {
        let counters = match transport {
            Transport::Udp => &self.udp,
            Transport::Tcp => &self.tcp,
        };
        increment(counters, counted);
    }

    pub fn sought(&self, sought: Sought) {
        increment(&self.sought, sought);
    }

    pub fn cache(&self, replies: usize, bytes: usize) {
        self.cached.set(i64::try_from(replies).unwrap_or(i64::MAX));
        self.cache_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}

fn increment<K: PartialEq>(counters: &[(K, Counter)], key: K) {
    if let Some((_, counter)) = counters.iter().find(|(of, _)| *of == key) {
        counter.inc();
    }
}
