//! Certificates for the topologies that are not the mesh: one self-signed root, one P-256 leaf for both ends.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

/// The name that both ends demand of each other.
pub const PEER_NAME: &str = "peer.bench";

/// Files that HAProxy, nginx and the QUIC hops read.
#[derive(Debug, Clone)]
pub struct Certificates {
    pub root: PathBuf,
    pub leaf: PathBuf,
    pub key: PathBuf,
    /// Leaf and key in one file, as HAProxy wants it.
    pub leaf_and_key: PathBuf,
}

impl Certificates {
    pub fn create(dir: &Path) -> Result<Self> {
        let mut root = CertificateParams::default();
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        root.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        root.distinguished_name.push(rcgen::DnType::CommonName, "tombolo-bench root");
        let root = CertifiedIssuer::self_signed(root, KeyPair::generate()?)?;

        let mut leaf = CertificateParams::new(vec![PEER_NAME.to_owned()])?;
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let leaf = leaf.signed_by(&key, &root)?;

        let write = |name: &str, text: String| -> Result<PathBuf> {
            let path = dir.join(name);
            std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
            Ok(path)
        };
        Ok(Self {
            root: write("root.pem", root.pem())?,
            leaf: write("leaf.pem", leaf.pem())?,
            key: write("leaf.key", key.serialize_pem())?,
            leaf_and_key: write("leaf-and-key.pem", leaf.pem() + &key.serialize_pem())?,
        })
    }
}
