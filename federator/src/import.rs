//! A peer's records, read into facts: each is checked by itself, so that a bad one is refused with a reason and costs
//! the good ones nothing. Pure.
//!
//! A peer can only speak for itself: identities of its own cluster and trust domain, gateways inside the ranges that
//! the link allows. Sizes are bounded here, the number of records by [`PeerView`](tombolo_model::sync::PeerView).

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tombolo_identity::{SpiffeId, TrustDomain};
use tombolo_model::ids::{EndpointId, Handle};
use tombolo_model::mcs::{InternalTrafficPolicy, IpFamily, ServiceProperties, SessionAffinity};
use tombolo_model::names::{ClusterName, ServiceKey, ServiceName};
use tombolo_model::ranges::AllowedRanges;
use tombolo_model::resource::workload::MAX_WEIGHT;
use tombolo_overlay::revoking;
use tombolo_proto::convert::{self, FieldError};
use tombolo_proto::v1;

use crate::facts::{Facts, Import, ImportedExport, NamedEndpoint, PeerGateway, Port, TrustFacts};
use crate::jwt;
use crate::revocations::{MAX_PEER_BYTES, MAX_REVOCATIONS, enforced_key, object_of, record_key};
use crate::rotation;

/// Key of the record with a cluster's gateways.
pub const GATEWAYS: &str = "gateways";
/// Key of the record with a cluster's properties.
pub const PROPERTIES: &str = "properties";
/// A service runs under a handful of identities.
const MAX_IDENTITIES: usize = 64;
pub const MAX_PORTS: usize = 100;
const MAX_GATEWAYS: usize = 64;
/// Exported labels or annotations of one export.
pub const MAX_COPIED: usize = 64;
pub const MAX_COPIED_BYTES: usize = 16 * 1024;
/// Endpoints of one export on a flat link: 20 KB. Each sidecar is told a few of them.
pub const MAX_ENDPOINTS: usize = 1000;
pub const MAX_PROPERTIES: usize = 64;
pub const MAX_TEXT: usize = 256;
const MAX_PENDING: usize = 20;
/// Refusals that are kept for `status`.
const MAX_REFUSALS: usize = 1000;

/// Key of an export's record.
pub fn export_key(service: &ServiceKey) -> String {
    format!("export/{service}")
}

/// What a peer may speak of.
#[derive(Clone, Debug)]
pub struct PeerScope {
    pub peer: ClusterName,
    pub trust_domain: TrustDomain,
    pub ranges: AllowedRanges,
    pub trust: Arc<TrustFacts>,
    /// Since the Unix epoch.
    pub unix: Duration,
}

impl PeerScope {
    pub fn of(facts: &Facts, peer: &ClusterName, unix: Duration) -> Self {
        Self {
            peer: peer.clone(),
            trust_domain: facts.cluster.trust_domain.clone(),
            ranges: facts.allowed_ranges(peer),
            trust: Arc::clone(&facts.trust),
            unix,
        }
    }
}

/// Takes one record over, or its refusal.
pub fn put(import: &mut Import, scope: &PeerScope, record: &v1::Record) {
    match read(import, scope, record) {
        Ok(()) => {
            import.rejected.remove(&shown(&record.key));
        }
        // What was good before stays until it is replaced by something good, or deleted.
        Err(error) => refuse(import, &record.key, error.to_string()),
    }
}

/// Notes that a record is refused, and why.
pub fn refuse(import: &mut Import, key: &str, reason: String) {
    let key = shown(key);
    if import.rejected.len() < MAX_REFUSALS || import.rejected.contains_key(&key) {
        import.rejected.insert(key, reason);
    }
}

/// A key as it is shown: cut to what a terminal bears.
fn shown(key: &str) -> String {
    key.chars().take(MAX_TEXT).collect()
}

/// A record is no more. That there are no gateways at all is not believed: a federator that has lost its store says so
/// until its gateways are back.
pub fn remove(import: &mut Import, key: &str) {
    import.rejected.remove(&shown(key));
    match key {
        GATEWAYS => {}
        PROPERTIES => import.properties.clear(),
        jwt::AUTHORITIES => import.jwt_authorities.clear(),
        // What a cluster has said stays said; what is trusted is not the peer's to take back.
        key if key == rotation::TRUST || rotation::is_progress_key(key) => {}
        key => {
            import.revocations.remove(key);
            import.enforced.remove(key);
            if let Some(service) = key.strip_prefix("export/").and_then(|s| s.parse::<ServiceKey>().ok()) {
                import.exports.remove(&service);
            }
        }
    }
}

