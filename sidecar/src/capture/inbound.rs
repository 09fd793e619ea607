//! Inbound: connections from outside to the workload's own ports that do not come through the mesh.
//!
//! Nobody knows who they are. Strict: reset and counted. Permissive: handed to the application where they were going, as
//! if nothing had been in between but for the source address, which is the sidecar's; counted and logged, so that an
//! operator sees who would be refused. Tasks: one per listener, one per connection that is handed on.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tombolo_runtime::drain::Drain;
use tombolo_runtime::tasks::TaskGroup;

use super::metrics::{Captured, Outcome};
use super::pass::{self, Dialler};
use super::settings::InboundMode;
use crate::config::ServiceConfig;
use crate::copy::{self, IdleLimits};
use crate::listening::accept_until_drained;
use crate::metrics::Held;

/// As long as a stream of the mesh waits for the same application.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// What plain connections need.
#[derive(Clone, Debug)]
pub struct PlainContext {
    pub mode: InboundMode,
    pub services: Arc<[ServiceConfig]>,
    pub idle: IdleLimits,
    /// Shared with the mesh's streams: together they are what the application has to bear.
    pub slots: Arc<Semaphore>,
    pub dialler: Dialler,
    pub metrics: Captured,
    pub drain: Drain,
    pub tasks: TaskGroup,
}

/// Accepts what the rules hand to one address.
#[derive(Debug)]
pub struct PlainTask {
    listener: TcpListener,
    context: PlainContext,
}

impl PlainTask {
    pub fn new(listener: TcpListener, context: PlainContext) -> Self {
        Self { listener, context }
    }

    /// Until the drain starts: then the rules do by themselves what the mode says.
    pub async fn run(self) {
        let Self { listener, context } = self;
        let here = listener.local_addr().ok();
        accept_until_drained(listener, &context.drain, |tcp, from| take(&context, here, tcp, from)).await;
    }
}

fn take(context: &PlainContext, here: Option<SocketAddr>, tcp: TcpStream, from: SocketAddr) {
    let end = |tcp, outcome| {
        context.metrics.count(outcome);
        copy::abort(tcp);
    };
    // Not redirected: the socket has the address that was called.
    let Ok(to) = tcp.local_addr() else { return };
    if Some(to) == here {
        return end(tcp, Outcome::Direct);
    }
    if context.mode == InboundMode::Strict {
        log(context, from, to, 0, "plain_refused");
        return end(tcp, Outcome::PlainRefused);
    }
    let Ok(slot) = Arc::clone(&context.slots).try_acquire_owned() else {
        return end(tcp, Outcome::Overloaded);
    };
    let context = context.clone();
    let tasks = context.tasks.clone();
    tasks.spawn("plain connection", async move {
        let started = Instant::now();
        let reason = tokio::select! {
            biased;
            () = context.drain.forced() => "cut_by_drain",
            reason = hand_on(&context, tcp, to) => reason,
        };
        log(&context, from, to, started.elapsed().as_millis(), reason);
        drop(slot);
    });
}

async fn hand_on(context: &PlainContext, tcp: TcpStream, to: SocketAddr) -> &'static str {
    match context.dialler.connect(to, CONNECT_TIMEOUT).await {
        Ok(application) => {
            context.metrics.count(Outcome::PlainAllowed);
            let _open = Held::new(&context.metrics.open);
            pass::relay(tcp, &application, &context.metrics.bytes, &context.idle).await
        }
        Err(error) => {
            tracing::debug!(%error, %to, "the local application did not accept");
            context.metrics.count(Outcome::PlainFailed);
            copy::abort(tcp);
            Outcome::PlainFailed.name()
        }
    }
}

/// Who would be refused, or was.
fn log(context: &PlainContext, from: SocketAddr, to: SocketAddr, duration_ms: u128, reason: &'static str) {
    let served = |service: &&ServiceConfig| service.ports.iter().any(|port| port.target.port() == to.port());
    let service = context.services.iter().find(served).map(|service| service.service.to_string());
    tracing::info!(
        target: "access",
        direction = "inbound",
        plain = true,
        service = service.unwrap_or_default(),
        port = to.port(),
        client = %from,
        duration_ms = duration_ms as u64,
        reason,
        "connection"
    );
}
