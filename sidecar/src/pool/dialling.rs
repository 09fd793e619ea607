//! Dialling for a pool: paced, each connection to another endpoint where more are wanted, back again after a loss.

use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::ConnectionError;
use tombolo_overlay::{PeerConnection, close_code};

use super::{Pool, Pooled, RECENT, State};
use crate::metrics::DialLabels;

/// Nonces tried for another endpoint: with two endpoints, four tries miss the other once in sixteen.
const DISTINCT_TRIES: u32 = 4;
/// After that, there are probably no more.
const NO_MORE_FOR: Duration = Duration::from_secs(30);
/// The same where each endpoint has a share: one that is not found has none. Twice as long each time in a row, up to that.
const WEIGHTED_TRIES: u32 = 8;
const NO_MORE_WEIGHTED_FOR: Duration = Duration::from_secs(2);
/// The peer announces its endpoint half a round trip after the handshake; on a loaded machine a little later.
const ANNOUNCE_SLACK: Duration = Duration::from_millis(100);
const ANNOUNCE_POLL: Duration = Duration::from_millis(5);
/// Connections lost at once come back over this long: 5,000 clients of a restarted server are 1,250 handshakes a second.
const RETURN_SPREAD: Duration = Duration::from_secs(4);

impl Pool {
    /// Starts a dial. `distinct`: only an endpoint without a connection will do.
    pub(super) fn start_dial(&self, state: &mut State, distinct: bool) {
        state.dialling += 1;
        let guard = Dialling(self.clone());
        self.0.context.tasks.spawn("dial", async move { guard.0.dial(distinct).await });
    }

    async fn dial(&self, distinct: bool) {
        let (tries, pause) = match self.0.target.load().backend.is_weighted() {
            true => (WEIGHTED_TRIES, NO_MORE_WEIGHTED_FOR),
            false => (DISTINCT_TRIES, NO_MORE_FOR),
        };
        for _ in 0..if distinct { tries } else { 1 } {
            if self.lock().closed {
                return;
            }
            let target = self.0.target.load_full();
            let started = Instant::now();
            let dialled = self.0.context.overlay.dial(&target.dial, Arc::clone(&target.tls)).await;
            let result = match &dialled {
                Ok(_) => "ok",
                Err(error) => error.kind(),
            };
            self.count_dial(result);
            match dialled {
                Ok(connection) => {
                    self.0.context.metrics.handshake.observe(started.elapsed().as_secs_f64());
                    if !distinct || self.is_new_endpoint(&connection).await {
                        self.adopt(connection, distinct);
                        return;
                    }
                    self.count_dial("same_endpoint");
                    connection.close(close_code::DONE, "another endpoint is wanted");
                    // Its handshake is spent; the next one should not follow on its heels.
                    let pause = Duration::from_millis(20).mul_f64(1.0 + 4.0 * rand::random::<f64>());
                    tokio::time::sleep(pause).await;
                }
                Err(error) => {
                    tracing::info!(service = %self.0.service, cluster = %target.backend.cluster, %error, "dial failed");
                    let mut state = self.lock();
                    let wait = state.backoff.failed(rand::random());
                    state.not_before = Some(Instant::now() + wait);
                    state.last_failure = Some(error.kind());
                    return;
                }
            }
        }
        let mut state = self.lock();
        let pause = (pause * (1 << state.futile.min(4))).min(NO_MORE_FOR);
        state.futile = state.futile.saturating_add(1);
        state.no_more_endpoints_until = Some(Instant::now() + pause);
    }

    /// Whether no other live connection ends at the same endpoint. One that does not announce itself counts as new.
    async fn is_new_endpoint(&self, connection: &PeerConnection) -> bool {
        let deadline = Instant::now() + 2 * connection.rtt() + ANNOUNCE_SLACK;
        let endpoint = loop {
            match connection.peer_endpoint() {
                Some(endpoint) => break endpoint,
                None if Instant::now() >= deadline || connection.is_closed() => return true,
                None => tokio::time::sleep(ANNOUNCE_POLL).await,
            }
        };
        let state = self.lock();
        let live = state.connections.iter().filter(|c| !c.is_retired() && !c.connection().is_closed());
        !live.map(|c| c.connection().peer_endpoint()).any(|known| known == Some(endpoint))
    }

    fn adopt(&self, connection: PeerConnection, distinct: bool) {
        let drops = self.0.context.metrics.udp.direction("outbound");
        let pooled = Arc::new(Pooled::new(connection, drops));
        let mut state = self.lock();
        if state.closed {
            pooled.connection().close(close_code::DONE, "no longer needed");
            return;
        }
        state.backoff.worked();
        if distinct {
            state.futile = 0;
        }
        state.not_before = None;
        state.last_failure = None;
        state.connections.push(Arc::clone(&pooled));
        self.count(&state);
        drop(state);
        self.changed();
        let pool = self.clone();
        self.0.context.tasks.spawn("pooled connection", async move {
            pooled.demux().run().await;
            let reason = pooled.connection().closed().await;
            pool.lost(&pooled, &reason);
        });
    }

    /// Takes a closed connection out, and dials another one where the service is in use.
    fn lost(&self, pooled: &Arc<Pooled>, reason: &ConnectionError) {
        self.remove(pooled);
        if matches!(reason, ConnectionError::LocallyClosed) {
            return;
        }
        tracing::debug!(service = %self.0.service, cluster = self.0.labels.cluster, %reason, "connection lost");
        if self.lock().last_used.elapsed() >= RECENT {
            return;
        }
        let pool = self.clone();
        self.0.context.tasks.spawn("dial after a loss", async move {
            tokio::time::sleep(RETURN_SPREAD.mul_f64(rand::random())).await;
            let mut state = pool.lock();
            // Whoever called meanwhile has started a dial already.
            if !state.closed && state.connections.is_empty() && state.dialling == 0 {
                pool.start_dial(&mut state, false);
            }
        });
    }

    fn count_dial(&self, result: &'static str) {
        let labels = &self.0.labels;
        let labels = DialLabels { service: labels.service.clone(), cluster: labels.cluster.clone(), result };
        self.0.context.metrics.dials.get_or_create(&labels).inc();
    }
}

/// Counts a dial in progress for as long as it is held.
struct Dialling(Pool);

impl Drop for Dialling {
    fn drop(&mut self) {
        {
            let mut state = self.0.lock();
            state.dialling = state.dialling.saturating_sub(1);
        }
        self.0.changed();
    }
}
