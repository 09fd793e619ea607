//! Inbound: streams of authenticated callers, handed to the local application.
//!
//! A connection is pinned by its handle to one importing cluster and one service ([`tombolo_overlay::Overlay`] has
//! checked that the caller's identity is of that cluster); nothing else is served on it. When a snapshot takes the
//! handle away, or makes it mean something else, the connection is closed. When the caller's identity has ended, new streams
//! are refused with a promise that lets the caller send them elsewhere, and open ones may end. Tasks: one accepting, one per connection, one
//! per stream; all end with the task group or when the drain is forced.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use quinn::VarInt;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tombolo_overlay::{HandleClass, Inbound, Overlay, PeerConnection, close_code};
use tombolo_runtime::drain::Drain;
use tombolo_runtime::tasks::TaskGroup;

use crate::codes;
use crate::copy::{self, BiStream, End, IdleLimits, Meter};
use crate::header::{self, HeaderError};
use crate::metrics::{Held, Metrics, ServiceMetrics};

/// A local application answers a connect at once; a second covers a full accept queue's retransmitted SYN.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Bounds of what callers may make this process hold.
#[derive(Clone, Copy, Debug)]
pub struct InboundLimits {
    /// Streams per connection at first: quinn allocates for them eagerly.
    pub initial_streams: u32,
    /// What a connection that uses its streams is raised to, doubling: 141 KB each way at 1024.
    pub max_streams: u32,
    /// Connections to local applications, all services together.
    pub max_app_connections: usize,
    pub idle: IdleLimits,
}

impl Default for InboundLimits {
    fn default() -> Self {
        Self {
            initial_streams: 100,
            max_streams: 1024,
            max_app_connections: 10_000,
            idle: IdleLimits::default(),
        }
    }
}

/// One local service: where each of its ports is served.
#[derive(Clone, Debug)]
pub struct LocalTarget {
    pub ports: HashMap<u16, SocketAddr>,
    pub metrics: ServiceMetrics,
}

/// Everything a stream needs, shared by all of them.
#[derive(Debug)]
struct Shared {
    services: HashMap<Arc<str>, Arc<LocalTarget>>,
    limits: InboundLimits,
    slots: Arc<Semaphore>,
    metrics: Metrics,
    drain: Drain,
    tasks: TaskGroup,
}

/// Accepts connections of the overlay and serves their streams.
#[derive(Debug)]
pub struct InboundTask {
    shared: Arc<Shared>,
    overlay: Overlay,
    admitted: watch::Receiver<Arc<Inbound>>,
}

impl InboundTask {
    pub fn new(
        overlay: Overlay,
        services: HashMap<Arc<str>, Arc<LocalTarget>>,
        admitted: watch::Receiver<Arc<Inbound>>,
        limits: InboundLimits,
        metrics: Metrics,
        drain: Drain,
        tasks: TaskGroup,
    ) -> Self {
        let slots = Arc::new(Semaphore::new(limits.max_app_connections));
        Self {
            shared: Arc::new(Shared { services, limits, slots, metrics, drain, tasks }),
            overlay,
            admitted,
        }
    }

    /// Held one per open stream: all of them free means that nothing is open.
    pub fn slots(&self) -> Arc<Semaphore> {
        Arc::clone(&self.shared.slots)
    }

    /// Until the overlay is closed. Streams that come while draining are refused one by one, so that their callers go
    /// elsewhere at once.
    pub async fn run(self) {
        while let Some(connection) = self.overlay.accept().await {
            let (shared, admitted) = (Arc::clone(&self.shared), self.admitted.clone());
            self.shared.tasks.spawn("inbound connection", serve_connection(shared, connection, admitted));
        }
    }
}

/// Whether the handle of a live connection still means what the connection was admitted for.
fn still_admitted(connection: &PeerConnection, inbound: &Inbound) -> bool {
    let Some(handle) = connection.handle().and_then(|handle| inbound.handles.get(&handle)) else {
        return false;
    };
    handle.class == HandleClass::Mesh
        && connection.service() == Some(&handle.service)
        && connection.importer() == handle.importer.as_ref()
}

