//! Where applications call: listeners that hand each connection, and each flow of datagrams, to the sidecar of whoever it
//! comes from.
//!
//! An address that is no application's is reset, its datagrams are dropped: whoever can reach the listener must not get an
//! identity by that alone. A flow whose address becomes another application's ends ([`Front::generation`]).

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tombolo_model::names::ServiceKey;
use tombolo_model::protocol::Protocol;
use tombolo_runtime::drain::Drain;
use tombolo_runtime::tasks::TaskGroup;

use super::calls::Datagrams;
use super::config::{Application, Callers};
use crate::config::UpstreamConfig;
use crate::copy;
use crate::listening::{self, ListenError, UpstreamListener, accept_until_drained};
use crate::metrics::Metrics;
use crate::outbound::UpstreamPort;
use crate::udp::listener::{DatagramTask, UdpPort, Way};
use crate::udp::socket::{self as udp, Socket};

/// A connection for the sidecar of its caller.
#[derive(Debug)]
pub(crate) struct Call {
    pub tcp: TcpStream,
    pub from: SocketAddr,
    pub service: ServiceKey,
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    result: &'static str,
}

/// Bound listeners with what each is for.
#[derive(Debug)]
pub(crate) struct Fronts {
    listening: Vec<(UpstreamConfig, UpstreamListener)>,
    calls: Family<CallLabels, Counter>,
}

/// Who calls from where, and who takes it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Front(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    table: RwLock<Table>,
    generation: AtomicU64,
}

#[derive(Debug, Default)]
struct Table {
    callers: Callers,
    serving: HashMap<String, Serving>,
}

/// How an application's sidecar is given its calls: the front's end.
#[derive(Clone, Debug)]
pub(crate) struct Serving {
    calls: mpsc::Sender<Call>,
    datagrams: Arc<OnceLock<Datagrams>>,
}

/// The sidecar's end.
#[derive(Debug)]
pub(crate) struct Handed {
    pub calls: mpsc::Receiver<Call>,
    /// Set once it carries datagrams.
    pub datagrams: Arc<OnceLock<Datagrams>>,
}

/// Connections that an application's sidecar has not taken yet: it takes them within microseconds.
const HANDED: usize = 256;

pub(crate) fn hand_over() -> (Serving, Handed) {
    let (sender, calls) = mpsc::channel(HANDED);
    let datagrams = Arc::<OnceLock<_>>::default();
    (Serving { calls: sender, datagrams: Arc::clone(&datagrams) }, Handed { calls, datagrams })
}

/// A UDP listener that applications share.
#[derive(Debug)]
pub(crate) struct SharedPort {
    front: Front,
    pub port: Arc<UdpPort>,
    calls: Family<CallLabels, Counter>,
}

impl SharedPort {
    /// Whose a new flow is.
    pub fn caller(&self, from: IpAddr) -> Result<(Arc<str>, Datagrams), &'static str> {
        let found = self.front.datagrams_of(from);
        let result = found.as_ref().map_or_else(|error| *error, |_| "handed");
        self.calls.get_or_create(&CallLabels { result }).inc();
        found
    }
    /// Whether a flow's caller is still who it was.
    pub fn is_of(&self, from: IpAddr, application: &str) -> bool {
        self.front.table().callers.of(from) == Some(application)
    }
    /// Changes when anybody's addresses may have become another's.
    pub fn generation(&self) -> u64 {
        self.front.0.generation.load(Relaxed)
    }
}

