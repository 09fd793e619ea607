//! A flow of a local application: placed at an endpoint of the service, and placed anew when that is gone.
//!
//! The choice is that of TCP connections: clusters in the order of the route, connections by the pool, but pools of their
//! own ([`crate::failover::Route::datagrams`]), because DATAGRAM frames go before streams in a packet and would starve them.
//! While a flow is being opened its datagrams go by its stream, and are kept: what refuses with the promise that nothing was
//! delivered is replaced. Once an endpoint has accepted, datagrams leave by DATAGRAM frames, straight from the listener.
//! When that endpoint is lost, refuses later, or has been silent for a second, the next datagram places the flow anew.
//! One task per flow.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;
use tombolo_model::names::ClusterName;
use tombolo_model::protocol::Protocol;
use tombolo_overlay::PeerConnection;
use tombolo_proto::flow as wire;
use tombolo_proto::stream_header::{self, MAX_HEADER_BYTES};
use tombolo_proto::v1::{FlowAccepted, Transport};

use super::demux::Sink;
use super::flow::{Activity, LocalSink, receive_stream};
use super::lane::{Lane, Sent, for_stream};
use super::metrics::{Dropped, FlowMetrics};
use super::queue::Queue;
use crate::codes;
use crate::copy::{BiStream, End, Meter, read_failed};
use crate::header;
use crate::metrics::UpstreamLabels;
use crate::outbound::{OutboundContext, UpstreamPort};
use crate::pool::{STALLED_KICKS, StreamLease};

/// As TCP connections: a rolling restart refuses at two of them at most.
const MAX_ATTEMPTS: u32 = 6;
const MAX_PER_CLUSTER: u32 = 3;
/// Whoever asked by UDP has asked again, or given up.
const PATIENCE: Duration = Duration::from_secs(8);
/// After a refusal, so that a flood to a service that denies us does not open a stream per datagram.
pub(super) const HOLD: Duration = Duration::from_secs(1);
/// With no room for others, a flow that nobody has answered ends after this silence.
const PRESSED_IDLE: Duration = Duration::from_secs(2);

/// What the listener knows of a flow.
#[derive(Debug)]
pub(super) struct Outgoing {
    lane: ArcSwapOption<Lane>,
    /// Before the flow stands, and what is too large for a DATAGRAM frame.
    queue: Queue,
    refused: AtomicBool,
    pub activity: Arc<Activity>,
    pub meter: Arc<Meter>,
    metrics: FlowMetrics,
    /// Whose it is, where a listener has flows of many.
    pub application: Option<Arc<str>>,
    /// Its address has become another application's.
    pub over: Notify,
}

impl Outgoing {
    pub fn new(
        queue: Queue,
        activity: Arc<Activity>,
        meter: Arc<Meter>,
        metrics: FlowMetrics,
        application: Option<Arc<str>>,
    ) -> Self {
        let (lane, refused, over) = (ArcSwapOption::empty(), AtomicBool::new(false), Notify::new());
        Self { lane, queue, refused, activity, meter, metrics, application, over }
    }

    /// A datagram of the application; never waits.
    pub fn take(&self, payload: &[u8]) {
        if self.refused.load(Relaxed) {
            return self.metrics.drops.count(Dropped::Refused, 1);
        }
        self.meter.sent(payload.len());
        let lane = self.lane.load();
        if lane.as_ref().is_none_or(|lane| lane.send(payload) != Sent::Yes)
            && let Some(framed) = for_stream(payload, &self.metrics)
        {
            self.metrics.drops.count(Dropped::Queue, self.queue.push(framed));
        }
    }

    /// Drops what comes from now on.
    pub fn refuse(&self, reason: Dropped) {
        self.refused.store(true, Relaxed);
        self.metrics.drops.count(reason, self.queue.clear());
    }
}

/// For the access log.
#[derive(Debug, Default)]
pub(super) struct Carried {
    pub cluster: Option<ClusterName>,
    pub peer: String,
    pub attempts: u32,
}

