//! Outbound: what applications connect to without knowing of the mesh.
//!
//! A connection to an address of a service is given to [`crate::outbound`] as if it had come by an explicit listener; one
//! to anything else goes on to where it was going. A service that nobody has called yet is asked for first: its first
//! connection waits for the federator's answer. Tasks: one per listener; per connection one that waits or passes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tombolo_model::names::ServiceKey;
use tombolo_model::protocol::Protocol;

use super::listener::original_destination;
use super::metrics::{Captured, Outcome};
use super::pass::{self, Dialler};
use super::targets::{Target, Targets};
use super::wanted::{InUse, Wanted};
use crate::copy;
use crate::listening::accept_until_drained;
use crate::metrics::Held;
use crate::outbound::{self, OutboundContext, UpstreamPort};
use crate::tables::Tables;

/// A federator answers in milliseconds; one that is away may take this long to be back, or another to be found.
const ROUTE_PATIENCE: Duration = Duration::from_secs(5);
/// Ports of services that are remembered with their metrics' handles; more are looked up again.
const MAX_REMEMBERED: usize = 1024;
/// To tell the rules that somebody listens again: within the machine.
const ANNOUNCE_TIMEOUT: Duration = Duration::from_secs(1);

/// What captured connections need.
#[derive(Clone, Debug)]
pub struct CapturedContext {
    pub outbound: OutboundContext,
    pub targets: watch::Receiver<Arc<Targets>>,
    pub tables: watch::Receiver<Option<Arc<Tables>>>,
    pub wanted: Wanted,
    pub dialler: Dialler,
    /// Of connections that are passed on: a flood of ours must not take the machine's own away.
    pub pass_slots: Arc<Semaphore>,
    pub metrics: Captured,
}

/// Accepts what the rules redirect to one address.
#[derive(Debug)]
pub struct CapturedTask {
    context: CapturedContext,
    remembered: HashMap<(ServiceKey, u16), Arc<UpstreamPort>>,
}

impl CapturedTask {
    pub fn new(context: CapturedContext) -> Self {
        Self { context, remembered: HashMap::new() }
    }

    /// Until the drain starts: then the listener closes, and the rules have new connections wait.
    pub async fn run(mut self, listener: TcpListener) {
        let (drain, tasks) = (self.context.outbound.drain.clone(), self.context.outbound.tasks.clone());
        if let Ok(here) = listener.local_addr() {
            tasks.spawn("capture announcement", announce(self.context.dialler.clone(), here));
        }
        accept_until_drained(listener, &drain, |tcp, from| self.take(tcp, from)).await;
    }

    fn take(&mut self, tcp: TcpStream, from: SocketAddr) {
        let context = &self.context;
        let to = match original_destination(&tcp) {
            Ok(Some(to)) => to,
            Ok(None) => {
                if !context.dialler.is_own(from) {
                    context.end(tcp, Outcome::Direct);
                }
                return;
            }
            Err(error) => {
                tracing::debug!(%error, %from, "a captured connection is over before it was taken");
                return;
            }
        };
        if context.dialler.has_come_back(from) {
            return context.end(tcp, Outcome::Loop);
        }
        let target = context.targets.borrow().of(Protocol::Tcp, to);
        match target {
            Target::Other => context.pass(tcp, from, to),
            Target::Service { service, port } if context.routed(&service) => {
                match context.hold(&service) {
                    Ok(held) if context.serves(&service, Protocol::Tcp, port) => {
                        context.metrics.count(Outcome::Service);
                        let upstream = self.upstream(service, port);
                        outbound::start(tcp, from, &upstream, &self.context.outbound, held);
                    }
                    Ok(_) => context.end(tcp, Outcome::Unknown),
                    Err(outcome) => context.end(tcp, outcome),
                };
            }
            Target::Service { .. } | Target::Unknown => {
                let (waiting, tasks) = (context.clone(), context.outbound.tasks.clone());
                tasks.spawn("captured connection", waiting.wait(tcp, from, to));
            }
        }
    }

    fn upstream(&mut self, service: ServiceKey, port: u16) -> Arc<UpstreamPort> {
        if self.remembered.len() >= MAX_REMEMBERED {
            self.remembered.clear();
        }
        let metrics = &self.context.outbound.metrics;
        let new = || Arc::new(UpstreamPort::new(service.clone(), port, metrics));
        Arc::clone(self.remembered.entry((service.clone(), port)).or_insert_with(new))
    }
}

impl CapturedContext {
    fn end(&self, tcp: TcpStream, outcome: Outcome) {
        self.metrics.count(outcome);
        copy::abort(tcp);
    }

    fn routed(&self, service: &ServiceKey) -> bool {
        self.outbound.routes.of(service).is_some()
    }

