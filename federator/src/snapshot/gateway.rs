//! A gateway's snapshot: who is where, what importers may reach, and the linked clusters.

use std::collections::HashSet;
use std::time::Duration;

use tombolo_model::ids::{Block, EndpointId, Handle};
use tombolo_model::names::ServiceKey;
use tombolo_overlay::keys::{HandleBinding, LinkKey};
use tombolo_proto::v1;

use crate::core::lapsed::{may_come_back, renewal_salt};
use crate::core::tokens::is_open_provisional;
use crate::facts::{CONTROL, Facts, FirstContact, HandleRecord, JOIN, Link, RENEWAL, Role};
use crate::registry::Gateway;
use crate::revocations;
use crate::rotation;

/// First packets per second of one handle: a sidecar does some 1,500 handshakes a second on one core.
const SERVICE_INITIALS: u32 = 1000;
/// Federators and members reconnect; a cluster of a thousand is back in ten seconds.
const CONTROL_INITIALS: u32 = 200;
/// Guessing tokens must be slow, a rollout of a hundred pods must not.
const JOIN_INITIALS: u32 = 20;
/// One federator of one cluster, every few seconds. The key is no secret.
const FIRST_CONTACT_INITIALS: u32 = 5;
/// A thousand machines come back within a minute.
const RENEWAL_INITIALS: u32 = 20;

/// The snapshot of the replica `name`. `monotonic` as the registry's clock.
pub fn snapshot(facts: &Facts, name: &str, monotonic: Duration, unix: Duration) -> v1::GatewaySnapshot {
    let cluster = &facts.cluster;
    v1::GatewaySnapshot {
        revision: 0,
        epoch: cluster.epoch.0,
        cluster: cluster.name.to_string(),
        tag: cluster.tag.value(),
        cluster_key: cluster.cluster_key.as_bytes().to_vec(),
        endpoints: endpoints(facts, monotonic, unix),
        handles: inbound(facts),
        links: links(facts),
        siblings: facts
            .registry
            .gateways
            .values()
            .filter(|gateway| gateway.name != name)
            .filter(|gateway| gateway.presence != crate::registry::Presence::Left)
            .map(|gateway| replica(gateway, gateway.inner))
            .collect(),
        provisional: facts
            .leases
            .values()
            .filter(|lease| is_open_provisional(lease, unix.as_secs()))
            .map(|lease| v1::ProvisionalLease {
                block: lease.block.value(),
                not_after_unix: i64::try_from(lease.not_after).unwrap_or(i64::MAX),
            })
            .collect(),
        name: name.to_owned(),
        revocations: revocations::in_force(facts),
        trust_bundle_json: facts.trust.bundle_json.clone(),
        renewal: Some(rotation::renewal(facts, unix)),
    }
}

fn replica(gateway: &Gateway, address: std::net::SocketAddr) -> v1::GatewayReplica {
    v1::GatewayReplica {
        name: gateway.name.clone(),
        address: address.to_string(),
        balanced: false,
        zone: gateway.zone.clone(),
    }
}

fn endpoint(id: EndpointId, address: Option<std::net::SocketAddr>, gone: bool) -> v1::GatewayEndpoint {
    v1::GatewayEndpoint {
        block: id.block().value(),
        address: address.map(|a| a.to_string()).unwrap_or_default(),
        registers: address.is_none(),
        min_incarnation: id.incarnation().value().into(),
        gone,
        renewal: 0,
    }
}

/// Every endpoint of the cluster: members, gateways' own, this federator; and who holds a lease and has not said hello
/// yet, since a machine outside reaches us through the gateways alone; one whose identity has ended costs 12 bytes until it
/// can't come back any more.
fn endpoints(facts: &Facts, monotonic: Duration, unix: Duration) -> Vec<v1::GatewayEndpoint> {
    let federator = facts.federator.iter().map(|f| endpoint(f.endpoint, Some(f.address), false));
    let gateways = facts.registry.gateways.values().filter_map(|gateway| {
        let (id, address) = gateway.endpoint?;
        Some(endpoint(id, address, false))
    });
    let members = facts.registry.members.values().filter_map(|member| {
        // Several sockets of one start have several incarnations: the oldest of them is the least that lives.
        let oldest = member.ids.iter().min_by_key(|id| id.incarnation().value())?;
        Some(endpoint(*oldest, member.address, member.gone(monotonic)))
    });
    let mut endpoints: Vec<_> = federator.chain(gateways).chain(members).collect();
    let known: HashSet<u32> = endpoints.iter().map(|endpoint| endpoint.block).collect();
    let comes_back = may_come_back(facts, unix.as_secs());
    let silent = facts.leases.values().filter(|lease| {
        let joins = matches!(lease.role, Role::Sidecar | Role::Vm | Role::Gateway);
        let holds = joins && lease.not_after >= unix.as_secs() || comes_back(lease);
        holds && !known.contains(&lease.block.value())
    });
    endpoints.extend(silent.map(|lease| v1::GatewayEndpoint {
        block: lease.block.value(),
        registers: true,
        ..Default::default()
    }));
    for endpoint in &mut endpoints {
        let lease = Block::new(endpoint.block).and_then(|block| facts.leases.get(&block));
        if let Some(lease) = lease.filter(|lease| comes_back(lease)) {
            endpoint.renewal = renewal_salt(&lease.spiffe_id).get();
        }
    }
    endpoints
}

