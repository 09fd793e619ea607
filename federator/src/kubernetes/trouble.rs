//! What went wrong with a service's writes, or with a watch.

use std::time::Duration;

use kube::runtime::watcher;
use tokio::time::Instant;

use super::plan::Write;

/// What was refused or did not settle is tried again after 1 s, then twice as long, up to this.
const SLOWEST: Duration = Duration::from_secs(60);

/// A service whose writes did not lead where they should.
#[derive(Clone, Debug)]
pub struct Trouble {
    pub attempts: u32,
    pub not_before: Instant,
    /// What was written last: the same again means that something undoes it.
    pub last: Vec<Write>,
    pub refusal: Option<String>,
}

impl Trouble {
    pub fn none(now: Instant) -> Self {
        Self { attempts: 0, not_before: now, last: Vec::new(), refusal: None }
    }

    /// Until the next attempt.
    pub fn pause(attempts: u32) -> Duration {
        Duration::from_secs(1 << attempts.min(6)).min(SLOWEST)
    }
}

/// Why the API server does not know us, if that is what failed.
pub fn unauthenticated(error: &watcher::Error) -> Option<String> {
    let error = match error {
        watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error) => error,
        watcher::Error::WatchError(status) => {
            return (status.code == 401).then(|| status.message.clone());
        }
        _ => return None,
    };
    match error {
        kube::Error::Api(status) if status.code == 401 => Some(status.message.clone()),
        _ => None,
    }
}
