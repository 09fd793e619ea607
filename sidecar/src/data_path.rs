//! The byte path of a sidecar, on one runtime thread or on several.
//!
//! Each thread has a part of the overlay endpoint, listeners of its own behind the upstreams' addresses, and pools of its
//! own, so that no packet and no byte crosses threads. What they have in common: configuration, admission, limits,
//! metrics, the drain. The first part runs on the sidecar's own thread; the others end when [`Threads`] is ended.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tombolo_model::names::ServiceKey;
use tombolo_overlay::member::Member;
use tombolo_overlay::{BindError, Limits, Overlay, Part, ServerTls};
use tombolo_runtime::drain::Drain;
use tombolo_runtime::rt;
use tombolo_runtime::tasks::TaskGroup;

use crate::access::Admission;
use crate::agentless::{Alive, Destination};
use crate::capture::pass::Dialler;
use crate::capture::targets::Targets;
use crate::capture::wanted::Wanted;
use crate::capture::{CapturedContext, CapturedTask, PlainContext, PlainTask};
use crate::config::{LocalPort, ServiceConfig, SidecarConfig};
use crate::failover::{Router, Routes, ShiftLog};
use crate::inbound::{InboundContext, InboundTask, Leaving, LocalTarget};
use crate::listening::{Listening, UpstreamListener};
use crate::metrics::Metrics;
use crate::outbound::{OutboundContext, UpstreamPort, UpstreamTask};
use crate::pool::PoolContext;
use crate::provided::{self, Served};
use crate::shared::CallsTask;
use crate::tables::Tables;
use crate::udp::UdpContext;
use crate::udp::listener::{DatagramTask, UdpPort, Way};
use crate::udp::socket::Socket;

/// What captured connections need on every thread.
#[derive(Clone, Debug)]
pub(crate) struct Capture {
    pub targets: watch::Receiver<Arc<Targets>>,
    pub pass_slots: Arc<Semaphore>,
}

/// What every part needs; clones are for other threads.
#[derive(Clone, Debug)]
pub(crate) struct DataPath {
    pub config: Arc<SidecarConfig>,
    pub member: Member,
    pub tables: watch::Receiver<Option<Arc<Tables>>>,
    pub admitted: watch::Receiver<Arc<Admission>>,
    pub metrics: Metrics,
    pub drain: Drain,
    /// One held per open inbound stream, and per application's connection: all free means that nothing is open.
    pub inbound_slots: Arc<Semaphore>,
    pub outbound_slots: Arc<Semaphore>,
    pub udp: UdpContext,
    pub dialler: Dialler,
    /// Services that are asked for when somebody calls them.
    pub wanted: Wanted,
    pub capture: Option<Capture>,
    /// What is in order of services whose backends have no sidecar.
    pub agentless: Arc<HashMap<ServiceKey, watch::Receiver<Arc<Alive>>>>,
    pub tasks: TaskGroup,
}

