//! The documents that stand for a service in Kubernetes (pure): `ServiceImport`, derived `Service`, and `EndpointSlice`s of
//! either.
//!
//! A document is applied whole by one field manager, so that what is left out of it is taken away. Each carries a
//! fingerprint of itself ([`labels::APPLIED`]); what the API server adds does not count as a difference.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tombolo_model::mcs::{IpFamily, Merged, Port, SessionAffinity};
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::protocol::Protocol;
use tombolo_model::resource::service_export::ServiceType;

use super::labels::{
    self, APPLIED, DERIVED_SERVICE, IMPORT, LOCAL_SERVICE, MANAGED_BY, SERVICE_NAME, SLICE_MANAGED_BY,
    SLICE_MANAGER, SOURCE_CLUSTER, TOMBOLO, derived_name, digest, is_label, is_qualified,
};
use super::tables::dashed;
use super::targets::ServicePort;
use crate::facts::{KubernetesHosts, NamedEndpoint};
use crate::view::kubernetes::ShownImport;

/// Shared sidecars that one derived `Service` leads to, as many as Kubernetes' own controller puts into a slice.
const PER_SLICE: usize = 100;
/// Endpoints that a slice has at least, on average: half of what it has at most. The API server takes 1000.
const FEW_PER_SLICE: usize = 64;
/// KEP-4444, KEP-3015.
const TRAFFIC_DISTRIBUTIONS: [&str; 3] = ["PreferClose", "PreferSameZone", "PreferSameNode"];

/// Names of a document.
fn metadata(service: &ServiceKey, name: &str) -> Map<String, Value> {
    let mut metadata = Map::new();
    metadata.insert("name".to_owned(), name.into());
    metadata.insert("namespace".to_owned(), service.namespace.as_str().into());
    metadata.insert("labels".to_owned(), json!({ MANAGED_BY: TOMBOLO }));
    metadata.insert("annotations".to_owned(), json!({}));
    metadata
}

/// Adds the document's own fingerprint.
fn signed(mut document: Value) -> Value {
    let digest = digest(&document);
    if let Some(annotations) = document.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
        annotations.insert(APPLIED.to_owned(), digest.into());
    }
    document
}

/// The fingerprint that [`signed`] has added.
pub fn applied(document: &Value) -> &str {
    let annotations = document.pointer("/metadata/annotations");
    annotations.and_then(|annotations| annotations.get(APPLIED)).and_then(Value::as_str).unwrap_or_default()
}

/// The import of a service. `ips`: of its derived `Service`, as far as they are known.
pub fn import(service: &ServiceKey, api_version: &str, merged: &Merged, ips: &[IpAddr]) -> Value {
    let mut metadata = metadata(service, service.name.as_str());
    let mut shown = labels::labels(&merged.labels);
    shown.insert(MANAGED_BY.to_owned(), TOMBOLO.into());
    metadata.insert("labels".to_owned(), shown.into());
    let mut notes = labels::annotations(&merged.annotations);
    let mut spec = Map::new();
    spec.insert("type".to_owned(), merged.kind.as_str().into());
    spec.insert("ports".to_owned(), ports(merged).map(port).collect());
    let mut families: Vec<IpFamily> = ips.iter().map(family_of).collect();
    match merged.kind {
        ServiceType::Headless => {
            families = merged.service.as_ref().map(|of| of.ip_families.clone()).unwrap_or_default();
        }
        ServiceType::ClusterSetIp => {
            notes.insert(DERIVED_SERVICE.to_owned(), derived_name(service).into());
            if !ips.is_empty() {
                spec.insert("ips".to_owned(), ips.iter().map(|ip| Value::from(ip.to_string())).collect());
            }
        }
    }
    if !families.is_empty() {
        spec.insert("ipFamilies".to_owned(), families.iter().map(|f| Value::from(f.as_str())).collect());
    }
    properties(merged, &mut spec);
    metadata.insert("annotations".to_owned(), notes.into());
    signed(json!({ "apiVersion": api_version, "kind": "ServiceImport", "metadata": metadata, "spec": spec }))
}

/// What `ServiceImport` and `Service` have in common.
fn properties(merged: &Merged, spec: &mut Map<String, Value>) {
    let Some(service) = &merged.service else { return };
    spec.insert("sessionAffinity".to_owned(), service.session_affinity.as_str().into());
    if let (SessionAffinity::ClientIP, Some(seconds)) =
        (service.session_affinity, service.affinity_timeout_seconds)
    {
        let config = json!({ "clientIP": { "timeoutSeconds": seconds } });
        spec.insert("sessionAffinityConfig".to_owned(), config);
    }
    spec.insert("internalTrafficPolicy".to_owned(), service.internal_traffic_policy.as_str().into());
    // A word of a later version is refused by an API server that does not know it.
    let known = |word: &&String| TRAFFIC_DISTRIBUTIONS.contains(&word.as_str());
    if let Some(distribution) = service.traffic_distribution.as_ref().filter(known) {
        spec.insert("trafficDistribution".to_owned(), distribution.as_str().into());
    }
}

