//! The drain signal: one trigger, held by the process; watchers, held by every task with work in flight.
//!
//! Serving -> draining (finish what is open, take nothing new) -> forced (give up now). It only moves forward. The drain is over when the last [`Drain`] is
//! dropped, so a task that keeps its watcher until its work is done is waited for. A vanished trigger counts as forced: its process is going away.

use std::time::Duration;

use tokio::sync::watch;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Serving,
    Draining,
    Forced,
}

/// Makes a trigger and its first watcher.
pub fn channel() -> (DrainTrigger, Drain) {
    let (phase, watcher) = watch::channel(Phase::Serving);
    (DrainTrigger { phase }, Drain { watcher })
}

/// Starts and forces the drain. One owner.
#[derive(Debug)]
pub struct DrainTrigger {
    phase: watch::Sender<Phase>,
}

impl DrainTrigger {
    /// Another watcher. Also works after all earlier ones are gone.
    pub fn watcher(&self) -> Drain {
        Drain { watcher: self.phase.subscribe() }
    }

    pub fn start(&self) {
        self.advance(Phase::Draining);
    }

    pub fn force(&self) {
        self.advance(Phase::Forced);
    }

    fn advance(&self, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let forward = *phase < to;
            if forward {
                *phase = to;
            }
            forward
        });
    }

    /// Waits until every watcher is dropped.
    pub async fn drained(&self) {
        self.phase.closed().await;
    }

    /// Starts the drain, waits up to `patience` for every watcher to be dropped, then forces. True: nothing had to be forced.
    pub async fn drain(&self, patience: Duration) -> bool {
        self.start();
        let polite = tokio::time::timeout(patience, self.drained()).await.is_ok();
        if !polite {
            self.force();
        }
        polite
    }
}

/// Held by whoever has work in flight; drop it when that work is done.
#[derive(Clone, Debug)]
pub struct Drain {
    watcher: watch::Receiver<Phase>,
}

impl Drain {
    pub fn phase(&self) -> Phase {
        // A vanished trigger can't announce anything any more.
        if self.watcher.has_changed().is_err() { Phase::Forced } else { *self.watcher.borrow() }
    }

    pub fn is_draining(&self) -> bool {
        self.phase() >= Phase::Draining
    }

    /// Ends when draining starts (or is past). Cancel safe.
    pub async fn started(&self) {
        self.reached(Phase::Draining).await;
    }

    /// Ends when patience is over: stop at once.
    pub async fn forced(&self) {
        self.reached(Phase::Forced).await;
    }

    async fn reached(&self, at_least: Phase) {
        let _ = self.watcher.clone().wait_for(|phase| *phase >= at_least).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_drain_waits_for_the_last_watcher() {
        let (trigger, drain) = channel();
        let work = async {
            drain.started().await;
            tokio::time::sleep(Duration::from_secs(2)).await;
            drop(drain);
        };
        let (polite, ()) = tokio::join!(trigger.drain(Duration::from_secs(5)), work);
        assert!(polite);
    }

    #[tokio::test(start_paused = true)]
    async fn patience_ends_in_force_and_never_goes_back() {
        let (trigger, drain) = channel();
        assert!(!trigger.drain(Duration::from_secs(1)).await);
        drain.forced().await;
        trigger.start();
        assert_eq!(drain.phase(), Phase::Forced);
    }

    #[tokio::test]
    async fn a_vanished_trigger_forces() {
        let (trigger, drain) = channel();
        drop(trigger);
        drain.forced().await;
        assert_eq!(drain.phase(), Phase::Forced);
    }
}
