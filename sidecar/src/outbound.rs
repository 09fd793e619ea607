//! Outbound: explicit listeners for upstream services (captured connections come from [`crate::capture`]), each
//! application connection carried to an endpoint of the service.
//!
//! The stream's header and the application's first bytes leave together, without waiting for an answer. What cannot be
//! dialled, or refuses with the promise that nothing reached the application ([`crate::codes`]), is replaced: another
//! endpoint, the next cluster of the tier, the next tier. The bytes sent so far are kept for that until the first answer
//! or 64 KiB ([`Replay`]). Tasks: one per listener, one per application connection.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::protocol::Protocol;
use tombolo_runtime::drain::Drain;
use tombolo_runtime::tasks::TaskGroup;

use crate::codes;
use crate::copy::{self, BiStream, End, IdleLimits, Meter, Replay};
use crate::failover::{Route, Routes};
use crate::header;
use crate::listening::accept_until_drained;
use crate::metrics::{Held, Metrics, ServiceMetrics, UpstreamLabels};
use crate::pool::{Pool, PoolError, StreamLease};
use crate::udp::UdpContext;

/// Endpoints tried for one connection: a rolling restart refuses at two of them at most.
const MAX_ATTEMPTS: u32 = 6;
/// Endpoints of one cluster that may refuse before the next cluster is asked.
const MAX_PER_CLUSTER: u32 = 3;
/// An application that waits longer than this for its connection has given up.
const PATIENCE: Duration = Duration::from_secs(8);
/// Routes are made from a configuration within the same turn of the runtime.
const ROUTE_STEP: Duration = Duration::from_millis(5);

/// What every outbound connection needs.
#[derive(Clone, Debug)]
pub struct OutboundContext {
    pub routes: Routes,
    pub idle: IdleLimits,
    /// Bounds application connections, all upstreams together.
    pub slots: Arc<Semaphore>,
    pub udp: UdpContext,
    pub metrics: Metrics,
    pub drain: Drain,
    pub tasks: TaskGroup,
}

impl OutboundContext {
    /// Waits until there is a route to the service.
    pub(crate) async fn routed(&self, service: &ServiceKey) {
        while self.routes.of(service).is_none() {
            tokio::time::sleep(ROUTE_STEP).await;
        }
    }
}

/// Accepts applications' connections to one port of one upstream.
#[derive(Debug)]
pub struct UpstreamTask {
    listener: TcpListener,
    upstream: Arc<UpstreamPort>,
    context: OutboundContext,
}

/// One port of one upstream, however its connections come.
#[derive(Debug)]
pub(crate) struct UpstreamPort {
    service: ServiceKey,
    port: u16,
    metrics: ServiceMetrics,
}

impl UpstreamPort {
    pub fn new(service: ServiceKey, port: u16, metrics: &Metrics) -> Self {
        let metrics = metrics.service("outbound", &service.to_string());
        Self { service, port, metrics }
    }
    pub fn service(&self) -> &ServiceKey {
        &self.service
    }
    pub fn port(&self) -> u16 {
        self.port
    }
    pub fn metrics(&self) -> &ServiceMetrics {
        &self.metrics
    }
}

impl UpstreamTask {
    pub fn new(listener: TcpListener, service: ServiceKey, port: u16, context: OutboundContext) -> Self {
        let upstream = Arc::new(UpstreamPort::new(service, port, &context.metrics));
        Self { listener, upstream, context }
    }

    /// Until the drain starts: then the listener closes, and what is open goes on.
    pub async fn run(self) {
        let Self { listener, upstream, context } = self;
        accept_until_drained(listener, &context.drain, |tcp, from| start(tcp, from, &upstream, &context, ()))
            .await;
    }
}

/// Carries one application's connection; `held` is kept until it has ended.
pub(crate) fn start(
    tcp: TcpStream,
    from: SocketAddr,
    upstream: &Arc<UpstreamPort>,
    context: &OutboundContext,
    held: impl Send + 'static,
) {
    let Ok(slot) = Arc::clone(&context.slots).try_acquire_owned() else {
        return refuse(tcp, upstream, "overloaded");
    };
    let (upstream, context) = (Arc::clone(upstream), context.clone());
    let tasks = context.tasks.clone();
    tasks.spawn("outbound connection", async move {
        serve(tcp, from, &upstream, context).await;
        drop((slot, held));
    });
}

/// Resets one application's connection.
pub(crate) fn refuse(tcp: TcpStream, upstream: &UpstreamPort, reason: &'static str) {
    upstream.metrics.ended(reason);
    copy::abort(tcp);
}

async fn serve(tcp: TcpStream, from: SocketAddr, upstream: &UpstreamPort, context: OutboundContext) {
    let started = Instant::now();
    let _counted = Held::new(&upstream.metrics.open);
    let _ = tcp.set_nodelay(true);
    let mut carried = Carried::default();
    let reason = tokio::select! {
        biased;
        () = context.drain.forced() => "cut_by_drain",
        reason = carry(&tcp, upstream, &context, &mut carried) => reason,
    };
    // Whatever did not end in order must not look whole to the application.
    if reason != End::Finished.reason() {
        copy::abort(tcp);
    }
    upstream.metrics.ended(reason);
    tracing::info!(
        target: "access",
        direction = "outbound",
        service = %upstream.service,
        port = upstream.port,
        client = %from,
        cluster = carried.cluster.as_ref().map_or("", ClusterName::as_str),
        peer = carried.peer,
        attempts = carried.attempts,
        sent_bytes = carried.sent,
        received_bytes = carried.received,
        duration_ms = started.elapsed().as_millis() as u64,
        reason,
        "stream"
    );
}

