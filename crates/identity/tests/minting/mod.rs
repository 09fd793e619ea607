//! A root with two clusters, and certificates as whoever holds their keys could make them, by the rules or not.

#![allow(dead_code)] // each test binary needs its own part of it

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use tombolo_identity::authority::{ClusterMaterial, Existing, RootAuthority};
use tombolo_identity::cluster_binding::{ClusterBinding, OID};
use tombolo_identity::verify::{Usage, authenticate, unix_time};
use tombolo_identity::{BundleSet, IdentityError, PeerIdentity};

pub const NOW: Duration = Duration::from_secs(1_795_000_000);
pub const HOUR: Duration = Duration::from_secs(3600);
/// Whom [`World::leaf`] is about.
pub const ID: &str = "spiffe://acme.example/cluster/east/ns/shop/sa/cart";

pub type Chain = Vec<CertificateDer<'static>>;

pub struct World {
    pub dir: tempfile::TempDir,
    pub root: RootAuthority,
    pub east: ClusterMaterial,
}

pub fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let mut root =
        RootAuthority::init(&dir.path().join("trust"), "acme.example".parse().unwrap(), NOW).unwrap();
    let east = root.sign_cluster(&"east".parse().unwrap(), Existing::Refuse, NOW).unwrap();
    World { dir, root, east }
}

impl World {
    pub fn west(&mut self) -> ClusterMaterial {
        self.root.sign_cluster(&"west".parse().unwrap(), Existing::Refuse, NOW).unwrap()
    }
    pub fn bundles(&self) -> BundleSet {
        BundleSet::of(self.root.bundle())
    }
    pub fn leaf(&self, edit: impl FnOnce(&mut CertificateParams)) -> Chain {
        sign(&self.east, ID, edit)
    }
    pub fn check(&self, chain: &[CertificateDer<'_>]) -> Result<PeerIdentity, IdentityError> {
        authenticate(chain, &self.bundles(), Usage::Client, unix_time(NOW))
    }

    /// An intermediate of east that the root really signed, but wrongly.
    pub fn odd_intermediate(&self, edit: impl FnOnce(&mut CertificateParams)) -> ClusterMaterial {
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
        ClusterMaterial {
            cluster: "east".parse().unwrap(),
            tag: self.east.tag,
            trust_domain: self.east.trust_domain.clone(),
            key_pem: zeroize::Zeroizing::new(key.serialize_pem()),
            certificate: params.signed_by(&key, &issuer).unwrap().der().clone(),
            bundle: self.root.bundle(),
        }
    }
}

pub fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

pub fn at(time: Duration) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(time.as_secs() as i64).unwrap()
}

/// A leaf of a fresh key, as an attacker who holds the cluster's CA key could make it.
pub fn sign(ca: &ClusterMaterial, id: &str, edit: impl FnOnce(&mut CertificateParams)) -> Chain {
    sign_key(ca, id, &KeyPair::generate().unwrap(), edit)
}

/// The same, of this key.
pub fn sign_key(
    ca: &ClusterMaterial,
    id: &str,
    key: &impl PublicKeyData,
    edit: impl FnOnce(&mut CertificateParams),
) -> Chain {
    let ca_key = KeyPair::from_pem(&ca.key_pem).unwrap();
    let issuer = Issuer::from_ca_cert_der(&ca.certificate, &ca_key).unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![uri(id)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = at(NOW - HOUR);
    params.not_after = at(NOW + HOUR);
    edit(&mut params);
    vec![params.signed_by(key, &issuer).unwrap().der().clone(), ca.certificate.clone()]
}
