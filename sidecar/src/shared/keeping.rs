//! One application's task: its sidecar runs, and is started again when it ends or does not start, for as long as it is wanted.
//!
//! What is called while it starts is held for [`HOLD`] at most, then reset, so that one application's trouble is neither
//! another's nor its callers' for long. One that only calls start gives up after a start that failed: the next call tries again.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::mpsc;
use tombolo_runtime::drain::{self, Drain};
use tombolo_runtime::readiness::BlockReady;
use tombolo_runtime::tasks::TaskGroup;

use super::config::{Application, Start};
use super::front::{self, Call, Calls, Front, Handed};
use crate::config::SidecarConfig;
use crate::metrics::{Metrics, OwnByApplication};
use crate::role::{Among, Bound, BuildError, Sidecar};
use crate::udp::queue::Budget;

/// A sidecar that is started by a call joins within a second; a client waits for a connection about as long as this.
const HOLD: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ApplicationLabels {
    pub application: String,
}

#[derive(Clone)]
pub(super) struct Context {
    pub front: Front,
    pub calls: Calls,
    pub metrics: Metrics,
    pub own: OwnByApplication,
    /// What waits in flows of datagrams of all applications together.
    pub budget: Budget,
    pub up: Family<ApplicationLabels, Gauge>,
    /// An application could not be started since the configuration was read.
    pub failed: Arc<AtomicBool>,
    pub tasks: TaskGroup,
}

/// What an application's task is given.
pub(super) struct Keeper {
    pub name: String,
    pub application: Arc<Mutex<Application>>,
    /// Of its overlay socket, where the configuration leaves it open.
    pub port: Option<u16>,
    pub drain: Drain,
}

impl Keeper {
    fn read(&self) -> (SidecarConfig, Start) {
        let application = self.application.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut sidecar, start) = (application.sidecar.clone(), application.start);
        if let Some(port) = self.port {
            sidecar.bind = SocketAddr::new(sidecar.bind.ip(), port);
        }
        (sidecar, start)
    }
}

impl Context {
    /// Runs an application's sidecar, and starts it again for as long as it is wanted.
    pub async fn keep(self, keeper: Keeper, mut handed: Handed, mut block: Option<BlockReady>) {
        let Keeper { name, drain, .. } = &keeper;
        let labels = ApplicationLabels { application: name.clone() };
        let mut pause = FIRST_PAUSE;
        while drain.phase() == drain::Phase::Serving {
            let (config, _) = keeper.read();
            match self.build(name, config, &mut handed.calls, block.take(), drain).await {
                None => break,
                Some(Ok((mut bound, held))) => {
                    bound.hand(held, std::mem::replace(&mut handed, front::hand_over().1));
                    self.up.get_or_create(&labels).set(1);
                    let ended = bound.run(drain.clone()).await;
                    self.up.get_or_create(&labels).set(0);
                    // Only its reports would say that it is connected no more.
                    self.own.forget(name);
                    if let Err(error) = ended {
                        tracing::error!(application = name, %error, "the application's sidecar has ended");
                    }
                    pause = FIRST_PAUSE;
                }
                Some(Err(error)) => {
                    self.up.get_or_create(&labels).set(0);
                    self.failed.store(true, Relaxed);
                    tracing::error!(application = name, error = %chain(&error), again_in = ?pause,
                        "the application's sidecar can't be started");
                }
            }
            if drain.phase() != drain::Phase::Serving {
                break;
            }
            self.front.serve(name, None);
            refuse_all(&mut handed.calls);
            tokio::select! {
                () = drain.started() => break,
                () = tokio::time::sleep(pause) => {}
            }
            if keeper.read().1 == Start::WhenCalled {
                // The next call starts it again.
                break;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
            let (serving, next) = front::hand_over();
            handed = next;
            self.front.serve(name, Some(serving));
        }
        refuse_all(&mut handed.calls);
        self.up.remove(&labels);
        self.own.forget(name);
    }

    /// Starts a sidecar; holds what is called meanwhile, each for as long as [`HOLD`]. `None`: it is not wanted any more.
    async fn build(
        &self,
        name: &str,
        config: SidecarConfig,
        calls: &mut mpsc::Receiver<Call>,
        block: Option<BlockReady>,
        drain: &Drain,
    ) -> Option<Result<(Bound, VecDeque<Call>), BuildError>> {
        let mut held: VecDeque<Call> = VecDeque::new();
        let metrics = self.metrics.with(self.own.of(name));
        let among = Among { metrics, configured: block, budget: self.budget.clone() };
        let build = Sidecar::build_among(config, among);
        tokio::pin!(build);
        let built = loop {
            let oldest = held.front().map(|call| tokio::time::Instant::from_std(call.at + HOLD));
            tokio::select! {
                built = &mut build => break Some(built),
                () = drain.started() => break None,
                Some(call) = calls.recv(), if held.len() < front::HANDED => held.push_back(call),
                () = tokio::time::sleep_until(oldest.unwrap_or_else(tokio::time::Instant::now)), if oldest.is_some() => {
                    if let Some(call) = held.pop_front() {
                        self.calls.count("held_too_long");
                        call.refuse();
                    }
                }
            }
        };
        match built {
            Some(Ok(bound)) => Some(Ok((bound, held))),
            other => {
                held.into_iter().for_each(Call::refuse);
                other.map(|built| built.map(|bound| (bound, VecDeque::new())))
            }
        }
    }
}

fn refuse_all(calls: &mut mpsc::Receiver<Call>) {
    calls.close();
    while let Ok(call) = calls.try_recv() {
        call.refuse();
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
