//! The X509-SVID rules, one case per rule and violation, and the binding of a leaf to its issuer's cluster.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic is a test's failure

mod minting;

use std::time::Duration;

use minting::{NOW, at, sign, uri, world};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use tombolo_identity::authority::{AuthorityError, ClusterMaterial, Existing, RootAuthority};
use tombolo_identity::cluster_binding::OID;
use tombolo_identity::issuer::{IssueError, KeyAndCsr, LEAF_LIFE, LeafIssuer, verify_record};
use tombolo_identity::verify::{Usage, authenticate, unix_time};
use tombolo_identity::{BundleSet, SpiffeId, Svid, TrustBundle};

#[test]
fn a_leaf_by_the_rules_authenticates_and_names_its_cluster() {
    let world = world();
    let peer = authenticate(&world.leaf(|_| ()), &world.bundles(), Usage::Server, unix_time(NOW)).unwrap();
    assert_eq!(peer.spiffe_id.as_str(), "spiffe://acme.example/cluster/east/ns/shop/sa/cart");
    assert_eq!((peer.cluster.as_str(), peer.tag), ("east", world.east.tag));
}

/// A name for the case, an edit of a good leaf, and the `kind()` it must be refused with.
type Case = (&'static str, fn(&mut CertificateParams), &'static str);

#[test]
fn every_violation_is_refused_for_its_own_reason() {
    let cases: &[Case] = &[
        (
            "two URI SANs",
            |p| p.subject_alt_names.push(uri("spiffe://acme.example/cluster/east/vm/x")),
            "uri_sans",
        ),
        ("no URI SAN", |p| p.subject_alt_names.clear(), "uri_sans"),
        ("not a SPIFFE ID", |p| p.subject_alt_names = vec![uri("https://acme.example/x")], "spiffe_id"),
        (
            "a port in the trust domain",
            |p| p.subject_alt_names = vec![uri("spiffe://acme.example:8/x")],
            "spiffe_id",
        ),
        (
            "a dot segment",
            |p| p.subject_alt_names = vec![uri("spiffe://acme.example/cluster/../x")],
            "spiffe_id",
        ),
        ("no path", |p| p.subject_alt_names = vec![uri("spiffe://acme.example")], "no_path"),
        ("a CA leaf", |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained), "leaf_is_ca"),
        ("may sign certificates", |p| p.key_usages.push(KeyUsagePurpose::KeyCertSign), "key_usage"),
        ("may sign CRLs", |p| p.key_usages.push(KeyUsagePurpose::CrlSign), "key_usage"),
        ("no key usage", |p| p.key_usages.clear(), "key_usage"),
        ("expired", |p| p.not_after = at(NOW - Duration::from_secs(1)), "expired"),
        ("not valid yet", |p| p.not_before = at(NOW + Duration::from_secs(60)), "not_yet_valid"),
        (
            "another cluster",
            |p| p.subject_alt_names = vec![uri("spiffe://acme.example/cluster/west/vm/x")],
            "wrong_cluster",
        ),
        (
            "no cluster at all",
            |p| p.subject_alt_names = vec![uri("spiffe://acme.example/admin")],
            "wrong_cluster",
        ),
        (
            "a cluster as prefix",
            |p| p.subject_alt_names = vec![uri("spiffe://acme.example/cluster/eastern/vm/x")],
            "wrong_cluster",
        ),
        (
            "a foreign trust domain",
            |p| p.subject_alt_names = vec![uri("spiffe://evil.example/cluster/east/vm/x")],
            "unknown_trust_domain",
        ),
        ("for servers only", |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth], "path"),
    ];
    let world = world();
    for (name, edit, kind) in cases {
        let error = world.check(&world.leaf(edit)).expect_err(name);
        assert_eq!(error.kind(), *kind, "{name}: {error}");
    }
}

#[test]
fn an_id_of_2048_bytes_is_served_and_a_longer_one_refused() {
    let world = world();
    let prefix = "spiffe://acme.example/cluster/east/ns/shop/sa/";
    let id = |len: usize| format!("{prefix}{}", "a".repeat(len - prefix.len()));
    assert!(world.check(&sign(&world.east, &id(2048), |_| ())).is_ok());
    let error = world.check(&sign(&world.east, &id(2049), |_| ())).unwrap_err();
    assert_eq!(error.kind(), "spiffe_id");
}

