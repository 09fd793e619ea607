//! What is known of a rotation beside the root's key: how far it has come, on disk before anything of it is done, and the
//! updates that were signed.
//!
//! ```text
//!  <dir>/rotation.json            the step that is being done; absent: no rotation is under way
//!  <dir>/next/                    the new root, until it takes the place of the old one
//!  <dir>/updates/<sequence>.update  what was signed and is given out, never changed
//! ```

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tombolo_identity::files;
use tombolo_identity::rotation::MAX_UPDATE_BYTES;

use crate::failure::Failure;

const FILE: &str = "rotation.json";
const UPDATES: &str = "updates";
const VERSION: u32 = 1;
const MAX_FILE: u64 = 64 * 1024;

/// The steps, in order. Each but the last gives an update out and waits until everybody has acknowledged it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// The new root is trusted beside the old one.
    Staging,
    /// Intermediates are signed by the new root, and leaves renewed.
    Reissuing,
    /// The new root alone is trusted.
    Retiring,
    /// The new root takes the place of the old one in the directory.
    Finishing,
}

impl Step {
    pub fn next(self) -> Self {
        match self {
            Self::Staging => Self::Reissuing,
            Self::Reissuing => Self::Retiring,
            Self::Retiring | Self::Finishing => Self::Finishing,
        }
    }
    fn index(self) -> u64 {
        match self {
            Self::Staging => 0,
            Self::Reissuing => 1,
            Self::Retiring | Self::Finishing => 2,
        }
    }
    /// For people: what everybody does when it is over.
    pub fn outcome(self) -> &'static str {
        match self {
            Self::Staging => "trust both roots",
            Self::Reissuing => "show chains of the new root",
            Self::Retiring => "trust the new root alone",
            Self::Finishing => "done",
        }
    }
    pub fn number(self) -> u64 {
        self.index() + 1
    }
    pub fn word(self) -> &'static str {
        match self {
            Self::Staging => "staging",
            Self::Reissuing => "reissuing",
            Self::Retiring => "retiring",
            Self::Finishing => "finishing",
        }
    }
}

/// A rotation that is under way.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rotation {
    version: u32,
    pub step: Step,
    /// Fingerprints.
    pub old_root: String,
    pub new_root: String,
    /// Of the first update.
    first_sequence: u64,
    /// RFC 3339.
    pub started_at: String,
}

impl Rotation {
    pub fn new(old_root: String, new_root: String, first_sequence: u64, started_at: String) -> Self {
        Self { version: VERSION, step: Step::Staging, old_root, new_root, first_sequence, started_at }
    }

    /// Of the update of this step.
    pub fn sequence(&self) -> u64 {
        self.first_sequence.saturating_add(self.step.index())
    }

    /// `None`: no rotation is under way.
    pub fn load(dir: &Path) -> Result<Option<Self>, Failure> {
        let path = dir.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let damaged = |reason: String| {
            Failure::new(format_args!("{} is damaged ({reason})", path.display()))
                .remedy("restore the root's directory from your backup, then run the command again")
        };
        let text = files::read(&path, MAX_FILE).map_err(Failure::new)?;
        let rotation: Self = serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))?;
        if rotation.version != VERSION {
            return Err(Failure::new(format_args!(
                "{} is of version {}, this command knows {VERSION}",
                path.display(),
                rotation.version
            ))
            .remedy("go on with the `tombolo` that began the rotation"));
        }
        Ok(Some(rotation))
    }

    /// Before what it says is done.
    pub fn save(&self, dir: &Path) -> Result<(), Failure> {
        let text = serde_json::to_vec_pretty(self).map_err(Failure::new)?;
        files::write_atomic(&dir.join(FILE), &text, 0o600).map_err(Failure::new)
    }

    /// It is over.
    pub fn remove(dir: &Path) -> Result<(), Failure> {
        let path = dir.join(FILE);
        std::fs::remove_file(&path)
            .map_err(|e| Failure::new(format_args!("can't remove {}: {e}", path.display())))
    }
}

fn update_path(dir: &Path, sequence: u64) -> PathBuf {
    dir.join(UPDATES).join(format!("{sequence:020}.update"))
}

/// The update of a sequence, if it has been signed.
pub fn update(dir: &Path, sequence: u64) -> Result<Option<Vec<u8>>, Failure> {
    let path = update_path(dir, sequence);
    if !path.exists() {
        return Ok(None);
    }
    files::read(&path, MAX_UPDATE_BYTES as u64).map(Some).map_err(Failure::new)
}

/// Keeps an update before it is given out: signatures differ each time, and two updates of one sequence are a conflict.
pub fn keep_update(dir: &Path, sequence: u64, bytes: &[u8]) -> Result<(), Failure> {
    files::private_dir(&dir.join(UPDATES)).map_err(Failure::new)?;
    files::write_atomic(&update_path(dir, sequence), bytes, 0o644).map_err(Failure::new)
}

/// Every update that was signed with this root, in order.
pub fn updates(dir: &Path) -> Result<Vec<Vec<u8>>, Failure> {
    let list = dir.join(UPDATES);
    if !list.exists() {
        return Ok(Vec::new());
    }
    let failed = |e| Failure::new(format_args!("can't read {}: {e}", list.display()));
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(&list).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "update") {
            paths.push(path);
        }
    }
    paths.sort();
    paths.iter().map(|path| files::read(path, MAX_UPDATE_BYTES as u64).map_err(Failure::new)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_follow_each_other_and_each_has_a_sequence_of_its_own() {
        let mut rotation = Rotation::new("old".into(), "new".into(), 5, String::new());
        let mut seen = vec![(rotation.step, rotation.sequence())];
        while rotation.step != Step::Finishing {
            rotation.step = rotation.step.next();
            seen.push((rotation.step, rotation.sequence()));
        }
        let expected = [(Step::Staging, 5), (Step::Reissuing, 6), (Step::Retiring, 7), (Step::Finishing, 7)];
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_rotation_is_there_again_after_a_crash_and_a_torn_file_is_an_error() {
        let dir = std::env::temp_dir().join(format!("tombolo-rotation-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        assert_eq!(Rotation::load(&dir).unwrap(), None);
        let rotation = Rotation::new("old".into(), "new".into(), 2, "2026-11-24T00:00:00Z".into());
        rotation.save(&dir).unwrap();
        assert_eq!(Rotation::load(&dir).unwrap(), Some(rotation));
        for sequence in [10, 9] {
            keep_update(&dir, sequence, &sequence.to_be_bytes()).unwrap();
        }
        assert_eq!(updates(&dir).unwrap(), [9u64.to_be_bytes(), 10u64.to_be_bytes()]);
        assert_eq!(update(&dir, 8).unwrap(), None);
        for torn in ["", "{", "{}", r#"{"version":9,"step":"staging"}"#] {
            std::fs::write(dir.join(FILE), torn).unwrap();
            assert!(Rotation::load(&dir).unwrap_err().to_string().contains("rotation.json"), "{torn}");
        }
        Rotation::remove(&dir).unwrap_or_default();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
