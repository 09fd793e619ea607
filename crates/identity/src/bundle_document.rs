//! A trust domain's bundle as foreign readers get it: a JWKS document with X.509 roots and JWT authorities (SPIFFE Trust
//! Domain and Bundle, section 4).
//!
//! Each key is a whole JWK: readers parse public keys as well as `x5c`. A root whose key can't be written so is an error, not
//! an omission: a bundle without it would say that it is trusted no more.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use rustls_pki_types::CertificateDer;
use serde_json::{Value, json};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::public_key::PublicKey;

use crate::jwt::JwtAuthority;

/// As often as the specification has readers ask by default.
pub const REFRESH_HINT_SECONDS: u64 = 300;

/// A root that can't be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("root {index} of the trust bundle can't be written as a JWK: {reason}")]
pub struct RootKeyError {
    pub index: usize,
    pub reason: String,
}

/// The keys of the document, in order: roots, then JWT authorities.
pub fn keys<'a>(
    roots: &[CertificateDer<'_>],
    authorities: impl IntoIterator<Item = &'a JwtAuthority>,
) -> Result<Vec<Value>, RootKeyError> {
    let mut keys = Vec::new();
    for (index, root) in roots.iter().enumerate() {
        keys.push(x509_key(root).map_err(|reason| RootKeyError { index, reason })?);
    }
    keys.extend(authorities.into_iter().map(JwtAuthority::to_jwk));
    Ok(keys)
}

/// The document. `sequence` grows whenever the keys change.
pub fn document(keys: &[Value], sequence: u64) -> String {
    let hint = REFRESH_HINT_SECONDS;
    json!({ "keys": keys, "spiffe_sequence": sequence, "spiffe_refresh_hint": hint }).to_string()
}

fn x509_key(root: &CertificateDer<'_>) -> Result<Value, String> {
    let (_, certificate) = X509Certificate::from_der(root).map_err(|e| e.to_string())?;
    let mut key = match certificate.public_key().parsed().map_err(|e| e.to_string())? {
        PublicKey::EC(point) => {
            let (curve, half) = match point.key_size() {
                256 => ("P-256", 32),
                384 => ("P-384", 48),
                bits => return Err(format!("a curve of {bits} bits")),
            };
            let coordinates = point.data().strip_prefix(&[4]).and_then(|c| c.split_at_checked(half));
            let (x, y) = coordinates.ok_or("a compressed point")?;
            json!({ "kty": "EC", "crv": curve, "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y) })
        }
        PublicKey::RSA(key) => {
            // JWK numbers have no leading zero (RFC 7518 section 2).
            let number = |bytes: &[u8]| {
                let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
                URL_SAFE_NO_PAD.encode(bytes.get(zeros..).unwrap_or_default())
            };
            json!({ "kty": "RSA", "n": number(key.modulus), "e": number(key.exponent) })
        }
        _ => return Err("neither an EC nor an RSA key".to_owned()),
    };
    key["use"] = json!("x509-svid");
    key["x5c"] = json!([STANDARD.encode(root)]);
    Ok(key)
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519};

    use super::*;
    use crate::bundle::TrustBundle;
    use crate::jwt::JwtSigner;

    fn root(algorithm: &'static rcgen::SignatureAlgorithm) -> CertificateDer<'static> {
        let key = KeyPair::generate_for(algorithm).unwrap();
        CertificateParams::default().self_signed(&key).unwrap().der().clone()
    }

    #[test]
    fn a_document_has_whole_keys_and_reads_back() {
        let roots = [root(&PKCS_ECDSA_P256_SHA256), root(&PKCS_ECDSA_P384_SHA384)];
        let signer = JwtSigner::generate("east".parse().unwrap()).unwrap();
        let keys = keys(&roots, [signer.authority()]).unwrap();
        assert_eq!(keys.len(), 3);
        assert!(keys.iter().all(|key| key["x"].is_string() && key["y"].is_string()));
        let text = document(&keys, 7);
        let read = TrustBundle::from_json("a.example".parse().unwrap(), &text).unwrap();
        assert_eq!((read.sequence, read.roots.as_slice()), (7, roots.as_slice()));
        let error = super::keys(&[roots[0].clone(), root(&PKCS_ED25519)], []).unwrap_err();
        assert_eq!(error.index, 1);
    }
}
