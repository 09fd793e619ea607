//! The sockets of captured connections, and where such a connection was going.
//!
//! Outbound connections come by REDIRECT: the kernel's connection tracking keeps where they were going. Inbound ones come
//! by TPROXY, which leaves the packets as they are, so that the socket's own address is where they were going and the
//! machine's firewall still sees the application's port; listening for them needs CAP_NET_RAW.

use std::io;
use std::net::SocketAddr;

use socket2::{SockRef, Socket};
use tokio::net::TcpStream;

use crate::listening::{Listeners, listen_with};

/// Listens for redirected connections, once per thread.
pub(crate) fn redirected(address: SocketAddr, count: usize) -> io::Result<Listeners> {
    listen_with(address, count, |socket| only_v6(socket, address))
}

/// Listens for connections that keep their destination, once per thread.
pub(crate) fn transparent(address: SocketAddr, count: usize) -> io::Result<Listeners> {
    listen_with(address, count, |socket| {
        only_v6(socket, address)?;
        if address.is_ipv6() {
            socket.set_ip_transparent_v6(true)
        } else {
            socket.set_ip_transparent_v4(true)
        }
    })
}

fn only_v6(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    if address.is_ipv6() { socket.set_only_v6(true) } else { Ok(()) }
}

/// Where a redirected connection was going; `None`: here, nobody has redirected it.
pub fn original_destination(tcp: &TcpStream) -> io::Result<Option<SocketAddr>> {
    let here = tcp.local_addr()?;
    let socket = SockRef::from(tcp);
    let original = if here.is_ipv6() { socket.original_dst_v6() } else { socket.original_dst_v4() };
    match original {
        Ok(address) => Ok(address.as_socket().filter(|original| *original != here)),
        // Without any connection tracking nothing can have been redirected.
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => Ok(None),
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOPROTOOPT) => Ok(None),
        Err(error) => Err(error),
    }
}
