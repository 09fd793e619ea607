//! What the cluster's Kubernetes says: `ServiceExport`s with the services behind them, and ready endpoints.
//!
//! Exports are kept in the store like applied ones, so that peers still have them when the federator restarts while the
//! API server is away; endpoints are not, they are news. One that an operator applied is taken over by Kubernetes' of the
//! same name.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tombolo_model::names::ServiceKey;
use tombolo_model::resource::{Object, ObjectKey};

use super::objects::record_of;
use super::{Core, CoreError, Moment};
use crate::exports::all_exports;
use crate::facts::{KubernetesHosts, KubernetesService, StoredObject};
use crate::store::{Table, Transaction};

/// Peers take 10,000 records, revocations among them: tenants must not use that up.
const MAX_EXPORTS: usize = 5000;

/// A `ServiceExport` in Kubernetes, and what it is about.
#[derive(Clone, PartialEq, Debug)]
pub struct KubernetesExport {
    pub object: Object,
    /// Kubernetes gives it to no other object.
    pub uid: String,
    /// Unix seconds.
    pub created_unix: u64,
    pub generation: u64,
    pub service: KubernetesService,
    pub hosts: KubernetesHosts,
}

/// What has changed in Kubernetes; `None`: there is no such export any more.
pub type KubernetesChanges = BTreeMap<ServiceKey, Option<KubernetesExport>>;

fn key_of(service: &ServiceKey) -> ObjectKey {
    ObjectKey {
        kind: "ServiceExport",
        namespace: service.namespace.to_string(),
        name: service.name.to_string(),
    }
}

impl Core {
    /// Takes over what has changed. `complete`: these are all there are.
    pub fn set_kubernetes_exports(
        &mut self,
        mut changes: KubernetesChanges,
        complete: bool,
        _: Moment,
    ) -> Result<(), CoreError> {
        if complete {
            let kept = all_exports(&self.facts).filter(|export| export.stored.kubernetes.is_some());
            let gone: BTreeSet<ServiceKey> = kept.map(|export| export.service).collect();
            for service in gone {
                changes.entry(service).or_insert(None);
            }
        }
        let mut transaction = Transaction::new();
        let mut installed = Vec::new();
        let mut removed = Vec::new();
        let stored_here = self.facts.objects.values().filter(|stored| stored.kubernetes.is_some()).count();
        let mut room = MAX_EXPORTS.saturating_sub(stored_here);
        for (service, export) in &changes {
            let key = key_of(service);
            let before = self.facts.objects.get(&key);
            match export {
                None if before.is_some_and(|stored| stored.kubernetes.is_some()) => {
                    transaction = transaction.delete(Table::Objects, key.to_string());
                    removed.push(key);
                }
                None => {}
                Some(export) => {
                    let stored = stored(export);
                    if before.is_some_and(|before| **before == stored) {
                        continue;
                    }
                    if before.is_none() {
                        let Some(less) = room.checked_sub(1) else {
                            tracing::error!(%service, "{MAX_EXPORTS} exports of Kubernetes are told: this one is left out");
                            continue;
                        };
                        room = less;
                    }
                    transaction = transaction.put(key.to_string(), &record_of(&stored));
                    installed.push((key, stored));
                }
            }
        }
        if !transaction.is_empty() {
            self.store.commit(&transaction)?;
            self.dirty = true;
            self.handles_stale = true;
        }
        for key in removed {
            self.facts.objects.remove(&key);
        }
        for (key, stored) in installed {
            self.facts.objects.insert(key, Arc::new(stored));
        }
        for (service, export) in changes {
            self.set_hosts(service, export.map(|export| export.hosts).unwrap_or_default());
        }
        Ok(())
    }

    fn set_hosts(&mut self, service: ServiceKey, hosts: KubernetesHosts) {
        let before = self.facts.kubernetes_hosts.get(&service);
        if before.map_or(hosts.hosts.is_empty(), |before| **before == hosts) {
            return;
        }
        self.dirty = true;
        if hosts.hosts.is_empty() {
            self.facts.kubernetes_hosts.remove(&service);
        } else {
            self.facts.kubernetes_hosts.insert(service, Arc::new(hosts));
        }
    }
}

fn stored(export: &KubernetesExport) -> StoredObject {
    StoredObject {
        object: export.object.clone(),
        uid: export.uid.clone(),
        created_unix: export.created_unix,
        generation: export.generation,
        kubernetes: Some(export.service.clone()),
        in_kubernetes: false,
    }
}
