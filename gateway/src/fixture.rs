//! A small cluster for unit tests: east, linked with west.
//!
//! ```text
//!  block 1  at 10.0.1.1:7442        block 4  at 10.0.1.4:7442, incarnations below 3 gone
//!  block 2  registers               block 5  a joiner's
//!  block 3  gone                    handles  300 service, 301 control, 302 service without endpoints, 2 join
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tombolo_model::ids::{Block, ClusterTag, EndpointId, Handle, Incarnation};
use tombolo_overlay::cid::{Cid, Kind};
use tombolo_overlay::keys::{CidKey, ClusterKey, HandleBinding, Hour, LinkKey};
use tombolo_proto::v1;

use crate::decide::Now;
use crate::tables::Tables;

pub const UNIX: Duration = Duration::from_secs(494_222 * 3600 + 1800);
pub const NOW: Now = Now { since_start: Duration::from_secs(100), unix: UNIX };
pub const CLUSTER_KEY: [u8; 32] = [1; 32];
pub const LINK_KEY: [u8; 32] = [2; 32];
pub const SELF_KEY: [u8; 32] = [3; 32];

pub fn hour() -> Hour {
    Hour::at(UNIX)
}
pub fn east() -> ClusterTag {
    ClusterTag::new(0x0e).unwrap()
}
pub fn west() -> ClusterTag {
    ClusterTag::new(0x0f).unwrap()
}
pub fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}
pub fn endpoint(block: u32, incarnation: u8) -> EndpointId {
    Block::new(block).unwrap().endpoint(Incarnation::new(incarnation).unwrap())
}
pub fn cluster_key() -> ClusterKey {
    ClusterKey::from_bytes(CLUSTER_KEY)
}
pub fn endpoint_key(block: u32) -> CidKey {
    cluster_key().endpoint_key(Block::new(block).unwrap(), hour())
}
pub fn link_key() -> LinkKey {
    LinkKey::from_bytes(LINK_KEY)
}

pub fn binding(handle: u32, importer: &str, service: &str) -> HandleBinding {
    HandleBinding {
        handle: Handle::from_u32(handle),
        importer: importer.parse().unwrap(),
        service: service.into(),
        export_uid: [7; 16],
    }
}

pub fn inbound(
    handle: u32,
    importer: &str,
    service: &str,
    class: v1::HandleClass,
    endpoints: &[EndpointId],
) -> v1::InboundHandle {
    v1::InboundHandle {
        binding: Some(binding(handle, importer, service).to_wire()),
        class: class.into(),
        endpoints: endpoints.iter().map(|e| e.value()).collect(),
        initials_per_second: 5,
    }
}

pub fn snapshot() -> v1::GatewaySnapshot {
    use v1::HandleClass::{Control, Join, Service};
    let record = |block: u32, address: &str| v1::GatewayEndpoint {
        block,
        address: address.into(),
        registers: address.is_empty(),
        ..Default::default()
    };
    let replica = |name: &str, address: &str| v1::GatewayReplica {
        name: name.into(),
        address: address.into(),
        ..Default::default()
    };
    v1::GatewaySnapshot {
        epoch: 1,
        revision: 1,
        revocations: Vec::new(),
        trust_bundle_json: String::new(),
        renewal: None,
        cluster: "east".into(),
        tag: east().value(),
        cluster_key: CLUSTER_KEY.to_vec(),
        endpoints: vec![
            record(1, "10.0.1.1:7442"),
            record(2, ""),
            v1::GatewayEndpoint { gone: true, ..record(3, "10.0.1.3:7442") },
            v1::GatewayEndpoint { min_incarnation: 3, ..record(4, "10.0.1.4:7442") },
        ],
        handles: vec![
            inbound(300, "west", "shop/web", Service, &[endpoint(1, 0)]),
            inbound(301, "west", "control", Control, &[endpoint(1, 0)]),
            inbound(302, "west", "shop/idle", Service, &[]),
            inbound(303, "east", "shop/vm", Service, &[endpoint(2, 0)]),
            inbound(2, "east", "join", Join, &[endpoint(1, 0)]),
        ],
        links: vec![
            v1::GatewayLink {
                peer: "west".into(),
                tag: west().value(),
                key: LINK_KEY.to_vec(),
                gateways: vec![replica("gw-1", "10.0.2.11:7440"), replica("gw-2", "10.0.2.12:7440")],
                outbound: vec![binding(400, "east", "shop/cart").to_wire()],
                self_: false,
            },
            v1::GatewayLink {
                peer: "east".into(),
                tag: east().value(),
                key: SELF_KEY.to_vec(),
                self_: true,
                ..Default::default()
            },
        ],
        siblings: vec![replica("me", "10.0.1.10:7441"), replica("gw-2", "10.0.1.12:7441")],
        provisional: vec![v1::ProvisionalLease { block: 5, not_after_unix: UNIX.as_secs() as i64 + 900 }],
        name: "me".into(),
    }
}

pub fn tables() -> Arc<Tables> {
    parse(&snapshot(), None)
}

pub fn parse(wire: &v1::GatewaySnapshot, previous: Option<&Arc<Tables>>) -> Arc<Tables> {
    Arc::new(Tables::parse(wire, &"east".parse().unwrap(), east(), previous, UNIX).unwrap())
}

/// IDs that their targets' keys admit.
pub fn to_endpoint(endpoint: EndpointId, nonce: u8) -> Cid {
    let key = cluster_key().endpoint_key(endpoint.block(), hour());
    Cid::mint(Kind::Endpoint, east(), endpoint.value(), [nonce; 7], hour(), &key)
}
pub fn to_handle(kind: Kind, tag: ClusterTag, key: &LinkKey, binding: &HandleBinding, nonce: u8) -> Cid {
    let mac = key.handle_key(binding, hour());
    Cid::mint(kind, tag, binding.handle.value(), [nonce; 7], hour(), &mac)
}
