//! Whether callers of a service are sent elsewhere: Kubernetes no longer counts on the pod, while its application still serves.
//!
//! Callers in other clusters know no endpoints, but hold connections to some: nobody but this side can tell them to leave.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// By then gateways and neighbours have been told, so that whoever is sent away does not come back here: a report, and a
/// configuration, take some 100 ms.
const HEARD: Duration = Duration::from_secs(1);

/// Of one service; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Leaving(Arc<Mutex<Option<Instant>>>);

impl Leaving {
    /// From `now` on it leaves, or does not.
    pub fn set(&self, leaves: bool, now: Instant) {
        let mut since = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *since = leaves.then(|| since.unwrap_or(now));
    }

    /// Whether a stream that comes at `now` is sent elsewhere.
    pub fn sends_away(&self, now: Instant) -> bool {
        let since = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        since.is_some_and(|since| now.saturating_duration_since(since) >= HEARD)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn callers_are_sent_elsewhere_once_others_have_heard_and_no_more_when_it_is_back() {
        let (leaving, start) = (Leaving::default(), Instant::now());
        let after = |millis| start + Duration::from_millis(millis);
        assert!(!leaving.sends_away(after(5000)));
        leaving.set(true, start);
        leaving.set(true, after(900));
        assert!(
            !leaving.sends_away(after(999)) && leaving.sends_away(after(1000)),
            "the time does not begin anew"
        );
        leaving.set(false, after(1100));
        assert!(!leaving.sends_away(after(9000)));
    }
}
