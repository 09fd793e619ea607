//! Who may renew an identity that has ended: whoever would have been believed at its end, for 30 days, under an issuer that
//! still holds.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic is a test's failure

mod minting;

use std::sync::Arc;
use std::time::Duration;

use minting::{Chain, HOUR, ID, NOW, World, at, sign, world};
use rcgen::{BasicConstraints, IsCa};
use tombolo_identity::authority::{Existing, RootAuthority};
use tombolo_identity::revocation::{Revocations, Target};
use tombolo_identity::verify::{
    PeerIdentity, RENEWABLE_FOR, Usage, authenticate, authenticate_lapsed, unix_time,
};
use tombolo_identity::{BundleSet, IdentityError};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// A leaf that ended so long ago.
fn ended(world: &World, ago: Duration) -> Chain {
    world.leaf(|leaf| {
        leaf.not_before = at(NOW - ago - DAY);
        leaf.not_after = at(NOW - ago);
    })
}

fn check(chain: &Chain, bundles: &BundleSet, now: Duration) -> Result<PeerIdentity, IdentityError> {
    authenticate_lapsed(chain, bundles, Usage::Client, unix_time(now))
}

/// A root and a cluster that were made long before.
fn old_world() -> World {
    let mut world = world();
    let signed = NOW - 60 * DAY;
    let dir = world.dir.path().join("old");
    world.root = RootAuthority::init(&dir, "acme.example".parse().unwrap(), signed).unwrap();
    world.east = world.root.sign_cluster(&"east".parse().unwrap(), Existing::Refuse, signed).unwrap();
    world
}

#[test]
fn for_30_days_after_its_end_and_not_a_second_longer() {
    let world = old_world();
    let bundles = world.bundles();
    let second = Duration::from_secs(1);
    for ago in [second, DAY, RENEWABLE_FOR - second, RENEWABLE_FOR] {
        let chain = ended(&world, ago);
        assert_eq!(check(&chain, &bundles, NOW).unwrap().spiffe_id.as_str(), ID, "{ago:?}");
        let elsewhere = authenticate(&chain, &bundles, Usage::Client, unix_time(NOW)).unwrap_err();
        assert_eq!(elsewhere.kind(), "expired", "for everything else it is over");
    }
    let late = check(&ended(&world, RENEWABLE_FOR + second), &bundles, NOW).unwrap_err();
    assert_eq!(late.kind(), "expired");
    // One that lives is as good, and one of tomorrow is not.
    assert!(check(&world.leaf(|_| ()), &bundles, NOW).is_ok());
    let early = world.leaf(|leaf| leaf.not_before = at(NOW + second));
    assert_eq!(check(&early, &bundles, NOW).unwrap_err().kind(), "not_yet_valid");
}

#[test]
fn every_other_rule_holds_as_ever() {
    let mut world = old_world();
    let bundles = world.bundles();
    let signed = NOW - 60 * DAY;
    let west = world.root.sign_cluster(&"west".parse().unwrap(), Existing::Refuse, signed).unwrap();
    let over = |leaf: &mut rcgen::CertificateParams| {
        leaf.not_before = at(NOW - 3 * DAY);
        leaf.not_after = at(NOW - 2 * DAY);
    };
    let foreign = old_world();
    let forged = {
        let mut chain = ended(&world, DAY);
        let mut leaf = chain[0].to_vec();
        let last = leaf.len() - 1;
        leaf[last] ^= 1;
        chain[0] = leaf.into();
        chain
    };
    let cases: [(&str, Chain); 5] = [
        ("wrong_cluster", sign(&west, ID, over)),
        (
            "leaf_is_ca",
            world.leaf(|leaf| {
                over(leaf);
                leaf.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            }),
        ),
        ("path", sign(&foreign.east, ID, over)),
        ("path", forged),
        ("no_certificate", Chain::new()),
    ];
    for (kind, chain) in cases {
        assert_eq!(check(&chain, &bundles, NOW).expect_err(kind).kind(), kind);
    }
}

#[test]
fn an_issuer_that_has_ended_renews_nobody_even_beside_a_forged_certificate_of_its_key() {
    let world = world();
    // The root really signed it, for an hour around NOW.
    let odd = world.odd_intermediate(|_| ());
    let chain = sign(&odd, ID, |leaf| leaf.not_after = at(NOW + HOUR / 2));
    let bundles = world.bundles();
    assert!(check(&chain, &bundles, NOW + HOUR).is_ok(), "its issuer holds");
    let late = NOW + 2 * HOUR;
    assert_eq!(check(&chain, &bundles, late).unwrap_err().kind(), "path");
    // Whoever holds only the leaf can make a certificate with the issuer's public key, but nobody has signed it.
    let key = rcgen::KeyPair::from_pem(&odd.key_pem).unwrap();
    let other = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.not_after = at(NOW + 365 * DAY);
    let issuer = rcgen::Issuer::from_params(&params, &other);
    let forged = params.signed_by(&key, &issuer).unwrap().der().clone();
    let mut longer = chain.clone();
    longer.push(forged);
    assert_eq!(check(&longer, &bundles, late).unwrap_err().kind(), "path");
}

#[test]
fn whether_it_is_revoked_is_left_to_whoever_can_answer() {
    let world = old_world();
    let revoked = Revocations::new([(Target::SpiffeId(ID.parse().unwrap()), Arc::from("east/stolen"))]);
    let bundles = world.bundles().revoking(revoked);
    let peer = check(&ended(&world, DAY), &bundles, NOW).unwrap();
    assert!(bundles.revocations().of(&peer).is_some());
}
