//! Connections to one service in one cluster: a few, to distinct endpoints, shared by all streams.
//!
//! [`Pool::stream`] picks a connection by power of two choices over peak-EWMA latency and load ([`choice`]), keeping
//! requests off connections that carry bulk, and opens a stream on it. Connections are dialled on demand, a few at a
//! time with jittered backoff, each to another endpoint while there are more; kept while in use; closed after the idle
//! time. Tasks: one per dial, one per live connection; all end with the task group or [`Pool::close`].

pub mod choice;
mod connection;
mod dialling;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tombolo_identity::{ExpectedPeer, SvidHandle, tls};
use tombolo_model::names::ServiceKey;
use tombolo_overlay::member::backoff::Backoff;
use tombolo_overlay::{DIAL_TIMEOUT, DialTarget, Overlay, Stall, cid::Kind, close_code};
use tombolo_runtime::tasks::TaskGroup;

use crate::copy::BiStream;
use crate::metrics::{BackendLabels, Metrics};
use crate::tables::Backend;

pub use connection::{Pooled, StreamLease};

/// Waiting for a stream longer than a dial and one retry helps nobody: another cluster may do better.
const ACQUIRE_TIMEOUT: Duration = DIAL_TIMEOUT.saturating_add(Duration::from_millis(500));
/// While there may be another cluster that serves: three round trips of the longest paths there are.
const IMPATIENT: Duration = Duration::from_secs(1);
/// A peer raises the stream limit of a busy connection within a round trip; then another connection is better.
const OPEN_TIMEOUT: Duration = Duration::from_millis(200);
/// After the first failed dial; handshakes are what a recovering server can bear least.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(3);
/// A service that was called this recently is worth a connection although nobody waits for one.
const RECENT: Duration = Duration::from_secs(60);

/// Kicks follow each other every 200 ms or two round trips.
pub(crate) const STALLED_KICKS: u32 = 5;

/// Endpoints with weights of their own that are worth a connection: only among those can shares be kept.
const WEIGHTED: usize = 16;

/// Bounds of one pool.
#[derive(Clone, Copy, Debug)]
pub struct PoolLimits {
    /// Distinct endpoints; twice as many connections when bulk or stream limits ask for it.
    pub connections: usize,
    pub concurrent_dials: usize,
    /// Without an open stream for this long, a connection is closed.
    pub idle: Duration,
    /// Applications' connections to all upstreams together.
    pub max_app_connections: usize,
}

impl Default for PoolLimits {
    fn default() -> Self {
        Self {
            connections: 4,
            concurrent_dials: 2,
            idle: Duration::from_secs(60),
            max_app_connections: 10_000,
        }
    }
}

/// Why there is no stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    #[error("the last dial failed ({0}); the next is not due yet")]
    Backoff(&'static str),
    #[error("the dial failed ({0})")]
    Dial(&'static str),
    #[error("no connection in time")]
    Timeout,
    #[error("no packet has been acknowledged for over a second")]
    Stalled,
    #[error("the identity can't be used for TLS")]
    Tls,
    #[error("the pool is closed")]
    Closed,
}

impl PoolError {
    /// Whether waiting longer may help.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Timeout | Self::Stalled)
    }
    /// A metric label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Backoff(_) => "backoff",
            Self::Dial(kind) => kind,
            Self::Timeout => "no_connection",
            Self::Stalled => "stalled",
            Self::Tls => "tls",
            Self::Closed => "closed",
        }
    }
}

/// What is dialled, with the TLS configuration that demands the right identity.
#[derive(Debug)]
struct Target {
    backend: Arc<Backend>,
    dial: DialTarget,
    tls: Arc<rustls::ClientConfig>,
}

#[derive(Debug)]
struct State {
    connections: Vec<Arc<Pooled>>,
    dialling: usize,
    backoff: Backoff,
    not_before: Option<Instant>,
    last_failure: Option<&'static str>,
    /// Dials kept reaching endpoints that are connected already: no use in more until then.
    no_more_endpoints_until: Option<Instant>,
    /// How often in a row they did.
    futile: u32,
    last_used: Instant,
    closed: bool,
}

/// What one pool needs of its process.
#[derive(Clone, Debug)]
pub struct PoolContext {
    pub overlay: Overlay,
    pub svid: SvidHandle,
    pub limits: PoolLimits,
    pub metrics: Metrics,
    pub tasks: TaskGroup,
}

#[derive(Debug)]
struct Inner {
    service: ServiceKey,
    labels: BackendLabels,
    context: PoolContext,
    /// Connections kept open although nothing uses them.
    warm: usize,
    target: ArcSwap<Target>,
    state: Mutex<State>,
    /// What the gauge has of this pool.
    counted: AtomicI64,
    /// Counts changes that waiters care about: a connection more, a dial failed, closed.
    changes: watch::Sender<u64>,
}

