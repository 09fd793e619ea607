use bytes::BytesMut;
use proptest::prelude::*;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519};
use tombolo_identity::authority::{Existing, RootAuthority};
use tombolo_identity::issuer::{LEAF_LIFE, LeafIssuer};
use tombolo_identity::peer_identity_from_certs;
use tombolo_proto::stream_header::{self, MAX_CONTROL_BYTES};
use tombolo_proto::v1::{ControlMessage, control_message};

use super::*;

const UNIX: u64 = 1_800_000_000;
const EXPORTER: [u8; EXPORTER_BYTES] = [7; EXPORTER_BYTES];

struct Cluster {
    issuer: LeafIssuer,
    bundles: BundleSet,
}

impl Cluster {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let now = Duration::from_secs(UNIX);
        let mut root = RootAuthority::init(dir.path(), "acme.example".parse().unwrap(), now).unwrap();
        let material = root.sign_cluster(&"east".parse().unwrap(), Existing::Refuse, now).unwrap();
        let bundles = BundleSet::of(material.bundle.clone());
        Self { issuer: LeafIssuer::new(material).unwrap(), bundles }
    }

    fn svid(&self, path: &str, algorithm: &'static rcgen::SignatureAlgorithm) -> Svid {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
        let id: SpiffeId = format!("spiffe://acme.example/cluster/east/{path}").parse().unwrap();
        let leaf = self.issuer.issue(csr.der(), &id, LEAF_LIFE, Duration::from_secs(UNIX)).unwrap();
        Svid::new(&key.serialize_der(), leaf.chain, self.bundles.clone()).unwrap()
    }

    fn pinned(&self, svid: &Svid) -> PeerIdentity {
        peer_identity_from_certs(svid.chain()).unwrap()
    }
}

fn start() -> Moment {
    Moment { unix: Duration::from_secs(UNIX), at: Instant::now() }
}

fn after(start: Moment, seconds: u64) -> Moment {
    let passed = Duration::from_secs(seconds);
    Moment { unix: start.unix + passed, at: start.at + passed }
}

#[test]
fn the_signed_bytes_are_fixed() {
    let bytes = signed_bytes(Usage::Server, 0x0102, &[0xaa; 32], &[0xbb; 32]);
    let mut expected = vec![0x20; 64];
    expected.extend_from_slice(b"tombolo re-attestation v1\0\x02\0\0\0\0\0\0\x01\x02");
    expected.extend_from_slice(&[0xaa; 32]);
    expected.extend_from_slice(&[0xbb; 32]);
    assert_eq!(bytes, expected);
    assert_eq!(bytes.len(), 163);
}

#[test]
fn every_kind_of_leaf_key_attests_and_no_other_key_does() {
    let cluster = Cluster::new();
    let pinned = cluster.pinned(&cluster.svid("ns/shop/sa/web", &PKCS_ECDSA_P256_SHA256));
    let now = start();
    let algorithms = [&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384, &PKCS_ED25519];
    for algorithm in algorithms {
        let renewed = cluster.svid("ns/shop/sa/web", algorithm);
        let good = message(&renewed, Usage::Client, 1, &EXPORTER).unwrap();
        let mut receiver = Receiver::new(Usage::Client, now.at);
        let identity = receiver.accept(good.clone(), &pinned, &EXPORTER, &cluster.bundles, now).unwrap();
        assert_eq!(identity, cluster.pinned(&renewed));
        assert_ne!(identity.serial, pinned.serial);
        for other in algorithms {
            let stranger = cluster.svid("ns/shop/sa/web", other);
            let forged = message(&stranger, Usage::Client, 2, &EXPORTER).unwrap();
            let forged = Reattest { chain_der: good.chain_der.clone(), ..forged };
            let mut receiver = Receiver::new(Usage::Client, now.at);
            let refused = receiver.accept(forged, &pinned, &EXPORTER, &cluster.bundles, now);
            assert_eq!(refused, Err(Refusal::Signature));
        }
    }
}

/// A message as its receiver takes it: the peer's side of TLS, the connection, the time, and what is refused.
struct Case {
    what: &'static str,
    refusal: &'static str,
    role: Usage,
    sequence: u64,
    exporter: [u8; 32],
    late_by: u64,
    change: fn(&mut Reattest),
}

