//! The control thread: everything that is not forwarding, and forwarding of control-kind packets.
//!
//! Owns the last socket of each group (ADR 4) and the source ports towards balanced peers; is the one writer of the
//! [`View`](crate::view::View) and of [`Status`]. What it knows and decides is in [`state`], without IO; this is the loop that
//! receives, sends and publishes. Where the kernel can't steer packets it is the only thread and forwards everything. Ends
//! when [`Shared::stop`](crate::dataplane::Shared::stop) is set and it is woken.

mod across;
mod hints;
pub mod hops;
pub mod state;
mod status;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::counters::{Reason, Slot};
use crate::dataplane::{Shared, Wakeup};
use crate::forward::{Arrival, Exits, Forwarder, Notice};
use crate::port::{Outgoing, Port};
use crate::sys;
use crate::view::{PortId, Side, Via};
use crate::worker::{Buffers, Received};
pub use state::{Effect, Send, State};
pub use status::{HopStatus, Status};

/// Drain flag, lost wake-ups and expiries are seen within this.
const LONGEST_WAIT: Duration = Duration::from_millis(250);
/// Batches taken from one socket before timers are looked at again: a flood must not stop the probes.
const BATCHES: usize = 8;
/// For who only reads; probes change figures all the time.
const STATUS_EVERY: Duration = Duration::from_millis(250);

/// The thread's parts.
#[derive(Debug)]
pub struct ControlThread {
    pub state: State,
    pub forwarder: Forwarder,
    pub exits: Exits,
    pub shared: Arc<Shared>,
    pub notices: mpsc::Receiver<Notice>,
    pub wakeup: Wakeup,
}

impl ControlThread {
    pub fn run(mut self) {
        let mut buffers = Buffers::new();
        let mut ports: HashMap<PortId, Arc<Port>> = HashMap::new();
        let mut ready = Vec::new();
        let mut next_status = Instant::now();
        while !self.shared.stop.load(Relaxed) {
            let mut effects = Vec::new();
            let now = Instant::now();
            self.state.set_draining(self.shared.draining.load(Relaxed));
            if let Some(tables) = self.shared.new_tables() {
                self.state.on_tables(tables, now, self.forwarder.now(), &mut effects);
            }
            while let Ok(notice) = self.notices.try_recv() {
                self.on_notice(notice, now, &mut effects);
            }
            self.state.on_tick(now, self.forwarder.now(), &mut effects);
            self.perform(effects, &mut ports, now);
            if self.state.is_dirty() {
                self.shared.publish(self.state.view(&ports, now));
                self.state.published();
                next_status = now;
            }
            if now >= next_status {
                next_status = now + STATUS_EVERY;
                self.shared.publish_status(self.state.status());
            }
            let timeout =
                self.state.next_tick(now).saturating_duration_since(Instant::now()).min(LONGEST_WAIT);
            let sources: Vec<(Via, Arc<Port>)> = [
                (Via::Side(Side::Border), Arc::clone(&self.exits.border)),
                (Via::Side(Side::Inner), Arc::clone(&self.exits.inner)),
            ]
            .into_iter()
            .chain(ports.iter().map(|(id, port)| (Via::Port(*id), Arc::clone(port))))
            .collect();
            let fds: Vec<_> =
                std::iter::once(self.wakeup.as_fd()).chain(sources.iter().map(|(_, p)| p.as_fd())).collect();
            if let Err(error) = sys::wait(&fds, &mut ready, timeout) {
                tracing::error!(%error, "waiting for packets failed");
                std::thread::sleep(LONGEST_WAIT);
            }
            self.wakeup.clear();
            let readable = sources.iter().zip(ready.iter().skip(1)).filter(|(_, ready)| **ready);
            for ((via, port), _) in readable {
                self.receive(*via, port, &mut buffers, &mut ports);
            }
        }
    }

