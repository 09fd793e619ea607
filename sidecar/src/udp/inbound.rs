//! A caller's flow, where it is served: one socket to the local application, for as long as the stream that holds the flow
//! is open, admitted, and used.
//!
//! [`crate::inbound`] has read the header and authorised the stream, and holds it against the policies meanwhile.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use quinn::Connection;
use tokio::sync::Notify;
use tombolo_proto::v1::FlowAccepted;
use tombolo_proto::{flow, stream_header};
use tombolo_runtime::drain::Drain;

use super::demux::Demux;
use super::flow::{Activity, LocalSink, receive_stream};
use super::lane::{Lane, Sent, for_stream};
use super::metrics::FlowMetrics;
use super::queue::Queue;
use super::socket::Socket;
use super::{UdpContext, metrics::Dropped};
use crate::codes;
use crate::copy::{BiStream, End, Meter};
use crate::metrics::Held;

/// Answers to what was asked before the drain; then the caller is told to go elsewhere.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// What serving one flow takes.
#[derive(Debug)]
pub struct Served<'a> {
    pub context: &'a UdpContext,
    pub connection: &'a Connection,
    pub demux: &'a Demux,
    pub application: SocketAddr,
    /// On the socket, so that the machine's rules let it pass.
    pub mark: Option<u32>,
    /// The caller's identity, by which its flows are counted.
    pub peer: &'a str,
    pub metrics: FlowMetrics,
    pub meter: &'a Arc<Meter>,
    pub drain: &'a Drain,
}

/// Serves the flow to its end: `Err` is the code that the caller has to be told.
pub async fn serve(stream: &mut BiStream, early: Bytes, served: Served<'_>) -> Result<&'static str, u32> {
    let Served { context, connection, demux, application, mark, peer, metrics, meter, drain } = served;
    let full = || {
        metrics.drops.count(Dropped::FlowsFull, 1);
        codes::OVERLOADED
    };
    let _slot = Arc::clone(&context.inbound).try_acquire_owned().map_err(|_| full())?;
    let _peers = context.peers.open(peer).ok_or_else(full)?;
    let socket = Socket::connected(application, mark).map(Arc::new).map_err(|error| {
        tracing::debug!(%error, %application, "no socket to the local application");
        codes::OVERLOADED
    })?;
    let _open = Held::new(&metrics.open);
    let activity = Arc::new(Activity::new());
    let sink = Arc::new(LocalSink {
        socket: Arc::clone(&socket),
        to: application,
        from: None,
        activity: Arc::clone(&activity),
        meter: Arc::clone(meter),
        metrics: metrics.clone(),
        refused: Notify::new(),
    });
    let flow = flow::of_stream(stream.id());
    let _registered = demux.register(flow, Arc::clone(&sink) as _);
    let lane = Lane::new(connection.clone(), flow, metrics.clone());
    let queue = Queue::new(context.budget.clone());
    let (send, recv) = stream.halves();
    let accepted = stream_header::encode(&FlowAccepted {});
    let answers = async {
        loop {
            if socket.readable().await.is_err() {
                return codes::CONNECT_REFUSED;
            }
            let received = socket.receive(|datagram| {
                meter.sent(datagram.payload.len());
                if lane.send(datagram.payload) == Sent::TooLarge
                    && let Some(framed) = for_stream(datagram.payload, &metrics)
                {
                    metrics.drops.count(Dropped::Queue, queue.push(framed));
                }
            });
            match received {
                Ok(()) => {
                    activity.touch();
                    // Readiness costs no budget of the runtime's: an application that answers without a pause must not keep
                    // the thread.
                    tokio::task::yield_now().await;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::debug!(%error, %application, "the local application takes no datagrams");
                    return codes::CONNECT_REFUSED;
                }
            }
        }
    };
    let on_stream = async {
        let mut written = send.write(accepted).await;
        while written.is_ok() {
            let framed = queue.next().await;
            written = send.write(framed).await;
            metrics.to_peer.inc();
        }
        // What the caller's side has to say comes by the other half.
        std::future::pending::<()>().await;
    };
    let mut read = BytesMut::from(&early[..]);
    let ended = tokio::select! {
        end = receive_stream(recv, &mut read, &*sink) => Ok(end),
        code = answers => Err(code),
        () = sink.refused.notified() => Err(codes::CONNECT_REFUSED),
        () = on_stream => return Ok(End::ConnectionLost.reason()),
        // A little later than at the caller: who ends a flow should be who would use it next.
        () = activity.idle(context.limits.idle.mul_f64(1.1), drain) => Ok(End::Idle),
        () = async { drain.started().await; tokio::time::sleep(LAST_ANSWERS).await } => Err(codes::DRAINING),
    };
    match ended? {
        end @ (End::Finished | End::Idle) => {
            stream.halves().0.finish();
            stream.halves().1.stop(codes::IDLE);
            Ok(if end == End::Idle { "idle" } else { "finished" })
        }
        end => {
            stream.abort(codes::ABANDONED);
            Ok(end.reason())
        }
    }
}