#[test]
fn a_message_counts_once_on_its_own_connection_from_its_own_side_and_in_time() {
    let cluster = Cluster::new();
    let svid = cluster.svid("ns/shop/sa/web", &PKCS_ECDSA_P256_SHA256);
    let pinned = cluster.pinned(&svid);
    let now = start();
    let good = Case {
        what: "as it should be",
        refusal: "",
        role: Usage::Client,
        sequence: 6,
        exporter: EXPORTER,
        late_by: 0,
        change: |_| {},
    };
    let cases = [
        Case { what: "replayed", refusal: "sequence", sequence: 5, ..good },
        Case { what: "going back", refusal: "sequence", sequence: 0, ..good },
        Case { what: "reflected", refusal: "signature", role: Usage::Server, ..good },
        Case { what: "of another connection", refusal: "signature", exporter: [8; 32], ..good },
        Case { what: "after the old leaf's end", refusal: "late", late_by: 24 * 3600 + 1, ..good },
        Case {
            what: "another sequence than signed",
            refusal: "signature",
            change: |m| m.sequence += 1,
            ..good
        },
        Case { what: "no signature", refusal: "signature", change: |m| m.signature.clear(), ..good },
        Case { what: "no chain", refusal: "malformed", change: |m| m.chain_der.clear(), ..good },
        Case { what: "no intermediate", refusal: "chain", change: |m| m.chain_der.truncate(1), ..good },
        Case {
            what: "a chain of five",
            refusal: "malformed",
            change: |m| m.chain_der.extend(vec![vec![0x30]; 3]),
            ..good
        },
        Case { what: "garbage", refusal: "chain", change: |m| m.chain_der = vec![vec![0x30; 99]; 2], ..good },
        good,
    ];
    for case in cases {
        let Case { what, refusal, role, sequence, exporter, late_by, change } = case;
        let mut receiver = Receiver::new(Usage::Client, now.at);
        let first = message(&svid, Usage::Client, 5, &EXPORTER).unwrap();
        receiver.accept(first, &pinned, &EXPORTER, &cluster.bundles, now).unwrap();
        let mut tried = message(&svid, role, sequence, &exporter).unwrap();
        change(&mut tried);
        let found = receiver.accept(tried, &pinned, &EXPORTER, &cluster.bundles, after(now, late_by));
        assert_eq!(found.err().map_or("", |refusal| refusal.kind()), refusal, "{what}");
        if refusal != "late" {
            let next = message(&svid, Usage::Client, 7, &EXPORTER).unwrap();
            let accepted = receiver.accept(next, &pinned, &EXPORTER, &cluster.bundles, now);
            assert!(accepted.is_ok(), "{what} spoils nothing");
        }
    }
}

#[test]
fn a_flood_is_refused_before_it_costs_anything_and_an_honest_peer_is_not() {
    let cluster = Cluster::new();
    let svid = cluster.svid("ns/shop/sa/web", &PKCS_ECDSA_P256_SHA256);
    let pinned = cluster.pinned(&svid);
    let now = start();
    let mut receiver = Receiver::new(Usage::Client, now.at);
    let mut show = |sequence, now| {
        let message = message(&svid, Usage::Client, sequence, &EXPORTER).unwrap();
        receiver.accept(message, &pinned, &EXPORTER, &cluster.bundles, now).map(drop)
    };
    for sequence in 1..=8 {
        assert_eq!(show(sequence, now), Ok(()));
    }
    assert_eq!(show(9, now), Err(Refusal::TooOften));
    assert_eq!(show(9, after(now, 9)), Err(Refusal::TooOften));
    assert_eq!(show(9, after(now, 10)), Ok(()));
    assert_eq!(show(10, after(now, 10)), Err(Refusal::TooOften));
    for sequence in 10..18 {
        assert_eq!(show(sequence, after(now, 3600)), Ok(()), "an hour restores no more than the burst");
    }
    assert_eq!(show(18, after(now, 3600)), Err(Refusal::TooOften));
}

#[test]
fn a_swapped_chain_is_shown_at_once_and_again_until_the_old_leaf_has_ended() {
    let cluster = Cluster::new();
    let (old, new) = (
        cluster.svid("ns/shop/sa/web", &PKCS_ECDSA_P256_SHA256),
        cluster.svid("ns/shop/sa/web", &PKCS_ECDSA_P256_SHA256),
    );
    let start = start();
    let mut sender = Sender::new(&old);
    assert!(!sender.is_due(&old, after(start, 12 * 3600)), "what the handshake showed is not shown again");
    let swapped = after(start, 12 * 3600);
    let mut shown = Vec::new();
    for minute in 0..24 * 60 {
        let now = after(swapped, minute * 60);
        if sender.is_due(&new, now) {
            assert_eq!(sender.shown(&new, now), shown.len() as u64 + 1);
            shown.push(minute);
        }
    }
    assert_eq!(shown, [0, 1, 5, 21, 85, 341], "the old leaf ends after 720 minutes");
    let newest = cluster.svid("ns/shop/sa/web", &PKCS_ECDSA_P256_SHA256);
    let next = after(swapped, 11 * 3600);
    assert!(sender.is_due(&newest, next));
    assert_eq!(sender.shown(&newest, next), 7);
    assert!(!sender.is_due(&newest, next));
    assert!(sender.is_due(&newest, after(next, 60)));
}

