//! Records of one writer, synced to many readers by `(epoch, revision)` (pure).
//!
//! The writer keeps a [`RecordLog`]; each reader a [`PeerView`]. A reader resumes where it was, or gets a snapshot when
//! the deltas are gone or the epoch is another. Quotas refuse records one by one; good ones stay. What a reader holds
//! is fresh, stale (the writer is silent, its lease holds) or expired.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::ids::{Epoch, Revision};

/// Deltas kept for readers that were away: at 300 changes/s a minute and a half; beyond, a snapshot is sent.
const HISTORY: usize = 32_768;

/// The writer's side.
#[derive(Debug)]
pub struct RecordLog<V> {
    epoch: Epoch,
    revision: Revision,
    records: BTreeMap<String, (Revision, V)>,
    /// Keys changed per revision, oldest first; contiguous up to `revision`.
    history: VecDeque<(Revision, String)>,
}

/// What brings a reader up to date.
#[derive(Clone, Debug, PartialEq)]
pub enum Update<V> {
    Snapshot { epoch: Epoch, revision: Revision, records: Vec<(String, V)> },
    Delta { revision: Revision, upserts: Vec<(String, V)>, deletes: Vec<String> },
}

impl<V: Clone + PartialEq> RecordLog<V> {
    pub fn new(epoch: Epoch, revision: Revision) -> Self {
        Self { epoch, revision, records: BTreeMap::new(), history: VecDeque::new() }
    }
    pub fn position(&self) -> (Epoch, Revision) {
        (self.epoch, self.revision)
    }
    pub fn len(&self) -> usize {
        self.records.len()
    }
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    fn log(&mut self, key: String) {
        self.revision = Revision(self.revision.0 + 1);
        self.history.push_back((self.revision, key));
        if self.history.len() > HISTORY {
            self.history.pop_front();
        }
    }

    /// Makes the records exactly `wanted`; returns whether anything changed. Unchanged records cost no revision.
    pub fn replace(&mut self, wanted: BTreeMap<String, V>) -> bool {
        let before = self.revision;
        let gone: Vec<String> = self.records.keys().filter(|k| !wanted.contains_key(*k)).cloned().collect();
        for key in gone {
            self.records.remove(&key);
            self.log(key);
        }
        for (key, value) in wanted {
            if self.records.get(&key).is_none_or(|(_, old)| *old != value) {
                self.log(key.clone());
                self.records.insert(key, (self.revision, value));
            }
        }
        self.revision != before
    }

    /// What a reader at `(epoch, revision)` lacks; `None` when nothing.
    pub fn since(&self, epoch: Epoch, revision: Revision) -> Option<Update<V>> {
        if epoch == self.epoch && revision == self.revision {
            return None;
        }
        let covered = self.history.front().is_some_and(|(oldest, _)| oldest.0 <= revision.0 + 1);
        if epoch != self.epoch || revision > self.revision || !covered {
            let records = self.records.iter().map(|(k, (_, v))| (k.clone(), v.clone())).collect();
            return Some(Update::Snapshot { epoch: self.epoch, revision: self.revision, records });
        }
        let skip = usize::try_from(revision.0 + 1 - self.history.front().map_or(0, |(r, _)| r.0))
            .unwrap_or(usize::MAX);
        let keys: BTreeSet<&String> = self.history.iter().skip(skip).map(|(_, key)| key).collect();
        let (mut upserts, mut deletes) = (Vec::new(), Vec::new());
        for key in keys {
            match self.records.get(key) {
                Some((_, value)) => upserts.push((key.clone(), value.clone())),
                None => deletes.push(key.clone()),
            }
        }
        Some(Update::Delta { revision: self.revision, upserts, deletes })
    }
}

/// What a peer may fill.
#[derive(Clone, Copy, Debug)]
pub struct Quota {
    pub records: usize,
}

/// How old a reader's copy is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Freshness {
    Fresh,
    /// Silent, but its lease holds: keep serving, marked.
    Stale,
    /// Silent for longer than the lease.
    Expired,
}

/// The reader's side of one writer.
#[derive(Clone, Debug)]
pub struct PeerView<V> {
    epoch: Epoch,
    revision: Revision,
    records: BTreeMap<String, V>,
    heard: Option<Duration>,
    quota: Quota,
    pub rejected: u64,
}

/// Why an update was not applied: watch anew from nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SyncError {
    #[error("revision went back from {0:?} to {1:?}")]
    WentBack(Revision, Revision),
    #[error("a delta of another epoch")]
    OtherEpoch,
}

impl<V: Clone> PeerView<V> {
    pub fn new(quota: Quota) -> Self {
        Self {
            epoch: Epoch(0),
            revision: Revision(0),
            records: BTreeMap::new(),
            heard: None,
            quota,
            rejected: 0,
        }
    }
    /// Where to resume.
    pub fn position(&self) -> (Epoch, Revision) {
        (self.epoch, self.revision)
    }
    pub fn records(&self) -> impl Iterator<Item = (&String, &V)> {
        self.records.iter()
    }
    pub fn get(&self, key: &str) -> Option<&V> {
        self.records.get(key)
    }
    /// The last state on disk.
    pub fn restore(&mut self, epoch: Epoch, revision: Revision, records: BTreeMap<String, V>) {
        (self.epoch, self.revision, self.records) = (epoch, revision, records);
    }

