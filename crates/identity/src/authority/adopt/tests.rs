//! A foreign authority above a cluster, and what it can and can't do.

use std::path::PathBuf;

use rcgen::{BasicConstraints, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P384_SHA384, SanType};

use super::*;
use crate::authority::{ClusterMaterial, csr};
use crate::bundle::BundleSet;
use crate::cluster_binding::{ClusterBinding, OID};
use crate::foreign::ForeignBundle;
use crate::issuer::{KeyAndCsr, LEAF_LIFE, LeafIssuer};
use crate::verify::{Usage, authenticate, unix_time};

const NOW: Duration = Duration::from_secs(1_795_000_000);
const WEB: &str = "spiffe://acme.example/cluster/east/ns/shop/sa/web";

/// A SPIRE-like authority of the same trust domain.
struct Spire {
    key: KeyPair,
    certificate: CertificateDer<'static>,
}

fn ca(params: &mut CertificateParams, name: &[(DnType, &str)]) {
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = crate::authority::offset(NOW - Duration::from_secs(60));
    params.not_after = crate::authority::offset(NOW + Duration::from_secs(86_400));
    params.subject_alt_names = vec![SanType::URI("spiffe://acme.example".try_into().unwrap())];
    params.distinguished_name = DistinguishedName::new();
    for (kind, value) in name {
        let value = DnValue::PrintableString(PrintableString::try_from(*value).unwrap());
        params.distinguished_name.push(kind.clone(), value);
    }
}

/// As SPIRE names what it signs for downstream servers.
fn downstream() -> Vec<(DnType, &'static str)> {
    vec![
        (DnType::CountryName, "US"),
        (DnType::OrganizationName, "SPIFFE"),
        (DnType::OrganizationalUnitName, "DOWNSTREAM-1"),
        (DnType::CustomDnType(vec![2, 5, 4, 5]), "2437281"),
    ]
}

impl Spire {
    fn new() -> Self {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
        let mut params = CertificateParams::default();
        ca(&mut params, &[(DnType::CountryName, "US"), (DnType::OrganizationName, "SPIFFE")]);
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { key, certificate }
    }

    fn sign(
        &self,
        key: &impl PublicKeyData,
        edit: impl FnOnce(&mut CertificateParams),
    ) -> CertificateDer<'static> {
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key).unwrap();
        let mut params = CertificateParams::default();
        ca(&mut params, &downstream());
        edit(&mut params);
        params.signed_by(key, &issuer).unwrap().der().clone()
    }
}

struct World {
    dir: tempfile::TempDir,
    root: RootAuthority,
    spire: Spire,
    key: KeyPair,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let root = RootAuthority::init(&dir.path().join("root"), "acme.example".parse().unwrap(), NOW).unwrap();
    csr::make(&dir.path().join("east"), &"east".parse().unwrap()).unwrap();
    let key = std::fs::read_to_string(dir.path().join("east/ca.key")).unwrap();
    World { root, spire: Spire::new(), key: KeyPair::from_pem(&key).unwrap(), dir }
}

