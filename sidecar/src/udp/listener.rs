//! Takes datagrams of local applications at one address, explicit, captured or shared, and gives each to its flow.
//!
//! One task per listener and thread; it is the one writer of its flow table, but for flows that end. A datagram of a flow
//! that stands goes straight to its connection; the first of a new one starts the flow's task, if there is room. While there
//! is none, flows that nobody has answered are asked to make some, once a second.

mod run;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tombolo_model::names::ServiceKey;
use tombolo_runtime::drain::Drain;

use self::run::Run;
use super::flow::{Activity, LocalSink};
use super::metrics::{Dropped, Drops, FlowMetrics};
use super::outbound::Outgoing;
use super::queue::Queue;
use super::socket::{Received, Socket};
use crate::capture::CapturedContext;
use crate::copy::Meter;
use crate::listening::ACCEPT_PAUSE;
use crate::metrics::{Held, Metrics};
use crate::outbound::{OutboundContext, UpstreamPort};
use crate::shared::{Datagrams, OpenCall, SharedPort};

/// Batches before others of the thread get their turn: 128 datagrams.
const TURN: u32 = 4;
const PRESSURE_EVERY: Duration = Duration::from_secs(1);

/// Whose datagrams, and where they were sent: without a port where that is the listener's.
type Ends = (SocketAddr, SocketAddr);
type Table = Arc<Mutex<HashMap<Ends, Arc<Outgoing>>>>;

/// Ports of services that are remembered with their metrics' handles; more are looked up again.
const MAX_REMEMBERED: usize = 1024;

/// How datagrams come.
#[derive(Clone, Debug)]
pub(crate) enum Way {
    /// To a listener of its own.
    Upstream(Arc<UdpPort>, Arc<OutboundContext>),
    /// By the machine's rules.
    Captured(Arc<CapturedContext>, Arc<OutboundContext>),
    /// To a listener of many applications.
    Shared(Arc<SharedPort>),
}

impl Way {
    pub fn captured(context: CapturedContext) -> Self {
        let outbound = Arc::new(context.outbound.clone());
        Self::Captured(Arc::new(context), outbound)
    }
}

/// One UDP port of a service, with its metrics' handles.
#[derive(Debug)]
pub(crate) struct UdpPort {
    upstream: UpstreamPort,
    metrics: FlowMetrics,
}

impl UdpPort {
    pub fn new(upstream: UpstreamPort, metrics: &Metrics) -> Self {
        let metrics = metrics.udp.service("outbound", &upstream.service().to_string());
        Self { upstream, metrics }
    }
}

/// Whose flow it is, and how it gets its route.
#[derive(Debug)]
enum Whose {
    /// The sidecar's own application's; the listener has asked for the service.
    Own,
    Captured(Arc<CapturedContext>),
    Application {
        name: Arc<str>,
        datagrams: Datagrams,
        _open: OpenCall,
    },
}

/// Serves one socket.
#[derive(Debug)]
pub(crate) struct DatagramTask {
    socket: Arc<Socket>,
    way: Way,
    metrics: Metrics,
    drain: Drain,
    flows: Table,
    /// Of captured flows.
    ports: HashMap<(ServiceKey, u16), Arc<UdpPort>>,
    drops: Drops,
    pressed: Option<Instant>,
    /// Of the callers that the flows were last held against, and what they called.
    generation: u64,
    called: Option<Arc<UdpPort>>,
}

impl DatagramTask {
    /// Until `drain` starts, whatever becomes of those whose datagrams it takes.
    pub fn new(socket: Socket, way: Way, metrics: &Metrics, drain: Drain) -> Self {
        Self {
            socket: Arc::new(socket),
            way,
            metrics: metrics.clone(),
            drain,
            flows: Table::default(),
            ports: HashMap::new(),
            drops: metrics.udp.direction("outbound"),
            pressed: None,
            generation: 0,
            called: None,
        }
    }

    /// Until the drain starts; flows that are open go on until they are silent.
    pub async fn run(mut self) {
        let (drain, socket) = (self.drain.clone(), Arc::clone(&self.socket));
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
        self.part();
        let ends = (datagram.from, datagram.to);
        let flow = lock(&self.flows).get(&ends).cloned();
        if let Some(flow) = flow.or_else(|| self.open(ends)) {
            flow.activity.touch();
            flow.take(datagram.payload);
        }
    }

    /// Ends flows whose address has become another application's, or whose listener another service's.
    fn part(&mut self) {
        let Way::Shared(shared) = &self.way else { return };
        let generation = shared.generation();
        if generation == self.generation {
            return;
        }
        self.generation = generation;
        let port = shared.port();
        let same = self.called.as_ref().is_none_or(|called| Arc::ptr_eq(called, &port));
        lock(&self.flows).retain(|ends, flow| {
            let stays =
                flow.application.as_ref().is_none_or(|whose| shared.is_of(ends.0.ip(), whose)) && same;
            if !stays {
                flow.over.notify_one();
            }
            stays
        });
        self.called = Some(port);
    }