    /// Whether the service has this port, as far as that is known.
    fn serves(&self, service: &ServiceKey, protocol: Protocol, port: u16) -> bool {
        let tables = self.tables.borrow();
        let upstream = tables.as_ref().and_then(|tables| tables.upstreams.get(service));
        upstream.is_none_or(|upstream| upstream.may_serve(protocol, port))
    }

    /// What an address stands for over UDP. Nothing waits for names that are not known yet: who asks asks again.
    pub(crate) fn datagram_target(&self, to: SocketAddr) -> Result<(ServiceKey, u16), Outcome> {
        match self.targets.borrow().of(Protocol::Udp, to) {
            Target::Service { service, port } => Ok((service, port)),
            Target::Unknown => Err(Outcome::Unknown),
            // The rules hand over nothing else.
            Target::Other => Err(Outcome::Direct),
        }
    }

    /// Until a service has a route; keeps it asked for.
    pub(crate) async fn datagrams_routed(&self, service: &ServiceKey, port: u16) -> Result<InUse, Outcome> {
        let held = self.hold(service)?;
        let routed = tokio::time::timeout(ROUTE_PATIENCE, self.outbound.routed(service)).await;
        if routed.is_ok() && self.serves(service, Protocol::Udp, port) {
            Ok(held)
        } else {
            Err(Outcome::Unknown)
        }
    }

    /// Keeps the service asked for while the connection lasts.
    fn hold(&self, service: &ServiceKey) -> Result<InUse, Outcome> {
        self.wanted.want(service, Instant::now()).ok_or(Outcome::TooManyServices)
    }

    fn pass(&self, tcp: TcpStream, from: SocketAddr, to: SocketAddr) {
        let Ok(slot) = Arc::clone(&self.pass_slots).try_acquire_owned() else {
            return self.end(tcp, Outcome::Overloaded);
        };
        let context = self.clone();
        self.outbound.tasks.spawn("passed connection", async move {
            let reason = tokio::select! {
                biased;
                () = context.outbound.drain.forced() => "cut_by_drain",
                reason = context.carry_on(tcp, to) => reason,
            };
            tracing::debug!(target: "access", direction = "passed", client = %from, to = %to, reason, "connection");
            drop(slot);
        });
    }

    async fn carry_on(&self, tcp: TcpStream, to: SocketAddr) -> &'static str {
        match self.dialler.pass(to).await {
            Ok(far) => {
                self.metrics.count(Outcome::Passed);
                let _open = Held::new(&self.metrics.open);
                pass::relay(tcp, &far, &self.metrics.bytes, &self.outbound.idle).await
            }
            Err(error) => {
                tracing::debug!(%error, %to, "where a captured connection was going, nobody answers");
                self.end(tcp, Outcome::PassFailed);
                "pass_failed"
            }
        }
    }

    /// For a service that is not known, or not configured, yet.
    async fn wait(self, tcp: TcpStream, from: SocketAddr, to: SocketAddr) {
        let deadline = tokio::time::Instant::now() + ROUTE_PATIENCE;
        let ready = tokio::select! {
            () = self.outbound.drain.forced() => return copy::abort(tcp),
            ready = tokio::time::timeout_at(deadline, self.ready(to)) => ready,
        };
        match ready {
            Ok(Ok((service, port, held))) => {
                self.metrics.count(Outcome::Service);
                let upstream = Arc::new(UpstreamPort::new(service, port, &self.outbound.metrics));
                outbound::start(tcp, from, &upstream, &self.outbound, held);
            }
            Ok(Err(outcome)) => self.end(tcp, outcome),
            Err(_) => {
                tracing::info!(client = %from, %to, "a captured connection is refused: its address stands for no service that is known here");
                self.end(tcp, Outcome::Unknown);
            }
        }
    }

    /// Until the address stands for a service, and that has a route.
    async fn ready(&self, to: SocketAddr) -> Result<(ServiceKey, u16, InUse), Outcome> {
        let mut targets = self.targets.clone();
        let (service, port) = loop {
            let (target, known) = {
                let targets = targets.borrow_and_update();
                (targets.of(Protocol::Tcp, to), targets.complete())
            };
            match target {
                Target::Service { service, port } => break (service, port),
                Target::Unknown | Target::Other if known => return Err(Outcome::Unknown),
                Target::Unknown | Target::Other => {}
            }
            if targets.changed().await.is_err() {
                return Err(Outcome::Unknown);
            }
        };
        let held = self.hold(&service)?;
        self.outbound.routed(&service).await;
        if self.serves(&service, Protocol::Tcp, port) {
            Ok((service, port, held))
        } else {
            Err(Outcome::Unknown)
        }
    }
}

/// Connects to the listener once: the rules see that somebody listens, and send no more connections past it.
async fn announce(dialler: Dialler, here: SocketAddr) {
    if let Err(error) = dialler.connect(here, ANNOUNCE_TIMEOUT).await {
        tracing::debug!(%error, %here, "the capture's listener does not answer itself");
    }
}
