//! The bodies of control datagrams: what each says, and its bytes (drawn in the parent's header).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tombolo_model::ids::{ClusterTag, EndpointId};

use super::{
    DecodeError, HEADER_BYTES, MAC_BYTES, MAX_ANNOUNCED, MAX_PROBE_BYTES, MIN_PROBE_BYTES, REGISTER_BYTES,
    Type,
};

const ADDRESS: usize = 19;
pub(super) const PROBE_ACK_FIXED: usize = 8 + 8 + ADDRESS + 2 + 2 + 1;
pub(super) const CHALLENGE: usize = 8 + 8;
pub(super) const REGISTERED: usize = 8 + ADDRESS + 2;
pub(super) const GONE: usize = 3 + 4 + 1;
pub(super) const ANNOUNCE_FIXED: usize = 8 + 1;

/// A random number that a gateway replica draws when it starts: another one means that what it had learned is lost.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct StartNumber(pub u64);

/// What a datagram says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body {
    Probe(Probe),
    ProbeAck(ProbeAck),
    Register(Register),
    Challenge(Challenge),
    Registered(Registered),
    Gone(Gone),
    Announce(Announce),
}

/// Asks a hop whether it lives; padded, whether a packet of this size passes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Probe {
    /// The sender's own clock; only echoed.
    pub sent_micros: u64,
    /// Size of the whole datagram (UDP payload), cut to 80 ..= 9000.
    pub bytes: u16,
}

/// Answers a [`Probe`] of at least its own size.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProbeAck {
    pub sent_micros: u64,
    pub start: StartNumber,
    /// Where the probe came from, as the answering gateway saw it.
    pub observed: SocketAddr,
    /// Size in which the probe arrived.
    pub received_bytes: u16,
    /// How many clusters the gateway can't reach now; `unreachable` lists as many of them as fit.
    pub unreachable_total: u16,
    pub unreachable: Vec<ClusterTag>,
}

impl ProbeAck {
    /// The answer to a probe of `received_bytes`, with as many unreachable tags as keep it no larger than that.
    pub fn answering(
        probe: &Probe,
        received_bytes: u16,
        start: StartNumber,
        observed: SocketAddr,
        unreachable: &[ClusterTag],
    ) -> Self {
        let fixed = HEADER_BYTES + PROBE_ACK_FIXED + MAC_BYTES;
        let room = usize::from(received_bytes).saturating_sub(fixed) / 3;
        Self {
            sent_micros: probe.sent_micros,
            start,
            observed,
            received_bytes,
            unreachable_total: u16::try_from(unreachable.len()).unwrap_or(u16::MAX),
            unreachable: unreachable.iter().take(room.min(usize::from(u8::MAX))).copied().collect(),
        }
    }
}

/// Tells a replica where an endpoint without a reachable address is. The counter is the datagram's sequence, the
/// endpoint its selector.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Register {
    /// The replica this is meant for, so that it can't be replayed to another one.
    pub replica: StartNumber,
    /// Echo of the replica's challenge, 0 for none.
    pub challenge: u64,
}

/// Sent to a new address: it counts only once it has echoed `challenge`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Challenge {
    pub replica: StartNumber,
    pub challenge: u64,
}

/// The registration with this sequence holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Registered {
    pub replica: StartNumber,
    pub observed: SocketAddr,
    /// Whole seconds, at most 65535.
    pub held: Duration,
}

/// A hint that an endpoint is no more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gone {
    pub tag: ClusterTag,
    pub endpoint: EndpointId,
    /// Only this incarnation is gone: the block lives on in another one.
    pub only_this_incarnation: bool,
}

/// Endpoints registered at the sending replica, for its siblings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Announce {
    pub replica: StartNumber,
    /// At most [`MAX_ANNOUNCED`].
    pub endpoints: Vec<EndpointId>,
}

impl Body {
    pub fn kind(&self) -> Type {
        match self {
            Self::Probe(_) => Type::Probe,
            Self::ProbeAck(_) => Type::ProbeAck,
            Self::Register(_) => Type::Register,
            Self::Challenge(_) => Type::Challenge,
            Self::Registered(_) => Type::Registered,
            Self::Gone(_) => Type::Gone,
            Self::Announce(_) => Type::Announce,
        }
    }

