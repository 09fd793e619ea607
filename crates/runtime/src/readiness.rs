//! Readiness as held values: whoever a role still waits for holds a [`BlockReady`], and dropping it is the only way
//! to become ready.
//!
//! A [`Readiness`] nobody has ever blocked is *not* ready: a role that forgot to declare its dependencies stays red.
//! Becoming unready again (draining, a lost dependency) is taking another guard.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

/// Name reported while no dependency has been declared yet.
const UNDECLARED: &str = "startup";

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// Whether anything was ever declared.
    declared: bool,
    blockers: BTreeMap<u64, Arc<str>>,
}

impl State {
    fn is_ready(&self) -> bool {
        self.declared && self.blockers.is_empty()
    }
}

/// Shared view of what a process still waits for. Clones see the same state.
#[derive(Clone, Debug)]
pub struct Readiness {
    state: Arc<watch::Sender<State>>,
}

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

impl Readiness {
    pub fn new() -> Self {
        Self { state: Arc::new(watch::Sender::new(State::default())) }
    }

    /// Declares a dependency. The process is not ready until the returned guard is dropped.
    pub fn block(&self, what: impl Into<Arc<str>>) -> BlockReady {
        let mut id = 0;
        self.state.send_modify(|state| {
            id = state.next;
            state.next += 1;
            state.declared = true;
            state.blockers.insert(id, what.into());
        });
        BlockReady { state: self.state.clone(), id }
    }

    pub fn is_ready(&self) -> bool {
        self.state.borrow().is_ready()
    }

    /// What is still missing, in the order it was declared; empty when ready.
    pub fn blocked_by(&self) -> Vec<Arc<str>> {
        let state = self.state.borrow();
        if !state.declared {
            return vec![UNDECLARED.into()];
        }
        state.blockers.values().cloned().collect()
    }

    /// Waits until nothing blocks.
    pub async fn ready(&self) {
        // The sender lives in `self`, so the channel can't close while we wait.
        let _ = self.state.subscribe().wait_for(State::is_ready).await;
    }
}

/// Held by whoever a process waits for. Dropping it says: no longer waiting for this.
#[must_use = "dropping it at once makes the process ready"]
#[derive(Debug)]
pub struct BlockReady {
    state: Arc<watch::Sender<State>>,
    id: u64,
}

impl Drop for BlockReady {
    fn drop(&mut self) {
        self.state.send_modify(|state| {
            state.blockers.remove(&self.id);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_declared_is_not_ready() {
        let readiness = Readiness::new();
        assert!(!readiness.is_ready());
        assert_eq!(readiness.blocked_by(), vec![Arc::<str>::from(UNDECLARED)]);
    }

    #[tokio::test]
    async fn ready_once_every_guard_is_gone_and_unready_when_one_is_taken_again() {
        let readiness = Readiness::new();
        let (identity, config) = (readiness.block("identity"), readiness.block("configuration"));
        drop(identity);
        assert_eq!(readiness.blocked_by(), vec![Arc::<str>::from("configuration")]);
        assert!(!readiness.is_ready());
        drop(config);
        readiness.ready().await;
        assert!(readiness.is_ready());
        let draining = readiness.block("draining");
        assert!(!readiness.is_ready());
        drop(draining);
        assert!(readiness.is_ready());
    }
}
