//! The receiving side of one connection: its DATAGRAM frames, given to the flows that they are of.
//!
//! Read all the time, flows or not: what nobody takes (kicks) must not lie in the connection's buffer. One task reads, by
//! [`Demux::run`]; flows come and go by [`Demux::register`].

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use quinn::Connection;
use tombolo_proto::flow;

use super::metrics::{Dropped, Drops};

/// Read before others of the thread get their turn: 90 KB of full ones.
const TURN: usize = 64;
/// The connection's own count is looked at this often while it is in use.
const LOST_EVERY: Duration = Duration::from_secs(1);

/// Where a flow's datagrams go.
pub trait Sink: fmt::Debug + Send + Sync {
    /// Must not wait.
    fn deliver(&self, payloads: &[Bytes]);
}

/// Clones share it.
#[derive(Clone, Debug)]
pub struct Demux(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    connection: Connection,
    flows: Mutex<HashMap<u64, Arc<dyn Sink>>>,
    drops: Drops,
}

/// Held for as long as the flow takes datagrams.
#[derive(Debug)]
pub struct Registered {
    demux: Demux,
    flow: u64,
}

impl Demux {
    pub fn new(connection: Connection, drops: Drops) -> Self {
        Self(Arc::new(Inner { connection, flows: Mutex::default(), drops }))
    }

    pub fn register(&self, flow: u64, sink: Arc<dyn Sink>) -> Registered {
        self.flows().insert(flow, sink);
        Registered { demux: self.clone(), flow }
    }

    /// Until the connection ends.
    pub async fn run(&self) {
        let connection = &self.0.connection;
        let (mut read, mut lost, mut looked) = (0u64, 0u64, Instant::now());
        let mut batch = Vec::with_capacity(TURN);
        loop {
            let Ok(first) = connection.read_datagram().await else { return };
            batch.push(first);
            while batch.len() < TURN {
                match connection.read_datagram().now_or_never() {
                    Some(Ok(next)) => batch.push(next),
                    _ => break,
                }
            }
            read += batch.len() as u64;
            let emptied = batch.len() < TURN;
            self.deliver(batch.drain(..));
            // With nothing left to read, what was received and not read was lost in between.
            if emptied && looked.elapsed() >= LOST_EVERY {
                looked = Instant::now();
                let missing = connection.stats().frame_rx.datagram.saturating_sub(read);
                self.0.drops.count(Dropped::Receive, missing.saturating_sub(lost));
                lost = missing.max(lost);
            }
            if !emptied {
                tokio::task::yield_now().await;
            }
        }
    }

    fn deliver(&self, datagrams: impl Iterator<Item = Bytes>) {
        let decoded: Vec<(u64, Bytes)> = datagrams.filter_map(flow::decode).collect();
        let mut payloads = Vec::with_capacity(decoded.len());
        for run in decoded.chunk_by(|one, next| one.0 == next.0) {
            let Some((flow, _)) = run.first() else { continue };
            let sink = self.flows().get(flow).cloned();
            match sink {
                Some(sink) => {
                    payloads.clear();
                    payloads.extend(run.iter().map(|(_, payload)| payload.clone()));
                    sink.deliver(&payloads);
                }
                None => self.0.drops.count(Dropped::UnknownFlow, run.len() as u64),
            }
        }
    }

    fn flows(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<dyn Sink>>> {
        self.0.flows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.demux.flows().remove(&self.flow);
    }
}