#[test]
fn a_peer_is_drained_in_the_second_after_its_end_and_closed_within_the_patience() {
    let patience = Duration::from_secs(300);
    let start = start();
    let end = UNIX as i64 + 100;
    let mut closes = Vec::new();
    for random in [0.0, 0.3, 1.0, 7.0] {
        let mut expiry = Expiry::new(patience, random);
        assert_eq!(expiry.step(end, after(start, 100)), Verdict::Live);
        assert_eq!(expiry.step(end, after(start, 101)), Verdict::Drain);
        let close = (101..).find(|s| expiry.step(end, after(start, *s)) == Verdict::Close).unwrap();
        closes.push(close - 100);
        assert_eq!(expiry.step(end + 9999, after(start, close)), Verdict::Close, "it is final");
    }
    assert_eq!(closes, [151, 187, 271, 271]);
    // A laptop that slept for a day: drained first, even then.
    let mut expiry = Expiry::new(patience, 0.0);
    assert_eq!(expiry.step(end, after(start, 86_400)), Verdict::Drain);
    // A clock set back does not undo it.
    assert_eq!(expiry.step(end, Moment { unix: start.unix, at: start.at }), Verdict::Drain);
}

#[test]
fn the_largest_chain_fits_a_control_frame() {
    let cluster = Cluster::new();
    // 2048 bytes is the longest SPIFFE ID.
    let prefix = "spiffe://acme.example/cluster/east/ns/shop/sa/".len();
    let svid = cluster.svid(&format!("ns/shop/sa/{}", "a".repeat(2048 - prefix)), &PKCS_ECDSA_P384_SHA384);
    let mut largest = message(&svid, Usage::Client, u64::MAX, &EXPORTER).unwrap();
    // RSA 4096 under a foreign authority: 2 KB each.
    largest.chain_der.resize(MAX_CHAIN, vec![0xff; 4096]);
    let frame = stream_header::encode(&wire(largest));
    assert!(frame.len() < MAX_CONTROL_BYTES / 2, "{}", frame.len());
}

fn wire(reattest: Reattest) -> ControlMessage {
    ControlMessage { message: Some(control_message::Message::Reattest(reattest)) }
}

#[test]
fn a_message_of_a_newer_version_decodes_as_nothing() {
    // Field 15, length-delimited, as an older build sees one that it does not know; then a known one.
    let mut buffer = BytesMut::from(&[0, 4, 0x7a, 2, 1, 2][..]);
    buffer.extend_from_slice(&stream_header::encode(&wire(Reattest { sequence: 3, ..Default::default() })));
    let mut next = || stream_header::decode::<ControlMessage>(&mut buffer, MAX_CONTROL_BYTES).unwrap();
    assert_eq!(next(), Some(ControlMessage { message: None }));
    assert_eq!(next(), Some(wire(Reattest { sequence: 3, ..Default::default() })));
}

proptest! {
    #[test]
    fn what_is_sent_is_what_arrives(
        sequence: u64,
        chain in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 0..5),
        signature in prop::collection::vec(any::<u8>(), 0..200),
        cut in 0usize..4000,
    ) {
        let sent = wire(Reattest { sequence, chain_der: chain, signature });
        let frame = stream_header::encode(&sent);
        let mut buffer = BytesMut::from(&frame[..cut.min(frame.len() - 1)]);
        prop_assert_eq!(stream_header::decode::<ControlMessage>(&mut buffer, MAX_CONTROL_BYTES).unwrap(), None);
        buffer.extend_from_slice(&frame[buffer.len()..]);
        let got = stream_header::decode::<ControlMessage>(&mut buffer, MAX_CONTROL_BYTES).unwrap();
        prop_assert_eq!(got, Some(sent));
        prop_assert!(buffer.is_empty());
    }

    #[test]
    fn arbitrary_bytes_are_refused_and_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        sequence: u64,
        flips in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..4),
    ) {
        thread_local!(static CLUSTER: (Cluster, Svid) = {
            let cluster = Cluster::new();
            let svid = cluster.svid("ns/shop/sa/web", &PKCS_ECDSA_P256_SHA256);
            (cluster, svid)
        });
        CLUSTER.with(|(cluster, svid)| {
            let pinned = cluster.pinned(svid);
            let now = start();
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = stream_header::decode::<ControlMessage>(&mut buffer, MAX_CONTROL_BYTES) {}
            let accept = |message| {
                let mut receiver = Receiver::new(Usage::Client, now.at);
                receiver.accept(message, &pinned, &EXPORTER, &cluster.bundles, now).is_ok()
            };
            let arbitrary = Reattest { sequence, chain_der: vec![bytes.clone(); 2], signature: bytes.clone() };
            prop_assert!(!accept(arbitrary));
            // Whatever is changed in a good one, it is not good any more; equal bytes aside.
            let good = message(svid, Usage::Client, sequence.max(1), &EXPORTER).unwrap();
            let mut bent = good.clone();
            for (index, by) in flips {
                let mut all: Vec<&mut u8> =
                    bent.chain_der.iter_mut().flatten().chain(bent.signature.iter_mut()).collect();
                let at = index.index(all.len());
                *all[at] ^= by;
            }
            prop_assert_eq!(accept(bent.clone()), bent == good);
            Ok(())
        })?;
    }
}
