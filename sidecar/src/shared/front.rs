//! Where applications call: listeners that hand each connection to the sidecar of whoever it comes from.
//!
//! An address that is no application's is reset: whoever can reach the listener must not get an identity by that alone.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tombolo_model::names::ServiceKey;
use tombolo_runtime::drain::Drain;
use tombolo_runtime::tasks::TaskGroup;

use super::config::{Application, Callers};
use crate::config::UpstreamConfig;
use crate::copy;
use crate::listening::{self, ListenError, Listeners, accept_until_drained};

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
    listening: Vec<(UpstreamConfig, Listeners)>,
    calls: Family<CallLabels, Counter>,
}

/// Who calls from where, and who takes it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Front(Arc<RwLock<Table>>);

#[derive(Debug, Default)]
struct Table {
    callers: Callers,
    serving: HashMap<String, mpsc::Sender<Call>>,
}

impl Fronts {
    pub fn bind(upstreams: &[UpstreamConfig], registry: &mut Registry) -> Result<Self, ListenError> {
        let calls = Family::default();
        registry.register("calls", "Connections to the front, by what became of them", calls.clone());
        let mut bound = Vec::new();
        for upstream in upstreams {
            let listeners = listening::listen(upstream.listen, 1).map_err(|source| {
                let service = upstream.service.to_string();
                ListenError::Upstream { service, listen: upstream.listen, source }
            })?;
            bound.push((upstream.clone(), listeners));
        }
        Ok(Self { listening: bound, calls })
    }

    /// Listens until the drain starts.
    pub fn start(self, drain: &Drain, tasks: &TaskGroup) -> std::io::Result<Front> {
        let front = Front::default();
        for (upstream, listeners) in self.listening {
            for listener in listeners {
                let listener = TcpListener::from_std(listener)?;
                let (front, drain, calls) = (front.clone(), drain.clone(), self.calls.clone());
                let upstream = upstream.clone();
                tasks.spawn("front", async move {
                    let take = |tcp, from| {
                        let UpstreamConfig { service, port, .. } = &upstream;
                        let call = Call { tcp, from, service: service.clone(), port: *port };
                        calls.get_or_create(&CallLabels { result: front.hand(call) }).inc();
                    };
                    accept_until_drained(listener, &drain, take).await;
                });
            }
        }
        Ok(front)
    }
}

impl Front {
    /// Who calls from where, from now on.
    pub fn know(&self, applications: &[Application]) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).callers = Callers::new(applications);
    }

    /// Who takes an application's calls; `None`: nobody does now.
    pub fn serve(&self, application: &str, calls: Option<mpsc::Sender<Call>>) {
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match calls {
            Some(calls) => drop(table.serving.insert(application.to_owned(), calls)),
            None => drop(table.serving.remove(application)),
        }
    }

    /// Hands a connection on, or resets it. What became of it.
    fn hand(&self, call: Call) -> &'static str {
        // `None`: nobody's; `Some(None)`: of one whose sidecar does not run. Nothing is done under the lock.
        let serving = {
            let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
            let application = table.callers.of(call.from.ip());
            application.map(|application| table.serving.get(application).cloned())
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
