//! The table of docs/verification.md: every reason for which a chain is refused, each reached by a case, and what no
//! change of a byte may do.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic is a test's failure

mod minting;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use minting::{Chain, ID, NOW, World, at, sign, sign_key, uri, world};
use proptest::prelude::*;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyUsagePurpose, PublicKeyData, SignatureAlgorithm};
use tombolo_identity::revocation::{Revocations, Target};
use tombolo_identity::verify::{PeerIdentity, Usage, authenticate, unix_time};
use tombolo_identity::{BundleSet, IdentityError, TrustBundle};

/// As the documentation lists them, between backquotes in the last column.
const DOCUMENT: &str = include_str!("../../../docs/verification.md");

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

/// A chain for each reason, by [`IdentityError::kind`].
fn refused(world: &mut World) -> Vec<(&'static str, Result<PeerIdentity, IdentityError>)> {
    let west = world.west();
    let world = &*world;
    let good = || world.leaf(|_| ());
    let with = |edit: fn(&mut CertificateParams)| world.check(&world.leaf(edit));
    let under = |bundles: &BundleSet| authenticate(&good(), bundles, Usage::Client, unix_time(NOW));
    let mut long = good();
    long.extend(std::iter::repeat_n(world.east.certificate.clone(), 4));
    let target = Target::SpiffeId(ID.parse().unwrap());
    let revoked = world.bundles().revoking(Revocations::new([(target, Arc::from("east/stolen"))]));
    let mut trailing = good();
    trailing[0] = [trailing[0].as_ref(), &[0]].concat().into();
    vec![
        ("no_certificate", world.check(&[])),
        ("chain_too_long", world.check(&long)),
        ("malformed", world.check(&trailing)),
        ("uri_sans", with(|p| p.subject_alt_names.push(uri("spiffe://acme.example/cluster/east/vm/x")))),
        ("spiffe_id", with(|p| p.subject_alt_names = vec![uri("spiffe://Acme.example/cluster/east/vm/x")])),
        ("no_path", with(|p| p.subject_alt_names = vec![uri("spiffe://acme.example")])),
        ("leaf_is_ca", with(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained))),
        ("key_usage", with(|p| p.key_usages.push(KeyUsagePurpose::CrlSign))),
        ("weak_key", world.check(&sign_key(&world.east, ID, &WeakKey::new(), |_| ()))),
        (
            "unknown_trust_domain",
            with(|p| p.subject_alt_names = vec![uri("spiffe://b.example/cluster/east/vm/x")]),
        ),
        ("empty_bundle", under(&BundleSet::of(TrustBundle { roots: Vec::new(), ..world.root.bundle() }))),
        ("path", under(&BundleSet::of(minting::world().root.bundle()))),
        ("expired", with(|p| p.not_after = at(NOW - Duration::from_secs(1)))),
        ("not_yet_valid", with(|p| p.not_before = at(NOW + Duration::from_secs(1)))),
        (
            "signer_path",
            world.check(&under_odd_intermediate(world, |p| {
                p.subject_alt_names = vec![uri("spiffe://acme.example/cluster/east")];
            })),
        ),
        ("unbound", world.check(&under_odd_intermediate(world, |p| p.custom_extensions.clear()))),
        ("wrong_cluster", world.check(&sign(&west, ID, |_| ()))),
        ("revoked", under(&revoked)),
    ]
}

/// A leaf of an intermediate that the root really signed, but wrongly.
fn under_odd_intermediate(world: &World, edit: impl FnOnce(&mut CertificateParams)) -> Chain {
    sign(&world.odd_intermediate(edit), ID, |_| ())
}

#[test]
fn every_reason_is_reached_and_documented() {
    let mut world = world();
    assert!(world.check(&world.leaf(|_| ())).is_ok());
    assert!(world.check(&under_odd_intermediate(&world, |_| ())).is_ok());
    let mut reached = BTreeSet::new();
    for (kind, result) in refused(&mut world) {
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
