//! What followed from the API server last, kept beside the identities for a start while it is away: a container that is
//! started again in its place serves as before it ended.
//!
//! One file, written at most every few seconds. It is believed for as long as what is known would be without a restart,
//! counted from when the API server was last heard, and only until everything was received anew.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tombolo_identity::files;

use super::picture::{Account, AccountPicture, Numbered, Picture};

/// Not the name of a namespace, whose directories it lies beside.
const FILE: &str = "picture.json";
/// 5000 pods take 1 MB.
const MAX_BYTES: u64 = 64 << 20;
/// Changes in between are written together.
const PAUSE: Duration = Duration::from_secs(5);
/// While nothing changes, that the API server is heard is said anew.
const REFRESH: Duration = Duration::from_secs(60);

/// The file's contents.
#[derive(Serialize, Deserialize)]
struct Kept {
    heard_unix: u64,
    accounts: Vec<(Account, AccountPicture)>,
    numbered: Vec<Numbered>,
}

/// Keeps pictures.
#[derive(Debug)]
pub struct Remembered {
    path: PathBuf,
    /// What a former process kept, until it is of no use any more, and when the API server was heard then (unix seconds).
    former: Option<(Picture, u64)>,
    /// The former is gone by.
    used: bool,
    latest: Option<Picture>,
    due: Option<Instant>,
}

impl Remembered {
    /// Reads what a former process left. What can't be read is said, and left out.
    pub fn read(state_dir: &Path) -> Self {
        let path = state_dir.join(FILE);
        let former = match path.exists() {
            true => files::read(&path, MAX_BYTES).map_err(|error| error.to_string()).and_then(|bytes| {
                serde_json::from_slice(&bytes).map_err(|error| format!("{}: {error}", path.display()))
            }),
            false => Ok(None),
        };
        let former = former.unwrap_or_else(|error| {
            tracing::warn!(error, "what was known before can't be read, and is asked for anew");
            None
        });
        let picture = |Kept { heard_unix, accounts, numbered }: Kept| {
            let accounts = accounts.into_iter().collect();
            (Picture { accounts, numbered, ..Picture::default() }, heard_unix)
        };
        Self { path, former: former.map(picture), used: false, latest: None, due: None }
    }

    /// What a former process knew is gone by, until everything was received: how long ago (by the wall clock) the API server
    /// was heard then. `None`: there is nothing of it.
    pub fn fall_back(&mut self, unix: u64) -> Option<Duration> {
        let (_, heard) = self.former.as_ref()?;
        self.used = true;
        Some(Duration::from_secs(unix.saturating_sub(*heard)))
    }

    /// What is gone by while nothing is received.
    pub fn former(&self) -> Option<&Picture> {
        self.former.as_ref().filter(|_| self.used).map(|(picture, _)| picture)
    }

    /// A picture of what was received, whole.
    pub fn know(&mut self, picture: &Picture, now: Instant) {
        self.former = None;
        if self.latest.as_ref() != Some(picture) {
            // The first one at once: it may be all that there will be.
            let first = self.latest.is_none();
            self.latest = Some(picture.clone());
            let at = if first { now } else { now + PAUSE };
            self.due = Some(self.due.map_or(at, |due| due.min(at)));
        }
    }

    /// When [`Self::write`] has something to do.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Writes what is due. `heard`: the API server answers now.
    pub fn write(&mut self, now: Instant, unix: u64, heard: bool) {
        if self.due.is_none_or(|due| now < due) {
            return;
        }
        self.due = Some(now + REFRESH);
        let Some(picture) = self.latest.as_ref().filter(|_| heard) else { return };
        let Picture { accounts, numbered, .. } = picture.clone();
        let kept = Kept { heard_unix: unix, accounts: accounts.into_iter().collect(), numbered };
        let path = self.path.clone();
        tokio::task::spawn_blocking(move || {
            let written = serde_json::to_vec(&kept).map_err(|error| error.to_string()).and_then(|bytes| {
                files::write_atomic(&path, &bytes, 0o600).map_err(|error| error.to_string())
            });
            if let Err(error) = written {
                tracing::warn!(error, "what is known can't be kept for the next start");
            }
        });
    }
}

#[cfg(test)]
mod tests;
