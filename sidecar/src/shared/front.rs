//! Where applications call: listeners that hand each connection, and each flow of datagrams ([`datagrams`]), to the sidecar
//! of whoever it comes from.
//!
//! An address that is no application's is reset: whoever can reach the listener must not get an identity by that alone. What
//! comes for an application whose sidecar does not run goes to [`Calls::waking`], whose owner may start one for it. One task
//! per listener; each ends when its listener is no longer wanted, or with the drain.

mod datagrams;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tombolo_model::names::ServiceKey;
use tombolo_model::protocol::Protocol;
use tombolo_runtime::drain::{self, DrainTrigger};
use tombolo_runtime::tasks::TaskGroup;

pub(crate) use self::datagrams::SharedPort;
use super::calls::Datagrams;
use super::config::{Application, Callers};
use crate::config::UpstreamConfig;
use crate::copy;
use crate::listening::{self, LAST_HANDSHAKES, ListenError, accept_until_drained};
use crate::metrics::Metrics;

/// Connections that an application's sidecar has not taken yet: it takes them within microseconds, or when it has started.
pub(super) const HANDED: usize = 256;

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

pub(crate) fn hand_over() -> (Serving, Handed) {
    let (sender, calls) = mpsc::channel(HANDED);
    let datagrams = Arc::<OnceLock<_>>::default();
    (Serving { calls: sender, datagrams: Arc::clone(&datagrams) }, Handed { calls, datagrams })
}

/// Calls for an application whose sidecar does not run.
#[derive(Debug)]
pub(crate) struct Waking {
    pub name: String,
    /// None: datagrams.
    pub call: Option<Call>,
}

/// A connection for the sidecar of its caller.
#[derive(Debug)]
pub(crate) struct Call {
    pub tcp: TcpStream,
    pub from: SocketAddr,
    pub service: ServiceKey,
    pub port: u16,
    pub at: Instant,
    /// Kept until it has ended.
    pub open: OpenCall,
}

impl Call {
    /// Resets it.
    pub fn refuse(self) {
        copy::abort(self.tcp);
    }
}

/// Calls that are open, and when that last changed.
#[derive(Debug)]
struct Usage(Mutex<(usize, Instant)>);

impl Default for Usage {
    fn default() -> Self {
        Self(Mutex::new((0, Instant::now())))
    }
}

impl Usage {
    fn change(&self, change: impl FnOnce(usize) -> usize) {
        let mut usage = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *usage = (change(usage.0), Instant::now());
    }
}

/// Counts as open for as long as it is held.
#[derive(Debug)]
pub(crate) struct OpenCall(Arc<Usage>);

impl Drop for OpenCall {
    fn drop(&mut self) {
        self.0.change(|open| open.saturating_sub(1));
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    result: &'static str,
}

/// What becomes of connections to the front.
#[derive(Clone, Debug)]
pub(crate) struct Calls {
    counted: Family<CallLabels, Counter>,
    /// For applications whose sidecars do not run, by name.
    waking: mpsc::Sender<Waking>,
}

impl Calls {
    pub fn register(registry: &mut Registry, waking: mpsc::Sender<Waking>) -> Self {
        let counted = Family::default();
        registry.register(
            "calls",
            "Connections and flows to the front, by what became of them",
            counted.clone(),
        );
        Self { counted, waking }
    }

