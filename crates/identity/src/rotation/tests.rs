//! Updates that are taken and refused, and their bytes.

use proptest::prelude::*;

use super::*;
use crate::authority::{Existing, RootAuthority};
use crate::issuer::{KeyAndCsr, LEAF_LIFE, LeafIssuer};
use crate::verify::{Usage, authenticate, unix_time};
use crate::{BundleSet, IdentityError, Svid};

const NOW: Duration = Duration::from_secs(1_795_000_000);

struct World {
    _dir: tempfile::TempDir,
    old: RootAuthority,
    new: RootAuthority,
    east: crate::authority::ClusterMaterial,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let domain = || "acme.example".parse().unwrap();
    let path = dir.path().join("trust");
    let mut old = RootAuthority::init(&path, domain(), NOW).unwrap();
    let east = old.sign_cluster(&"east".parse().unwrap(), Existing::Refuse, NOW).unwrap();
    let new = RootAuthority::init(&RootAuthority::next_dir(&path), domain(), NOW).unwrap();
    World { _dir: dir, old, new, east }
}

impl World {
    /// The three updates of a rotation.
    fn update(&self, step: u64) -> TrustUpdate {
        let (old, new) = (self.old.certificate().clone(), self.new.certificate().clone());
        let again = || self.new.reissue(&self.east.certificate, self.old.registry(), NOW).unwrap();
        TrustUpdate {
            trust_domain: self.old.trust_domain.clone(),
            sequence: 1 + step,
            roots: if step == 3 { vec![new.clone()] } else { vec![old, new.clone()] },
            crosses: vec![self.old.cross_sign(&new, NOW).unwrap()],
            intermediates: if step == 1 { Vec::new() } else { vec![again()] },
        }
    }
    fn signed(&self, update: &TrustUpdate) -> Vec<u8> {
        RootAuthority::sign_update(update, &[&self.old, &self.new]).unwrap().to_bytes()
    }
    fn leaf(&self) -> (Vec<u8>, Vec<CertificateDer<'static>>) {
        let material = crate::authority::ClusterMaterial {
            cluster: self.east.cluster.clone(),
            tag: self.east.tag,
            trust_domain: self.east.trust_domain.clone(),
            key_pem: self.east.key_pem.clone(),
            certificate: self.east.certificate.clone(),
            bundle: self.east.bundle.clone(),
        };
        let fresh = KeyAndCsr::generate().unwrap();
        let id = "spiffe://acme.example/cluster/east/federator".parse().unwrap();
        let leaf = LeafIssuer::new(material).unwrap().issue(&fresh.csr_der, &id, LEAF_LIFE, NOW).unwrap();
        (fresh.key_der.to_vec(), leaf.chain)
    }
}

fn judge(bytes: &[u8], bundle: &TrustBundle) -> Result<Option<TrustUpdate>, UpdateError> {
    accept(bytes, Held { bundle, update: None }, NOW)
}

#[test]
fn each_step_is_taken_by_whoever_holds_the_one_before_and_by_who_missed_some() {
    let world = world();
    let first = world.old.bundle();
    let updates: Vec<_> = (1..=3).map(|step| world.update(step)).collect();
    let signed: Vec<_> = updates.iter().map(|update| world.signed(update)).collect();
    let mut held = first.clone();
    for (update, signed) in updates.iter().zip(&signed) {
        assert_eq!(judge(signed, &held).unwrap().as_ref(), Some(update));
        assert_eq!(judge(signed, &first).unwrap().as_ref(), Some(update), "missed what came before");
        held = update.bundle();
        let same = Held { bundle: &held, update: Some(signed) };
        assert_eq!(accept(signed, same, NOW), Ok(None));
    }
    // Back, and beside: nothing of that is taken.
    assert_eq!(judge(&signed[0], &held), Err(UpdateError::Old { held: 4, found: 2 }));
    let other = TrustUpdate { crosses: Vec::new(), ..world.update(3) };
    let beside = accept(&world.signed(&other), Held { bundle: &held, update: Some(&signed[2]) }, NOW);
    assert_eq!(beside, Err(UpdateError::Conflict(4)));
    let both = TrustUpdate { roots: world.update(2).roots, ..other };
    assert_eq!(judge(&world.signed(&both), &held), Err(UpdateError::Conflict(4)));
    // A cluster that was made after the rotation has the bundle from its directory, and lacks the rest.
    assert_eq!(judge(&signed[2], &held).unwrap(), Some(updates[2].clone()));
}

