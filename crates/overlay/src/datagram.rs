//! Control datagrams: PROBE, PROBE-ACK, REGISTER, REGISTER-CHALLENGE, REGISTERED, GONE, ANNOUNCE (protocol.md
//! section 3). This module owns their bytes; it keeps no state and does no IO.
//!
//! ```text
//!  byte 0       00 (not QUIC: the fixed bit is clear) | version (2 bits) | type (4)
//!  byte 1       selector class (4) | 00 | key phase (2)
//!  bytes 2-4    selector: cluster tag
//!  bytes 5-8    selector: endpoint id; 0 for class gateway
//!  bytes 9-16   sequence
//!  bytes 17-    body, by type
//!  last 8       MAC          SipHash-2-4 over everything before it
//!
//!  PROBE        sent_micros 8 | zero padding            80 to 9000 bytes in all
//!  PROBE-ACK    sent_micros 8 | start 8 | address 19 | received bytes 2 | unreachable 2 | listed 1 | tags 3 each
//!               sequence and sent_micros are the PROBE's; never larger than the PROBE
//!  REGISTER     replica's start 8 | challenge 8 (0: none) | zero padding       64 bytes in all
//!  CHALLENGE    replica's start 8 | challenge 8         41 bytes; sequence is the REGISTER's
//!  REGISTERED   replica's start 8 | address 19 | held seconds 2       54 bytes; sequence is the REGISTER's
//!  GONE         tag 3 | endpoint 4 | scope 1 (0: the whole block, 1: this incarnation)      33 bytes
//!  ANNOUNCE     announcer's start 8 | count 1 | endpoint ids 4 each
//!
//!  address      family 1 (4 or 6) | ip 16 (IPv4: 4, then zeros) | port 2
//! ```
//! All integers are big-endian. Invariants: an answer is never larger than what it answers (no amplification: GONE's
//! 33 bytes are below the 41 of the smallest short-header packet with a 20-byte ID); every encoding is canonical (padding
//! and unused bytes are zero, checked); a body is parsed only after its MAC holds.
//!
//! **Which key.** The selector names the key, so that a receiver needs one look-up: `Endpoint` is the key of that
//! endpoint's block, held by it and by its cluster's gateways, in both directions; `Gateway` is sent by a gateway of
//! that cluster and keyed with the probe key of the link between it and the receiver's cluster, or with the replica key when
//! both are one cluster; `Across` names an endpoint that reaches another cluster's gateways or endpoints past its own
//! gateways, and its key is derived for it and them alone. GONE to a sidecar carries the *receiver's* endpoint as selector: a hint that any hop could
//! forge anyway, but outsiders can't.

mod body;
#[cfg(test)]
mod tests;

use std::hash::Hasher;

use siphasher::sip::SipHasher24;
use tombolo_model::ids::{ClusterTag, EndpointId};

use crate::keys::{CidKey, Hour, Phase};

pub use body::{Announce, Body, Challenge, Gone, Probe, ProbeAck, Register, Registered, StartNumber};

const VERSION: u8 = 0;
const HEADER_BYTES: usize = 17;
const MAC_BYTES: usize = 8;
/// Smallest PROBE: leaves room in its ACK for five unreachable tags.
pub const MIN_PROBE_BYTES: u16 = 80;
/// Size of a PROBE that is not looking for the MTU: room for 63 unreachable tags in the ACK, 2.6 KB/s at the fast pace.
pub const PROBE_BYTES: u16 = 256;
/// Largest PROBE, as UDP payload: jumbo frames; nothing larger crosses a real network.
pub const MAX_PROBE_BYTES: u16 = 9000;
/// A REGISTER is padded to this, so that its answers are smaller.
pub const REGISTER_BYTES: usize = 64;
/// Endpoints in one ANNOUNCE: 1034 bytes, below every path's minimum of 1200.
pub const MAX_ANNOUNCED: usize = 250;