fn family_of(address: &IpAddr) -> IpFamily {
    if address.is_ipv4() { IpFamily::IPv4 } else { IpFamily::IPv6 }
}

/// Ports that the API server takes. An exporter that says nonsense must not cost the others the import's address.
fn ports(merged: &Merged) -> impl Iterator<Item = &Port> {
    let known = |port: &&Port| {
        ["TCP", "UDP", "SCTP"].contains(&port.protocol.as_str())
            && (port.name.is_empty() || is_label(&port.name))
    };
    merged.ports.iter().filter(known)
}

fn port(port: &Port) -> Value {
    let mut value = json!({ "port": port.port, "protocol": port.protocol });
    if !port.name.is_empty() {
        value["name"] = port.name.as_str().into();
    }
    if is_qualified(&port.app_protocol) {
        value["appProtocol"] = port.app_protocol.as_str().into();
    }
    value
}

/// The `Service` that gives an import its address: without a selector, owned by the import. `None` for a headless one.
/// `found`: as it is, if it is there. `numbers`: of its ports at the shared sidecars.
pub fn derived(
    service: &ServiceKey,
    merged: &Merged,
    found: Option<&Value>,
    import_uid: &str,
    api_version: &str,
    numbers: &BTreeMap<ServicePort, u16>,
) -> Option<Value> {
    // Kubernetes takes no service without ports.
    let ports = service_ports(merged);
    if ports.is_empty() {
        return None;
    }
    let mut metadata = metadata(service, &derived_name(service));
    metadata.insert("annotations".to_owned(), json!({ IMPORT: service.name.as_str() }));
    metadata.insert("ownerReferences".to_owned(), owner(service, import_uid, api_version));
    let mut spec = Map::new();
    spec.insert("type".to_owned(), "ClusterIP".into());
    let numbered = |(of, mut value): (&Port, Value)| {
        if let Some(number) = port_of(of).and_then(|port| numbers.get(&port)) {
            value["targetPort"] = (*number).into();
        }
        value
    };
    spec.insert("ports".to_owned(), ports.into_iter().map(numbered).collect());
    properties(merged, &mut spec);
    // Nodes of this cluster have no endpoints of their own to prefer.
    spec.remove("internalTrafficPolicy");
    let families = merged.service.as_ref().map(|of| of.ip_families.as_slice()).unwrap_or_default();
    match families {
        [] => {}
        [one] => {
            spec.insert("ipFamilyPolicy".to_owned(), "SingleStack".into());
            spec.insert("ipFamilies".to_owned(), json!([one.as_str()]));
        }
        // Both where the cluster has both: the second one is the API server's to add, and not to be taken away again.
        [first, ..] => {
            let first = json!([first.as_str()]);
            let added = found.and_then(|found| found.get("ipFamilies"));
            let added = added.filter(|added| added.get(0) == first.get(0)).cloned();
            spec.insert("ipFamilyPolicy".to_owned(), "PreferDualStack".into());
            spec.insert("ipFamilies".to_owned(), added.unwrap_or(first));
        }
    }
    Some(signed(json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec })))
}

/// The ports of a derived `Service`; none: there is to be none.
fn service_ports(merged: &Merged) -> Vec<(&Port, Value)> {
    if merged.kind == ServiceType::Headless {
        return Vec::new();
    }
    let usable: Vec<&Port> = ports(merged).collect();
    // A Service with several ports needs a name for each; an import does not.
    let several = usable.len() > 1;
    let taken: BTreeSet<&str> = usable.iter().map(|port| port.name.as_str()).collect();
    let named = |of: &&Port| {
        let mut value = port(of);
        if several && of.name.is_empty() {
            let mut name = format!("{}-{}", of.protocol.to_ascii_lowercase(), of.port);
            // Somebody's own name.
            while taken.contains(name.as_str()) {
                name.push_str("-x");
            }
            value["name"] = name.into();
        }
        value
    };
    usable.iter().map(|of| (*of, named(of))).collect()
}

fn port_of(port: &Port) -> Option<ServicePort> {
    Some((Protocol::parse(&port.protocol)?, port.port))
}

/// The ports of a derived `Service` that shared sidecars can tell apart by a number.
pub fn numbered_ports(merged: &Merged) -> Vec<ServicePort> {
    service_ports(merged).iter().filter_map(|(port, _)| port_of(port)).collect()
}

