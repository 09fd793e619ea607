//! What the API server holds, as far as it is of use here: one table per kind, filled by watches, and which services are
//! to be looked at again (pure).
//!
//! A list that begins anew (after an outage, or when the server has forgotten the versions in between) replaces a table
//! once it is complete: until then what was known before stays, so that nothing is taken for deleted. An answer to a write
//! counts as an event, and an event that is older than what is known already does not.

use std::collections::{BTreeMap, BTreeSet};

use kube::core::DynamicObject;
use kube::runtime::watcher::Event;
use tombolo_model::names::ServiceKey;
use tombolo_model::resource::{Object, Spec};

use super::labels::derived_name;
use super::rows::{ExportRow, ImportRow, NamespaceRow, Row, ServiceRow, SliceRow, key};
use crate::core::kubernetes::KubernetesExport;
use crate::facts::{KubernetesHosts, KubernetesService, NamedEndpoint};
use crate::import::{MAX_COPIED, MAX_COPIED_BYTES, MAX_PORTS};

mod pods;

/// Namespace and name.
pub type Place = (String, String);

/// Kinds that are watched.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    Namespace,
    Service,
    EndpointSlice,
    ServiceExport,
    ServiceImport,
}

impl Kind {
    pub const ALL: [Self; 5] =
        [Self::Namespace, Self::Service, Self::EndpointSlice, Self::ServiceExport, Self::ServiceImport];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::ServiceExport => "ServiceExport",
            Self::ServiceImport => "ServiceImport",
        }
    }
}

fn place(object: &DynamicObject) -> Option<Place> {
    Some((object.metadata.namespace.clone().unwrap_or_default(), object.metadata.name.clone()?))
}

/// Rows of one kind.
#[derive(Debug)]
struct Table<R> {
    rows: BTreeMap<Place, R>,
    /// What the list that is being received has named so far.
    listing: Option<BTreeSet<Place>>,
    synced: bool,
}

impl<R> Default for Table<R> {
    fn default() -> Self {
        Self { rows: BTreeMap::new(), listing: None, synced: false }
    }
}

impl<R: Row> Table<R> {
    /// The rows that have changed: before and after.
    fn apply(&mut self, event: Event<DynamicObject>) -> Vec<(Place, Option<R>)> {
        match event {
            Event::Init => {
                self.listing = Some(BTreeSet::new());
                Vec::new()
            }
            Event::InitApply(object) => {
                if let (Some(listing), Some(place)) = (&mut self.listing, place(&object)) {
                    listing.insert(place);
                }
                self.put(object)
            }
            Event::InitDone => {
                self.synced = true;
                let listed = self.listing.take().unwrap_or_default();
                let gone: Vec<Place> =
                    self.rows.keys().filter(|place| !listed.contains(*place)).cloned().collect();
                gone.into_iter().map(|place| (place.clone(), self.rows.remove(&place))).collect()
            }
            Event::Apply(object) => self.put(object),
            Event::Delete(object) => {
                let Some(place) = place(&object) else { return Vec::new() };
                let uid = object.metadata.uid.as_deref();
                // One that was deleted before another of its name was made.
                if self.rows.get(&place).is_some_and(|row| uid != Some(row.meta().uid.as_str())) {
                    return Vec::new();
                }
                match self.rows.remove(&place) {
                    Some(row) => vec![(place, Some(row))],
                    None => Vec::new(),
                }
            }
        }
    }

    fn put(&mut self, object: DynamicObject) -> Vec<(Place, Option<R>)> {
        let Some(place) = place(&object) else { return Vec::new() };
        let Some(row) = R::read(object) else {
            return match self.rows.remove(&place) {
                Some(before) => vec![(place, Some(before))],
                None => Vec::new(),
            };
        };
        let before = self.rows.get(&place);
        let older = before.is_some_and(|before| {
            before.meta().uid == row.meta().uid && before.meta().version > row.meta().version
        });
        if older || before == Some(&row) {
            return Vec::new();
        }
        vec![(place.clone(), self.rows.insert(place, row))]
    }
}

/// Services to look at again.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Touched {
    /// What is exported of them may have changed.
    pub exports: BTreeSet<ServiceKey>,
    /// What is written for them may have changed.
    pub services: BTreeSet<ServiceKey>,
    /// A namespace has come or gone: look at all of its services.
    pub namespaces: BTreeSet<String>,
}

