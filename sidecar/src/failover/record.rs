//! Shifts that no federator has acknowledged yet, and the tier of each upstream: on disk, bounded.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tombolo_identity::files;
use tombolo_model::failover::Shift;
use tombolo_model::names::ServiceKey;
use tombolo_proto::v1;

const FILE: &str = "failover.json";
const MAX_BYTES: u64 = 1024 * 1024;
/// Shifts kept for a federator that is away: hours of flapping at the policies' hold-down.
const MAX_SHIFTS: usize = 256;

/// One shift with its place in the report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    pub sequence: u64,
    pub service: ServiceKey,
    pub shift: Shift,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    next_sequence: u64,
    shifts: VecDeque<Record>,
    tiers: BTreeMap<ServiceKey, (usize, String)>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    stored: Mutex<Stored>,
}

/// Written by the router, read and acknowledged by the reporter; clones share it.
#[derive(Clone, Debug)]
pub struct ShiftLog {
    inner: Arc<Inner>,
    /// Another router of the process writes: each decides alike.
    reads_only: bool,
}

impl ShiftLog {
    /// The log of a state directory. A file that can't be read is left behind with a warning: it holds history, and
    /// losing it shifts nothing.
    pub fn open(dir: &Path) -> Self {
        let path = dir.join(FILE);
        let read = || -> Result<Stored, String> {
            let text = files::read(&path, MAX_BYTES).map_err(|e| e.to_string())?;
            serde_json::from_slice(&text).map_err(|e| e.to_string())
        };
        let stored = if path.exists() { read() } else { Ok(Stored::default()) };
        let stored = stored.unwrap_or_else(|reason| {
            tracing::warn!(path = %path.display(), reason, "the failover history can't be read; it starts anew");
            Stored::default()
        });
        Self { inner: Arc::new(Inner { path, stored: Mutex::new(stored) }), reads_only: false }
    }

    /// The same for a further thread's router, which decides alike and records nothing.
    pub fn reader(&self) -> Self {
        Self { inner: Arc::clone(&self.inner), reads_only: true }
    }

    /// Whether this router is the one that speaks for the process.
    pub fn speaks(&self) -> bool {
        !self.reads_only
    }

    pub fn last_tier(&self, service: &ServiceKey) -> Option<(usize, String)> {
        self.lock().tiers.get(service).cloned()
    }

    /// Remembers the tier for the next start; written when it changed.
    pub fn keep_tier(&self, service: &ServiceKey, tier: usize, reason: &str) {
        let mut stored = self.lock();
        if stored.tiers.get(service).is_some_and(|(known, _)| *known == tier) {
            return;
        }
        stored.tiers.insert(service.clone(), (tier, reason.to_owned()));
        self.save(&stored);
    }

    pub fn record(&self, service: &ServiceKey, shift: Shift) {
        let mut stored = self.lock();
        stored.next_sequence += 1;
        let sequence = stored.next_sequence;
        stored.shifts.push_back(Record { sequence, service: service.clone(), shift });
        if stored.shifts.len() > MAX_SHIFTS {
            stored.shifts.pop_front();
        }
        self.save(&stored);
    }

    /// What no federator has acknowledged.
    pub fn pending(&self) -> Vec<v1::Shift> {
        let wire = |record: &Record| v1::Shift {
            sequence: record.sequence,
            at_unix_ms: i64::try_from(record.shift.at_unix_ms).unwrap_or(i64::MAX),
            service: record.service.to_string(),
            from_tier: i32::try_from(record.shift.from_tier).unwrap_or(i32::MAX),
            to_tier: i32::try_from(record.shift.to_tier).unwrap_or(i32::MAX),
            clusters: record.shift.clusters.iter().map(ToString::to_string).collect(),
            reason: record.shift.reason.clone(),
        };
        self.lock().shifts.iter().map(wire).collect()
    }

    /// A federator has stored everything up to `sequence`.
    pub fn acknowledge(&self, sequence: u64) {
        let mut stored = self.lock();
        let before = stored.shifts.len();
        stored.shifts.retain(|record| record.sequence > sequence);
        if stored.shifts.len() != before {
            self.save(&stored);
        }
    }

    fn save(&self, stored: &Stored) {
        let text = serde_json::to_vec(stored).unwrap_or_default();
        if let Err(error) = files::write_atomic(&self.inner.path, &text, 0o600) {
            // In memory it still counts: only a restart would forget it.
            tracing::warn!(%error, "the failover history can't be written");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Stored> {
        self.inner.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
