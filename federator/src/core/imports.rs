//! What peers export to us: applied as it comes, aged with the clock, saved at leisure.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tombolo_model::ids::{Epoch, Revision};
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::sync::{Freshness, PeerView, Quota, SyncError, Update};
use tombolo_proto::v1;

use super::{Core, CoreError, Moment};
use crate::facts::{Import, ImportRecord};
use crate::import;
use crate::rotation;
use crate::store::{Table, Transaction};

/// One peer's records, encoded: they are read when they come, and kept for what is to be read again later and for the store.
pub type View = PeerView<Box<[u8]>>;

/// A record as a [`View`] keeps it.
pub fn kept(record: &v1::Record) -> Box<[u8]> {
    record.encode_to_vec().into_boxed_slice()
}

/// A record that a [`View`] has kept. `None`: it does not read, which what [`kept`] has made always does.
pub fn read(kept: &[u8]) -> Option<v1::Record> {
    v1::Record::decode(kept).ok()
}

/// What one peer may fill: 10,000 exports of a kilobyte are 10 MB.
pub const QUOTA: Quota = Quota { records: 10_000 };
/// An export with 64 identities and 100 ports has 20 KB.
const MAX_RECORD_BYTES: usize = 64 * 1024;
/// How much of [`IMPORT_LEASE`] a restart may cost a peer of which nothing changes.
const HEARD_SAVED_EVERY: Duration = Duration::from_secs(3600);
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
    pub fn import_position(&self, peer: &ClusterName) -> (Epoch, Revision) {
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
        let whole = matches!(update, Update::Snapshot { .. });
        let (update, sent, deleted) = within_size(update);
        view.apply(epoch, update, moment.unix).map_err(|error: SyncError| {
            CoreError::Invalid(format!("{peer} sent an update that does not fit: {error}"))
        })?;
        // First of all: the roots that it brings are those that the other records are judged by.
        let offered = sent.iter().find(|(key, _)| Self::is_trust(key) && view.get(key).is_some());
        let offered = offered.and_then(|(_, sent)| Self::trust_in(sent.record.as_ref()));
        let refused = offered.and_then(|bytes| self.offered_trust(peer, &bytes, moment));
        let scope = import::PeerScope::of(&self.facts, peer, moment.unix);
        let view = self.views.entry(peer.clone()).or_insert_with(|| View::new(QUOTA));
        let import = Arc::make_mut(self.facts.imports.entry(peer.clone()).or_default());
        let told: Vec<ServiceKey> = sent.keys().chain(&deleted).filter_map(|key| exported(key)).collect();
        let before = types(import, &told);
        if whole {
            // Absence is removal; what is there but bad leaves the good one that was there before.
            import.rejected.clear();
            import.exports.retain(|service| sent.contains_key(&import::export_key(service)));
            if !sent.contains_key(import::PROPERTIES) {
                import.properties.clear();
            }
            if !sent.contains_key(crate::jwt::AUTHORITIES) {
                import.jwt_authorities.clear();
            }
        }
        deleted.iter().filter(|key| view.get(key).is_none()).for_each(|key| import::remove(import, key));
        for (key, Sent { bytes, record }) in sent {
            match (record, view.get(&key)) {
                (None, _) => {
                    import::refuse(import, &key, format!("{bytes} bytes, at most {MAX_RECORD_BYTES}"));
                }
                (Some(record), Some(_)) => import::put(import, &scope, &record),
                (Some(_), None) => {
                    import::refuse(
                        import,
                        &key,
                        format!("{peer} may have at most {} records", QUOTA.records),
                    );
                }
            }
        }
        self.addresses_stale |= whole || before != types(import, &told);
        if let Some(reason) = refused {
            import::refuse(import, rotation::TRUST, reason);
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
        let saved = self.saved_heard.get(peer).copied().unwrap_or_default();
        if moment.unix.saturating_sub(saved) >= HEARD_SAVED_EVERY {
            self.unsaved_imports.insert(peer.clone());
        }
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
            if epoch == Epoch(0) {
                // Watched anew and nothing has come yet: what is on the disk is better.
                continue;
            }
            let record = ImportRecord {
                epoch,
                revision,
                heard_unix: import.heard.map_or(0, |heard| heard.as_secs()),
                records: import::to_saved(view.records().map(|(_, record)| &**record)),
            };
            transaction = transaction.put(peer.as_str(), &record);
        }
        match self.store.commit(&transaction) {
            Ok(()) => {
                for peer in std::mem::take(&mut self.unsaved_imports) {
                    let heard = self.facts.imports.get(&peer).and_then(|import| import.heard);
                    self.saved_heard.insert(peer, heard.unwrap_or_default());
                }
            }
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
        self.saved_heard.remove(peer);
        self.dirty = true;
        self.facts.imports.remove(peer)
    }
}

/// The service that an export's record is about.
fn exported(key: &str) -> Option<ServiceKey> {
    key.strip_prefix("export/")?.parse().ok()
}

/// Which of these services the peer exports, and as headless: what decides about virtual addresses.
fn types(import: &Import, services: &[ServiceKey]) -> Vec<Option<bool>> {
    services.iter().map(|service| Some(import.exports.get(service)?.headless)).collect()
}

/// A record of an update.
struct Sent {
    bytes: usize,
    /// `None`: it is too large.
    record: Option<v1::Record>,
}

/// An update without the records that are too large, as a [`View`] keeps it, every record that was sent, and the keys that
/// are gone.
fn within_size(update: Update<v1::Record>) -> (Update<Box<[u8]>>, BTreeMap<String, Sent>, Vec<String>) {
    let mut sent = BTreeMap::new();
    let mut small = |records: Vec<(String, v1::Record)>| -> Vec<(String, Box<[u8]>)> {
        let fits = |(key, record): (String, v1::Record)| {
            let bytes = record.encoded_len();
            if bytes > MAX_RECORD_BYTES {
                sent.insert(key, Sent { bytes, record: None });
                return None;
            }
            let kept = kept(&record);
            sent.insert(key.clone(), Sent { bytes, record: Some(record) });
            Some((key, kept))
        };
        records.into_iter().filter_map(fits).collect()
    };
    match update {
        Update::Snapshot { epoch, revision, records } => {
            let update = Update::Snapshot { epoch, revision, records: small(records) };
            (update, sent, Vec::new())
        }
        Update::Delta { revision, upserts, deletes } => {
            let update = Update::Delta { revision, upserts: small(upserts), deletes: deletes.clone() };
            (update, sent, deletes)
        }
    }
}
