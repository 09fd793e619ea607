//! One authenticated peer connection: who the peer is, what the connection is for, and whether it may still be used.
//!
//! The identity is what the handshake proved, and later what the peer's control stream proved ([`crate::attestation`]):
//! the SPIFFE ID, cluster and tag never change, the chain and its end do.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use quinn::{Connection, ConnectionError, Side, VarInt};
use quinn_proto::TransportErrorCode;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tombolo_identity::PeerIdentity;
use tombolo_identity::verify::Usage;
use tombolo_model::ids::{ClusterTag, EndpointId, Handle};
use tombolo_model::names::ClusterName;
use tombolo_proto::stream_header::{self, MAX_CONTROL_BYTES};
use tombolo_proto::v1::{ControlMessage, EndpointAnnounce};

use crate::attestation::{EXPORTER_BYTES, EXPORTER_LABEL};
use crate::congestion::{ControllerState, ModelController};
use crate::control_stream::ControlQueue;

/// Close codes on the wire (QUIC application error codes).
pub mod close_code {
    /// Nothing more to say.
    pub const DONE: u32 = 0;
    /// The peer was told gone, and did not answer.
    pub const GONE: u32 = 1;
    /// The handle does not admit this caller, or is not served here.
    pub const NOT_ADMITTED: u32 = 2;
    /// The process is draining.
    pub const DRAINING: u32 = 3;
    /// Idle for longer than the pool keeps connections.
    pub const IDLE: u32 = 4;
    /// A newer incarnation of the peer has authenticated.
    pub const REPLACED: u32 = 5;
    /// The peer's identity has ended, and it has shown no new one.
    pub const EXPIRED: u32 = 6;
    /// The peer's identity is revoked.
    pub const REVOKED: u32 = 7;
}

/// What the handle of a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum HandleClass {
    /// Application streams of one service.
    Mesh,
    /// gRPC with a federator.
    Control,
    /// Joining with a token: the caller has no identity yet.
    Join,
    /// Renewing an identity that has ended.
    Renewal,
    /// A federator of a cluster that is to be linked: one call, and nothing else.
    FirstContact,
}

/// What an accepted connection is pinned to by its original connection ID.
#[derive(Clone, Debug)]
pub struct Pinned {
    pub handle: Handle,
    pub class: HandleClass,
    pub importer: Option<ClusterName>,
    pub service: Arc<str>,
}

/// RFC 8446 section 6.
const CERTIFICATE_REVOKED: u8 = 44;
/// An acknowledgement may be held back for 25 ms (RFC 9000, max_ack_delay), and a busy machine needs some time too.
const SILENT_AFTER: Duration = Duration::from_millis(35);
/// A lost packet's retransmission is acknowledged by then.
const SILENT_RTTS: u32 = 3;

/// How long a connection has heard nothing although it should: silent at first, then kick after kick unanswered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall(u32);

impl Stall {
    pub const NONE: Self = Self(0);
    /// An acknowledgement is overdue: nothing was kicked yet.
    pub const SILENT: Self = Self(1);

    pub fn unanswered_kicks(self) -> u32 {
        self.0.saturating_sub(Self::SILENT.0)
    }
}

#[derive(Debug)]
struct Inner {
    quic: Connection,
    identity: ArcSwapOption<PeerIdentity>,
    expired: CancellationToken,
    control: ControlQueue,
    pinned: Option<Pinned>,
    class: HandleClass,
    peer_endpoint: OnceLock<(ClusterTag, EndpointId)>,
    congestion: Option<Arc<ControllerState>>,
    /// A [`Stall`].
    stall: AtomicU32,
    stall_changed: Notify,
    opened: Instant,
}

/// An authenticated connection to a peer; clones share it.
#[derive(Clone, Debug)]
pub struct PeerConnection(Arc<Inner>);

impl PeerConnection {
    pub(crate) fn new(
        quic: Connection,
        identity: Option<PeerIdentity>,
        class: HandleClass,
        pinned: Option<Pinned>,
    ) -> Self {
        let congestion =
            quic.congestion_state().into_any().downcast::<ModelController>().ok().map(|c| c.state());
        Self(Arc::new(Inner {
            quic,
            identity: ArcSwapOption::from_pointee(identity),
            expired: CancellationToken::new(),
            control: ControlQueue::default(),
            pinned,
            class,
            peer_endpoint: OnceLock::new(),
            congestion,
            stall: AtomicU32::new(0),
            stall_changed: Notify::new(),
            opened: Instant::now(),
        }))
    }

