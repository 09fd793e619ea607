//! Framing of protobuf messages at the start of a QUIC stream, and on the control stream.
//!
//! ```text
//!  0               2
//!  +---------------+----------------------+---------------------
//!  | length (u16)  | protobuf message     | application data ...
//!  +---------------+----------------------+---------------------
//! ```
//! Length is big-endian and counts the message alone. A stream header is at most [`MAX_HEADER_BYTES`]; a control
//! message (a certificate chain) at most [`MAX_CONTROL_BYTES`].

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

/// A port and a trace context fit many times; more is hostile.
pub const MAX_HEADER_BYTES: usize = 1024;
/// A chain of four certificates, one with a 2048-byte SPIFFE ID and three of RSA 4096, is half of it (tested where it is made).
pub const MAX_CONTROL_BYTES: usize = 32 * 1024;

/// Why a frame was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("frame of {len} bytes is over the limit of {max}")]
    TooLong { len: usize, max: usize },
    #[error("frame does not decode: {reason}")]
    Malformed { reason: String },
}

/// Length-delimited bytes of `message`.
pub fn encode<M: Message>(message: &M) -> Bytes {
    let len = message.encoded_len();
    let mut out = BytesMut::with_capacity(2 + len);
    out.put_u16(u16::try_from(len).unwrap_or(u16::MAX));
    // Encoding into a growable buffer can't fail.
    let _ = message.encode(&mut out);
    out.freeze()
}

/// Takes one frame off the front of `buffer`; `Ok(None)` when more bytes are needed.
pub fn decode<M: Message + Default>(buffer: &mut BytesMut, max: usize) -> Result<Option<M>, FrameError> {
    let Some(prefix) = buffer.first_chunk::<2>() else { return Ok(None) };
    let len = usize::from(u16::from_be_bytes(*prefix));
    if len > max {
        return Err(FrameError::TooLong { len, max });
    }
    if buffer.len() < 2 + len {
        return Ok(None);
    }
    buffer.advance(2);
    let body = buffer.split_to(len);
    M::decode(body.freeze()).map(Some).map_err(|e| FrameError::Malformed { reason: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::StreamHeader;

    #[test]
    fn a_header_is_read_from_split_input_and_leaves_the_data_behind() {
        let header =
            StreamHeader { port: 8080, traceparent: "00-ab".into(), tracestate: String::new(), transport: 0 };
        let mut wire = BytesMut::from(&encode(&header)[..]);
        wire.extend_from_slice(b"GET /");
        for cut in 0..wire.len() - 5 {
            assert_eq!(decode::<StreamHeader>(&mut wire.clone().split_to(cut), MAX_HEADER_BYTES), Ok(None));
        }
        assert_eq!(decode::<StreamHeader>(&mut wire, MAX_HEADER_BYTES), Ok(Some(header)));
        assert_eq!(&wire[..], b"GET /");
    }

    #[test]
    fn the_bytes_of_a_header_are_fixed() {
        let header = StreamHeader { port: 80, ..Default::default() };
        assert_eq!(&encode(&header)[..], &[0, 2, 0x08, 80]);
        let flow = StreamHeader { port: 53, transport: 1, ..Default::default() };
        assert_eq!(&encode(&flow)[..], &[0, 4, 0x08, 53, 0x20, 1]);
    }

    #[test]
    fn an_oversized_or_malformed_header_is_an_error() {
        let mut long = BytesMut::from(&[0xff, 0xff, 1, 2][..]);
        assert!(matches!(
            decode::<StreamHeader>(&mut long, MAX_HEADER_BYTES),
            Err(FrameError::TooLong { .. })
        ));
        let mut bad = BytesMut::from(&[0, 2, 0xff, 0xff][..]);
        assert!(matches!(
            decode::<StreamHeader>(&mut bad, MAX_HEADER_BYTES),
            Err(FrameError::Malformed { .. })
        ));
    }

    proptest::proptest! {
        #[test]
        fn any_header_comes_back_as_it_was_and_any_bytes_are_read_or_refused(
            port in 0u32..=65_535, parent in "[ -~]{0,80}", state in "[ -~]{0,80}", transport in 0i32..2,
            noise: Vec<u8>,
        ) {
            let header = StreamHeader { port, traceparent: parent, tracestate: state, transport };
            let mut wire = BytesMut::from(&encode(&header)[..]);
            wire.extend_from_slice(&noise);
            proptest::prop_assert_eq!(decode::<StreamHeader>(&mut wire, MAX_HEADER_BYTES), Ok(Some(header)));
            proptest::prop_assert_eq!(&wire[..], &noise[..]);
            let _ = decode::<StreamHeader>(&mut wire, MAX_HEADER_BYTES);
        }
    }
}
