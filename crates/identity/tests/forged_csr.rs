//! A CSR gives its key and nothing else: whatever it asks for besides is refused or left out.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic is a test's failure

mod minting;

use minting::{ID, NOW, uri, world};
use rcgen::{
    CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType,
};
use tombolo_identity::issuer::{IssueError, LEAF_LIFE, LeafIssuer};
use tombolo_identity::verify::{Usage, authenticate, unix_time};
use x509_parser::prelude::*;

type Forge = fn(&mut CertificateParams);

const FORGERIES: [(&str, Forge); 7] = [
    ("the CA bit", |csr| {
        // BasicConstraints (RFC 5280 section 4.2.1.9): SEQUENCE { BOOLEAN TRUE }.
        let ca = CustomExtension::from_oid_content(&[2, 5, 29, 19], vec![0x30, 3, 1, 1, 0xff]);
        csr.custom_extensions = vec![ca];
    }),
    ("another's SPIFFE ID", |csr| {
        csr.subject_alt_names = vec![uri("spiffe://acme.example/cluster/east/federator")];
    }),
    ("another's beside none", |csr| {
        csr.subject_alt_names =
            vec![uri("spiffe://b.example/x"), SanType::DnsName("api.acme.example".try_into().unwrap())];
    }),
    ("100 names", |csr| {
        let name = |n| uri(&format!("spiffe://acme.example/cluster/east/ns/shop/sa/s{n}"));
        csr.subject_alt_names = (0..100).map(name).collect();
    }),
    ("a signer's key usage", |csr| {
        csr.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    }),
    ("other purposes", |csr| csr.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]),
    ("a subject", |csr| {
        csr.distinguished_name = DistinguishedName::new();
        csr.distinguished_name.push(DnType::CommonName, "cluster east");
    }),
];

#[test]
fn what_a_csr_asks_for_besides_its_key_is_refused_or_left_out() {
    let world = world();
    let bundles = world.bundles();
    let issuer = LeafIssuer::new(world.east).unwrap();
    let mut left_out = 0;
    for (what, forge) in FORGERIES {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        forge(&mut params);
        let csr = params.serialize_request(&key).unwrap();
        let leaf = match issuer.issue(csr.der(), &ID.parse().unwrap(), LEAF_LIFE, NOW) {
            Ok(leaf) => leaf,
            Err(IssueError::Csr(reason)) => {
                println!("{what}: refused, {reason}");
                continue;
            }
            Err(error) => panic!("{what}: {error}"),
        };
        left_out += 1;
        let peer = authenticate(&leaf.chain, &bundles, Usage::Client, unix_time(NOW)).expect(what);
        assert_eq!(peer.spiffe_id.as_str(), ID, "{what}");
        let (_, certificate) = X509Certificate::from_der(&leaf.chain[0]).unwrap();
        let names = certificate.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names, [GeneralName::URI(ID)], "{what}");
        assert!(!certificate.is_ca() && certificate.subject().iter().next().is_none(), "{what}");
        let purposes = certificate.extended_key_usage().unwrap().unwrap().value;
        assert!(purposes.client_auth && purposes.server_auth && !purposes.code_signing, "{what}");
        let spki = &certificate.public_key().subject_public_key.data;
        assert_eq!(spki.as_ref(), key.der_bytes(), "{what}: its key");
    }
    assert!(left_out >= 5, "{left_out}");
}

#[test]
fn a_csr_whose_signature_does_not_hold_or_that_is_none_is_refused() {
    let issuer = LeafIssuer::new(world().east).unwrap();
    let csr = CertificateParams::default().serialize_request(&KeyPair::generate().unwrap()).unwrap();
    let mut forged = csr.der().to_vec();
    *forged.last_mut().unwrap() ^= 1;
    let id = ID.parse().unwrap();
    for bytes in [forged, Vec::new(), vec![0x30; 300]] {
        assert!(matches!(issuer.issue(&bytes, &id, LEAF_LIFE, NOW), Err(IssueError::Csr(_))));
    }
    assert!(matches!(issuer.issue(&vec![0; 20_000], &id, LEAF_LIFE, NOW), Err(IssueError::TooLarge(20_000))));
    // Of another cluster: whoever asks, this issuer can't.
    let foreign = "spiffe://acme.example/cluster/west/vm/db-1".parse().unwrap();
    let outside = issuer.issue(csr.der(), &foreign, LEAF_LIFE, NOW);
    assert!(matches!(outside, Err(IssueError::OutsideCluster { .. })));
}