/// The connections to one service in one cluster; clones share them.
#[derive(Clone, Debug)]
pub struct Pool(Arc<Inner>);

impl Pool {
    pub fn new(
        service: ServiceKey,
        backend: Arc<Backend>,
        warm: usize,
        context: PoolContext,
    ) -> Result<Self, PoolError> {
        let target = Target::new(&context.svid, backend)?;
        let labels =
            BackendLabels { service: service.to_string(), cluster: target.backend.cluster.to_string() };
        Ok(Self(Arc::new(Inner {
            service,
            labels,
            warm: warm.min(context.limits.connections),
            context,
            target: ArcSwap::from_pointee(target),
            counted: AtomicI64::new(0),
            state: Mutex::new(State {
                connections: Vec::new(),
                dialling: 0,
                backoff: Backoff::new(FIRST_WAIT, LONGEST_WAIT),
                not_before: None,
                last_failure: None,
                no_more_endpoints_until: None,
                futile: 0,
                last_used: Instant::now(),
                closed: false,
            }),
            changes: watch::Sender::new(0),
        })))
    }

    /// The newest facts about the backend. What no longer matches them gets no more streams; a peer whose identity is not
    /// listed any more is cut.
    pub fn update(&self, backend: Arc<Backend>) -> Result<(), PoolError> {
        let old = self.0.target.load_full();
        if *old.backend == *backend {
            return Ok(());
        }
        let moved = (old.backend.tag, old.backend.handle) != (backend.tag, backend.handle);
        let identities = Arc::clone(&backend.identities);
        // The verifier holds the identities: a new configuration only when they changed.
        let tls = match old.backend.identities == identities {
            true => Arc::clone(&old.tls),
            false => Target::tls(&self.0.context.svid, &backend)?,
        };
        self.0.target.store(Arc::new(Target { dial: dial_target(&backend), backend, tls }));
        let mut state = self.lock();
        state.no_more_endpoints_until = None;
        state.futile = 0;
        for pooled in &state.connections {
            let peer = pooled.connection().identity();
            if !peer.is_some_and(|peer| identities.contains(&peer.spiffe_id)) {
                pooled
                    .connection()
                    .close(close_code::NOT_ADMITTED, "your identity does not serve this any more");
            } else if moved {
                pooled.retire();
            }
        }
        Ok(())
    }

    /// Opens a stream on the best connection, dialling one if need be. `avoid`: connections whose endpoint has just
    /// refused this very stream. `patient`: there is no other cluster to try, so a dial may take its time, and a connection
    /// whose packets have not been acknowledged for long will do.
    pub async fn stream(&self, avoid: &[usize], patient: bool) -> Result<(BiStream, StreamLease), PoolError> {
        let deadline = tokio::time::Instant::now() + if patient { ACQUIRE_TIMEOUT } else { IMPATIENT };
        let mut changes = self.0.changes.subscribe();
        let mut asked = false;
        loop {
            let picked = self.pick(avoid, &mut asked)?;
            let Some(pooled) = picked else {
                match tokio::time::timeout_at(deadline, changes.changed()).await {
                    Ok(Ok(())) => continue,
                    Ok(Err(_)) => return Err(PoolError::Closed),
                    Err(_) => return Err(PoolError::Timeout),
                }
            };
            // Whether anybody is there is being found out: what is not sent yet can still be given to another endpoint.
            let stall = pooled.connection().stall();
            if stall != Stall::NONE && !patient {
                if stall.unanswered_kicks() >= STALLED_KICKS {
                    return Err(PoolError::Stalled);
                }
                tokio::select! {
                    () = pooled.connection().stall_changed(stall) => continue,
                    changed = changes.changed() => match changed {
                        Ok(()) => continue,
                        Err(_) => return Err(PoolError::Closed),
                    },
                    () = tokio::time::sleep_until(deadline) => return Err(PoolError::Stalled),
                }
            }
            // Taken before the await: streams that are being opened count as load.
            let lease = StreamLease::new(Arc::clone(&pooled));
            match tokio::time::timeout(OPEN_TIMEOUT, pooled.connection().quic().open_bi()).await {
                Ok(Ok((send, recv))) => return Ok((BiStream::new(send, recv), lease)),
                Ok(Err(_)) => self.remove(&pooled),
                Err(_) => pooled.set_saturated(true),
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(PoolError::Timeout);
            }
        }
    }