    fn open(&mut self, ends: Ends) -> Option<Arc<Outgoing>> {
        let (context, whose) = match self.caller(ends.0) {
            Ok(known) => known,
            Err(reason) => {
                self.drops.count(reason, 1);
                return None;
            }
        };
        let Ok(slot) = Arc::clone(&context.udp.outbound).try_acquire_owned() else {
            self.drops.count(Dropped::FlowsFull, 1);
            self.press(&context);
            return None;
        };
        let (port, sink_socket) = match self.place(ends.1) {
            Ok(placed) => placed,
            Err(reason) => {
                self.drops.count(reason, 1);
                return None;
            }
        };
        let metrics = port.metrics.clone();
        let streams = port.upstream.metrics();
        let meter = Arc::new(Meter::new(streams.sent.clone(), streams.received.clone(), None));
        let activity = Arc::new(Activity::new());
        let queue = Queue::new(context.udp.budget.clone());
        let captured = matches!(whose, Whose::Captured(_));
        let sink = LocalSink {
            to: ends.0,
            // What the answer comes from: the socket's own address where that is bound to one.
            from: (!captured && !ends.1.ip().is_unspecified()).then_some(ends.1.ip()),
            socket: sink_socket,
            activity: Arc::clone(&activity),
            meter: Arc::clone(&meter),
            metrics: metrics.clone(),
            refused: Notify::new(),
        };
        let application = match &whose {
            Whose::Application { name, .. } => Some(Arc::clone(name)),
            Whose::Own | Whose::Captured(_) => None,
        };
        let opened = Held::new(&metrics.open);
        let flow = Arc::new(Outgoing::new(queue, activity, meter, metrics, application));
        lock(&self.flows).insert(ends, Arc::clone(&flow));
        let tasks = context.tasks.clone();
        let run = Run { flow: Arc::clone(&flow), sink: Arc::new(sink), port, whose, context, client: ends.0 };
        let entry = Entry { flows: Arc::clone(&self.flows), ends, flow: Arc::clone(&flow) };
        tasks.spawn("outbound flow", async move {
            run.run().await;
            drop((entry, slot, opened));
        });
        Some(flow)
    }

    /// Whose sidecar carries what comes from there.
    fn caller(&self, from: SocketAddr) -> Result<(Arc<OutboundContext>, Whose), Dropped> {
        match &self.way {
            Way::Upstream(_, outbound) => Ok((Arc::clone(outbound), Whose::Own)),
            Way::Captured(captured, outbound) => {
                Ok((Arc::clone(outbound), Whose::Captured(Arc::clone(captured))))
            }
            Way::Shared(shared) => match shared.caller(from.ip()) {
                Ok((name, datagrams, open)) => {
                    Ok((Arc::clone(&datagrams.outbound), Whose::Application { name, datagrams, _open: open }))
                }
                Err("unknown_caller") => {
                    tracing::debug!(target: "access", direction = "outbound", protocol = "udp", client = %from,
                        reason = "unknown_caller", "no application's sources contain the caller's address");
                    Err(Dropped::UnknownCaller)
                }
                Err(_) => Err(Dropped::Refused),
            },
        }
    }

    /// Which port of a service it is, and the socket that answers.
    fn place(&mut self, to: SocketAddr) -> Result<(Arc<UdpPort>, Arc<Socket>), Dropped> {
        let context = match &self.way {
            Way::Upstream(port, _) => return Ok((Arc::clone(port), Arc::clone(&self.socket))),
            Way::Shared(shared) => return Ok((shared.port(), Arc::clone(&self.socket))),
            Way::Captured(context, _) => context,
        };
        let (service, port) = context.datagram_target(to).map_err(|outcome| {
            context.metrics.count(outcome);
            Dropped::Unknown
        })?;
        let socket = Socket::answering_as(to).map_err(|error| {
            tracing::debug!(%error, %to, "no socket to answer from");
            Dropped::Application
        })?;
        if self.ports.len() >= MAX_REMEMBERED {
            self.ports.clear();
        }
        let metrics = &self.metrics;
        let new = || Arc::new(UdpPort::new(UpstreamPort::new(service.clone(), port, metrics), metrics));
        let port = Arc::clone(self.ports.entry((service.clone(), port)).or_insert_with(new));
        Ok((port, Arc::new(socket)))
    }

    fn press(&mut self, context: &OutboundContext) {
        if self.pressed.is_none_or(|at| at.elapsed() >= PRESSURE_EVERY) {
            self.pressed = Some(Instant::now());
            tracing::warn!(
                flows = context.udp.limits.max_flows,
                "as many UDP flows as may be are open: datagrams of others are dropped (--max-udp-flows)"
            );
            context.udp.pressure.notify_waiters();
        }
    }
}

/// Takes a flow out of the table when it has ended.
#[derive(Debug)]
struct Entry {
    flows: Table,
    ends: Ends,
    flow: Arc<Outgoing>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut flows = lock(&self.flows);
        // Another caller's may have its place by now.
        if flows.get(&self.ends).is_some_and(|flow| Arc::ptr_eq(flow, &self.flow)) {
            flows.remove(&self.ends);
        }
    }
}

fn lock(flows: &Table) -> std::sync::MutexGuard<'_, HashMap<Ends, Arc<Outgoing>>> {
    flows.lock().unwrap_or_else(PoisonError::into_inner)
}
