//! Judging a JWT-SVID (JWT-SVID specification, section 3 and 4). Time is passed in.
//!
//! Rules, in order: size; algorithm, type and key ID of the header; a known key and its signature; subject a SPIFFE ID
//! of the trust domain and of the key's cluster; not expired, not issued in the future; the audience; not revoked.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jsonwebtoken::{Algorithm, DecodingKey, Header, Validation};
use serde_json::{Map, Value};
use tombolo_model::names::ClusterName;

use super::JwtAuthority;
use crate::revocation::Revocations;
use crate::spiffe_id::{SpiffeId, TrustDomain};

/// A token with a few audiences has 500 bytes.
pub const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// Clocks of a judge and a federator that differ a little; the specification asks for little.
const LEEWAY: Duration = Duration::from_secs(60);

/// Why a token was refused, one variant per rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JwtError {
    #[error("the token has {0} bytes, at most {MAX_TOKEN_BYTES}")]
    TooLarge(usize),
    #[error("the token does not parse: {0}")]
    Malformed(String),
    #[error("the token is signed with {0}, which is not accepted: {1}")]
    Algorithm(String, &'static str),
    #[error("the token's type is {0:?}, JWT or JOSE is expected")]
    Type(String),
    #[error("the token names no key")]
    NoKeyId,
    #[error("no JWT authority {0:?} is known")]
    UnknownKey(String),
    #[error("the token's signature does not hold")]
    Signature,
    #[error("the token's subject is not a SPIFFE ID: {0}")]
    Subject(String),
    #[error("{id} is not of trust domain {trust_domain}")]
    TrustDomain { id: SpiffeId, trust_domain: TrustDomain },
    #[error("{id} lies outside the cluster of the key that signed, {cluster}")]
    WrongCluster { id: SpiffeId, cluster: ClusterName },
    #[error("the token has no {0}")]
    Missing(&'static str),
    #[error("the token of {0} has expired")]
    Expired(SpiffeId),
    #[error("the token of {0} is not valid yet")]
    NotYetValid(SpiffeId),
    #[error("the token of {id} is not for {audience:?}")]
    Audience { id: SpiffeId, audience: String },
    #[error("{id} is revoked ({revocation})")]
    Revoked { id: SpiffeId, revocation: Arc<str> },
}

impl JwtError {
    /// A metric label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::TooLarge(_) => "too_large",
            Self::Malformed(_) => "malformed",
            Self::Algorithm(..) => "algorithm",
            Self::Type(_) => "type",
            Self::NoKeyId | Self::UnknownKey(_) => "unknown_key",
            Self::Signature => "signature",
            Self::Subject(_) => "subject",
            Self::TrustDomain { .. } => "trust_domain",
            Self::WrongCluster { .. } => "wrong_cluster",
            Self::Missing(_) => "missing",
            Self::Expired(_) => "expired",
            Self::NotYetValid(_) => "not_yet_valid",
            Self::Audience { .. } => "audience",
            Self::Revoked { .. } => "revoked",
        }
    }
}

/// A token that holds.
#[derive(Debug, Clone, PartialEq)]
pub struct VerifiedJwt {
    pub spiffe_id: SpiffeId,
    pub claims: Map<String, Value>,
}

/// The authorities of a trust domain, by key ID.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JwtAuthorities(BTreeMap<String, JwtAuthority>);