fn read(import: &mut Import, scope: &PeerScope, record: &v1::Record) -> Result<(), FieldError> {
    match &record.value {
        Some(v1::record::Value::Export(export)) => {
            let (service, export) = export_of(scope, export)?;
            expect_key(&record.key, &export_key(&service))?;
            import.exports.insert(service, export);
        }
        Some(v1::record::Value::Gateways(gateways)) => {
            expect_key(&record.key, GATEWAYS)?;
            let gateways = gateways_of(scope, &gateways.gateways)?;
            if !gateways.is_empty() {
                import.gateways = gateways;
            }
        }
        Some(v1::record::Value::Properties(properties)) => {
            expect_key(&record.key, PROPERTIES)?;
            import.properties = properties_of(&properties.properties)?;
        }
        Some(v1::record::Value::Revocation(revocation)) => {
            revocation_of(scope, &record.key, revocation)?;
            let others = import.revocations.iter().filter(|(key, _)| **key != record.key);
            let (count, bytes) =
                others.fold((1, revocation.encoded_len()), |(n, sum), (_, r)| (n + 1, sum + r.encoded_len()));
            if count > MAX_REVOCATIONS || bytes > MAX_PEER_BYTES {
                let expected =
                    format!("at most {MAX_REVOCATIONS} revocations and {MAX_PEER_BYTES} bytes of them");
                return Err(FieldError::new("revocation", &record.key, expected));
            }
            import.revocations.insert(record.key.clone(), revocation.clone());
        }
        Some(v1::record::Value::JwtAuthorities(authorities)) => {
            expect_key(&record.key, jwt::AUTHORITIES)?;
            import.jwt_authorities = jwt::authorities_of(&scope.peer, authorities)?;
        }
        Some(v1::record::Value::Enforced(enforced)) => {
            expect_key(&record.key, &enforced_key(&enforced.revocation))?;
            if enforced.pending.len() > MAX_PENDING || enforced.pending.iter().any(|p| p.len() > MAX_TEXT) {
                let expected = format!("at most {MAX_PENDING} names");
                return Err(FieldError::new("enforced.pending", enforced.pending.len(), expected));
            }
            if import.enforced.len() >= MAX_REVOCATIONS && !import.enforced.contains_key(&record.key) {
                let expected = format!("at most {MAX_REVOCATIONS} of them");
                return Err(FieldError::new("enforced", &record.key, expected));
            }
            import.enforced.insert(record.key.clone(), enforced.clone());
        }
        // The core has judged it (`core::trust`).
        Some(v1::record::Value::Trust(_)) => expect_key(&record.key, rotation::TRUST)?,
        Some(v1::record::Value::TrustProgress(wire)) => {
            let word = rotation::read_word(&scope.trust, &record.key, wire, scope.unix)?;
            rotation::keep_word(import, &record.key, word)?;
        }
        // Of a newer version.
        None => return Err(FieldError::new("record.value", "nothing", "a kind of record known here")),
    }
    Ok(())
}

/// A peer revokes its own identities and nobody else's.
fn revocation_of(scope: &PeerScope, key: &str, wire: &v1::Revocation) -> Result<(), FieldError> {
    let (target, _) = revoking::from_wire(wire)?;
    if target.cluster().as_ref() != Some(&scope.peer) {
        let expected = format!("identities of cluster {}", scope.peer);
        return Err(FieldError::new("revocation.cluster", &wire.cluster, expected));
    }
    let object = object_of(&scope.peer, &wire.name).ok_or_else(|| {
        FieldError::new("revocation.name", &wire.name, format!("a name of cluster {}", scope.peer))
    })?;
    expect_key(key, &record_key(object))
}

fn expect_key(found: &str, expected: &str) -> Result<(), FieldError> {
    if found == expected { Ok(()) } else { Err(FieldError::new("record.key", found, expected)) }
}

