//! Sockets towards local applications: many datagrams per call, both ways.
//!
//! A listener learns the address that a caller has sent to, so that answers come from it. Captured datagrams come by TPROXY
//! with their destination untouched; answers leave by a socket that is bound to it ([`Socket::answering_as`]), which takes
//! CAP_NET_RAW. Sockets to local applications are connected, so that a closed port is noticed.

use std::cell::RefCell;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};

use bytes::Bytes;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmmsg,
    setsockopt, sockopt,
};
use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use socket2::{Domain, Protocol, Socket as Raw, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tombolo_overlay::socket_option::allow_fragments;

use crate::listening;

/// The largest datagram; with GRO, several of one sender.
const BUFFER_BYTES: usize = 64 * 1024;
/// Below the largest payload of IPv4 (65,507), with which the kernel takes a batch.
const MAX_SEND_BYTES: usize = 65_000;
/// Datagrams that are gathered fit the usual frames.
const MAX_GATHERED_BYTES: usize = 1452;
/// A burst of a moment in which the thread is busy; the kernel clamps it to net.core.rmem_max.
const KERNEL_BUFFER_BYTES: usize = 1024 * 1024;

thread_local! {
    /// Written by the kernel, and copied from at once. Pages that no datagram needed are never touched.
    static RECEIVED: RefCell<Vec<u8>> = RefCell::new(vec![0; BATCH_SIZE * BUFFER_BYTES]);
    static GATHERED: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(MAX_SEND_BYTES));
}

/// One datagram that has come in.
#[derive(Clone, Copy, Debug)]
pub struct Received<'a> {
    pub from: SocketAddr,
    /// Where it was sent: of a captured one with its port, else with port 0.
    pub to: SocketAddr,
    pub payload: &'a [u8],
}

/// A socket of the local side.
#[derive(Debug)]
pub struct Socket {
    io: UdpSocket,
    state: UdpSocketState,
    captures: bool,
}

/// Binds `count` sockets to one address; the kernel spreads callers over them.
pub(crate) fn listen(address: SocketAddr, count: usize) -> io::Result<Vec<std::net::UdpSocket>> {
    bind_with(address, count, |_| Ok(()))
}

/// The same for captured datagrams. Needs CAP_NET_RAW.
pub(crate) fn capture(address: SocketAddr, count: usize) -> io::Result<Vec<std::net::UdpSocket>> {
    bind_with(address, count, |socket| {
        transparent(socket, address)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
            setsockopt(socket, sockopt::Ipv6OrigDstAddr, &true)?;
        } else {
            setsockopt(socket, sockopt::Ipv4OrigDstAddr, &true)?;
        }
        Ok(())
    })
}

fn transparent(socket: &Raw, address: SocketAddr) -> io::Result<()> {
    if address.is_ipv6() { socket.set_ip_transparent_v6(true) } else { socket.set_ip_transparent_v4(true) }
}

fn bind_with(
    address: SocketAddr,
    count: usize,
    prepare: impl Fn(&Raw) -> io::Result<()>,
) -> io::Result<Vec<std::net::UdpSocket>> {
    listening::bind_all(address, count, |address, shared| {
        let socket = raw(address)?;
        prepare(&socket)?;
        socket.set_reuse_port(shared)?;
        socket.bind(&address.into())?;
        Ok(socket.into())
    })
}