#[test]
fn an_intermediate_must_be_bound_once_and_carry_no_path() {
    let world = world();
    let id = "spiffe://acme.example/cluster/east/vm/db-1";
    let kind = |edit: fn(&mut CertificateParams)| {
        world.check(&sign(&world.odd_intermediate(edit), id, |_| ())).map(drop).map_err(|e| e.kind())
    };
    assert_eq!(kind(|_| ()), Ok(()), "the baseline is good");
    assert_eq!(kind(|p| p.custom_extensions.clear()), Err("unbound"));
    assert_eq!(
        kind(|p| p.custom_extensions = vec![CustomExtension::from_oid_content(OID, vec![0x30, 0])]),
        Err("unbound")
    );
    assert_eq!(
        kind(|p| p.subject_alt_names = vec![uri("spiffe://acme.example/cluster/east")]),
        Err("signer_path")
    );
}

#[test]
fn a_stolen_intermediate_of_another_cluster_cannot_mint_for_this_one() {
    let mut world = world();
    let west = world.west();
    let forged = sign(&west, "spiffe://acme.example/cluster/east/ns/shop/sa/cart", |_| ());
    assert_eq!(world.check(&forged).unwrap_err().kind(), "wrong_cluster");
    // Nor by showing east's intermediate beside its own: the binding that counts is the signer's.
    let mut smuggled = forged.clone();
    smuggled.insert(1, world.east.certificate.clone());
    assert_eq!(world.check(&smuggled).unwrap_err().kind(), "path");
}

#[test]
fn another_root_an_empty_bundle_and_a_long_chain_are_refused() {
    let world = world();
    let other = minting::world();
    assert_eq!(world.check(&other.leaf(|_| ())).unwrap_err().kind(), "path");
    let empty = TrustBundle { roots: Vec::new(), ..world.root.bundle() };
    let error =
        authenticate(&world.leaf(|_| ()), &BundleSet::of(empty), Usage::Client, unix_time(NOW)).unwrap_err();
    assert_eq!(error.kind(), "empty_bundle");
    let mut long = world.leaf(|_| ());
    long.extend(std::iter::repeat_n(world.east.certificate.clone(), 4));
    assert_eq!(world.check(&long).unwrap_err().kind(), "chain_too_long");
    assert_eq!(world.check(&[]).unwrap_err().kind(), "no_certificate");
}

#[test]
fn a_csr_gives_its_key_and_nothing_else() {
    let world = world();
    let issuer = LeafIssuer::new(world.east).unwrap();
    let id: SpiffeId = "spiffe://acme.example/cluster/east/vm/db-1".parse().unwrap();
    let key = KeyPair::generate().unwrap();
    let mut greedy = CertificateParams::default();
    greedy.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    greedy.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    greedy.subject_alt_names =
        (0..100).map(|n| uri(&format!("spiffe://acme.example/cluster/east/vm/x{n}"))).collect();
    let csr = greedy.serialize_request(&key).unwrap();
    let leaf = issuer.issue(csr.der(), &id, LEAF_LIFE, NOW).unwrap();
    let peer = authenticate(&leaf.chain, &BundleSet::of(world.root.bundle()), Usage::Client, unix_time(NOW))
        .unwrap();
    assert_eq!(peer.spiffe_id, id);
    assert!(Svid::new(&key.serialize_der(), leaf.chain.clone(), BundleSet::of(world.root.bundle())).is_ok());
    let stranger = KeyPair::generate().unwrap();
    assert!(Svid::new(&stranger.serialize_der(), leaf.chain, BundleSet::of(world.root.bundle())).is_err());

    let outside = "spiffe://acme.example/cluster/west/vm/db-1".parse().unwrap();
    assert!(matches!(
        issuer.issue(csr.der(), &outside, LEAF_LIFE, NOW),
        Err(IssueError::OutsideCluster { .. })
    ));
    let mut broken = csr.der().to_vec();
    *broken.last_mut().unwrap() ^= 1;
    assert!(matches!(issuer.issue(&broken, &id, LEAF_LIFE, NOW), Err(IssueError::Csr(_))));
    assert!(matches!(issuer.issue(&vec![0; 100_000], &id, LEAF_LIFE, NOW), Err(IssueError::TooLarge(_))));
}

