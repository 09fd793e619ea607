//! A sidecar's snapshot: where things are, what may call it, and what it calls.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tombolo_identity::SpiffeId;
use tombolo_identity::authority::adopt::Upstream;
use tombolo_model::ids::{Block, EndpointId};
use tombolo_model::names::{ClusterName, Namespace, ServiceKey};
use tombolo_model::sync::Freshness;
use tombolo_overlay::keys::HandleBinding;
use tombolo_proto::v1;

use super::across::across;
use super::rings::Rings;
use super::{gateways_for, port_to_wire};
use crate::exports;
use crate::facts::pods::SentToPod;
use crate::facts::{Facts, Port, Role};
use crate::foreign;
use crate::jwt;
use crate::policies::{self, policy_for};
use crate::revocations;
use crate::rotation;

/// The snapshot of the member that holds `block` and calls `upstreams`; without its lease, which the caller adds.
pub fn snapshot(
    facts: &Facts,
    block: Block,
    upstreams: &[ServiceKey],
    rings: &Rings,
    monotonic: Duration,
    unix: Duration,
) -> v1::SidecarSnapshot {
    let cluster = &facts.cluster;
    let role = facts.leases.get(&block).map_or(Role::Vm, |lease| lease.role);
    let direct = role != Role::Vm;
    let access_policies = access_policies(facts, block);
    v1::SidecarSnapshot {
        revision: 0,
        epoch: cluster.epoch.0,
        cluster: cluster.name.to_string(),
        tag: cluster.tag.value(),
        gateways: gateways_for(facts, role),
        endpoints: if direct { neighbours(facts, block, upstreams, monotonic) } else { Vec::new() },
        inbound: inbound(facts, block),
        upstreams: upstreams.iter().map(|service| upstream(facts, service, rings, unix)).collect(),
        lease: None,
        federators: facts
            .federator
            .iter()
            .map(|f| v1::ControlTarget {
                endpoint: f.endpoint.value(),
                address: if direct { f.address.to_string() } else { String::new() },
            })
            .collect(),
        trust_bundle_json: facts.trust.bundle_json.clone(),
        direct,
        across: {
            let across = across(facts, block, direct.then_some(upstreams), rings, unix);
            let mut links: Vec<_> = across.iter().map(|(tag, across)| across.to_wire(*tag)).collect();
            links.sort_by_key(|link| link.tag);
            links
        },
        revocations: revocations::in_force(facts),
        renewal: Some(rotation::renewal(facts, unix)),
        cluster_properties: cluster_properties(facts, &access_policies),
        jwt_authorities: jwt::believed(facts).into_iter().map(jwt::to_wire).collect(),
        federated_bundles: federated_bundles(facts, block),
        upstream_roots: upstream_roots(facts),
        clones: clones(facts, block),
        question: question(facts, block),
        pod_services: pod_services(facts, block),
        access_policies: access_policies.into_iter().map(|(policy, _)| policy).collect(),
    }
}

/// Others that came with its identity while it lived.
fn clones(facts: &Facts, block: Block) -> Option<v1::Clones> {
    let seen = facts.registry.members.get(&block).map(|member| &member.clones)?;
    (seen.refused > 0).then(|| v1::Clones {
        refused: seen.refused,
        last_unix: i64::try_from(seen.last_unix).unwrap_or(i64::MAX),
        host: seen.host.clone(),
    })
}

/// What Kubernetes sends to its pod. `None`: it is in none, or that is not known yet.
fn pod_services(facts: &Facts, block: Block) -> Option<v1::PodServices> {
    let lease = facts.leases.get(&block)?;
    let pod = lease.pod.as_ref().filter(|_| facts.pods.told)?;
    // A slice names a pod by what anybody may write in a namespace of his own.
    let id: SpiffeId = lease.spiffe_id.parse().ok()?;
    let own = id.within_cluster()?.strip_prefix("/ns/")?.split('/').next()?.to_owned();
    let sent = facts.pods.of.get(pod.uid.as_str());
    let service = |(service, sent): (&ServiceKey, &SentToPod)| v1::PodService {
        service: service.to_string(),
        ready: sent.ready,
        ports: sent
            .ports
            .iter()
            .map(|port| v1::PodPort {
                name: port.name.clone(),
                port: port.port.into(),
                target: port.target.into(),
                protocol: port.protocol.clone(),
                app_protocol: port.app_protocol.clone(),
            })
            .collect(),
    };
    Some(v1::PodServices {
        services: sent
            .into_iter()
            .flat_map(|sent| sent.iter())
            .filter(|(of, _)| of.namespace.as_str() == own)
            .map(service)
            .collect(),
    })
}

