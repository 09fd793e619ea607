//! Multi-Cluster Services (KEP-1645): what a service is made of when several clusters export it, and on what they
//! disagree (pure).
//!
//! Precedence is by age, oldest first; who says how old an export is, and how far that is believed, is the caller's
//! business. Each property is decided by itself: the type, the ports (a union), session affinity, IP families, the traffic
//! settings, exported labels and annotations as wholes. An exporter that says nothing of a property (a cluster outside
//! Kubernetes has no session affinity) takes no part in it. Conflicts are the reasons of the `Conflict` condition.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::names::ClusterName;
use crate::resource::service_export::ServiceType;

/// Exporters that a message names; more are counted.
const MAX_LISTED: usize = 5;

/// A port as callers name it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Port {
    #[serde(default)]
    pub name: String,
    pub port: u16,
    #[serde(default)]
    pub app_protocol: String,
    #[serde(default)]
    pub protocol: String,
}

/// Whether a caller's requests stay with one endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum SessionAffinity {
    #[default]
    None,
    /// By the caller's address.
    ClientIP,
}

impl SessionAffinity {
    /// As Kubernetes writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "None",
            Self::ClientIP => "ClientIP",
        }
    }
    pub fn parse(text: &str) -> Option<Self> {
        [Self::None, Self::ClientIP].into_iter().find(|known| known.as_str() == text)
    }
}

/// Which endpoints serve callers of their own cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum InternalTrafficPolicy {
    #[default]
    Cluster,
    /// Those of the caller's node.
    Local,
}

impl InternalTrafficPolicy {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cluster => "Cluster",
            Self::Local => "Local",
        }
    }
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Cluster, Self::Local].into_iter().find(|known| known.as_str() == text)
    }
}

/// A family of addresses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum IpFamily {
    IPv4,
    IPv6,
}

impl IpFamily {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::IPv4 => "IPv4",
            Self::IPv6 => "IPv6",
        }
    }
    pub fn parse(text: &str) -> Option<Self> {
        [Self::IPv4, Self::IPv6].into_iter().find(|known| known.as_str() == text)
    }
}

/// What a Kubernetes `Service` says beside its type and ports.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ServiceProperties {
    pub session_affinity: SessionAffinity,
    /// Of `ClientIP`.
    pub affinity_timeout_seconds: Option<u32>,
    /// Without duplicates, the first one is preferred.
    pub ip_families: Vec<IpFamily>,
    pub internal_traffic_policy: InternalTrafficPolicy,
    /// `PreferClose`, `PreferSameZone`, `PreferSameNode`, or one that a later Kubernetes knows.
    pub traffic_distribution: Option<String>,
}

/// One cluster that exports a service.
#[derive(Clone, PartialEq, Debug)]
pub struct Exporter {
    pub cluster: ClusterName,
    /// Since when, for precedence: since the Unix epoch.
    pub since: Duration,
    pub kind: ServiceType,
    pub ports: Vec<Port>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// `None`: it is not Kubernetes that exports it.
    pub service: Option<ServiceProperties>,
}

/// A property on which exporters disagree.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Conflict {
    /// Of the `Conflict` condition.
    pub reason: &'static str,
    /// Which value holds, whose it is, and who disagrees.
    pub message: String,
}

/// The service that importers see.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Merged {
    pub kind: ServiceType,
    pub ports: Vec<Port>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// Of the oldest export that says so.
    pub service: Option<ServiceProperties>,
    pub conflicts: Vec<Conflict>,
}

impl Merged {
    /// The reason of the `Conflict` condition: several are joined by commas, as its CRD allows.
    pub fn reasons(&self) -> String {
        self.conflicts.iter().map(|conflict| conflict.reason).collect::<Vec<_>>().join(",")
    }
    pub fn messages(&self) -> String {
        self.conflicts.iter().map(|conflict| conflict.message.as_str()).collect::<Vec<_>>().join("; ")
    }
}