fn handle(
    record: &HandleRecord,
    class: v1::HandleClass,
    endpoints: Vec<EndpointId>,
    initials_per_second: u32,
) -> v1::InboundHandle {
    v1::InboundHandle {
        binding: Some(record.binding().to_wire()),
        class: class.into(),
        endpoints: endpoints.into_iter().map(EndpointId::value).collect(),
        initials_per_second,
    }
}

/// What importers may reach here: each service's healthy endpoints, the federators, and the way in for joiners.
fn inbound(facts: &Facts) -> Vec<v1::InboundHandle> {
    let federators: Vec<EndpointId> = facts.federator.iter().map(|f| f.endpoint).collect();
    let mut handles = Vec::with_capacity(facts.handles.len() + 1);
    for record in facts.handles.values().filter(|record| record.released.is_none()) {
        if record.service == CONTROL {
            handles.push(handle(record, v1::HandleClass::Control, federators.clone(), CONTROL_INITIALS));
        } else if let Ok(service) = record.service.parse::<ServiceKey>() {
            let healthy = facts.registry.healthy(&service);
            handles.push(handle(record, v1::HandleClass::Service, healthy, SERVICE_INITIALS));
        }
    }
    for contact in facts.pending_contacts() {
        handles.push(v1::InboundHandle {
            binding: Some(FirstContact::binding(&contact.peer, contact.tag).to_wire()),
            class: v1::HandleClass::FirstContact.into(),
            endpoints: federators.iter().map(|id| id.value()).collect(),
            initials_per_second: FIRST_CONTACT_INITIALS,
        });
    }
    let reserved = [
        (Handle::JOIN, JOIN, v1::HandleClass::Join, JOIN_INITIALS),
        (Handle::RENEW, RENEWAL, v1::HandleClass::Renewal, RENEWAL_INITIALS),
    ];
    for (handle, service, class, initials_per_second) in reserved {
        let (importer, service) = (facts.cluster.name.clone(), service.to_owned());
        let binding = HandleBinding { handle, importer, service, export_uid: [0; 16] };
        handles.push(v1::InboundHandle {
            binding: Some(binding.to_wire()),
            class: class.into(),
            endpoints: federators.iter().map(|id| id.value()).collect(),
            initials_per_second,
        });
    }
    handles
}

fn links(facts: &Facts) -> Vec<v1::GatewayLink> {
    let own = &facts.cluster;
    let peers = facts.live_links().filter_map(|link| {
        let key = link.link_key()?;
        Some(v1::GatewayLink {
            peer: link.peer.to_string(),
            tag: link.tag.value(),
            key: key.as_bytes().to_vec(),
            gateways: peer_gateways(facts, link),
            outbound: outbound(facts, link),
            self_: false,
        })
    });
    let to_itself = v1::GatewayLink {
        peer: own.name.to_string(),
        tag: own.tag.value(),
        key: own.self_link_key.as_bytes().to_vec(),
        gateways: Vec::new(),
        outbound: facts.handles_of(&own.name).map(|record| record.binding().to_wire()).collect(),
        self_: true,
    };
    peers
        .chain(facts.pending_contacts().map(|contact| to_be_linked(facts, contact)))
        .chain([to_itself])
        .collect()
}

/// A way for first contact, and nothing else: no service has a handle that is keyed by it.
fn to_be_linked(facts: &Facts, contact: &FirstContact) -> v1::GatewayLink {
    let own = &facts.cluster;
    let key = LinkKey::first_contact(own.trust_domain.as_str(), own.tag, contact.tag);
    let gateway = |(index, address): (usize, &std::net::SocketAddr)| v1::GatewayReplica {
        name: format!("first-contact-{index}"),
        address: address.to_string(),
        // It may be a balancer's: what is behind it is told once it is linked.
        balanced: false,
        zone: String::new(),
    };
    v1::GatewayLink {
        peer: contact.peer.to_string(),
        tag: contact.tag.value(),
        key: key.as_bytes().to_vec(),
        gateways: contact.gateways.iter().enumerate().map(gateway).collect(),
        outbound: vec![FirstContact::binding(&own.name, own.tag).to_wire()],
        self_: false,
    }
}

fn peer_gateways(facts: &Facts, link: &Link) -> Vec<v1::GatewayReplica> {
    facts
        .peer_gateways(link)
        .into_iter()
        .map(|gateway| v1::GatewayReplica {
            name: gateway.name,
            address: gateway.address.to_string(),
            balanced: gateway.balanced,
            zone: gateway.zone,
        })
        .collect()
}

/// The peer's handles that this cluster may call.
fn outbound(facts: &Facts, link: &Link) -> Vec<v1::HandleBinding> {
    let own = &facts.cluster.name;
    let control = link.control.binding(own).to_wire();
    let exports = facts.imports.get(&link.peer).into_iter().flat_map(|import| import.exports.iter());
    let services = exports.map(|(service, export)| {
        HandleBinding {
            handle: export.handle,
            importer: own.clone(),
            service: service.to_string(),
            export_uid: export.export_uid,
        }
        .to_wire()
    });
    std::iter::once(control).chain(services).collect()
}
