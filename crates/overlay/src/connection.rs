//! One authenticated peer connection and its control stream.
//!
//! Each side opens one unidirectional stream and announces its endpoint id on it, so that a GONE hint finds the
//! connections it is about. The task that reads the peer's control stream ends with the connection.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use quinn::{Connection, ConnectionError, VarInt};
use tombolo_identity::PeerIdentity;
use tombolo_model::ids::{ClusterTag, EndpointId, Handle};
use tombolo_model::names::ClusterName;
use tombolo_proto::stream_header::{self, MAX_CONTROL_BYTES};
use tombolo_proto::v1::{ControlMessage, EndpointAnnounce, control_message};

use crate::congestion::{ControllerState, ModelController};

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
}

/// What an accepted connection is pinned to by its original connection ID.
#[derive(Clone, Debug)]
pub struct Pinned {
    pub handle: Handle,
    pub class: HandleClass,
    pub importer: Option<ClusterName>,
    pub service: Arc<str>,
}

#[derive(Debug)]
struct Inner {
    quic: Connection,
    identity: Option<PeerIdentity>,
    pinned: Option<Pinned>,
    class: HandleClass,
    peer_endpoint: OnceLock<(ClusterTag, EndpointId)>,
    congestion: Option<Arc<ControllerState>>,
    /// Unanswered kicks.
    stall: AtomicU32,
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
            identity,
            pinned,
            class,
            peer_endpoint: OnceLock::new(),
            congestion,
            stall: AtomicU32::new(0),
            opened: Instant::now(),
        }))
    }

    pub fn quic(&self) -> &Connection {
        &self.0.quic
    }
    /// The peer's authenticated identity; `None` only for class join.
    pub fn identity(&self) -> Option<&PeerIdentity> {
        self.0.identity.as_ref()
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
    pub async fn closed(&self) -> ConnectionError {
        self.0.quic.closed().await
    }
    pub fn close(&self, code: u32, reason: &str) {
        self.0.quic.close(VarInt::from_u32(code), reason.as_bytes());
    }
    /// Unanswered kicks: 0 while packets get through. Prefer another connection above that.
    pub fn unanswered_kicks(&self) -> u32 {
        self.0.stall.load(Relaxed)
    }
    pub(crate) fn note_stall(&self, kicks: u32) {
        self.0.stall.store(kicks, Relaxed);
    }
    pub(crate) fn congestion(&self) -> Option<&Arc<ControllerState>> {
        self.0.congestion.as_ref()
    }

    /// Announces our endpoint id to the peer. The stream stays open for later control messages.
    pub(crate) async fn announce(
        &self,
        tag: ClusterTag,
        endpoint: EndpointId,
    ) -> Result<(), ConnectionError> {
        let mut stream = self.0.quic.open_uni().await?;
        let message = control_message::Message::Endpoint(EndpointAnnounce {
            tag: tag.value(),
            endpoint: endpoint.value(),
        });
        let frame = stream_header::encode(&ControlMessage { message: Some(message) });
        let _ = stream.write_chunk(frame).await;
        let _ = stream.set_priority(1);
        self.closed().await;
        Ok(())
    }

    /// Reads the peer's control stream until the connection ends. What it says is believed about itself only.
    pub(crate) async fn read_control(&self, on_endpoint: impl Fn(&PeerConnection)) {
        let Ok(mut stream) = self.0.quic.accept_uni().await else { return };
        let mut buffer = BytesMut::new();
        while let Ok(Some(chunk)) = stream.read_chunk(MAX_CONTROL_BYTES, true).await {
            buffer.extend_from_slice(&chunk.bytes);
            loop {
                match stream_header::decode::<ControlMessage>(&mut buffer, MAX_CONTROL_BYTES) {
                    Ok(Some(ControlMessage { message: Some(control_message::Message::Endpoint(e)) })) => {
                        let Some(tag) = ClusterTag::new(e.tag) else { continue };
                        // An endpoint outside the proven cluster is a lie; ignoring it costs the liar its hints.
                        let own = self.identity().is_none_or(|id| id.tag == tag);
                        if own && self.0.peer_endpoint.set((tag, EndpointId::from_u32(e.endpoint))).is_ok() {
                            on_endpoint(self);
                        }
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(error) => {
                        tracing::debug!(%error, "control stream of a peer is malformed");
                        return;
                    }
                }
            }
        }
    }
}
