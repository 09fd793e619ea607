//! Inbound: streams of authenticated callers, handed to the local application.
//!
//! A connection is pinned by its handle to one importing cluster and one service ([`tombolo_overlay::Overlay`] has
//! checked that the caller's identity is of that cluster); nothing else is served on it. Each stream is authorised by the
//! access policies when it is opened, and held against them as long as it is open: a change that no longer admits it
//! resets it. When a snapshot takes the handle away, makes it mean something else, or its policies admit the caller to no
//! port, the connection is closed. When the caller's identity has ended, new streams are refused with a promise that lets
//! the caller send them elsewhere, and open ones may end; likewise while Kubernetes does not count on the pod. Tasks: one accepting, one per connection, one per stream; all
//! end with the task group or when the drain is forced.
//!
//! A caller that is denied from the start keeps its connection and is refused stream by stream: closing it would have
//! it make a handshake for each call, and hear of a lost connection instead of a denial.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use quinn::VarInt;
use tokio::sync::{Semaphore, watch};
use tombolo_model::access::Verdict;
use tombolo_model::names::ServiceKey;
use tombolo_model::protocol::Protocol;
use tombolo_overlay::{HandleClass, Overlay, PeerConnection, close_code};
use tombolo_proto::v1::Transport;
use tombolo_runtime::drain::Drain;
use tombolo_runtime::tasks::TaskGroup;

use crate::access::Admission;
use crate::agentless::Destination;
use crate::capture::pass::{Dialled, Dialler};
use crate::codes;
use crate::copy::{self, BiStream, End, IdleLimits, Meter};
use crate::header::{self, HeaderError};
use crate::metrics::{self, Held, Metrics, ServiceMetrics};
use crate::provided::Served;
use crate::udp::UdpContext;
use crate::udp::demux::Demux;
use crate::udp::metrics::FlowMetrics;

mod caller;
mod flow;
mod leaving;

pub use leaving::Leaving;

use self::caller::{Caller, identity};

/// A local application answers a connect at once; a second covers a full accept queue's retransmitted SYN.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// From resetting streams that are no longer admitted to closing their connection: the close would overtake the resets,
/// and their applications would hear of a lost connection. Nothing is served meanwhile.
const RESETS_LEAVE: Duration = Duration::from_millis(50);

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
            initial_streams: 28,
            max_streams: 1024,
            max_app_connections: 10_000,
            idle: IdleLimits::default(),
        }
    }
}

/// One local service: where each of its ports is served.
#[derive(Clone, Debug)]
pub struct LocalTarget {
    pub service: ServiceKey,
    pub ports: HashMap<(Protocol, u16), Destination>,
    pub metrics: ServiceMetrics,
    pub flows: FlowMetrics,
    pub leaving: Leaving,
}

/// What every inbound stream needs of the process.
#[derive(Clone, Debug)]
pub struct InboundContext {
    pub limits: InboundLimits,
    /// Held one per open stream: all of them free means that nothing is open.
    pub slots: Arc<Semaphore>,
    /// Past the rules that capture connections.
    pub dialler: Dialler,
    pub udp: UdpContext,
    pub metrics: Metrics,
    pub drain: Drain,
    pub tasks: TaskGroup,
}

/// Everything a stream needs, shared by all of them.
#[derive(Debug)]
struct Shared {
    services: Served,
    context: InboundContext,
}

impl Shared {
    /// What a connection is for, as it is served now.
    fn target(&self, connection: &PeerConnection) -> Option<Arc<LocalTarget>> {
        self.services.load().get(&**connection.service()?).cloned()
    }
}

/// Accepts connections of the overlay and serves their streams.
#[derive(Debug)]
pub struct InboundTask {
    shared: Arc<Shared>,
    overlay: Overlay,
    admitted: watch::Receiver<Arc<Admission>>,
}

impl InboundTask {
    pub fn new(
        overlay: Overlay,
        services: Served,
        admitted: watch::Receiver<Arc<Admission>>,
        context: InboundContext,
    ) -> Self {
        Self { shared: Arc::new(Shared { services, context }), overlay, admitted }
    }

    /// Until the overlay is closed. Streams that come while draining are refused one by one, so that their callers go
    /// elsewhere at once.
    pub async fn run(self) {
        while let Some(connection) = self.overlay.accept().await {
            let (shared, admitted) = (Arc::clone(&self.shared), self.admitted.clone());
            self.shared
                .context
                .tasks
                .spawn("inbound connection", serve_connection(shared, connection, admitted));
        }
    }
}

