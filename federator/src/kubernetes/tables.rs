//! What the API server holds, as far as it is of use here: one table per kind, filled by watches, and which services are
//! to be looked at again (pure).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use kube::core::DynamicObject;
use kube::runtime::watcher::Event;
use tombolo_kubernetes::table::{Place, Table};
use tombolo_model::names::ServiceKey;
use tombolo_model::resource::{Object, Spec};

use super::labels::derived_name;
use super::rows::{ExportRow, ImportRow, NamespaceRow, ServiceRow, SliceRow, key};
use super::targets::{ServicePort, Targets};
use crate::core::kubernetes::KubernetesExport;
use crate::facts::{KubernetesHosts, KubernetesService, NamedEndpoint};
use crate::import::{MAX_COPIED, MAX_COPIED_BYTES, MAX_PORTS};

mod pods;

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

/// Services to look at again.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Touched {
    /// What is exported of them may have changed.
    pub exports: BTreeSet<ServiceKey>,
    /// What is written for them may have changed.
    pub services: BTreeSet<ServiceKey>,
    /// A namespace has come or gone: look at all of its services.
    pub namespaces: BTreeSet<String>,
    /// Shared sidecars have come or gone: look at every service.
    pub fronts: bool,
}

/// What a slice is of, if it is of that.
type Which = fn(&SliceRow) -> &Option<String>;

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
    of_front: BTreeMap<Place, BTreeSet<Place>>,
    /// The `Service` of the shared sidecars.
    shared: Option<Place>,
    targets: Targets,
}