fn export_of(scope: &PeerScope, wire: &v1::ExportRecord) -> Result<(ServiceKey, ImportedExport), FieldError> {
    let service: ServiceKey = convert::parse("export.service", &wire.service)?;
    let handle = Handle::from_u32(wire.handle);
    if handle.is_reserved() {
        return Err(FieldError::new("export.handle", handle, "an allotted handle (256 or more)"));
    }
    if wire.spiffe_ids.len() > MAX_IDENTITIES {
        let expected = format!("at most {MAX_IDENTITIES} identities");
        return Err(FieldError::new("export.spiffe_ids", wire.spiffe_ids.len(), expected));
    }
    for id in &wire.spiffe_ids {
        let parsed: SpiffeId = convert::parse("export.spiffe_ids", id)?;
        if parsed.trust_domain() != scope.trust_domain || parsed.cluster().as_ref() != Some(&scope.peer) {
            let expected = format!("an identity of cluster {}", scope.peer);
            return Err(FieldError::new("export.spiffe_ids", id, expected));
        }
    }
    if wire.ports.len() > MAX_PORTS || wire.host_ports.len() > MAX_PORTS {
        return Err(FieldError::new("export.ports", wire.ports.len(), format!("at most {MAX_PORTS} ports")));
    }
    let export = ImportedExport {
        export_uid: convert::bytes("export.export_uid", &wire.export_uid)?,
        handle,
        ports: wire.ports.iter().map(|p| port_of("export.ports", p)).collect::<Result<_, _>>()?,
        spiffe_ids: wire.spiffe_ids.clone(),
        weights: weights_of(wire)?,
        healthy: wire.healthy.min(wire.total),
        total: wire.total,
        exported_at_unix_ms: wire.exported_at_unix_ms,
        endpoints: endpoints_of(&wire.endpoints)?,
        headless: wire.headless,
        named: named_of(&wire.hosts)?,
        named_ports: wire
            .host_ports
            .iter()
            .map(|p| port_of("export.host_ports", p))
            .collect::<Result<_, _>>()?,
        labels: copied("export.labels", &wire.labels)?,
        annotations: copied("export.annotations", &wire.annotations)?,
        service: wire.kubernetes.as_ref().map(service_of).transpose()?,
    };
    Ok((service, export))
}

/// One for each identity, or none.
fn weights_of(wire: &v1::ExportRecord) -> Result<Vec<u32>, FieldError> {
    if !wire.weights.is_empty() && wire.weights.len() != wire.spiffe_ids.len() {
        let expected = format!("none, or one for each of {} identities", wire.spiffe_ids.len());
        return Err(FieldError::new("export.weights", wire.weights.len(), expected));
    }
    match wire.weights.iter().find(|weight| !(1..=MAX_WEIGHT).contains(*weight)) {
        Some(weight) => Err(FieldError::new("export.weights", weight, format!("1 to {MAX_WEIGHT}"))),
        None => Ok(wire.weights.clone()),
    }
}

/// Labels or annotations that importers see: Kubernetes' own limits would refuse an import that breaks them.
fn copied(
    field: &'static str,
    wire: &HashMap<String, String>,
) -> Result<BTreeMap<String, String>, FieldError> {
    let bytes: usize = wire.iter().map(|(key, value)| key.len() + value.len()).sum();
    if wire.len() > MAX_COPIED || bytes > MAX_COPIED_BYTES {
        let expected = format!("at most {MAX_COPIED} of {MAX_COPIED_BYTES} bytes together");
        return Err(FieldError::new(field, wire.len(), expected));
    }
    Ok(wire.iter().map(|(key, value)| (key.clone(), value.clone())).collect())
}

