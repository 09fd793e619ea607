//! Bulk on its way out, gathered into larger sends.
//!
//! quinn hands over at most ten packets at a time; the kernel takes up to 64 in one call and carries them as one buffer
//! to the next hop, which reads them as one. Most of what a packet costs, here and at both gateways, is per call. So a
//! full hand-over is held until the tasks that are ready now have run without adding to it, or until there is no more
//! room. Anything less than a full one means that quinn has no more to send: it takes the held packets along and leaves
//! at once, so requests never wait.
//!
//! One batch per socket: what goes elsewhere sends the held one first, so packets of one path keep their order.

use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use quinn::udp::{EcnCodepoint, Transmit};

use super::{MAX_SEND_BYTES, Slot};
use crate::routes::Exit;

/// quinn's MAX_TRANSMIT_SEGMENTS: a hand-over of this many packets is rarely the last.
const FULL_HANDOVER: usize = 10;

/// Packets of one size for one destination; only the last may be shorter.
#[derive(Debug)]
struct Batch {
    slot: Arc<Slot>,
    exit: Exit,
    ecn: Option<EcnCodepoint>,
    segment: usize,
    /// Something was added since the flusher looked.
    fresh: bool,
}

/// Where a transmission leaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leaving<'a> {
    pub slot: &'a Arc<Slot>,
    pub exit: Exit,
}

/// The held batch; the caller locks it.
#[derive(Debug, Default)]
pub(super) struct Gather {
    batch: Option<Batch>,
    /// The batch's packets; kept, so that holding allocates nothing.
    bytes: Vec<u8>,
    flusher: Option<Waker>,
}

impl Gather {
    /// Sends or holds. `WouldBlock`: nothing of `transmit` was taken. Any other error: a batch is lost.
    pub fn send(&mut self, leaving: Leaving<'_>, transmit: &Transmit<'_>) -> io::Result<()> {
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len());
        let more_may_come = segment > 0
            && transmit.contents.len() == FULL_HANDOVER * segment
            && 2 * transmit.contents.len() <= MAX_SEND_BYTES;
        if self.fits(leaving, transmit, segment) {
            self.bytes.extend_from_slice(transmit.contents);
            if let Some(batch) = self.batch.as_mut().filter(|_| more_may_come) {
                batch.fresh = true;
                return Ok(());
            }
            // Taken already: what the kernel does not want now, the flusher sends.
            return self.flush().or_else(|e| if would_block(&e) { Ok(()) } else { Err(e) });
        }
        let flushed = self.flush();
        if flushed.as_ref().is_err_and(would_block) {
            return flushed;
        }
        // Nobody flushes before the flusher has run once.
        let Some(flusher) = self.flusher.as_ref().filter(|_| more_may_come) else {
            return leaving.slot.send(leaving.exit.address, transmit).and(flushed);
        };
        flusher.wake_by_ref();
        self.bytes.extend_from_slice(transmit.contents);
        let slot = Arc::clone(leaving.slot);
        self.batch = Some(Batch { slot, exit: leaving.exit, ecn: transmit.ecn, segment, fresh: true });
        flushed
    }

    /// Whether `transmit` can leave with what is held.
    fn fits(&self, leaving: Leaving<'_>, transmit: &Transmit<'_>, segment: usize) -> bool {
        let Some(batch) = &self.batch else { return false };
        let single = transmit.segment_size.is_none() && segment <= batch.segment;
        let most = MAX_SEND_BYTES.min(batch.slot.max_segments() * batch.segment);
        (segment == batch.segment || single)
            && self.bytes.len().is_multiple_of(batch.segment)
            && self.bytes.len() + transmit.contents.len() <= most
            && batch.exit == leaving.exit
            && batch.ecn == transmit.ecn
            && Arc::ptr_eq(&batch.slot, leaving.slot)
    }

    /// Sends what is held. `WouldBlock`: it is still held. Any other error is a lost batch.
    fn flush(&mut self) -> io::Result<()> {
        let Some(batch) = &self.batch else { return Ok(()) };
        let transmit = Transmit {
            destination: batch.exit.address,
            ecn: batch.ecn,
            contents: &self.bytes,
            segment_size: Some(batch.segment),
            src_ip: None,
        };
        let sent = batch.slot.send(batch.exit.address, &transmit);
        if sent.as_ref().is_err_and(would_block) {
            return sent;
        }
        self.batch = None;
        self.bytes.clear();
        sent
    }

    /// Nobody polls from now on, so nothing is held any more.
    pub fn end(&mut self) -> io::Result<()> {
        self.flusher = None;
        self.flush()
    }

    /// Polled by one task for the socket's life: sends what nobody has added to while the ready tasks ran. An error is
    /// that of a lost batch.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.flusher = Some(cx.waker().clone());
        loop {
            match &mut self.batch {
                None => return Poll::Pending,
                Some(batch) if batch.fresh => {
                    batch.fresh = false;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Some(batch) => {
                    let slot = Arc::clone(&batch.slot);
                    match self.flush() {
                        Ok(()) => return Poll::Pending,
                        Err(e) if !would_block(&e) => return Poll::Ready(e),
                        Err(_) => match slot.io.poll_send_ready(cx) {
                            Poll::Ready(Ok(())) => {}
                            Poll::Ready(Err(e)) => {
                                self.batch = None;
                                self.bytes.clear();
                                return Poll::Ready(e);
                            }
                            Poll::Pending => return Poll::Pending,
                        },
                    }
                }
            }
        }
    }
}

fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
    use std::time::Duration;

    use super::*;

    const SIZE: usize = 1000;

    struct Bench {
        slot: Arc<Slot>,
        far: UdpSocket,
        gather: Gather,
    }

    impl Bench {
        async fn new() -> Self {
            let far = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            far.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            let slot = Arc::new(Slot::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap());
            slot.io.writable().await.unwrap();
            Self { slot, far, gather: Gather::default() }
        }
        fn exit(&self) -> Exit {
            Exit { address: self.far.local_addr().unwrap(), slot: 0 }
        }
        fn send(&mut self, first: u8, packets: usize, last: usize, ecn: Option<EcnCodepoint>) {
            let mut contents = Vec::new();
            for i in 0..packets {
                let size = if i + 1 == packets { last } else { SIZE };
                contents.extend(vec![first + i as u8; size]);
            }
            let (destination, exit) = (self.exit().address, self.exit());
            let segment_size = (packets > 1).then_some(SIZE);
            let transmit = Transmit { destination, ecn, contents: &contents, segment_size, src_ip: None };
            self.gather.send(Leaving { slot: &self.slot, exit }, &transmit).unwrap();
        }
        fn poll(&mut self) -> bool {
            let mut cx = Context::from_waker(Waker::noop());
            assert!(self.gather.poll_flush(&mut cx).is_pending());
            self.gather.batch.is_some()
        }
        /// First byte and length of what has arrived.
        fn arrived(&self) -> Vec<(u8, usize)> {
            let mut buffer = [0; 2000];
            let mut packets = Vec::new();
            self.far.set_nonblocking(true).unwrap();
            while let Ok(len) = self.far.recv(&mut buffer) {
                packets.push((buffer[0], len));
            }
            packets
        }
    }

    fn full(range: std::ops::Range<u8>) -> Vec<(u8, usize)> {
        range.map(|first| (first, SIZE)).collect()
    }

    #[tokio::test]
    async fn full_handovers_leave_together_once_nothing_was_added_and_less_takes_them_along() {
        let mut bench = Bench::new().await;
        assert!(!bench.poll());
        bench.send(0, 10, SIZE, None);
        bench.send(10, 10, SIZE, None);
        assert_eq!(bench.arrived(), []);
        assert!(bench.poll(), "something was added since the last look");
        assert!(!bench.poll());
        assert_eq!(bench.arrived(), full(0..20));

        bench.send(20, 10, SIZE, None);
        bench.send(30, 3, 17, None);
        assert_eq!(bench.arrived(), [full(20..32), vec![(32, 17)]].concat(), "at once, without the flusher");
        bench.send(40, 1, 900, None);
        assert_eq!(bench.arrived(), [(40, 900)], "a request waits for nothing");
        bench.send(50, 10, SIZE, None);
        bench.send(60, 1, 900, None);
        assert_eq!(bench.arrived(), [full(50..60), vec![(60, 900)]].concat());
    }

    #[tokio::test]
    async fn what_differs_or_has_no_room_sends_the_held_first() {
        let mut bench = Bench::new().await;
        bench.poll();
        bench.send(0, 10, SIZE, None);
        bench.send(10, 10, SIZE, Some(EcnCodepoint::Ect0));
        assert_eq!(bench.arrived(), full(0..10));
        bench.send(20, 1, 5, None);
        assert_eq!(bench.arrived(), [full(10..20), vec![(20, 5)]].concat());

        let room = u8::try_from(bench.slot.max_segments() / 10 * 10).unwrap();
        for first in (0..=room).step_by(10) {
            bench.send(first, 10, SIZE, None);
        }
        assert_eq!(bench.arrived(), full(0..room));
        bench.poll();
        bench.poll();
        assert_eq!(bench.arrived(), full(room..room + 10));
    }

    #[tokio::test]
    async fn without_a_flusher_nothing_is_held() {
        let mut bench = Bench::new().await;
        bench.send(0, 10, SIZE, None);
        assert_eq!(bench.arrived(), full(0..10));
    }
}