    pub fn quic(&self) -> &Connection {
        &self.0.quic
    }
    /// The peer's authenticated identity as it is now; `None` only for class join.
    pub fn identity(&self) -> Option<Arc<PeerIdentity>> {
        self.0.identity.load_full()
    }
    /// The peer's endpoint, once it has announced it.
    pub fn peer_endpoint(&self) -> Option<(ClusterTag, EndpointId)> {
        self.0.peer_endpoint.get().copied()
    }
    pub fn class(&self) -> HandleClass {
        self.0.class
    }
    /// On accepted connections: the handle it was opened with.
    pub fn handle(&self) -> Option<Handle> {
        self.0.pinned.as_ref().map(|p| p.handle)
    }
    /// On accepted connections: the service it may use, and nothing else.
    pub fn service(&self) -> Option<&Arc<str>> {
        self.0.pinned.as_ref().map(|p| &p.service)
    }
    /// On accepted connections: the cluster whose handle it is.
    pub fn importer(&self) -> Option<&ClusterName> {
        self.0.pinned.as_ref().and_then(|p| p.importer.as_ref())
    }
    pub fn rtt(&self) -> Duration {
        self.0.quic.rtt()
    }
    /// When its handshake ended.
    pub fn opened(&self) -> Instant {
        self.0.opened
    }
    pub fn is_closed(&self) -> bool {
        self.0.quic.close_reason().is_some()
    }
    /// Whether the peer has ended it because our own identity is revoked.
    pub fn refused_as_revoked(&self) -> bool {
        match self.0.quic.close_reason() {
            Some(ConnectionError::ApplicationClosed(close)) => {
                close.error_code == VarInt::from_u32(close_code::REVOKED)
            }
            // In TLS 1.3 the client is done before it is judged.
            Some(ConnectionError::ConnectionClosed(close)) => {
                close.error_code == TransportErrorCode::crypto(CERTIFICATE_REVOKED)
            }
            _ => false,
        }
    }
    pub async fn closed(&self) -> ConnectionError {
        self.0.quic.closed().await
    }
    pub fn close(&self, code: u32, reason: &str) {
        self.0.quic.close(VarInt::from_u32(code), reason.as_bytes());
    }
    /// Whether packets get through, as known at this moment.
    pub fn stall(&self) -> Stall {
        let known = Stall(self.0.stall.load(Relaxed));
        if known == Stall::NONE && self.is_silent(Instant::now()) {
            self.note_stall(Stall::SILENT);
            return Stall::SILENT;
        }
        known
    }
    /// Waits until [`stall`](Self::stall) is not `known` any more. A connection that is closed meanwhile says nothing here.
    pub async fn stall_changed(&self, known: Stall) {
        let mut changed = std::pin::pin!(self.0.stall_changed.notified());
        changed.as_mut().enable();
        if Stall(self.0.stall.load(Relaxed)) == known {
            changed.await;
        }
    }
    /// What the liveness task sees; it also ends a silence that [`stall`](Self::stall) has noticed.
    pub(crate) fn note_kicks(&self, unanswered: u32, now: Instant) {
        self.note_stall(match unanswered {
            0 if self.is_silent(now) => Stall::SILENT,
            0 => Stall::NONE,
            kicks => Stall(Stall::SILENT.0.saturating_add(kicks)),
        });
    }
    fn note_stall(&self, stall: Stall) {
        if self.0.stall.swap(stall.0, Relaxed) != stall.0 {
            self.0.stall_changed.notify_waiters();
        }
    }
    fn is_silent(&self, now: Instant) -> bool {
        let Some(silence) = self.congestion().map(|c| c.silence(now)) else { return false };
        // Reading the RTT takes the connection's lock.
        silence >= SILENT_AFTER && silence >= SILENT_AFTER + SILENT_RTTS * self.rtt()
    }
    pub(crate) fn congestion(&self) -> Option<&Arc<ControllerState>> {
        self.0.congestion.as_ref()
    }

    /// Our side of TLS.
    pub fn role(&self) -> Usage {
        match self.0.quic.side() {
            Side::Client => Usage::Client,
            Side::Server => Usage::Server,
        }
    }
    /// What only the two ends of this connection know; re-attestations sign it. `None` is a TLS library's failure.
    pub fn exporter(&self) -> Option<[u8; EXPORTER_BYTES]> {
        let mut exporter = [0; EXPORTER_BYTES];
        self.0.quic.export_keying_material(&mut exporter, EXPORTER_LABEL, &[]).ok().map(|()| exporter)
    }

    /// Whether the peer's identity has ended and it has shown no new one: open nothing more on it. Final.
    pub fn expired(&self) -> bool {
        self.0.expired.is_cancelled()
    }
    /// Returns once [`Self::expired`].
    pub async fn peer_expired(&self) {
        self.0.expired.cancelled().await;
    }
    pub(crate) fn expire(&self) {
        self.0.expired.cancel();
    }
    /// The peer has shown a new chain of the same identity.
    pub(crate) fn pin(&self, identity: PeerIdentity) {
        self.0.identity.store(Some(Arc::new(identity)));
    }

    pub(crate) fn control(&self) -> &ControlQueue {
        &self.0.control
    }
    /// Queues a message for the peer on our control stream. False: it is too long, or the peer does not read.
    pub fn send_control(&self, message: &ControlMessage) -> bool {
        let frame = stream_header::encode(message);
        frame.len() <= 2 + MAX_CONTROL_BYTES && self.0.control.push(frame)
    }
    /// The peer says which endpoint it is. True: that is news.
    pub(crate) fn announced(&self, announce: &EndpointAnnounce) -> bool {
        let Some(tag) = ClusterTag::new(announce.tag) else { return false };
        // An endpoint outside the proven cluster is a lie; ignoring it costs the liar its hints.
        let own = self.identity().is_none_or(|id| id.tag == tag);
        own && self.0.peer_endpoint.set((tag, EndpointId::from_u32(announce.endpoint))).is_ok()
    }
}
