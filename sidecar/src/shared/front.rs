//! Where applications call: listeners that hand each connection to the sidecar of whoever it comes from.
//!
//! An address that is no application's is reset: whoever can reach the listener must not get an identity by that alone. What
//! comes for an application whose sidecar does not run goes to [`Calls::waking`], whose owner may start one for it. One task
//! per listener; each ends when its listener is no longer wanted, or with the drain.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
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
use tombolo_runtime::drain::{self, DrainTrigger};
use tombolo_runtime::tasks::TaskGroup;

use super::config::{Application, Callers};
use crate::config::UpstreamConfig;
use crate::copy;
use crate::listening::{self, ListenError, accept_until_drained};

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
    waking: mpsc::Sender<(String, Call)>,
}

impl Calls {
    pub fn register(registry: &mut Registry, waking: mpsc::Sender<(String, Call)>) -> Self {
        let counted = Family::default();
        registry.register("calls", "Connections to the front, by what became of them", counted.clone());
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
    tasks: TaskGroup,
    listening: HashMap<SocketAddr, Listening>,
    /// As told last; those that can't be had now are tried again.
    wanted: Vec<UpstreamConfig>,
    /// Said already.
    failing: HashSet<SocketAddr>,
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
        tasks: TaskGroup,
    ) -> Result<Self, ListenError> {
        let (listening, failing) = (HashMap::new(), HashSet::new());
        let mut fronts = Self { front, calls, tasks, listening, wanted: upstreams.to_vec(), failing };
        upstreams.iter().try_for_each(|upstream| fronts.listen(upstream))?;
        Ok(fronts)
    }

    /// Listens at these from now on, and nowhere else. Where another service is called now, callers of before go on.
    pub fn follow(&mut self, upstreams: &[UpstreamConfig]) {
        self.wanted = upstreams.to_vec();
        let kept: HashSet<SocketAddr> = upstreams.iter().map(|upstream| upstream.listen).collect();
        self.listening.retain(|listen, _| kept.contains(listen));
        self.failing.retain(|listen| kept.contains(listen));
        self.tend();
    }

    /// Tries again where it could not listen.
    pub fn tend(&mut self) {
        for upstream in std::mem::take(&mut self.wanted) {
            match self.listening.get(&upstream.listen) {
                Some(listening) if **listening.upstream.load() == upstream => {}
                Some(listening) => listening.upstream.store(Arc::new(upstream.clone())),
                None => match self.listen(&upstream) {
                    Ok(()) => drop(self.failing.remove(&upstream.listen)),
                    Err(error) if self.failing.insert(upstream.listen) => {
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
        for listener in listening::listen(upstream.listen, 1).map_err(failed)? {
            let listener = TcpListener::from_std(listener).map_err(failed)?;
            let (front, calls, drain) = (self.front.clone(), self.calls.clone(), drain.clone());
            let upstream = Arc::clone(&current);
            self.tasks.spawn("front", async move {
                let take = |tcp, from| calls.count(front.hand(tcp, from, &upstream.load(), &calls.waking));
                accept_until_drained(listener, &drain, take).await;
            });
        }
        self.listening.insert(upstream.listen, Listening { upstream: current, _trigger: trigger });
        Ok(())
    }

    /// Listens nowhere any more.
    pub fn end(&mut self) {
        self.wanted.clear();
        self.listening.clear();
    }
}

/// Who calls from where, and who takes it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Front(Arc<RwLock<Table>>);

#[derive(Debug, Default)]
struct Table {
    callers: Callers,
    serving: HashMap<String, mpsc::Sender<Call>>,
    /// Of applications that have called, or whose sidecars run.
    usage: HashMap<String, Arc<Usage>>,
}

impl Front {
    /// Who calls from where, from now on.
    pub fn know(&self, applications: &[Application]) {
        let callers = Callers::new(applications);
        let names: HashSet<&str> = applications.iter().map(Application::name).collect();
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        table.callers = callers;
        table.usage.retain(|name, _| names.contains(name.as_str()));
    }

    /// Who takes an application's calls; `None`: nobody does now.
    pub fn serve(&self, application: &str, calls: Option<mpsc::Sender<Call>>) {
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match calls {
            Some(calls) => {
                table.usage.entry(application.to_owned()).or_default();
                table.serving.insert(application.to_owned(), calls);
            }
            None => drop(table.serving.remove(application)),
        }
    }

    /// For how long an application has had nothing open; `None`: it has.
    pub fn idle(&self, application: &str) -> Option<Duration> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let (open, last) = *table.usage.get(application)?.0.lock().unwrap_or_else(PoisonError::into_inner);
        (open == 0).then(|| last.elapsed())
    }

    /// Gives a call that has waited to whoever takes the application's by now.
    pub fn pass_on(&self, application: &str, call: Call) {
        let serving = {
            let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
            table.serving.get(application).cloned()
        };
        let Some(serving) = serving else { return call.refuse() };
        if let Err(TrySendError::Full(call) | TrySendError::Closed(call)) = serving.try_send(call) {
            call.refuse();
        }
    }

    /// Hands a connection on, or resets it. What became of it.
    fn hand(
        &self,
        tcp: TcpStream,
        from: SocketAddr,
        upstream: &UpstreamConfig,
        waking: &mpsc::Sender<(String, Call)>,
    ) -> &'static str {
        let UpstreamConfig { service, port, .. } = upstream;
        // `None`: nobody's. Nothing is done under the lock.
        let caller = {
            let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
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
        let usage = usage.unwrap_or_else(|| {
            let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(table.usage.entry(application.clone()).or_default())
        });
        usage.change(|open| open + 1);
        let (service, port, at) = (service.clone(), *port, Instant::now());
        let call = Call { tcp, from, service, port, at, open: OpenCall(usage) };
        let refused = match serving {
            Some(serving) => match serving.try_send(call) {
                Ok(()) => return "handed",
                Err(TrySendError::Full(call)) => (call, "overloaded"),
                Err(TrySendError::Closed(call)) => (call, "not_running"),
            },
            None => match waking.try_send((application, call)) {
                Ok(()) => return "waking",
                Err(TrySendError::Full((_, call)) | TrySendError::Closed((_, call))) => (call, "overloaded"),
            },
        };
        let (call, reason) = refused;
        call.refuse();
        reason
    }
}
