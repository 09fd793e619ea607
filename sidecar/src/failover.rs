//! Which clusters serve each upstream now: drives the failover machines and keeps the pools.
//!
//! [`Router`] is the one writer of the [`Routes`] that outbound connections read. It looks at the summaries of the
//! snapshot and at what this sidecar sees itself (clusters that no gateway reaches, dials that fail, connections that
//! stall), steps each machine, and records every shift until a federator has acknowledged it. Tiers and unacknowledged
//! shifts are kept on disk, so a restart neither shifts nor forgets.

mod record;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tombolo_model::failover::{ClusterHealth, FailoverMachine};
use tombolo_model::ids::ClusterTag;
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::protocol::Protocol;
use tombolo_model::resource::FailoverPolicySpec;
use tombolo_runtime::clock;

use crate::metrics::UpstreamLabels;
use crate::pool::{Pool, PoolContext};
use crate::tables::{Tables, Upstream};

pub use record::{Record, ShiftLog};

/// What this sidecar sees itself is looked at this often; a quarter of the time in which a dead cluster must be left.
const TICK: Duration = Duration::from_millis(500);
/// Dials in a row that must fail before a cluster counts as unreachable: one may be bad luck.
const FAILED_DIALS: u32 = 2;

/// Where one upstream's connections go now.
#[derive(Clone, Debug)]
pub struct Route {
    pub service: ServiceKey,
    pub tier: usize,
    /// Clusters and weights, the active tier first, then the order in which to fall back.
    pub tiers: Vec<Vec<(ClusterName, u32)>>,
    /// Seen as unreachable right now: tried last.
    pub down: HashSet<ClusterName>,
    /// What each cluster serves it on; none: it has not said.
    pub ports: HashMap<ClusterName, Vec<(Protocol, u16)>>,
    pub pools: HashMap<ClusterName, Pool>,
    /// For UDP flows: on connections of their own, because datagrams would starve streams.
    pub datagrams: HashMap<ClusterName, Pool>,
    pub reason: String,
}

impl Route {
    /// The order in which to try clusters for one connection: drawn by weight within the active tier, then its others,
    /// then the later tiers; what is down comes last of all. `random` draws the weights.
    pub fn order(&self, mut random: impl FnMut() -> u64) -> Vec<ClusterName> {
        let mut order: Vec<ClusterName> = Vec::new();
        for tier in &self.tiers {
            let mut left: Vec<_> = tier.iter().filter(|(c, _)| !order.contains(c)).collect();
            while !left.is_empty() {
                let weights = left.iter().map(|(_, weight)| (*weight).max(1));
                let drawn = tombolo_model::balance::weighted(weights, random()).unwrap_or(0);
                order.push(left.remove(drawn.min(left.len() - 1)).0.clone());
            }
        }
        order.sort_by_key(|cluster| self.down.contains(cluster));
        order
    }

    /// The same, of the clusters that serve a port: an export of another cluster may have others (KEP-1645: a port is only
    /// routed to who exposes it).
    pub fn order_of(&self, protocol: Protocol, port: u16, random: impl FnMut() -> u64) -> Vec<ClusterName> {
        let mut order = self.order(random);
        order.retain(|cluster| {
            self.ports.get(cluster).is_none_or(|ports| ports.is_empty() || ports.contains(&(protocol, port)))
        });
        order
    }

    /// Clusters that serve in the active tier.
    pub fn serving(&self) -> Vec<ClusterName> {
        let active = self.tiers.first().map(Vec::as_slice).unwrap_or_default();
        active.iter().map(|(cluster, _)| cluster.clone()).collect()
    }
}

/// The routes that outbound connections read; replaced whole.
#[derive(Clone, Debug, Default)]
pub struct Routes(Arc<ArcSwap<HashMap<ServiceKey, Arc<Route>>>>);

impl Routes {
    pub fn of(&self, service: &ServiceKey) -> Option<Arc<Route>> {
        self.0.load().get(service).cloned()
    }
    pub fn all(&self) -> Vec<Arc<Route>> {
        self.0.load().values().cloned().collect()
    }
}

/// Owns machines and pools.
#[derive(Debug)]
pub struct Router {
    importer: ClusterName,
    context: PoolContext,
    warm: HashMap<ServiceKey, usize>,
    machines: HashMap<ServiceKey, FailoverMachine>,
    pools: HashMap<(ServiceKey, ClusterName, Protocol), Pool>,
    routes: Routes,
    log: ShiftLog,
}

impl Router {
    /// `warm`: connections to keep although nothing uses them.
    pub fn new(
        importer: ClusterName,
        context: PoolContext,
        warm: HashMap<ServiceKey, usize>,
        log: ShiftLog,
    ) -> Self {
        let routes = Routes::default();
        Self { importer, context, warm, machines: HashMap::new(), pools: HashMap::new(), routes, log }
    }

    pub fn routes(&self) -> Routes {
        self.routes.clone()
    }