async fn serve_connection(
    shared: Arc<Shared>,
    connection: PeerConnection,
    mut admitted: watch::Receiver<Arc<Admission>>,
) {
    if connection.class() != HandleClass::Mesh {
        connection.close(close_code::NOT_ADMITTED, "this is no federator");
        return;
    }
    let Some(mut target) = shared.target(&connection) else {
        connection.close(close_code::NOT_ADMITTED, "the service is not served here");
        return;
    };
    // Seen from here on: what is told later is a change.
    if !Arc::clone(&admitted.borrow_and_update()).admits(&connection) {
        return gone(&connection);
    }
    let _counted = Held::new(&shared.context.metrics.inbound_connections);
    let open = Arc::new(AtomicU32::new(0));
    let mut limit = shared.context.limits.initial_streams;
    let mut close_at = None;
    let demux = Demux::new(connection.quic().clone(), target.flows.drops.clone());
    let datagrams = demux.run();
    tokio::pin!(datagrams);
    loop {
        tokio::select! {
            () = &mut datagrams => return,
            stream = connection.quic().accept_bi() => {
                let Ok((send, recv)) = stream else { return };
                // Its ports may have changed since.
                target = shared.target(&connection).unwrap_or(target);
                let now_open = open.fetch_add(1, Relaxed) + 1;
                if now_open.saturating_mul(4) >= limit.saturating_mul(3) && limit < shared.context.limits.max_streams {
                    limit = limit.saturating_mul(2).min(shared.context.limits.max_streams);
                    connection.quic().set_max_concurrent_bi_streams(VarInt::from_u32(limit));
                }
                let serve = serve_stream(
                    Arc::clone(&shared),
                    Caller { connection: connection.clone(), admitted: admitted.clone(), demux: demux.clone() },
                    Arc::clone(&target),
                    BiStream::new(send, recv),
                    OpenStream(Arc::clone(&open)),
                );
                shared.context.tasks.spawn("inbound stream", serve);
            }
            changed = admitted.changed() => {
                if changed.is_err() {
                    return;
                }
                let admission = Arc::clone(&admitted.borrow_and_update());
                if !admission.admits(&connection) {
                    return gone(&connection);
                }
                let denied = !any_port_admits(&admission, &connection, &target);
                close_at = denied.then(|| tokio::time::Instant::now() + RESETS_LEAVE);
            }
            () = sleep_until(close_at) => {
                tracing::info!(service = ?connection.service(), peer = identity(&connection),
                    "no access policy admits the caller any more: its connection is closed");
                connection.close(close_code::NOT_ADMITTED, "access policies no longer admit you");
                return;
            }
        }
    }
}

/// The handle is gone or means something else.
fn gone(connection: &PeerConnection) {
    tracing::info!(service = ?connection.service(), importer = ?connection.importer(),
        "the export is gone: its caller's connection is closed");
    connection.close(close_code::NOT_ADMITTED, "the service is no longer exported to you");
}

/// Whether a caller may use any port of what its connection is for.
fn any_port_admits(admission: &Admission, connection: &PeerConnection, target: &LocalTarget) -> bool {
    connection.identity().is_some_and(|caller| {
        target.ports.keys().any(|(_, port)| admission.access.decide(&caller, &target.service, *port).allowed)
    })
}

async fn sleep_until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Counts a stream as open on its connection for as long as it is held.
struct OpenStream(Arc<AtomicU32>);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// For the access log.
#[derive(Default)]
struct Carried {
    port: u16,
    protocol: Protocol,
    verdict: Option<Verdict>,
}

async fn serve_stream(
    shared: Arc<Shared>,
    mut caller: Caller,
    target: Arc<LocalTarget>,
    mut stream: BiStream,
    _open: OpenStream,
) {
    let started = Instant::now();
    let metrics = &target.metrics;
    let meter = Arc::new(Meter::new(metrics.sent.clone(), metrics.received.clone(), None));
    let _counted = Held::new(&metrics.open);
    let mut carried = Carried::default();
    // Refused before its header is awaited: a draining process holds nothing for new callers. Also one whose drain is over, for
    // as long as it hears anybody: what comes then was never begun, and is not to be cut.
    let sent_away =
        shared.context.drain.is_draining() || target.leaving.sends_away(tokio::time::Instant::now());
    let reason = tokio::select! {
        biased;
        () = std::future::ready(()), if sent_away => {
            stream.abort(codes::DRAINING);
            codes::name(VarInt::from_u32(codes::DRAINING))
        }
        () = shared.context.drain.forced() => {
            stream.abort(codes::CUT_BY_DRAIN);
            "cut_by_drain"
        }
        reason = carry(&shared, &mut caller, &target, &mut stream, &meter, &mut carried) => reason,
    };
    metrics.ended(reason);
    let Carried { port, protocol, verdict } = carried;
    let peer = caller.connection.identity();
    tracing::info!(
        target: "access",
        direction = "inbound",
        protocol = (protocol == Protocol::Udp).then_some("udp"),
        service = caller.connection.service().map_or("", |s| s),
        port,
        peer = peer.as_ref().map_or("", |id| id.spiffe_id.as_str()),
        allowed = verdict.as_ref().map(|verdict| verdict.allowed),
        decided_by = verdict.as_ref().map(|verdict| verdict.decided_by.to_string()),
        would_deny = verdict.as_ref().map(|v| v.dry_run_denials.join(",")).filter(|names| !names.is_empty()),
        sent_bytes = meter.bytes_sent(),
        received_bytes = meter.bytes_received(),
        duration_ms = started.elapsed().as_millis() as u64,
        reason,
        "stream"
    );
}

