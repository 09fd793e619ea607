//! JWT-SVIDs: the keys that clusters sign them with, signing, and (in [`verify`](mod@verify)) judging.
//!
//! Each federator has signing keys of its own, apart from its CA's. An authority is the public half with the name of its
//! cluster, and its key ID is derived from both: no two clusters can have the same one. A verifier refuses a token
//! whose subject is not of its key's cluster, as it refuses a leaf outside its issuer's. ES256 only.

use std::time::Duration;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, ParsedPublicKey};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tombolo_model::names::ClusterName;
use zeroize::Zeroizing;

use crate::spiffe_id::SpiffeId;

pub mod verify;

pub use verify::{JwtAuthorities, JwtError, VerifiedJwt};

/// A token can't be called back once it is out: as short as SPIRE's.
pub const TOKEN_LIFE: Duration = Duration::from_secs(300);
/// An uncompressed point of P-256 (SEC 1 section 2.3.3).
const POINT_BYTES: usize = 65;
/// Audiences of one token.
pub const MAX_AUDIENCES: usize = 16;
pub const MAX_AUDIENCE_BYTES: usize = 512;

/// Why a key can't be used, or a token not be signed.
#[derive(Debug, thiserror::Error)]
pub enum JwtKeyError {
    #[error("a JWT authority's public key has {0} bytes, {POINT_BYTES} expected")]
    Length(usize),
    #[error("a JWT authority's public key is not a point of P-256")]
    Point,
    #[error("the JWT signing key can't be used: {0}")]
    Key(String),
    #[error("{id} lies outside cluster {cluster}")]
    OutsideCluster { id: SpiffeId, cluster: ClusterName },
    #[error("audience: {0}")]
    Audience(String),
    #[error("signing failed: {0}")]
    Sign(String),
}

/// A cluster's public key for JWT-SVIDs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct JwtAuthority {
    cluster: ClusterName,
    kid: String,
    point: [u8; POINT_BYTES],
}

impl JwtAuthority {
    /// `point`: uncompressed. One that is no point of the curve is refused: other readers would refuse the whole bundle.
    pub fn new(cluster: ClusterName, point: &[u8]) -> Result<Self, JwtKeyError> {
        let bytes: [u8; POINT_BYTES] = point.try_into().map_err(|_| JwtKeyError::Length(point.len()))?;
        ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, bytes).map_err(|_| JwtKeyError::Point)?;
        let mut hasher = Sha256::new();
        hasher.update(cluster.as_str());
        hasher.update([0]);
        hasher.update(bytes);
        let hash = hex::encode(hasher.finalize());
        let kid = format!("{cluster}-{}", hash.get(..32).unwrap_or_default());
        Ok(Self { cluster, kid, point: bytes })
    }

    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }
    pub fn kid(&self) -> &str {
        &self.kid
    }
    pub fn point(&self) -> &[u8] {
        &self.point
    }

    /// Both coordinates, base64url.
    fn coordinates(&self) -> (String, String) {
        let (x, y) = self.point.get(1..).unwrap_or_default().split_at((POINT_BYTES - 1) / 2);
        (URL_SAFE_NO_PAD.encode(x), URL_SAFE_NO_PAD.encode(y))
    }

    /// As a key of a JWKS document (RFC 7517; SPIFFE Trust Domain and Bundle, section 4.2.4). Readers skip members that
    /// they do not know: `tombolo_cluster` is whose subjects the key may sign.
    pub fn to_jwk(&self) -> Value {
        let (x, y) = self.coordinates();
        json!({
            "kty": "EC", "use": "jwt-svid", "kid": self.kid, "crv": "P-256", "x": x, "y": y,
            "alg": "ES256", "tombolo_cluster": self.cluster.as_str(),
        })
    }
}

/// A JWKS document of these authorities, as the Workload API hands it out.
pub fn jwks<'a>(authorities: impl IntoIterator<Item = &'a JwtAuthority>) -> String {
    let keys: Vec<Value> = authorities.into_iter().map(JwtAuthority::to_jwk).collect();
    json!({ "keys": keys }).to_string()
}

#[derive(Serialize)]
struct Claims<'a> {
    sub: &'a str,
    aud: &'a [String],
    iat: u64,
    exp: u64,
}

/// Signs for one cluster.
pub struct JwtSigner {
    authority: JwtAuthority,
    key: EncodingKey,
    pkcs8: Zeroizing<Vec<u8>>,
}

impl std::fmt::Debug for JwtSigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JwtSigner").field("authority", &self.authority).finish_non_exhaustive()
    }
}

impl JwtSigner {
    /// With a fresh key.
    pub fn generate(cluster: ClusterName) -> Result<Self, JwtKeyError> {
        let key =
            KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| JwtKeyError::Key(e.to_string()))?;
        Self::assemble(cluster, &key)
    }

    /// With a key that [`Self::pkcs8`] gave.
    pub fn from_pkcs8(cluster: ClusterName, pkcs8: &[u8]) -> Result<Self, JwtKeyError> {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pkcs8));
        let key = KeyPair::from_der_and_sign_algo(&key, &PKCS_ECDSA_P256_SHA256);
        Self::assemble(cluster, &key.map_err(|e| JwtKeyError::Key(e.to_string()))?)
    }

    fn assemble(cluster: ClusterName, key: &KeyPair) -> Result<Self, JwtKeyError> {
        let pkcs8 = Zeroizing::new(key.serialize_der());
        Ok(Self {
            authority: JwtAuthority::new(cluster, key.der_bytes())?,
            key: EncodingKey::from_ec_der(&pkcs8),
            pkcs8,
        })
    }

    pub fn authority(&self) -> &JwtAuthority {
        &self.authority
    }
    /// The private key, for the store.
    pub fn pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }

    /// A token for `id`, and when it ends (unix seconds).
    pub fn sign(
        &self,
        id: &SpiffeId,
        audience: &[String],
        now: Duration,
    ) -> Result<(String, u64), JwtKeyError> {
        if id.cluster().as_ref() != Some(&self.authority.cluster) {
            let cluster = self.authority.cluster.clone();
            return Err(JwtKeyError::OutsideCluster { id: id.clone(), cluster });
        }
        check_audience(audience)?;
        let exp = (now + TOKEN_LIFE).as_secs();
        let header = Header { kid: Some(self.authority.kid.clone()), ..Header::new(Algorithm::ES256) };
        let claims = Claims { sub: id.as_str(), aud: audience, iat: now.as_secs(), exp };
        let token = jsonwebtoken::encode(&header, &claims, &self.key);
        Ok((token.map_err(|e| JwtKeyError::Sign(e.to_string()))?, exp))
    }
}

/// An audience is demanded (JWT-SVID section 3.2), and bounded.
pub fn check_audience(audience: &[String]) -> Result<(), JwtKeyError> {
    let wrong = |reason: String| Err(JwtKeyError::Audience(reason));
    if audience.is_empty() {
        return wrong("none is given: name at least one, who the token is for".to_owned());
    }
    if audience.len() > MAX_AUDIENCES {
        return wrong(format!("{} are too many, at most {MAX_AUDIENCES}", audience.len()));
    }
    match audience.iter().find(|a| a.is_empty() || a.len() > MAX_AUDIENCE_BYTES) {
        Some(a) => wrong(format!("one of {} bytes: 1 to {MAX_AUDIENCE_BYTES} are allowed", a.len())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
