//! Issuing leaves from CSRs, and signing small records, with a cluster's intermediate.
//!
//! A CSR contributes its public key and nothing else: names, usages, validity and the CA bit are ours (rcgen would
//! copy them). Keys are made where they are used; [`KeyAndCsr`] is that other side.

use std::time::Duration;

use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SanType,
    SigningKey,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use crate::authority::{self, AuthorityError, ClusterMaterial};
use crate::signer::file::SecretKey;
use crate::spiffe_id::SpiffeId;

/// Leaves live a day and renew at half their life.
pub const LEAF_LIFE: Duration = Duration::from_secs(24 * 3600);
/// A CSR with a P-256 key has 200 to 400 bytes.
const MAX_CSR_BYTES: usize = 16 * 1024;

/// Why a leaf was not issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    #[error("the CSR has {0} bytes, at most {MAX_CSR_BYTES}")]
    TooLarge(usize),
    #[error("the CSR does not parse or its signature does not hold: {0}")]
    Csr(String),
    #[error("the CSR's key must be ECDSA P-256, P-384 or Ed25519")]
    KeyType,
    #[error("{id} lies outside cluster {cluster}")]
    OutsideCluster { id: SpiffeId, cluster: String },
    #[error("the cluster's intermediate has expired; issue a new one with `tombolo trust cluster --renew`")]
    IssuerExpired,
    #[error("signing failed: {0}")]
    Sign(String),
    #[error(transparent)]
    Material(#[from] AuthorityError),
}

/// A leaf and the chain to show with it.
#[derive(Clone, Debug)]
pub struct IssuedLeaf {
    pub spiffe_id: SpiffeId,
    /// Leaf, then the intermediate.
    pub chain: Vec<CertificateDer<'static>>,
    pub serial: Vec<u8>,
    /// SHA-256 of the leaf's SubjectPublicKeyInfo, hex.
    pub spki_sha256: String,
    /// Unix seconds.
    pub not_before: u64,
    pub not_after: u64,
}

/// Issues for one cluster.
pub struct LeafIssuer {
    pub material: ClusterMaterial,
    pub(crate) key: SecretKey,
    not_after: u64,
}

impl LeafIssuer {
    pub fn new(material: ClusterMaterial) -> Result<Self, IssueError> {
        let key = SecretKey::from_pem(&material.key_pem).map_err(|e| IssueError::Sign(e.to_string()))?;
        let (_, certificate) =
            X509Certificate::from_der(&material.certificate).map_err(|e| IssueError::Sign(e.to_string()))?;
        let not_after = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
        Ok(Self { material, key, not_after })
    }

    /// When the intermediate ends, unix seconds.
    pub fn not_after(&self) -> u64 {
        self.not_after
    }

    /// Issues a leaf for `id` with the CSR's key. It never outlives the intermediate.
    pub fn issue(
        &self,
        csr_der: &[u8],
        id: &SpiffeId,
        life: Duration,
        now: Duration,
    ) -> Result<IssuedLeaf, IssueError> {
        if csr_der.len() > MAX_CSR_BYTES {
            return Err(IssueError::TooLarge(csr_der.len()));
        }
        if id.cluster().as_ref() != Some(&self.material.cluster)
            || id.trust_domain() != self.material.trust_domain
        {
            let cluster = self.material.cluster.to_string();
            return Err(IssueError::OutsideCluster { id: id.clone(), cluster });
        }
        let left = Duration::from_secs(self.not_after.saturating_sub(now.as_secs()));
        if left.is_zero() {
            return Err(IssueError::IssuerExpired);
        }
        let der = CertificateSigningRequestDer::from(csr_der);
        let mut request =
            CertificateSigningRequestParams::from_der(&der).map_err(|e| IssueError::Csr(e.to_string()))?;
        let algorithm = request.public_key.algorithm();
        if ![&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384, &PKCS_ED25519].contains(&algorithm) {
            return Err(IssueError::KeyType);
        }
        let life = life.min(left);
        let serial = authority::serial();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let uri =
            id.as_str().try_into().map_err(|_| IssueError::Csr(format!("{id} is not an IA5 string")))?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial.clone());
        authority::validity(&mut params, now, life);
        request.params = params;
        let issuer = Issuer::from_ca_cert_der(&self.material.certificate, &*self.key)
            .map_err(|e| IssueError::Sign(e.to_string()))?;
        let leaf = request.signed_by(&issuer).map_err(|e| IssueError::Sign(e.to_string()))?;
        let (_, parsed) =
            X509Certificate::from_der(leaf.der()).map_err(|e| IssueError::Sign(e.to_string()))?;
        Ok(IssuedLeaf {
            spiffe_id: id.clone(),
            spki_sha256: hex::encode(Sha256::digest(parsed.public_key().raw)),
            chain: vec![leaf.der().clone(), self.material.certificate.clone()],
            serial: serial.to_bytes(),
            not_before: now.saturating_sub(authority::BACKDATE).as_secs(),
            not_after: (now + life).as_secs(),
        })
    }

    /// Signs `bytes` under `label` with the cluster's CA key (ECDSA P-256, SHA-256), e.g. an endpoint lease.
    pub fn sign_record(&self, label: &str, bytes: &[u8]) -> Result<Vec<u8>, IssueError> {
        self.key.sign(&labelled(label, bytes)).map_err(|e| IssueError::Sign(e.to_string()))
    }

    /// Whether this cluster's CA signed the record.
    pub fn verify_record(&self, label: &str, bytes: &[u8], signature: &[u8]) -> bool {
        verify_record(&self.material.certificate, label, bytes, signature)
    }
}

fn labelled(label: &str, bytes: &[u8]) -> Vec<u8> {
    let mut message = format!("tombolo record {label}\0").into_bytes();
    message.extend_from_slice(bytes);
    message
}

/// Whether the holder of `certificate` (a cluster's intermediate, DER) signed the record.
pub fn verify_record(certificate: &[u8], label: &str, bytes: &[u8], signature: &[u8]) -> bool {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return false };
    let key = certificate.public_key().subject_public_key.data.as_ref();
    let key =
        aws_lc_rs::signature::UnparsedPublicKey::new(&aws_lc_rs::signature::ECDSA_P256_SHA256_ASN1, key);
    key.verify(&labelled(label, bytes), signature).is_ok()
}

/// A fresh private key and the CSR that proves its possession.
pub struct KeyAndCsr {
    /// PKCS#8 DER.
    pub key_der: Zeroizing<Vec<u8>>,
    pub csr_der: Vec<u8>,
}

impl KeyAndCsr {
    pub fn generate() -> Result<Self, IssueError> {
        let sign = |e: rcgen::Error| IssueError::Sign(e.to_string());
        let key = SecretKey::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(sign)?);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let csr = params.serialize_request(&*key).map_err(sign)?;
        Ok(Self { key_der: Zeroizing::new(key.serialize_der()), csr_der: csr.der().to_vec() })
    }
}