impl World {
    fn upstream(
        &self,
        chain: &[CertificateDer<'static>],
        roots: &[CertificateDer<'static>],
    ) -> Result<Upstream, AuthorityError> {
        let write = |name: &str, list: &[CertificateDer<'static>]| -> PathBuf {
            let path = self.dir.path().join(name);
            std::fs::write(&path, list.iter().map(pem).collect::<String>()).unwrap();
            path
        };
        Upstream::read(&write("chain.pem", chain), &write("roots.pem", roots))
    }

    fn adopt(
        &mut self,
        chain: &[CertificateDer<'static>],
        roots: &[CertificateDer<'static>],
    ) -> Result<SignedCluster, AuthorityError> {
        let upstream = self.upstream(chain, roots)?;
        self.root.adopt(&"east".parse().unwrap(), &upstream, Existing::Refuse, NOW)
    }

    /// The federator's directory, adopted.
    fn adopted(&mut self) -> (ClusterMaterial, Upstream) {
        let signed = self.spire.sign(&self.key, |_| ());
        let root = self.spire.certificate.clone();
        let dir = self.dir.path().join("east");
        self.adopt(&[signed, root.clone()], &[root]).unwrap().save(&dir).unwrap();
        (ClusterMaterial::load(&dir).unwrap(), Upstream::load(&dir).unwrap().unwrap())
    }
}

fn leaf(material: ClusterMaterial) -> Vec<CertificateDer<'static>> {
    let fresh = KeyAndCsr::generate().unwrap();
    let id = WEB.parse().unwrap();
    LeafIssuer::new(material).unwrap().issue(&fresh.csr_der, &id, LEAF_LIFE, NOW).unwrap().chain
}

/// How an application of SPIRE's judges a chain: by SPIRE's root alone.
fn by_spire(spire: &Spire, chain: &[CertificateDer<'_>]) -> Result<(), verify::IdentityError> {
    use base64::Engine;
    let root = base64::engine::general_purpose::STANDARD.encode(&spire.certificate);
    let document = serde_json::json!({ "keys": [{ "use": "x509-svid", "x5c": [root] }] }).to_string();
    let bundle = ForeignBundle::parse("acme.example".parse().unwrap(), document.as_bytes()).unwrap();
    bundle.authenticate(chain, Usage::Server, unix_time(NOW)).map(drop)
}

#[test]
fn a_leaf_of_an_adopted_key_is_believed_by_the_mesh_and_by_who_knows_the_foreign_authority_alone() {
    let mut world = world();
    let (material, upstream) = world.adopted();
    assert_eq!(world.root.registry().len(), 1);
    let (cluster, tag, intermediate) = (material.cluster.clone(), material.tag, material.certificate.clone());
    let chain = leaf(material);
    let bundles = BundleSet::of(world.root.bundle());
    let peer = authenticate(&chain, &bundles, Usage::Client, unix_time(NOW)).unwrap();
    assert_eq!((peer.cluster, peer.tag, peer.spiffe_id.as_str()), (cluster, tag, WEB));
    // Shown to applications: the foreign authority's certificate stands beside ours.
    let beside = upstream.beside(&intermediate, NOW);
    assert_eq!(beside.len(), 1, "its root is left out");
    by_spire(&world.spire, &[chain[0].clone(), beside[0].clone()]).unwrap();
    assert!(by_spire(&world.spire, &chain).is_err(), "without it nobody of SPIRE's believes");
    let shown = [chain.clone(), beside.to_vec()].concat();
    assert!(
        authenticate(&shown, &bundles, Usage::Client, unix_time(NOW)).is_ok(),
        "and the mesh takes it as well"
    );
    // It has ended, or is about another key: it is not shown, and the mesh does not care.
    assert!(upstream.beside(&intermediate, NOW + Duration::from_secs(86_401)).is_empty());
    let other = world.root.sign_cluster(&"west".parse().unwrap(), Existing::Refuse, NOW).unwrap();
    assert!(upstream.beside(&other.certificate, NOW).is_empty());
}

#[test]
fn what_the_foreign_authority_signs_for_anybody_is_nothing_to_the_mesh() {
    let mut world = world();
    let (material, _) = world.adopted();
    let bundles = BundleSet::of(world.root.bundle());
    let judge = |chain: &[CertificateDer<'_>]| {
        authenticate(chain, &bundles, Usage::Client, unix_time(NOW)).unwrap_err().kind()
    };
    // Another key, with our extension and east's very name and tag: it is SPIRE's word, not the root's.
    let stolen = KeyPair::generate().unwrap();
    let binding = ClusterBinding { cluster: "east".parse().unwrap(), tag: material.tag };
    let forged = world.spire.sign(&stolen, |p| {
        p.custom_extensions = vec![rcgen::CustomExtension::from_oid_content(OID, binding.to_der())];
    });
    let forged = ClusterMaterial {
        key_pem: zeroize::Zeroizing::new(stolen.serialize_pem()),
        certificate: forged,
        cluster: material.cluster.clone(),
        tag: material.tag,
        trust_domain: material.trust_domain.clone(),
        bundle: world.root.bundle(),
    };
    let chain = leaf(forged);
    assert_eq!(judge(&chain), "path");
    assert_eq!(judge(&[&chain[..], std::slice::from_ref(&world.spire.certificate)].concat()), "path");
    // The adopted key under SPIRE's certificate alone, and for a cluster that is not its own.
    let upstream = world.spire.sign(&world.key, |_| ());
    let good = leaf(ClusterMaterial::load(&world.dir.path().join("east")).unwrap());
    assert_eq!(judge(&[good[0].clone(), upstream]), "path");
    let issuer = Issuer::from_ca_cert_der(&material.certificate, &world.key).unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = crate::authority::offset(NOW);
    params.not_after = crate::authority::offset(NOW + LEAF_LIFE);
    params.subject_alt_names =
        vec![SanType::URI("spiffe://acme.example/cluster/west/federator".try_into().unwrap())];
    let west = params.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap().der().clone();
    assert_eq!(judge(&[west, material.certificate.clone()]), "wrong_cluster");
}

#[test]
fn what_can_not_be_adopted_is_refused_and_not_registered() {
    let mut world = world();
    let root = world.spire.certificate.clone();
    let odd = |world: &World, edit: fn(&mut CertificateParams)| vec![world.spire.sign(&world.key, edit)];
    let p384 = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    let expired =
        |p: &mut CertificateParams| p.not_after = crate::authority::offset(NOW - Duration::from_secs(1));
    let foreign = |p: &mut CertificateParams| {
        p.subject_alt_names = vec![SanType::URI("spiffe://partner.example".try_into().unwrap())];
    };
    let path = |p: &mut CertificateParams| {
        p.subject_alt_names = vec![SanType::URI("spiffe://acme.example/a".try_into().unwrap())];
    };
    let cases = [
        ("a leaf", odd(&world, |p| p.is_ca = IsCa::ExplicitNoCa), "is no CA"),
        ("an expired one", odd(&world, expired), "not valid now"),
        ("of another trust domain", odd(&world, foreign), "spiffe://partner.example"),
        ("with a path", odd(&world, path), "spiffe://acme.example/a"),
        ("of another kind of key", vec![world.spire.sign(&p384, |_| ())], "not ECDSA P-256"),
        ("of a stranger", vec![Spire::new().sign(&world.key, |_| ())], "is signed neither"),
        (
            "too long",
            vec![
                root.clone(),
                world.spire.sign(&p384, |_| ()),
                world.spire.sign(&world.key, |_| ()),
                world.spire.sign(&world.key, |_| ()),
            ],
            "1 to 2",
        ),
    ];
    for (case, chain, says) in cases {
        let error = world.adopt(&chain, std::slice::from_ref(&root)).err().expect(case).to_string();
        assert!(error.contains(says), "{case}: {error}");
    }
    assert!(world.root.registry().is_empty());
    let nothing = world.upstream(&[], &[root]).unwrap_err().to_string();
    assert!(nothing.contains("chain.pem") && nothing.contains("PEM"), "{nothing}");
}

#[test]
fn a_rotation_of_the_root_keeps_the_name_that_the_foreign_authority_gave() {
    let mut world = world();
    let (material, upstream) = world.adopted();
    let next =
        RootAuthority::init(&world.dir.path().join("next"), "acme.example".parse().unwrap(), NOW).unwrap();
    let again = next.reissue(&material.certificate, world.root.registry(), NOW).unwrap().certificate;
    assert_eq!(upstream.beside(&again, NOW).len(), 1);
    assert!(
        authenticate(
            &[leaf(material)[0].clone(), again],
            &BundleSet::of(next.bundle()),
            Usage::Client,
            unix_time(NOW)
        )
        .is_ok()
    );
}