#[test]
fn a_leaf_never_outlives_its_intermediate() {
    let world = world();
    let issuer = LeafIssuer::new(world.east).unwrap();
    let id = "spiffe://acme.example/cluster/east/vm/db-1".parse().unwrap();
    let csr = KeyAndCsr::generate().unwrap().csr_der;
    let late = Duration::from_secs(issuer.not_after()) - Duration::from_secs(60);
    assert_eq!(issuer.issue(&csr, &id, LEAF_LIFE, late).unwrap().not_after, issuer.not_after());
    let after = Duration::from_secs(issuer.not_after());
    assert!(matches!(issuer.issue(&csr, &id, LEAF_LIFE, after), Err(IssueError::IssuerExpired)));
}

#[test]
fn records_are_signed_under_their_label_by_the_cluster() {
    let world = world();
    let certificate = world.east.certificate.clone();
    let issuer = LeafIssuer::new(world.east).unwrap();
    let signature = issuer.sign_record("endpoint lease", b"block 7").unwrap();
    assert!(verify_record(&certificate, "endpoint lease", b"block 7", &signature));
    assert!(!verify_record(&certificate, "endpoint lease", b"block 8", &signature));
    assert!(!verify_record(&certificate, "other label", b"block 7", &signature));
    assert!(!verify_record(&certificate, "endpoint lease", b"block 7", &[]));
}

#[test]
fn the_register_refuses_a_known_name_keeps_a_tag_on_renewal_and_changes_it_on_recreation() {
    let mut world = world();
    let east = "east".parse().unwrap();
    assert!(matches!(
        world.root.sign_cluster(&east, Existing::Refuse, NOW),
        Err(AuthorityError::Registered { .. })
    ));
    let renewed = world.root.sign_cluster(&east, Existing::Renew, NOW).unwrap();
    assert_eq!(renewed.tag, world.east.tag);
    let recreated = world.root.sign_cluster(&east, Existing::Recreate, NOW).unwrap();
    assert_ne!(recreated.tag, world.east.tag);
    let reloaded = RootAuthority::load(&world.dir.path().join("trust")).unwrap();
    assert_eq!(reloaded.registry().len(), 3);
    assert_eq!(reloaded.fingerprint(), world.root.fingerprint());
}

#[test]
fn files_are_private_never_overwritten_and_damage_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let world = world();
    let dir = world.dir.path().join("trust");
    let mode = |name: &str| std::fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("root.key"), mode(".")), (0o600, 0o700));
    let again = RootAuthority::init(&dir, "acme.example".parse().unwrap(), NOW);
    assert!(matches!(again, Err(AuthorityError::Exists(_))));
    std::fs::write(dir.join("registry.json"), "[{\"name\":").unwrap();
    let error = RootAuthority::load(&dir).err().unwrap().to_string();
    assert!(error.contains("registry.json") && error.contains("backup"), "{error}");

    let out = world.dir.path().join("east");
    world.east.save(&out).unwrap();
    let loaded = ClusterMaterial::load(&out).unwrap();
    assert_eq!(
        (loaded.cluster, loaded.tag, loaded.bundle),
        (world.east.cluster, world.east.tag, world.east.bundle)
    );
    assert_eq!(std::fs::metadata(out.join("ca.key")).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn bundles_round_trip_and_bad_documents_are_refused() {
    let world = world();
    let domain = world.root.trust_domain.clone();
    let bundle = world.root.bundle();
    assert_eq!(TrustBundle::from_json(domain.clone(), &bundle.to_json()).unwrap(), bundle);
    let unknown = r#"{"keys":[{"kty":"RSA","use":"jwt-svid","kid":"x"}],"spiffe_sequence":3}"#;
    assert!(
        TrustBundle::from_json(domain.clone(), unknown).unwrap().roots.is_empty(),
        "unknown uses are ignored"
    );
    for bad in [
        "",
        "{",
        "[]",
        r#"{"keys":[{"use":"x509-svid","x5c":[]}]}"#,
        r#"{"keys":[{"use":"x509-svid","x5c":["AAAA"]}]}"#,
    ] {
        assert!(TrustBundle::from_json(domain.clone(), bad).is_err(), "{bad}");
    }
    assert!(TrustBundle::from_json(domain, &" ".repeat(100_000)).is_err());
}
