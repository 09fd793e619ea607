//! One task that looks after the identities on every live connection of an overlay: shows a swapped SVID, paced, drains
//! and closes connections whose peer has not shown a new one, and cuts those whose peer is revoked.
//!
//! Owns the table of what was shown where; [`AttestationHandle`] adds to it. What peers show is judged by the task that
//! reads their control stream ([`crate::control_stream`]). Ends with its task group.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
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
    pub revoked_closed: AtomicU64,
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
    pub(crate) fn plus(self, other: Self) -> Self {
        let of = |counts: &Self, at: usize| counts.0.get(at).copied().unwrap_or(0);
        Self(std::array::from_fn(|at| of(&self, at) + of(&other, at)))
    }
}

#[derive(Debug)]
enum Event {
    Watch(Box<Watched>),
    /// Answered with how many connections were cut, once they are.
    Cut(Cut, oneshot::Sender<u64>),
}

/// Which connections are cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Cut {
    /// Those whose peer the current SVID's bundles call revoked.
    Revoked,
    All,
}

/// Adds connections, and has revocations enforced.
#[derive(Clone, Debug)]
pub(crate) struct AttestationHandle(mpsc::Sender<Event>);

impl AttestationHandle {
    /// `shown`: the SVID from before the handshake; it may have shown a newer one, never an older one.
    pub async fn watch(&self, connection: PeerConnection, shown: &Svid) {
        // A joiner has no identity, who renews has one that has ended, and both are gone in seconds.
        if !matches!(connection.class(), HandleClass::Join | HandleClass::Renewal) {
            let watched = Watched { connection, sender: Sender::new(shown), expiry: None };
            let _ = self.0.send(Event::Watch(Box::new(watched))).await;
        }
    }

    /// How many were cut, once they are. `None`: the overlay is ending.
    pub async fn cut(&self, which: Cut) -> Option<u64> {
        let (done, cut) = oneshot::channel();
        self.0.send(Event::Cut(which, done)).await.ok()?;
        cut.await.ok()
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
    async fn run(mut self, mut events: mpsc::Receiver<Event>) {
        let tick = TICK.min(self.patience / 10).max(Duration::from_millis(10));
        let mut next_tick = Instant::now() + tick;
        let mut wake = next_tick;
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    None => return,
                    Some(Event::Watch(watched)) => {
                        // Authenticated, perhaps, by a list from before.
                        self.cut_revoked(std::slice::from_ref(&watched.connection));
                        self.watched.push(*watched);
                    }
                    Some(Event::Cut(which, done)) => {
                        let all: Vec<_> = self.watched.iter().map(|w| w.connection.clone()).collect();
                        let cut = match which {
                            Cut::Revoked => self.cut_revoked(&all),
                            Cut::All => cut_all(&all),
                        };
                        let _ = done.send(cut);
                    }
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

    /// Closes those whose peer is revoked; how many.
    fn cut_revoked(&self, connections: &[PeerConnection]) -> u64 {
        let svid = self.svid.load();
        let revocations = svid.bundles.revocations();
        let mut cut = 0;
        for connection in connections.iter().filter(|c| !c.is_closed()) {
            let Some(identity) = connection.identity() else { continue };
            let Some(revocation) = revocations.of(&identity) else { continue };
            tracing::warn!(peer = %identity.spiffe_id, %revocation, "the peer is revoked: its connection is cut");
            connection.close(close_code::REVOKED, "your identity is revoked");
            cut += 1;
        }
        self.counters.revoked_closed.fetch_add(cut, Relaxed);
        cut
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

fn cut_all(connections: &[PeerConnection]) -> u64 {
    let open = connections.iter().filter(|c| !c.is_closed());
    open.map(|c| c.close(close_code::REVOKED, "my identity is revoked")).count() as u64
}
