//! The failover machine of one upstream: which clusters serve now, and why (pure, time passed in).
//!
//! Tiers are ordered. The active tier is left when its healthy share has been below `whenHealthyBelow` for `for`
//! without a break, towards the first later tier that is healthy enough; an earlier tier is taken back when it has been above
//! `whenHealthyAbove` for its `for`. So with `for` >= d there are at most T/d + 1 shifts in a time T, whatever happens.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::names::ClusterName;
use crate::resource::failover_policy::{FailoverPolicySpec, Tier};

/// What is known of one cluster's share of the service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterHealth {
    pub cluster: ClusterName,
    pub healthy: u32,
    pub total: u32,
    /// Packets get there.
    pub reachable: bool,
    pub properties: BTreeMap<String, String>,
}

/// A move from one tier to another, with its reason: stored, shown, never silent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Shift {
    /// Unix time in milliseconds.
    pub at_unix_ms: u64,
    pub from_tier: usize,
    pub to_tier: usize,
    pub clusters: Vec<ClusterName>,
    pub reason: String,
}

/// What one step decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub tier: usize,
    /// Clusters that serve now, with their weights; never empty while any cluster exports the service.
    pub active: Vec<(ClusterName, u32)>,
    pub shift: Option<Shift>,
    /// Step again then at the latest.
    pub next_check: Option<Duration>,
    pub reason: String,
}

/// The machine; keep it for the life of the upstream.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FailoverMachine {
    #[serde(skip)]
    policy: FailoverPolicySpec,
    importer: ClusterName,
    active: Option<usize>,
    unhealthy_since: Option<Duration>,
    /// Per tier: since when it has been healthy enough to take back.
    recovered_since: Vec<Option<Duration>>,
    reason: String,
}

#[derive(Clone, Copy)]
struct Share {
    healthy: u32,
    total: u32,
}

impl Share {
    /// Healthy share in percent; nothing exported is 0.
    fn percent(self) -> f64 {
        if self.total == 0 { 0.0 } else { f64::from(self.healthy) * 100.0 / f64::from(self.total) }
    }
}

impl FailoverMachine {
    pub fn new(policy: FailoverPolicySpec, importer: ClusterName) -> Self {
        let tiers = policy.tiers.len();
        Self {
            policy,
            importer,
            active: None,
            unhealthy_since: None,
            recovered_since: vec![None; tiers],
            reason: "starting".into(),
        }
    }

    /// Takes a changed policy over without a shift where the active tier still exists.
    pub fn set_policy(&mut self, policy: FailoverPolicySpec) {
        if policy != self.policy {
            self.recovered_since = vec![None; policy.tiers.len()];
            self.unhealthy_since = None;
            self.active = self.active.filter(|tier| *tier < policy.tiers.len());
            self.policy = policy;
        }
    }

    /// Continues where an earlier process stopped: a restart is no reason to shift.
    pub fn resume(&mut self, tier: usize, reason: String) {
        if self.active.is_none() && tier < self.policy.tiers.len() {
            self.active = Some(tier);
            self.reason = reason;
        }
    }

