//! Socket options that no library here has. The one `unsafe` of the crate is here.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Sets an option to `value`, of the type that the kernel knows it by; what `value` points at must live.
pub(crate) fn set<T>(socket: BorrowedFd<'_>, level: i32, name: i32, value: &T) -> io::Result<()> {
    let size = libc::socklen_t::try_from(size_of::<T>()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `value` is alive and has `size` bytes; the kernel copies them.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lets the kernel cut what a UDP socket sends into fragments where the path's frames are smaller, as plain sockets do
/// (ip(7), ipv6(7)); quinn-udp forbids it for QUIC's sake (RFC 9000 section 14).
pub fn allow_fragments(socket: BorrowedFd<'_>, ipv6: bool) -> io::Result<()> {
    let v4 = set(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, &libc::IP_PMTUDISC_DONT);
    if !ipv6 {
        return v4;
    }
    // An IPv6 socket may have no IPv4 side.
    set(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, &libc::IPV6_PMTUDISC_DONT)
}
