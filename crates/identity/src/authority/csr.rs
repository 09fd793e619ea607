//! Intermediates by CSR: the cluster's key is made where the federator runs and stays there.
//!
//! What travels: `ca.csr` to the root's machine, `ca.crt`, `bundle.json` and `cluster.json` back. Of a CSR only the public key is
//! taken, after its proof of possession has been checked, and, where nobody names the cluster, its common name.

use std::path::Path;
use std::time::Duration;

use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DnType, DnValue, KeyPair, PKCS_ECDSA_P256_SHA256,
    PublicKeyData,
};
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use tombolo_model::ids::ClusterTag;
use tombolo_model::names::ClusterName;
use zeroize::Zeroizing;

use super::adopt::Upstream;
use super::{AuthorityError, Certified, ClusterFile, Existing, RootAuthority, save_public, subject};
use crate::files;
use crate::signer::Signer;
use crate::signer::file::SecretKey;

/// A CSR in PEM has some 500 bytes.
const MAX_CSR: u64 = 64 * 1024;
const NAME: &str = "cluster ";

/// A CSR that was read: its proof holds.
#[derive(Clone, Debug)]
pub struct ClusterCsr {
    request: CertificateSigningRequestParams,
    /// As `tombolo trust csr` wrote it.
    pub cluster: Option<ClusterName>,
}

/// Makes a cluster's key and CSR in `dir`: `ca.key` (0600) and `ca.csr`. A key that is there is kept: it may be in use.
pub fn make(dir: &Path, cluster: &ClusterName) -> Result<(), AuthorityError> {
    files::private_dir(dir)?;
    let path = dir.join("ca.key");
    let key = if path.exists() {
        let pem = files::read_secret(&path, super::MAX_FILE)?;
        let damaged = |e: rcgen::Error| AuthorityError::Damaged { path: path.clone(), reason: e.to_string() };
        SecretKey::from_pem(&pem).map_err(damaged)?
    } else {
        let key = SecretKey::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?);
        files::write_atomic(&path, Zeroizing::new(key.serialize_pem()).as_bytes(), 0o600)?;
        key
    };
    let mut params = CertificateParams::default();
    params.distinguished_name = subject(format!("{NAME}{cluster}"));
    let csr = params.serialize_request(&*key)?.pem()?;
    Ok(files::write_atomic(&dir.join("ca.csr"), csr.as_bytes(), 0o644)?)
}

impl ClusterCsr {
    /// Whether it was made with this key.
    pub fn is_of(&self, signer: &dyn Signer) -> bool {
        self.request.public_key.der_bytes() == signer.public_key().der_bytes()
    }

    pub fn read(path: &Path) -> Result<Self, AuthorityError> {
        let bytes = files::read(path, MAX_CSR)?;
        let no_csr = |e: &dyn std::fmt::Display| AuthorityError::Csr(format!("{}: {e}", path.display()));
        let der = CertificateSigningRequestDer::from_pem_slice(&bytes)
            .map_err(|_| no_csr(&"it holds no certificate request in PEM"))?;
        let request = CertificateSigningRequestParams::from_der(&der).map_err(|e| no_csr(&e))?;
        if request.public_key.algorithm() != &PKCS_ECDSA_P256_SHA256 {
            return Err(no_csr(&"a cluster's key is ECDSA P-256"));
        }
        let name = match request.params.distinguished_name.get(&DnType::CommonName) {
            Some(DnValue::Utf8String(name)) => Some(name.as_str()),
            Some(DnValue::PrintableString(name)) => Some(name.as_str()),
            _ => None,
        };
        let cluster = name.and_then(|name| name.strip_prefix(NAME)?.parse().ok());
        Ok(Self { request, cluster })
    }
}

/// What goes back to where the key is.
pub struct SignedCluster {
    pub cluster: ClusterName,
    pub tag: ClusterTag,
    pub(super) file: ClusterFile,
    pub(super) certificate: rustls_pki_types::CertificateDer<'static>,
    pub(super) bundle: crate::bundle::TrustBundle,
    /// Of an adopted one.
    pub(super) upstream: Option<Upstream>,
}

impl SignedCluster {
    /// Writes `ca.crt`, `bundle.json` and `cluster.json`, and of an adopted one what the foreign authority signed.
    pub fn save(&self, dir: &Path) -> Result<(), AuthorityError> {
        files::private_dir(dir)?;
        save_public(dir, &self.file, &self.certificate, &self.bundle)?;
        self.upstream.as_ref().map_or(Ok(()), |upstream| upstream.save(dir))
    }
}

impl RootAuthority {
    /// Signs an intermediate for the key of a CSR, and registers it.
    pub fn sign_csr(
        &mut self,
        name: &ClusterName,
        csr: &ClusterCsr,
        existing: Existing,
        now: Duration,
    ) -> Result<SignedCluster, AuthorityError> {
        let Certified { tag, certificate } =
            self.certify_cluster(name, &csr.request.public_key, None, existing, now)?;
        let file = ClusterFile { name: name.clone(), tag, trust_domain: self.trust_domain.clone() };
        Ok(SignedCluster {
            cluster: name.clone(),
            tag,
            file,
            certificate,
            bundle: self.bundle(),
            upstream: None,
        })
    }
}