impl JwtAuthorities {
    pub fn new(authorities: impl IntoIterator<Item = JwtAuthority>) -> Self {
        Self(authorities.into_iter().map(|authority| (authority.kid.clone(), authority)).collect())
    }
    pub fn iter(&self) -> impl Iterator<Item = &JwtAuthority> {
        self.0.values()
    }
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Judges a token for one audience.
    pub fn verify(
        &self,
        token: &str,
        audience: &str,
        trust_domain: &TrustDomain,
        revocations: &Revocations,
        now: Duration,
    ) -> Result<VerifiedJwt, JwtError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(JwtError::TooLarge(token.len()));
        }
        let authority = self.authority_of(token)?;
        let claims = signed_claims(token, authority)?;
        let subject = claims.get("sub").and_then(Value::as_str).ok_or(JwtError::Missing("sub"))?;
        let id: SpiffeId =
            subject.parse().map_err(|e: crate::spiffe_id::SpiffeIdError| JwtError::Subject(e.to_string()))?;
        if id.trust_domain() != *trust_domain {
            return Err(JwtError::TrustDomain { id, trust_domain: trust_domain.clone() });
        }
        if id.cluster().as_ref() != Some(authority.cluster()) {
            return Err(JwtError::WrongCluster { id, cluster: authority.cluster().clone() });
        }
        check_time(&claims, &id, now)?;
        if !audiences(&claims).any(|found| found == audience) {
            return Err(JwtError::Audience { id, audience: audience.to_owned() });
        }
        match revocations.of_id(&id) {
            Some(revocation) => Err(JwtError::Revoked { id, revocation: Arc::clone(revocation) }),
            None => Ok(VerifiedJwt { spiffe_id: id, claims }),
        }
    }

    /// The authority that the token's header names.
    fn authority_of(&self, token: &str) -> Result<&JwtAuthority, JwtError> {
        let header = jsonwebtoken::decode_header(token).map_err(|e| JwtError::Malformed(e.to_string()))?;
        if header.alg != Algorithm::ES256 {
            return Err(JwtError::Algorithm(format!("{:?}", header.alg), "ES256 is"));
        }
        let kid = key_id(&header)?;
        self.0.get(kid).ok_or_else(|| unknown_key(kid))
    }
}

/// The key that a header names; its type must be a token's.
pub(crate) fn key_id(header: &Header) -> Result<&str, JwtError> {
    match header.typ.as_deref() {
        None | Some("JWT" | "JOSE") => header.kid.as_deref().ok_or(JwtError::NoKeyId),
        Some(other) => Err(JwtError::Type(other.chars().take(40).collect())),
    }
}

pub(crate) fn unknown_key(kid: &str) -> JwtError {
    JwtError::UnknownKey(kid.chars().take(200).collect())
}

/// The claims of a token that `authority` has signed.
fn signed_claims(token: &str, authority: &JwtAuthority) -> Result<Map<String, Value>, JwtError> {
    let (x, y) = authority.coordinates();
    let key = DecodingKey::from_ec_components(&x, &y).map_err(|_| JwtError::Signature)?;
    claims_signed_with(token, &key, Algorithm::ES256)
}

/// The claims of a token that the holder of `key` has signed.
pub(crate) fn claims_signed_with(
    token: &str,
    key: &DecodingKey,
    algorithm: Algorithm,
) -> Result<Map<String, Value>, JwtError> {
    // Signature alone: the rest is judged here, by the caller's clock.
    let mut validation = Validation::new(algorithm);
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.validate_aud = false;
    let decoded = jsonwebtoken::decode::<Map<String, Value>>(token, key, &validation);
    decoded.map(|data| data.claims).map_err(|error| match error.kind() {
        jsonwebtoken::errors::ErrorKind::InvalidSignature
        | jsonwebtoken::errors::ErrorKind::InvalidAlgorithm => JwtError::Signature,
        _ => JwtError::Malformed(error.to_string()),
    })
}

pub(crate) fn check_time(claims: &Map<String, Value>, id: &SpiffeId, now: Duration) -> Result<(), JwtError> {
    let seconds = |claim: &str| claims.get(claim).and_then(Value::as_f64);
    let (now, leeway) = (now.as_secs_f64(), LEEWAY.as_secs_f64());
    let exp = seconds("exp").ok_or(JwtError::Missing("exp"))?;
    if now >= exp + leeway {
        return Err(JwtError::Expired(id.clone()));
    }
    let late = |claim| seconds(claim).is_some_and(|at| at > now + leeway);
    if late("nbf") || late("iat") { Err(JwtError::NotYetValid(id.clone())) } else { Ok(()) }
}

/// One or several (RFC 7519 section 4.1.3).
pub(crate) fn audiences(claims: &Map<String, Value>) -> impl Iterator<Item = &str> {
    let (one, several) = match claims.get("aud") {
        Some(Value::String(one)) => (Some(one.as_str()), [].as_slice()),
        Some(Value::Array(several)) => (None, several.as_slice()),
        _ => (None, [].as_slice()),
    };
    one.into_iter().chain(several.iter().filter_map(Value::as_str))
}
