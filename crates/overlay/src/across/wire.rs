//! [`Across`] on its way from a federator to its sidecars. Records are refused one by one; the rest counts.

use std::sync::Arc;

use tombolo_model::ids::{Block, ClusterTag, EndpointId, Handle};
use tombolo_model::names::ClusterName;
use tombolo_model::ranges::AllowedRanges;
use tombolo_proto::convert::{self, FieldError};
use tombolo_proto::v1;

use super::{Across, Flat, FlatEndpoint};
use crate::keys::KeyRing;
use crate::member::gateway_hops;

/// A link names a handful.
const MAX_RANGES: usize = 256;

impl Across {
    pub fn to_wire(&self, tag: ClusterTag) -> v1::AcrossLink {
        let gateway = |hop: &crate::GatewayHop| v1::GatewayReplica {
            name: hop.name.clone(),
            address: hop.address.to_string(),
            balanced: hop.balanced,
            zone: hop.zone.clone(),
        };
        v1::AcrossLink {
            peer: self.cluster.clone(),
            tag: tag.value(),
            gateways: self.gateways.iter().map(gateway).collect(),
            gateway_keys: Some(self.gateway_keys.to_wire()),
            flat: self.flat.as_ref().map(Flat::to_wire),
        }
    }

    /// With what was left out, and why. A link without a usable tag is left out whole.
    pub fn from_wire(wire: &v1::AcrossLink) -> Result<(ClusterTag, Self, Vec<FieldError>), FieldError> {
        let peer: ClusterName = convert::parse("across.peer", &wire.peer)?;
        let tag = convert::tag("across.tag", wire.tag)?;
        let (gateways, mut rejected) = gateway_hops(&wire.gateways);
        let keys = wire.gateway_keys.clone().unwrap_or_default();
        let gateway_keys = Arc::new(KeyRing::from_wire(&keys)?);
        let flat = wire.flat.as_ref().map(|flat| Flat::from_wire(flat, &mut rejected)).transpose()?;
        Ok((tag, Self { cluster: peer.to_string(), gateways, gateway_keys, flat }, rejected))
    }
}

impl Flat {
    fn to_wire(&self) -> v1::FlatLink {
        // In order: a snapshot that says the same must be the same.
        let mut endpoints: Vec<_> = self.endpoints.iter().collect();
        endpoints.sort_by_key(|(block, _)| **block);
        let mut services: Vec<_> = self.services.iter().collect();
        services.sort_by_key(|(handle, _)| handle.value());
        v1::FlatLink {
            endpoints: endpoints
                .into_iter()
                .map(|(block, endpoint)| v1::FlatEndpoint {
                    block: block.value(),
                    address: endpoint.address.to_string(),
                    keys: Some(endpoint.keys.to_wire()),
                })
                .collect(),
            services: services
                .into_iter()
                .map(|(handle, endpoints)| v1::FlatService {
                    handle: handle.value(),
                    endpoints: endpoints.iter().map(|endpoint| endpoint.value()).collect(),
                })
                .collect(),
            caller_keys: Some(self.caller_keys.to_wire()),
            ranges: self.ranges.ranges.iter().map(ToString::to_string).collect(),
            loopback: self.ranges.loopback,
        }
    }

    /// Ranges and keys must read whole: what is left out of them would open or close the link's door.
    fn from_wire(wire: &v1::FlatLink, rejected: &mut Vec<FieldError>) -> Result<Self, FieldError> {
        if wire.ranges.len() > MAX_RANGES {
            return Err(FieldError::new("across.ranges", wire.ranges.len(), format!("at most {MAX_RANGES}")));
        }
        let ranges = wire.ranges.iter().map(|range| convert::parse("across.ranges", range));
        let ranges = AllowedRanges { ranges: ranges.collect::<Result<_, _>>()?, loopback: wire.loopback };
        let caller_keys = KeyRing::from_wire(&wire.caller_keys.clone().unwrap_or_default())?;
        let mut flat = Self { caller_keys, ranges, ..Self::default() };
        for endpoint in &wire.endpoints {
            match flat_endpoint(endpoint, &flat.ranges) {
                Ok((block, endpoint)) => {
                    flat.endpoints.insert(block, endpoint);
                }
                Err(error) => rejected.push(error),
            }
        }
        for service in &wire.services {
            let endpoints = service.endpoints.iter().copied().map(EndpointId::from_u32);
            flat.services.insert(Handle::from_u32(service.handle), endpoints.collect());
        }
        Ok(flat)
    }
}

fn flat_endpoint(
    wire: &v1::FlatEndpoint,
    ranges: &AllowedRanges,
) -> Result<(Block, FlatEndpoint), FieldError> {
    let block = convert::block("across.endpoints.block", wire.block)?;
    let address = convert::address("across.endpoints.address", &wire.address)?
        .filter(|address| ranges.allows(*address))
        .ok_or_else(|| {
            FieldError::new("across.endpoints.address", &wire.address, "an address that the link allows")
        })?;
    let keys = KeyRing::from_wire(&wire.keys.clone().unwrap_or_default())?;
    Ok((block, FlatEndpoint { address, keys: Arc::new(keys) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{CidKey, Hour};

    fn ring(byte: u8) -> KeyRing {
        KeyRing::derive(Hour(10), 2, |_| CidKey::from_bytes([byte; 16]))
    }

    #[test]
    fn a_link_round_trips_and_an_endpoint_outside_its_ranges_is_left_out_by_name() {
        let tag = ClusterTag::new(2).unwrap();
        let block = |n| Block::new(n).unwrap();
        let endpoint =
            |address: &str| FlatEndpoint { address: address.parse().unwrap(), keys: Arc::new(ring(3)) };
        let across = Across {
            cluster: "west".into(),
            gateways: vec![crate::GatewayHop::at("192.0.2.1:7440".parse().unwrap())],
            gateway_keys: Arc::new(ring(1)),
            flat: Some(Flat {
                endpoints: [(block(1), endpoint("10.1.0.1:7442"))].into(),
                services: [(Handle::from_u32(300), vec![EndpointId::from_u32(1 << 4)])].into(),
                caller_keys: ring(2),
                ranges: AllowedRanges { ranges: vec!["10.1.0.0/16".parse().unwrap()], loopback: false },
            }),
        };
        let mut wire = across.to_wire(tag);
        assert_eq!(Across::from_wire(&wire).unwrap(), (tag, across.clone(), Vec::new()));
        let flat = wire.flat.as_mut().unwrap();
        flat.endpoints.push(v1::FlatEndpoint { block: 2, address: "10.2.0.1:7442".into(), keys: None });
        let (_, read, rejected) = Across::from_wire(&wire).unwrap();
        assert_eq!(read, across);
        assert!(rejected[0].to_string().contains("10.2.0.1:7442"), "{rejected:?}");
        wire.flat.as_mut().unwrap().ranges.push("10.1.0.0/99".into());
        assert!(Across::from_wire(&wire).unwrap_err().to_string().contains("10.1.0.0/99"));
    }
}