/// What the exporters make together; they come oldest first.
pub fn merge(exporters: &[Exporter]) -> Merged {
    let Some(oldest) = exporters.first() else { return Merged::default() };
    let ports = merge_ports(exporters);
    let all: Vec<(&Exporter, &Exporter)> = exporters.iter().map(|exporter| (exporter, exporter)).collect();
    let of_services: Vec<(&Exporter, &ServiceProperties)> =
        exporters.iter().filter_map(|exporter| Some((exporter, exporter.service.as_ref()?))).collect();
    let conflicts = [
        disagreement("TypeConflict", &all, |e| e.kind, |kind| kind.as_str().to_owned()),
        port_conflict(&ports),
        disagreement(
            "SessionAffinityConflict",
            &of_services,
            |s| s.session_affinity,
            |affinity| format!("session affinity {}", affinity.as_str()),
        ),
        affinity_timeout(&of_services),
        disagreement(
            "InternalTrafficPolicyConflict",
            &of_services,
            |s| s.internal_traffic_policy,
            |policy| format!("internal traffic policy {}", policy.as_str()),
        ),
        disagreement(
            "TrafficDistributionConflict",
            &of_services,
            |s| s.traffic_distribution.clone(),
            |distribution| format!("traffic distribution {}", distribution.as_deref().unwrap_or("unset")),
        ),
        disagreement(
            "IPFamilyConflict",
            &of_services,
            |s| s.ip_families.clone(),
            |families| {
                let families: Vec<&str> = families.iter().map(|family| family.as_str()).collect();
                format!("IP families {}", families.join(" and "))
            },
        ),
        disagreement("LabelsConflict", &all, |e| e.labels.clone(), |labels| counted(labels.len(), "label")),
        disagreement(
            "AnnotationsConflict",
            &all,
            |e| e.annotations.clone(),
            |annotations| counted(annotations.len(), "annotation"),
        ),
    ];
    Merged {
        kind: oldest.kind,
        ports: ports.ports,
        labels: oldest.labels.clone(),
        annotations: oldest.annotations.clone(),
        service: of_services.first().map(|(_, service)| (*service).clone()),
        conflicts: conflicts.into_iter().flatten().collect(),
    }
}

/// Timeouts are compared among those that have the affinity which holds.
fn affinity_timeout(of_services: &[(&Exporter, &ServiceProperties)]) -> Option<Conflict> {
    let (_, oldest) = of_services.first()?;
    if oldest.session_affinity != SessionAffinity::ClientIP {
        return None;
    }
    let sticky = |(_, service): &&(&Exporter, &ServiceProperties)| {
        service.session_affinity == SessionAffinity::ClientIP
    };
    let sticky: Vec<_> = of_services.iter().filter(sticky).copied().collect();
    disagreement(
        "SessionAffinityConfigConflict",
        &sticky,
        |s| s.affinity_timeout_seconds,
        |timeout| match timeout {
            Some(seconds) => format!("an affinity timeout of {seconds} s"),
            None => "no affinity timeout".to_owned(),
        },
    )
}

/// The oldest one's value and those that have another, if any have.
fn disagreement<T, V: PartialEq>(
    reason: &'static str,
    exporters: &[(&Exporter, &T)],
    value: impl Fn(&T) -> V,
    shown: impl Fn(&V) -> String,
) -> Option<Conflict> {
    let ((oldest, holding), others) = exporters.split_first()?;
    let holding = value(holding);
    let others = others.iter().map(|(exporter, of)| (exporter, value(of)));
    let disagreeing: Vec<_> = others.filter(|(_, other)| *other != holding).collect();
    if disagreeing.is_empty() {
        return None;
    }
    let count = disagreeing.len();
    let has = disagreeing.iter().map(|(exporter, other)| match shown(other) {
        // A map of the same size is still another one.
        text if text == shown(&holding) => format!("{} has other {}", exporter.cluster, plain(&text)),
        text => format!("{} has {text}", exporter.cluster),
    });
    let message = format!(
        "using {} from the oldest export, in {}. {count}/{} clusters disagree: {}",
        shown(&holding),
        oldest.cluster,
        exporters.len(),
        listed(has, "; ")
    );
    Some(Conflict { reason, message })
}

/// `2 labels`: `labels`.
fn plain(counted: &str) -> &str {
    counted.split_once(' ').map_or(counted, |(_, noun)| noun)
}

fn counted(number: usize, noun: &str) -> String {
    match number {
        0 => format!("no {noun}s"),
        1 => format!("1 {noun}"),
        more => format!("{more} {noun}s"),
    }
}

fn listed(items: impl Iterator<Item = impl fmt::Display>, separator: &str) -> String {
    let mut items = items;
    let shown: Vec<String> = items.by_ref().take(MAX_LISTED).map(|item| item.to_string()).collect();
    let shown = shown.join(separator);
    match items.count() {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
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

/// Any difference is a conflict, a clean union too (KEP-1645).
fn port_conflict(merged: &MergedPorts) -> Option<Conflict> {
    let winner = merged.winner.as_ref()?;
    let has = |exporter: &Exporter| format!("{} has {}", exporter.cluster, ports(&exporter.ports));
    let message = format!(
        "using the ports of the oldest export, in {} ({}), and from others what does not clash. {}/{} clusters disagree: {}",
        winner.cluster,
        ports(&winner.ports),
        merged.disagreeing.len(),
        merged.counted,
        listed(merged.disagreeing.iter().map(has), "; ")
    );
    Some(Conflict { reason: "PortConflict", message })
}

/// `http 80/TCP (h2c), 9000/TCP`.
fn ports(ports: &[Port]) -> String {
    let shown = ports.iter().map(|port| {
        let Port { name, port, app_protocol, protocol } = port;
        let name = if name.is_empty() { String::new() } else { format!("{name} ") };
        let spoken = if app_protocol.is_empty() { String::new() } else { format!(" ({app_protocol})") };
        format!("{name}{port}/{protocol}{spoken}")
    });
    listed(shown, ", ")
}

#[cfg(test)]
mod tests;
