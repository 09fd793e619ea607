//! Trust bundles: the roots of a trust domain, as SPIFFE JWKS documents (SPIFFE Trust Domain and Bundle, section 4).
//!
//! Bundles of different domains are never merged: a peer's domain selects its bundle. An empty bundle means that
//! everything of that domain is refused.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::revocation::Revocations;
use crate::spiffe_id::TrustDomain;

/// A document beyond this is hostile: twenty roots fit.
pub const MAX_BUNDLE_BYTES: usize = 64 * 1024;

/// Why a bundle was refused.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("bundle of {0} bytes, at most {MAX_BUNDLE_BYTES}")]
    TooLarge(usize),
    #[error("bundle is not a SPIFFE JWKS document: {0}")]
    Json(#[from] serde_json::Error),
    #[error("bundle key {index}: {reason}")]
    Key { index: usize, reason: String },
}

#[derive(Serialize, Deserialize)]
struct Document {
    keys: Vec<Key>,
    #[serde(default)]
    spiffe_sequence: u64,
    #[serde(default = "refresh_hint")]
    spiffe_refresh_hint: u64,
}

/// Bundles are pushed; whoever polls does so at the specification's default of five minutes.
fn refresh_hint() -> u64 {
    300
}

#[derive(Serialize, Deserialize)]
struct Key {
    #[serde(default)]
    kty: String,
    #[serde(rename = "use", default)]
    usage: String,
    #[serde(default)]
    x5c: Vec<String>,
}

/// The roots of one trust domain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TrustBundle {
    pub trust_domain: TrustDomain,
    /// Grows with every change.
    pub sequence: u64,
    pub roots: Vec<CertificateDer<'static>>,
}

impl TrustBundle {
    pub fn to_json(&self) -> String {
        let key = |root: &CertificateDer<'_>| Key {
            kty: "EC".into(),
            usage: "x509-svid".into(),
            x5c: vec![STANDARD.encode(root)],
        };
        let document = Document {
            keys: self.roots.iter().map(key).collect(),
            spiffe_sequence: self.sequence,
            spiffe_refresh_hint: refresh_hint(),
        };
        // A document of strings and numbers always serialises.
        serde_json::to_string_pretty(&document).unwrap_or_default()
    }

    /// Keys of unknown use are ignored, as the specification asks; a broken x509-svid key refuses the document.
    pub fn from_json(trust_domain: TrustDomain, json: &str) -> Result<Self, BundleError> {
        if json.len() > MAX_BUNDLE_BYTES {
            return Err(BundleError::TooLarge(json.len()));
        }
        let document: Document = serde_json::from_str(json)?;
        let mut roots = Vec::new();
        for (index, key) in document.keys.iter().enumerate().filter(|(_, key)| key.usage == "x509-svid") {
            let [certificate] = key.x5c.as_slice() else {
                let reason = format!("x5c has {} certificates, exactly one is allowed", key.x5c.len());
                return Err(BundleError::Key { index, reason });
            };
            let der = STANDARD
                .decode(certificate)
                .map_err(|e| BundleError::Key { index, reason: format!("x5c is not base64: {e}") })?;
            x509_parser::parse_x509_certificate(&der)
                .map_err(|e| BundleError::Key { index, reason: format!("x5c is not a certificate: {e}") })?;
            roots.push(CertificateDer::from(der));
        }
        Ok(Self { trust_domain, sequence: document.spiffe_sequence, roots })
    }
}

/// `sha256:<hex>` of a certificate: how tokens pin a root.
pub fn fingerprint(certificate: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(certificate)))
}

/// What peers are judged by: bundles by trust domain, and who is revoked.
#[derive(Clone, Default, Debug)]
pub struct BundleSet {
    bundles: BTreeMap<TrustDomain, TrustBundle>,
    revocations: Revocations,
    /// Intermediates that a root has signed anew: who shows an older certificate of the same key is believed by these.
    reissued: Arc<[CertificateDer<'static>]>,
}

impl BundleSet {
    pub fn of(bundle: TrustBundle) -> Self {
        let bundles = [(bundle.trust_domain.clone(), bundle)].into();
        Self { bundles, ..Self::default() }
    }
    pub fn insert(&mut self, bundle: TrustBundle) {
        self.bundles.insert(bundle.trust_domain.clone(), bundle);
    }
    pub fn get(&self, domain: &TrustDomain) -> Option<&TrustBundle> {
        self.bundles.get(domain)
    }
    pub fn iter(&self) -> impl Iterator<Item = &TrustBundle> {
        self.bundles.values()
    }
    pub fn revocations(&self) -> &Revocations {
        &self.revocations
    }
    #[must_use]
    pub fn reissuing(self, reissued: Arc<[CertificateDer<'static>]>) -> Self {
        Self { reissued, ..self }
    }
    pub fn reissued(&self) -> &[CertificateDer<'static>] {
        &self.reissued
    }
    #[must_use]
    pub fn revoking(self, revocations: Revocations) -> Self {
        Self { revocations, ..self }
    }
}
