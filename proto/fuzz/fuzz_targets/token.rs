//! Any text as a token, and any bytes behind a right checksum: never a panic, and an accepted one comes back as it was.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tombolo_proto::token::{decode, encode, parse};
use tombolo_proto::v1::{Token, TokenKind};

fuzz_target!(|input: (&str, Vec<u8>, String, u32)| {
    let (text, secret, cluster, tag) = input;
    for text in [text.to_owned(), encode(&Token { secret, cluster, tag, ..Token::default() })] {
        if let Ok(token) = decode(&text) {
            assert_eq!(decode(&encode(&token)), Ok(token));
        }
        let _ = parse(&text, TokenKind::Link, Duration::from_secs(1_800_000_000));
    }
});