    /// Until the configuration's sender is gone.
    pub async fn run(mut self, mut tables: watch::Receiver<Option<Arc<Tables>>>) {
        let mut unreachable = self.context.overlay.unreachable_tags();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let current = tables.borrow_and_update().clone();
            let tags = Arc::clone(&unreachable.borrow_and_update());
            if let Some(tables) = current {
                self.step(&tables, &tags, clock::since_unix_epoch());
            }
            tokio::select! {
                changed = tables.changed() => if changed.is_err() { return },
                changed = unreachable.changed() => if changed.is_err() { return },
                _ = tick.tick() => self.pools.values().for_each(Pool::tend),
            }
        }
    }

    /// Looks at the world once and publishes the routes.
    fn step(&mut self, tables: &Tables, unreachable: &HashSet<ClusterTag>, now: Duration) {
        let mut routes = HashMap::with_capacity(tables.upstreams.len());
        for (service, upstream) in &tables.upstreams {
            self.keep_pools(upstream);
            let route = self.route(upstream, unreachable, now);
            routes.insert(service.clone(), Arc::new(route));
        }
        // What is gone from the snapshot is no longer to be called.
        self.machines.retain(|service, _| tables.upstreams.contains_key(service));
        self.pools.retain(|(service, cluster, protocol), pool| {
            let upstream = tables.upstreams.get(service);
            let kept = upstream
                .is_some_and(|u| u.may_have(*protocol) && u.backends.iter().any(|b| b.cluster == *cluster));
            if !kept {
                pool.close();
            }
            kept
        });
        self.routes.0.store(Arc::new(routes));
    }

    fn keep_pools(&mut self, upstream: &Upstream) {
        let warm = self.warm.get(&upstream.service).copied().unwrap_or(0);
        let protocols = [(Protocol::Tcp, warm), (Protocol::Udp, 0)];
        for (protocol, warm) in protocols.into_iter().filter(|(protocol, _)| upstream.may_have(*protocol)) {
            for backend in &upstream.backends {
                let key = (upstream.service.clone(), backend.cluster.clone(), protocol);
                let kept = match self.pools.get(&key) {
                    Some(pool) => pool.update(Arc::clone(backend)),
                    None => {
                        Pool::new(upstream.service.clone(), Arc::clone(backend), warm, self.context.clone())
                            .map(|pool| drop(self.pools.insert(key, pool)))
                    }
                };
                if let Err(error) = kept {
                    tracing::error!(service = %upstream.service, cluster = %backend.cluster, %error, "the backend can't be used");
                }
            }
        }
    }

    fn route(&mut self, upstream: &Upstream, unreachable: &HashSet<ClusterTag>, now: Duration) -> Route {
        let service = &upstream.service;
        let (mut pools, mut datagrams) = (HashMap::new(), HashMap::new());
        let mut down = HashSet::new();
        let mut seen = Vec::with_capacity(upstream.backends.len());
        for backend in &upstream.backends {
            let [pool, of_datagrams] = [Protocol::Tcp, Protocol::Udp]
                .map(|protocol| self.pools.get(&(service.clone(), backend.cluster.clone(), protocol)));
            // Whichever of the two is in use says it.
            let failing = [pool, of_datagrams].into_iter().flatten().any(|p| p.is_failing(FAILED_DIALS));
            let reachable = !failing && !unreachable.contains(&backend.tag);
            if !reachable {
                down.insert(backend.cluster.clone());
            }
            pools.extend(pool.map(|pool| (backend.cluster.clone(), pool.clone())));
            datagrams.extend(of_datagrams.map(|pool| (backend.cluster.clone(), pool.clone())));
            seen.push(ClusterHealth {
                cluster: backend.cluster.clone(),
                healthy: backend.healthy,
                total: backend.total,
                reachable,
                properties: backend.properties.clone(),
            });
        }
        let policy = policy_of(upstream);
        let machine = self.machines.entry(service.clone()).or_insert_with(|| {
            let mut machine = FailoverMachine::new(policy.clone(), self.importer.clone());
            if let Some((tier, reason)) = self.log.last_tier(service) {
                machine.resume(tier, reason);
            }
            machine
        });
        machine.set_policy(policy);
        let outcome = machine.step(&seen, now);
        // Of several threads one speaks.
        if let Some(shift) = outcome.shift.filter(|_| self.log.speaks()) {
            tracing::warn!(service = %service, from_tier = shift.from_tier, to_tier = shift.to_tier,
                clusters = ?shift.clusters, reason = shift.reason, "failover: traffic shifts");
            let labels = UpstreamLabels { service: service.to_string() };
            self.context.metrics.shifts.get_or_create(&labels).inc();
            self.log.record(service, shift);
        }
        if self.log.speaks() {
            self.log.keep_tier(service, outcome.tier, &outcome.reason);
        }
        let labels = UpstreamLabels { service: service.to_string() };
        let tier = i64::try_from(outcome.tier).unwrap_or(i64::MAX);
        self.context.metrics.tier.get_or_create(&labels).set(tier);
        let mut tiers = vec![outcome.active];
        let others = machine.fallback_order().into_iter().filter(|t| *t != outcome.tier);
        tiers.extend(others.map(|tier| machine.tier_clusters(tier, &seen)));
        let ports = upstream.backends.iter().map(|backend| (backend.cluster.clone(), backend.ports.clone()));
        let ports = ports.collect();
        let (service, tier, reason) = (service.clone(), outcome.tier, outcome.reason);
        Route { service, tier, tiers, down, ports, pools, datagrams, reason }
    }
}

/// The upstream's policy; one that does not parse is reported and replaced by the standard one.
fn policy_of(upstream: &Upstream) -> FailoverPolicySpec {
    let standard = || FailoverPolicySpec::standard(upstream.service.name.as_str());
    if upstream.policy_json.is_empty() {
        return standard();
    }
    match serde_json::from_str::<FailoverPolicySpec>(&upstream.policy_json) {
        Ok(policy) if !policy.tiers.is_empty() => policy,
        Ok(_) => standard(),
        Err(error) => {
            tracing::error!(service = %upstream.service, policy = upstream.policy_name, %error,
                "the failover policy can't be used; own cluster first, then every other");
            standard()
        }
    }
}
