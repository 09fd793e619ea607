//! One task that watches every connection of an overlay: kicks stalled ones, checks GONE hints, closes what is gone.
//!
//! Owns the table of live connections; [`LivenessHandle`] adds to it and passes hints. A tick reads a few atomics per
//! connection, so thousands cost little. Ends with its task group.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;
use tombolo_model::ids::{ClusterTag, EndpointId};
use tombolo_runtime::tasks::TaskGroup;

use crate::connection::{PeerConnection, close_code};
use crate::kick::{KickState, Progress, Verdict};
use crate::socket::OverlaySocket;

/// A tenth of the shortest reaction (200 ms).
const TICK: Duration = Duration::from_millis(20);
/// Hints and new connections waiting for the task; more hints than this are dropped, connections wait.
const QUEUE: usize = 1024;

#[derive(Debug)]
enum Event {
    Watch(PeerConnection),
    Gone(ClusterTag, EndpointId),
    Announced(PeerConnection),
}

#[derive(Clone, Debug)]
pub(crate) struct LivenessHandle(mpsc::Sender<Event>);

impl LivenessHandle {
    pub async fn watch(&self, connection: PeerConnection) {
        let _ = self.0.send(Event::Watch(connection)).await;
    }
    /// A hint that an endpoint is no more. Anyone may have forged it.
    fn hint_gone(&self, tag: ClusterTag, endpoint: EndpointId) {
        let _ = self.0.try_send(Event::Gone(tag, endpoint));
    }
    /// A peer has announced its endpoint: older incarnations of the same holder are gone for certain.
    fn announced(&self, connection: PeerConnection) {
        let _ = self.0.try_send(Event::Announced(connection));
    }
}

/// Hints for every part of an endpoint: one of them gets the datagrams, any may hold the connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hints(Arc<Mutex<Vec<LivenessHandle>>>);

impl Hints {
    pub fn add(&self, part: LivenessHandle) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(part);
    }
    /// A peer has announced its endpoint to one part: the older incarnation may be known to another.
    pub fn announced(&self, connection: &PeerConnection) {
        let parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        parts.iter().for_each(|part| part.announced(connection.clone()));
    }
    pub fn gone(&self, tag: ClusterTag, endpoint: EndpointId) {
        let parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        parts.iter().for_each(|part| part.hint_gone(tag, endpoint));
    }
}

struct Watched {
    connection: PeerConnection,
    kick: KickState,
}

impl Watched {
    fn progress(&self) -> Progress {
        let congestion = self.connection.congestion();
        let in_flight = congestion.is_some_and(|c| c.bytes_in_flight() > 0);
        // Reading the RTT takes the connection's lock: not for thousands of idle ones.
        let srtt = if in_flight || self.kick.is_checking() { self.connection.rtt() } else { Duration::ZERO };
        Progress { in_flight, last_ack: congestion.and_then(|c| c.last_ack()), srtt }
    }
}

pub(crate) fn spawn(socket: Arc<OverlaySocket>, tasks: &TaskGroup) -> LivenessHandle {
    let (sender, receiver) = mpsc::channel(QUEUE);
    tasks.spawn("overlay liveness", run(socket, receiver));
    LivenessHandle(sender)
}

async fn run(socket: Arc<OverlaySocket>, mut events: mpsc::Receiver<Event>) {
    let mut watched: Vec<Watched> = Vec::new();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            event = events.recv() => match event {
                None => return,
                Some(Event::Watch(connection)) => {
                    watched.push(Watched { connection, kick: KickState::default() });
                }
                Some(Event::Gone(tag, endpoint)) => {
                    let now = Instant::now();
                    let about = |w: &&mut Watched| w.connection.peer_endpoint() == Some((tag, endpoint));
                    watched.iter_mut().filter(about).for_each(|w| w.kick.hint_gone(w.progress(), now));
                }
                Some(Event::Announced(newer)) => close_replaced(&watched, &newer),
            },
            _ = tick.tick(), if !watched.is_empty() => {
                watched.retain(|w| !w.connection.is_closed());
                let now = Instant::now();
                watched.iter_mut().for_each(|w| step(&socket, w, now));
            }
        }
    }
}

fn step(socket: &OverlaySocket, watched: &mut Watched, now: Instant) {
    let progress = watched.progress();
    match watched.kick.step(progress, now) {
        Verdict::Nothing => {}
        Verdict::Kick => {
            if let Some((tag, endpoint)) = watched.connection.peer_endpoint() {
                socket.rotate(tag, endpoint);
            }
            if let Some(congestion) = watched.connection.congestion() {
                congestion.lift_for_one_packet();
            }
            let _ = watched.connection.quic().send_datagram(Bytes::from_static(&[0]));
        }
        Verdict::Gone => {
            tracing::debug!(peer = ?watched.connection.peer_endpoint(), "peer endpoint is gone");
            watched.connection.close(close_code::GONE, "the endpoint is gone");
        }
    }
    watched.connection.note_kicks(watched.kick.unanswered(), now);
}

/// A new connection that authenticates as the same SPIFFE ID and block with another incarnation proves that the old
/// one is no more.
fn close_replaced(watched: &[Watched], newer: &PeerConnection) {
    let (Some((tag, endpoint)), Some(identity)) = (newer.peer_endpoint(), newer.identity()) else { return };
    for old in watched.iter().map(|w| &w.connection) {
        let Some((old_tag, old_endpoint)) = old.peer_endpoint() else { continue };
        let replaced = old_tag == tag
            && old_endpoint.block() == endpoint.block()
            && old_endpoint.incarnation() != endpoint.incarnation()
            && old.identity().is_some_and(|id| id.spiffe_id == identity.spiffe_id)
            && old.opened() < newer.opened();
        if replaced {
            old.close(close_code::REPLACED, "a newer incarnation has authenticated");
        }
    }
}