/// Whether it lives, as long as it has not answered.
fn question(facts: &Facts, block: Block) -> u64 {
    let member = facts.registry.members.get(&block);
    member.filter(|member| member.answered < member.asked).map_or(0, |member| member.asked)
}

/// Of the authority above this cluster's CA: peers of the same trust domain that it has certified directly.
fn upstream_roots(facts: &Facts) -> Vec<Vec<u8>> {
    let roots = facts.upstream.as_deref().map(Upstream::roots).unwrap_or_default();
    roots.iter().map(|root| root.to_vec()).collect()
}

/// What the workload behind it is told of foreign trust domains.
fn federated_bundles(facts: &Facts, block: Block) -> Vec<v1::FederatedBundle> {
    let id = facts.leases.get(&block).and_then(|lease| lease.spiffe_id.parse().ok());
    id.map(|id| foreign::for_member(facts, &id)).unwrap_or_default()
}

/// Access policies that select what it serves, and whether each asks for cluster properties.
fn access_policies(facts: &Facts, block: Block) -> Vec<(v1::AccessPolicy, bool)> {
    let Some(member) = facts.registry.members.get(&block) else { return Vec::new() };
    let namespaces: BTreeSet<&Namespace> = member.services.keys().map(|service| &service.namespace).collect();
    let policies = namespaces.into_iter().flat_map(|namespace| policies::access_policies(facts, namespace));
    policies
        .filter_map(|(stored, spec)| {
            let metadata = &stored.object.metadata;
            let namespace = metadata.namespace.as_deref().unwrap_or_default();
            let selected = |service: &&ServiceKey| {
                service.namespace.as_str() == namespace && spec.selects(&service.name)
            };
            let services: Vec<String> =
                member.services.keys().filter(selected).map(ToString::to_string).collect();
            if services.is_empty() {
                return None;
            }
            let policy = v1::AccessPolicy {
                name: format!("{namespace}/{}", metadata.name),
                // What can't be written can't be read either, and then nobody is admitted.
                spec_json: serde_json::to_string(spec).unwrap_or_default(),
                services,
            };
            Some((policy, spec.uses_properties()))
        })
        .collect()
}

/// Of every cluster that may call, where a policy asks for them: others would be told of each change for nothing.
fn cluster_properties(facts: &Facts, policies: &[(v1::AccessPolicy, bool)]) -> Vec<v1::ClusterProperties> {
    if !policies.iter().any(|(_, uses_properties)| *uses_properties) {
        return Vec::new();
    }
    let properties = |cluster: &ClusterName, properties: &BTreeMap<String, String>| v1::ClusterProperties {
        cluster: cluster.to_string(),
        properties: properties.clone().into_iter().collect(),
    };
    let own = properties(&facts.cluster.name, &facts.cluster.properties);
    let peers = facts.live_links().map(|link| properties(&link.peer, policies::properties_of(facts, link)));
    std::iter::once(own).chain(peers).collect()
}

/// Endpoints of this cluster that it talks to directly: those that serve what it calls, and, where it serves itself,
/// every caller.
fn neighbours(
    facts: &Facts,
    block: Block,
    upstreams: &[ServiceKey],
    monotonic: Duration,
) -> Vec<v1::LocalEndpoint> {
    let serves = facts.registry.members.get(&block).is_some_and(|member| !member.services.is_empty());
    facts
        .registry
        .members
        .values()
        .filter(|member| member.block != block && !member.gone(monotonic))
        .filter(|member| serves || upstreams.iter().any(|service| member.services.contains_key(service)))
        .filter_map(|member| {
            let address = member.address?.to_string();
            Some(v1::LocalEndpoint { block: member.block.value(), address })
        })
        .collect()
}