impl Fronts {
    pub fn bind(upstreams: &[UpstreamConfig], registry: &mut Registry) -> Result<Self, ListenError> {
        let calls = Family::default();
        registry.register(
            "calls",
            "Connections and flows to the front, by what became of them",
            calls.clone(),
        );
        let mut bound = Vec::new();
        for upstream in upstreams {
            let listeners: std::io::Result<Vec<_>> = match upstream.protocol {
                Protocol::Tcp => listening::listen(upstream.listen, 1)
                    .map(|listeners| listeners.into_iter().map(UpstreamListener::Tcp).collect()),
                Protocol::Udp => udp::listen(upstream.listen, 1)
                    .map(|sockets| sockets.into_iter().map(UpstreamListener::Udp).collect()),
            };
            let listeners = listeners.map_err(|source| {
                let service = upstream.service.to_string();
                ListenError::Upstream { service, listen: upstream.listen, source }
            })?;
            bound.extend(listeners.into_iter().map(|listener| (upstream.clone(), listener)));
        }
        Ok(Self { listening: bound, calls })
    }

    /// Listens until the drain starts.
    pub fn start(self, metrics: &Metrics, drain: &Drain, tasks: &TaskGroup) -> std::io::Result<Front> {
        let front = Front::default();
        for (UpstreamConfig { service, port, .. }, listener) in self.listening {
            let (front, drain, calls) = (front.clone(), drain.clone(), self.calls.clone());
            match listener {
                UpstreamListener::Tcp(listener) => {
                    let listener = TcpListener::from_std(listener)?;
                    tasks.spawn("front", async move {
                        let take = |tcp, from| {
                            let call = Call { tcp, from, service: service.clone(), port };
                            calls.get_or_create(&CallLabels { result: front.hand(call) }).inc();
                        };
                        accept_until_drained(listener, &drain, take).await;
                    });
                }
                UpstreamListener::Udp(socket) => {
                    let port = Arc::new(UdpPort::new(UpstreamPort::new(service, port, metrics), metrics));
                    let way = Way::Shared(Arc::new(SharedPort { front, port, calls }));
                    let task = DatagramTask::new(Socket::listening(socket)?, way, metrics, drain);
                    tasks.spawn("front datagrams", task.run());
                }
            }
        }
        Ok(front)
    }
}

impl Front {
    /// Who calls from where, from now on.
    pub fn know(&self, applications: &[Application]) {
        let callers = Callers::new(applications);
        self.0.table.write().unwrap_or_else(PoisonError::into_inner).callers = callers;
        self.0.generation.fetch_add(1, Relaxed);
    }

    fn table(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.0.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn datagrams_of(&self, from: IpAddr) -> Result<(Arc<str>, Datagrams), &'static str> {
        let table = self.table();
        let application = table.callers.of(from).ok_or("unknown_caller")?;
        let serving = table.serving.get(application).and_then(|serving| serving.datagrams.get());
        let datagrams = serving.filter(|datagrams| datagrams.takes()).ok_or("not_running")?;
        Ok((application.into(), datagrams.clone()))
    }

    /// Who takes an application's calls; `None`: nobody does now.
    pub fn serve(&self, application: &str, serving: Option<Serving>) {
        let mut table = self.0.table.write().unwrap_or_else(PoisonError::into_inner);
        match serving {
            Some(serving) => drop(table.serving.insert(application.to_owned(), serving)),
            None => drop(table.serving.remove(application)),
        }
    }

    /// Hands a connection on, or resets it. What became of it.
    fn hand(&self, call: Call) -> &'static str {
        // `None`: nobody's; `Some(None)`: of one whose sidecar does not run. Nothing is done under the lock.
        let serving = {
            let table = self.table();
            let application = table.callers.of(call.from.ip());
            application.map(|application| table.serving.get(application).map(|serving| serving.calls.clone()))
        };
        let Some(serving) = serving else {
            tracing::info!(target: "access", direction = "outbound", service = %call.service, client = %call.from,
                reason = "unknown_caller", "no application's sources contain the caller's address");
            copy::abort(call.tcp);
            return "unknown_caller";
        };
        let Some(serving) = serving else {
            copy::abort(call.tcp);
            return "not_running";
        };
        match serving.try_send(call) {
            Ok(()) => "handed",
            Err(TrySendError::Full(call)) => {
                copy::abort(call.tcp);
                "overloaded"
            }
            Err(TrySendError::Closed(call)) => {
                copy::abort(call.tcp);
                "not_running"
            }
        }
    }
}
