//! Bounds of UDP flows, by flags.

use std::num::NonZeroUsize;

use tombolo_sidecar::udp::UdpLimits;

use crate::cmd::role::Span;
use crate::failure::Failure;

pub fn limits(
    idle: Option<Span>,
    most: Option<NonZeroUsize>,
    per_peer: Option<NonZeroUsize>,
) -> Result<UdpLimits, Failure> {
    let standard = UdpLimits::default();
    let idle = idle.map_or(standard.idle, |Span(idle)| idle);
    if idle.is_zero() {
        return Err(Failure::usage("--udp-idle 0s: every flow would end at once").remedy("give e.g. 60s"));
    }
    Ok(UdpLimits {
        max_flows: most.map_or(standard.max_flows, NonZeroUsize::get),
        max_flows_per_peer: per_peer.map_or(standard.max_flows_per_peer, NonZeroUsize::get),
        idle,
    })
}
