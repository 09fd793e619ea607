//! A forwarding thread: receives on its border and its inner socket, hands batches to its [`Forwarder`]. Ends when the
//! data plane stops and wakes it.

use std::io::{self, IoSliceMut};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use quinn_udp::RecvMeta;

use crate::dataplane::{ControlQueue, Shared, Wakeup};
use crate::forward::{Exits, Forwarder};
use crate::port::Port;
use crate::sys;
use crate::view::{Side, Via};

/// The kernel fills at most this many per call (quinn-udp's BATCH_SIZE).
const BUFFERS: usize = 32;
/// A merged batch is at most one IP datagram's worth. Pages are touched only as far as they are filled.
const BUFFER_BYTES: usize = 65_536;
/// Batches from one socket before the other one is looked at.
const ROUNDS: usize = 16;
/// Stopping wakes the thread; this bounds a lost wake-up.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// Receive buffers of one thread: 2 MB of address space.
#[derive(Debug)]
pub struct Buffers {
    bytes: Vec<u8>,
    metas: Vec<RecvMeta>,
}

/// What one receive call brought.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Received {
    Nothing,
    /// All that was there.
    All,
    /// Every buffer is filled: there may be more.
    Full,
}

impl Buffers {
    pub fn new() -> Self {
        Self { bytes: vec![0; BUFFERS * BUFFER_BYTES], metas: vec![RecvMeta::default(); BUFFERS] }
    }

    /// One receive call: `each` gets every batch with its buffer.
    pub fn receive(
        &mut self,
        port: &Port,
        mut each: impl FnMut(&mut [u8], &RecvMeta),
    ) -> io::Result<Received> {
        let count = {
            let mut rest = self.bytes.as_mut_slice();
            let mut slices: [IoSliceMut<'_>; BUFFERS] = std::array::from_fn(|_| {
                let (head, tail) = std::mem::take(&mut rest).split_at_mut(BUFFER_BYTES);
                rest = tail;
                IoSliceMut::new(head)
            });
            match port.receive(&mut slices, &mut self.metas) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Received::Nothing),
                Err(error) => return Err(error),
            }
        };
        for (buffer, meta) in self.bytes.chunks_exact_mut(BUFFER_BYTES).zip(&self.metas).take(count) {
            each(buffer, meta);
        }
        Ok(match count {
            0 => Received::Nothing,
            BUFFERS => Received::Full,
            _ => Received::All,
        })
    }
}

impl Default for Buffers {
    fn default() -> Self {
        Self::new()
    }
}

/// The thread's parts.
#[derive(Debug)]
pub struct Worker {
    pub forwarder: Forwarder,
    pub exits: Exits,
    pub shared: Arc<Shared>,
    pub control: ControlQueue,
    pub wakeup: Wakeup,
}

impl Worker {
    pub fn run(mut self) {
        let mut buffers = Buffers::new();
        let mut ready = Vec::new();
        let sources = [
            (Via::Side(Side::Border), Arc::clone(&self.exits.border)),
            (Via::Side(Side::Inner), Arc::clone(&self.exits.inner)),
        ];
        while !self.shared.stop.load(Relaxed) {
            let fds: Vec<_> =
                std::iter::once(self.wakeup.as_fd()).chain(sources.iter().map(|(_, p)| p.as_fd())).collect();
            if let Err(error) = sys::wait(&fds, &mut ready, LONGEST_WAIT) {
                tracing::error!(%error, "waiting for packets failed");
                std::thread::sleep(LONGEST_WAIT);
            }
            if ready.first().copied().unwrap_or(false) {
                self.wakeup.clear();
            }
            // Once awake, both sockets in turn until both are empty: one wait for many batches.
            let mut open: [bool; 2] = std::array::from_fn(|i| ready.get(i + 1).copied().unwrap_or(false));
            while open.contains(&true) && !self.shared.stop.load(Relaxed) {
                for ((via, port), open) in sources.iter().zip(&mut open) {
                    *open = *open && self.receive(*via, port, &mut buffers);
                }
            }
        }
    }

    /// True while there may be more.
    fn receive(&mut self, via: Via, port: &Port, buffers: &mut Buffers) -> bool {
        let Self { forwarder, shared, control, .. } = self;
        for round in 0..ROUNDS {
            let view = shared.view.load();
            let now = forwarder.now();
            let received = buffers.receive(port, |buffer, meta| match &*view {
                Some(view) => {
                    forwarder.batch(view, via, buffer, meta, now, &mut |notice| control.push(notice))
                }
                None => forwarder.discard(meta),
            });
            match received {
                Ok(Received::Full) => {}
                // Asking again would most often find nothing; if not, the next wait returns at once.
                Ok(Received::All) => return false,
                Ok(Received::Nothing) => {
                    // Woken with nothing to read: an ICMP error whose code a send has taken already. It must come off the
                    // queue, or the socket would be ready for ever.
                    match &*view {
                        _ if round > 0 => {}
                        Some(view) => {
                            forwarder.drain(view, port, &mut |notice| control.push(notice));
                        }
                        None => port.drain_errors(|_, _| {}),
                    }
                    return false;
                }
                // Of an earlier packet; taken off the queue, it is no reason to stop reading.
                Err(_) => {
                    if let Some(view) = &*view {
                        forwarder.drain(view, port, &mut |notice| control.push(notice));
                    }
                }
            }
        }
        true
    }
}