/// How one placement ended.
enum Placed {
    /// In order, or by silence.
    Over(&'static str),
    /// Its endpoint is gone: the next datagram goes to another.
    Lost(usize),
    Refused(&'static str),
}

/// How one attempt ended.
enum Attempt {
    Placed(Placed),
    /// Nothing reached an application there.
    Next(&'static str, usize),
}

/// Carries one flow; how it ended.
pub(super) async fn carry(
    flow: &Outgoing,
    sink: &Arc<LocalSink>,
    upstream: &UpstreamPort,
    context: &OutboundContext,
    carried: &mut Carried,
) -> &'static str {
    let mut avoid = None;
    loop {
        tokio::select! {
            () = flow.queue.filled() => {}
            reason = silence(flow, context) => return reason,
        }
        if avoid.is_some() {
            let labels = UpstreamLabels { service: upstream.service().to_string() };
            context.metrics.retries.get_or_create(&labels).inc();
        }
        let kept = Queue::new(context.udp.budget.clone());
        let placed = place(flow, sink, upstream, context, (avoid, &kept), carried).await;
        flow.lane.store(None);
        if !matches!(placed, Placed::Lost(_)) {
            flow.metrics.drops.count(Dropped::Refused, kept.clear());
        }
        match placed {
            Placed::Over(reason) => {
                flow.metrics.drops.count(Dropped::Refused, flow.queue.clear());
                return reason;
            }
            Placed::Lost(connection) => avoid = Some(connection),
            Placed::Refused(reason) => {
                flow.refuse(Dropped::Refused);
                tokio::time::sleep(HOLD).await;
                return reason;
            }
        }
    }
}

/// Ends when nothing has been sent or received for long enough.
async fn silence(flow: &Outgoing, context: &OutboundContext) -> &'static str {
    let pressed = async {
        loop {
            context.udp.pressure.notified().await;
            if !flow.activity.has_answered() && flow.activity.silence() >= PRESSED_IDLE {
                return;
            }
        }
    };
    tokio::select! {
        () = flow.activity.idle(context.udp.limits.idle, &context.drain) => End::Idle.reason(),
        () = pressed => "made_room",
    }
}

/// Finds an endpoint and stays there; `kept`: what nobody has accepted yet.
async fn place(
    flow: &Outgoing,
    sink: &Arc<LocalSink>,
    upstream: &UpstreamPort,
    context: &OutboundContext,
    (avoid, kept): (Option<usize>, &Queue),
    carried: &mut Carried,
) -> Placed {
    let Some(route) = context.routes.of(upstream.service()) else { return Placed::Refused("no_route") };
    let deadline = Instant::now() + PATIENCE;
    let (mut tried, mut patient, mut last) = (0, false, "no_backend");
    let mut refused_by: Vec<usize> = avoid.into_iter().collect();
    let mut clusters: VecDeque<_> = route.order_of(Protocol::Udp, upstream.port(), rand::random).into();
    let mut slow = VecDeque::new();
    while let Some(cluster) = clusters.pop_front().or_else(|| {
        // Nobody else serves: an outage is waited out, and who was lost may be back.
        if !std::mem::replace(&mut patient, true) {
            refused_by.clear();
        }
        slow.pop_front()
    }) {
        let Some(pool) = route.datagrams.get(&cluster) else { continue };
        carried.cluster = Some(cluster.clone());
        for _ in 0..MAX_PER_CLUSTER {
            if tried >= MAX_ATTEMPTS || Instant::now() >= deadline {
                return Placed::Refused(last);
            }
            tried += 1;
            carried.attempts += 1;
            let (mut stream, lease) = match pool.stream(&refused_by, patient).await {
                Ok(opened) => opened,
                Err(error) => {
                    last = error.kind();
                    if !patient {
                        slow.push_back(cluster);
                    }
                    break;
                }
            };
            carried.peer =
                lease.pooled().connection().identity().map(|id| id.spiffe_id.to_string()).unwrap_or_default();
            match stay(flow, sink, upstream, context, &mut stream, &lease, kept).await {
                Attempt::Placed(placed) => return placed,
                Attempt::Next(reason, connection) => {
                    last = reason;
                    refused_by.push(connection);
                }
            }
        }
    }
    tracing::info!(service = %route.service, tier = route.tier, last, "no endpoint of any cluster took the flow");
    Placed::Refused(last)
}

/// Opens the flow on a stream, and carries it there until it ends.
async fn stay(
    flow: &Outgoing,
    sink: &Arc<LocalSink>,
    upstream: &UpstreamPort,
    context: &OutboundContext,
    stream: &mut BiStream,
    lease: &StreamLease,
    kept: &Queue,
) -> Attempt {
    let (pooled, opened) = (lease.pooled(), Instant::now());
    let connection = pooled.connection();
    let id = wire::of_stream(stream.id());
    let _registered = pooled.demux().register(id, Arc::clone(sink) as Arc<dyn Sink>);
    let mut accepted = false;
    let end = {
        let (send, recv) = stream.halves();
        // Header and what was sent before; then what is, kept as long as nobody has accepted.
        let writing = async {
            let mut written = send.write(header::encode_for(upstream.port(), Transport::Udp)).await;
            for framed in kept.all() {
                if written.is_ok() {
                    written = send.write(framed).await;
                }
            }
            while written.is_ok() {
                let framed: Bytes = flow.queue.next().await;
                if flow.lane.load().is_none() {
                    kept.push(framed.clone());
                }
                written = send.write(framed).await;
                flow.metrics.to_peer.inc();
            }
            // Why is said by the other half.
            std::future::pending::<()>().await;
        };
        let reading = async {
            let mut read = BytesMut::new();
            loop {
                match stream_header::decode::<FlowAccepted>(&mut read, MAX_HEADER_BYTES) {
                    Ok(Some(FlowAccepted {})) => break,
                    Ok(None) => {}
                    Err(_) => return End::ConnectionLost,
                }
                match recv.read_some(MAX_HEADER_BYTES).await {
                    Ok(Some(chunk)) => read.extend_from_slice(&chunk),
                    Ok(None) => return End::ConnectionLost,
                    Err(error) => return read_failed(error),
                }
            }
            accepted = true;
            pooled.answered(opened.elapsed());
            kept.clear();
            let lane = Lane::new(connection.quic().clone(), id, flow.metrics.clone());
            flow.lane.store(Some(Arc::new(lane)));
            receive_stream(recv, &mut read, &**sink).await
        };
        tokio::select! {
            end = reading => end,
            () = writing => End::ConnectionLost,
            () = lost(connection) => End::ConnectionLost,
            reason = silence(flow, context) => {
                send_end(stream);
                return Attempt::Placed(Placed::Over(reason));
            }
        }
    };
    judge(end, accepted, stream, lease)
}

fn send_end(stream: &mut BiStream) {
    let (send, recv) = stream.halves();
    send.finish();
    recv.stop(codes::IDLE);
}

fn judge(end: End, accepted: bool, stream: &mut BiStream, lease: &StreamLease) -> Attempt {
    let pooled = lease.pooled();
    if end != End::Finished {
        stream.abort(codes::ABANDONED);
    }
    match end {
        End::Finished | End::Idle | End::AppReset => {
            send_end(stream);
            Attempt::Placed(Placed::Over(End::Finished.reason()))
        }
        End::ConnectionLost if accepted => Attempt::Placed(Placed::Lost(pooled.id())),
        End::ConnectionLost => Attempt::Next(End::ConnectionLost.reason(), pooled.id()),
        End::PeerReset(code) if codes::promises_nothing_delivered(code) => {
            pooled.refused();
            if [codes::DRAINING, codes::EXPIRED].map(u64::from).contains(&code.into_inner()) {
                pooled.retire();
            }
            if accepted {
                Attempt::Placed(Placed::Lost(pooled.id()))
            } else {
                Attempt::Next(codes::name(code), pooled.id())
            }
        }
        End::PeerReset(code) if code.into_inner() == u64::from(codes::ABANDONED) && accepted => {
            Attempt::Placed(Placed::Lost(pooled.id()))
        }
        End::PeerReset(code) => Attempt::Placed(Placed::Refused(codes::name(code))),
    }
}

/// Until nothing gets through any more: closed, or kick after kick unanswered. A TCP stream would wait; a datagram that is
/// lost now could be answered by another endpoint.
async fn lost(connection: &PeerConnection) {
    let silent = async {
        loop {
            let stall = connection.stall();
            if stall.unanswered_kicks() >= STALLED_KICKS {
                return;
            }
            connection.stall_changed(stall).await;
        }
    };
    tokio::select! {
        () = silent => {}
        _ = connection.closed() => {}
    }
}