    pub(super) fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Probe(probe) => {
                out.extend_from_slice(&probe.sent_micros.to_be_bytes());
                let bytes = probe.bytes.clamp(MIN_PROBE_BYTES, MAX_PROBE_BYTES);
                out.resize(usize::from(bytes) - MAC_BYTES, 0);
            }
            Self::ProbeAck(ack) => {
                let listed = u8::try_from(ack.unreachable.len()).unwrap_or(u8::MAX);
                out.extend_from_slice(&ack.sent_micros.to_be_bytes());
                out.extend_from_slice(&ack.start.0.to_be_bytes());
                write_address(out, ack.observed);
                out.extend_from_slice(&ack.received_bytes.to_be_bytes());
                out.extend_from_slice(&ack.unreachable_total.to_be_bytes());
                out.push(listed);
                for tag in ack.unreachable.iter().take(usize::from(listed)) {
                    out.extend_from_slice(&tag.to_bytes());
                }
            }
            Self::Register(register) => {
                out.extend_from_slice(&register.replica.0.to_be_bytes());
                out.extend_from_slice(&register.challenge.to_be_bytes());
                out.resize(REGISTER_BYTES - MAC_BYTES, 0);
            }
            Self::Challenge(challenge) => {
                out.extend_from_slice(&challenge.replica.0.to_be_bytes());
                out.extend_from_slice(&challenge.challenge.to_be_bytes());
            }
            Self::Registered(registered) => {
                out.extend_from_slice(&registered.replica.0.to_be_bytes());
                write_address(out, registered.observed);
                let held = u16::try_from(registered.held.as_secs()).unwrap_or(u16::MAX);
                out.extend_from_slice(&held.to_be_bytes());
            }
            Self::Gone(gone) => {
                out.extend_from_slice(&gone.tag.to_bytes());
                out.extend_from_slice(&gone.endpoint.value().to_be_bytes());
                out.push(u8::from(gone.only_this_incarnation));
            }
            Self::Announce(announce) => {
                let count = announce.endpoints.len().min(MAX_ANNOUNCED);
                out.extend_from_slice(&announce.replica.0.to_be_bytes());
                out.push(u8::try_from(count).unwrap_or(u8::MAX));
                for endpoint in announce.endpoints.iter().take(count) {
                    out.extend_from_slice(&endpoint.value().to_be_bytes());
                }
            }
        }
    }

    pub(super) fn read(kind: Type, body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader(body);
        let parsed = match kind {
            Type::Probe => {
                let sent_micros = reader.u64("sent_micros")?;
                reader.zeros("padding")?;
                let bytes = u16::try_from(HEADER_BYTES + body.len() + MAC_BYTES);
                Self::Probe(Probe { sent_micros, bytes: bytes.map_err(|_| DecodeError::Field("size"))? })
            }
            Type::ProbeAck => {
                let sent_micros = reader.u64("sent_micros")?;
                let start = StartNumber(reader.u64("start")?);
                let observed = reader.address("observed")?;
                let received_bytes = reader.u16("received_bytes")?;
                let unreachable_total = reader.u16("unreachable_total")?;
                let [listed] = reader.take("listed")?;
                let unreachable =
                    (0..listed).map(|_| reader.tag("unreachable")).collect::<Result<Vec<_>, _>>()?;
                if unreachable.len() > usize::from(unreachable_total) {
                    return Err(DecodeError::Field("unreachable_total"));
                }
                let ack =
                    ProbeAck { sent_micros, start, observed, received_bytes, unreachable_total, unreachable };
                Self::ProbeAck(ack)
            }
            Type::Register => {
                let register = Register {
                    replica: StartNumber(reader.u64("replica")?),
                    challenge: reader.u64("challenge")?,
                };
                reader.zeros("padding")?;
                Self::Register(register)
            }
            Type::Challenge => Self::Challenge(Challenge {
                replica: StartNumber(reader.u64("replica")?),
                challenge: reader.u64("challenge")?,
            }),
            Type::Registered => Self::Registered(Registered {
                replica: StartNumber(reader.u64("replica")?),
                observed: reader.address("observed")?,
                held: Duration::from_secs(u64::from(reader.u16("held")?)),
            }),
            Type::Gone => {
                let tag = reader.tag("tag")?;
                let endpoint = reader.endpoint("endpoint")?;
                let [scope] = reader.take("scope")?;
                let only_this_incarnation = match scope {
                    0 => false,
                    1 => true,
                    _ => return Err(DecodeError::Field("scope")),
                };
                Self::Gone(Gone { tag, endpoint, only_this_incarnation })
            }
            Type::Announce => {
                let replica = StartNumber(reader.u64("replica")?);
                let [count] = reader.take("count")?;
                let endpoints =
                    (0..count).map(|_| reader.endpoint("endpoints")).collect::<Result<Vec<_>, _>>()?;
                Self::Announce(Announce { replica, endpoints })
            }
        };
        reader.end()?;
        Ok(parsed)
    }
}

fn write_address(out: &mut Vec<u8>, address: SocketAddr) {
    // A v4 peer of a dual-stack socket shows as v4-mapped: one form on the wire.
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => {
            out.push(4);
            out.extend_from_slice(&ip.octets());
            out.extend_from_slice(&[0; 12]);
        }
        IpAddr::V6(ip) => {
            out.push(6);
            out.extend_from_slice(&ip.octets());
        }
    }
    out.extend_from_slice(&address.port().to_be_bytes());
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        let (chunk, rest) = self.0.split_first_chunk::<N>().ok_or(DecodeError::Field(field))?;
        self.0 = rest;
        Ok(*chunk)
    }
    fn u64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        self.take(field).map(u64::from_be_bytes)
    }
    fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        self.take(field).map(u16::from_be_bytes)
    }
    fn tag(&mut self, field: &'static str) -> Result<ClusterTag, DecodeError> {
        let [a, b, c] = self.take(field)?;
        ClusterTag::new(u32::from_be_bytes([0, a, b, c])).ok_or(DecodeError::Field(field))
    }
    fn endpoint(&mut self, field: &'static str) -> Result<EndpointId, DecodeError> {
        self.take(field).map(|bytes| EndpointId::from_u32(u32::from_be_bytes(bytes)))
    }
    fn address(&mut self, field: &'static str) -> Result<SocketAddr, DecodeError> {
        let [family] = self.take(field)?;
        let ip: [u8; 16] = self.take(field)?;
        let port = self.u16(field)?;
        let ip = match (family, ip) {
            (4, [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]) => IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
            (6, octets) if Ipv6Addr::from(octets).to_ipv4_mapped().is_none() => IpAddr::V6(octets.into()),
            _ => return Err(DecodeError::Field(field)),
        };
        Ok(SocketAddr::new(ip, port))
    }
    fn zeros(&mut self, field: &'static str) -> Result<(), DecodeError> {
        let padding = std::mem::take(&mut self.0);
        if padding.iter().any(|b| *b != 0) { Err(DecodeError::Field(field)) } else { Ok(()) }
    }
    fn end(&self) -> Result<(), DecodeError> {
        if self.0.is_empty() { Ok(()) } else { Err(DecodeError::Field("length")) }
    }
}