/// The slices that lead from a derived `Service` to the shared sidecars, by name: one per family of its addresses, without
/// endpoints when none is ready. Their front carries TCP and UDP.
pub fn fronts(
    service: &ServiceKey,
    merged: &Merged,
    derived_uid: &str,
    cluster_ips: &[IpAddr],
    numbers: &BTreeMap<ServicePort, u16>,
    shared: &BTreeSet<IpAddr>,
) -> BTreeMap<String, Value> {
    let carried = |(of, mut value): (&Port, Value)| {
        value["port"] = (*numbers.get(&port_of(of)?)?).into();
        Some(value)
    };
    let ports: Vec<Value> = service_ports(merged).into_iter().filter_map(carried).collect();
    let derived = derived_name(service);
    let slice = |ip: &IpAddr| {
        let family = family_of(ip);
        let name = format!("{derived}-{}", family.as_str().to_ascii_lowercase());
        let mut metadata = metadata(service, &name);
        let labels =
            json!({ MANAGED_BY: TOMBOLO, SLICE_MANAGED_BY: SLICE_MANAGER, LOCAL_SERVICE: derived.as_str() });
        metadata.insert("labels".to_owned(), labels);
        metadata.insert("annotations".to_owned(), json!({ IMPORT: service.name.as_str() }));
        let owner =
            json!([{ "apiVersion": "v1", "kind": "Service", "name": derived.as_str(), "uid": derived_uid }]);
        metadata.insert("ownerReferences".to_owned(), owner);
        let of_family = shared.iter().filter(|address| family_of(address) == family).take(PER_SLICE);
        let endpoint =
            |ip: &IpAddr| json!({ "addresses": [ip.to_string()], "conditions": { "ready": true } });
        let document = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata,
            "addressType": family.as_str(),
            "endpoints": of_family.map(endpoint).collect::<Vec<_>>(),
            "ports": ports,
        });
        (name, signed(document))
    };
    cluster_ips.iter().map(slice).collect()
}

fn owner(service: &ServiceKey, uid: &str, api_version: &str) -> Value {
    let name = service.name.as_str();
    json!([{ "apiVersion": api_version, "kind": "ServiceImport", "name": name, "uid": uid }])
}

/// Which of so many slices an endpoint is in: always the same, so that one that comes or goes changes one slice.
fn bucket(address: &IpAddr, buckets: usize) -> usize {
    let digest = Sha256::digest(address.to_string());
    let number = digest.first_chunk::<4>().map_or(0, |bytes| u32::from_be_bytes(*bytes));
    usize::try_from(number).unwrap_or(0) % buckets.max(1)
}

/// The slices of an import, by name: of one source cluster and one family each.
pub fn slices(
    service: &ServiceKey,
    shown: &ShownImport,
    import_uid: &str,
    api_version: &str,
) -> BTreeMap<String, Value> {
    let mut slices = BTreeMap::new();
    for (cluster, KubernetesHosts { hosts, ports }) in &shown.endpoints {
        for (nth, family) in [IpFamily::IPv4, IpFamily::IPv6].into_iter().enumerate() {
            let of_family =
                |host: &&NamedEndpoint| family_of(&host.address) == family && usable(host.address);
            // Doubled as the service grows, which half of the endpoints move for.
            let count = hosts.iter().filter(of_family).count();
            let buckets = (count / FEW_PER_SLICE).max(1).next_power_of_two();
            let mut chunks: BTreeMap<usize, Vec<&NamedEndpoint>> = BTreeMap::new();
            for host in hosts.iter().filter(of_family) {
                chunks.entry(bucket(&host.address, buckets)).or_default().push(host);
            }
            for (bucket, some) in chunks {
                let name = labels::slice_name(service, cluster, 2 * bucket + nth);
                let mut metadata = metadata(service, &name);
                metadata.insert("labels".to_owned(), slice_labels(service, cluster));
                metadata.insert("ownerReferences".to_owned(), owner(service, import_uid, api_version));
                let endpoint = |host: &&NamedEndpoint| {
                    let mut value =
                        json!({ "addresses": [host.address.to_string()], "conditions": { "ready": true } });
                    if host.hostname != dashed(&host.address) {
                        value["hostname"] = host.hostname.as_str().into();
                    }
                    value
                };
                let document = json!({
                    "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata,
                    "addressType": family.as_str(),
                    "endpoints": some.iter().map(endpoint).collect::<Vec<_>>(),
                    "ports": ports.iter().map(port).collect::<Vec<_>>(),
                });
                slices.insert(name, signed(document));
            }
        }
    }
    slices
}

fn slice_labels(service: &ServiceKey, source: &ClusterName) -> Value {
    json!({
        MANAGED_BY: TOMBOLO,
        SLICE_MANAGED_BY: SLICE_MANAGER,
        SERVICE_NAME: service.name.as_str(),
        SOURCE_CLUSTER: source.as_str(),
    })
}

/// Addresses that mean the same machine everywhere, or nobody: no peer may lead callers there, and the API server would
/// refuse the whole slice.
fn usable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            !(v4.is_loopback()
                || v4.is_link_local()
                || v4.is_multicast()
                || v4.is_unspecified()
                || v4.is_broadcast())
        }
        IpAddr::V6(v6) => {
            !(v6.is_loopback() || v6.is_multicast() || v6.is_unspecified() || v6.is_unicast_link_local())
                && v6.to_ipv4_mapped().is_none()
        }
    }
}
