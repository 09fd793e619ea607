//! The documents that stand for a service in Kubernetes (pure): `ServiceImport`, derived `Service`, `EndpointSlice`s,
//! and the status of export and import.
//!
//! A document is applied whole by one field manager, so that what is left out of it is taken away. Each carries a
//! fingerprint of itself ([`labels::APPLIED`]); what the API server adds does not count as a difference.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde_json::{Map, Value, json};
use tombolo_model::mcs::{IpFamily, Merged, Port, SessionAffinity};
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::resource::Condition;
use tombolo_model::resource::service_export::ServiceType;

use super::labels::{
    self, APPLIED, DERIVED_SERVICE, IMPORT, MANAGED_BY, SERVICE_NAME, SLICE_MANAGED_BY, SLICE_MANAGER,
    SOURCE_CLUSTER, TOMBOLO, derived_name, digest, is_label, is_qualified,
};
use super::tables::dashed;
use crate::facts::KubernetesHosts;
use crate::view::kubernetes::ShownImport;

/// Endpoints of one slice, as Kubernetes' own controller has it.
const PER_SLICE: usize = 100;
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
/// `found`: as it is, if it is there.
pub fn derived(
    service: &ServiceKey,
    merged: &Merged,
    found: Option<&Value>,
    import_uid: &str,
    api_version: &str,
) -> Option<Value> {
    // Kubernetes takes no service without ports.
    let usable: Vec<&Port> = ports(merged).collect();
    if merged.kind == ServiceType::Headless || usable.is_empty() {
        return None;
    }
    let mut metadata = metadata(service, &derived_name(service));
    metadata.insert("annotations".to_owned(), json!({ IMPORT: service.name.as_str() }));
    metadata.insert("ownerReferences".to_owned(), owner(service, import_uid, api_version));
    let mut spec = Map::new();
    spec.insert("type".to_owned(), "ClusterIP".into());
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
    spec.insert("ports".to_owned(), usable.iter().map(named).collect());
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

fn owner(service: &ServiceKey, uid: &str, api_version: &str) -> Value {
    let name = service.name.as_str();
    json!([{ "apiVersion": api_version, "kind": "ServiceImport", "name": name, "uid": uid }])
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
        let mut index = 0;
        for family in [IpFamily::IPv4, IpFamily::IPv6] {
            let of_family: Vec<_> = hosts
                .iter()
                .filter(|host| family_of(&host.address) == family && usable(host.address))
                .collect();
            for some in of_family.chunks(PER_SLICE) {
                let name = labels::slice_name(service, cluster, index);
                index += 1;
                let mut metadata = metadata(service, &name);
                metadata.insert("labels".to_owned(), slice_labels(service, cluster));
                metadata.insert("ownerReferences".to_owned(), owner(service, import_uid, api_version));
                let endpoint = |host: &&crate::facts::NamedEndpoint| {
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

/// Conditions as Kubernetes has them: each keeps the time of its last change. `now`: RFC 3339.
pub fn conditions(wanted: &[Condition], before: &[Value], generation: u64, now: &str) -> Vec<Value> {
    let known = |condition: &Condition| {
        before.iter().find(|value| value.get("type").and_then(Value::as_str) == Some(&condition.r#type))
    };
    let since = |condition: &Condition| {
        let same = known(condition)
            .filter(|value| value.get("status").and_then(Value::as_str) == Some(condition.status.as_str()));
        let time = same.and_then(|value| value.get("lastTransitionTime")).and_then(Value::as_str);
        time.unwrap_or(now).to_owned()
    };
    let value = |condition: &Condition| {
        let mut value = json!({
            "type": condition.r#type, "status": condition.status, "reason": condition.reason,
            "message": condition.message, "lastTransitionTime": since(condition),
        });
        if generation > 0 {
            value["observedGeneration"] = generation.into();
        }
        value
    };
    wanted.iter().map(value).collect()
}

/// The status of an export or import.
pub fn status(service: &ServiceKey, api_version: &str, kind: &str, status: Value) -> Value {
    json!({
        "apiVersion": api_version, "kind": kind,
        "metadata": { "name": service.name.as_str(), "namespace": service.namespace.as_str() },
        "status": status,
    })
}

/// Whether everything of `wanted` is in `found`; lists are compared as wholes.
pub fn holds(found: &Value, wanted: &Value) -> bool {
    match (found, wanted) {
        (Value::Object(found), Value::Object(wanted)) => {
            wanted.iter().all(|(key, value)| found.get(key).is_some_and(|found| holds(found, value)))
        }
        (Value::Array(found), Value::Array(wanted)) => {
            found.len() == wanted.len() && found.iter().zip(wanted).all(|(found, value)| holds(found, value))
        }
        _ => found == wanted,
    }
}
