//! What names resolve to in this cluster (pure): which services have a virtual address, and what resolvers are told of
//! each.
//!
//! A service has an address when it is imported, exported or served here, unless it is headless. It has its
//! `clusterset.local` name when any cluster exports it (KEP-1645), and its ordinary `cluster.local` name is answered from
//! here when this cluster serves it, or a `FailoverPolicy` is about the `Service`: so that it fails over without a change
//! in any caller. A headless service resolves to the addresses of its ready endpoints: this cluster's, and those of peers
//! over flat links, since others can't be reached at their addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::resource::service_export::ServiceType;
use tombolo_model::resource::{ObjectKey, Spec};
use tombolo_model::sync::Freshness;
use tombolo_proto::v1;

use crate::exports;
use crate::facts::{Facts, NamedEndpoint, Role, StoredObject};
use crate::registry::Member;
use crate::snapshot::port_to_wire;

/// Of one headless service: a reply over TCP holds some 3,000 addresses, and a resolver's caller wants a few.
const MAX_ENDPOINTS: usize = 1000;

/// Every service that has a name here, and the type that its oldest exporter gives it.
pub fn services(facts: &Facts) -> BTreeMap<ServiceKey, ServiceType> {
    let mut services: BTreeMap<ServiceKey, ServiceType> =
        facts.registry.services().map(|service| (service.clone(), ServiceType::ClusterSetIp)).collect();
    let exports = exports::exports(facts).map(|export| export.service);
    let exported: BTreeSet<ServiceKey> =
        facts.imports.values().flat_map(|import| import.exports.keys().cloned()).chain(exports).collect();
    for service in exported {
        let kind = exports::service_type(facts, &service);
        services.insert(service, kind);
    }
    services
}

/// The services that get a virtual address.
pub fn with_address(facts: &Facts) -> BTreeSet<ServiceKey> {
    let addressed = |(service, kind)| (kind == ServiceType::ClusterSetIp).then_some(service);
    services(facts).into_iter().filter_map(addressed).collect()
}

/// What a service's names resolve to, as it is written on the wire: its ClusterSetIPs where Kubernetes has an import of it
/// (KEP-1645), else the virtual addresses that it is given here.
pub fn addresses(facts: &Facts, service: &ServiceKey) -> Vec<String> {
    match facts.pods.addresses.get(service) {
        Some(known) if !known.set.is_empty() => known.set.iter().map(ToString::to_string).collect(),
        _ => given(facts, service).collect(),
    }
}

fn given(facts: &Facts, service: &ServiceKey) -> impl Iterator<Item = String> {
    let known = facts.addresses.of.get(service).copied().unwrap_or_default();
    known.all().map(|address| address.to_string()).collect::<Vec<_>>().into_iter()
}

/// Further addresses that stand for a service when a connection to them is captured: those given here, which caches may
/// still hold when Kubernetes gives others; and those of this cluster's own `Service` where a `FailoverPolicy` is about it,
/// so that whoever calls it as always fails over.
fn aliases(facts: &Facts, service: &ServiceKey, fails_over: bool) -> Vec<String> {
    let Some(known) = facts.pods.addresses.get(service) else { return Vec::new() };
    let earlier = given(facts, service).filter(|_| !known.set.is_empty());
    let own = known.local.iter().filter(|_| fails_over).map(ToString::to_string);
    earlier.chain(own).collect()
}

/// What resolvers are told, by service.
pub fn records(facts: &Facts) -> BTreeMap<String, v1::NamedService> {
    let over = policies_over_services(facts);
    let record = |(service, kind): (ServiceKey, ServiceType)| {
        let exporters = exports::exporters(facts, &service, facts.registry.serving(&service));
        let mut ports = exports::merge_ports(&exporters).ports;
        if ports.is_empty() {
            ports = exports::served_ports(facts.registry.serving(&service), &service);
        }
        let headless = kind == ServiceType::Headless;
        let record = v1::NamedService {
            service: service.to_string(),
            clusterset: !exporters.is_empty(),
            local: !headless
                && (facts.registry.serving(&service).next().is_some() || over.contains(&service)),
            addresses: addresses(facts, &service),
            aliases: aliases(facts, &service, over.contains(&service)),
            ports: ports.iter().map(port_to_wire).collect(),
            headless,
            endpoints: if headless { endpoints(facts, &service) } else { Vec::new() },
        };
        (record.service.clone(), record)
    };
    services(facts).into_iter().map(record).collect()
}

