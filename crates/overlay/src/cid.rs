//! Connection IDs: where a packet's receiver is, and a MAC that admits it (protocol.md section 1).
//!
//! ```text
//!  byte 0       version (2 bits) | kind (3) | key phase (2) | handed over (1)
//!  bytes 1-3    cluster tag
//!  bytes 4-7    target       endpoint, join: block (28) + incarnation (4); service, control: handle
//!  bytes 8-14   nonce        random
//!  bytes 15-19  MAC          SipHash-2-4 over bytes 0-14 (hand-over bit clear), truncated to 40 bits
//! ```
//! All integers are big-endian. The hand-over bit is set by a gateway that passes a packet on to a sibling, and
//! cleared before delivery, so it is outside the MAC. RFC 9000 section 17 places the ID: after a long header's
//! length byte (offset 6), or right after a short header's first byte (offset 1).

use std::fmt;
use std::hash::Hasher;

use siphasher::sip::SipHasher24;
use tombolo_model::ids::{ClusterTag, EndpointId, Handle};

use crate::keys::{CidKey, Hour, Phase};

/// Length of every connection ID of the overlay, the most that QUIC version 1 allows.
pub const CID_LEN: usize = 20;
const VERSION: u8 = 0;
const HANDED_OVER: u8 = 0x01;
const MAC_AT: usize = 15;
const SHORT_DCID_AT: usize = 1;
const LONG_DCID_AT: usize = 6;

/// What a connection ID's target means.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Kind {
    /// One running socket: block and incarnation.
    Endpoint,
    /// Any healthy endpoint of what the handle stands for.
    Service,
    /// A cluster's federators.
    Control,
    /// A joiner without a lease that dialled a federator directly.
    Join,
}

impl Kind {
    fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::Endpoint),
            1 => Some(Self::Service),
            2 => Some(Self::Control),
            3 => Some(Self::Join),
            _ => None,
        }
    }
    fn bits(self) -> u8 {
        match self {
            Self::Endpoint => 0,
            Self::Service => 1,
            Self::Control => 2,
            Self::Join => 3,
        }
    }
}

/// A connection ID of version 0 and a known kind. Parsing does not check the MAC: [`Cid::verify`] does.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cid([u8; CID_LEN]);

impl Cid {
    /// `None` unless there are exactly 20 bytes of version 0 with a known kind.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; CID_LEN] = bytes.try_into().ok()?;
        let [first, ..] = bytes;
        if first >> 6 != VERSION {
            return None;
        }
        Kind::from_bits((first >> 3) & 0b111)?;
        Some(Self(bytes))
    }

    /// Makes an ID for `target` with a MAC by `key`, which must be the target's key of `hour`.
    pub fn mint(kind: Kind, tag: ClusterTag, target: u32, nonce: [u8; 7], hour: Hour, key: &CidKey) -> Self {
        let mut bytes = [0u8; CID_LEN];
        bytes[0] = (VERSION << 6) | (kind.bits() << 3) | (hour.phase().value() << 1);
        bytes[1..4].copy_from_slice(&tag.to_bytes());
        bytes[4..8].copy_from_slice(&target.to_be_bytes());
        bytes[8..15].copy_from_slice(&nonce);
        let mac = mac(&bytes, key);
        bytes[MAC_AT..].copy_from_slice(&mac);
        Self(bytes)
    }

    pub fn kind(&self) -> Kind {
        // Checked by every constructor.
        Kind::from_bits((self.0[0] >> 3) & 0b111).unwrap_or(Kind::Endpoint)
    }
    pub fn phase(&self) -> Phase {
        Phase::from_bits(self.0[0] >> 1)
    }
    pub fn tag_value(&self) -> u32 {
        u32::from_be_bytes([0, self.0[1], self.0[2], self.0[3]])
    }
    /// `None` for the tag 0, which no cluster has.
    pub fn tag(&self) -> Option<ClusterTag> {
        ClusterTag::new(self.tag_value())
    }
    pub fn target(&self) -> u32 {
        u32::from_be_bytes([self.0[4], self.0[5], self.0[6], self.0[7]])
    }
    /// The target read as an endpoint id (kinds endpoint and join).
    pub fn endpoint(&self) -> EndpointId {
        EndpointId::from_u32(self.target())
    }
    /// The target read as a handle (kinds service and control).
    pub fn handle(&self) -> Handle {
        Handle::from_u32(self.target())
    }
    pub fn nonce(&self) -> [u8; 7] {
        let mut nonce = [0; 7];
        nonce.copy_from_slice(&self.0[8..15]);
        nonce
    }
    /// Whether a sibling gateway passed this packet on once already.
    pub fn handed_over(&self) -> bool {
        self.0[0] & HANDED_OVER != 0
    }
    /// Whether the MAC is `key`'s. 40 bits are admission control, not authentication: that is mTLS.
    pub fn verify(&self, key: &CidKey) -> bool {
        let expected = mac(&self.0, key);
        // Constant time is not needed for a 40-bit admission check, but costs nothing.
        expected.iter().zip(&self.0[MAC_AT..]).fold(0, |acc, (a, b)| acc | (a ^ b)) == 0
    }
    pub fn as_bytes(&self) -> &[u8; CID_LEN] {
        &self.0
    }
    /// The same ID with the hand-over bit clear: what a sender has minted.
    pub fn without_hand_over(mut self) -> Self {
        self.0[0] &= !HANDED_OVER;
        self
    }
}

