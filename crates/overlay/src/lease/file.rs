//! The files of a lease: reading, atomic writing, and burning incarnations.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tombolo_model::ids::{Block, ClusterTag, Incarnation};
use tombolo_model::names::ClusterName;
use tombolo_proto::v1;

use super::EndpointLease;

/// An incarnation may be used again after this: an ID of it lives 80 min at most, and its peers' leases and caches less
/// than 4 h.
pub const RELEASED_AFTER: Duration = Duration::from_secs(4 * 3600);
const LEASE: &str = "lease.json";
const INCARNATIONS: &str = "incarnations.json";
const LOCK: &str = "lease.lock";
const LEASE_FORMAT: &str = "tombolo-lease/1";
const INCARNATIONS_FORMAT: &str = "tombolo-incarnations/1";
/// A lease with 192 keys is 10 KB; more is not ours.
const MAX_FILE: u64 = 256 * 1024;

/// What is wrong with the lease on disk, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {}: {source}; free some space or fix its permissions, nothing was used up", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error(
        "{} is damaged or not a file of tombolo ({reason}); move both {LEASE} and {INCARNATIONS} away and join again: the federator gives another block",
        path.display()
    )]
    Damaged { path: PathBuf, reason: String },
    #[error("no lease in {}; join or enrol first", dir.display())]
    NoLease { dir: PathBuf },
    #[error(
        "all 16 incarnations of block {block} were used within 4 h; the next start is possible in {} s, or ask the federator for another block (something restarts this process in a loop)",
        wait.as_secs()
    )]
    Exhausted { block: Block, wait: Duration },
}

