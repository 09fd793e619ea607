//! A TUN device inside a namespace: whole IP packets in and out, one per system call, no offloads.
//! The device exists while the file is open.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;

use anyhow::{Context as _, Result, bail};

use super::LinkEnd;

/// `TUNSETIFF` of linux/if_tun.h, `_IOW('T', 202, int)`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

/// Packets the device holds for us. A sender may burst a whole window (2.8 MB, 1900 packets) before we are scheduled;
/// a drop here would be loss that no shape asked for.
const QUEUE_PACKETS: &str = "10000";

/// Device names are at most 15 bytes and a terminating zero (IFNAMSIZ).
const NAME_BYTES: usize = 16;

#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME_BYTES],
    flags: libc::c_short,
    /// `struct ifreq` ends with a union of 24 bytes; the kernel copies all of it.
    rest: [u8; 22],
}

#[derive(Debug)]
pub(super) struct Tun {
    file: File,
}

impl Tun {
    pub(super) fn create(end: LinkEnd<'_>, peer: IpAddr, mtu: u16) -> Result<Self> {
        let LinkEnd { namespace, device, address } = end;
        if device.is_empty() || device.len() >= NAME_BYTES {
            bail!("device name {device:?}: use 1 to 15 bytes");
        }
        let file = namespace.run(|| open(device))??;
        namespace.add_address(device, &format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 }))?;
        namespace.ip(&["link", "set", device, "mtu", &mtu.to_string(), "txqueuelen", QUEUE_PACKETS, "up"])?;
        namespace.add_device_route(&peer.to_string(), device)?;
        Ok(Self { file })
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// One packet, or `None` when there is none now (or the device went down).
    pub(super) fn receive(&self, buffer: &mut [u8]) -> Option<usize> {
        loop {
            match (&self.file).read(buffer) {
                Ok(bytes) => return Some(bytes),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
    }

    /// Whether the kernel took the packet.
    pub(super) fn send(&self, packet: &[u8]) -> bool {
        loop {
            match (&self.file).write(packet) {
                Ok(_) => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }
}

/// Opens the device in the calling thread's namespace.
fn open(device: &str) -> Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .context("open /dev/net/tun")?;
    let mut request = InterfaceRequest {
        name: [0; NAME_BYTES],
        flags: (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short,
        rest: [0; 22],
    };
    for (to, from) in request.name.iter_mut().zip(device.bytes()) {
        *to = from;
    }
    // SAFETY: the request has the size and layout of `struct ifreq` and outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if result != 0 {
        return Err(std::io::Error::last_os_error())
            .with_context(|| format!("create the TUN device {device}"));
    }
    Ok(file)
}