    /// The best connection now, starting a dial where more are wanted. `None`: wait for a change. `asked`: this caller has
    /// already waited for a dial, so a failure since then is its answer.
    fn pick(&self, avoid: &[usize], asked: &mut bool) -> Result<Option<Arc<Pooled>>, PoolError> {
        let now = Instant::now();
        let mut state = self.lock();
        if state.closed {
            return Err(PoolError::Closed);
        }
        state.last_used = now;
        let target = self.0.target.load();
        let views: Vec<_> = state.connections.iter().map(|c| c.view(avoid, &target.backend)).collect();
        let picked = choice::pick(&views, rand::random()).and_then(|at| state.connections.get(at).cloned());
        let most = self.0.context.limits.connections;
        let most = if target.backend.is_weighted() { most.max(WEIGHTED) } else { most };
        let demand = choice::demand(&views, most, target.backend.healthy);
        let waiting = state.not_before.is_some_and(|t| now < t);
        if picked.is_none() && waiting && state.dialling == 0 {
            let kind = state.last_failure.unwrap_or("no_connection");
            return Err(if *asked { PoolError::Dial(kind) } else { PoolError::Backoff(kind) });
        }
        let more_endpoints = state.no_more_endpoints_until.is_none_or(|t| now >= t);
        let dial = match demand {
            choice::Demand::None => false,
            choice::Demand::AnotherEndpoint => more_endpoints,
            choice::Demand::AnyEndpoint => true,
        };
        if dial && !waiting && state.dialling < self.0.context.limits.concurrent_dials {
            let distinct = demand == choice::Demand::AnotherEndpoint;
            self.start_dial(&mut state, distinct);
        }
        if picked.is_none() && state.dialling == 0 {
            // Every connection was refused by `avoid`, and there is no other endpoint to try.
            return Err(PoolError::Dial(state.last_failure.unwrap_or("no_other_endpoint")));
        }
        *asked = true;
        Ok(picked)
    }

    /// Whether the backend seems gone: no connection and that many dials in a row failed, or every connection has had no
    /// acknowledgement for over a second.
    pub fn is_failing(&self, failed_dials: u32) -> bool {
        let state = self.lock();
        if state.connections.is_empty() {
            return state.backoff.failures() >= failed_dials;
        }
        state.connections.iter().all(|c| c.connection().stall().unanswered_kicks() >= STALLED_KICKS)
    }

    /// Live connections and streams open on them.
    pub fn usage(&self) -> (usize, u32) {
        let state = self.lock();
        (state.connections.len(), state.connections.iter().map(|c| c.open_streams()).sum())
    }

    /// Closes what has been idle for too long and keeps the warm ones up. Called about once a second.
    pub fn tend(&self) {
        let now = Instant::now();
        let idle = self.0.context.limits.idle;
        let mut state = self.lock();
        if state.closed {
            return;
        }
        let mut kept = 0;
        for pooled in &state.connections {
            let unused = pooled.idle_since(now).is_some_and(|since| since >= idle || pooled.is_retired());
            if unused && (pooled.is_retired() || kept >= self.0.warm) {
                pooled.retire();
                pooled.connection().close(close_code::IDLE, "idle");
            } else {
                kept += 1;
            }
        }
        let waiting = state.not_before.is_some_and(|t| now < t);
        // A backend that could not be dialled is tried again although nobody asks: nothing else would notice its return.
        let wanted = kept < self.0.warm || (kept == 0 && state.backoff.failures() > 0);
        if wanted && !waiting && state.dialling == 0 {
            self.start_dial(&mut state, kept > 0);
        }
    }

    /// Ends every connection; streams on them are cut.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        for pooled in state.connections.drain(..) {
            pooled.connection().close(close_code::DONE, "no longer needed");
        }
        drop(state);
        self.changed();
    }

    fn remove(&self, gone: &Arc<Pooled>) {
        let mut state = self.lock();
        state.connections.retain(|c| !Arc::ptr_eq(c, gone));
        self.count(&state);
        drop(state);
        self.changed();
    }

    fn count(&self, state: &State) {
        let open = i64::try_from(state.connections.len()).unwrap_or(i64::MAX);
        // Pools of other threads count in the same gauge.
        let more = open - self.0.counted.swap(open, Relaxed);
        self.0.context.metrics.connections.get_or_create(&self.0.labels).inc_by(more);
    }

    fn changed(&self) {
        self.0.changes.send_modify(|n| *n += 1);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Target {
    fn new(svid: &SvidHandle, backend: Arc<Backend>) -> Result<Self, PoolError> {
        Ok(Self { dial: dial_target(&backend), tls: Self::tls(svid, &backend)?, backend })
    }
    fn tls(svid: &SvidHandle, backend: &Backend) -> Result<Arc<rustls::ClientConfig>, PoolError> {
        let expected = ExpectedPeer::OneOf(Arc::clone(&backend.identities));
        tls::mesh_client_config(svid, expected).map_err(|_| PoolError::Tls)
    }
}

fn dial_target(backend: &Backend) -> DialTarget {
    DialTarget {
        kind: Kind::Service,
        tag: backend.tag,
        handle: backend.handle,
        keys: Arc::clone(&backend.keys),
    }
}
