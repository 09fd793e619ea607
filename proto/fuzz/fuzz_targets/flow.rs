//! Any bytes as a datagram of a flow, and on a flow's stream: never a panic, and what is read comes back as it was.
#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use tombolo_proto::flow::{MAX_FLOW, decode, decode_on_stream, encode};

fuzz_target!(|bytes: &[u8]| {
    if let Some((flow, payload)) = decode(Bytes::copy_from_slice(bytes)) {
        assert!((1..=MAX_FLOW).contains(&flow) && bytes.ends_with(&payload));
        assert_eq!(decode(encode(flow, &payload)), Some((flow, payload)));
    }
    let mut stream = BytesMut::from(bytes);
    let mut taken = 0;
    while let Some(payload) = decode_on_stream(&mut stream) {
        taken += 2 + payload.len();
    }
    assert_eq!(taken + stream.len(), bytes.len(), "nothing is lost on the way");
});
