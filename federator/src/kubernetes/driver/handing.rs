//! What the core is told of the API server's objects: one call at a time. The core waits for its disk and for what follows
//! from each change, so that what comes meanwhile goes together.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::time::Duration;

use tombolo_model::names::ServiceKey;

use super::{Driver, SessionEnd};
use crate::core::kubernetes::KubernetesChanges;
use crate::core::{CoreError, CoreGone};

pub(super) type Handing = Pin<Box<dyn Future<Output = Result<Handed, CoreGone>> + Send>>;

/// What the core was told.
pub(super) struct Handed {
    /// They were all there are.
    complete: bool,
    exports: BTreeSet<ServiceKey>,
    stored: Result<(), CoreError>,
}

impl Driver {
    /// Tells the core which exports there are, once all are known, and then what changes; `None`: nothing has.
    pub(super) fn hand_over(&mut self) -> Option<Handing> {
        if !self.tables.is_synced() {
            return None;
        }
        let complete = !self.told;
        if complete {
            // What was deleted before this session is in no event of it.
            self.addresses.extend(self.core.facts().pods.addresses.keys().cloned());
            self.exports.extend(self.tables.exported());
        } else if self.addresses.is_empty() && self.exports.is_empty() {
            return None;
        }
        let addresses = std::mem::take(&mut self.addresses).into_iter();
        let addresses: BTreeMap<_, _> =
            addresses.map(|service| (service.clone(), self.tables.addresses(&service))).collect();
        let exports = std::mem::take(&mut self.exports);
        let changes: KubernetesChanges =
            exports.iter().map(|service| (service.clone(), self.tables.export(service))).collect();
        let core = self.core.clone();
        Some(Box::pin(async move {
            let stored = core.call(move |core, moment| {
                core.set_kubernetes_addresses(addresses);
                if changes.is_empty() && !complete {
                    return Ok(());
                }
                core.set_kubernetes_exports(changes, complete, moment)
            });
            let stored = stored.await?;
            if let Err(error) = &stored {
                tracing::warn!(%error, "exports of Kubernetes can't be stored now");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Ok(Handed { complete, exports, stored })
        }))
    }

    pub(super) fn handed_over(&mut self, handed: Result<Handed, CoreGone>) -> Result<(), SessionEnd> {
        let Handed { complete, exports, stored } = handed?;
        if stored.is_err() {
            self.exports.extend(exports);
            return Ok(());
        }
        if complete {
            self.told = true;
            self.everything();
        }
        Ok(())
    }
}