    fn receive(
        &mut self,
        via: Via,
        port: &Arc<Port>,
        buffers: &mut Buffers,
        ports: &mut HashMap<PortId, Arc<Port>>,
    ) {
        let shared = Arc::clone(&self.shared);
        let mut notices = Vec::new();
        let mut done = false;
        for batch in 0..BATCHES {
            let view = shared.view.load();
            let now = self.forwarder.now();
            let forwarder = &mut self.forwarder;
            let received = buffers.receive(port, |buffer, meta| match &*view {
                Some(view) => {
                    forwarder.batch(view, via, buffer, meta, now, &mut |notice| notices.push(notice))
                }
                None => forwarder.discard(meta),
            });
            match received {
                Ok(Received::Full) => {}
                Ok(Received::All) => done = true,
                // Woken with nothing to read: an ICMP error whose code a send has taken already. It must come off the queue, or
                // the socket would be ready for ever.
                Ok(Received::Nothing) => {
                    done = true;
                    match &*view {
                        _ if batch > 0 => {}
                        Some(view) => {
                            self.forwarder.drain(view, port, &mut |notice| notices.push(notice));
                        }
                        None => port.drain_errors(|_, _| {}),
                    }
                }
                Err(_) => {
                    if let Some(view) = &*view {
                        self.forwarder.drain(view, port, &mut |notice| notices.push(notice));
                    }
                }
            }
            if !notices.is_empty() {
                let now = Instant::now();
                let mut effects = Vec::new();
                notices.drain(..).for_each(|notice| self.on_notice(notice, now, &mut effects));
                self.perform(effects, ports, now);
            }
            if done {
                return;
            }
        }
    }

    fn on_notice(&mut self, notice: Notice, now: Instant, effects: &mut Vec<Effect>) {
        let clocks = self.forwarder.now();
        match notice {
            Notice::Datagram(arrival) => {
                if let Err(error) = self.state.on_datagram(&arrival, now, clocks, effects) {
                    tracing::trace!(%error, source = %arrival.source, "control datagram dropped");
                    self.forwarder.tally().dropped(Slot::UNKNOWN, Reason::Control, 1);
                }
            }
            Notice::Gone { gone, origin, arrival } => {
                self.state.on_gone(gone, origin, &arrival, clocks, effects)
            }
            Notice::Refused(address) => self.state.on_refused(address, now, clocks, effects),
        }
    }

    fn perform(&mut self, effects: Vec<Effect>, ports: &mut HashMap<PortId, Arc<Port>>, now: Instant) {
        for effect in effects {
            match effect {
                Effect::Open(id) => {
                    match Port::bind((self.exits.border.local_addr().ip(), 0).into(), false) {
                        Ok(port) => drop(ports.insert(id, Arc::new(port))),
                        Err(error) => tracing::warn!(%error, "no further source port for a balanced peer"),
                    }
                }
                Effect::Close(id) => drop(ports.remove(&id)),
                Effect::Send(send) => self.send(&send, ports, now),
            }
        }
    }

    fn send(&mut self, send: &Send, ports: &HashMap<PortId, Arc<Port>>, now: Instant) {
        let port = match send.via {
            Via::Side(Side::Border) => &self.exits.border,
            Via::Side(Side::Inner) => &self.exits.inner,
            Via::Port(id) => match ports.get(&id) {
                Some(port) => port,
                None => return,
            },
        };
        let outgoing =
            Outgoing { to: send.to, from: send.from, ecn: None, contents: &send.bytes, segment: None };
        // Twice: the first failure may belong to an earlier packet. What is lost is sent again by whoever waits for it.
        for _ in 0..2 {
            let Err(error) = port.send(&outgoing) else { return };
            if error.raw_os_error() == Some(libc::EMSGSIZE) {
                if let Some((hop, sequence)) = send.probe {
                    self.state.on_too_large(hop, sequence, now);
                }
                return;
            }
            let mut refused = Vec::new();
            port.drain_errors(|to, errno| {
                if crate::port::is_refusal(errno) {
                    refused.push(to);
                }
            });
            // Their packets' GONE hints are left to the next error: this is the path of probes.
            refused.into_iter().for_each(|to| self.state.hop_refused(to, now));
        }
    }
}

/// An arrival without contents, for tests and hints.
impl Arrival {
    pub fn of(via: Via, source: std::net::SocketAddr, bytes: Vec<u8>) -> Self {
        Self { via, source, contacted: None, bytes }
    }
}
