//! The table of docs/verification.md: every reason for which a chain is refused, each reached by a case, and what no
//! change of a byte may do.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic is a test's failure

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SignatureAlgorithm,
};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use tombolo_identity::authority::{ClusterMaterial, Existing, RootAuthority};
use tombolo_identity::cluster_binding::{ClusterBinding, OID};
use tombolo_identity::revocation::{Revocations, Target};
use tombolo_identity::verify::{PeerIdentity, Usage, authenticate, unix_time};
use tombolo_identity::{BundleSet, IdentityError, TrustBundle};

const NOW: Duration = Duration::from_secs(1_795_000_000);
const HOUR: Duration = Duration::from_secs(3600);
const ID: &str = "spiffe://acme.example/cluster/east/ns/shop/sa/cart";
/// As the documentation lists them, between backquotes in the last column.
const DOCUMENT: &str = include_str!("../../../docs/verification.md");

type Chain = Vec<CertificateDer<'static>>;

struct World {
    dir: tempfile::TempDir,
    root: RootAuthority,
    east: ClusterMaterial,
    west: ClusterMaterial,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let mut root =
        RootAuthority::init(&dir.path().join("trust"), "acme.example".parse().unwrap(), NOW).unwrap();
    let east = root.sign_cluster(&"east".parse().unwrap(), Existing::Refuse, NOW).unwrap();
    let west = root.sign_cluster(&"west".parse().unwrap(), Existing::Refuse, NOW).unwrap();
    World { dir, root, east, west }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}
fn at(time: Duration) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(time.as_secs() as i64).unwrap()
}

/// A leaf of `ID` as whoever holds the CA key could make it.
fn leaf(ca: &ClusterMaterial, key: &impl PublicKeyData, edit: impl FnOnce(&mut CertificateParams)) -> Chain {
    let ca_key = KeyPair::from_pem(&ca.key_pem).unwrap();
    let issuer = Issuer::from_ca_cert_der(&ca.certificate, &ca_key).unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![uri(ID)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = at(NOW - HOUR);
    params.not_after = at(NOW + HOUR);
    edit(&mut params);
    vec![params.signed_by(key, &issuer).unwrap().der().clone(), ca.certificate.clone()]
}

/// RSA with a modulus of 1024 bits, which no library of ours makes any more.
struct WeakKey(Vec<u8>);

impl WeakKey {
    fn new() -> Self {
        let modulus = [&[0x02, 0x81, 129, 0][..], &[0xc5; 128]].concat();
        let numbers = [&modulus[..], &[0x02, 3, 1, 0, 1]].concat();
        Self([&[0x30, 0x81, u8::try_from(numbers.len()).unwrap()], &numbers[..]].concat())
    }
}

impl PublicKeyData for WeakKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }
    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_RSA_SHA256
    }
}

impl World {
    fn bundles(&self) -> BundleSet {
        BundleSet::of(self.root.bundle())
    }

    fn leaf(&self, edit: impl FnOnce(&mut CertificateParams)) -> Chain {
        leaf(&self.east, &KeyPair::generate().unwrap(), edit)
    }