fn mac(bytes: &[u8; CID_LEN], key: &CidKey) -> [u8; 5] {
    let mut hasher = SipHasher24::new_with_key(key.as_bytes());
    hasher.write(&[bytes[0] & !HANDED_OVER]);
    hasher.write(&bytes[1..MAC_AT]);
    let [a, b, c, d, e, ..] = hasher.finish().to_be_bytes();
    [a, b, c, d, e]
}

impl fmt::Display for Cid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}
impl fmt::Debug for Cid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cid({:?} {:06x}/{:08x} {self})", self.kind(), self.tag_value(), self.target())
    }
}

/// What a datagram on an overlay port is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Packet<'a> {
    /// A QUIC long-header packet; `first_flight` for Initial and 0-RTT (RFC 9000 section 17.2), and for any type of
    /// an unknown QUIC version.
    Long { dcid: Cid, scid: &'a [u8], first_flight: bool },
    /// A QUIC short-header packet.
    Short { dcid: Cid },
    /// One of our control datagrams: QUIC's fixed bit is clear (so quinn's greasing is off).
    Datagram,
}

/// Reads the routing part of a datagram; `None` for what is not ours and must be dropped.
pub fn classify(packet: &[u8]) -> Option<Packet<'_>> {
    let first = *packet.first()?;
    match first & 0xc0 {
        0x00 => Some(Packet::Datagram),
        0x40 => {
            let dcid = Cid::from_bytes(packet.get(SHORT_DCID_AT..SHORT_DCID_AT + CID_LEN)?)?;
            Some(Packet::Short { dcid })
        }
        0x80 => None, // a long header without the fixed bit is not QUIC version 1 without greasing
        _ => {
            if usize::from(*packet.get(LONG_DCID_AT - 1)?) != CID_LEN {
                return None;
            }
            let dcid_end = LONG_DCID_AT + CID_LEN;
            let dcid = Cid::from_bytes(packet.get(LONG_DCID_AT..dcid_end)?)?;
            let scid_len = usize::from(*packet.get(dcid_end)?);
            let scid = packet.get(dcid_end + 1..dcid_end + 1 + scid_len)?;
            let first_flight = (first >> 4) & 0b11 <= 1;
            Some(Packet::Long { dcid, scid, first_flight })
        }
    }
}

