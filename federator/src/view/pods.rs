//! Pods that the network keeps from their gateways, and those that are not let in: what an operator is told to do.

use tombolo_model::status::Finding;

use super::View;
use super::text::{rfc3339_seconds, span};
use crate::facts::pods::REFUSED_FOR_SECONDS;
use crate::registry::{Member, Presence};

/// Shown at most: a NetworkPolicy is about many pods at a time.
const SHOWN: usize = 20;

/// Pods that have asked to join lately and were refused, the latest first.
pub fn refused(view: &View<'_>) -> Vec<Finding> {
    let now = view.unix.as_secs();
    let recent = view.facts.pods.refused.iter().filter(|(_, known)| known.last + REFUSED_FOR_SECONDS > now);
    let mut recent: Vec<_> = recent.collect();
    recent.sort_by_key(|(_, known)| std::cmp::Reverse(known.last));
    let finding = |(pod, known): (&String, &crate::facts::pods::RefusedPod)| {
        let since = rfc3339_seconds(known.last);
        let ago = span(std::time::Duration::from_secs(now.saturating_sub(known.last)));
        Finding {
            severity: "warning".to_owned(),
            reason: "PodRefused".to_owned(),
            about: pod.clone(),
            message: format!(
                "{pod}, as its token says, may not join ({} times, last {ago} ago, at {since}): {}",
                known.times, known.reason
            ),
            remedy: "mend what is said, and delete the pod; `kubectl logs POD -c tombolo-sidecar` and `tombolo audit --action join` say it too"
                .to_owned(),
        }
    };
    recent.into_iter().map(finding).take(SHOWN).collect()
}

/// Pods whose sidecars have heard none of this cluster's gateways.
pub fn findings(view: &View<'_>) -> Vec<Finding> {
    let facts = view.facts;
    let own = facts.cluster.name.as_str();
    let cut_off = |member: &Member| {
        let pod = facts.leases.get(&member.block)?.pod.as_ref()?;
        let gateways = member.hops.iter().filter(|hop| hop.cluster.is_empty() || hop.cluster == own);
        let silent: Vec<&str> =
            gateways.clone().filter(|hop| !hop.alive).map(|hop| hop.address.as_str()).collect();
        let none =
            member.presence == Presence::Live && !silent.is_empty() && silent.len() == gateways.count();
        none.then(|| {
            let namespace = member.spiffe_id.as_str().split("/ns/").nth(1).and_then(|rest| rest.split('/').next());
            let namespace = namespace.unwrap_or_default();
            Finding {
                severity: "warning".to_owned(),
                reason: "PodCutOff".to_owned(),
                about: format!("pod {namespace}/{}", pod.name),
                message: format!(
                    "pod {namespace}/{} hears no gateway of this cluster ({} over UDP): calls to other clusters fail",
                    pod.name,
                    silent.join(", ")
                ),
                remedy: format!(
                    "let UDP through in the NetworkPolicies of namespace {namespace}: out to ports 7441 (gateways), 7442 (other sidecars) and 7443 (federator), in to port 7442"
                ),
            }
        })
    };
    facts.registry.members.values().filter_map(cut_off).take(SHOWN).collect()
}
