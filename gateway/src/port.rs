//! One UDP socket of the gateway: batched IO with GRO, GSO, ECN and "don't fragment" through quinn-udp.
//!
//! Never blocks: what the kernel does not take at once is the caller's to drop. ICMP errors are queued by the kernel with the
//! destination that they are about (`IP_RECVERR`); one makes an unrelated send or receive fail, so after any failure the
//! owner drains them with [`Port::drain_errors`]. Addresses are canonical (no v4-mapped ones) on this side.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
use quinn_udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};

use crate::sys;

/// 20 ms at 800 Mbit/s; the kernel caps it silently. More would only be lost with the process.
const BUFFER_BYTES: usize = 2 * 1024 * 1024;
/// sendmsg takes at most 65507 bytes of UDP payload; GSO batches are cut below that.
pub const MAX_SEND_BYTES: usize = 65_000;
/// Errors taken per drain: the kernel's queue is bounded by the socket's buffer, and more come with the next failure.
const MAX_ERRORS: usize = 64;

/// A bound socket.
#[derive(Debug)]
pub struct Port {
    socket: std::net::UdpSocket,
    state: UdpSocketState,
    v6: bool,
    local: SocketAddr,
}

/// One batch to send.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    pub to: SocketAddr,
    /// The address that the receiver contacted, where the answer must come from it.
    pub from: Option<IpAddr>,
    pub ecn: Option<EcnCodepoint>,
    pub contents: &'a [u8],
    /// Size of each datagram but the last; `None` for a single one.
    pub segment: Option<usize>,
}

impl Port {
    /// Binds a socket of a group (`reuseport`) or one of its own.
    pub fn bind(address: SocketAddr, reuseport: bool) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        socket.set_cloexec(true)?;
        if reuseport {
            socket.set_reuse_port(true)?;
        }
        // Refused only where the operator forbids it; the kernel clamps to its limit and that is fine.
        let _ = socket.set_recv_buffer_size(BUFFER_BYTES);
        let _ = socket.set_send_buffer_size(BUFFER_BYTES);
        let v6 = address.is_ipv6();
        sys::queue_errors(socket.as_fd(), v6)?;
        socket.bind(&address.into())?;
        let socket: std::net::UdpSocket = socket.into();
        let state = UdpSocketState::new((&socket).into())?;
        let local = socket.local_addr()?;
        Ok(Self { socket, state, v6, local })
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Receives up to one batch per buffer. Errors that are not `WouldBlock` mean that errors are queued.
    pub fn receive(&self, buffers: &mut [IoSliceMut<'_>], metas: &mut [RecvMeta]) -> io::Result<usize> {
        let count = self.state.recv((&self.socket).into(), buffers, metas)?;
        for meta in metas.iter_mut().take(count) {
            meta.addr = canonical(meta.addr);
            meta.dst_ip = meta.dst_ip.map(|ip| ip.to_canonical());
        }
        Ok(count)
    }

    pub fn max_segments(&self) -> usize {
        self.state.max_gso_segments().max(1)
    }

    /// Sends one batch of at most [`Self::max_segments`] datagrams and [`MAX_SEND_BYTES`].
    pub fn send(&self, batch: &Outgoing<'_>) -> io::Result<()> {
        let transmit = Transmit {
            destination: self.native(batch.to),
            ecn: batch.ecn,
            contents: batch.contents,
            segment_size: batch.segment,
            src_ip: batch.from.map(|ip| self.native_ip(ip)),
        };
        self.state.try_send((&self.socket).into(), &transmit)
    }

    /// Takes queued ICMP errors off: `about` is called with the destination of the packet and the error.
    pub fn drain_errors(&self, mut about: impl FnMut(SocketAddr, i32)) {
        for _ in 0..MAX_ERRORS {
            // The quoted packet is not needed: the destination says which hop it was.
            let mut quoted = [0u8; 64];
            let mut iov = [IoSliceMut::new(&mut quoted)];
            let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6, [u8; 64]);
            let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
            let fd = self.socket.as_raw_fd();
            let Ok(message) = recvmsg::<SockaddrStorage>(fd, &mut iov, Some(&mut control), flags) else {
                return;
            };
            let Some(to) = message.address.as_ref().and_then(socket_address) else { continue };
            let Ok(controls) = message.cmsgs() else { continue };
            for control in controls {
                let error = match control {
                    ControlMessageOwned::Ipv4RecvErr(error, _)
                    | ControlMessageOwned::Ipv6RecvErr(error, _) => error,
                    _ => continue,
                };
                let remote = error.ee_origin != libc::SO_EE_ORIGIN_LOCAL;
                if remote && let Ok(errno) = i32::try_from(error.ee_errno) {
                    about(to, errno);
                }
            }
        }
    }