/// Every table.
#[derive(Debug, Default)]
pub struct Tables {
    namespaces: Table<NamespaceRow>,
    services: Table<ServiceRow>,
    slices: Table<SliceRow>,
    exports: Table<ExportRow>,
    imports: Table<ImportRow>,
    /// Slices by the service of this cluster, and those written here by the import.
    of_service: BTreeMap<Place, BTreeSet<Place>>,
    of_import: BTreeMap<Place, BTreeSet<Place>>,
}

impl Tables {
    /// Takes an event over.
    pub fn apply(&mut self, kind: Kind, event: Event<DynamicObject>) -> Touched {
        let mut touched = Touched::default();
        match kind {
            Kind::Namespace => {
                let changed = self.namespaces.apply(event);
                touched.namespaces.extend(changed.into_iter().map(|((_, name), _)| name));
            }
            Kind::Service => {
                for ((namespace, name), before) in self.services.apply(event) {
                    let place = (namespace.clone(), name.clone());
                    let now = self.services.rows.get(&place);
                    let imports = before.iter().chain(now).filter_map(|row| row.import.as_deref());
                    touched.services.extend(imports.filter_map(|import| key(&namespace, import)));
                    touched.exports.extend(key(&namespace, &name));
                }
            }
            Kind::EndpointSlice => self.apply_slices(event, &mut touched),
            Kind::ServiceExport => {
                for ((namespace, name), _) in self.exports.apply(event) {
                    touched.exports.extend(key(&namespace, &name));
                    touched.services.extend(key(&namespace, &name));
                }
            }
            Kind::ServiceImport => {
                let changed = self.imports.apply(event);
                touched.services.extend(changed.iter().filter_map(|((ns, name), _)| key(ns, name)));
            }
        }
        touched
    }

    fn apply_slices(&mut self, event: Event<DynamicObject>, touched: &mut Touched) {
        for (place, before) in self.slices.apply(event) {
            let (namespace, _) = &place;
            let now = self.slices.rows.get(&place);
            for (index, of, services) in [
                (
                    &mut self.of_service,
                    before.as_ref().and_then(|row| row.service.as_ref()),
                    &mut touched.exports,
                ),
                (
                    &mut self.of_import,
                    before.as_ref().and_then(|row| row.import.as_ref()),
                    &mut touched.services,
                ),
            ] {
                let Some(of) = of else { continue };
                services.extend(key(namespace, of));
                let owner = (namespace.clone(), of.clone());
                if let Some(slices) = index.get_mut(&owner) {
                    slices.remove(&place);
                    if slices.is_empty() {
                        index.remove(&owner);
                    }
                }
            }
            for (index, of, services) in [
                (&mut self.of_service, now.and_then(|row| row.service.as_ref()), &mut touched.exports),
                (&mut self.of_import, now.and_then(|row| row.import.as_ref()), &mut touched.services),
            ] {
                let Some(of) = of else { continue };
                services.extend(key(namespace, of));
                index.entry((namespace.clone(), of.clone())).or_default().insert(place.clone());
            }
        }
    }

    /// Whether every table was received whole once: before, what is missing may only be late.
    pub fn is_synced(&self) -> bool {
        self.namespaces.synced
            && self.services.synced
            && self.slices.synced
            && self.exports.synced
            && self.imports.synced
    }

    /// Whether objects can be made in a namespace.
    pub fn has_namespace(&self, name: &str) -> bool {
        let row = self.namespaces.rows.get(&(String::new(), name.to_owned()));
        row.is_some_and(|row| !row.meta.deleting)
    }

    /// Every service that something is held of which is written here, or that is exported.
    pub fn known(&self) -> BTreeSet<ServiceKey> {
        let imports = self.imports.rows.iter().filter(|(_, row)| row.meta.ours).map(|(place, _)| place);
        let places = self.exports.rows.keys().chain(imports).chain(self.of_import.keys());
        let derived = self.services.rows.iter().filter_map(|((ns, _), row)| key(ns, row.import.as_deref()?));
        places.filter_map(|(namespace, name)| key(namespace, name)).chain(derived).collect()
    }

    /// Exports there are.
    pub fn exported(&self) -> impl Iterator<Item = ServiceKey> {
        self.exports.rows.keys().filter_map(|(namespace, name)| key(namespace, name))
    }

