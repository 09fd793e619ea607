//! What is on the wire between clusters, read and written by hand: IPv4 and UDP headers, pcap files, and (in
//! [`initial`]) QUIC Initial packets, whose keys are public.

pub mod initial;

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};

use crate::link::{Link, Tapped};

const IPPROTO_UDP: u8 = 17;
const UDP_HEADER: usize = 8;
/// libpcap's link type of packets that begin with their IP header.
const LINKTYPE_RAW: u32 = 101;

/// A UDP datagram in an IPv4 packet.
#[derive(Clone, Copy, Debug)]
pub struct Udp<'a> {
    pub from: SocketAddrV4,
    pub to: SocketAddrV4,
    pub payload: &'a [u8],
}

/// Reads a whole IPv4 packet; `None` for what is not UDP in one piece.
pub fn udp(packet: &[u8]) -> Option<Udp<'_>> {
    let header = header_bytes(packet)?;
    let udp = packet.get(header..)?;
    let port = |at: usize| Some(u16::from_be_bytes([*udp.get(at)?, *udp.get(at + 1)?]));
    let address = |at: usize| {
        Some(Ipv4Addr::new(
            *packet.get(at)?,
            *packet.get(at + 1)?,
            *packet.get(at + 2)?,
            *packet.get(at + 3)?,
        ))
    };
    Some(Udp {
        from: SocketAddrV4::new(address(12)?, port(0)?),
        to: SocketAddrV4::new(address(16)?, port(2)?),
        payload: udp.get(UDP_HEADER..)?,
    })
}

/// Length of the IP header of a UDP packet.
fn header_bytes(packet: &[u8]) -> Option<usize> {
    let first = *packet.first()?;
    (first >> 4 == 4 && *packet.get(9)? == IPPROTO_UDP).then_some(usize::from(first & 0x0f) * 4)
}

/// The packet with another payload of any length, as a sender on the path would emit it: no checksum (IPv4 allows 0),
/// lengths and header checksum right.
pub fn with_payload(packet: &[u8], payload: &[u8]) -> Option<Vec<u8>> {
    let header = header_bytes(packet)?;
    let mut out = packet.get(..header + UDP_HEADER)?.to_vec();
    out.extend_from_slice(payload);
    let (total, udp_bytes) =
        (u16::try_from(out.len()).ok()?, u16::try_from(payload.len() + UDP_HEADER).ok()?);
    put(&mut out, 2, total)?;
    put(&mut out, header + 4, udp_bytes)?;
    put(&mut out, header + 6, 0)?;
    put(&mut out, 10, 0)?;
    let sum = ipv4_checksum(out.get(..header)?);
    put(&mut out, 10, sum)?;
    Some(out)
}

fn put(packet: &mut [u8], at: usize, value: u16) -> Option<()> {
    packet.get_mut(at..at + 2)?.copy_from_slice(&value.to_be_bytes());
    Some(())
}

/// RFC 791 and 1071.
fn ipv4_checksum(header: &[u8]) -> u16 {
    let words = header.chunks(2).map(|pair| {
        u32::from(u16::from_be_bytes([pair.first().copied().unwrap_or(0), pair.get(1).copied().unwrap_or(0)]))
    });
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A packet as it crossed the link.
#[derive(Clone, Debug)]
pub struct Captured {
    pub at: SystemTime,
    pub bytes: Vec<u8>,
}

/// Everything that crosses a link, both ways, from [`Capture::start`] until dropped or taken.
#[derive(Clone, Debug, Default)]
pub struct Capture(Arc<Mutex<Vec<Captured>>>);

impl Capture {
    pub fn start(link: &Link) -> Self {
        let capture = Self::default();
        for direction in [link.a_to_b(), link.b_to_a()] {
            let packets = Arc::clone(&capture.0);
            direction.set_tap(Some(Box::new(move |packet| {
                // The capture's own clock; roles under test have theirs.
                #[allow(clippy::disallowed_methods)]
                let at = SystemTime::now();
                let mut packets = packets.lock().unwrap_or_else(PoisonError::into_inner);
                packets.push(Captured { at, bytes: packet.to_vec() });
                Tapped::Pass
            })));
        }
        capture
    }

    /// What was captured so far, in order.
    pub fn packets(&self) -> Vec<Captured> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Writes a file that tcpdump and Wireshark read.
pub fn write_pcap(path: &Path, packets: &[Captured]) -> Result<()> {
    let mut out = Vec::new();
    // Magic of microsecond stamps, version 2.4, no zone, no accuracy, snap length, link type.
    out.extend(0xa1b2_c3d4_u32.to_le_bytes());
    out.extend([2, 0, 4, 0]);
    out.extend([0; 8]);
    out.extend(65_535_u32.to_le_bytes());
    out.extend(LINKTYPE_RAW.to_le_bytes());
    for packet in packets {
        let at = packet.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let bytes = u32::try_from(packet.bytes.len())?;
        out.extend((at.as_secs() as u32).to_le_bytes());
        out.extend(at.subsec_micros().to_le_bytes());
        out.extend(bytes.to_le_bytes());
        out.extend(bytes.to_le_bytes());
        out.extend(&packet.bytes);
    }
    std::fs::write(path, out).with_context(|| format!("write {}", path.display()))
}

/// Whether `needle` is anywhere in `hay`.
pub fn contains(hay: &[u8], needle: &[u8]) -> bool {
    !needle.is_empty() && hay.windows(needle.len()).any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_is_read_and_written_again_with_another_payload() {
        let mut packet = vec![0x45, 0, 0, 30, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet.extend([0x1d, 0x10, 0x1d, 0x11, 0, 10, 9, 9, 7, 8]);
        let changed = with_payload(&packet, b"hello").unwrap();
        let read = udp(&changed).unwrap();
        assert_eq!((read.from.port(), read.to.port(), read.payload), (7440, 7441, &b"hello"[..]));
        assert_eq!(read.to.ip(), &Ipv4Addr::new(10, 0, 0, 2));
        // A header with a right checksum sums to zero.
        assert_eq!(ipv4_checksum(&changed[..20]), 0);
        packet[9] = 6;
        assert!(udp(&packet).is_none());
    }
}
