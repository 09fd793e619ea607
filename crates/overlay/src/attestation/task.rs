//! One task that looks after the identities on every live connection of an overlay: shows a swapped SVID, paced, and
//! drains and closes connections whose peer has not shown a new one.
//!
//! Owns the table of what was shown where; [`AttestationHandle`] adds to it. What peers show is judged by the task that
//! reads their control stream ([`crate::control_stream`]). Ends with its task group.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tombolo_identity::{Svid, SvidHandle};
use tombolo_proto::v1::{ControlMessage, control_message};
use tombolo_runtime::clock;
use tombolo_runtime::tasks::TaskGroup;

use super::{Expiry, Moment, Refusal, Sender, Verdict, message};
use crate::connection::{HandleClass, PeerConnection, close_code};
use crate::transport::Limits;

/// A swap is shown within this: a renewed leaf comes hours before the old one's end.
const TICK: Duration = Duration::from_secs(1);
/// While connections wait for their turn: a signature and an exporter are 60 us, so 10 of them stall nobody.
const PACE: Duration = Duration::from_millis(50);
/// New connections waiting for the task; more wait with their handshake.
const QUEUE: usize = 1024;

/// What happened to identities on live connections.
#[derive(Debug, Default)]
pub(crate) struct AttestationCounters {
    pub attested: AtomicU64,
    pub expired_closed: AtomicU64,
    refused: [AtomicU64; Refusal::KINDS.len()],
}

impl AttestationCounters {
    pub fn refused(&self, refusal: &Refusal) {
        let kind = refusal.kind();
        for (counter, _) in self.refused.iter().zip(Refusal::KINDS).filter(|(_, k)| *k == kind) {
            counter.fetch_add(1, Relaxed);
        }
    }
    pub fn refusals(&self) -> RefusalCounts {
        RefusalCounts(std::array::from_fn(|at| self.refused.get(at).map_or(0, |c| c.load(Relaxed))))
    }
}

/// Refused re-attestations by [`Refusal::kind`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RefusalCounts([u64; Refusal::KINDS.len()]);

impl RefusalCounts {
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        Refusal::KINDS.into_iter().zip(self.0)
    }
    pub fn of(&self, kind: &str) -> u64 {
        self.iter().filter(|(k, _)| *k == kind).map(|(_, count)| count).sum()
    }
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

/// Adds connections.
#[derive(Clone, Debug)]
pub(crate) struct AttestationHandle(mpsc::Sender<Watched>);

impl AttestationHandle {
    /// `shown`: the SVID from before the handshake; it may have shown a newer one, never an older one.
    pub async fn watch(&self, connection: PeerConnection, shown: &Svid) {
        // A joiner has no identity, and is gone in seconds.
        if connection.class() != HandleClass::Join {
            let _ = self.0.send(Watched { connection, sender: Sender::new(shown), expiry: None }).await;
        }
    }
}

#[derive(Debug)]
struct Watched {
    connection: PeerConnection,
    sender: Sender,
    expiry: Option<Expiry>,
}

struct AttestationTask {
    svid: SvidHandle,
    patience: Duration,
    per_pace: usize,
    counters: Arc<AttestationCounters>,
    watched: Vec<Watched>,
}

pub(crate) fn spawn(
    svid: SvidHandle,
    limits: &Limits,
    counters: Arc<AttestationCounters>,
    tasks: &TaskGroup,
) -> AttestationHandle {
    let (sender, events) = mpsc::channel(QUEUE);
    let per_pace = (f64::from(limits.attestations_per_second) * PACE.as_secs_f64()).ceil() as usize;
    let task = AttestationTask {
        svid,
        patience: limits.expired_patience,
        per_pace: per_pace.max(1),
        counters,
        watched: Vec::new(),
    };
    tasks.spawn("overlay attestation", task.run(events));
    AttestationHandle(sender)
}

impl AttestationTask {
    async fn run(mut self, mut events: mpsc::Receiver<Watched>) {
        let tick = TICK.min(self.patience / 10).max(Duration::from_millis(10));
        let mut next_tick = Instant::now() + tick;
        let mut wake = next_tick;
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    None => return,
                    Some(watched) => self.watched.push(watched),
                },
                () = tokio::time::sleep_until(wake.into()) => {
                    let now = Moment { unix: clock::since_unix_epoch(), at: Instant::now() };
                    if now.at >= next_tick {
                        self.expire(now);
                        next_tick = now.at + tick;
                    }
                    wake = if self.show(now) { next_tick.min(now.at + PACE) } else { next_tick };
                }
            }
        }
    }

    /// Drains and closes where the peer's identity has ended.
    fn expire(&mut self, now: Moment) {
        let Self { watched, counters, patience, .. } = self;
        watched.retain_mut(|w| {
            if w.connection.is_closed() {
                // Whoever closed it: its peer's identity had ended.
                counters.expired_closed.fetch_add(u64::from(w.connection.expired()), Relaxed);
                return false;
            }
            let Some(identity) = w.connection.identity() else { return true };
            let expiry = w.expiry.get_or_insert_with(|| Expiry::new(*patience, rand::random()));
            match expiry.step(identity.not_after, now) {
                Verdict::Live => {}
                Verdict::Drain if w.connection.expired() => {}
                Verdict::Drain => {
                    tracing::warn!(peer = %identity.spiffe_id, not_after = identity.not_after,
                        "the peer's identity has ended and it has shown no new one: the connection is drained");
                    w.connection.expire();
                }
                Verdict::Close => {
                    w.connection.expire();
                    w.connection.close(close_code::EXPIRED, "your identity has ended");
                }
            }
            true
        });
    }

    /// Shows the current SVID where that is due, a few at a time. True: some are left.
    fn show(&mut self, now: Moment) -> bool {
        let svid = self.svid.load();
        let mut budget = self.per_pace;
        for w in self.watched.iter_mut().filter(|w| w.sender.is_due(&svid, now)) {
            if budget == 0 {
                return true;
            }
            // A peer that does not read its control stream is no reason to sign for nothing.
            if !w.connection.control().has_room() {
                continue;
            }
            budget -= 1;
            let sequence = w.sender.shown(&svid, now);
            let Some(exporter) = w.connection.exporter() else { continue };
            match message(&svid, w.connection.role(), sequence, &exporter) {
                Ok(reattest) => {
                    let message = Some(control_message::Message::Reattest(reattest));
                    if !w.connection.send_control(&ControlMessage { message }) {
                        tracing::warn!(peer = ?w.connection.peer_endpoint(), "the own chain can't be shown to a peer");
                    }
                }
                Err(error) => tracing::warn!(%error, "the own identity can't be shown on live connections"),
            }
        }
        false
    }
}