    fn native(&self, address: SocketAddr) -> SocketAddr {
        SocketAddr::new(self.native_ip(address.ip()), address.port())
    }

    fn native_ip(&self, ip: IpAddr) -> IpAddr {
        match ip {
            IpAddr::V4(v4) if self.v6 => IpAddr::V6(v4.to_ipv6_mapped()),
            ip => ip,
        }
    }
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whether an error says that nobody is there.
pub fn is_refusal(errno: i32) -> bool {
    matches!(errno, libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH | libc::EHOSTDOWN)
}

/// The one form of an address that tables are keyed by.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::from((v4.ip(), v4.port())));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| canonical(SocketAddr::from((v6.ip(), v6.port())))))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_icmp_error_names_the_destination_that_refused() {
        let port = Port::bind(([127, 0, 0, 1], 0).into(), false).unwrap();
        let closed = Port::bind(([127, 0, 0, 1], 0).into(), false).unwrap().local_addr();
        let packet = Outgoing { to: closed, from: None, ecn: None, contents: b"anyone?", segment: None };
        port.send(&packet).unwrap();
        let mut ready = Vec::new();
        sys::wait(&[port.as_fd()], &mut ready, Duration::from_secs(5)).unwrap();
        let mut seen = Vec::new();
        port.drain_errors(|to, errno| seen.push((to, is_refusal(errno))));
        assert_eq!(seen, [(closed, true)]);
        // Drained, so what follows is not blamed for it.
        assert!(port.send(&Outgoing { to: port.local_addr(), ..packet }).is_ok());
    }

    #[test]
    fn a_dual_stack_socket_shows_ipv4_peers_as_such() {
        let Ok(wide) = Port::bind("[::]:0".parse().unwrap(), false) else {
            println!("SKIPPED a_dual_stack_socket_shows_ipv4_peers_as_such: no IPv6 here");
            return;
        };
        let narrow = Port::bind(([127, 0, 0, 1], 0).into(), false).unwrap();
        let to = SocketAddr::from(([127, 0, 0, 1], wide.local_addr().port()));
        narrow
            .send(&Outgoing { to, from: None, ecn: Some(EcnCodepoint::Ect0), contents: b"x", segment: None })
            .unwrap();
        sys::wait(&[wide.as_fd()], &mut Vec::new(), Duration::from_secs(5)).unwrap();
        let (mut buffer, mut metas) = ([0u8; 2048], [RecvMeta::default()]);
        assert_eq!(wide.receive(&mut [IoSliceMut::new(&mut buffer)], &mut metas).unwrap(), 1);
        assert_eq!(metas[0].addr, narrow.local_addr());
        assert_eq!((metas[0].dst_ip, metas[0].ecn), (Some([127, 0, 0, 1].into()), Some(EcnCodepoint::Ect0)));
        let back =
            Outgoing { to: metas[0].addr, from: metas[0].dst_ip, ecn: None, contents: b"y", segment: None };
        wide.send(&back).unwrap();
        sys::wait(&[narrow.as_fd()], &mut Vec::new(), Duration::from_secs(5)).unwrap();
        assert_eq!(narrow.receive(&mut [IoSliceMut::new(&mut buffer)], &mut metas).unwrap(), 1);
        assert_eq!(metas[0].addr, to);
    }
}