#[test]
fn what_is_foreign_forged_or_inconsistent_is_refused_with_its_reason() {
    let world = world();
    let other = self::world();
    let held = world.old.bundle();
    let good = world.update(2);
    let case = |change: &dyn Fn(&mut TrustUpdate)| {
        let mut update = good.clone();
        change(&mut update);
        judge(&world.signed(&update), &held).unwrap_err().kind()
    };
    assert_eq!(judge(&other.signed(&other.update(1)), &held).unwrap_err().kind(), "unsigned");
    assert_eq!(case(&|u| u.trust_domain = "b.example".parse().unwrap()), "foreign");
    assert_eq!(case(&|u| u.roots.clear()), "roots");
    assert_eq!(case(&|u| u.roots = vec![u.roots[0].clone(); 5]), "roots");
    assert_eq!(case(&|u| u.roots[1] = world.east.certificate.clone()), "certificate");
    assert_eq!(case(&|u| u.crosses[0] = world.east.certificate.clone()), "certificate");
    assert_eq!(case(&|u| u.intermediates[0].cluster = "west".parse().unwrap()), "certificate");
    assert_eq!(case(&|u| u.intermediates[0].certificate = other.east.certificate.clone()), "certificate");
    assert_eq!(case(&|u| u.sequence = 0), "old");
    // Signed by the successor alone: nobody who knows only the old root believes that.
    let alone = RootAuthority::sign_update(&good, &[&world.new]).unwrap().to_bytes();
    assert_eq!(judge(&alone, &held).unwrap_err().kind(), "unsigned");
    // Roots whose time is over sign nothing.
    let signed = world.signed(&good);
    let late =
        accept(&signed, Held { bundle: &held, update: None }, NOW + Duration::from_secs(11 * 365 * 86_400));
    assert_eq!(late.unwrap_err().kind(), "unsigned");
}

#[test]
fn any_change_or_cut_of_the_bytes_is_refused() {
    let world = world();
    let held = world.old.bundle();
    // Signed by the root that is held alone, so that every byte counts.
    let signed = RootAuthority::sign_update(&world.update(2), &[&world.old]).unwrap().to_bytes();
    judge(&signed, &held).unwrap();
    for at in (0..signed.len()).step_by(7) {
        assert!(judge(&signed[..at], &held).is_err(), "cut at {at}");
        let mut changed = signed.clone();
        changed[at] ^= 0x40;
        assert!(judge(&changed, &held).is_err(), "changed at {at}");
    }
    assert!(judge(&[&signed[..], &[0]].concat(), &held).is_err(), "something follows");
    assert_eq!(judge(&vec![0; MAX_UPDATE_BYTES + 1], &held).unwrap_err().kind(), "too_large");
}

#[test]
fn a_key_that_was_never_registered_is_not_signed_anew() {
    let world = world();
    let stranger = self::world();
    let words = world.new.reissue(&stranger.east.certificate, world.old.registry(), NOW).unwrap_err();
    assert!(words.to_string().contains("registry.json"), "{words}");
    assert!(world.new.reissue(world.old.certificate(), world.old.registry(), NOW).is_err());
}

#[test]
fn who_missed_the_rotation_is_led_across_and_is_believed_by_who_did_not() {
    let world = world();
    let retired = world.update(3);
    let (key, chain) = world.leaf();
    let time = unix_time(NOW);
    let new_only = BundleSet::of(retired.bundle());
    // The one that was away shows the old chain.
    let refused = authenticate(&chain, &new_only, Usage::Client, time).unwrap_err();
    assert!(matches!(refused, IdentityError::Path { .. }), "{refused}");
    let reissued: Vec<_> = retired.intermediates.iter().map(|r| r.certificate.clone()).collect();
    let knowing = new_only.clone().reissuing(reissued.into());
    let identity = authenticate(&chain, &knowing, Usage::Client, time).unwrap();
    assert_eq!((identity.tag, identity.cluster), (world.east.tag, world.east.cluster.clone()));
    assert_eq!(identity.chain_hash, crate::verify::chain_hash(&chain), "of what was shown");
    // It is shown the new chain, with the certificate that leads there from the old root.
    let again = retired.intermediates[0].certificate.clone();
    let shown = vec![chain[0].clone(), again.clone(), retired.crosses[0].clone()];
    let old_only = BundleSet::of(world.old.bundle());
    authenticate(&shown, &old_only, Usage::Server, time).unwrap();
    authenticate(&shown, &new_only, Usage::Server, time).unwrap();
    assert!(authenticate(&shown[..2], &old_only, Usage::Server, time).is_err());
    Svid::new(&key, shown, new_only).unwrap();
    // Another cluster's key is not believed by it.
    let other = self::world();
    assert!(authenticate(&other.leaf().1, &knowing, Usage::Client, time).is_err());
}

#[test]
fn the_certificate_of_the_latest_trusted_root_is_issued_with() {
    let world = world();
    let binding = ClusterBinding { cluster: world.east.cluster.clone(), tag: world.east.tag };
    let spki = spki_of(&world.east.certificate).unwrap();
    // By a clock that is behind that of whoever made the first.
    let later = NOW - Duration::from_secs(60);
    let again = world.new.reissue(&world.east.certificate, world.old.registry(), later).unwrap().certificate;
    let candidates = [world.east.certificate.clone(), again.clone()];
    let (old, new) = (world.old.certificate().clone(), world.new.certificate().clone());
    let chosen = |roots: &[CertificateDer<'static>]| {
        choose_intermediate(&candidates, &spki, &binding, roots, later).cloned()
    };
    assert_eq!(chosen(std::slice::from_ref(&old)), Some(candidates[0].clone()));
    assert_eq!(chosen(&[old, new.clone()]), Some(again.clone()));
    assert_eq!(chosen(&[new]), Some(again));
    assert_eq!(chosen(&[self::world().old.certificate().clone()]), None);
}

