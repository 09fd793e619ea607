//! What this cluster exports and to whom, and what a service is made of when several clusters export it (pure).
//!
//! An export is a `ServiceExport` object; its annotation `tombolo.dev/export-to` names the clusters. One that Kubernetes
//! keeps is about a `Service`, and is none as long as there is none. What several exporters make together is
//! [`tombolo_model::mcs`]'s business.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tombolo_model::mcs::ServiceProperties;
pub use tombolo_model::mcs::{Exporter, merge, merge_ports};
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::resource::service_export::{ExportTo, ServiceType};
use tombolo_model::resource::{ObjectKey, Spec};

use crate::facts::{ExportedService, Facts, KubernetesService, Port, StoredObject};
use crate::registry::Member;

const KIND: &str = "ServiceExport";

/// A `ServiceExport` of this cluster.
#[derive(Clone, Debug)]
pub struct Export<'a> {
    pub service: ServiceKey,
    pub to: ExportTo,
    pub stored: &'a StoredObject,
}

impl<'a> Export<'a> {
    /// `None`: it is none.
    pub fn read(stored: &'a StoredObject) -> Option<Self> {
        let metadata = &stored.object.metadata;
        let namespace = metadata.namespace.as_deref()?.parse().ok()?;
        let service = ServiceKey::new(namespace, metadata.name.parse().ok()?);
        // An annotation that can't be read is refused by `apply`; should one be stored, nobody is named by it.
        let to = ExportTo::of(metadata).unwrap_or(ExportTo::Clusters(Vec::new()));
        Some(Self { service, to, stored })
    }

    /// Kubernetes says it by the `Service`. An annotation that can't be read is refused by `apply`.
    pub fn service_type(&self) -> ServiceType {
        if let Some(service) = self.kubernetes() {
            return if service.headless { ServiceType::Headless } else { ServiceType::ClusterSetIp };
        }
        ServiceType::of(&self.stored.object.metadata).unwrap_or_default()
    }

    /// The Kubernetes `Service` that it is about.
    pub fn kubernetes(&self) -> Option<&'a ExportedService> {
        self.stored.kubernetes.as_ref().and_then(KubernetesService::found)
    }

    /// Whether there is something to export: Kubernetes may know of none.
    pub fn is_valid(&self) -> bool {
        self.stored.kubernetes.is_none() || self.kubernetes().is_some()
    }

    /// The ports that this cluster offers; `serving` are its endpoints.
    pub fn ports<'m>(&self, serving: impl IntoIterator<Item = &'m Member>) -> Vec<Port> {
        match self.kubernetes() {
            Some(service) => service.ports.iter().map(normal).collect(),
            None => served_ports(serving, &self.service),
        }
    }

    fn properties(&self) -> Option<ServiceProperties> {
        self.kubernetes().map(|service| service.properties.clone())
    }

    /// Whether it is for this peer; that the peer is linked is another question.
    pub fn includes(&self, peer: &ClusterName) -> bool {
        self.to.includes(peer)
    }
}

/// Every export of this cluster, by service, whether there is something to export or not.
pub fn all_exports(facts: &Facts) -> impl Iterator<Item = Export<'_>> {
    let first = ObjectKey { kind: KIND, namespace: String::new(), name: String::new() };
    let of_kind = facts.objects.range(first..).take_while(|(key, _)| key.kind == KIND);
    of_kind.filter_map(|(_, stored)| Export::read(stored))
}

/// Every export of this cluster that there is something to export for, by service.
pub fn exports(facts: &Facts) -> impl Iterator<Item = Export<'_>> {
    all_exports(facts).filter(Export::is_valid)
}

/// The object that exports a service.
pub fn stored<'a>(facts: &'a Facts, service: &ServiceKey) -> Option<&'a Arc<StoredObject>> {
    let key =
        ObjectKey { kind: KIND, namespace: service.namespace.to_string(), name: service.name.to_string() };
    facts.objects.get(&key)
}

/// The export of one service, whether there is something to export or not.
pub fn export_of<'a>(facts: &'a Facts, service: &ServiceKey) -> Option<Export<'a>> {
    stored(facts, service).and_then(|stored| Export::read(stored))
}

/// Whether this cluster exports a service to a peer. Its own cluster needs no export to call it, but is named here only
/// if the export names it.
pub fn exported_to(facts: &Facts, service: &ServiceKey, peer: &ClusterName) -> bool {
    export_of(facts, service).is_some_and(|export| export.is_valid() && export.includes(peer))
}