    fn members<'a>(&self, index: usize, seen: &'a [ClusterHealth]) -> Vec<&'a ClusterHealth> {
        let Some(tier) = self.policy.tiers.get(index) else { return Vec::new() };
        let own = seen.iter().find(|c| c.cluster == self.importer);
        let earlier =
            |c: &ClusterHealth| self.policy.tiers.iter().take(index).any(|tier| self.selects(tier, c, own));
        seen.iter().filter(|c| self.selects(tier, c, own) && !earlier(c)).collect()
    }

    fn selects(&self, tier: &Tier, cluster: &ClusterHealth, own: Option<&ClusterHealth>) -> bool {
        let named = tier.clusters.iter().any(|name| match name.as_str() {
            "@self" => cluster.cluster == self.importer,
            "*" => true,
            name => cluster.cluster.as_str() == name,
        });
        let matches = !tier.match_properties.is_empty()
            && tier.match_properties.iter().all(|(key, wanted)| {
                let wanted = match wanted.as_str() {
                    "@SameAsImporter@" => own.and_then(|own| own.properties.get(key)).map(String::as_str),
                    wanted => Some(wanted),
                };
                wanted.is_some() && cluster.properties.get(key).map(String::as_str) == wanted
            });
        named || matches
    }

    fn share(&self, index: usize, seen: &[ClusterHealth]) -> Share {
        self.members(index, seen).iter().fold(Share { healthy: 0, total: 0 }, |share, c| Share {
            healthy: share.healthy + if c.reachable { c.healthy } else { 0 },
            total: share.total + c.total.max(u32::from(!c.reachable)),
        })
    }

    /// Looks at the world and decides. `now` is time since the Unix epoch and must not go back.
    pub fn step(&mut self, seen: &[ClusterHealth], now: Duration) -> Outcome {
        let shares: Vec<Share> = (0..self.policy.tiers.len()).map(|tier| self.share(tier, seen)).collect();
        let below = self.policy.failover.when_healthy_below.percent();
        let above = self.policy.failback.when_healthy_above.percent();
        // Zero healthy endpoints are below any threshold, also below "0%".
        let poor = |share: &Share| share.healthy == 0 || share.percent() < below;
        for (recovered, share) in self.recovered_since.iter_mut().zip(&shares) {
            let good = share.healthy > 0 && share.percent() > above.min(99.999);
            *recovered = if good { recovered.or(Some(now)) } else { None };
        }
        let Some(active) = self.active else { return self.start(&shares, poor, seen, now) };
        self.unhealthy_since =
            if shares.get(active).is_none_or(poor) { self.unhealthy_since.or(Some(now)) } else { None };

        let hold = self.policy.failback.hold();
        let back = self
            .recovered_since
            .iter()
            .take(active)
            .position(|since| since.is_some_and(|at| now >= at + hold));
        if let Some(tier) = back {
            let percent = shares.get(tier).map_or(0.0, |s| s.percent());
            let reason = format!(
                "tier {tier} has been over {} healthy for {} (now {percent:.0}%)",
                self.policy.failback.when_healthy_above, self.policy.failback.r#for
            );
            return self.shift(active, tier, reason, seen, now);
        }
        let hold = self.policy.failover.hold();
        if self.unhealthy_since.is_some_and(|at| now >= at + hold) {
            let share = shares.get(active).copied().unwrap_or(Share { healthy: 0, total: 0 });
            let why = format!(
                "tier {active} has been under {} healthy for {} (now {} of {})",
                self.policy.failover.when_healthy_below,
                self.policy.failover.r#for,
                share.healthy,
                share.total
            );
            // Later tiers first, in order; an earlier one that is not yet trusted to take back is the last resort.
            let next = (active + 1..shares.len()).find(|tier| shares.get(*tier).is_some_and(|s| !poor(s)));
            let any = || {
                (0..shares.len())
                    .filter(|t| *t != active)
                    .find(|t| shares.get(*t).is_some_and(|s| s.healthy > 0))
            };
            let last_resort = if share.healthy == 0 { any() } else { None };
            if let Some(tier) = next.or(last_resort) {
                return self.shift(active, tier, why, seen, now);
            }
            self.reason = format!("{why}; no other tier has a healthy endpoint");
        }
        self.outcome(active, None, seen, now)
    }

    fn start(
        &mut self,
        shares: &[Share],
        poor: impl Fn(&Share) -> bool,
        seen: &[ClusterHealth],
        now: Duration,
    ) -> Outcome {
        let first = shares.iter().position(|share| !poor(share));
        let tier = first.or_else(|| shares.iter().position(|share| share.healthy > 0)).unwrap_or(0);
        // With nothing exported yet there is no first choice to remember.
        if shares.iter().any(|share| share.total > 0) {
            self.active = Some(tier);
        }
        self.reason = format!("tier {tier} is the first healthy one");
        self.outcome(tier, None, seen, now)
    }

    fn shift(
        &mut self,
        from: usize,
        to: usize,
        reason: String,
        seen: &[ClusterHealth],
        now: Duration,
    ) -> Outcome {
        self.active = Some(to);
        self.unhealthy_since = None;
        self.reason = reason.clone();
        let clusters = self.weights(to, seen).into_iter().map(|(cluster, _)| cluster).collect();
        let at_unix_ms = now.as_millis() as u64;
        let shift = Shift { at_unix_ms, from_tier: from, to_tier: to, clusters, reason };
        self.outcome(to, Some(shift), seen, now)
    }

    fn weights(&self, tier: usize, seen: &[ClusterHealth]) -> Vec<(ClusterName, u32)> {
        let members = self.members(tier, seen);
        let usable: Vec<_> = members.iter().filter(|c| c.reachable && c.healthy > 0).collect();
        let weights = self.policy.tiers.get(tier).map(|t| &t.weights);
        let weigh = |c: &ClusterHealth| {
            let configured = weights.and_then(|w| w.get(c.cluster.as_str())).copied();
            (
                c.cluster.clone(),
                configured.unwrap_or(if weights.is_some_and(|w| !w.is_empty()) {
                    0
                } else {
                    c.healthy.max(1)
                }),
            )
        };
        let weighed: Vec<_> =
            usable.into_iter().map(|c| weigh(c)).filter(|(_, weight)| *weight > 0).collect();
        // All down or all weighted away: say where one would go, the dial says the rest.
        if weighed.is_empty() {
            members.into_iter().map(|c| (c.cluster.clone(), 1)).collect()
        } else {
            weighed
        }
    }

    fn outcome(&self, tier: usize, shift: Option<Shift>, seen: &[ClusterHealth], now: Duration) -> Outcome {
        let failover = self.unhealthy_since.map(|at| at + self.policy.failover.hold());
        let hold = self.policy.failback.hold();
        let failback = self.recovered_since.iter().take(tier).flatten().map(|at| *at + hold).min();
        let next = [failover, failback].into_iter().flatten().filter(|at| *at > now).min();
        Outcome {
            tier,
            active: self.weights(tier, seen),
            shift,
            next_check: next,
            reason: self.reason.clone(),
        }
    }

    /// The order of tiers to try for one connection: the active one, then the later, then the earlier ones.
    pub fn fallback_order(&self) -> Vec<usize> {
        let active = self.active.unwrap_or(0);
        let tiers = self.policy.tiers.len();
        (active..tiers).chain(0..active.min(tiers)).collect()
    }

    /// Clusters and weights of any tier, for a connection that can't be established in the active one.
    pub fn tier_clusters(&self, tier: usize, seen: &[ClusterHealth]) -> Vec<(ClusterName, u32)> {
        self.weights(tier, seen)
    }
}

#[cfg(test)]
mod tests;
