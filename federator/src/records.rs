//! What a linked peer is told: this cluster's gateways, properties and JWT authorities, its revocations and how far the
//! peer's are enforced here, what the federation trusts and how far clusters are with it, and the services that are
//! exported to it. Pure.

use std::collections::BTreeMap;

use tombolo_model::mcs::ServiceProperties;
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::resource::Spec;
use tombolo_model::resource::service_export::ServiceType;
use tombolo_proto::v1;
use tombolo_proto::v1::record::Value;

use crate::exports;
use crate::facts::{CONTROL, Facts, NamedEndpoint};
use crate::import::{GATEWAYS, MAX_ENDPOINTS, PROPERTIES, export_key};
use crate::jwt;
use crate::names;
use crate::revocations;
use crate::rotation;
use crate::snapshot::{port_to_wire, usable_gateways};

/// Named endpoints that a record of 64 KB has room for beside the rest: 90 bytes each at most.
const MAX_HOSTS: usize = 400;

/// Every record that `peer` may have, by key.
pub fn records(facts: &Facts, peer: &ClusterName) -> BTreeMap<String, v1::Record> {
    let mut records = BTreeMap::new();
    let mut put = |key: String, value: Value| {
        records.insert(key.clone(), v1::Record { key, value: Some(value) });
    };
    let gateways = usable_gateways(facts).map(|gateway| v1::GatewayReplica {
        name: gateway.name.clone(),
        address: gateway.border.to_string(),
        balanced: gateway.balanced,
        zone: gateway.zone.clone(),
    });
    put(GATEWAYS.to_owned(), Value::Gateways(v1::GatewaysRecord { gateways: gateways.collect() }));
    let properties = facts.cluster.properties.clone().into_iter().collect();
    put(PROPERTIES.to_owned(), Value::Properties(v1::PropertiesRecord { properties }));
    if !facts.jwt_authorities.is_empty() {
        let authorities = facts.jwt_authorities.iter().map(jwt::to_wire).collect();
        put(jwt::AUTHORITIES.to_owned(), Value::JwtAuthorities(v1::JwtAuthoritiesRecord { authorities }));
    }
    for (object, revocation) in revocations::for_peers(facts) {
        put(revocations::record_key(object), Value::Revocation(revocation));
    }
    for enforced in revocations::enforced_for(facts, peer) {
        put(revocations::enforced_key(&enforced.revocation), Value::Enforced(enforced));
    }
    for (key, value) in rotation::records(facts, peer) {
        put(key, value);
    }
    for (service, export) in exported(facts, peer) {
        put(export_key(&service), Value::Export(export));
    }
    records
}

/// The services exported to `peer`: those with a handle for it.
fn exported<'a>(
    facts: &'a Facts,
    peer: &'a ClusterName,
) -> impl Iterator<Item = (ServiceKey, v1::ExportRecord)> + 'a {
    let flat = facts.link_spec(peer).is_some_and(|spec| spec.flat);
    facts.handles_of(peer).filter(|record| record.service != CONTROL).filter_map(move |record| {
        let service: ServiceKey = record.service.parse().ok()?;
        let export = exports::export_of(facts, &service).filter(exports::Export::is_valid)?;
        let stored = export.stored;
        let Spec::ServiceExport(spec) = &stored.object.spec else { return None };
        // Its own word; which type holds is for each importer to find out.
        let headless = export.service_type() == ServiceType::Headless;
        let kubernetes =
            facts.kubernetes_hosts.get(&service).filter(|_| flat && export.kubernetes().is_some());
        let (spiffe_ids, weights) = exports::identities(facts, &service);
        let ports = export.ports(facts.registry.serving(&service));
        let (healthy, total) = facts.registry.counts(&service);
        let export = v1::ExportRecord {
            service: service.to_string(),
            export_uid: record.export_uid.to_vec(),
            handle: record.handle.value(),
            ports: ports.iter().map(port_to_wire).collect(),
            spiffe_ids,
            weights,
            healthy,
            total,
            exported_at_unix_ms: i64::try_from(stored.created_unix.saturating_mul(1000)).unwrap_or(i64::MAX),
            labels: spec.exported_labels.clone().into_iter().collect(),
            annotations: spec.exported_annotations.clone().into_iter().collect(),
            endpoints: if flat { endpoints(facts, &service) } else { Vec::new() },
            headless,
            hosts: match kubernetes {
                Some(found) => found.hosts.iter().take(MAX_HOSTS).map(host_to_wire).collect(),
                None if flat && headless => names::hosts(facts, &service),
                None => Vec::new(),
            },
            kubernetes: export.kubernetes().map(|service| properties_to_wire(&service.properties)),
            host_ports: kubernetes
                .map(|found| found.ports.iter().map(port_to_wire).collect())
                .unwrap_or_default(),
        };
        Some((service, export))
    })
}

fn host_to_wire(host: &NamedEndpoint) -> v1::HostAddress {
    v1::HostAddress { hostname: host.hostname.clone(), address: host.address.to_string() }
}

fn properties_to_wire(properties: &ServiceProperties) -> v1::ServiceProperties {
    let ServiceProperties {
        session_affinity,
        affinity_timeout_seconds,
        ip_families,
        internal_traffic_policy,
        traffic_distribution,
    } = properties;
    v1::ServiceProperties {
        session_affinity: session_affinity.as_str().to_owned(),
        affinity_timeout_seconds: affinity_timeout_seconds.unwrap_or(0),
        ip_families: ip_families.iter().map(|family| family.as_str().to_owned()).collect(),
        internal_traffic_policy: internal_traffic_policy.as_str().to_owned(),
        traffic_distribution: traffic_distribution.clone().unwrap_or_default(),
    }
}

/// Healthy endpoints that have an address. Endpoint addresses cross flat links only.
fn endpoints(facts: &Facts, service: &ServiceKey) -> Vec<v1::EndpointAddress> {
    let healthy = facts.registry.healthy(service).into_iter().filter_map(|id| {
        let address = facts.registry.members.get(&id.block())?.address?.to_string();
        Some(v1::EndpointAddress { endpoint: id.value(), address })
    });
    healthy.take(MAX_ENDPOINTS).collect()
}