/// The handles by which its services may be called.
fn inbound(facts: &Facts, block: Block) -> Vec<v1::InboundHandle> {
    let Some(member) = facts.registry.members.get(&block) else { return Vec::new() };
    let importers: BTreeSet<&ClusterName> =
        facts.live_links().map(|link| &link.peer).chain([&facts.cluster.name]).collect();
    let handles = member.services.keys().flat_map(|service| {
        let service = service.to_string();
        importers.iter().filter_map(move |importer| facts.handle(importer, &service))
    });
    handles
        .map(|record| v1::InboundHandle {
            binding: Some(record.binding().to_wire()),
            class: v1::HandleClass::Service.into(),
            endpoints: Vec::new(),
            initials_per_second: 0,
        })
        .collect()
}

fn upstream(facts: &Facts, service: &ServiceKey, rings: &Rings, unix: Duration) -> v1::Upstream {
    let mut backends: Vec<v1::Backend> = own_backend(facts, service, rings, unix).into_iter().collect();
    for link in facts.live_links() {
        let Some(import) = facts.imports.get(&link.peer) else { continue };
        let Some(export) = import.exports.get(service) else { continue };
        let Some(key) = link.link_key() else { continue };
        // Nobody has vouched for it within the lease, or nobody serves it: there is nothing to demand of a peer.
        if import.freshness == Freshness::Expired || export.spiffe_ids.is_empty() {
            continue;
        }
        let binding = HandleBinding {
            handle: export.handle,
            importer: facts.cluster.name.clone(),
            service: service.to_string(),
            export_uid: export.export_uid,
        };
        let properties = if import.properties.is_empty() { &link.properties } else { &import.properties };
        backends.push(v1::Backend {
            cluster: link.peer.to_string(),
            tag: link.tag.value(),
            handle: export.handle.value(),
            keys: Some(rings.handle(&key, &binding, unix)),
            spiffe_ids: export.spiffe_ids.clone(),
            weights: export.weights.clone(),
            healthy: export.healthy,
            total: export.total,
            properties: properties.clone().into_iter().collect(),
            stale: import.freshness == Freshness::Stale,
            endpoints: Vec::new(),
            export_uid: hex::encode(export.export_uid),
            ports: export.ports.iter().map(port_to_wire).collect(),
        });
    }
    let policy = policy_for(facts, service);
    let exporters = exports::exporters(facts, service, facts.registry.serving(service));
    let mut ports = exports::merge_ports(&exporters).ports;
    if ports.is_empty() {
        // Served here without being exported.
        ports = exports::served_ports(facts.registry.serving(service), service);
    }
    v1::Upstream {
        service: service.to_string(),
        ports: ports.iter().map(port_to_wire).collect(),
        backends,
        failover_policy_json: policy
            .and_then(|(_, spec)| serde_json::to_string(spec).ok())
            .unwrap_or_default(),
        policy_name: policy.map(|(stored, _)| stored.object.metadata.name.clone()).unwrap_or_default(),
        addresses: crate::names::addresses(facts, service),
    }
}

/// The own cluster's share, called over its link to itself.
fn own_backend(facts: &Facts, service: &ServiceKey, rings: &Rings, unix: Duration) -> Option<v1::Backend> {
    let cluster = &facts.cluster;
    let record = facts.handle(&cluster.name, &service.to_string())?;
    let (spiffe_ids, weights) = exports::identities(facts, service);
    if spiffe_ids.is_empty() {
        return None;
    }
    let (healthy, total) = facts.registry.counts(service);
    Some(v1::Backend {
        cluster: cluster.name.to_string(),
        tag: cluster.tag.value(),
        handle: record.handle.value(),
        keys: Some(rings.handle(&cluster.self_link_key, &record.binding(), unix)),
        spiffe_ids,
        weights,
        healthy,
        total,
        properties: cluster.properties.clone().into_iter().collect(),
        stale: false,
        endpoints: facts.registry.healthy(service).into_iter().map(EndpointId::value).collect(),
        export_uid: hex::encode(record.export_uid),
        ports: own_ports(facts, service).iter().map(port_to_wire).collect(),
    })
}

/// What this cluster serves a service on, whether it exports it or not.
fn own_ports(facts: &Facts, service: &ServiceKey) -> Vec<Port> {
    let export = exports::export_of(facts, service).filter(exports::Export::is_valid);
    match export {
        Some(export) => export.ports(facts.registry.serving(service)),
        None => exports::served_ports(facts.registry.serving(service), service),
    }
}
