//! An application's connections and flows of datagrams, as the front hands them to its sidecar.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tombolo_model::names::ServiceKey;

use super::front::{Call, Handed};
use crate::capture::wanted::{InUse, Wanted};
use crate::outbound::{self, OutboundContext, UpstreamPort};

/// A federator answers in milliseconds; one that is away may take this long to be back.
const ROUTE_PATIENCE: Duration = Duration::from_secs(5);

/// What an application's flows of datagrams need.
#[derive(Clone, Debug)]
pub(crate) struct Datagrams {
    pub outbound: Arc<OutboundContext>,
    wanted: Wanted,
}

impl Datagrams {
    /// Whether new flows are taken.
    pub fn takes(&self) -> bool {
        !self.outbound.drain.is_draining()
    }

    /// Until the service has a route; keeps it asked for.
    pub async fn routed(&self, service: &ServiceKey) -> Result<InUse, &'static str> {
        let held = self.wanted.want(service, Instant::now()).ok_or("too_many_services")?;
        let routed = tokio::time::timeout(ROUTE_PATIENCE, self.outbound.routed(service)).await;
        routed.map(|()| held).map_err(|_| "unknown_service")
    }
}

/// Carries what the front hands over.
#[derive(Debug)]
pub(crate) struct CallsTask {
    /// Those that waited for the sidecar to start.
    held: VecDeque<Call>,
    calls: mpsc::Receiver<Call>,
    outbound: OutboundContext,
    /// Services are asked for when they are first called.
    wanted: Wanted,
    /// As many as the front has upstreams.
    ports: HashMap<(ServiceKey, u16), Arc<UpstreamPort>>,
}

impl CallsTask {
    /// The front may hand over flows from now on.
    pub fn new((held, handed): (VecDeque<Call>, Handed), outbound: OutboundContext, wanted: Wanted) -> Self {
        let Handed { calls, datagrams } = handed;
        let takes = Datagrams { outbound: Arc::new(outbound.clone()), wanted: wanted.clone() };
        // Made once: a sidecar that is started again has a new one.
        let _ = datagrams.set(takes);
        Self { held, calls, outbound, wanted, ports: HashMap::new() }
    }

    /// Until the drain starts; what was handed over by then is carried.
    pub async fn run(mut self) {
        let drain = self.outbound.drain.clone();
        for call in std::mem::take(&mut self.held) {
            self.take(call);
        }
        loop {
            let call = tokio::select! {
                () = drain.started() => break,
                call = self.calls.recv() => call,
            };
            let Some(call) = call else { return };
            self.take(call);
        }
        self.calls.close();
        while let Some(call) = self.calls.recv().await {
            self.take(call);
        }
    }

    fn take(&mut self, call: Call) {
        let Call { tcp, from, service, port, open, .. } = call;
        let metrics = &self.outbound.metrics;
        let new = || Arc::new(UpstreamPort::new(service.clone(), port, metrics));
        let upstream = Arc::clone(self.ports.entry((service.clone(), port)).or_insert_with(new));
        let Some(held) = self.wanted.want(&service, Instant::now()) else {
            return outbound::refuse(tcp, &upstream, "too_many_services");
        };
        if self.outbound.routes.of(&service).is_some() {
            return outbound::start(tcp, from, &upstream, &self.outbound, (held, open));
        }
        let context = self.outbound.clone();
        self.outbound.tasks.spawn("first call", async move {
            let routed = tokio::select! {
                () = context.drain.forced() => false,
                routed = tokio::time::timeout(ROUTE_PATIENCE, context.routed(&service)) => routed.is_ok(),
            };
            if routed {
                outbound::start(tcp, from, &upstream, &context, (held, open));
            } else {
                tracing::info!(client = %from, %service, "a call is refused: no such service is known here");
                outbound::refuse(tcp, &upstream, "unknown_service");
            }
        });
    }
}