/// What the peer's Kubernetes says of the service; a word that is not known here is another version's, and is refused.
fn service_of(wire: &v1::ServiceProperties) -> Result<ServiceProperties, FieldError> {
    let one_of = |field, value: &str, known: &str| FieldError::new(field, value, known);
    let affinity = SessionAffinity::parse(&wire.session_affinity).ok_or_else(|| {
        one_of("export.kubernetes.session_affinity", &wire.session_affinity, "None or ClientIP")
    })?;
    let policy = InternalTrafficPolicy::parse(&wire.internal_traffic_policy).ok_or_else(|| {
        one_of("export.kubernetes.internal_traffic_policy", &wire.internal_traffic_policy, "Cluster or Local")
    })?;
    let family = |text: &String| {
        IpFamily::parse(text).ok_or_else(|| one_of("export.kubernetes.ip_families", text, "IPv4 or IPv6"))
    };
    let families = wire.ip_families.iter().map(family).collect::<Result<Vec<_>, _>>()?;
    if families.len() > 2 || matches!(families.as_slice(), [first, second] if first == second) {
        return Err(FieldError::new("export.kubernetes.ip_families", families.len(), "each family once"));
    }
    // A day is Kubernetes' longest.
    if wire.affinity_timeout_seconds > 86_400 {
        let field = "export.kubernetes.affinity_timeout_seconds";
        return Err(FieldError::new(field, wire.affinity_timeout_seconds, "at most 86400"));
    }
    let distribution = &wire.traffic_distribution;
    if distribution.len() > 63 || !distribution.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        let field = "export.kubernetes.traffic_distribution";
        return Err(FieldError::new(field, distribution, "a word such as PreferClose"));
    }
    Ok(ServiceProperties {
        session_affinity: affinity,
        affinity_timeout_seconds: Some(wire.affinity_timeout_seconds).filter(|seconds| *seconds > 0),
        ip_families: families,
        internal_traffic_policy: policy,
        traffic_distribution: Some(distribution.clone()).filter(|text| !text.is_empty()),
    })
}

/// Endpoints, which a peer tells of when the link is flat for it. Where they may be is asked when they are used: it must not cost
/// us the export, and the link's ranges may change.
fn endpoints_of(wire: &[v1::EndpointAddress]) -> Result<Vec<(EndpointId, SocketAddr)>, FieldError> {
    if wire.len() > MAX_ENDPOINTS {
        let expected = format!("at most {MAX_ENDPOINTS} endpoints");
        return Err(FieldError::new("export.endpoints", wire.len(), expected));
    }
    let endpoint = |endpoint: &v1::EndpointAddress| {
        let address = convert::address("export.endpoints.address", &endpoint.address)?;
        let nowhere = || FieldError::new("export.endpoints.address", "", "an ip:port");
        Ok((EndpointId::from_u32(endpoint.endpoint), address.ok_or_else(nowhere)?))
    };
    wire.iter().map(endpoint).collect()
}

/// Host names of a headless service's endpoints; where they may be is asked when they are resolved.
fn named_of(wire: &[v1::HostAddress]) -> Result<Vec<NamedEndpoint>, FieldError> {
    if wire.len() > MAX_ENDPOINTS {
        return Err(FieldError::new("export.hosts", wire.len(), format!("at most {MAX_ENDPOINTS} hosts")));
    }
    let named = |host: &v1::HostAddress| {
        let label: ServiceName = convert::parse("export.hosts.hostname", &host.hostname)?;
        let address = convert::parse("export.hosts.address", &host.address)?;
        Ok(NamedEndpoint { hostname: label.to_string(), address })
    };
    wire.iter().map(named).collect()
}

/// A port as callers name it.
pub fn port_of(field: &'static str, wire: &v1::ServicePort) -> Result<Port, FieldError> {
    let number = u16::try_from(wire.port).ok().filter(|port| *port != 0);
    for text in [&wire.name, &wire.app_protocol, &wire.protocol] {
        if text.len() > MAX_TEXT {
            return Err(FieldError::new(field, text, format!("at most {MAX_TEXT} bytes")));
        }
    }
    Ok(Port {
        name: wire.name.clone(),
        port: number.ok_or_else(|| FieldError::new(field, wire.port, "1..=65535"))?,
        app_protocol: wire.app_protocol.clone(),
        protocol: if wire.protocol.is_empty() { "TCP".to_owned() } else { wire.protocol.clone() },
    })
}

/// A peer's gateways: all of them must be where the link allows.
pub fn gateways_of(scope: &PeerScope, wire: &[v1::GatewayReplica]) -> Result<Vec<PeerGateway>, FieldError> {
    if wire.len() > MAX_GATEWAYS {
        return Err(FieldError::new("gateways", wire.len(), format!("at most {MAX_GATEWAYS} gateways")));
    }
    let mut gateways = Vec::with_capacity(wire.len());
    for replica in wire {
        let Some(address) = convert::address("gateways.address", &replica.address)? else { continue };
        if !scope.ranges.allows(address) {
            let expected = format!("an address that the link to {} allows", scope.peer);
            return Err(FieldError::new("gateways.address", address, expected));
        }
        let text = |text: &str| text.chars().take(MAX_TEXT).collect::<String>();
        let (name, zone) = (text(&replica.name), text(&replica.zone));
        gateways.push(PeerGateway { name, address, balanced: replica.balanced, zone });
    }
    Ok(gateways)
}