    fn insert(&mut self, key: String, value: V) {
        if self.records.len() >= self.quota.records && !self.records.contains_key(&key) {
            self.rejected += 1;
        } else {
            self.records.insert(key, value);
        }
    }

    /// Applies an update that came on the stream of `epoch`.
    pub fn apply(&mut self, epoch: Epoch, update: Update<V>, now: Duration) -> Result<(), SyncError> {
        match update {
            Update::Snapshot { epoch, revision, records } => {
                if epoch == self.epoch && revision < self.revision {
                    return Err(SyncError::WentBack(self.revision, revision));
                }
                (self.epoch, self.revision) = (epoch, revision);
                self.records.clear();
                records.into_iter().for_each(|(key, value)| self.insert(key, value));
            }
            Update::Delta { revision, upserts, deletes } => {
                if epoch != self.epoch {
                    return Err(SyncError::OtherEpoch);
                }
                if revision < self.revision {
                    return Err(SyncError::WentBack(self.revision, revision));
                }
                self.revision = revision;
                deletes.iter().for_each(|key| drop(self.records.remove(key)));
                upserts.into_iter().for_each(|(key, value)| self.insert(key, value));
            }
        }
        self.heard = Some(now);
        Ok(())
    }
    pub fn heartbeat(&mut self, now: Duration) {
        self.heard = Some(now);
    }
    pub fn age(&self, now: Duration) -> Option<Duration> {
        self.heard.map(|heard| now.saturating_sub(heard))
    }
    /// Heartbeats come every second: stale after three, expired after `lease`.
    pub fn freshness(&self, now: Duration, stale_after: Duration, lease: Duration) -> Freshness {
        match self.age(now) {
            Some(age) if age <= stale_after => Freshness::Fresh,
            Some(age) if age <= lease => Freshness::Stale,
            _ => Freshness::Expired,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn map(items: &[(u8, u8)]) -> BTreeMap<String, u8> {
        items.iter().map(|(k, v)| (k.to_string(), *v)).collect()
    }

    proptest! {
        /// Any interleaving of changes, missed updates, writer restarts and reader restarts converges.
        #[test]
        fn a_reader_converges_to_the_writers_records(
            steps in proptest::collection::vec((proptest::collection::vec((0u8..12, any::<u8>()), 0..6), 0u8..10), 1..40)
        ) {
            let mut log = RecordLog::new(Epoch(1), Revision(0));
            let mut view = PeerView::new(Quota { records: 100 });
            let now = Duration::from_secs(1);
            for (index, (records, event)) in steps.iter().enumerate() {
                log.replace(map(records));
                match event {
                    0 => { log = RecordLog::new(Epoch(index as u64 + 2), Revision(0)); log.replace(map(records)); }
                    1 => view = PeerView::new(Quota { records: 100 }),
                    2..=4 => continue, // missed
                    _ => {}
                }
                let (epoch, revision) = view.position();
                if let Some(update) = log.since(epoch, revision) {
                    view.apply(epoch, update, now).unwrap();
                }
                let have: BTreeMap<_, _> = view.records().map(|(k, v)| (k.clone(), *v)).collect();
                prop_assert_eq!(have, map(records));
                prop_assert_eq!(view.position(), log.position());
            }
        }
    }

    #[test]
    fn an_unchanged_set_costs_no_revision_and_a_change_one_record() {
        let mut log = RecordLog::new(Epoch(1), Revision(0));
        assert!(log.replace(map(&[(1, 1), (2, 2)])));
        let (epoch, revision) = log.position();
        assert!(!log.replace(map(&[(1, 1), (2, 2)])));
        assert_eq!(log.since(epoch, revision), None);
        log.replace(map(&[(1, 9), (2, 2)]));
        let Some(Update::Delta { upserts, deletes, .. }) = log.since(epoch, revision) else {
            panic!("a delta")
        };
        assert_eq!((upserts, deletes), (vec![("1".to_owned(), 9)], vec![]));
    }

    #[test]
    fn a_writer_cannot_go_back_nor_fill_a_reader() {
        let mut view = PeerView::new(Quota { records: 2 });
        let snapshot = |revision, n: u8| Update::Snapshot {
            epoch: Epoch(1),
            revision: Revision(revision),
            records: (0..n).map(|k| (k.to_string(), k)).collect(),
        };
        view.apply(Epoch(0), snapshot(9, 5), Duration::ZERO).unwrap();
        assert_eq!((view.records().count(), view.rejected), (2, 3));
        assert!(matches!(view.apply(Epoch(1), snapshot(8, 1), Duration::ZERO), Err(SyncError::WentBack(..))));
        assert_eq!(view.records().count(), 2, "a refused update loses nothing");
    }

    #[test]
    fn silence_makes_stale_then_expired() {
        let mut view = PeerView::<u8>::new(Quota { records: 2 });
        let (stale, lease) = (Duration::from_secs(3), Duration::from_secs(60));
        assert_eq!(view.freshness(Duration::ZERO, stale, lease), Freshness::Expired);
        view.heartbeat(Duration::from_secs(10));
        assert_eq!(view.freshness(Duration::from_secs(13), stale, lease), Freshness::Fresh);
        assert_eq!(view.freshness(Duration::from_secs(14), stale, lease), Freshness::Stale);
        assert_eq!(view.freshness(Duration::from_secs(71), stale, lease), Freshness::Expired);
    }
}
