//! Takes datagrams of local applications at one address, explicit or captured, and gives each to its flow.
//!
//! One task per listener and thread; it is the one writer of its flow table, but for flows that end. A datagram of a flow
//! that stands goes straight to its connection; the first of a new one starts the flow's task, if there is room. While there
//! is none, flows that nobody has answered are asked to make some, once a second.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tombolo_model::names::ClusterName;

use super::flow::{Activity, LocalSink};
use super::metrics::{Dropped, Drops};
use super::outbound::{self, Carried, HOLD, Outgoing};
use super::queue::Queue;
use super::socket::{Received, Socket};
use crate::capture::CapturedContext;
use crate::capture::metrics::Outcome;
use crate::copy::Meter;
use crate::listening::ACCEPT_PAUSE;
use crate::metrics::Held;
use crate::outbound::{OutboundContext, UpstreamPort};

/// Batches before others of the thread get their turn: 128 datagrams.
const TURN: u32 = 4;
const PRESSURE_EVERY: Duration = Duration::from_secs(1);

/// Whose datagrams, and where they were sent: without a port where that is the listener's.
type Ends = (SocketAddr, SocketAddr);
type Table = Arc<Mutex<HashMap<Ends, Arc<Outgoing>>>>;

/// How datagrams come.
#[derive(Clone, Debug)]
pub(crate) enum Way {
    /// To a listener of its own.
    Upstream(Arc<UpstreamPort>),
    /// By the machine's rules.
    Captured(Arc<CapturedContext>),
}

/// Serves one socket.
#[derive(Debug)]
pub(crate) struct DatagramTask {
    socket: Arc<Socket>,
    way: Way,
    context: Arc<OutboundContext>,
    flows: Table,
    drops: Drops,
    pressed: Option<Instant>,
}

impl DatagramTask {
    pub fn new(socket: Socket, way: Way, context: OutboundContext) -> Self {
        let drops = context.udp.metrics.direction("outbound");
        Self {
            socket: Arc::new(socket),
            way,
            context: Arc::new(context),
            flows: Table::default(),
            drops,
            pressed: None,
        }
    }

    /// Until the drain starts; flows that are open go on until they are silent.
    pub async fn run(mut self) {
        let (drain, socket) = (self.context.drain.clone(), Arc::clone(&self.socket));
        let receive = async {
            loop {
                let mut turn = 0;
                let mut result = socket.readable().await;
                while result.is_ok() && turn < TURN {
                    result = socket.receive(|datagram| self.take(datagram));
                    turn += 1;
                }
                match result {
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                        tracing::warn!(%error, "datagrams of applications can't be received");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                    _ => tokio::task::yield_now().await,
                }
            }
        };
        tokio::select! {
            () = receive => {}
            () = drain.started() => {}
        }
    }

    fn take(&mut self, datagram: Received<'_>) {
        let ends = (datagram.from, datagram.to);
        let flow = lock(&self.flows).get(&ends).cloned();
        if let Some(flow) = flow.or_else(|| self.open(ends)) {
            flow.activity.touch();
            flow.take(datagram.payload);
        }
    }

    fn open(&mut self, ends: Ends) -> Option<Arc<Outgoing>> {
        let Ok(slot) = Arc::clone(&self.context.udp.outbound).try_acquire_owned() else {
            self.drops.count(Dropped::FlowsFull, 1);
            self.press();
            return None;
        };
        let (upstream, sink_socket) = match self.place(ends.1) {
            Ok(placed) => placed,
            Err(reason) => {
                self.drops.count(reason, 1);
                return None;
            }
        };
        let service = upstream.service().to_string();
        let metrics = self.context.udp.metrics.service("outbound", &service);
        let streams = upstream.metrics();
        let meter = Arc::new(Meter::new(streams.sent.clone(), streams.received.clone(), None));
        let activity = Arc::new(Activity::new());
        let queue = Queue::new(self.context.udp.budget.clone());
        let sink = LocalSink {
            to: ends.0,
            // What the answer comes from: the socket's own address where that is bound to one.
            from: (!self.is_captured() && !ends.1.ip().is_unspecified()).then_some(ends.1.ip()),
            socket: sink_socket,
            activity: Arc::clone(&activity),
            meter: Arc::clone(&meter),
            metrics: metrics.clone(),
            refused: Notify::new(),
        };
        let opened = Held::new(&metrics.open);
        let flow = Arc::new(Outgoing::new(queue, activity, meter, metrics));
        lock(&self.flows).insert(ends, Arc::clone(&flow));
        let run = Run {
            flow: Arc::clone(&flow),
            sink: Arc::new(sink),
            upstream,
            way: self.way.clone(),
            context: Arc::clone(&self.context),
            client: ends.0,
        };
        let entry = Entry { flows: Arc::clone(&self.flows), ends };
        self.context.tasks.spawn("outbound flow", async move {
            run.run().await;
            drop((entry, slot, opened));
        });
        Some(flow)
    }

