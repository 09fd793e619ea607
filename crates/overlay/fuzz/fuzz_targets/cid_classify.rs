//! Any packet is classified without a panic, and what routing reads is consistent with what it rewrites.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tombolo_overlay::cid::{self, CID_LEN, Packet};

fuzz_target!(|packet: &[u8]| {
    let classified = cid::classify(packet);
    let dcid = match classified {
        Some(Packet::Long { dcid, scid, .. }) => {
            assert!(scid.len() <= 255);
            dcid
        }
        Some(Packet::Short { dcid }) => dcid,
        Some(Packet::Datagram) | None => return,
    };
    let at = cid::dcid_offset(packet).expect("a QUIC packet of ours has an ID");
    assert_eq!(&packet[at..at + CID_LEN], dcid.as_bytes());
    let mut marked = packet.to_vec();
    cid::set_handed_over(&mut marked, true);
    let again = match cid::classify(&marked) {
        Some(Packet::Long { dcid, .. } | Packet::Short { dcid }) => dcid,
        other => panic!("marking changed the packet into {other:?}"),
    };
    assert!(again.handed_over() && again.without_hand_over() == dcid.without_hand_over());
});
