//! Foreign trust domains: what they are known by, and who of them has proven to be whom. Pure.
//!
//! A foreign bundle is a type of its own and can't get into a [`BundleSet`](crate::BundleSet), by which handshakes of the
//! mesh are judged: a foreign authority may write whatever it likes into its certificates, `/cluster/east/federator` and
//! our private extension included, and none of that makes a [`PeerIdentity`](crate::PeerIdentity). A
//! [`ForeignIdentity`] has no cluster and no role: there is nothing that could be mistaken for a member's. What it
//! may do is what an `AccessPolicy` names it for (`tombolo_model::access`). Documents are read by the SPIFFE Trust Domain
//! and Bundle specification, section 4; an empty one is valid and says that everything of its domain is revoked.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jsonwebtoken::DecodingKey;
use jsonwebtoken::jwk::Jwk;
use rustls_pki_types::{CertificateDer, UnixTime};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::spiffe_id::{SpiffeId, TrustDomain};
use crate::verify::{self, IdentityError, MAX_CHAIN, Usage};

pub mod jwt;
#[cfg(test)]
mod tests;
pub mod tls;

/// SPIRE's has 3 KB with two roots and two JWT keys. All travel in every sidecar's snapshot, which is refused above 4 MB:
/// sixteen of these are a quarter of it.
pub const MAX_BUNDLE_BYTES: usize = 64 * 1024;
/// Roots and JWT keys: each costs a verification at worst.
const MAX_KEYS: usize = 64;
const MAX_KEY_ID_BYTES: usize = 256;
/// RSA moduli of fewer are weak (NIST SP 800-131A).
const MIN_RSA_BYTES: usize = 256;
/// What a public JWK has (RFC 7518 section 6); anything else a key carries stays behind.
const PUBLIC_MEMBERS: [&str; 9] = ["kty", "use", "kid", "alg", "crv", "x", "y", "n", "e"];

/// Why a document was refused whole: what was known before stays.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForeignBundleError {
    #[error("the bundle has more than {MAX_BUNDLE_BYTES} bytes")]
    TooLarge,
    #[error("it is no SPIFFE bundle: {0}")]
    Malformed(String),
    #[error("the bundle has {0} keys, at most {MAX_KEYS}")]
    TooManyKeys(usize),
    #[error("keys[{index}]: {reason}")]
    Key { index: usize, reason: String },
    #[error("keys[{index}] is an authority of trust domain {found}: bundles are never merged")]
    OtherTrustDomain { index: usize, found: TrustDomain },
}

impl ForeignBundleError {
    /// A metric label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::TooLarge => "too_large",
            Self::Malformed(_) | Self::TooManyKeys(_) | Self::Key { .. } => "malformed",
            Self::OtherTrustDomain { .. } => "other_trust_domain",
        }
    }
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<Map<String, Value>>,
    #[serde(default)]
    spiffe_sequence: u64,
    #[serde(default)]
    spiffe_refresh_hint: u64,
}

/// A public key that signs JWT-SVIDs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignJwtKey {
    kid: String,
    /// Public members alone.
    jwk: Value,
}

/// What a foreign trust domain is known by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignBundle {
    trust_domain: TrustDomain,
    sequence: u64,
    refresh_hint: Option<Duration>,
    roots: Vec<CertificateDer<'static>>,
    jwt_keys: Vec<ForeignJwtKey>,
}

/// Who of a foreign trust domain a peer has proven to be. Neither member nor infrastructure of anything here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignIdentity {
    pub spiffe_id: SpiffeId,
}

impl ForeignBundle {
    /// Reads a document. Keys of unknown use or type are skipped, as the specification asks; one that is broken refuses it.
    pub fn parse(trust_domain: TrustDomain, document: &[u8]) -> Result<Self, ForeignBundleError> {
        if document.len() > MAX_BUNDLE_BYTES {
            return Err(ForeignBundleError::TooLarge);
        }
        let Document { keys, spiffe_sequence, spiffe_refresh_hint } =
            serde_json::from_slice(document).map_err(|e| ForeignBundleError::Malformed(e.to_string()))?;
        if keys.len() > MAX_KEYS {
            return Err(ForeignBundleError::TooManyKeys(keys.len()));
        }
        let refresh_hint = (spiffe_refresh_hint > 0).then(|| Duration::from_secs(spiffe_refresh_hint));
        let mut bundle = Self {
            trust_domain,
            sequence: spiffe_sequence,
            refresh_hint,
            roots: Vec::new(),
            jwt_keys: Vec::new(),
        };
        for (index, key) in keys.into_iter().enumerate() {
            let wrong = |reason: String| ForeignBundleError::Key { index, reason };
            match key.get("use").and_then(Value::as_str) {
                Some("x509-svid") => {
                    let root = root(&key).map_err(wrong)?;
                    bundle.check_domain(index, &root)?;
                    if !bundle.roots.contains(&root) {
                        bundle.roots.push(root);
                    }
                }
                Some("jwt-svid") => {
                    let Some(key) = jwt_key(key).map_err(wrong)? else { continue };
                    if bundle.jwt_keys.iter().any(|known| known.kid == key.kid) {
                        return Err(wrong(format!("there is another key with the kid {:?}", key.kid)));
                    }
                    bundle.jwt_keys.push(key);
                }
                _ => {}
            }
        }
        Ok(bundle)
    }

