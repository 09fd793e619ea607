//! What this cluster exports and to whom, and what a service is made of when several clusters export it (pure).
//!
//! An export is a `ServiceExport` object; its annotation `tombolo.dev/export-to` names the clusters. Ports of several
//! exporters are merged by the MCS rules (KEP-1645): the oldest export wins a clash, and any difference is a conflict.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::resource::ObjectKey;
use tombolo_model::resource::service_export::{ExportTo, ServiceType};

use crate::facts::{Facts, Port, StoredObject};
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
    fn read(stored: &'a StoredObject) -> Option<Self> {
        let metadata = &stored.object.metadata;
        let namespace = metadata.namespace.as_deref()?.parse().ok()?;
        let service = ServiceKey::new(namespace, metadata.name.parse().ok()?);
        // An annotation that can't be read is refused by `apply`; should one be stored, nobody is named by it.
        let to = ExportTo::of(metadata).unwrap_or(ExportTo::Clusters(Vec::new()));
        Some(Self { service, to, stored })
    }

    /// An annotation that can't be read is refused by `apply`.
    pub fn service_type(&self) -> ServiceType {
        ServiceType::of(&self.stored.object.metadata).unwrap_or_default()
    }

    /// Whether it is for this peer; that the peer is linked is another question.
    pub fn includes(&self, peer: &ClusterName) -> bool {
        self.to.includes(peer)
    }
}

/// Every export of this cluster, by service.
pub fn exports(facts: &Facts) -> impl Iterator<Item = Export<'_>> {
    let first = ObjectKey { kind: KIND, namespace: String::new(), name: String::new() };
    let of_kind = facts.objects.range(first..).take_while(|(key, _)| key.kind == KIND);
    of_kind.filter_map(|(_, stored)| Export::read(stored))
}

/// The export of one service.
pub fn export_of<'a>(facts: &'a Facts, service: &ServiceKey) -> Option<Export<'a>> {
    let key =
        ObjectKey { kind: KIND, namespace: service.namespace.to_string(), name: service.name.to_string() };
    facts.objects.get(&key).and_then(|stored| Export::read(stored))
}

/// Whether this cluster exports a service to a peer. Its own cluster needs no export to call it, but is named here only
/// if the export names it.
pub fn exported_to(facts: &Facts, service: &ServiceKey, peer: &ClusterName) -> bool {
    export_of(facts, service).is_some_and(|export| export.includes(peer))
}

/// One cluster that exports a service.
#[derive(Clone, PartialEq, Debug)]
pub struct Exporter {
    pub cluster: ClusterName,
    /// Since when, for precedence.
    pub since: Duration,
    pub ports: Vec<Port>,
}

/// What this cluster's endpoints offer together.
pub fn served_ports<'a>(members: impl IntoIterator<Item = &'a Member>, service: &ServiceKey) -> Vec<Port> {
    let served = members.into_iter().filter_map(|member| member.services.get(service));
    let ports: BTreeSet<Port> = served.flat_map(|served| &served.ports).map(normal).collect();
    ports.into_iter().collect()
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
    let own = export_of(facts, service).map(|export| Exporter {
        cluster: facts.cluster.name.clone(),
        since: Duration::from_secs(export.stored.created_unix),
        ports: served_ports(serving, service),
    });
    let peers = facts.imports.iter().filter_map(|(peer, import)| {
        let exported = import.exports.get(service)?;
        let linked = Duration::from_secs(facts.links.get(peer).map_or(u64::MAX, |link| link.created_unix));
        let said = Duration::from_millis(u64::try_from(exported.exported_at_unix_ms).unwrap_or(0));
        let ports = exported.ports.iter().map(normal).collect();
        Some(Exporter { cluster: peer.clone(), since: said.max(linked), ports })
    });
    let mut exporters: Vec<_> = own.into_iter().chain(peers).collect();
    // Stable: between equals the own cluster comes first, then names decide.
    exporters.sort_by_key(|exporter| exporter.since);
    exporters
}

/// The type of a service: its oldest exporter's, as MCS has it.
pub fn service_type(facts: &Facts, service: &ServiceKey) -> ServiceType {
    let exporters = exporters(facts, service, []);
    exporters.first().map(|oldest| type_of(facts, service, &oldest.cluster)).unwrap_or_default()
}

