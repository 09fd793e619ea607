//! Datagrams of UDP flows. A flow is opened and held by a bidirectional stream, whose header says UDP, and is known by that
//! stream's place among the caller's streams: there is nothing to allot, and nothing to agree on.
//!
//! ```text
//!  DATAGRAM frame (RFC 9221)         on the flow's stream, after its header (caller) or FlowAccepted (callee)
//!  +------------------+---------     +---------------+----------------------
//!  | flow (varint)    | payload      | length (u16)  | payload               ... again and again
//!  +------------------+---------     +---------------+----------------------
//! ```
//! The varint is RFC 9000's (section 16); flow = stream ID / 4 + 1. Flow 0 is nobody's: kicks are datagrams of one zero
//! byte. Length is big-endian. The stream carries what is sent before the callee has accepted the flow, so that it can be
//! given to another endpoint, and what is too large for a DATAGRAM frame. Its end closes the flow.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Flow identifiers fit a QUIC variable-length integer.
pub const MAX_FLOW: u64 = (1 << 62) - 1;
/// What a flow's identifier takes at most in front of a datagram.
pub const MAX_FLOW_BYTES: usize = 8;
/// A UDP datagram over IPv6 has at most this payload (RFC 768 has 16 bits for its length, 8 bytes of it the header's).
pub const MAX_PAYLOAD_BYTES: usize = 65_527;

/// The flow that a stream holds open.
pub fn of_stream(stream_id: u64) -> u64 {
    (stream_id >> 2) + 1
}

/// How many bytes a flow's identifier takes.
pub fn id_bytes(flow: u64) -> usize {
    match flow {
        0..=0x3f => 1,
        0x40..=0x3fff => 2,
        0x4000..=0x3fff_ffff => 4,
        _ => 8,
    }
}

/// A DATAGRAM frame's content. `flow` is at most [`MAX_FLOW`].
pub fn encode(flow: u64, payload: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(MAX_FLOW_BYTES + payload.len());
    match id_bytes(flow) {
        1 => out.put_u8(flow as u8),
        2 => out.put_u16(flow as u16 | 0x4000),
        4 => out.put_u32(flow as u32 | 0x8000_0000),
        _ => out.put_u64(flow & MAX_FLOW | 0xc000_0000_0000_0000),
    }
    out.extend_from_slice(payload);
    out.freeze()
}

/// The flow and its payload; `None`: no datagram of a flow (a kick, or noise).
pub fn decode(mut datagram: Bytes) -> Option<(u64, Bytes)> {
    let first = *datagram.first()?;
    let len = 1usize << (first >> 6);
    if datagram.len() < len {
        return None;
    }
    let id = datagram.split_to(len);
    let flow =
        id.iter().fold(0u64, |value, byte| (value << 8) | u64::from(*byte)) & (u64::MAX >> (66 - 8 * len));
    (flow != 0).then_some((flow, datagram))
}

/// A datagram as the flow's stream carries it; `None`: no UDP datagram is that long.
pub fn encode_on_stream(payload: &[u8]) -> Option<Bytes> {
    let len = u16::try_from(payload.len()).ok().filter(|len| usize::from(*len) <= MAX_PAYLOAD_BYTES)?;
    let mut out = BytesMut::with_capacity(2 + payload.len());
    out.put_u16(len);
    out.extend_from_slice(payload);
    Some(out.freeze())
}

/// Takes one datagram off the front of what has been read of the stream; `None`: more bytes are needed.
pub fn decode_on_stream(read: &mut BytesMut) -> Option<Bytes> {
    let len = usize::from(u16::from_be_bytes(*read.first_chunk::<2>()?));
    if read.len() < 2 + len {
        return None;
    }
    read.advance(2);
    Some(read.split_to(len).freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_datagrams_are_fixed() {
        let cases: [(u64, &[u8]); 5] = [
            (1, &[1, b'x']),
            (0x3f, &[0x3f, b'x']),
            (0x40, &[0x40, 0x40, b'x']),
            (0x4000, &[0x80, 0, 0x40, 0, b'x']),
            (0x4000_0000, &[0xc0, 0, 0, 0, 0x40, 0, 0, 0, b'x']),
        ];
        for (flow, bytes) in cases {
            assert_eq!(&encode(flow, b"x")[..], bytes, "{flow}");
            assert_eq!(encode(flow, b"").len(), id_bytes(flow));
        }
        assert_eq!(encode_on_stream(b"abc").as_deref(), Some(&[0, 3, b'a', b'b', b'c'][..]));
        assert_eq!((of_stream(0), of_stream(4), of_stream(4 * 63)), (1, 2, 64));
    }

    #[test]
    fn a_kick_is_no_flows_and_neither_is_half_an_identifier() {
        for noise in [&[][..], &[0], &[0, 1, 2], &[0x40], &[0x80, 0, 0], &[0xc0, 0, 0, 0, 0, 0, 0]] {
            assert_eq!(decode(Bytes::copy_from_slice(noise)), None, "{noise:?}");
        }
        assert_eq!(decode(Bytes::from_static(&[1])), Some((1, Bytes::new())), "datagrams may be empty");
    }

    #[test]
    fn what_no_datagram_can_be_is_not_put_on_a_stream() {
        assert!(encode_on_stream(&vec![0; MAX_PAYLOAD_BYTES]).is_some());
        assert_eq!(encode_on_stream(&vec![0; MAX_PAYLOAD_BYTES + 1]), None);
    }

    proptest::proptest! {
        #[test]
        fn any_datagram_comes_back_as_it_was_and_any_bytes_are_read_or_refused(
            flow in 1..=MAX_FLOW, small in 1u64..70_000, payload: Vec<u8>, noise: Vec<u8>,
        ) {
            for flow in [flow, small] {
                let back = decode(encode(flow, &payload));
                proptest::prop_assert_eq!(back, Some((flow, Bytes::from(payload.clone()))));
            }
            let mut stream = BytesMut::from(&encode_on_stream(&payload).unwrap()[..]);
            stream.extend_from_slice(&noise);
            proptest::prop_assert_eq!(decode_on_stream(&mut stream), Some(Bytes::from(payload)));
            proptest::prop_assert_eq!(&stream[..], &noise[..]);
            let _ = (decode(Bytes::from(noise)), decode_on_stream(&mut stream));
        }
    }
}
