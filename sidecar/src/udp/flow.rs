//! What both ends of a flow have in common: when it was last used, and where its datagrams go locally.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;
use tombolo_proto::flow;
use tombolo_runtime::drain::Drain;

use super::demux::Sink;
use super::metrics::{Dropped, FlowMetrics};
use super::socket::Socket;
use crate::copy::{End, Meter, RecvHalf, read_failed};

/// While draining: answers to what was asked have this long, then the flow goes elsewhere.
const DRAINING_IDLE: Duration = Duration::from_secs(1);
/// Read of a stream at once: two of the largest datagrams.
const READ_BYTES: usize = 128 * 1024;

/// When a flow was last used.
#[derive(Debug)]
pub(super) struct Activity {
    begun: Instant,
    last_ms: AtomicU64,
    answered: AtomicBool,
}

impl Activity {
    pub fn new() -> Self {
        Self { begun: Instant::now(), last_ms: AtomicU64::new(0), answered: AtomicBool::new(false) }
    }

    pub fn touch(&self) {
        self.last_ms.store(self.begun.elapsed().as_millis() as u64, Relaxed);
    }

    pub fn silence(&self) -> Duration {
        self.begun.elapsed().saturating_sub(Duration::from_millis(self.last_ms.load(Relaxed)))
    }

    pub fn has_answered(&self) -> bool {
        self.answered.load(Relaxed)
    }

    /// Ends when the flow has been silent for long enough: less while draining.
    pub async fn idle(&self, limit: Duration, drain: &Drain) {
        loop {
            let draining = drain.is_draining();
            let limit = if draining { DRAINING_IDLE.min(limit) } else { limit };
            let left = limit.saturating_sub(self.silence());
            if left.is_zero() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(left) => {}
                () = drain.started(), if !draining => {}
            }
        }
    }
}

/// Where the peer's datagrams leave for the application.
#[derive(Debug)]
pub(super) struct LocalSink {
    pub socket: Arc<Socket>,
    pub to: SocketAddr,
    /// The address that the application knows us by.
    pub from: Option<IpAddr>,
    pub activity: Arc<Activity>,
    pub meter: Arc<Meter>,
    pub metrics: FlowMetrics,
    /// Nobody listens there: of connected sockets alone.
    pub refused: Notify,
}

impl Sink for LocalSink {
    fn deliver(&self, payloads: &[Bytes]) {
        self.activity.answered.store(true, Relaxed);
        self.activity.touch();
        let (sent, failed) = self.socket.send(self.to, self.from, payloads);
        match failed {
            Some(error) if error.kind() == io::ErrorKind::ConnectionRefused => self.refused.notify_one(),
            Some(error) => tracing::debug!(%error, to = %self.to, "a datagram was not taken"),
            None => {}
        }
        self.meter.received(payloads.iter().map(Bytes::len).sum());
        self.metrics.to_application.inc_by(sent as u64);
        self.metrics.drops.count(Dropped::Application, (payloads.len() - sent) as u64);
    }
}

/// Delivers what comes on a flow's stream, until that ends. `read`: what has been read of it already.
pub(super) async fn receive_stream(recv: &mut RecvHalf, read: &mut BytesMut, sink: &dyn Sink) -> End {
    loop {
        let mut payloads = Vec::new();
        while let Some(payload) = flow::decode_on_stream(read) {
            payloads.push(payload);
        }
        if !payloads.is_empty() {
            sink.deliver(&payloads);
        }
        match recv.read_some(READ_BYTES).await {
            Ok(Some(chunk)) => read.extend_from_slice(&chunk),
            Ok(None) => return End::Finished,
            Err(error) => return read_failed(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use tombolo_runtime::drain;

    use super::*;

    #[tokio::test]
    async fn a_flow_is_idle_after_silence_and_sooner_while_draining() {
        let (trigger, drain) = drain::channel();
        let activity = Activity::new();
        let begun = Instant::now();
        activity.idle(Duration::from_millis(30), &drain).await;
        assert!(begun.elapsed() >= Duration::from_millis(30));
        trigger.start();
        activity.touch();
        tokio::time::timeout(Duration::from_secs(5), activity.idle(Duration::from_secs(60), &drain))
            .await
            .unwrap();
        assert!(activity.silence() >= DRAINING_IDLE);
    }
}
