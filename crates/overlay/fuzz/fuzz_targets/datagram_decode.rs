//! Any datagram decodes without a panic; what verifies encodes to the same bytes; answers are never larger.
//!
//! The MAC is made right here, so that the fuzzer gets past it into the bodies.
#![no_main]

use std::hash::Hasher;

use libfuzzer_sys::fuzz_target;
use tombolo_overlay::datagram::{self, Body, Datagram, ProbeAck, StartNumber};
use tombolo_overlay::keys::{CidKey, Hour};

fuzz_target!(|packet: &[u8]| {
    let key = CidKey::from_bytes([7; 16]);
    if let Ok(unverified) = datagram::decode(packet) {
        let _ = unverified.verify(&key);
    }
    // Sealed: the last 8 bytes become the MAC of the rest.
    let Some((signed, _)) = packet.split_last_chunk::<8>() else { return };
    let mut hasher = siphasher::sip::SipHasher24::new_with_key(key.as_bytes());
    hasher.write(signed);
    let sealed = [signed, &hasher.finish().to_be_bytes()].concat();
    let Ok(unverified) = datagram::decode(&sealed) else { return };
    let Ok(read) = unverified.verify(&key) else { return };
    assert_eq!(read.encode(Hour(u64::from(unverified.phase.value())), &key), sealed, "one encoding only");
    if let Body::Probe(probe) = read.body {
        let observed = std::net::SocketAddr::from(([0; 16], 1));
        let ack = ProbeAck::answering(&probe, probe.bytes, StartNumber(1), observed, &[read.selector.tag(); 300]);
        let answer = Datagram { body: Body::ProbeAck(ack), ..read };
        assert!(answer.encode(Hour(0), &key).len() <= sealed.len());
    }
});
