//! The UDP socket under quinn: routes what leaves by connection ID, and shows quinn one constant peer address.
//!
//! quinn never sees a path change: whatever gateway replica carries a packet, it seems to come from
//! [`VIRTUAL_PEER`]. Several source ports (slots) are kept where a balancer hides several replicas behind one
//! address; an endpoint on several threads has one of these for each ([`crate::parts`]). Bulk leaves in larger sends than quinn's ([`gather`]). Control datagrams that arrive on the same port are taken
//! out and handed to the hops task; when that falls behind they are dropped with a counter. Nothing here ever returns an
//! error that would end quinn's driver.

mod gather;

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tombolo_model::ids::{ClusterTag, EndpointId};

use crate::cid::{Cid, Kind, Packet, classify};
use crate::learned::Learned;
use crate::parts::Place;
use crate::routes::{Exit, RouteState};
use gather::{Gather, Leaving};

/// The one peer address quinn knows, for every peer (TEST-NET range of RFC 2544: never on a real wire).
pub(crate) const VIRTUAL_PEER: SocketAddr =
    SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 1), 4433));

/// sendmsg refuses more than 65507 bytes of UDP payload; GSO batches of large segments are split below that.
const MAX_SEND_BYTES: usize = 65_000;

/// Asked of the kernel for both directions; net.core.{r,w}mem_max caps it silently. 2 MiB holds 20 ms at 800 Mbit/s.
const SOCKET_BUFFER_BYTES: usize = 2 * 1024 * 1024;

/// A control datagram and where it came from.
#[derive(Debug)]
pub(crate) struct ControlPacket {
    pub slot: usize,
    pub source: SocketAddr,
    pub bytes: Bytes,
}

/// What the socket did; read for metrics.
#[derive(Debug, Default)]
pub struct SocketCounters {
    pub no_route: AtomicU64,
    pub send_errors: AtomicU64,
    pub control_overflow: AtomicU64,
    /// Packets for another part that found no room there.
    pub part_overflow: AtomicU64,
    pub malformed: AtomicU64,
}

#[derive(Debug)]
pub(crate) struct Slot {
    io: UdpSocket,
    state: UdpSocketState,
}

/// Refused only where the operator forbids it; the kernel clamps to its limit and that is fine.
pub(crate) fn set_buffers(socket: &socket2::Socket) {
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
}