#[test]
fn the_successor_takes_the_place_of_the_root_and_a_repetition_changes_nothing() {
    let world = world();
    let dir = world._dir.path().join("trust");
    let (old, new) = (world.old.fingerprint(), world.new.fingerprint());
    for _ in 0..2 {
        RootAuthority::promote(&dir, &old).unwrap();
        let root = RootAuthority::load(&dir).unwrap();
        assert_eq!(root.fingerprint(), new);
        assert_eq!(root.registry().len(), 1, "the register stays");
    }
    // A run that died while it took the successor apart.
    let emptied = dir.join("retired").join("emptied");
    std::fs::create_dir(&emptied).unwrap();
    std::fs::write(emptied.join("root.crt"), "left over").unwrap();
    RootAuthority::promote(&dir, &old).unwrap();
    assert!(dir.join("root.key").exists());
    assert_eq!(RootAuthority::load(&dir).unwrap().fingerprint(), new);
    let retired: Vec<_> = std::fs::read_dir(dir.join("retired")).unwrap().collect();
    assert_eq!(retired.len(), 1);
    assert!(!RootAuthority::next_dir(&dir).exists());
}

#[test]
fn the_bytes_of_an_update_are_what_the_header_draws() {
    let certificate = |byte: u8| CertificateDer::from(vec![byte; 3]);
    let update = TrustUpdate {
        trust_domain: "a.example".parse().unwrap(),
        sequence: 7,
        roots: vec![certificate(1), certificate(2)],
        crosses: vec![certificate(3)],
        intermediates: vec![Reissued {
            cluster: "east".parse().unwrap(),
            tag: ClusterTag::new(0x3e1e2a).unwrap(),
            certificate: certificate(4),
        }],
    };
    let payload = payload(&update);
    let expected = "746f6d626f6c6f20747275737420757064617465207631000\
                    9612e6578616d706c6500000000000000070200030101010003020202\
                    010003030303000104656173740\
                    03e1e2a0003040404";
    assert_eq!(hex::encode(&payload), expected.replace(char::is_whitespace, ""));
    let signed = SignedUpdate::new(payload, vec![([9; 32], vec![5, 6])]).to_bytes();
    let tail = format!("01{}00020506", "09".repeat(32));
    assert!(hex::encode(&signed).starts_with("0000004b"), "{}", hex::encode(&signed));
    assert!(hex::encode(&signed).ends_with(&tail));
}

fn certificates(max: usize) -> impl Strategy<Value = Vec<CertificateDer<'static>>> {
    let certificate = proptest::collection::vec(any::<u8>(), 0..600).prop_map(CertificateDer::from);
    proptest::collection::vec(certificate, 0..max)
}

prop_compose! {
    fn updates()(
        domain in "[a-z0-9._-]{1,30}",
        sequence in any::<u64>(),
        roots in certificates(5),
        crosses in certificates(3),
        intermediates in proptest::collection::vec(("[a-z0-9]{1,20}", 1..=ClusterTag::MAX), 0..4),
        certificate in proptest::collection::vec(any::<u8>(), 0..600),
    ) -> TrustUpdate {
        let intermediates = intermediates.into_iter().map(|(cluster, tag)| Reissued {
            cluster: cluster.parse().unwrap(),
            tag: ClusterTag::new(tag).unwrap(),
            certificate: certificate.clone().into(),
        });
        let intermediates = intermediates.collect();
        TrustUpdate { trust_domain: domain.parse().unwrap(), sequence, roots, crosses, intermediates }
    }
}

proptest! {
    #[test]
    fn updates_round_trip(update in updates(), signature in proptest::collection::vec(any::<u8>(), 0..200)) {
        let signed = SignedUpdate::new(payload(&update), vec![([1; 32], signature)]);
        let back = SignedUpdate::from_bytes(&signed.to_bytes()).unwrap();
        prop_assert_eq!(&back, &signed);
        prop_assert_eq!(back.read().unwrap(), update);
    }

    #[test]
    fn any_bytes_are_judged_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let bundle = TrustBundle { trust_domain: "a.example".parse().unwrap(), sequence: 1, roots: Vec::new() };
        prop_assert!(judge(&bytes, &bundle).is_err());
        // Behind a label that holds, too.
        let labelled = [&b"tombolo trust update v1\0"[..], &bytes].concat();
        let signed = SignedUpdate::new(labelled, Vec::new()).to_bytes();
        prop_assert!(judge(&signed, &bundle).is_err());
        let _ = (is_issued_by(&bytes, &bytes.clone().into(), NOW), binding_of(&bytes), spki_of(&bytes));
    }
}
