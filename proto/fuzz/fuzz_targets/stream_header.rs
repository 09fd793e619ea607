//! Any bytes at the start of a stream: never a panic, nothing taken beyond the frame, and what is read comes back as it was.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use tombolo_proto::stream_header::{MAX_HEADER_BYTES, decode, encode};
use tombolo_proto::v1::StreamHeader;

fuzz_target!(|bytes: &[u8]| {
    let mut buffer = BytesMut::from(bytes);
    if let Ok(Some(header)) = decode::<StreamHeader>(&mut buffer, MAX_HEADER_BYTES) {
        assert!(bytes.ends_with(&buffer), "what follows the header is untouched");
        assert!(bytes.len() - buffer.len() <= 2 + MAX_HEADER_BYTES);
        let again = decode::<StreamHeader>(&mut BytesMut::from(&encode(&header)[..]), usize::MAX);
        assert_eq!(again, Ok(Some(header)));
    }
});