/// A cluster's properties.
pub fn properties_of<'a>(
    wire: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Result<BTreeMap<String, String>, FieldError> {
    let properties: BTreeMap<String, String> =
        wire.into_iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    if properties.len() > MAX_PROPERTIES {
        let expected = format!("at most {MAX_PROPERTIES} properties");
        return Err(FieldError::new("properties", properties.len(), expected));
    }
    let long = properties.iter().find(|(key, value)| key.len() > MAX_TEXT || value.len() > MAX_TEXT);
    match long {
        Some((key, _)) => Err(FieldError::new("properties", key, format!("at most {MAX_TEXT} bytes each"))),
        None => Ok(properties),
    }
}

/// Records, encoded, as the store keeps them.
pub fn to_saved<'a>(records: impl Iterator<Item = &'a [u8]>) -> Vec<String> {
    records.map(hex::encode).collect()
}

/// Reads what [`to_saved`] wrote; `None` when it does not read.
pub fn from_saved(saved: &[String]) -> Option<BTreeMap<String, v1::Record>> {
    let read = |text: &String| {
        let record = v1::Record::decode(hex::decode(text).ok()?.as_slice()).ok()?;
        Some((record.key.clone(), record))
    };
    saved.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope() -> PeerScope {
        PeerScope {
            peer: "west".parse().unwrap(),
            trust_domain: "a.example".parse().unwrap(),
            ranges: AllowedRanges::default(),
            trust: crate::view::tests::east().trust,
            unix: Duration::ZERO,
        }
    }

    fn export(key: &str, change: impl FnOnce(&mut v1::ExportRecord)) -> v1::Record {
        let mut record = v1::ExportRecord {
            service: "shop/web".into(),
            export_uid: vec![7; 16],
            handle: 300,
            ports: vec![v1::ServicePort { port: 80, ..Default::default() }],
            spiffe_ids: vec!["spiffe://a.example/cluster/west/ns/shop/sa/web".into()],
            healthy: 1,
            total: 1,
            ..Default::default()
        };
        change(&mut record);
        v1::Record { key: key.into(), value: Some(v1::record::Value::Export(record)) }
    }

    fn service(change: impl FnOnce(&mut v1::ServiceProperties)) -> v1::Record {
        let mut service = v1::ServiceProperties {
            session_affinity: "ClientIP".into(),
            affinity_timeout_seconds: 10,
            ip_families: vec!["IPv6".into(), "IPv4".into()],
            internal_traffic_policy: "Local".into(),
            traffic_distribution: "PreferClose".into(),
        };
        change(&mut service);
        export("export/shop/web", |e| e.kubernetes = Some(service))
    }

    #[test]
    fn what_kubernetes_says_of_a_service_comes_through() {
        let mut import = Import::default();
        put(&mut import, &scope(), &service(|_| ()));
        let service = import.exports.values().next().unwrap().service.clone().unwrap();
        assert_eq!(service.session_affinity, SessionAffinity::ClientIP);
        assert_eq!(service.affinity_timeout_seconds, Some(10));
        assert_eq!(service.ip_families, [IpFamily::IPv6, IpFamily::IPv4]);
        assert_eq!(service.traffic_distribution.as_deref(), Some("PreferClose"));
        // A federator of before says nothing of it.
        put(&mut import, &scope(), &export("export/shop/web", |_| ()));
        assert_eq!(import.exports.values().next().unwrap().service, None);
    }

    #[test]
    fn a_good_record_is_taken_and_survives_being_saved() {
        let mut import = Import::default();
        let record = export("export/shop/web", |_| ());
        let saved = from_saved(&to_saved([record.encode_to_vec().as_slice()].into_iter())).unwrap();
        put(&mut import, &scope(), &saved["export/shop/web"]);
        assert_eq!(import.exports.len(), 1);
        remove(&mut import, "export/shop/web");
        assert!(import.exports.is_empty() && import.rejected.is_empty());
    }

    #[test]
    fn a_bad_record_is_refused_with_its_field_and_what_was_good_stays() {
        let key = "export/shop/web";
        let cases: Vec<(v1::Record, &str)> = vec![
            (export("export/shop/other", |_| ()), "record.key"),
            (export(key, |e| e.handle = 2), "export.handle"),
            (export(key, |e| e.export_uid = vec![1; 15]), "export.export_uid"),
            (export(key, |e| e.ports[0].port = 0), "export.ports"),
            (export(key, |e| e.service = "web".into()), "export.service"),
            (export(key, |e| e.spiffe_ids = vec![e.spiffe_ids[0].clone(); 65]), "export.spiffe_ids"),
            (export(key, |e| e.weights = vec![100, 100]), "export.weights"),
            (export(key, |e| e.weights = vec![0]), "export.weights"),
            (export(key, |e| e.weights = vec![1001]), "export.weights"),
            (
                export(key, |e| e.spiffe_ids = vec!["spiffe://a.example/cluster/east/ns/shop/sa/web".into()]),
                "export.spiffe_ids",
            ),
            (
                export(key, |e| e.spiffe_ids = vec!["spiffe://b.example/cluster/west/ns/shop/sa/web".into()]),
                "export.spiffe_ids",
            ),
            (
                export(key, |e| e.endpoints = vec![v1::EndpointAddress::default(); MAX_ENDPOINTS + 1]),
                "export.endpoints",
            ),
            (export(key, |e| e.endpoints = vec![v1::EndpointAddress::default()]), "export.endpoints.address"),
            (v1::Record { key: key.into(), value: None }, "record.value"),
            (export(key, |e| e.host_ports = vec![v1::ServicePort::default()]), "export.host_ports"),
            (
                export(key, |e| e.labels = (0..65).map(|n| (n.to_string(), String::new())).collect()),
                "export.labels",
            ),
            (
                export(key, |e| e.annotations = [("a".to_owned(), "b".repeat(20_000))].into()),
                "export.annotations",
            ),
            (service(|s| s.session_affinity = "Cookie".into()), "export.kubernetes.session_affinity"),
            (service(|s| s.internal_traffic_policy.clear()), "export.kubernetes.internal_traffic_policy"),
            (service(|s| s.ip_families = vec!["IPv4".into(); 2]), "export.kubernetes.ip_families"),
            (service(|s| s.ip_families = vec!["IPX".into()]), "export.kubernetes.ip_families"),
            (service(|s| s.affinity_timeout_seconds = 86_401), "affinity_timeout_seconds"),
            (service(|s| s.traffic_distribution = "a b".into()), "export.kubernetes.traffic_distribution"),
        ];
        for (record, field) in cases {
            let mut import = Import::default();
            put(&mut import, &scope(), &export(key, |_| ()));
            put(&mut import, &scope(), &record);
            let reason = &import.rejected[&record.key];
            assert!(reason.contains(field), "{field}: {reason}");
            assert_eq!(import.exports.len(), 1, "{field}: the good one is lost");
        }
    }

    #[test]
    fn an_endpoint_outside_the_ranges_costs_no_export() {
        let mut import = Import::default();
        let endpoints = vec![v1::EndpointAddress { endpoint: 16, address: "127.0.0.1:7442".into() }];
        put(&mut import, &scope(), &export("export/shop/web", |e| e.endpoints = endpoints));
        assert_eq!(import.exports.values().next().unwrap().endpoints.len(), 1);
        assert!(import.rejected.is_empty());
    }

    #[test]
    fn gateways_outside_the_allowed_ranges_are_refused() {
        let gateways = |address: &str| {
            let replica = v1::GatewayReplica { address: address.into(), ..Default::default() };
            let record = v1::GatewaysRecord { gateways: vec![replica] };
            v1::Record { key: GATEWAYS.into(), value: Some(v1::record::Value::Gateways(record)) }
        };
        let mut import = Import::default();
        put(&mut import, &scope(), &gateways("203.0.113.1:7440"));
        put(&mut import, &scope(), &gateways("127.0.0.1:7440"));
        assert_eq!(import.gateways[0].address.to_string(), "203.0.113.1:7440");
        assert!(import.rejected[GATEWAYS].contains("127.0.0.1:7440"));
    }
}