impl LeaseError {
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Damaged { .. } => "damaged",
            Self::NoLease { .. } => "no_lease",
            Self::Exhausted { .. } => "exhausted",
        }
    }
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Read { .. } | Self::Write { .. } | Self::Exhausted { .. })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LeaseJson {
    format: String,
    cluster: ClusterName,
    tag: ClusterTag,
    block: Block,
    spiffe_id: String,
    not_after_unix: u64,
    signature: String,
    first_hour: u64,
    keys: Vec<String>,
    #[serde(default)]
    renewal_key: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct IncarnationsJson {
    format: String,
    tag: ClusterTag,
    block: Block,
    burned: Vec<Burned>,
}

#[derive(Serialize, Deserialize, Clone, Copy)]
#[serde(deny_unknown_fields)]
struct Burned {
    incarnation: Incarnation,
    at_unix: u64,
}

/// A lease in a directory. All calls are blocking file IO of a few kilobytes.
#[derive(Debug)]
pub struct LeaseFile;

impl LeaseFile {
    /// Writes the lease whole, or not at all.
    pub fn save(dir: &Path, lease: &EndpointLease) -> Result<(), LeaseError> {
        let wire = lease.keys.to_wire();
        let json = LeaseJson {
            format: LEASE_FORMAT.to_owned(),
            cluster: lease.cluster.clone(),
            tag: lease.tag,
            block: lease.block,
            spiffe_id: lease.spiffe_id.clone(),
            not_after_unix: lease.not_after,
            signature: hex::encode(&lease.signature),
            first_hour: wire.first_hour,
            keys: wire.keys.iter().map(hex::encode).collect(),
            renewal_key: lease
                .renewal_key
                .as_ref()
                .map(|key| hex::encode(key.as_bytes()))
                .unwrap_or_default(),
        };
        let _lock = lock(dir)?;
        write_whole(&dir.join(LEASE), &json)
    }

    /// The lease of this directory; `None` when there is none yet.
    pub fn load(dir: &Path) -> Result<Option<EndpointLease>, LeaseError> {
        let path = dir.join(LEASE);
        let Some(json) = read::<LeaseJson>(&path)? else { return Ok(None) };
        let damaged = |reason: String| LeaseError::Damaged { path: path.clone(), reason };
        if json.format != LEASE_FORMAT {
            return Err(damaged(format!("format {:?} is not {LEASE_FORMAT:?}", shortened(&json.format))));
        }
        let bytes =
            |field: &str, text: &str| hex::decode(text).map_err(|e| damaged(format!("field {field}: {e}")));
        let keys = json.keys.iter().map(|key| bytes("keys", key)).collect::<Result<Vec<_>, _>>()?;
        // The same checks as for what comes from a federator.
        let wire = v1::EndpointLease {
            cluster: json.cluster.to_string(),
            tag: json.tag.value(),
            block: json.block.value(),
            spiffe_id: json.spiffe_id,
            not_after_unix: i64::try_from(json.not_after_unix)
                .map_err(|_| damaged("field not_after_unix is beyond any date".to_owned()))?,
            signature: bytes("signature", &json.signature)?,
            keys: Some(v1::KeyRing { first_hour: json.first_hour, keys }),
            renewal_key: bytes("renewal_key", &json.renewal_key)?,
        };
        EndpointLease::from_wire(&wire).map(Some).map_err(|e| damaged(e.to_string()))
    }

    /// An incarnation that no start of the last 4 h has used, recorded on disk before it is returned. `now` is
    /// the time since the Unix epoch.
    pub fn burn_incarnation(dir: &Path, now: Duration) -> Result<Incarnation, LeaseError> {
        let _lock = lock(dir)?;
        let lease = Self::load(dir)?.ok_or_else(|| LeaseError::NoLease { dir: dir.to_owned() })?;
        let path = dir.join(INCARNATIONS);
        let mut burned = match read::<IncarnationsJson>(&path)? {
            // Another block is another 16 ids.
            Some(json) if (json.tag, json.block) != (lease.tag, lease.block) => Vec::new(),
            Some(json) if json.format != INCARNATIONS_FORMAT => {
                let reason = format!("format {:?} is not {INCARNATIONS_FORMAT:?}", shortened(&json.format));
                return Err(LeaseError::Damaged { path, reason });
            }
            Some(json) => json.burned,
            None => Vec::new(),
        };
        let now = now.as_secs();
        // The clock went back: what was burned "later" counts from now, so that it neither blocks for years nor is
        // released too early.
        burned.iter_mut().for_each(|b| b.at_unix = b.at_unix.min(now));
        let last = burned.last().map(|b| b.incarnation);
        burned.retain(|b| now - b.at_unix < RELEASED_AFTER.as_secs());
        let free = |candidate: &Incarnation| burned.iter().all(|b| b.incarnation != *candidate);
        // Round robin: an id rests as long as it can.
        let first = last.map_or(0, |last| last.value() + 1);
        let turn = (0..Incarnation::COUNT).filter_map(|n| Incarnation::new((first + n) % Incarnation::COUNT));
        let Some(incarnation) = turn.into_iter().find(free) else {
            let oldest = burned.iter().map(|b| b.at_unix).min().unwrap_or(now);
            let wait = (oldest + RELEASED_AFTER.as_secs()).saturating_sub(now);
            return Err(LeaseError::Exhausted { block: lease.block, wait: Duration::from_secs(wait) });
        };
        burned.push(Burned { incarnation, at_unix: now });
        let json = IncarnationsJson {
            format: INCARNATIONS_FORMAT.to_owned(),
            tag: lease.tag,
            block: lease.block,
            burned,
        };
        write_whole(&path, &json)?;
        Ok(incarnation)
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}

/// Creates the directory if need be and holds its lock until dropped.
fn lock(dir: &Path) -> Result<File, LeaseError> {
    let path = dir.join(LOCK);
    let failed = |source| LeaseError::Write { path: path.clone(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    file.lock().map_err(failed)?;
    Ok(file)
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, LeaseError> {
    let failed = |source| LeaseError::Read { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    let mut text = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(failed)?;
    let damaged = |reason: String| LeaseError::Damaged { path: path.to_owned(), reason };
    if text.len() as u64 > MAX_FILE {
        return Err(damaged(format!("it is larger than {MAX_FILE} bytes")));
    }
    serde_json::from_slice(&text).map(Some).map_err(|e| damaged(e.to_string()))
}

fn write_whole(path: &Path, json: &impl Serialize) -> Result<(), LeaseError> {
    let failed = |source: io::Error| LeaseError::Write { path: path.to_owned(), source };
    let text = serde_json::to_vec_pretty(json).map_err(|e| failed(e.into()))?;
    let temporary = path.with_extension("tmp");
    // The lock makes this process the only writer; what a crash left behind is not worth keeping.
    let _ = fs::remove_file(&temporary);
    let written = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(failed)?;
    // The rename itself must survive a power cut before anyone relies on it.
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all()).map_err(failed)
}
