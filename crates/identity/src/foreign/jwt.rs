//! Judging a JWT-SVID of a foreign trust domain (JWT-SVID specification, sections 3 and 4).

use std::time::Duration;

use jsonwebtoken::Algorithm;
use serde_json::Value;

use super::ForeignBundle;
use crate::jwt::verify::{
    JwtError, MAX_TOKEN_BYTES, VerifiedJwt, audiences, check_time, claims_signed_with, key_id, unknown_key,
};
use crate::spiffe_id::{SpiffeId, SpiffeIdError, TrustDomain};

/// JWT-SVID section 2.1, as far as the library verifies them: ES512 is not among those.
const ACCEPTED: [Algorithm; 8] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
];

/// The trust domain that a token claims to be of: which bundle to judge it by. Nothing is verified.
pub fn claimed_trust_domain(token: &str) -> Option<TrustDomain> {
    use base64::Engine;
    if token.len() > MAX_TOKEN_BYTES {
        return None;
    }
    let payload = token.split('.').nth(1)?;
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload).ok()?;
    let claims: Value = serde_json::from_slice(&bytes).ok()?;
    Some(claims.get("sub")?.as_str()?.parse::<SpiffeId>().ok()?.trust_domain())
}

impl ForeignBundle {
    /// Judges a token of this trust domain for one audience.
    pub fn verify_jwt(&self, token: &str, audience: &str, now: Duration) -> Result<VerifiedJwt, JwtError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(JwtError::TooLarge(token.len()));
        }
        let header = jsonwebtoken::decode_header(token).map_err(|e| JwtError::Malformed(e.to_string()))?;
        if !ACCEPTED.contains(&header.alg) {
            let expected = "RS256 to RS512, PS256 to PS512, ES256 and ES384 are";
            return Err(JwtError::Algorithm(format!("{:?}", header.alg), expected));
        }
        let kid = key_id(&header)?;
        let key = self.jwt_keys.iter().find(|key| key.kid == kid).ok_or_else(|| unknown_key(kid))?;
        let key = key.decoding().map_err(|_| JwtError::Signature)?;
        let claims = claims_signed_with(token, &key, header.alg)?;
        let subject = claims.get("sub").and_then(Value::as_str).ok_or(JwtError::Missing("sub"))?;
        let id: SpiffeId = subject.parse().map_err(|e: SpiffeIdError| JwtError::Subject(e.to_string()))?;
        if id.trust_domain() != self.trust_domain {
            return Err(JwtError::TrustDomain { id, trust_domain: self.trust_domain.clone() });
        }
        check_time(&claims, &id, now)?;
        if !audiences(&claims).any(|found| found == audience) {
            return Err(JwtError::Audience { id, audience: audience.to_owned() });
        }
        Ok(VerifiedJwt { spiffe_id: id, claims })
    }
}