/// Names the key of a datagram: see the module's header.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Selector {
    /// Between this endpoint and a gateway of its cluster, either way: the endpoint key of its block.
    Endpoint { tag: ClusterTag, endpoint: EndpointId },
    /// Sent by a gateway of this cluster: the link's probe key, or the replica key inside one cluster.
    Gateway { tag: ClusterTag },
    /// Between this endpoint and a gateway or endpoint of another cluster that it reaches past its own gateways, either way:
    /// [`CidKey::of_prober`] of the other's across key.
    Across { tag: ClusterTag, endpoint: EndpointId },
}

impl Selector {
    pub fn tag(&self) -> ClusterTag {
        match self {
            Self::Endpoint { tag, .. } | Self::Gateway { tag } | Self::Across { tag, .. } => *tag,
        }
    }
}

/// The type of a datagram, readable before its MAC is checked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Type {
    Probe,
    ProbeAck,
    Register,
    Challenge,
    Registered,
    Gone,
    Announce,
}

impl Type {
    fn from_bits(bits: u8) -> Option<Self> {
        Some(match bits {
            1 => Self::Probe,
            2 => Self::ProbeAck,
            3 => Self::Register,
            4 => Self::Challenge,
            5 => Self::Registered,
            6 => Self::Gone,
            7 => Self::Announce,
            _ => return None,
        })
    }
    fn bits(self) -> u8 {
        match self {
            Self::Probe => 1,
            Self::ProbeAck => 2,
            Self::Register => 3,
            Self::Challenge => 4,
            Self::Registered => 5,
            Self::Gone => 6,
            Self::Announce => 7,
        }
    }
    /// Smallest and largest size in all of a datagram of this type.
    fn size_range(self) -> (usize, usize) {
        let fixed = |body: usize| (HEADER_BYTES + body + MAC_BYTES, HEADER_BYTES + body + MAC_BYTES);
        match self {
            Self::Probe => (usize::from(MIN_PROBE_BYTES), usize::from(MAX_PROBE_BYTES)),
            Self::ProbeAck => {
                let (least, _) = fixed(body::PROBE_ACK_FIXED);
                (least, least + 3 * usize::from(u8::MAX))
            }
            Self::Register => (REGISTER_BYTES, REGISTER_BYTES),
            Self::Challenge => fixed(body::CHALLENGE),
            Self::Registered => fixed(body::REGISTERED),
            Self::Gone => fixed(body::GONE),
            Self::Announce => {
                let (least, _) = fixed(body::ANNOUNCE_FIXED);
                (least, least + 4 * MAX_ANNOUNCED)
            }
        }
    }
}

/// Why a datagram was dropped. [`DecodeError::kind`] is the metric label.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("not a control datagram: too short, or the top bits of byte 0 are set")]
    NotControl,
    #[error("version {0} is not {VERSION}")]
    Version(u8),
    #[error("unknown type {0}")]
    UnknownType(u8),
    #[error("unknown selector class or reserved bits in {0:#04x}")]
    UnknownSelector(u8),
    #[error("{bytes} bytes; a {of:?} has {least} to {most}")]
    Size { of: Type, bytes: usize, least: usize, most: usize },
    #[error("the MAC is not this key's")]
    Mac,
    #[error("field {0} is not canonical or out of range")]
    Field(&'static str),
}

impl DecodeError {
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NotControl => "not_control",
            Self::Version(_) => "version",
            Self::UnknownType(_) => "type",
            Self::UnknownSelector(_) => "selector",
            Self::Size { .. } => "size",
            Self::Mac => "mac",
            Self::Field(_) => "field",
        }
    }
}

/// A datagram that is to be sent, or whose MAC held.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Datagram {
    pub selector: Selector,
    /// PROBE: the prober's own numbering. REGISTER: the endpoint's counter. ANNOUNCE: the replica's counter. Answers
    /// repeat it. GONE: free.
    pub sequence: u64,
    pub body: Body,
}

