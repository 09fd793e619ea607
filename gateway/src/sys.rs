//! The two system calls that no safe wrapper of our dependencies offers: waiting for several sockets, and switching socket
//! options on. All `unsafe` of the crate is here.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// Waits until one of `sockets` is readable (or has an error queued), or the time is over. Sets `ready` per socket.
pub fn wait(sockets: &[BorrowedFd<'_>], ready: &mut Vec<bool>, timeout: Duration) -> io::Result<()> {
    // A handful of descriptors: two sockets, a waker, four ports per balanced peer.
    let mut fds: Vec<libc::pollfd> = sockets
        .iter()
        .map(|fd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 })
        .collect();
    // Rounded up: waking a millisecond early would spin.
    let millis = timeout.as_nanos().div_ceil(1_000_000);
    let millis = libc::c_int::try_from(millis).unwrap_or(libc::c_int::MAX);
    let count = libc::nfds_t::try_from(fds.len()).unwrap_or(0);
    // SAFETY: `fds` is a live array of `count` entries for the whole call, and the descriptors are borrowed.
    let result = unsafe { libc::poll(fds.as_mut_ptr(), count, millis) };
    ready.clear();
    if result < 0 {
        let error = io::Error::last_os_error();
        ready.resize(sockets.len(), false);
        return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
    }
    ready.extend(fds.iter().map(|fd| fd.revents != 0));
    Ok(())
}

/// Queues ICMP errors on the socket, with the destination and the start of the packet that they are about.
pub fn queue_errors(socket: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    let on: libc::c_int = 1;
    if v6 {
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVERR, &on)?;
    }
    // Of a dual-stack socket too: its IPv4 peers are answered by ICMP, not ICMPv6.
    match set(socket, libc::IPPROTO_IP, libc::IP_RECVERR, &on) {
        Err(error) if !v6 => Err(error),
        _ => Ok(()),
    }
}

fn set<T>(socket: BorrowedFd<'_>, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<T>()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `value` is a live object of `len` bytes that the kernel copies; `option` expects this type.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
