//! The rules for datagrams from outside to a workload's own ports. Pure.
//!
//! They decide by themselves: what does not come through the mesh needs nothing of the sidecar. It is refused (`strict`) or
//! let in untouched and counted (`permissive`), so the application sees who asks, whether or not a sidecar listens.
//! Answers to what the workload itself has asked from such a port come in the reply direction of its flow, and are none of
//! this; a flow that was begun from outside stays in the other direction, however long it lasts.

use tombolo_model::protocol::Protocol;
use tombolo_sidecar::capture::InboundMode;

use super::super::plan::{Inbound, Plan};
use super::{Chain, PREROUTING_PRIORITY};

impl Plan {
    /// None without such ports.
    pub(super) fn plain_datagrams(&self, inbound: &Inbound) -> Option<Chain> {
        let rules = self.outside_to(Protocol::Udp, inbound)?;
        let reply = "ct direction reply accept".to_owned();
        let decision = match inbound.mode {
            InboundMode::Strict => "counter name \"inbound_datagrams_refused\" reject",
            InboundMode::Permissive => "counter name \"inbound_datagrams\" accept",
        };
        let rules = rules.into_iter().chain([reply, decision.to_owned()]).collect();
        let hook = Some(format!("type filter hook prerouting priority {PREROUTING_PRIORITY};"));
        Some(Chain { name: "udp_inbound", hook, rules })
    }
}
