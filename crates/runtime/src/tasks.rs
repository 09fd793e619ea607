//! Owned tasks: every task has an owner, a name, a span and an end.
//!
//! A [`TaskGroup`] is held by whoever starts tasks. [`TaskGroup::shutdown`] asks them to stop through the group's
//! token, waits up to a limit, then aborts what is left. Dropping the group aborts everything.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::{AbortHandle, JoinHandle};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::Instrument;

/// A set of named tasks with one owner. Clones share the set; the last clone dropped aborts it.
#[derive(Clone, Debug)]
pub struct TaskGroup {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    tracker: TaskTracker,
    stop: CancellationToken,
    _stop_on_drop: DropGuard,
    aborts: Mutex<Vec<AbortHandle>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        for handle in self.aborts.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            handle.abort();
        }
    }
}

impl Default for TaskGroup {
    fn default() -> Self {
        Self::new()
    }
}

impl TaskGroup {
    pub fn new() -> Self {
        let stop = CancellationToken::new();
        Self {
            inner: Arc::new(Inner {
                tracker: TaskTracker::new(),
                _stop_on_drop: stop.clone().drop_guard(),
                stop,
                aborts: Mutex::new(Vec::new()),
            }),
        }
    }

    /// Cancelled when the group is asked to stop. Long-running tasks select on it.
    pub fn stop_token(&self) -> CancellationToken {
        self.inner.stop.clone()
    }

    /// Runs `future` as a task named `name` until it ends, the group is dropped, or shutdown's patience runs out.
    pub fn spawn<F>(&self, name: &'static str, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let span = tracing::debug_span!("task", name);
        #[allow(clippy::disallowed_methods)] // the one place that may spawn
        let handle = tokio::spawn(self.inner.tracker.track_future(future.instrument(span)));
        let mut aborts = self.inner.aborts.lock().unwrap_or_else(PoisonError::into_inner);
        // Amortised: finished handles are swept whenever the list has doubled past the live ones.
        if aborts.len() >= 64 && aborts.len().is_power_of_two() {
            aborts.retain(|handle| !handle.is_finished());
        }
        aborts.push(handle.abort_handle());
        handle
    }

    /// Number of tasks that have not ended.
    pub fn len(&self) -> usize {
        self.inner.tracker.len()
    }

    pub fn is_empty(&self) -> bool {
        self.inner.tracker.is_empty()
    }

    /// Asks every task to stop, waits up to `patience`, then aborts the rest. Returns how many had to be aborted.
    pub async fn shutdown(&self, patience: Duration) -> usize {
        self.inner.stop.cancel();
        self.inner.tracker.close();
        let _ = tokio::time::timeout(patience, self.inner.tracker.wait()).await;
        let left = self.inner.tracker.len();
        for handle in self.inner.aborts.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            handle.abort();
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dropped_group_ends_its_tasks() {
        let group = TaskGroup::new();
        let task = group.spawn("endless", std::future::pending::<()>());
        drop(group);
        assert!(task.await.unwrap_err().is_cancelled());
    }

    #[tokio::test]
    async fn shutdown_waits_for_the_polite_and_aborts_the_rest() {
        let group = TaskGroup::new();
        let stop = group.stop_token();
        let polite = group.spawn("polite", async move { stop.cancelled().await });
        let rude = group.spawn("rude", std::future::pending::<()>());
        assert_eq!(group.shutdown(Duration::from_millis(50)).await, 1);
        assert!(polite.await.is_ok() && rude.await.unwrap_err().is_cancelled());
    }
}
