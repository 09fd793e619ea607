//! Any bytes as a chain of two certificates that a peer shows: an error, never a panic, and nobody that we trust.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use rustls_pki_types::CertificateDer;
use tombolo_identity::verify::{Usage, authenticate, peer_identity_from_certs, signed_by_leaf, unix_time};
use tombolo_identity::{BundleSet, TrustBundle};

fuzz_target!(|input: (&[u8], &[u8])| {
    let chain: Vec<CertificateDer<'_>> = vec![input.0.into(), input.1.into()];
    let trust_domain = "acme.example".parse().expect("a trust domain");
    // What the peer shows as its issuer stands as a root too: its parser is reached by every input.
    let bundle = TrustBundle { trust_domain, sequence: 1, roots: vec![input.1.to_vec().into()] };
    let now = unix_time(Duration::from_secs(1_795_000_000));
    let _ = authenticate(&chain, &BundleSet::of(bundle), Usage::Client, now);
    let _ = peer_identity_from_certs(&chain);
    assert!(!signed_by_leaf(&input.0.into(), b"message", input.1) || input.0.len() > 60);
});