    pub fn export_row(&self, service: &ServiceKey) -> Option<&ExportRow> {
        self.exports.rows.get(&place_of(service))
    }

    pub fn import_row(&self, service: &ServiceKey) -> Option<&ImportRow> {
        self.imports.rows.get(&place_of(service))
    }

    /// What has the name of an import's derived `Service`, ours or not.
    pub fn derived_row(&self, service: &ServiceKey) -> Option<&ServiceRow> {
        self.services.rows.get(&(service.namespace.to_string(), derived_name(service)))
    }

    /// Slices that are written here for an import, by name.
    pub fn slices_of_import(&self, service: &ServiceKey) -> BTreeMap<&str, &SliceRow> {
        let slices = self.of_import.get(&place_of(service)).into_iter().flatten();
        slices.filter_map(|place| Some((place.1.as_str(), self.slices.rows.get(place)?))).collect()
    }

    /// An export with what it is about, as the core keeps it.
    pub fn export(&self, service: &ServiceKey) -> Option<KubernetesExport> {
        let row = self.export_row(service).filter(|row| !row.meta.deleting)?;
        let found = self.services.rows.get(&place_of(service)).filter(|row| !row.meta.deleting);
        let state = found.map_or(KubernetesService::Missing, |row| row.service.clone());
        let state = match (state, too_large(&row.object)) {
            (KubernetesService::Found(_), Some(why)) => KubernetesService::TooLarge(why),
            (KubernetesService::Found(of), None) if of.ports.len() > MAX_PORTS => {
                KubernetesService::TooLarge(format!(
                    "the Service has {} ports, at most {MAX_PORTS} can be exported",
                    of.ports.len()
                ))
            }
            (state, _) => state,
        };
        Some(KubernetesExport {
            object: row.object.clone(),
            uid: row.meta.uid.clone(),
            created_unix: row.created_unix,
            generation: row.generation,
            hosts: if state.found().is_some() { self.hosts(service) } else { KubernetesHosts::default() },
            pods: state.found().map(|found| self.pods(service, found)).unwrap_or_default(),
            service: state,
        })
    }

    /// Ready endpoints of a service of this cluster.
    fn hosts(&self, service: &ServiceKey) -> KubernetesHosts {
        let slices = self.of_service.get(&place_of(service)).into_iter().flatten();
        let slices: Vec<&SliceRow> = slices.filter_map(|place| self.slices.rows.get(place)).collect();
        let hosts: BTreeMap<_, _> = slices
            .iter()
            .flat_map(|slice| &slice.ready)
            .map(|endpoint| {
                let hostname = endpoint.hostname.clone().unwrap_or_else(|| dashed(&endpoint.address));
                (endpoint.address, NamedEndpoint { hostname, address: endpoint.address })
            })
            .collect();
        let mut ports: Vec<_> = slices.iter().flat_map(|slice| slice.ports.iter().cloned()).collect();
        // Pods of one service may name a port by different numbers: slices hold one each, and the first one is told.
        ports.sort_unstable();
        ports.dedup_by(|a, b| (&a.name, &a.protocol) == (&b.name, &b.protocol));
        KubernetesHosts { hosts: hosts.into_values().collect(), ports }
    }
}

/// Why peers would refuse what an export copies.
fn too_large(object: &Object) -> Option<String> {
    let Spec::ServiceExport(spec) = &object.spec else { return None };
    let fields =
        [("exportedLabels", &spec.exported_labels), ("exportedAnnotations", &spec.exported_annotations)];
    fields.into_iter().find_map(|(field, map)| {
        let bytes: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
        (map.len() > MAX_COPIED || bytes > MAX_COPIED_BYTES).then(|| {
            format!("spec.{field} has {} entries of {bytes} bytes, at most {MAX_COPIED} of {MAX_COPIED_BYTES} bytes together can be exported", map.len())
        })
    })
}

/// The host name of an endpoint that has none of its own.
pub fn dashed(address: &std::net::IpAddr) -> String {
    let text = address.to_string().replace(['.', ':'], "-");
    // A label begins and ends with a letter or digit; `::1` does not.
    format!("ip-{}", text.trim_matches('-'))
}

fn place_of(service: &ServiceKey) -> Place {
    (service.namespace.to_string(), service.name.to_string())
}

#[cfg(test)]
mod tests;