impl Tables {
    /// `shared`: the `Service` of the shared sidecars, if derived `Service`s are to lead there.
    pub fn new(shared: Option<Place>) -> Self {
        Self { shared, ..Self::default() }
    }

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
                    let now = self.services.get(&place);
                    if let Some((import, row)) = now.and_then(|row| Some((row.import.as_deref()?, row)))
                        && let Some(service) = key(&namespace, import).filter(|key| derived_name(key) == name)
                    {
                        let lost = self.targets.found(&service, row.created_unix, row.targets());
                        touched.services.extend(lost);
                    }
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
            let now = self.slices.get(&place);
            let of = |row: Option<&SliceRow>, which: Which| {
                row.and_then(|row| which(row).clone()).map(|name| (namespace.clone(), name))
            };
            let kinds: [(_, Which, bool); 3] = [
                (&mut self.of_service, |row| &row.service, true),
                (&mut self.of_import, |row| &row.import, false),
                (&mut self.of_front, |row| &row.front, false),
            ];
            for (index, which, local) in kinds {
                let services = if local { &mut touched.exports } else { &mut touched.services };
                if let Some(owner) = of(before.as_ref(), which) {
                    services.extend(key(namespace, &owner.1));
                    touched.fronts |= self.shared.as_ref() == Some(&owner);
                    if let Some(slices) = index.get_mut(&owner) {
                        slices.remove(&place);
                        if slices.is_empty() {
                            index.remove(&owner);
                        }
                    }
                }
                if let Some(owner) = of(now, which) {
                    services.extend(key(namespace, &owner.1));
                    touched.fronts |= self.shared.as_ref() == Some(&owner);
                    index.entry(owner).or_default().insert(place.clone());
                }
            }
        }
    }

    /// Addresses of the shared sidecars that are ready; `None`: derived `Service`s lead nowhere here.
    pub fn shared_addresses(&self) -> Option<BTreeSet<IpAddr>> {
        let slices = self.of_service.get(self.shared.as_ref()?).into_iter().flatten();
        let rows = slices.filter_map(|place| self.slices.get(place));
        Some(rows.flat_map(|row| row.ready.iter().map(|endpoint| endpoint.address)).collect())
    }

    /// The numbers of a service's ports at the shared sidecars ([`Targets::allot`]); none where there are none, or when it
    /// has no address.
    pub fn allot(
        &mut self,
        service: &ServiceKey,
        ports: &[ServicePort],
        moment: (Duration, u64),
    ) -> BTreeMap<ServicePort, u16> {
        if self.shared.is_none() {
            return BTreeMap::new();
        }
        let (now, unix) = moment;
        let derived = self.derived_row(service).map(|row| row.created_unix);
        if ports.is_empty() {
            // Its numbers are taken as long as its `Service` is there.
            if derived.is_none() {
                self.targets.release(service, now);
            }
            return BTreeMap::new();
        }
        self.targets.allot(service, derived.unwrap_or(unix), ports, now)
    }

    /// Numbers as the derived `Service`s have them, and no others: nothing is released while somebody else writes.
    pub fn recount_targets(&mut self) {
        self.targets = Targets::default();
        for ((namespace, name), row) in self.services.iter() {
            let service = row.import.as_deref().and_then(|import| key(namespace, import));
            if let Some(service) = service.filter(|key| derived_name(key) == *name) {
                self.targets.found(&service, row.created_unix, row.targets());
            }
        }
    }

    /// Whether every table was received whole once: before, what is missing may only be late.
    pub fn is_synced(&self) -> bool {
        self.namespaces.is_synced()
            && self.services.is_synced()
            && self.slices.is_synced()
            && self.exports.is_synced()
            && self.imports.is_synced()
    }

    /// Whether objects can be made in a namespace.
    pub fn has_namespace(&self, name: &str) -> bool {
        let row = self.namespaces.get(&(String::new(), name.to_owned()));
        row.is_some_and(|row| !row.meta.deleting)
    }

    /// Every service that something is held of which is written here, or that is exported.
    pub fn known(&self) -> BTreeSet<ServiceKey> {
        let imports = self.imports.iter().filter(|(_, row)| row.meta.ours).map(|(place, _)| place);
        let slices = self.of_import.keys().chain(self.of_front.keys());
        let places = self.exports.places().chain(imports).chain(slices);
        let derived = self.services.iter().filter_map(|((ns, _), row)| key(ns, row.import.as_deref()?));
        places.filter_map(|(namespace, name)| key(namespace, name)).chain(derived).collect()
    }

    /// Exports there are.
    pub fn exported(&self) -> impl Iterator<Item = ServiceKey> {
        self.exports.places().filter_map(|(namespace, name)| key(namespace, name))
    }

    pub fn export_row(&self, service: &ServiceKey) -> Option<&ExportRow> {
        self.exports.get(&place_of(service))
    }

    pub fn import_row(&self, service: &ServiceKey) -> Option<&ImportRow> {
        self.imports.get(&place_of(service))
    }

    /// What has the name of an import's derived `Service`, ours or not.
    pub fn derived_row(&self, service: &ServiceKey) -> Option<&ServiceRow> {
        self.services.get(&(service.namespace.to_string(), derived_name(service)))
    }

    /// Slices that are written here for an import, by name.
    pub fn slices_of_import(&self, service: &ServiceKey) -> BTreeMap<&str, &SliceRow> {
        let slices = self.of_import.get(&place_of(service)).into_iter().flatten();
        slices.filter_map(|place| Some((place.1.as_str(), self.slices.get(place)?))).collect()
    }

    /// Slices that lead from an import's derived `Service` to the shared sidecars, by name.
    pub fn fronts_of_import(&self, service: &ServiceKey) -> BTreeMap<&str, &SliceRow> {
        let slices = self.of_front.get(&place_of(service)).into_iter().flatten();
        slices.filter_map(|place| Some((place.1.as_str(), self.slices.get(place)?))).collect()
    }

    /// An export with what it is about, as the core keeps it.
    pub fn export(&self, service: &ServiceKey) -> Option<KubernetesExport> {
        let row = self.export_row(service).filter(|row| !row.meta.deleting)?;
        let found = self.services.get(&place_of(service)).filter(|row| !row.meta.deleting);
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
        let slices: Vec<&SliceRow> = slices.filter_map(|place| self.slices.get(place)).collect();
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