    fn is_captured(&self) -> bool {
        matches!(self.way, Way::Captured(_))
    }

    /// Which port of a service it is, and the socket that answers.
    fn place(&mut self, to: SocketAddr) -> Result<(Arc<UpstreamPort>, Arc<Socket>), Dropped> {
        let context = match &self.way {
            Way::Upstream(upstream) => return Ok((Arc::clone(upstream), Arc::clone(&self.socket))),
            Way::Captured(context) => context,
        };
        let (service, port) = context.datagram_target(to).map_err(|outcome| {
            context.metrics.count(outcome);
            Dropped::Unknown
        })?;
        let socket = Socket::answering_as(to).map_err(|error| {
            tracing::debug!(%error, %to, "no socket to answer from");
            Dropped::Application
        })?;
        Ok((Arc::new(UpstreamPort::new(service, port, &self.context.metrics)), Arc::new(socket)))
    }

    fn press(&mut self) {
        if self.pressed.is_none_or(|at| at.elapsed() >= PRESSURE_EVERY) {
            self.pressed = Some(Instant::now());
            tracing::warn!(
                flows = self.context.udp.limits.max_flows,
                "as many UDP flows as may be are open: datagrams of others are dropped (--max-udp-flows)"
            );
            self.context.udp.pressure.notify_waiters();
        }
    }
}

/// Takes a flow out of the table when it has ended.
#[derive(Debug)]
struct Entry {
    flows: Table,
    ends: Ends,
}

impl Drop for Entry {
    fn drop(&mut self) {
        lock(&self.flows).remove(&self.ends);
    }
}

fn lock(flows: &Table) -> std::sync::MutexGuard<'_, HashMap<Ends, Arc<Outgoing>>> {
    flows.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One flow, from its first datagram to its end.
struct Run {
    flow: Arc<Outgoing>,
    sink: Arc<LocalSink>,
    upstream: Arc<UpstreamPort>,
    way: Way,
    context: Arc<OutboundContext>,
    client: SocketAddr,
}

impl Run {
    async fn run(self) {
        let Self { flow, sink, upstream, way, context, client } = self;
        let started = Instant::now();
        let mut carried = Carried::default();
        let carry = async {
            let _held = match way {
                Way::Upstream(_) => None,
                Way::Captured(captured) => {
                    match captured.datagrams_routed(upstream.service(), upstream.port()).await {
                        Ok(held) => {
                            captured.metrics.count(Outcome::Service);
                            Some(held)
                        }
                        Err(outcome) => {
                            captured.metrics.count(outcome);
                            flow.refuse(Dropped::Unknown);
                            tokio::time::sleep(HOLD).await;
                            return outcome.name();
                        }
                    }
                }
            };
            outbound::carry(&flow, &sink, &upstream, &context, &mut carried).await
        };
        let reason = tokio::select! {
            biased;
            () = context.drain.forced() => "cut_by_drain",
            reason = carry => reason,
        };
        upstream.metrics().ended(reason);
        tracing::info!(
            target: "access",
            direction = "outbound",
            protocol = "udp",
            service = %upstream.service(),
            port = upstream.port(),
            client = %client,
            cluster = carried.cluster.as_ref().map_or("", ClusterName::as_str),
            peer = carried.peer,
            attempts = carried.attempts,
            sent_bytes = flow.meter.bytes_sent(),
            received_bytes = flow.meter.bytes_received(),
            duration_ms = started.elapsed().as_millis() as u64,
            reason,
            "flow"
        );
    }
}