    pub fn count(&self, result: &'static str) {
        self.counted.get_or_create(&CallLabels { result }).inc();
    }
}

/// The listeners.
#[derive(Debug)]
pub(crate) struct Fronts {
    front: Front,
    calls: Calls,
    metrics: Metrics,
    tasks: TaskGroup,
    listening: HashMap<Place, Listening>,
    /// As told last; those that can't be had now are tried again.
    wanted: Vec<UpstreamConfig>,
    /// Said already.
    failing: HashSet<Place>,
}

/// TCP and UDP may be called at one address.
type Place = (SocketAddr, Protocol);

fn place(upstream: &UpstreamConfig) -> Place {
    (upstream.listen, upstream.protocol)
}

#[derive(Debug)]
struct Listening {
    upstream: Arc<ArcSwap<UpstreamConfig>>,
    /// Ends it when it is dropped.
    _trigger: DrainTrigger,
}

impl Fronts {
    /// Binds and serves these at once. Needs the runtime that serves them.
    pub fn start(
        front: Front,
        upstreams: &[UpstreamConfig],
        calls: Calls,
        metrics: &Metrics,
        tasks: TaskGroup,
    ) -> Result<Self, ListenError> {
        let (listening, failing) = (HashMap::new(), HashSet::new());
        let metrics = metrics.clone();
        let mut fronts =
            Self { front, calls, metrics, tasks, listening, wanted: upstreams.to_vec(), failing };
        upstreams.iter().try_for_each(|upstream| fronts.listen(upstream))?;
        Ok(fronts)
    }

    /// Listens at these from now on, and nowhere else. Where another service is called now, callers of before go on.
    pub fn follow(&mut self, upstreams: &[UpstreamConfig]) {
        self.wanted = upstreams.to_vec();
        let kept: HashSet<Place> = upstreams.iter().map(place).collect();
        self.listening.retain(|listen, _| kept.contains(listen));
        self.failing.retain(|listen| kept.contains(listen));
        self.tend();
    }

    /// Tries again where it could not listen.
    pub fn tend(&mut self) {
        for upstream in std::mem::take(&mut self.wanted) {
            match self.listening.get(&place(&upstream)) {
                Some(listening) if **listening.upstream.load() == upstream => {}
                Some(listening) => {
                    listening.upstream.store(Arc::new(upstream.clone()));
                    self.front.0.generation.fetch_add(1, Relaxed);
                }
                None => match self.listen(&upstream) {
                    Ok(()) => drop(self.failing.remove(&place(&upstream))),
                    Err(error) if self.failing.insert(place(&upstream)) => {
                        tracing::error!(%error, "an address can't be listened on; it is tried again every second");
                    }
                    Err(_) => {}
                },
            }
            self.wanted.push(upstream);
        }
    }

    fn listen(&mut self, upstream: &UpstreamConfig) -> Result<(), ListenError> {
        let failed = |source| ListenError::Upstream {
            service: upstream.service.to_string(),
            listen: upstream.listen,
            source,
        };
        let (trigger, drain) = drain::channel();
        let current = Arc::new(ArcSwap::from_pointee(upstream.clone()));
        if upstream.protocol == Protocol::Udp {
            self.datagrams(&current, &drain).map_err(failed)?;
            self.listening.insert(place(upstream), Listening { upstream: current, _trigger: trigger });
            return Ok(());
        }
        for listener in listening::listen(upstream.listen, 1).map_err(failed)? {
            let listener = TcpListener::from_std(listener).map_err(failed)?;
            let (front, calls, drain) = (self.front.clone(), self.calls.clone(), drain.clone());
            let upstream = Arc::clone(&current);
            self.tasks.spawn("front", async move {
                let take = |tcp, from| calls.count(front.hand(tcp, from, &upstream.load(), &calls.waking));
                accept_until_drained(listener, &drain, take).await;
            });
        }
        self.listening.insert(place(upstream), Listening { upstream: current, _trigger: trigger });
        Ok(())
    }

    /// Listens nowhere any more, and waits until the last connections have been handed over: who takes them must not end before.
    pub async fn end(&mut self) {
        self.wanted.clear();
        self.listening.clear();
        tokio::time::sleep(2 * LAST_HANDSHAKES).await;
    }
}

/// Who calls from where, and who takes it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Front(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    table: RwLock<Table>,
    /// Counts changes of who calls from where.
    generation: AtomicU64,
}

#[derive(Debug, Default)]
struct Table {
    callers: Callers,
    serving: HashMap<String, Serving>,
    /// Of applications that have called, or whose sidecars run.
    usage: HashMap<String, Arc<Usage>>,
}

