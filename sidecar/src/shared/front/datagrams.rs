//! Datagrams to the front: whose flow each begins, and whether a flow is still its caller's.
//!
//! The flows themselves are [`crate::udp::listener`]'s; each counts as an open call of its application. The first datagram for
//! an application whose sidecar does not run starts it, and is lost: who asks by UDP asks again.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, PoisonError};

use arc_swap::ArcSwap;
use tombolo_runtime::drain::Drain;

use super::{Calls, Front, Fronts, OpenCall, Waking};
use crate::config::UpstreamConfig;
use crate::metrics::Metrics;
use crate::outbound::UpstreamPort;
use crate::shared::Datagrams;
use crate::udp::listener::{DatagramTask, UdpPort, Way};
use crate::udp::socket::{self as udp, Socket};

/// A UDP listener that applications share.
#[derive(Debug)]
pub(crate) struct SharedPort {
    front: Front,
    calls: Calls,
    metrics: Metrics,
    /// What is called there now, and its handles.
    upstream: Arc<ArcSwap<UpstreamConfig>>,
    port: Mutex<(Arc<UpstreamConfig>, Arc<UdpPort>)>,
}

impl Fronts {
    /// Takes datagrams until the drain starts.
    pub(super) fn datagrams(&self, upstream: &Arc<ArcSwap<UpstreamConfig>>, drain: &Drain) -> io::Result<()> {
        for socket in udp::listen(upstream.load().listen, 1)? {
            let port = SharedPort::new(self, Arc::clone(upstream));
            let socket = Socket::listening(socket)?;
            let task = DatagramTask::new(socket, Way::Shared(Arc::new(port)), &self.metrics, drain.clone());
            self.tasks.spawn("front datagrams", task.run());
        }
        Ok(())
    }
}

impl SharedPort {
    fn new(fronts: &Fronts, upstream: Arc<ArcSwap<UpstreamConfig>>) -> Self {
        let now = upstream.load_full();
        let port = Arc::new(handles(&now, &fronts.metrics));
        let (front, calls, metrics) = (fronts.front.clone(), fronts.calls.clone(), fronts.metrics.clone());
        Self { front, calls, metrics, upstream, port: Mutex::new((now, port)) }
    }

    /// What is called there now.
    pub fn port(&self) -> Arc<UdpPort> {
        let now = self.upstream.load_full();
        let mut known = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&known.0, &now) {
            let port = Arc::new(handles(&now, &self.metrics));
            *known = (now, port);
        }
        Arc::clone(&known.1)
    }

    /// Whose a new flow is; what is returned is held for as long as it is open.
    pub fn caller(&self, from: IpAddr) -> Result<(Arc<str>, Datagrams, OpenCall), &'static str> {
        let found = self.front.datagrams_of(from, &self.calls);
        self.calls.count(found.as_ref().map_or_else(|error| *error, |_| "handed"));
        found
    }

    /// Whether a flow's caller is still who it was.
    pub fn is_of(&self, from: IpAddr, application: &str) -> bool {
        let table = self.front.0.table.read().unwrap_or_else(PoisonError::into_inner);
        table.callers.of(from) == Some(application)
    }

    /// Changes when anybody's addresses may have become another's, or what is called here.
    pub fn generation(&self) -> u64 {
        self.front.0.generation.load(Relaxed)
    }
}

fn handles(upstream: &UpstreamConfig, metrics: &Metrics) -> UdpPort {
    UdpPort::new(UpstreamPort::new(upstream.service.clone(), upstream.port, metrics), metrics)
}

impl Front {
    fn datagrams_of(
        &self,
        from: IpAddr,
        calls: &Calls,
    ) -> Result<(Arc<str>, Datagrams, OpenCall), &'static str> {
        let (application, serving, usage) = {
            let table = self.0.table.read().unwrap_or_else(PoisonError::into_inner);
            let application = table.callers.of(from).ok_or("unknown_caller")?;
            let found = (table.serving.get(application).cloned(), table.usage.get(application).cloned());
            (Arc::<str>::from(application), found.0, found.1)
        };
        let Some(serving) = serving else {
            let waking = Waking { name: application.to_string(), call: None };
            // They are sent again anyway: half of the room is for calls.
            let room = calls.waking.capacity() * 2 > calls.waking.max_capacity();
            return Err(if room && calls.waking.try_send(waking).is_ok() { "waking" } else { "overloaded" });
        };
        // Until its sidecar has started there is nobody to give them to.
        let datagrams = serving.datagrams.get().filter(|datagrams| datagrams.takes()).ok_or("not_running")?;
        let open = self.opened(&application, usage);
        Ok((application, datagrams.clone(), open))
    }
}