/// Authorises a stream that has just been opened, and counts what was decided.
fn authorise(
    shared: &Shared,
    caller: &mut Caller,
    target: &LocalTarget,
    carried: &mut Carried,
) -> Option<u32> {
    let Some(verdict) = caller.verdict(&target.service, carried.port) else {
        return Some(codes::NOT_SERVED);
    };
    let service = target.service.to_string();
    let counted = if verdict.allowed { metrics::ALLOWED } else { metrics::DENIED };
    shared.context.metrics.count_access(&service, counted, verdict.decided_by.policy());
    for policy in &verdict.dry_run_denials {
        shared.context.metrics.count_access(&service, metrics::WOULD_DENY, policy);
    }
    let refused = (!verdict.allowed).then_some(codes::DENIED);
    carried.verdict = Some(verdict);
    refused
}

/// The first that accepts of those that are in order.
async fn dial(dialler: &Dialler, destination: &Destination) -> Option<Dialled> {
    for address in destination.candidates() {
        match dialler.connect(address, CONNECT_TIMEOUT).await {
            Ok(dialled) => return Some(dialled),
            Err(error) => tracing::debug!(%error, %address, "the application did not accept"),
        }
    }
    None
}

/// Serves one stream to its end, and says how it ended.
async fn carry(
    shared: &Shared,
    caller: &mut Caller,
    target: &LocalTarget,
    stream: &mut BiStream,
    meter: &Arc<Meter>,
    carried: &mut Carried,
) -> &'static str {
    let refuse = |stream: &mut BiStream, code| {
        stream.abort(code);
        codes::name(VarInt::from_u32(code))
    };
    if caller.connection.expired() {
        return refuse(stream, codes::EXPIRED);
    }
    let opened = match header::read(stream.halves().1).await {
        Ok(opened) => opened,
        Err(HeaderError::Stream(end)) => {
            stream.abort(codes::ABANDONED);
            return end.reason();
        }
        Err(error) => {
            tracing::debug!(%error, "stream refused");
            return refuse(stream, codes::BAD_HEADER);
        }
    };
    carried.port = opened.port;
    carried.protocol = match opened.transport {
        Transport::Tcp => Protocol::Tcp,
        Transport::Udp => Protocol::Udp,
    };
    // First: who is not admitted is told nothing about ports and applications.
    if let Some(code) = authorise(shared, caller, target, carried) {
        return refuse(stream, code);
    }
    let Some(destination) = target.ports.get(&(carried.protocol, opened.port)) else {
        return refuse(stream, codes::UNKNOWN_PORT);
    };
    if carried.protocol == Protocol::Udp {
        let Some(address) = destination.candidates().first().copied() else {
            return refuse(stream, codes::CONNECT_REFUSED);
        };
        return flow::carry(shared, caller, target, address, stream, opened, meter, carried).await;
    }
    let Ok(_slot) = Arc::clone(&shared.context.slots).try_acquire_owned() else {
        return refuse(stream, codes::OVERLOADED);
    };
    let Some(dialled) = dial(&shared.context.dialler, destination).await else {
        return refuse(stream, codes::CONNECT_REFUSED);
    };
    let (tcp, _known) = dialled.into_parts();
    // Small answers must not wait for an acknowledgement of the ones before.
    let _ = tcp.set_nodelay(true);
    let end = tokio::select! {
        // First: not one more byte for whom no policy admits any more.
        biased;
        verdict = caller.revoked(&target.service, opened.port) => Err(verdict),
        end = copy::copy(&tcp, stream, opened.early, false, meter, None, &shared.context.limits.idle) => Ok(end),
    };
    match end {
        Ok(End::Finished) => End::Finished.reason(),
        Ok(end) => {
            copy::abort(tcp);
            end.reason()
        }
        Err(verdict) => {
            copy::abort(tcp);
            let policy = verdict.decided_by.policy();
            shared.context.metrics.count_access(&target.service.to_string(), metrics::CUT, policy);
            carried.verdict = Some(verdict);
            refuse(stream, codes::CUT_BY_POLICY)
        }
    }
}