/// What this cluster's endpoints offer together.
pub fn served_ports<'a>(members: impl IntoIterator<Item = &'a Member>, service: &ServiceKey) -> Vec<Port> {
    let served = members.into_iter().filter_map(|member| member.services.get(service));
    let ports: BTreeSet<Port> = served.flat_map(|served| &served.ports).map(normal).collect();
    ports.into_iter().collect()
}

/// Who serves a service in this cluster, and the weight of each endpoint of an identity, in the same order; no weights:
/// all alike. Where endpoints of one identity differ, their mean counts, so that the identity's share is right.
pub fn identities(facts: &Facts, service: &ServiceKey) -> (Vec<String>, Vec<u32>) {
    let mut sums: BTreeMap<&str, [(u64, u64); 2]> = BTreeMap::new();
    for member in facts.registry.serving(service) {
        let weight = member.services.get(service).map_or(0, |served| u64::from(served.weight));
        let sums = sums.entry(member.spiffe_id.as_str()).or_default();
        // Those out of rotation count only where there are no others.
        if let Some((sum, count)) = sums.get_mut(usize::from(member.in_rotation(service))) {
            (*sum, *count) = (*sum + weight, *count + 1);
        }
    }
    let mean = |sums: &[(u64, u64); 2]| {
        let [out, within] = *sums;
        let (sum, count) = if within.1 > 0 { within } else { out };
        u32::try_from(sum / count.max(1)).unwrap_or(u32::MAX).max(1)
    };
    let mut weights: Vec<u32> = sums.values().map(mean).collect();
    if weights.windows(2).all(|pair| matches!(pair, [one, next] if one == next)) {
        weights.clear();
    }
    (sums.into_keys().map(str::to_owned).collect(), weights)
}

/// The clusters that export a service, in order of precedence; `serving` are this cluster's endpoints of it.
///
/// Oldest first, as MCS has it. The time that a peer gives can be forged, so it counts from the link's making at the
/// earliest: what was there before the link keeps its ports, whatever a new peer says.
pub fn exporters<'a>(
    facts: &Facts,
    service: &ServiceKey,
    serving: impl IntoIterator<Item = &'a Member>,
) -> Vec<Exporter> {
    let own = export_of(facts, service).filter(Export::is_valid).map(|export| {
        let (labels, annotations) = match &export.stored.object.spec {
            Spec::ServiceExport(spec) => (spec.exported_labels.clone(), spec.exported_annotations.clone()),
            _ => Default::default(),
        };
        Exporter {
            cluster: facts.cluster.name.clone(),
            since: Duration::from_secs(export.stored.created_unix),
            kind: export.service_type(),
            ports: export.ports(serving),
            labels,
            annotations,
            service: export.properties(),
        }
    });
    let peers = facts.imports.iter().filter_map(|(peer, import)| {
        let exported = import.exports.get(service)?;
        let linked = Duration::from_secs(facts.links.get(peer).map_or(u64::MAX, |link| link.created_unix));
        let said = Duration::from_millis(u64::try_from(exported.exported_at_unix_ms).unwrap_or(0));
        let ports = exported.ports.iter().map(normal).collect();
        Some(Exporter {
            cluster: peer.clone(),
            since: said.max(linked),
            kind: if exported.headless { ServiceType::Headless } else { ServiceType::ClusterSetIp },
            ports,
            labels: exported.labels.clone(),
            annotations: exported.annotations.clone(),
            service: exported.service.clone(),
        })
    });
    let mut exporters: Vec<_> = own.into_iter().chain(peers).collect();
    // Stable: between equals the own cluster comes first, then names decide.
    exporters.sort_by_key(|exporter| exporter.since);
    exporters
}

/// The type of a service: its oldest exporter's, as MCS has it.
pub fn service_type(facts: &Facts, service: &ServiceKey) -> ServiceType {
    exporters(facts, service, []).first().map(|oldest| oldest.kind).unwrap_or_default()
}

/// A port as it is compared: an absent protocol is TCP.
fn normal(port: &Port) -> Port {
    let protocol = if port.protocol.is_empty() { "TCP".to_owned() } else { port.protocol.clone() };
    Port { protocol, ..port.clone() }
}

/// This cluster's members by the services that they serve: one pass instead of one per service.
pub fn members_by_service(facts: &Facts) -> BTreeMap<&ServiceKey, Vec<&Member>> {
    let mut serving: BTreeMap<&ServiceKey, Vec<&Member>> = BTreeMap::new();
    for member in facts.registry.members.values() {
        for service in member.services.keys() {
            serving.entry(service).or_default().push(member);
        }
    }
    serving
}
