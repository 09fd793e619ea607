//! Ways to linked clusters past the own gateways, as their `ClusterLink` objects allow: to the peer's gateways
//! (`egress: remote`), and straight to its endpoints (`flat`). Pure.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tombolo_model::ids::{Block, ClusterTag, EndpointId};
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_overlay::keys::{AcrossTarget, LinkKey};
use tombolo_overlay::{Across, Flat, FlatEndpoint, GatewayHop, rendezvous};

use super::rings::Rings;
use crate::facts::{Facts, Link};

/// Endpoints of one service that a sidecar is told, half a kilobyte each, and another choice for each sidecar. The rest
/// is called through gateways.
const MAX_ENDPOINTS: usize = 64;

/// For the endpoint with this block; `calls` is what it calls, `None` when endpoint addresses are not for it (a machine
/// outside the cluster, a federator).
pub fn across(
    facts: &Facts,
    block: Block,
    calls: Option<&[ServiceKey]>,
    rings: &Rings,
    unix: Duration,
) -> HashMap<ClusterTag, Across> {
    let links = facts.link_specs().filter_map(|(peer, spec)| {
        let link = facts.links.get(&peer.parse::<ClusterName>().ok()?).filter(|link| link.is_live())?;
        let key = link.link_key()?;
        let prober = Prober { facts, link, key: &key, block, rings, unix };
        let flat = calls.filter(|_| spec.flat).map(|calls| prober.flat(calls));
        let remote = spec.egress_is_remote();
        (remote || flat.is_some()).then(|| {
            let across = Across {
                cluster: link.peer.to_string(),
                gateways: if remote { gateways(facts, link) } else { Vec::new() },
                gateway_keys: if remote { prober.keys(AcrossTarget::Gateways) } else { Arc::default() },
                flat,
            };
            (link.tag, across)
        })
    });
    links.collect()
}

fn gateways(facts: &Facts, link: &Link) -> Vec<GatewayHop> {
    let hop = |gateway: crate::facts::PeerGateway| GatewayHop {
        name: gateway.name,
        address: gateway.address,
        balanced: gateway.balanced,
        zone: gateway.zone,
    };
    facts.peer_gateways(link).into_iter().map(hop).collect()
}

/// One endpoint and one link.
struct Prober<'a> {
    facts: &'a Facts,
    link: &'a Link,
    key: &'a LinkKey,
    block: Block,
    rings: &'a Rings,
    unix: Duration,
}

impl Prober<'_> {
    /// Of control datagrams with a target of the peer.
    fn keys(&self, target: AcrossTarget) -> Arc<tombolo_overlay::keys::KeyRing> {
        let ring = self.rings.across(self.key, self.link.tag, target, self.unix);
        Arc::new(ring.map(|key| key.of_prober(self.facts.cluster.tag, self.block)))
    }

    fn flat(&self, calls: &[ServiceKey]) -> Flat {
        let own = self.facts.cluster.tag;
        let caller_keys = self.rings.across(self.key, own, AcrossTarget::Endpoint(self.block), self.unix);
        let ranges = self.facts.allowed_ranges(&self.link.peer);
        let mut flat = Flat { caller_keys: (*caller_keys).clone(), ranges, ..Flat::default() };
        let exports = self.facts.imports.get(&self.link.peer).map(|import| &import.exports);
        for export in calls.iter().filter_map(|service| exports?.get(service)) {
            let allowed = export.endpoints.iter().filter(|(_, address)| flat.ranges.allows(*address));
            let mut endpoints: Vec<_> = allowed.collect();
            let own = rendezvous::key_of(&self.block.value().to_be_bytes());
            endpoints.sort_by_key(|(id, _)| rendezvous::weight(own, id.value().into()));
            let chosen = endpoints.into_iter().rev().take(MAX_ENDPOINTS);
            let ids: Vec<EndpointId> = chosen
                .map(|(id, address)| {
                    let keys = self.keys(AcrossTarget::Endpoint(id.block()));
                    flat.endpoints.insert(id.block(), FlatEndpoint { address: *address, keys });
                    *id
                })
                .collect();
            // One without an address there (behind NAT, or beyond the ranges) would never be chosen. Where each has a share
            // of its own, gateways choose instead, who know all.
            let all = usize::try_from(export.healthy).unwrap_or(usize::MAX).min(MAX_ENDPOINTS);
            if export.weights.is_empty() || ids.len() >= all {
                flat.services.insert(export.handle, ids);
            }
        }
        flat
    }
}