impl Slot {
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(address),
            socket2::Type::DGRAM,
            Some(socket2::Protocol::UDP),
        )?;
        socket.set_nonblocking(true)?;
        set_buffers(&socket);
        socket.bind(&address.into())?;
        Self::of(socket.into())
    }

    /// Of a bound socket that does not block, served by the current runtime.
    pub fn of(socket: std::net::UdpSocket) -> io::Result<Self> {
        let io = UdpSocket::from_std(socket)?;
        let state = UdpSocketState::new((&io).into())?;
        Ok(Self { io, state })
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.local_addr()
    }

    /// Sends one control datagram; full buffers and unreachable peers are what probes are there to notice.
    pub fn send_control(&self, to: SocketAddr, contents: &[u8]) -> io::Result<()> {
        self.io.try_send_to(contents, to).map(drop)
    }

    /// Receives a batch. One that is not full has emptied the socket (`recvmmsg` stops at nothing else), and asking again would be
    /// a system call more for each wake-up. Readiness is as old as this call, so what arrives meanwhile still wakes.
    fn receive(&self, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> io::Result<usize> {
        let full = bufs.len().min(meta.len());
        let mut partial = None;
        let received = self.io.try_io(Interest::READABLE, || {
            let count = self.state.recv((&self.io).into(), bufs, meta)?;
            if count < full {
                partial = Some(count);
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(count)
        });
        partial.map_or(received, Ok)
    }

    /// How many packets the kernel takes in one call.
    fn max_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    fn send(&self, to: SocketAddr, transmit: &Transmit<'_>) -> io::Result<()> {
        let send = |contents, segment_size| {
            let part = Transmit { destination: to, ecn: transmit.ecn, contents, segment_size, src_ip: None };
            self.io.try_io(Interest::WRITABLE, || self.state.try_send((&self.io).into(), &part))
        };
        match transmit.segment_size {
            Some(size) if size > 0 && transmit.contents.len() > MAX_SEND_BYTES => {
                let batch = (MAX_SEND_BYTES / size).max(1) * size;
                transmit.contents.chunks(batch).try_for_each(|chunk| send(chunk, Some(size)))
            }
            segment_size => send(transmit.contents, segment_size),
        }
    }
}

/// Shared by quinn, the hops task and the liveness task.
#[derive(Debug)]
pub(crate) struct OverlaySocket {
    tag: ClusterTag,
    slots: ArcSwap<Vec<Arc<Slot>>>,
    /// Of all parts of the endpoint.
    pub routes: Arc<ArcSwap<RouteState>>,
    /// `None`: the endpoint has one part.
    place: Option<Place>,
    /// How often the route to an endpoint was asked to use another replica (kicks). Bounded by [`MAX_ROTATIONS`].
    rotations: ArcSwap<HashMap<(u32, EndpointId), (u64, Instant)>>,
    /// What was learned comes before routes.
    learns: bool,
    learned: Mutex<Learned>,
    /// Nothing learned costs the byte path no lock.
    any_learned: AtomicBool,
    gather: Mutex<Gather>,
    control: mpsc::Sender<ControlPacket>,
    receiver: Mutex<Option<Waker>>,
    pub counters: SocketCounters,
}

/// Rotations are hints: when the table is full it starts over, which only re-spreads connections.
const MAX_ROTATIONS: usize = 4096;

/// Kicks follow each other every 200 ms: when none has come for this long, the stall is over.
const STALLED: Duration = Duration::from_secs(5);

impl OverlaySocket {
    /// Whether the endpoint has other parts.
    pub fn has_parts(&self) -> bool {
        self.place.is_some()
    }

    /// `learns`: answer long-header packets of the own cluster to where they came from (federators, and joiners that
    /// dial one directly and can't know its endpoint id yet). Everybody else learns only of federators at addresses that
    /// the routes name: one that lost its store, or has started 16 times, answers with a block that nobody was told of.
    pub fn new(
        tag: ClusterTag,
        slot: Slot,
        place: Option<Place>,
        routes: Arc<ArcSwap<RouteState>>,
        learns: bool,
        control: mpsc::Sender<ControlPacket>,
    ) -> Self {
        Self {
            tag,
            slots: ArcSwap::from_pointee(vec![Arc::new(slot)]),
            routes,
            place,
            rotations: ArcSwap::from_pointee(HashMap::new()),
            learns,
            learned: Mutex::default(),
            any_learned: AtomicBool::new(false),
            gather: Mutex::default(),
            control,
            receiver: Mutex::new(None),
            counters: SocketCounters::default(),
        }
    }

    pub fn slots(&self) -> Arc<Vec<Arc<Slot>>> {
        self.slots.load_full()
    }

    /// Replaces the source ports; slot 0 stays what it was.
    pub fn set_slots(&self, slots: Vec<Arc<Slot>>) {
        self.slots.store(Arc::new(slots));
        // The receive loop must poll, and so register with, the new ones.
        if let Some(waker) = self.receiver.lock().unwrap_or_else(PoisonError::into_inner).take() {
            waker.wake();
        }
    }

    /// The next packets to `endpoint` take another replica where there is one.
    pub fn rotate(&self, tag: ClusterTag, endpoint: EndpointId) {
        self.rotations.rcu(|current| {
            let mut next = if current.len() >= MAX_ROTATIONS { HashMap::new() } else { (**current).clone() };
            let now = Instant::now();
            let (count, last) = next.entry((tag.value(), endpoint)).or_insert((0, now));
            (*count, *last) = (*count + 1, now);
            next
        });
    }

    /// Where a packet for `dcid` leaves now.
    pub fn exit(&self, dcid: &Cid) -> Option<Exit> {
        let own = dcid.tag_value() == self.tag.value();
        if own
            && matches!(dcid.kind(), Kind::Join | Kind::Endpoint)
            && self.any_learned.load(Relaxed)
            && (self.learns || self.routes.load().direct(dcid).is_none())
        {
            let learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(address) = learned.address(dcid.target(), Instant::now()) {
                return Some(Exit { address, slot: 0 });
            }
        }
        let rotations = self.rotations.load();
        let kicked = if rotations.is_empty() || dcid.kind() != Kind::Endpoint {
            None
        } else {
            rotations.get(&(dcid.tag_value(), dcid.endpoint()))
        };
        let (rotation, lately) = kicked.map_or((0, false), |(count, at)| (*count, at.elapsed() < STALLED));
        self.routes.load().exit(dcid, rotation, lately)
    }

    fn gather(&self) -> std::sync::MutexGuard<'_, Gather> {
        self.gather.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what is held back for a larger send, until `ended`. Bulk is held only while somebody does.
    pub async fn flush(self: Arc<Self>, ended: CancellationToken) {
        loop {
            let error = tokio::select! {
                error = std::future::poll_fn(|cx| self.gather().poll_flush(cx)) => error,
                () = ended.cancelled() => break,
            };
            self.lost(&error);
        }
        if let Err(error) = self.gather().end() {
            self.lost(&error);
        }
    }

    /// Over-size MTU probes, unreachable networks, full extra slots: the same as a lost packet.
    fn lost(&self, error: &io::Error) {
        if error.raw_os_error() != Some(libc::EMSGSIZE) {
            self.counters.send_errors.fetch_add(1, Relaxed);
        }
    }

    /// Takes control datagrams out of one received buffer, learns sources, and returns what is left for quinn.
    fn sift(&self, slot: usize, buffer: &mut [u8], meta: &mut RecvMeta) {
        let stride = if meta.stride == 0 { meta.len } else { meta.stride };
        let mut kept = 0;
        let mut at = 0;
        while at < meta.len {
            let end = (at + stride).min(meta.len);
            let packet = buffer.get(at..end).unwrap_or_default();
            let keep = match classify(packet) {
                Some(Packet::Short { dcid }) => {
                    dcid.tag_value() == self.tag.value() && !self.hand_over(&dcid, packet, meta)
                }
                Some(Packet::Long { dcid, scid, .. }) => {
                    self.learn(scid, meta.addr);
                    !self.hand_over(&dcid, packet, meta)
                }
                Some(Packet::Datagram) => {
                    let packet =
                        ControlPacket { slot, source: meta.addr, bytes: Bytes::copy_from_slice(packet) };
                    if self.control.try_send(packet).is_err() {
                        self.counters.control_overflow.fetch_add(1, Relaxed);
                    }
                    false
                }
                None => {
                    self.counters.malformed.fetch_add(1, Relaxed);
                    false
                }
            };
            if keep {
                // Only whole strides may precede others; a short last segment ends the batch anyway.
                if kept != at {
                    buffer.copy_within(at..end, kept);
                }
                kept += end - at;
            }
            at = end;
        }
        meta.len = kept;
        meta.stride = stride.min(kept).max(1);
        meta.addr = VIRTUAL_PEER;
        meta.dst_ip = None;
    }

    /// Whether the packet is another part's, which has it now.
    fn hand_over(&self, dcid: &Cid, packet: &[u8], meta: &RecvMeta) -> bool {
        let Some(inbox) = self.place.as_ref().and_then(|place| place.elsewhere(dcid)) else { return false };
        if !inbox.put(packet, meta.ecn) {
            self.counters.part_overflow.fetch_add(1, Relaxed);
        }
        true
    }

    /// What other parts' sockets got for this one.
    fn poll_inbox(&self, cx: &Context<'_>, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> usize {
        let Some(inbox) = self.place.as_ref().and_then(Place::own) else { return 0 };
        let mut count = 0;
        for (buffer, meta) in bufs.iter_mut().zip(meta) {
            let Some((packet, ecn)) = inbox.poll(cx) else { break };
            // As a receive buffer cuts it.
            let len = packet.len().min(buffer.len());
            let (Some(to), Some(from)) = (buffer.get_mut(..len), packet.get(..len)) else { break };
            to.copy_from_slice(from);
            *meta = RecvMeta { addr: VIRTUAL_PEER, len, stride: len.max(1), ecn, dst_ip: None };
            count += 1;
        }
        count
    }

    fn learn(&self, scid: &[u8], source: SocketAddr) {
        let Some(scid) = Cid::from_bytes(scid) else { return };
        let routes = self.routes.load();
        let federator = || routes.routes.control.iter().any(|(_, address)| *address == source);
        if !self.learns && !federator() {
            return;
        }
        // What a gateway passed on has no address of its own: routes know the gateways, and which of them live.
        if routes.paths.iter().any(|path| path.address == source) {
            return;
        }
        if scid.tag_value() == self.tag.value() && matches!(scid.kind(), Kind::Join | Kind::Endpoint) {
            let mut learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
            learned.learn(scid.target(), source, Instant::now());
            self.any_learned.store(true, Relaxed);
        }
    }
}

impl AsyncUdpSocket for OverlaySocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Poller { socket: self, writable: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let dcid = match classify(transmit.contents) {
            Some(Packet::Long { dcid, .. } | Packet::Short { dcid }) => dcid,
            // quinn's stateless resets carry random bytes where the ID would be: they can't be routed.
            _ => return Ok(()),
        };
        let Some(exit) = self.exit(&dcid) else {
            self.counters.no_route.fetch_add(1, Relaxed);
            return Ok(());
        };
        let slots = self.slots.load();
        let Some(slot) = slots.get(exit.slot).or_else(|| slots.first()) else { return Ok(()) };
        match self.gather().send(Leaving { slot, exit }, transmit) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && exit.slot == 0 => Err(e),
            Err(e) => {
                self.lost(&e);
                Ok(())
            }
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let handed = self.poll_inbox(cx, bufs, meta);
        if handed > 0 {
            return Poll::Ready(Ok(handed));
        }
        let slots = self.slots.load();
        for (index, slot) in slots.iter().enumerate() {
            while let Poll::Ready(ready) = slot.io.poll_recv_ready(cx) {
                if ready.is_err() {
                    break;
                }
                match slot.receive(bufs, meta) {
                    Ok(count) => {
                        for (buffer, meta) in bufs.iter_mut().zip(meta.iter_mut()).take(count) {
                            self.sift(index, buffer, meta);
                        }
                        return Poll::Ready(Ok(count));
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                    // A queued ICMP error of an earlier send; an error returned here would end quinn's driver.
                    Err(_) => continue,
                }
            }
        }
        *self.receiver.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.slots
            .load()
            .first()
            .map_or_else(|| Err(io::ErrorKind::NotConnected.into()), |slot| slot.local_addr())
    }

    fn max_transmit_segments(&self) -> usize {
        self.slots.load().first().map_or(1, |slot| slot.max_segments())
    }

    fn max_receive_segments(&self) -> usize {
        self.slots.load().first().map_or(1, |slot| slot.state.gro_segments())
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

/// One connection's wait for write-readiness: each holds a future of its own, because `poll_send_ready` on the
/// socket itself would keep only the last of many wakers.
struct Poller {
    socket: Arc<OverlaySocket>,
    writable: Option<Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>>,
}

impl std::fmt::Debug for Poller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Poller").finish_non_exhaustive()
    }
}

impl UdpPoller for Poller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.writable.is_none() {
            let slot = self.socket.slots.load().first().cloned();
            self.writable = Some(Box::pin(async move {
                match slot {
                    Some(slot) => slot.io.writable().await,
                    None => Ok(()),
                }
            }));
        }
        let Some(writable) = self.writable.as_mut() else { return Poll::Ready(Ok(())) };
        let result = writable.as_mut().poll(cx);
        if result.is_ready() {
            self.writable = None;
        }
        result
    }
}
