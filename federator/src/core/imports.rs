//! What peers export to us: applied as it comes, aged with the clock, saved at leisure.

use std::sync::Arc;
use std::time::Duration;

use tombolo_model::ids::Epoch;
use tombolo_model::names::ClusterName;
use tombolo_model::sync::{Freshness, PeerView, Quota, SyncError, Update};
use tombolo_proto::v1;

use super::{Core, CoreError, Moment};
use crate::facts::{Import, ImportRecord};
use crate::import;
use crate::store::{Table, Transaction};

/// One peer's records.
pub type View = PeerView<v1::Record>;

/// What one peer may fill: 10,000 exports of a kilobyte are 10 MB.
pub const QUOTA: Quota = Quota { records: 10_000 };
/// Heartbeats come every second.
const STALE_AFTER: Duration = Duration::from_secs(3);
/// As long as the keys that were handed out reach (protocol.md section 1): beyond, nobody could dial anyway.
pub const IMPORT_LEASE: Duration = Duration::from_secs(24 * 3600);

/// How old a copy is that was last confirmed at `heard`, both since the Unix epoch.
fn freshness(heard: Option<Duration>, unix: Duration) -> Freshness {
    match heard.map(|heard| unix.saturating_sub(heard)) {
        Some(age) if age <= STALE_AFTER => Freshness::Fresh,
        Some(age) if age <= IMPORT_LEASE => Freshness::Stale,
        _ => Freshness::Expired,
    }
}

impl Core {
    /// Where to resume watching a peer.
    pub fn import_position(&self, peer: &ClusterName) -> (Epoch, tombolo_model::ids::Revision) {
        self.views.get(peer).map_or((Epoch(0), Default::default()), View::position)
    }

    /// Takes an update of a peer's records over. On an error the copy is as before: watch anew from nothing.
    pub fn apply_update(
        &mut self,
        peer: &ClusterName,
        epoch: Epoch,
        update: Update<v1::Record>,
        moment: Moment,
    ) -> Result<(), CoreError> {
        if !self.facts.links.contains_key(peer) {
            return Err(CoreError::Precondition(format!("{peer} is not linked")));
        }
        let view = self.views.entry(peer.clone()).or_insert_with(|| View::new(QUOTA));
        let touched: Option<Vec<String>> = match &update {
            Update::Snapshot { .. } => None,
            Update::Delta { upserts, deletes, .. } => {
                Some(upserts.iter().map(|(key, _)| key).chain(deletes).cloned().collect())
            }
        };
        view.apply(epoch, update, moment.unix).map_err(|error: SyncError| {
            CoreError::Invalid(format!("{peer} sent an update that does not fit: {error}"))
        })?;
        let scope = import::PeerScope::of(&self.facts, peer);
        let import = Arc::make_mut(self.facts.imports.entry(peer.clone()).or_default());
        match touched {
            None => {
                import.exports.clear();
                import.rejected.clear();
                // An empty list of gateways is not believed: the last known ones stay.
                import.properties.clear();
                view.records().for_each(|(_, record)| import::put(import, &scope, record));
            }
            Some(keys) => {
                for key in keys {
                    match view.get(&key) {
                        Some(record) => import::put(import, &scope, record),
                        None => import::remove(import, &key),
                    }
                }
            }
        }
        import.position = view.position();
        self.unsaved_imports.insert(peer.clone());
        self.dirty = true;
        self.heard_peer(peer, moment);
        Ok(())
    }

    /// Forgets a peer's position, so that it is watched from nothing; what is known keeps serving.
    pub fn restart_watch(&mut self, peer: &ClusterName) {
        self.views.insert(peer.clone(), View::new(QUOTA));
    }

    /// A sign of life of a peer's federator.
    pub fn heard_peer(&mut self, peer: &ClusterName, moment: Moment) {
        let Some(import) = self.facts.imports.get_mut(peer) else { return };
        let before = (import.connected, import.freshness);
        let import = Arc::make_mut(import);
        import.heard = Some(moment.unix);
        import.freshness = Freshness::Fresh;
        import.connected = true;
        import.last_error.clear();
        self.dirty |= before != (true, Freshness::Fresh);
    }

    /// The control connection to a peer is lost, or could not be made.
    pub fn lost_peer(&mut self, peer: &ClusterName, reason: String) {
        let Some(import) = self.facts.imports.get_mut(peer) else { return };
        if !import.connected && import.last_error == reason {
            return;
        }
        let import = Arc::make_mut(import);
        import.connected = false;
        import.last_error = reason;
        self.dirty = true;
    }

    /// Ages every import; what changes is published.
    pub(super) fn refresh_imports(&mut self, moment: Moment) {
        for import in self.facts.imports.values_mut() {
            let now = freshness(import.heard, moment.unix);
            if now != import.freshness {
                Arc::make_mut(import).freshness = now;
                self.dirty = true;
            }
        }
    }

    /// Writes the last state of the peers' records, once a second: a restart continues from it.
    pub(super) fn save_imports(&mut self) {
        let mut transaction = Transaction::new();
        for peer in &self.unsaved_imports {
            let (Some(view), Some(import)) = (self.views.get(peer), self.facts.imports.get(peer)) else {
                continue;
            };
            let (epoch, revision) = view.position();
            let record = ImportRecord {
                epoch,
                revision,
                heard_unix: import.heard.map_or(0, |heard| heard.as_secs()),
                records: import::to_saved(view.records().map(|(_, record)| record)),
            };
            transaction = transaction.put(peer.as_str(), &record);
        }
        match self.store.commit(&transaction) {
            Ok(()) => self.unsaved_imports.clear(),
            Err(error) => {
                tracing::warn!(%error, "the peers' records can't be saved; tried again in a second")
            }
        }
    }

    /// Removes everything that came from a peer, within `transaction`.
    pub(super) fn without_import(transaction: Transaction, peer: &ClusterName) -> Transaction {
        transaction.delete(Table::Imports, peer.as_str())
    }

    /// After the removal has been committed.
    pub(super) fn drop_import(&mut self, peer: &ClusterName) -> Option<Arc<Import>> {
        self.views.remove(peer);
        self.unsaved_imports.remove(peer);
        self.dirty = true;
        self.facts.imports.remove(peer)
    }
}
