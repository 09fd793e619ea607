//! The control stream: the first unidirectional stream that each side opens, for what it says about itself.
//!
//! Framing: [`tombolo_proto::stream_header`]. First comes the sender's endpoint id, so that a GONE hint finds the
//! connections it is about; then, when its SVID has been swapped, the new chain ([`crate::attestation`]). What is not
//! known is ignored. One task per connection writes ours and reads the peer's; it ends with the connection.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;
use tombolo_identity::SvidHandle;
use tombolo_identity::verify::Usage;
use tombolo_model::ids::{ClusterTag, EndpointId};
use tombolo_proto::stream_header::{self, FrameError, MAX_CONTROL_BYTES};
use tombolo_proto::v1::{ControlMessage, EndpointAnnounce, Reattest, control_message::Message};
use tombolo_runtime::clock;

use crate::attestation::task::AttestationCounters;
use crate::attestation::{Moment, Receiver, Refusal};
use crate::connection::PeerConnection;

/// Messages that wait while the peer does not read: an announcement and a re-attestation now and then.
const QUEUE: usize = 4;

/// Frames for the task that writes our control stream. Not a channel: its first block alone is 1 KB per connection.
#[derive(Debug, Default)]
pub(crate) struct ControlQueue {
    frames: Mutex<VecDeque<Bytes>>,
    ready: Notify,
}

impl ControlQueue {
    pub fn has_room(&self) -> bool {
        self.lock().len() < QUEUE
    }
    /// False: it is full.
    pub fn push(&self, frame: Bytes) -> bool {
        let mut frames = self.lock();
        let fits = frames.len() < QUEUE;
        if fits {
            frames.push_back(frame);
            self.ready.notify_one();
        }
        fits
    }
    /// For the one task that writes.
    async fn next(&self) -> Bytes {
        loop {
            if let Some(frame) = self.pop() {
                return frame;
            }
            self.ready.notified().await;
        }
    }
    fn pop(&self) -> Option<Bytes> {
        self.lock().pop_front()
    }
    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Bytes>> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What judges re-attestations of peers.
#[derive(Clone, Debug)]
pub(crate) struct Judge {
    /// `None`: without bundles nobody is believed (joiners).
    pub svid: Option<SvidHandle>,
    pub counters: Arc<AttestationCounters>,
}

/// Both control streams of a connection, until it ends. `me`: the own endpoint.
pub(crate) async fn run(
    peer: PeerConnection,
    judge: Judge,
    me: (ClusterTag, EndpointId),
    on_endpoint: impl Fn(&PeerConnection),
) {
    tokio::join!(write(&peer, me), read(&peer, &judge, on_endpoint));
}

async fn write(peer: &PeerConnection, (tag, endpoint): (ClusterTag, EndpointId)) {
    let Ok(mut stream) = peer.quic().open_uni().await else { return };
    let _ = stream.set_priority(1);
    let announce = Message::Endpoint(EndpointAnnounce { tag: tag.value(), endpoint: endpoint.value() });
    let mut frame = stream_header::encode(&ControlMessage { message: Some(announce) });
    // A peer that stops reading loses what it does not read; the stream stays open for the next message otherwise.
    while stream.write_chunk(frame).await.is_ok() {
        tokio::select! {
            next = peer.control().next() => frame = next,
            _ = peer.closed() => return,
        }
    }
}

/// What a peer says is believed about itself only.
async fn read(peer: &PeerConnection, judge: &Judge, on_endpoint: impl Fn(&PeerConnection)) {
    let Ok(mut stream) = peer.quic().accept_uni().await else { return };
    let other = match peer.role() {
        Usage::Client => Usage::Server,
        Usage::Server => Usage::Client,
    };
    let mut receiver = Receiver::new(other, Instant::now());
    let mut buffer = BytesMut::new();
    while let Ok(Some(chunk)) = stream.read_chunk(MAX_CONTROL_BYTES, true).await {
        buffer.extend_from_slice(&chunk.bytes);
        loop {
            match stream_header::decode::<ControlMessage>(&mut buffer, MAX_CONTROL_BYTES) {
                Ok(Some(ControlMessage { message: Some(Message::Endpoint(announce)) })) => {
                    if peer.announced(&announce) {
                        on_endpoint(peer);
                    }
                }
                Ok(Some(ControlMessage { message: Some(Message::Reattest(reattest)) })) => {
                    judge.reattest(peer, &mut receiver, reattest);
                }
                // Of a newer version.
                Ok(Some(ControlMessage { message: None })) => {}
                Ok(None) => break,
                Err(error @ FrameError::Malformed { .. }) => {
                    tracing::debug!(%error, "a message on a peer's control stream is malformed");
                    judge.counters.refused(&Refusal::Malformed("frame"));
                }
                Err(error @ FrameError::TooLong { .. }) => {
                    tracing::debug!(%error, "a peer's control stream is not read any further");
                    judge.counters.refused(&Refusal::Malformed("frame"));
                    return;
                }
            }
        }
    }
}

impl Judge {
    fn reattest(&self, peer: &PeerConnection, receiver: &mut Receiver, message: Reattest) {
        let Some(pinned) = peer.identity() else { return };
        let accepted = match (&self.svid, peer.exporter()) {
            (Some(svid), Some(exporter)) => {
                let now = Moment { unix: clock::since_unix_epoch(), at: Instant::now() };
                receiver.accept(message, &pinned, &exporter, &svid.load().bundles, now)
            }
            _ => return,
        };
        match accepted {
            Ok(identity) => {
                tracing::debug!(peer = %identity.spiffe_id, not_after = identity.not_after, "peer re-attested");
                self.counters.attested.fetch_add(1, Relaxed);
                peer.pin(identity);
            }
            Err(refusal) => {
                self.counters.refused(&refusal);
                tracing::warn!(peer = %pinned.spiffe_id, reason = refusal.kind(), %refusal,
                    "a peer's re-attestation is refused; its old identity stays until its end");
            }
        }
    }
}