    fn check(&self, chain: &[CertificateDer<'_>]) -> Result<PeerIdentity, IdentityError> {
        authenticate(chain, &self.bundles(), Usage::Client, unix_time(NOW))
    }

    /// A leaf of an intermediate that the root really signed, but wrongly.
    fn under_odd_intermediate(&self, edit: impl FnOnce(&mut CertificateParams)) -> Chain {
        let key = std::fs::read_to_string(self.dir.path().join("trust/root.key")).unwrap();
        let root_key = KeyPair::from_pem(&key).unwrap();
        let root = self.root.bundle().roots.remove(0);
        let issuer = Issuer::from_ca_cert_der(&root, &root_key).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.not_before = at(NOW - HOUR);
        params.not_after = at(NOW + HOUR);
        let binding = ClusterBinding { cluster: "east".parse().unwrap(), tag: self.east.tag };
        params.custom_extensions = vec![CustomExtension::from_oid_content(OID, binding.to_der())];
        edit(&mut params);
        let odd = ClusterMaterial {
            cluster: "east".parse().unwrap(),
            tag: self.east.tag,
            trust_domain: self.east.trust_domain.clone(),
            key_pem: zeroize::Zeroizing::new(key.serialize_pem()),
            certificate: params.signed_by(&key, &issuer).unwrap().der().clone(),
            bundle: self.root.bundle(),
        };
        leaf(&odd, &KeyPair::generate().unwrap(), |_| ())
    }

    /// A chain for each reason, by [`IdentityError::kind`].
    fn refused(&self) -> Vec<(&'static str, Result<PeerIdentity, IdentityError>)> {
        let good = || self.leaf(|_| ());
        let with = |edit: fn(&mut CertificateParams)| self.check(&self.leaf(edit));
        let under = |bundles: &BundleSet| authenticate(&good(), bundles, Usage::Client, unix_time(NOW));
        let mut long = good();
        long.extend(std::iter::repeat_n(self.east.certificate.clone(), 4));
        let target = Target::SpiffeId(ID.parse().unwrap());
        let revoked = self.bundles().revoking(Revocations::new([(target, Arc::from("east/stolen"))]));
        let mut trailing = good();
        trailing[0] = [trailing[0].as_ref(), &[0]].concat().into();
        vec![
            ("no_certificate", self.check(&[])),
            ("chain_too_long", self.check(&long)),
            ("malformed", self.check(&trailing)),
            ("uri_sans", with(|p| p.subject_alt_names.push(uri("spiffe://acme.example/cluster/east/vm/x")))),
            (
                "spiffe_id",
                with(|p| p.subject_alt_names = vec![uri("spiffe://Acme.example/cluster/east/vm/x")]),
            ),
            ("no_path", with(|p| p.subject_alt_names = vec![uri("spiffe://acme.example")])),
            ("leaf_is_ca", with(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained))),
            ("key_usage", with(|p| p.key_usages.push(KeyUsagePurpose::CrlSign))),
            ("weak_key", self.check(&leaf(&self.east, &WeakKey::new(), |_| ()))),
            (
                "unknown_trust_domain",
                with(|p| p.subject_alt_names = vec![uri("spiffe://b.example/cluster/east/vm/x")]),
            ),
            ("empty_bundle", under(&BundleSet::of(TrustBundle { roots: Vec::new(), ..self.root.bundle() }))),
            ("path", under(&BundleSet::of(world().root.bundle()))),
            ("expired", with(|p| p.not_after = at(NOW - Duration::from_secs(1)))),
            ("not_yet_valid", with(|p| p.not_before = at(NOW + Duration::from_secs(1)))),
            (
                "signer_path",
                self.check(&self.under_odd_intermediate(|p| {
                    p.subject_alt_names = vec![uri("spiffe://acme.example/cluster/east")];
                })),
            ),
            ("unbound", self.check(&self.under_odd_intermediate(|p| p.custom_extensions.clear()))),
            ("wrong_cluster", self.check(&leaf(&self.west, &KeyPair::generate().unwrap(), |_| ()))),
            ("revoked", under(&revoked)),
        ]
    }
}

#[test]
fn every_reason_is_reached_and_documented() {
    let world = world();
    assert!(world.check(&world.leaf(|_| ())).is_ok());
    assert!(world.check(&world.under_odd_intermediate(|_| ())).is_ok());
    let mut reached = BTreeSet::new();
    for (kind, result) in world.refused() {
        let error = result.expect_err(kind);
        assert_eq!(error.kind(), kind, "{error}");
        reached.insert(kind);
    }
    let rows = DOCUMENT.lines().filter(|line| line.starts_with('|'));
    let documented: BTreeMap<&str, &str> = rows
        .filter_map(|row| {
            let kind = row.trim_end_matches(['|', ' ']).rsplit('|').next()?.trim().strip_prefix('`')?;
            Some((kind.strip_suffix('`')?, row))
        })
        .collect();
    assert_eq!(documented.into_keys().collect::<BTreeSet<_>>(), reached);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn no_changed_byte_makes_another_chain_good(which in 0usize..2, place in any::<prop::sample::Index>(), flip in 1u8..) {
        thread_local! { static GOOD: (World, Chain) = { let world = world(); let chain = world.leaf(|_| ()); (world, chain) }; }
        GOOD.with(|(world, chain)| {
            let mut changed = chain.clone();
            let mut bytes = changed[which].to_vec();
            let at = place.index(bytes.len());
            bytes[at] ^= flip;
            changed[which] = bytes.into();
            prop_assert!(world.check(&changed).is_err(), "byte {at} of certificate {which} flipped by {flip:#04x}");
            Ok(())
        })?;
    }

    #[test]
    fn truncated_bundles_are_refused_whole(cut in any::<prop::sample::Index>()) {
        let world = world();
        let json = world.root.bundle().to_json();
        let at = cut.index(json.len());
        prop_assert!(TrustBundle::from_json("acme.example".parse().unwrap(), json.get(..at).unwrap_or_default()).is_err());
    }
}
