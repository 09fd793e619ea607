//! What a linked peer is told: this cluster's gateways, properties and JWT authorities, its revocations and how far the
//! peer's are enforced here, what the federation trusts and how far clusters are with it, and the services that are
//! exported to it. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use tombolo_model::ids::Handle;
use tombolo_model::mcs::ServiceProperties;
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::resource::Spec;
use tombolo_model::resource::service_export::ServiceType;
use tombolo_proto::v1;
use tombolo_proto::v1::record::Value;

use crate::exports;
use crate::facts::{CONTROL, Facts, KubernetesHosts, NamedEndpoint, Port, StoredObject};
use crate::import::{GATEWAYS, MAX_ENDPOINTS, PROPERTIES, export_key};
use crate::jwt;
use crate::names;
use crate::revocations;
use crate::rotation;
use crate::snapshot::{port_to_wire, usable_gateways};

/// Named endpoints that a record of 64 KB has room for beside the rest: 90 bytes each at most.
const MAX_HOSTS: usize = 400;

/// A record as it is kept for a peer: what it is made of. Most of that is shared with the facts, which counts with many
/// peers.
#[derive(Clone, PartialEq, Debug)]
pub enum Told {
    Export(Box<ToldExport>),
    Other(Box<Value>),
}

/// What an export's record is made of.
#[derive(Clone, Debug)]
pub struct ToldExport {
    service: ServiceKey,
    handle: Handle,
    export_uid: [u8; 16],
    stored: Arc<StoredObject>,
    /// Of one of Kubernetes, on a flat link.
    hosts: Option<Arc<KubernetesHosts>>,
    /// `None`: nobody serves it here.
    served: Option<Served>,
}

/// What those who serve it here add.
#[derive(Clone, PartialEq, Debug)]
struct Served {
    spiffe_ids: Vec<String>,
    weights: Vec<u32>,
    healthy: u32,
    total: u32,
    /// Of one outside Kubernetes.
    ports: Vec<Port>,
    /// On a flat link.
    endpoints: Vec<v1::EndpointAddress>,
    hosts: Vec<v1::HostAddress>,
}

impl PartialEq for ToldExport {
    fn eq(&self, other: &Self) -> bool {
        let Self { service, handle, export_uid, stored, hosts, served } = self;
        let same_hosts = match (hosts, &other.hosts) {
            (Some(own), Some(other)) => Arc::ptr_eq(own, other) || own == other,
            (own, other) => own.is_none() && other.is_none(),
        };
        same_hosts
            && (Arc::ptr_eq(stored, &other.stored) || *stored == other.stored)
            && (service, handle, export_uid, served)
                == (&other.service, &other.handle, &other.export_uid, &other.served)
    }
}

impl Told {
    /// The record, under its key.
    pub fn record(&self, key: &str) -> v1::Record {
        let value = match self {
            Self::Export(export) => Value::Export(export.record()),
            Self::Other(value) => (**value).clone(),
        };
        v1::Record { key: key.to_owned(), value: Some(value) }
    }
}

/// Every record that `peer` may have, by key.
pub fn records(facts: &Facts, peer: &ClusterName) -> BTreeMap<String, v1::Record> {
    let record = |(key, told): (String, Told)| {
        let record = told.record(&key);
        (key, record)
    };
    told(facts, peer).into_iter().map(record).collect()
}

/// The same, not made yet.
pub fn told(facts: &Facts, peer: &ClusterName) -> BTreeMap<String, Told> {
    let mut records = BTreeMap::new();
    let mut put = |key: String, value: Value| {
        records.insert(key, Told::Other(Box::new(value)));
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
    let exports = exported(facts, peer);
    records.extend(exports.map(|export| (export_key(&export.service), Told::Export(Box::new(export)))));
    records
}

/// The services exported to `peer`: those with a handle for it.
fn exported<'a>(facts: &'a Facts, peer: &'a ClusterName) -> impl Iterator<Item = ToldExport> + 'a {
    let flat = facts.link_spec(peer).is_some_and(|spec| spec.flat);
    facts.handles_of(peer).filter(|record| record.service != CONTROL).filter_map(move |record| {
        let service: ServiceKey = record.service.parse().ok()?;
        let stored = exports::stored(facts, &service)?;
        let export = exports::Export::read(stored).filter(exports::Export::is_valid)?;
        let kubernetes = export.kubernetes().is_some();
        let hosts = facts.kubernetes_hosts.get(&service).filter(|_| flat && kubernetes);
        let served = facts.registry.serving(&service).next().is_some().then(|| {
            let (spiffe_ids, weights) = exports::identities(facts, &service);
            let (healthy, total) = facts.registry.counts(&service);
            let named = flat && hosts.is_none() && export.service_type() == ServiceType::Headless;
            Served {
                spiffe_ids,
                weights,
                healthy,
                total,
                ports: if kubernetes { Vec::new() } else { export.ports(facts.registry.serving(&service)) },
                endpoints: if flat { endpoints(facts, &service) } else { Vec::new() },
                hosts: if named { names::hosts(facts, &service) } else { Vec::new() },
            }
        });
        Some(ToldExport {
            handle: record.handle,
            export_uid: record.export_uid,
            stored: Arc::clone(stored),
            hosts: hosts.cloned(),
            served,
            service,
        })
    })
}

impl ToldExport {
    fn record(&self) -> v1::ExportRecord {
        let Self { service, handle, export_uid, stored, hosts, served } = self;
        let (labels, annotations) = match &stored.object.spec {
            Spec::ServiceExport(spec) => (spec.exported_labels.clone(), spec.exported_annotations.clone()),
            _ => Default::default(),
        };
        // Its own word; which type holds is for each importer to find out.
        let export = exports::Export::read(stored);
        let headless = export.as_ref().is_some_and(|export| export.service_type() == ServiceType::Headless);
        let kubernetes = export.as_ref().and_then(exports::Export::kubernetes);
        let ports = match (&export, served) {
            (Some(export), _) if kubernetes.is_some() => export.ports([]),
            (_, Some(served)) => served.ports.clone(),
            _ => Vec::new(),
        };
        let served = served.as_ref();
        let hosts = hosts.as_deref();
        v1::ExportRecord {
            service: service.to_string(),
            export_uid: export_uid.to_vec(),
            handle: handle.value(),
            ports: ports.iter().map(port_to_wire).collect(),
            spiffe_ids: served.map(|served| served.spiffe_ids.clone()).unwrap_or_default(),
            weights: served.map(|served| served.weights.clone()).unwrap_or_default(),
            healthy: served.map_or(0, |served| served.healthy),
            total: served.map_or(0, |served| served.total),
            exported_at_unix_ms: i64::try_from(stored.created_unix.saturating_mul(1000)).unwrap_or(i64::MAX),
            labels: labels.into_iter().collect(),
            annotations: annotations.into_iter().collect(),
            endpoints: served.map(|served| served.endpoints.clone()).unwrap_or_default(),
            headless,
            hosts: match hosts {
                Some(found) => found.hosts.iter().take(MAX_HOSTS).map(host_to_wire).collect(),
                None => served.map(|served| served.hosts.clone()).unwrap_or_default(),
            },
            kubernetes: kubernetes.map(|service| properties_to_wire(&service.properties)),
            host_ports: hosts.map(|found| found.ports.iter().map(port_to_wire).collect()).unwrap_or_default(),
        }
    }
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
