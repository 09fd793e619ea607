//! Where one flow's datagrams leave for the peer.

use bytes::Bytes;
use quinn::{Connection, SendDatagramError};
use tombolo_proto::flow;

use super::metrics::{Dropped, FlowMetrics};

/// What became of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    Yes,
    /// It has to take the flow's stream.
    TooLarge,
    /// The connection is over.
    Lost,
}

/// A flow on a connection.
#[derive(Debug)]
pub struct Lane {
    connection: Connection,
    flow: u64,
    metrics: FlowMetrics,
}

impl Lane {
    pub fn new(connection: Connection, flow: u64, metrics: FlowMetrics) -> Self {
        Self { connection, flow, metrics }
    }

    /// Never waits: while the path carries no more, the oldest that waits gives way.
    pub fn send(&self, payload: &[u8]) -> Sent {
        let bytes = payload.len() + flow::id_bytes(self.flow);
        let gives_way = self.connection.datagram_send_buffer_space() < bytes;
        match self.connection.send_datagram(flow::encode(self.flow, payload)) {
            Ok(()) => {
                self.metrics.drops.count(Dropped::Congestion, u64::from(gives_way));
                self.metrics.to_peer.inc();
                Sent::Yes
            }
            Err(SendDatagramError::ConnectionLost(_)) => Sent::Lost,
            Err(_) => Sent::TooLarge,
        }
    }
}

/// A datagram for the flow's stream; `None`: none can be that large, and it is counted.
pub fn for_stream(payload: &[u8], metrics: &FlowMetrics) -> Option<Bytes> {
    let framed = flow::encode_on_stream(payload);
    if framed.is_none() {
        metrics.drops.count(Dropped::TooLarge, 1);
    }
    framed
}
