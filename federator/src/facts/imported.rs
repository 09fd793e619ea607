//! The services of one peer: shared, so that taking one change over copies pointers and no records.

use std::collections::{BTreeMap, btree_map};
use std::sync::Arc;

use tombolo_model::names::ServiceKey;

use super::ImportedExport;

/// By service. A clone shares every record.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct ImportedExports(BTreeMap<ServiceKey, Arc<ImportedExport>>);

impl ImportedExports {
    pub fn get(&self, service: &ServiceKey) -> Option<&ImportedExport> {
        self.0.get(service).map(Arc::as_ref)
    }

    pub fn get_mut(&mut self, service: &ServiceKey) -> Option<&mut ImportedExport> {
        self.0.get_mut(service).map(Arc::make_mut)
    }

    /// One that says what is known already stays the one that is shared.
    pub fn insert(&mut self, service: ServiceKey, export: impl Into<Arc<ImportedExport>>) {
        let export = export.into();
        if self.0.get(&service) != Some(&export) {
            self.0.insert(service, export);
        }
    }

    pub fn remove(&mut self, service: &ServiceKey) {
        self.0.remove(service);
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    pub fn retain(&mut self, keep: impl Fn(&ServiceKey) -> bool) {
        self.0.retain(|service, _| keep(service));
    }

    pub fn keys(&self) -> btree_map::Keys<'_, ServiceKey, Arc<ImportedExport>> {
        self.0.keys()
    }

    pub fn values(&self) -> impl Iterator<Item = &ImportedExport> {
        self.0.values().map(Arc::as_ref)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&ServiceKey, &ImportedExport)> {
        self.0.iter().map(|(service, export)| (service, export.as_ref()))
    }

    /// As they are shared.
    pub fn shared(&self) -> &BTreeMap<ServiceKey, Arc<ImportedExport>> {
        &self.0
    }

    pub fn contains_key(&self, service: &ServiceKey) -> bool {
        self.0.contains_key(service)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::{exported, port};

    #[test]
    fn a_copy_shares_every_record_but_those_that_change() {
        let [web, db]: [ServiceKey; 2] = ["shop/web".parse().unwrap(), "shop/db".parse().unwrap()];
        let mut exports = ImportedExports::default();
        exports.insert(web.clone(), exported(1, 1, &[port("http", 80)]));
        exports.insert(db.clone(), exported(1, 1, &[port("", 5432)]));
        let before = exports.clone();
        // Told again as it was.
        exports.insert(web.clone(), exported(1, 1, &[port("http", 80)]));
        exports.insert(db.clone(), exported(0, 1, &[port("", 5432)]));
        let same = |service| Arc::ptr_eq(&before.shared()[service], &exports.shared()[service]);
        assert!(same(&web) && !same(&db));
        assert_eq!((before.get(&db).unwrap().healthy, exports.get(&db).unwrap().healthy), (1, 0));
    }
}
