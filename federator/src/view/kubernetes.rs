//! What Kubernetes is to show of a service: conditions of its export, and what its import is made of.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tombolo_model::mcs::Merged;
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::resource::Condition;

use super::{View, conditions, links};
use crate::exports::{all_exports, export_of, exporters, merge, served_ports};
use crate::facts::{Facts, KubernetesHosts, NamedEndpoint, Port, StoredObject};
use crate::names;

/// One service.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct ShownService {
    /// Of the export, if this cluster has one.
    pub export: Option<ShownExport>,
    /// `None`: nobody exports it.
    pub import: Option<ShownImport>,
}

/// A `ServiceExport` of this cluster.
#[derive(Clone, PartialEq, Debug)]
pub struct ShownExport {
    pub uid: String,
    pub generation: u64,
    pub conditions: Vec<Condition>,
}

/// A service that some cluster exports.
#[derive(Clone, PartialEq, Debug)]
pub struct ShownImport {
    pub merged: Merged,
    /// Those that export it, by name.
    pub clusters: Vec<ClusterName>,
    /// Ready endpoints that can be reached at their addresses, by cluster.
    pub endpoints: BTreeMap<ClusterName, KubernetesHosts>,
}

/// Services at one moment.
pub struct Services<'a>(View<'a>);

impl<'a> Services<'a> {
    pub fn new(facts: &'a Facts, now: Duration, unix: Duration) -> Self {
        Self(View::new(facts, now, unix))
    }

    pub fn of(&self, service: &ServiceKey) -> ShownService {
        let view = &self.0;
        let export = export_of(view.facts, service).map(|export| ShownExport {
            uid: export.stored.uid.clone(),
            generation: export.stored.generation,
            conditions: conditions::export::of(view, &export),
        });
        let exporters = exporters(view.facts, service, view.serving(service).iter().copied());
        let mut clusters: Vec<ClusterName> = exporters.iter().map(|e| e.cluster.clone()).collect();
        clusters.sort_unstable();
        let import = (!clusters.is_empty()).then(|| ShownImport {
            merged: merge(&exporters),
            endpoints: clusters
                .iter()
                .map(|cluster| (cluster.clone(), hosts(view, cluster, service)))
                .collect(),
            clusters,
        });
        ShownService { export, import }
    }

    /// Every service that some cluster exports.
    pub fn exported(&self) -> impl Iterator<Item = ServiceKey> {
        let facts = self.0.facts;
        let own = all_exports(facts).map(|export| export.service);
        own.chain(facts.imports.values().flat_map(|import| import.exports.keys().cloned()))
    }
}

fn hosts(view: &View<'_>, cluster: &ClusterName, service: &ServiceKey) -> KubernetesHosts {
    if *cluster == view.facts.cluster.name {
        return view.facts.kubernetes_hosts.get(service).map(|hosts| (**hosts).clone()).unwrap_or_default();
    }
    let hosts: Vec<NamedEndpoint> = names::reachable(view.facts, cluster, service).cloned().collect();
    let export = view.facts.imports.get(cluster).and_then(|import| import.exports.get(service));
    let ports: Vec<Port> = export.map(|export| export.named_ports.clone()).unwrap_or_default();
    KubernetesHosts { hosts, ports }
}

/// What of the facts a service's showing depends on, cheap to compare: which services have changed since.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// Of links and of whoever is linked: a change concerns every service.
    standings: Vec<String>,
    own: BTreeMap<ServiceKey, OwnExport>,
    hosts: BTreeMap<ServiceKey, Arc<KubernetesHosts>>,
    imports: BTreeMap<ClusterName, Arc<crate::facts::Import>>,
}

/// An export of this cluster.
#[derive(Clone, Debug)]
struct OwnExport {
    stored: Arc<StoredObject>,
    handles: usize,
    /// Of one outside Kubernetes, whose endpoints say them.
    ports: Vec<Port>,
}

impl OwnExport {
    fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.stored, &other.stored) && self.handles == other.handles && self.ports == other.ports
    }
}

/// Which services are to be shown anew.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Changed {
    All,
    Only(BTreeSet<ServiceKey>),
}

impl Inputs {
    pub fn of(facts: &Facts, now: Duration, unix: Duration) -> Self {
        let view = View::new(facts, now, unix);
        let standing = |peer: &ClusterName| {
            let standing = links::standing(&view, peer);
            let flat = facts.link_spec(peer).map(|spec| (spec.flat, &spec.allowed_gateway_ranges));
            let freshness = facts.imports.get(peer).map(|import| import.freshness);
            format!("{peer} {} {} {flat:?} {freshness:?}", standing.reason, standing.is_connected())
        };
        let mut standings: Vec<String> = facts.links.keys().map(standing).collect();
        standings.push(facts.store_writable.to_string());
        let handles = |service: &ServiceKey| {
            let text = service.to_string();
            facts.links.keys().filter(|peer| facts.handle(peer, &text).is_some()).count()
        };
        let own = facts.objects.iter().filter(|(key, _)| key.kind == "ServiceExport");
        let own = own.filter_map(|(key, stored)| {
            let service = ServiceKey::new(key.namespace.parse().ok()?, key.name.parse().ok()?);
            let ports = match stored.kubernetes {
                None => served_ports(view.serving(&service).iter().copied(), &service),
                Some(_) => Vec::new(),
            };
            let export = OwnExport { stored: Arc::clone(stored), handles: handles(&service), ports };
            Some((service, export))
        });
        Self {
            standings,
            own: own.collect(),
            hosts: facts.kubernetes_hosts.clone(),
            imports: facts.imports.clone(),
        }
    }

    /// What has changed since `before`.
    pub fn since(&self, before: &Self) -> Changed {
        if self.standings != before.standings {
            return Changed::All;
        }
        let mut changed = BTreeSet::new();
        differing(&before.own, &self.own, &mut changed, OwnExport::is_same);
        differing(&before.hosts, &self.hosts, &mut changed, Arc::ptr_eq);
        let none = Arc::default();
        let peers: BTreeSet<&ClusterName> = before.imports.keys().chain(self.imports.keys()).collect();
        for peer in peers {
            let of = |inputs: &Self| Arc::clone(inputs.imports.get(peer).unwrap_or(&none));
            let (then, now) = (of(before), of(self));
            if !Arc::ptr_eq(&then, &now) {
                differing(then.exports.shared(), now.exports.shared(), &mut changed, Arc::ptr_eq);
            }
        }
        Changed::Only(changed)
    }
}

fn differing<V>(
    before: &BTreeMap<ServiceKey, V>,
    now: &BTreeMap<ServiceKey, V>,
    changed: &mut BTreeSet<ServiceKey>,
    same: impl Fn(&V, &V) -> bool,
) {
    let gone = before.keys().filter(|key| !now.contains_key(*key));
    let news = now.iter().filter(|(key, value)| before.get(*key).is_none_or(|old| !same(old, value)));
    changed.extend(gone.chain(news.map(|(key, _)| key)).cloned());
}
