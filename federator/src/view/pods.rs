//! Pods that the network keeps from their gateways: what an operator is told to let through.

use tombolo_model::status::Finding;

use super::View;
use crate::registry::{Member, Presence};

/// Shown at most: a NetworkPolicy is about many pods at a time.
const SHOWN: usize = 20;

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