async fn serve_connection(
    shared: Arc<Shared>,
    connection: PeerConnection,
    mut admitted: watch::Receiver<Arc<Inbound>>,
) {
    if connection.class() != HandleClass::Mesh {
        connection.close(close_code::NOT_ADMITTED, "this is no federator");
        return;
    }
    let Some(target) = connection.service().and_then(|service| shared.services.get(service)).cloned() else {
        connection.close(close_code::NOT_ADMITTED, "the service is not served here");
        return;
    };
    let _counted = Held::new(&shared.metrics.inbound_connections);
    let open = Arc::new(AtomicU32::new(0));
    let mut limit = shared.limits.initial_streams;
    loop {
        tokio::select! {
            stream = connection.quic().accept_bi() => {
                let Ok((send, recv)) = stream else { return };
                let now_open = open.fetch_add(1, Relaxed) + 1;
                if now_open.saturating_mul(4) >= limit.saturating_mul(3) && limit < shared.limits.max_streams {
                    limit = limit.saturating_mul(2).min(shared.limits.max_streams);
                    connection.quic().set_max_concurrent_bi_streams(VarInt::from_u32(limit));
                }
                let serve = serve_stream(
                    Arc::clone(&shared),
                    connection.clone(),
                    Arc::clone(&target),
                    BiStream::new(send, recv),
                    OpenStream(Arc::clone(&open)),
                );
                shared.tasks.spawn("inbound stream", serve);
            }
            changed = admitted.changed() => {
                if changed.is_err() {
                    return;
                }
                if !still_admitted(&connection, &admitted.borrow_and_update()) {
                    tracing::info!(service = ?connection.service(), importer = ?connection.importer(),
                        "the export is gone: its caller's connection is closed");
                    connection.close(close_code::NOT_ADMITTED, "the service is no longer exported to you");
                    return;
                }
            }
        }
    }
}

/// Counts a stream as open on its connection for as long as it is held.
struct OpenStream(Arc<AtomicU32>);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

async fn serve_stream(
    shared: Arc<Shared>,
    connection: PeerConnection,
    target: Arc<LocalTarget>,
    mut stream: BiStream,
    _open: OpenStream,
) {
    let started = Instant::now();
    let metrics = &target.metrics;
    let meter = Meter::new(metrics.sent.clone(), metrics.received.clone(), None);
    let _counted = Held::new(&metrics.open);
    let (port, reason) = tokio::select! {
        biased;
        () = shared.drain.forced() => {
            stream.abort(codes::CUT_BY_DRAIN);
            (0, "cut_by_drain")
        }
        served = carry(&shared, &target, &connection, &mut stream, &meter) => served,
    };
    metrics.ended(reason);
    let peer = connection.identity();
    tracing::info!(
        target: "access",
        direction = "inbound",
        service = connection.service().map_or("", |s| s),
        port,
        peer = peer.as_ref().map_or("", |id| id.spiffe_id.as_str()),
        sent_bytes = meter.bytes_sent(),
        received_bytes = meter.bytes_received(),
        duration_ms = started.elapsed().as_millis() as u64,
        reason,
        "stream"
    );
}

/// Serves one stream to its end; what it was for and how it ended.
async fn carry(
    shared: &Shared,
    target: &LocalTarget,
    connection: &PeerConnection,
    stream: &mut BiStream,
    meter: &Meter,
) -> (u16, &'static str) {
    let refuse = |stream: &mut BiStream, port, code| {
        stream.abort(code);
        (port, codes::name(VarInt::from_u32(code)))
    };
    // Refused before its header is awaited: a draining process holds nothing for new callers.
    if shared.drain.is_draining() {
        return refuse(stream, 0, codes::DRAINING);
    }
    if connection.expired() {
        return refuse(stream, 0, codes::EXPIRED);
    }
    let opened = match header::read(stream.halves().1).await {
        Ok(opened) => opened,
        Err(HeaderError::Stream(end)) => {
            stream.abort(codes::ABANDONED);
            return (0, end.reason());
        }
        Err(error) => {
            tracing::debug!(%error, "stream refused");
            return refuse(stream, 0, codes::BAD_HEADER);
        }
    };
    let port = opened.port;
    let Some(address) = target.ports.get(&port) else {
        return refuse(stream, port, codes::UNKNOWN_PORT);
    };
    let Ok(_slot) = Arc::clone(&shared.slots).try_acquire_owned() else {
        return refuse(stream, port, codes::OVERLOADED);
    };
    let tcp = match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
        Ok(Ok(tcp)) => tcp,
        Ok(Err(error)) => {
            tracing::debug!(%error, %address, "the local application did not accept");
            return refuse(stream, port, codes::CONNECT_REFUSED);
        }
        Err(_) => {
            tracing::debug!(%address, "the local application did not answer");
            return refuse(stream, port, codes::CONNECT_REFUSED);
        }
    };
    // Small answers must not wait for an acknowledgement of the ones before.
    let _ = tcp.set_nodelay(true);
    let end = copy::copy(&tcp, stream, opened.early, false, meter, None, &shared.limits.idle).await;
    if end != End::Finished {
        copy::abort(tcp);
    }
    (port, end.reason())
}