    /// An authority that says whose it is must be this domain's (X509-SVID section 4.2).
    fn check_domain(&self, index: usize, root: &CertificateDer<'_>) -> Result<(), ForeignBundleError> {
        let wrong = |e: IdentityError| ForeignBundleError::Key { index, reason: e.to_string() };
        let certificate = verify::parse(root).map_err(wrong)?;
        let ids = verify::uris(&certificate).map_err(wrong)?.into_iter().filter_map(|u| u.parse().ok());
        match ids.map(|id: SpiffeId| id.trust_domain()).find(|found| *found != self.trust_domain) {
            Some(found) => Err(ForeignBundleError::OtherTrustDomain { index, found }),
            None => Ok(()),
        }
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }
    /// 0 where the document has none.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }
    pub fn refresh_hint(&self) -> Option<Duration> {
        self.refresh_hint
    }
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }
    pub fn jwt_keys(&self) -> usize {
        self.jwt_keys.len()
    }
    /// Everything of the domain is revoked.
    pub fn is_empty(&self) -> bool {
        self.roots.is_empty() && self.jwt_keys.is_empty()
    }

    /// What was understood of the document, for [`Self::parse`].
    pub fn to_json(&self) -> String {
        let root = |root: &CertificateDer<'_>| json!({ "use": "x509-svid", "x5c": [STANDARD.encode(root)] });
        let roots = self.roots.iter().map(root);
        let keys: Vec<Value> = roots.chain(self.jwt_keys.iter().map(|key| key.jwk.clone())).collect();
        let hint = self.refresh_hint.map_or(0, |hint| hint.as_secs());
        json!({ "keys": keys, "spiffe_sequence": self.sequence, "spiffe_refresh_hint": hint }).to_string()
    }

    /// The JWT keys as the Workload API hands them out.
    pub fn jwks(&self) -> String {
        let keys: Vec<&Value> = self.jwt_keys.iter().map(|key| &key.jwk).collect();
        json!({ "keys": keys }).to_string()
    }

    /// Authenticates a chain (leaf first) of this trust domain at `now`, by the rules of X509-SVID section 5. Its
    /// authorities may have as many intermediates as they like, up to [`MAX_CHAIN`].
    pub fn authenticate(
        &self,
        chain: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
    ) -> Result<ForeignIdentity, IdentityError> {
        if chain.len() > MAX_CHAIN {
            return Err(IdentityError::ChainTooLong(chain.len()));
        }
        let leaf = verify::parse(chain.first().ok_or(IdentityError::NoCertificate)?)?;
        let spiffe_id = verify::spiffe_id(&leaf)?;
        verify::check_leaf(&leaf, &spiffe_id)?;
        if spiffe_id.trust_domain() != self.trust_domain {
            return Err(IdentityError::UnknownTrustDomain(spiffe_id.trust_domain()));
        }
        if self.roots.is_empty() {
            return Err(IdentityError::EmptyBundle(self.trust_domain.clone()));
        }
        verify::check_path(chain, &self.roots, &spiffe_id, usage, now)?;
        Ok(ForeignIdentity { spiffe_id })
    }
}

fn root(key: &Map<String, Value>) -> Result<CertificateDer<'static>, String> {
    let certificates = key.get("x5c").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let [Value::String(text)] = certificates else {
        return Err(format!("x5c has {} certificates, exactly one is allowed", certificates.len()));
    };
    let der = STANDARD.decode(text).map_err(|e| format!("x5c is not base64: {e}"))?;
    let root = CertificateDer::from(der);
    let certificate = verify::parse(&root).map_err(|e| format!("x5c: {e}"))?;
    let constraints = certificate.basic_constraints().map_err(|e| format!("x5c: {e}"))?;
    if !constraints.is_some_and(|constraints| constraints.value.ca) {
        return Err("x5c is no CA".to_owned());
    }
    webpki::anchor_from_trusted_cert(&root).map_err(|e| format!("x5c can't be a trust anchor: {e}"))?;
    Ok(root)
}

/// `None` for a key of a type that is not known here.
fn jwt_key(mut key: Map<String, Value>) -> Result<Option<ForeignJwtKey>, String> {
    match key.get("kty").and_then(Value::as_str) {
        Some("EC" | "RSA") => {}
        _ => return Ok(None),
    }
    let kid = key.get("kid").and_then(Value::as_str).unwrap_or_default().to_owned();
    if kid.is_empty() || kid.len() > MAX_KEY_ID_BYTES {
        return Err(format!("a jwt-svid key needs a kid of 1 to {MAX_KEY_ID_BYTES} bytes"));
    }
    let modulus = key.get("n").and_then(Value::as_str).map(|n| URL_SAFE_NO_PAD.decode(n));
    if let Some(Ok(modulus)) = modulus
        && modulus.iter().skip_while(|byte| **byte == 0).count() < MIN_RSA_BYTES
    {
        return Err("an RSA key needs 2048 bits".to_owned());
    }
    key.retain(|name, _| PUBLIC_MEMBERS.contains(&name.as_str()));
    let key = ForeignJwtKey { kid, jwk: Value::Object(key) };
    key.decoding().map_err(|e| format!("the key does not read: {e}"))?;
    Ok(Some(key))
}

impl ForeignJwtKey {
    fn decoding(&self) -> Result<DecodingKey, String> {
        let jwk: Jwk = serde_json::from_value(self.jwk.clone()).map_err(|e| e.to_string())?;
        DecodingKey::from_jwk(&jwk).map_err(|e| e.to_string())
    }
}
