//! gRPC (tonic) over bidirectional streams of an overlay connection: one HTTP/2 connection per stream.
//!
//! The caller's identity is the QUIC connection's: handlers read [`PeerInfo`] from the request's extensions.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use hyper_util::rt::TokioIo;
use quinn::{RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tombolo_identity::PeerIdentity;
use tombolo_model::ids::{ClusterTag, EndpointId};
use tombolo_model::names::ClusterName;
use tombolo_runtime::tasks::TaskGroup;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::connection::{HandleClass, PeerConnection, close_code};

/// An RPC that has no answer after this is failed by the caller; streams are unaffected.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// HTTP/2 windows: a snapshot of a large cluster must not wait for round trips (256 KB per 50 ms would be 5 MB/s).
const HTTP2_WINDOW_BYTES: u32 = 2 * 1024 * 1024;

/// Metadata of a refusal that is no verdict: there were too many at this moment; the caller may ask again after so many
/// seconds (as HTTP's Retry-After, RFC 9110 section 10.2.3).
pub const RETRY_AFTER: &str = "retry-after";

/// Metadata of a refusal: another process holds the caller's identity, and lives.
pub const CLONED: &str = "tombolo-cloned";

/// Who is calling: put into every request's extensions.
#[derive(Clone, Debug)]
pub struct PeerInfo {
    peer: PeerConnection,
    pub class: HandleClass,
    /// The cluster whose handle the connection was opened with.
    pub importer: Option<ClusterName>,
    pub endpoint: Option<(ClusterTag, EndpointId)>,
    /// Distinguishes connections of the same peer.
    pub connection: usize,
}

impl PeerInfo {
    /// As it is now: a request may be older than a re-attestation. `None` only for class join.
    pub fn identity(&self) -> Option<Arc<PeerIdentity>> {
        self.peer.identity()
    }
    /// Whether the caller's identity has ended.
    pub fn expired(&self) -> bool {
        self.peer.expired()
    }
}

/// One bidirectional stream as an IO object for HTTP/2.
#[derive(Debug)]
pub struct OverlayStream {
    peer: PeerConnection,
    send: SendStream,
    recv: RecvStream,
}

impl Connected for OverlayStream {
    type ConnectInfo = PeerInfo;
    fn connect_info(&self) -> PeerInfo {
        PeerInfo {
            peer: self.peer.clone(),
            class: self.peer.class(),
            importer: self.peer.importer().cloned(),
            endpoint: self.peer.peer_endpoint(),
            connection: self.peer.quic().stable_id(),
        }
    }
}

impl AsyncRead for OverlayStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        AsyncRead::poll_read(Pin::new(&mut self.recv), cx, buf)
    }
}

impl AsyncWrite for OverlayStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(Pin::new(&mut self.send), cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_flush(Pin::new(&mut self.send), cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_shutdown(Pin::new(&mut self.send), cx)
    }
}

/// A channel whose HTTP/2 connections are streams of `connection`; it opens a new one when one has ended.
pub fn channel(connection: PeerConnection) -> Channel {
    Endpoint::from_static("http://overlay.tombolo")
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(HTTP2_WINDOW_BYTES)
        .initial_connection_window_size(4 * HTTP2_WINDOW_BYTES)
        .connect_with_connector_lazy(service_fn(move |_| {
            let peer = connection.clone();
            async move {
                if peer.expired() {
                    return Err(io::Error::other("the peer's identity has ended"));
                }
                let (send, recv) = peer.quic().open_bi().await.map_err(io::Error::other)?;
                Ok::<_, io::Error>(TokioIo::new(OverlayStream { peer, send, recv }))
            }
        }))
}

/// Feeds the streams of accepted connections to a tonic server.
#[derive(Clone, Debug)]
pub struct GrpcAcceptor {
    streams: mpsc::Sender<io::Result<OverlayStream>>,
    tasks: TaskGroup,
}

/// What a tonic server serves: `Server::builder().serve_with_incoming_shutdown(incoming, stop)`.
#[derive(Debug)]
pub struct GrpcIncoming(mpsc::Receiver<io::Result<OverlayStream>>);

impl GrpcIncoming {
    /// Streams wait here until the server takes them: bounded, and a full queue slows only its own connection.
    const QUEUE: usize = 64;

    pub fn new(tasks: &TaskGroup) -> (GrpcAcceptor, Self) {
        let (streams, receiver) = mpsc::channel(Self::QUEUE);
        (GrpcAcceptor { streams, tasks: tasks.clone() }, Self(receiver))
    }
}

impl Stream for GrpcIncoming {
    type Item = io::Result<OverlayStream>;
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx)
    }
}

impl GrpcAcceptor {
    /// Serves every stream that `peer` opens until its connection ends.
    pub fn attach(&self, peer: PeerConnection) {
        let streams = self.streams.clone();
        self.tasks.spawn("grpc streams of a peer", async move {
            while let Ok((mut send, recv)) = peer.quic().accept_bi().await {
                if peer.expired() {
                    let _ = send.reset(close_code::EXPIRED.into());
                    continue;
                }
                let stream = OverlayStream { peer: peer.clone(), send, recv };
                if streams.send(Ok(stream)).await.is_err() {
                    return;
                }
            }
        });
    }
}
