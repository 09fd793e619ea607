//! What gateways and sidecars are told: whole snapshots, computed from the facts. Pure.
//!
//! The `revision` of a snapshot is set by whoever sends it, so that two with the same content are equal.

pub mod across;
pub mod gateway;
pub mod rings;
pub mod sidecar;
#[cfg(test)]
mod tests;

use std::time::Duration;

use tombolo_proto::v1;

use crate::facts::{Facts, Port, Role};
use crate::registry::{Gateway, Presence};

/// Changes that come within this are one snapshot: an export must be usable elsewhere within 250 ms.
const PACE: Duration = Duration::from_millis(20);
/// And this much more for each member: a snapshot costs some 50 us, so a thousand readers keep the thread half idle
/// whatever the rate of changes.
const PACE_PER_MEMBER: Duration = Duration::from_micros(100);
const SLOWEST_PACE: Duration = Duration::from_secs(2);

/// How long changes are gathered with so many readers.
pub fn pace(facts: &Facts) -> Duration {
    let readers = facts.registry.members.len() + facts.registry.gateways.len();
    let more = PACE_PER_MEMBER.saturating_mul(u32::try_from(readers).unwrap_or(u32::MAX));
    (PACE + more).min(SLOWEST_PACE)
}

/// Gateways that may carry packets: a silent one may be back any moment, and whoever uses it probes it.
pub fn usable_gateways(facts: &Facts) -> impl Iterator<Item = &Gateway> {
    facts.registry.gateways.values().filter(|gateway| gateway.presence != Presence::Left && !gateway.draining)
}

/// The gateways as members of this role reach them: a machine outside by their border, everybody else inside.
pub fn gateways_for(facts: &Facts, role: Role) -> Vec<v1::GatewayReplica> {
    let replica = |gateway: &Gateway| v1::GatewayReplica {
        name: gateway.name.clone(),
        address: if role == Role::Vm { gateway.border } else { gateway.inner }.to_string(),
        // Only the border may be a balancer's.
        balanced: gateway.balanced && role == Role::Vm,
        zone: gateway.zone.clone(),
    };
    usable_gateways(facts).map(replica).collect()
}

pub(crate) fn port_to_wire(port: &Port) -> v1::ServicePort {
    v1::ServicePort {
        name: port.name.clone(),
        port: port.port.into(),
        app_protocol: port.app_protocol.clone(),
        protocol: port.protocol.clone(),
    }
}