impl Front {
    /// Who calls from where, from now on.
    pub fn know(&self, applications: &[Application]) {
        let callers = Callers::new(applications);
        let names: HashSet<&str> = applications.iter().map(Application::name).collect();
        let mut table = self.0.table.write().unwrap_or_else(PoisonError::into_inner);
        table.callers = callers;
        table.usage.retain(|name, _| names.contains(name.as_str()));
        self.0.generation.fetch_add(1, Relaxed);
    }

    /// Who takes an application's calls; `None`: nobody does now.
    pub fn serve(&self, application: &str, serving: Option<Serving>) {
        let mut table = self.0.table.write().unwrap_or_else(PoisonError::into_inner);
        match serving {
            Some(serving) => {
                table.usage.entry(application.to_owned()).or_default();
                table.serving.insert(application.to_owned(), serving);
            }
            None => drop(table.serving.remove(application)),
        }
    }

    /// For how long an application has had nothing open; `None`: it has.
    pub fn idle(&self, application: &str) -> Option<Duration> {
        let table = self.0.table.read().unwrap_or_else(PoisonError::into_inner);
        let (open, last) = *table.usage.get(application)?.0.lock().unwrap_or_else(PoisonError::into_inner);
        (open == 0).then(|| last.elapsed())
    }

    /// Gives a call that has waited to whoever takes the application's by now.
    pub fn pass_on(&self, application: &str, call: Call) {
        let serving = {
            let table = self.0.table.read().unwrap_or_else(PoisonError::into_inner);
            table.serving.get(application).cloned()
        };
        let Some(serving) = serving else { return call.refuse() };
        if let Err(TrySendError::Full(call) | TrySendError::Closed(call)) = serving.calls.try_send(call) {
            call.refuse();
        }
    }

    /// Counts a call of an application.
    fn opened(&self, application: &str, usage: Option<Arc<Usage>>) -> OpenCall {
        let usage = usage.unwrap_or_else(|| {
            let mut table = self.0.table.write().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(table.usage.entry(application.to_owned()).or_default())
        });
        usage.change(|open| open + 1);
        OpenCall(usage)
    }

    /// Hands a connection on, or resets it. What became of it.
    fn hand(
        &self,
        tcp: TcpStream,
        from: SocketAddr,
        upstream: &UpstreamConfig,
        waking: &mpsc::Sender<Waking>,
    ) -> &'static str {
        let UpstreamConfig { service, port, .. } = upstream;
        // `None`: nobody's. Nothing is done under the lock.
        let caller = {
            let table = self.0.table.read().unwrap_or_else(PoisonError::into_inner);
            table.callers.of(from.ip()).map(|application| {
                let usage = table.usage.get(application).cloned();
                (application.to_owned(), table.serving.get(application).cloned(), usage)
            })
        };
        let Some((application, serving, usage)) = caller else {
            tracing::info!(target: "access", direction = "outbound", %service, client = %from,
                reason = "unknown_caller", "no application's sources contain the caller's address");
            copy::abort(tcp);
            return "unknown_caller";
        };
        let (service, port, at) = (service.clone(), *port, Instant::now());
        let call = Call { tcp, from, service, port, at, open: self.opened(&application, usage) };
        let refused = match serving {
            Some(serving) => match serving.calls.try_send(call) {
                Ok(()) => return "handed",
                Err(TrySendError::Full(call)) => (call, "overloaded"),
                Err(TrySendError::Closed(call)) => (call, "not_running"),
            },
            None => match waking.try_send(Waking { name: application, call: Some(call) }) {
                Ok(()) => return "waking",
                Err(TrySendError::Full(Waking { call, .. }) | TrySendError::Closed(Waking { call, .. })) => {
                    call.into_iter().for_each(Call::refuse);
                    return "overloaded";
                }
            },
        };
        let (call, reason) = refused;
        call.refuse();
        reason
    }
}