/// Where the destination connection ID starts; `None` for control datagrams and empty input.
pub fn dcid_offset(packet: &[u8]) -> Option<usize> {
    match packet.first()? & 0xc0 {
        0x40 => Some(SHORT_DCID_AT),
        0xc0 => Some(LONG_DCID_AT),
        _ => None,
    }
}

/// Sets or clears the hand-over bit of a packet's destination connection ID in place.
pub fn set_handed_over(packet: &mut [u8], on: bool) {
    if let Some(byte) = dcid_offset(packet).and_then(|at| packet.get_mut(at)) {
        *byte = if on { *byte | HANDED_OVER } else { *byte & !HANDED_OVER };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(byte: u8) -> CidKey {
        CidKey::from_bytes([byte; 16])
    }

    fn sample() -> Cid {
        let tag = ClusterTag::new(0x0a0b0c).unwrap();
        Cid::mint(Kind::Service, tag, 77, [1, 2, 3, 4, 5, 6, 7], Hour(494_222), &key(9))
    }

    #[test]
    fn the_bytes_of_an_id_are_fixed() {
        assert_eq!(sample().to_string(), "0c0a0b0c0000004d010203040506070c15461666");
    }

    #[test]
    fn an_id_is_admitted_by_its_key_alone_and_survives_a_hand_over() {
        let cid = sample();
        assert!(cid.verify(&key(9)) && !cid.verify(&key(8)));
        let mut packet = vec![0x41];
        packet.extend_from_slice(cid.as_bytes());
        set_handed_over(&mut packet, true);
        let Some(Packet::Short { dcid }) = classify(&packet) else { panic!("short header") };
        assert!(dcid.handed_over() && dcid.verify(&key(9)));
        assert_eq!(dcid.without_hand_over(), cid);
        set_handed_over(&mut packet, false);
        assert_eq!(&packet[1..], cid.as_bytes());
    }

    #[test]
    fn a_long_header_names_both_ids() {
        let cid = sample();
        let mut packet = vec![0xc3, 0, 0, 0, 1, 20];
        packet.extend_from_slice(cid.as_bytes());
        packet.extend_from_slice(&[2, 0xaa, 0xbb, 0, 0]);
        assert_eq!(
            classify(&packet),
            Some(Packet::Long { dcid: cid, scid: &[0xaa, 0xbb], first_flight: true })
        );
        packet[0] = 0xe3;
        assert!(matches!(classify(&packet), Some(Packet::Long { first_flight: false, .. })));
        packet[5] = 19;
        assert_eq!(classify(&packet), None);
    }

    proptest! {
        #[test]
        fn every_field_round_trips(kind in 0u8..4, tag in 1u32..=ClusterTag::MAX, target: u32, nonce: [u8; 7], hour: u32) {
            let kind = Kind::from_bits(kind).unwrap();
            let hour = Hour(u64::from(hour));
            let cid = Cid::mint(kind, ClusterTag::new(tag).unwrap(), target, nonce, hour, &key(1));
            let back = Cid::from_bytes(cid.as_bytes()).unwrap();
            prop_assert_eq!((back.kind(), back.tag_value(), back.target()), (kind, tag, target));
            prop_assert_eq!((back.nonce(), back.phase()), (nonce, hour.phase()));
            prop_assert!(back.verify(&key(1)));
        }

        #[test]
        fn a_flipped_bit_outside_the_hand_over_bit_is_refused(bit in 1usize..160) {
            let mut bytes = *sample().as_bytes();
            // bit 0 counts from the least significant bit of byte 0, which is the hand-over bit
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Cid::from_bytes(&bytes).is_none_or(|cid| !cid.verify(&key(9))));
        }

        #[test]
        fn any_bytes_are_classified_without_panic(packet in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = classify(&packet);
            let _ = dcid_offset(&packet);
            let mut packet = packet;
            set_handed_over(&mut packet, true);
        }
    }
}