/// The type that one exporter gives a service.
pub fn type_of(facts: &Facts, service: &ServiceKey, exporter: &ClusterName) -> ServiceType {
    if *exporter == facts.cluster.name {
        return export_of(facts, service).map(|export| export.service_type()).unwrap_or_default();
    }
    let import = facts.imports.get(exporter);
    let headless = import.and_then(|import| import.exports.get(service)).is_some_and(|e| e.headless);
    if headless { ServiceType::Headless } else { ServiceType::ClusterSetIp }
}

/// A port as it is compared: an absent protocol is TCP.
fn normal(port: &Port) -> Port {
    let protocol = if port.protocol.is_empty() { "TCP".to_owned() } else { port.protocol.clone() };
    Port { protocol, ..port.clone() }
}

/// The ports of a service over all its exporters.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct MergedPorts {
    pub ports: Vec<Port>,
    /// The exporter whose ports win, when others disagree.
    pub winner: Option<Exporter>,
    /// Exporters with other ports than the winner's.
    pub disagreeing: Vec<Exporter>,
    /// Exporters that say what their ports are.
    pub counted: usize,
}

/// The union by name, then by protocol and number; a clash goes to the earlier exporter. An exporter that knows no ports
/// (no endpoint has joined) says nothing.
pub fn merge_ports(exporters: &[Exporter]) -> MergedPorts {
    let known: Vec<&Exporter> = exporters.iter().filter(|exporter| !exporter.ports.is_empty()).collect();
    let mut merged = MergedPorts { counted: known.len(), ..MergedPorts::default() };
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    for port in known.iter().flat_map(|exporter| &exporter.ports) {
        let number = (port.protocol.clone(), port.port);
        let clash = !port.name.is_empty() && names.contains(&port.name);
        if !clash && numbers.insert(number) {
            names.insert(port.name.clone());
            merged.ports.push(port.clone());
        }
    }
    let set = |exporter: &Exporter| exporter.ports.iter().cloned().collect::<BTreeSet<_>>();
    if let Some((winner, others)) = known.split_first() {
        let wanted = set(winner);
        merged.disagreeing =
            others.iter().filter(|other| set(other) != wanted).map(|o| (*o).clone()).collect();
        merged.winner = (!merged.disagreeing.is_empty()).then(|| (*winner).clone());
    }
    merged
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

#[cfg(test)]
mod tests {
    use super::*;

    fn port(name: &str, port: u16) -> Port {
        Port { name: name.into(), port, app_protocol: String::new(), protocol: "TCP".into() }
    }
    fn exporter(cluster: &str, since: u64, ports: &[Port]) -> Exporter {
        Exporter {
            cluster: cluster.parse().unwrap(),
            since: Duration::from_secs(since),
            ports: ports.to_vec(),
        }
    }

    #[test]
    fn ports_are_a_union_in_which_the_oldest_wins_a_clash() {
        let http = port("http", 80);
        let cases = [
            ("the same", vec![http.clone()], vec![http.clone()], 0),
            ("a clean union", vec![port("admin", 81)], vec![http.clone(), port("admin", 81)], 1),
            ("a name clash", vec![port("http", 8080)], vec![http.clone()], 1),
            ("a number clash", vec![port("web", 80)], vec![http.clone()], 1),
            ("one without endpoints", vec![], vec![http.clone()], 0),
        ];
        for (case, ports, expected, disagreeing) in cases {
            let merged =
                merge_ports(&[exporter("east", 1, std::slice::from_ref(&http)), exporter("west", 2, &ports)]);
            assert_eq!(merged.ports, expected, "{case}");
            assert_eq!(merged.disagreeing.len(), disagreeing, "{case}");
            assert_eq!(merged.winner.is_some(), disagreeing > 0, "{case}");
        }
        assert_eq!(merge_ports(&[]), MergedPorts::default());
    }

    #[test]
    fn unnamed_ports_do_not_clash_by_name() {
        let merged = merge_ports(&[exporter("east", 1, &[port("", 80), port("", 81)])]);
        assert_eq!(merged.ports.len(), 2);
    }
}