/// Services whose ordinary name an operator wants to fail over.
fn policies_over_services(facts: &Facts) -> BTreeSet<ServiceKey> {
    const KIND: &str = "FailoverPolicy";
    let first = ObjectKey { kind: KIND, namespace: String::new(), name: String::new() };
    let policies = facts.objects.range(first..).take_while(|(key, _)| key.kind == KIND);
    let service = |(key, stored): (&ObjectKey, &Arc<StoredObject>)| {
        let Spec::FailoverPolicy(spec) = &stored.object.spec else { return None };
        let about_service = spec.target_ref.kind == "Service";
        let name = about_service.then(|| spec.target_ref.name.parse().ok())??;
        Some(ServiceKey::new(key.namespace.parse().ok()?, name))
    };
    policies.filter_map(service).collect()
}

/// The ready endpoints of a headless service that can be reached at their addresses.
fn endpoints(facts: &Facts, service: &ServiceKey) -> Vec<v1::NamedEndpoint> {
    let cluster = facts.cluster.name.to_string();
    let own = |hostname, address| v1::NamedEndpoint { cluster: cluster.clone(), hostname, address };
    let in_kubernetes =
        exports::export_of(facts, service).is_some_and(|export| export.kubernetes().is_some());
    let mut endpoints: Vec<_> = if in_kubernetes {
        // As peers are told: its pods, by Kubernetes' names, and not whoever stands for them.
        let pods = facts.kubernetes_hosts.get(service).into_iter().flat_map(|known| &known.hosts);
        pods.map(|pod| own(pod.hostname.clone(), pod.address.to_string())).collect()
    } else {
        hosts(facts, service).into_iter().map(|host| own(host.hostname, host.address)).collect()
    };
    for link in facts.live_links() {
        endpoints.extend(reachable(facts, &link.peer, service).map(|host| v1::NamedEndpoint {
            cluster: link.peer.to_string(),
            hostname: host.hostname.clone(),
            address: host.address.to_string(),
        }));
    }
    endpoints.truncate(MAX_ENDPOINTS);
    endpoints
}

/// The named endpoints of a peer's service that can be reached at their addresses: over a flat link, inside its ranges,
/// and as long as the peer is believed.
pub fn reachable<'a>(
    facts: &'a Facts,
    peer: &ClusterName,
    service: &ServiceKey,
) -> impl Iterator<Item = &'a NamedEndpoint> {
    let flat = facts.link_spec(peer).is_some_and(|spec| spec.flat);
    let import = facts.imports.get(peer).filter(|import| flat && import.freshness != Freshness::Expired);
    let named = import.and_then(|import| import.exports.get(service)).map(|export| &export.named);
    let ranges = facts.allowed_ranges(peer);
    named.into_iter().flatten().filter(move |host| ranges.allows(SocketAddr::new(host.address, 1)))
}

/// This cluster's ready endpoints of a service, as they are named.
pub fn hosts(facts: &Facts, service: &ServiceKey) -> Vec<v1::HostAddress> {
    let ready = facts.registry.serving(service).filter(|member| member.in_rotation(service));
    let host = |member: &Member| {
        let address = member.address?.ip().to_string();
        Some(v1::HostAddress { hostname: hostname(member), address })
    };
    ready.filter_map(host).take(MAX_ENDPOINTS).collect()
}

/// A label that tells a cluster's endpoints apart: a machine's name; else the sidecar's, which replicas share, with its
/// block.
fn hostname(member: &Member) -> String {
    let path = member.spiffe_id.within_cluster().unwrap_or_default();
    let name: String = path.rsplit('/').next().unwrap_or_default().chars().take(50).collect();
    // A machine's name may have several labels.
    let name = name.replace('.', "-");
    let name = name.trim_matches('-');
    match member.role {
        Role::Vm if !name.is_empty() => name.to_owned(),
        _ => format!("{name}-{:x}", member.block.value()).trim_start_matches('-').to_owned(),
    }
}

#[cfg(test)]
mod tests;
