//! What stays known when the federator has lost its store (protocol.md section 1). Pure.
//!
//! A snapshot of another epoch knows neither links nor exports. What the last one of the old epoch knew is added to it,
//! where the new one says nothing, for as long as keys are handed out ahead. Policies are carried too: who was denied
//! stays denied, who was revoked stays revoked.

use std::collections::HashSet;
use std::hash::Hash;
use std::time::Duration;

use tombolo_overlay::keys::HOURS_AHEAD;
use tombolo_proto::{convert, v1};

/// For so long: callers hold keys for it.
const KEPT: Duration = Duration::from_secs(HOURS_AHEAD as u64 * 3600);

/// The last snapshot, and what is carried along from before a loss.
#[derive(Debug, Default)]
pub struct Carry {
    last: Option<v1::SidecarSnapshot>,
    /// With the time since the Unix epoch at which it is given up.
    lost: Option<(v1::SidecarSnapshot, Duration)>,
}

impl Carry {
    /// The snapshot with what is carried along at `unix`, the time since the Unix epoch.
    pub fn over(&mut self, snapshot: &v1::SidecarSnapshot, unix: Duration) -> v1::SidecarSnapshot {
        let same_cluster =
            |last: &v1::SidecarSnapshot| last.cluster == snapshot.cluster && last.tag == snapshot.tag;
        let anew = |last: &v1::SidecarSnapshot| convert::store_is_new(last.epoch, snapshot.epoch);
        if let Some(last) = self.last.take().filter(|last| same_cluster(last) && anew(last)) {
            tracing::warn!("the federator's store was made anew; what was known is kept for a day");
            self.lost = Some((last, unix + KEPT));
        }
        self.last = Some(snapshot.clone());
        self.lost.take_if(|(_, until)| unix >= *until);
        match &self.lost {
            Some((old, _)) => merge(snapshot, old),
            None => snapshot.clone(),
        }
    }

    /// Whether what is carried along has to be given up at `unix`, though no other snapshot has come.
    pub fn is_over(&self, unix: Duration) -> bool {
        self.lost.as_ref().is_some_and(|(_, until)| unix >= *until)
    }
}

/// `new`, with what only `old` knows.
fn merge(new: &v1::SidecarSnapshot, old: &v1::SidecarSnapshot) -> v1::SidecarSnapshot {
    let mut merged = new.clone();
    add(&mut merged.endpoints, &old.endpoints, |endpoint| endpoint.block);
    add(&mut merged.inbound, &old.inbound, |inbound| inbound.binding.as_ref().map(|binding| binding.handle));
    add(&mut merged.revocations, &old.revocations, |revocation| revocation.name.clone());
    add(&mut merged.access_policies, &old.access_policies, |policy| policy.name.clone());
    add(&mut merged.cluster_properties, &old.cluster_properties, |properties| properties.cluster.clone());
    add(&mut merged.jwt_authorities, &old.jwt_authorities, |authority| authority.public_key.clone());
    for upstream in &mut merged.upstreams {
        let Some(known) = old.upstreams.iter().find(|known| known.service == upstream.service) else {
            continue;
        };
        add(&mut upstream.backends, &known.backends, |backend| backend.cluster.clone());
        if upstream.ports.is_empty() {
            upstream.ports.clone_from(&known.ports);
        }
        if upstream.policy_name.is_empty() {
            upstream.policy_name.clone_from(&known.policy_name);
            upstream.failover_policy_json.clone_from(&known.failover_policy_json);
        }
    }
    merged
}

/// Appends what `old` has under keys that `new` lacks.
fn add<T: Clone, K: Eq + Hash>(new: &mut Vec<T>, old: &[T], key: impl Fn(&T) -> K) {
    let known: HashSet<K> = new.iter().map(&key).collect();
    new.extend(old.iter().filter(|item| !known.contains(&key(item))).cloned());
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn inbound(handle: u32) -> v1::InboundHandle {
        let binding = Some(v1::HandleBinding { handle, ..Default::default() });
        v1::InboundHandle { binding, ..Default::default() }
    }

    fn backend(cluster: &str, handle: u32) -> v1::Backend {
        v1::Backend { cluster: cluster.into(), handle, ..Default::default() }
    }

    fn snapshot(epoch: u64, handles: &[u32], backends: &[(&str, u32)]) -> v1::SidecarSnapshot {
        let upstream = v1::Upstream {
            service: "shop/web".into(),
            backends: backends.iter().map(|(cluster, handle)| backend(cluster, *handle)).collect(),
            ..Default::default()
        };
        let inbound = handles.iter().copied().map(inbound).collect();
        v1::SidecarSnapshot { epoch, inbound, upstreams: vec![upstream], ..Default::default() }
    }

    fn handles(snapshot: &v1::SidecarSnapshot) -> Vec<u32> {
        snapshot.inbound.iter().filter_map(|inbound| Some(inbound.binding.as_ref()?.handle)).collect()
    }

    #[test]
    fn absence_is_removal_within_an_epoch() {
        let mut carry = Carry::default();
        carry.over(&snapshot(1, &[300, 301], &[("east", 1), ("west", 2)]), NOW);
        let next = snapshot(1, &[301], &[("east", 1)]);
        assert_eq!(carry.over(&next, NOW), next);
    }

    #[test]
    fn a_new_epoch_adds_to_what_was_known_until_a_day_has_passed() {
        let mut carry = Carry::default();
        let mut before = snapshot(1, &[300, 301], &[("east", 1), ("west", 2)]);
        before.upstreams[0].policy_name = "shop/web".into();
        before.access_policies = vec![v1::AccessPolicy { name: "shop/deny".into(), ..Default::default() }];
        carry.over(&before, NOW);
        let after = snapshot(2, &[400], &[("east", 9)]);
        for now in [NOW, NOW + KEPT - Duration::from_secs(1)] {
            let merged = carry.over(&after, now);
            assert_eq!(handles(&merged), [400, 300, 301]);
            assert_eq!(merged.upstreams[0].backends, [backend("east", 9), backend("west", 2)]);
            assert_eq!(merged.upstreams[0].policy_name, "shop/web");
            assert_eq!(merged.access_policies, before.access_policies, "who was denied stays denied");
        }
        assert!(!carry.is_over(NOW + KEPT - Duration::from_secs(1)));
        assert!(carry.is_over(NOW + KEPT));
        assert_eq!(carry.over(&after, NOW + KEPT), after);
        assert!(!carry.is_over(NOW + KEPT));
    }

    #[test]
    fn an_older_versions_snapshot_and_one_of_another_cluster_are_no_loss() {
        let foreign = v1::SidecarSnapshot { cluster: "west".into(), ..snapshot(7, &[300], &[]) };
        for before in [snapshot(0, &[300], &[]), foreign] {
            let mut carry = Carry::default();
            carry.over(&before, NOW);
            let next = snapshot(1, &[301], &[]);
            assert_eq!(carry.over(&next, NOW), next);
        }
    }

    #[test]
    fn two_losses_within_a_day_carry_what_the_last_snapshot_said_and_no_more() {
        let mut carry = Carry::default();
        for epoch in 1..5 {
            carry.over(&snapshot(epoch, &[u32::try_from(epoch).unwrap()], &[]), NOW);
        }
        assert_eq!(handles(&carry.over(&snapshot(5, &[5], &[]), NOW)), [5, 4]);
    }
}