impl Datagram {
    /// The bytes to send, keyed by the selector's key of `hour`. Lists and sizes beyond their bounds are cut.
    pub fn encode(&self, hour: Hour, key: &CidKey) -> Vec<u8> {
        let kind = self.body.kind();
        let mut out = Vec::with_capacity(128);
        out.push((VERSION << 4) | kind.bits());
        let (class, endpoint) = match self.selector {
            Selector::Endpoint { endpoint, .. } => (0u8, endpoint.value()),
            Selector::Gateway { .. } => (1, 0),
            Selector::Across { endpoint, .. } => (2, endpoint.value()),
        };
        out.push((class << 4) | hour.phase().value());
        out.extend_from_slice(&self.selector.tag().to_bytes());
        out.extend_from_slice(&endpoint.to_be_bytes());
        out.extend_from_slice(&self.sequence.to_be_bytes());
        self.body.write(&mut out);
        let mac = mac(&out, key);
        out.extend_from_slice(&mac);
        out
    }
}

/// A datagram whose header is well formed and whose MAC has not been checked.
#[derive(Clone, Copy, Debug)]
pub struct Unverified<'a> {
    pub kind: Type,
    pub selector: Selector,
    pub phase: Phase,
    pub sequence: u64,
    body: &'a [u8],
    signed: &'a [u8],
    mac: [u8; MAC_BYTES],
}

/// Reads the header, without a key. What it names is a claim until [`Unverified::verify`].
pub fn decode(packet: &[u8]) -> Result<Unverified<'_>, DecodeError> {
    let [first, second, ..] = *packet else { return Err(DecodeError::NotControl) };
    if first & 0xc0 != 0 {
        return Err(DecodeError::NotControl);
    }
    if first >> 4 != VERSION {
        return Err(DecodeError::Version(first >> 4));
    }
    let kind = Type::from_bits(first & 0x0f).ok_or(DecodeError::UnknownType(first & 0x0f))?;
    let (least, most) = kind.size_range();
    if packet.len() < least || packet.len() > most {
        return Err(DecodeError::Size { of: kind, bytes: packet.len(), least, most });
    }
    let size = DecodeError::Size { of: kind, bytes: packet.len(), least, most };
    let (signed, mac) = packet.split_last_chunk::<MAC_BYTES>().ok_or(size)?;
    let (header, body) = signed.split_first_chunk::<HEADER_BYTES>().ok_or(size)?;
    let [_, _, t0, t1, t2, e0, e1, e2, e3, sequence @ ..] = *header;
    let tag = ClusterTag::new(u32::from_be_bytes([0, t0, t1, t2])).ok_or(DecodeError::Field("tag"))?;
    let endpoint = u32::from_be_bytes([e0, e1, e2, e3]);
    let selector = match (second & 0b1111_1100) >> 2 {
        0b00_0000 => Selector::Endpoint { tag, endpoint: EndpointId::from_u32(endpoint) },
        0b00_0100 if endpoint == 0 => Selector::Gateway { tag },
        0b00_1000 => Selector::Across { tag, endpoint: EndpointId::from_u32(endpoint) },
        _ => return Err(DecodeError::UnknownSelector(second)),
    };
    let phase = Phase::from_bits(second);
    Ok(Unverified { kind, selector, phase, sequence: u64::from_be_bytes(sequence), body, signed, mac: *mac })
}

impl Unverified<'_> {
    /// Checks the MAC, then reads the body.
    pub fn verify(&self, key: &CidKey) -> Result<Datagram, DecodeError> {
        let expected = mac(self.signed, key);
        if expected.iter().zip(&self.mac).fold(0, |acc, (a, b)| acc | (a ^ b)) != 0 {
            return Err(DecodeError::Mac);
        }
        let body = Body::read(self.kind, self.body)?;
        Ok(Datagram { selector: self.selector, sequence: self.sequence, body })
    }
}

fn mac(bytes: &[u8], key: &CidKey) -> [u8; MAC_BYTES] {
    let mut hasher = SipHasher24::new_with_key(key.as_bytes());
    hasher.write(bytes);
    hasher.finish().to_be_bytes()
}