fn raw(family: SocketAddr) -> io::Result<Raw> {
    let socket = Raw::new(Domain::for_address(family), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    let _ = socket.set_recv_buffer_size(KERNEL_BUFFER_BYTES);
    Ok(socket)
}

impl Socket {
    /// One that [`listen`] has bound. Needs a runtime.
    pub fn listening(socket: std::net::UdpSocket) -> io::Result<Self> {
        Self::new(socket, false)
    }

    /// One that [`capture`] has bound.
    pub fn capturing(socket: std::net::UdpSocket) -> io::Result<Self> {
        Self::new(socket, true)
    }

    /// To a local application; `mark` lets it past the rules that capture.
    pub fn connected(to: SocketAddr, mark: Option<u32>) -> io::Result<Self> {
        let socket = raw(to)?;
        if let Some(mark) = mark {
            socket.set_mark(mark)?;
        }
        socket.connect(&to.into())?;
        Self::new(socket.into(), false)
    }

    /// Sends as `address`, which is not this machine's. Needs CAP_NET_RAW. Without a mark: what it sends goes to local callers,
    /// which no rule captures, and other tools translate by marks of theirs (kube-proxy by a bit of ours).
    pub fn answering_as(address: SocketAddr) -> io::Result<Self> {
        let socket = raw(address)?;
        transparent(&socket, address)?;
        // Each flow to this address has one of its own; nothing is received by any of them.
        socket.set_reuse_address(true)?;
        let _ = socket.set_recv_buffer_size(0);
        socket.bind(&address.into())?;
        Self::new(socket.into(), false)
    }

    fn new(socket: std::net::UdpSocket, captures: bool) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        allow_fragments(socket.as_fd(), socket.local_addr()?.is_ipv6())?;
        Ok(Self { io: UdpSocket::from_std(socket)?, state, captures })
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.local_addr()
    }

    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.io.peer_addr()
    }

    /// Also when there is an error to be taken: a closed port makes no socket readable.
    pub async fn readable(&self) -> io::Result<()> {
        self.io.ready(Interest::READABLE | Interest::ERROR).await.map(drop)
    }

    /// Up to one batch; `WouldBlock`: there is none. `each` must not receive.
    pub fn receive(&self, each: impl FnMut(Received<'_>)) -> io::Result<()> {
        let received = RECEIVED.with_borrow_mut(|buffer| {
            let mut buffers = buffer.chunks_exact_mut(BUFFER_BYTES);
            let slices: [IoSliceMut<'_>; BATCH_SIZE] =
                std::array::from_fn(|_| IoSliceMut::new(buffers.next().unwrap_or_default()));
            if self.captures { self.receive_captured(slices, each) } else { self.receive_sent(slices, each) }
        });
        match received {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.error(error),
            received => received,
        }
    }

    /// What the kernel has heard of the other side, where there is nothing to read.
    fn error(&self, nothing: io::Error) -> io::Result<()> {
        let pending = || Err(self.io.take_error()?.unwrap_or(nothing));
        self.io.try_io(Interest::ERROR, pending)
    }

    fn receive_sent(
        &self,
        mut slices: [IoSliceMut<'_>; BATCH_SIZE],
        mut each: impl FnMut(Received<'_>),
    ) -> io::Result<()> {
        let mut metas = [RecvMeta::default(); BATCH_SIZE];
        let receive = || self.state.recv((&self.io).into(), &mut slices, &mut metas);
        let count = self.io.try_io(Interest::READABLE, receive)?;
        for (meta, slice) in metas.iter().zip(&slices).take(count) {
            let to = SocketAddr::new(meta.dst_ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), 0);
            let bytes = slice.get(..meta.len).unwrap_or_default();
            if meta.len == 0 {
                each(Received { from: meta.addr, to, payload: &[] });
            }
            for payload in bytes.chunks(meta.stride.max(1)) {
                each(Received { from: meta.addr, to, payload });
            }
        }
        Ok(())
    }

    fn receive_captured(
        &self,
        mut slices: [IoSliceMut<'_>; BATCH_SIZE],
        mut each: impl FnMut(Received<'_>),
    ) -> io::Result<()> {
        let control = nix::cmsg_space!(nix::libc::sockaddr_in6, nix::libc::in6_pktinfo, [u8; 64]);
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BATCH_SIZE, Some(control));
        let mut arrays = slices.each_mut().map(|slice| [IoSliceMut::new(slice)]);
        let results = self.io.try_io(Interest::READABLE, || {
            let fd = self.io.as_raw_fd();
            recvmmsg(fd, &mut headers, arrays.iter_mut(), MsgFlags::MSG_DONTWAIT, None)
                .map_err(io::Error::from)
        })?;
        for message in results {
            let from = message.address.as_ref().and_then(socket_address);
            let (mut to, mut stride) = (None, None);
            for control in message.cmsgs().into_iter().flatten() {
                match control {
                    ControlMessageOwned::Ipv4OrigDstAddr(at) => {
                        to = Some(SocketAddr::V4(SockaddrIn::from(at).into()))
                    }
                    ControlMessageOwned::Ipv6OrigDstAddr(at) => {
                        to = Some(SocketAddr::V6(SockaddrIn6::from(at).into()))
                    }
                    ControlMessageOwned::UdpGroSegments(size) => stride = usize::try_from(size).ok(),
                    _ => {}
                }
            }
            let (Some(from), Some(to)) = (from, to) else { continue };
            let bytes = message.iovs().next().unwrap_or_default();
            if bytes.is_empty() {
                each(Received { from, to, payload: bytes });
            }
            for payload in bytes.chunks(stride.unwrap_or(bytes.len()).max(1)) {
                each(Received { from, to, payload });
            }
        }
        Ok(())
    }

    /// Sends what the kernel takes; returns how many it did, and the error that is no lack of room.
    pub fn send(
        &self,
        to: SocketAddr,
        from: Option<IpAddr>,
        payloads: &[Bytes],
    ) -> (usize, Option<io::Error>) {
        let (mut sent, mut left, mut failed) = (0, payloads, None);
        while let Some(first) = left.first() {
            let run = run_length(left, self.state.max_gso_segments());
            let (now, later) = left.split_at(run.max(1));
            let result = if now.len() == 1 {
                self.send_batch(to, from, first, None)
            } else {
                GATHERED.with_borrow_mut(|gathered| {
                    gathered.clear();
                    now.iter().for_each(|payload| gathered.extend_from_slice(payload));
                    self.send_batch(to, from, gathered, Some(first.len()))
                })
            };
            match result {
                Ok(()) => sent += now.len(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return (sent, failed),
                // What an earlier datagram has met; this one was not sent, and the next may be.
                Err(error) => failed = Some(error),
            }
            left = later;
        }
        (sent, failed)
    }

    fn send_batch(
        &self,
        destination: SocketAddr,
        src_ip: Option<IpAddr>,
        contents: &[u8],
        segment_size: Option<usize>,
    ) -> io::Result<()> {
        let transmit = Transmit { destination, ecn: None, contents, segment_size, src_ip };
        // Past the runtime's readiness, which a new socket has none of: nobody waits for room here.
        self.state.try_send((&self.io).into(), &transmit)
    }
}

/// How many datagrams from the front the kernel takes as one: of one size, the last may be smaller, none empty.
fn run_length(payloads: &[Bytes], most: usize) -> usize {
    let size = payloads.first().map_or(0, Bytes::len);
    // What may have to be cut into fragments goes by itself: the kernel refuses it among others.
    if size == 0 || size > MAX_GATHERED_BYTES {
        return 1;
    }
    let most = most.min(MAX_SEND_BYTES / size);
    let same = payloads.iter().take(most).take_while(|payload| payload.len() == size).count();
    let tail = payloads.get(same).is_some_and(|last| same < most && !last.is_empty() && last.len() < size);
    same + usize::from(tail)
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::V4((*v4).into()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into())))
}

#[cfg(test)]
mod tests;