impl DataPath {
    /// Serves one part in the current runtime: streams in, applications' connections out.
    pub fn start(&self, overlay: &Overlay, listening: Listening, log: ShiftLog) -> io::Result<Routes> {
        let Self {
            config,
            member,
            tables,
            admitted,
            metrics,
            drain,
            inbound_slots,
            outbound_slots,
            udp,
            dialler,
            wanted,
            capture,
            agentless,
            tasks,
        } = self.clone();
        let plain = config.capture.as_ref().and_then(|capture| capture.inbound.as_ref());
        let plain = plain.map(|inbound| PlainContext {
            mode: inbound.mode,
            services: config.services.clone().into(),
            idle: config.inbound.idle,
            slots: Arc::clone(&inbound_slots),
            dialler: dialler.clone(),
            metrics: metrics.capture.direction("inbound"),
            drain: drain.clone(),
            tasks: tasks.clone(),
        });
        let inbound = InboundContext {
            limits: config.inbound,
            slots: inbound_slots,
            dialler: dialler.clone(),
            udp: udp.clone(),
            metrics: metrics.clone(),
            drain: drain.clone(),
            tasks: tasks.clone(),
        };
        let fixed = Arc::new(targets(&config.services, &agentless, &metrics));
        let served: Served = Arc::new(ArcSwap::new(Arc::clone(&fixed)));
        if let Some(provided) = config.provided.clone() {
            let follow = provided::follow(provided, fixed, Arc::clone(&served), metrics.clone());
            tasks.spawn("provided services", follow);
        }
        tasks.spawn("inbound", InboundTask::new(overlay.clone(), served, admitted, inbound).run());

        let pools = PoolContext {
            overlay: overlay.clone(),
            svid: member.svid().clone(),
            limits: config.pool,
            metrics: metrics.clone(),
            tasks: tasks.clone(),
        };
        let warm = config.upstreams.iter().map(|u| (u.service.clone(), u.warm)).collect();
        let router = Router::new(member.cluster().clone(), pools, warm, log);
        let routes = router.routes();
        tasks.spawn("failover", router.run(tables.clone()));

        let outbound = OutboundContext {
            routes: routes.clone(),
            idle: config.inbound.idle,
            slots: outbound_slots,
            udp,
            metrics,
            drain,
            tasks: tasks.clone(),
        };
        let Listening { upstreams, captured, captured_udp, plain: plain_listeners, handed } = listening;
        for (upstream, listener) in config.upstreams.iter().zip(upstreams) {
            let (service, port) = (upstream.service.clone(), upstream.port);
            match listener {
                UpstreamListener::Tcp(listener) => {
                    let listener = TcpListener::from_std(listener)?;
                    let task = UpstreamTask::new(listener, service, port, outbound.clone());
                    tasks.spawn("upstream", task.run());
                }
                UpstreamListener::Udp(socket) => {
                    let port = UpstreamPort::new(service, port, &outbound.metrics);
                    let port = Arc::new(UdpPort::new(port, &outbound.metrics));
                    let way = Way::Upstream(port, Arc::new(outbound.clone()));
                    let (metrics, drain) = (&outbound.metrics, outbound.drain.clone());
                    let task = DatagramTask::new(Socket::listening(socket)?, way, metrics, drain);
                    tasks.spawn("upstream datagrams", task.run());
                }
            }
        }
        if let Some(handed) = handed {
            tasks.spawn("calls", CallsTask::new(handed, outbound.clone(), wanted.clone()).run());
        }
        if let Some(Capture { targets, pass_slots }) = capture {
            let metrics = outbound.metrics.capture.direction("outbound");
            let context = CapturedContext { outbound, targets, tables, wanted, dialler, pass_slots, metrics };
            for listener in captured {
                let task = CapturedTask::new(context.clone());
                tasks.spawn("captured", task.run(TcpListener::from_std(listener)?));
            }
            for socket in captured_udp {
                let way = Way::captured(context.clone());
                let (metrics, drain) = (&context.outbound.metrics, context.outbound.drain.clone());
                let task = DatagramTask::new(Socket::capturing(socket)?, way, metrics, drain);
                tasks.spawn("captured datagrams", task.run());
            }
        }
        for (listener, context) in plain_listeners.into_iter().zip(std::iter::repeat(plain)) {
            if let Some(context) = context {
                tasks.spawn("plain", PlainTask::new(TcpListener::from_std(listener)?, context).run());
            }
        }
        Ok(routes)
    }
}

fn targets(
    services: &[ServiceConfig],
    agentless: &HashMap<ServiceKey, watch::Receiver<Arc<Alive>>>,
    metrics: &Metrics,
) -> HashMap<Arc<str>, Arc<LocalTarget>> {
    let target = |service: &ServiceConfig| {
        let name = service.service.to_string();
        let destination = |port: &LocalPort| match agentless.get(&service.service) {
            Some(alive) => Destination::Agentless(alive.clone()),
            None => Destination::Local(port.target),
        };
        let ports =
            service.ports.iter().map(|port| ((port.protocol, port.port), destination(port))).collect();
        let flows = metrics.udp.service("inbound", &name);
        let metrics = metrics.service("inbound", &name);
        let service = service.service.clone();
        (
            Arc::from(name),
            Arc::new(LocalTarget { service, ports, metrics, flows, leaving: Leaving::default() }),
        )
    };
    services.iter().map(target).collect()
}

/// A further part and its listeners, bound and not served yet.
#[derive(Debug)]
pub(crate) struct Further {
    pub part: Part,
    pub listening: Listening,
    pub server: ServerTls,
    pub limits: Limits,
}

/// The threads beside the sidecar's own.
#[derive(Debug, Default)]
pub(crate) struct Threads {
    ended: CancellationToken,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Threads {
    /// Starts one for each further part; returns its routes once it serves.
    pub async fn start(
        &mut self,
        further: Further,
        first: &Overlay,
        path: &DataPath,
        log: ShiftLog,
    ) -> Result<Routes, BindError> {
        let (path, first, ended) = (path.clone(), first.clone(), self.ended.clone());
        let address = first.local_addr();
        let failed = move |source| BindError::Socket { address, source };
        let (ready, started) = oneshot::channel();
        let name = format!("tombolo-path-{}", self.threads.len() + 1);
        let thread = rt::spawn_thread(name, move || async move {
            let Further { part, listening, server, limits } = further;
            let overlay = first.bind_beside(part, Some(server), limits, &path.tasks);
            drop(first);
            let routes = overlay.and_then(|overlay| path.start(&overlay, listening, log).map_err(failed));
            drop(path);
            let _ = ready.send(routes);
            // Drives the tasks of this thread meanwhile.
            ended.cancelled().await;
        });
        self.threads.push(thread.map_err(failed)?);
        started.await.unwrap_or_else(|_| Err(failed(io::ErrorKind::BrokenPipe.into())))
    }

    /// Once every task has ended.
    pub fn end(mut self) {
        self.ended.cancel();
        for thread in std::mem::take(&mut self.threads) {
            if let Ok(Err(error)) = thread.join() {
                tracing::warn!(%error, "a thread of the byte path did not run");
            }
        }
    }
}

impl Drop for Threads {
    /// Of a start that failed half-way.
    fn drop(&mut self) {
        self.ended.cancel();
    }
}