/// For the access log.
#[derive(Debug, Default)]
struct Carried {
    cluster: Option<ClusterName>,
    peer: String,
    attempts: u32,
    sent: u64,
    received: u64,
}

/// How one attempt ended.
enum Attempt {
    /// With or without success: the application has been given what there is.
    Over(&'static str),
    /// Nothing reached an application: try again elsewhere. The connection refused this stream.
    Refused(&'static str, usize),
    /// Nothing can be reached in this cluster.
    Unavailable(PoolError),
}

/// What one application connection's attempts have in common.
#[derive(Default)]
struct Tries {
    replay: Replay,
    /// Connections whose endpoint has refused it.
    refused_by: Vec<usize>,
    /// There is no other cluster: a slow dial or a stalled connection is better than none.
    patient: bool,
}

async fn carry(
    tcp: &TcpStream,
    upstream: &UpstreamPort,
    context: &OutboundContext,
    carried: &mut Carried,
) -> &'static str {
    let Some(route) = context.routes.of(&upstream.service) else { return "no_route" };
    let order = route.order_of(Protocol::Tcp, upstream.port, rand::random);
    let mut tries = Tries::default();
    let deadline = Instant::now() + PATIENCE;
    let mut last = "no_backend";
    let mut slow = VecDeque::new();
    let mut clusters: VecDeque<_> = order.into();
    // Where nobody else serves, an outage is waited out: connections outlive it.
    while let Some(cluster) = clusters.pop_front().or_else(|| {
        tries.patient = true;
        slow.pop_front()
    }) {
        let Some(pool) = route.pools.get(&cluster) else { continue };
        carried.cluster = Some(cluster.clone());
        for _ in 0..MAX_PER_CLUSTER {
            if carried.attempts >= MAX_ATTEMPTS || Instant::now() >= deadline {
                return last;
            }
            if carried.attempts > 0 {
                let labels = UpstreamLabels { service: upstream.service.to_string() };
                context.metrics.retries.get_or_create(&labels).inc();
            }
            carried.attempts += 1;
            match attempt(tcp, upstream, context, pool, &tries, carried).await {
                Attempt::Over(reason) => return reason,
                Attempt::Refused(reason, connection) => {
                    last = reason;
                    tries.refused_by.push(connection);
                }
                Attempt::Unavailable(error) => {
                    last = error.kind();
                    if error.is_passing() {
                        slow.push_back(cluster);
                    }
                    break;
                }
            }
        }
    }
    log_exhausted(&route, last);
    last
}

fn log_exhausted(route: &Route, last: &'static str) {
    tracing::info!(service = %route.service, tier = route.tier, last, "no endpoint of any cluster took the connection");
}

async fn attempt(
    tcp: &TcpStream,
    upstream: &UpstreamPort,
    context: &OutboundContext,
    pool: &Pool,
    tries: &Tries,
    carried: &mut Carried,
) -> Attempt {
    let Tries { replay, refused_by, patient } = tries;
    let (mut stream, lease) = match pool.stream(refused_by, *patient).await {
        Ok(opened) => opened,
        Err(error) => return Attempt::Unavailable(error),
    };
    let connection = lease.pooled().connection();
    carried.peer = connection.identity().map(|id| id.spiffe_id.to_string()).unwrap_or_default();
    let opened = Instant::now();
    let metrics = &upstream.metrics;
    let bulk = Arc::clone(lease.pooled().bulk_streams());
    let meter = Meter::new(metrics.sent.clone(), metrics.received.clone(), Some(bulk));
    let kept = replay.kept().unwrap_or_default();
    let end = match resend(&mut stream, upstream.port, &kept.chunks).await {
        Ok(()) => {
            let idle = &context.idle;
            copy::copy(tcp, &mut stream, Bytes::new(), kept.ended, &meter, Some(replay), idle).await
        }
        Err(end) => end,
    };
    if let Some(after) = meter.first_answer(opened) {
        lease.pooled().answered(after);
    }
    // What was replayed counts once.
    carried.sent += meter.bytes_sent();
    carried.received += meter.bytes_received();
    judge(end, replay, &lease)
}

/// Header and kept bytes; they fit any peer's window (64 KiB).
async fn resend(stream: &mut BiStream, port: u16, chunks: &[Bytes]) -> Result<(), End> {
    let (send, _) = stream.halves();
    let mut result = send.write(header::encode(port)).await;
    for chunk in chunks {
        if result.is_ok() {
            result = send.write(chunk.clone()).await;
        }
    }
    let end = match result {
        Ok(()) => return Ok(()),
        Err(quinn::WriteError::Stopped(code)) => End::PeerReset(code),
        Err(_) => End::ConnectionLost,
    };
    stream.abort(codes::ABANDONED);
    Err(end)
}

/// Whether the end of an attempt leaves room for another one.
fn judge(end: End, replay: &Replay, lease: &StreamLease) -> Attempt {
    let kept = replay.kept();
    let retry = match (&end, &kept) {
        (End::PeerReset(code), Some(_)) => codes::promises_nothing_delivered(*code),
        // The application has said nothing yet: whoever was connected has lost nothing.
        (End::ConnectionLost, Some(kept)) => kept.bytes() == 0 && !kept.ended,
        _ => false,
    };
    if let End::PeerReset(code) = &end
        && codes::promises_nothing_delivered(*code)
    {
        lease.pooled().refused();
        if [codes::DRAINING, codes::EXPIRED].map(u64::from).contains(&code.into_inner()) {
            lease.pooled().retire();
        }
    }
    if retry { Attempt::Refused(end.reason(), lease.pooled().id()) } else { Attempt::Over(end.reason()) }
}
