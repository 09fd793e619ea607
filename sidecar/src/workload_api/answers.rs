//! What the API's messages say, out of what is known. Pure.

use std::sync::Arc;

use prost_types::value::Kind;
use prost_types::{ListValue, Struct, Value};
use serde_json::Value as Json;
use tombolo_identity::jwt::{JwtAuthorities, jwks};
use tombolo_identity::{BundleSet, SpiffeId, TrustDomain};
use tombolo_overlay::member::workload::WorkloadSvid;
use tombolo_proto::spiffe;
use tonic::Status;

/// Everything that an answer is made of, at one moment.
pub(super) struct Known {
    pub own: SpiffeId,
    pub bundles: BundleSet,
    pub authorities: Arc<JwtAuthorities>,
    pub svid: Option<Arc<WorkloadSvid>>,
    /// The federator has ended the sidecar's connection because its identity is revoked.
    pub refused: bool,
    /// Seconds since the Unix epoch.
    pub unix: u64,
}

/// How the API names a trust domain.
fn key(domain: &TrustDomain) -> String {
    format!("spiffe://{}", domain.as_str())
}

impl Known {
    /// Refuses an application whose identity nobody accepts any more.
    pub fn check_entitled(&self) -> Result<(), Status> {
        if self.refused {
            return Err(Status::permission_denied(format!("{} is revoked", self.own)));
        }
        match self.bundles.revocations().of_id(&self.own) {
            Some(name) => Err(Status::permission_denied(format!("{} is revoked ({name})", self.own))),
            None => Ok(()),
        }
    }

    /// The roots of the own trust domain, DER in a row.
    fn roots(&self) -> Vec<u8> {
        let bundle = self.bundles.get(&self.own.trust_domain());
        bundle.into_iter().flat_map(|bundle| &bundle.roots).flat_map(|root| root.iter().copied()).collect()
    }

    pub fn x509_svid(&self) -> Result<spiffe::X509svidResponse, Status> {
        self.check_entitled()?;
        let svid = self.svid.as_ref().ok_or_else(|| {
            Status::unavailable("no SVID has been issued yet: the sidecar asks its federator")
        })?;
        if svid.not_after <= self.unix {
            return Err(Status::unavailable("the SVID has ended and no federator has renewed it yet"));
        }
        let svid = spiffe::X509svid {
            spiffe_id: svid.spiffe_id.to_string(),
            x509_svid: svid.chain.iter().flat_map(|der| der.iter().copied()).collect(),
            x509_svid_key: svid.key.to_vec(),
            bundle: self.roots(),
            hint: String::new(),
        };
        Ok(spiffe::X509svidResponse { svids: vec![svid], ..Default::default() })
    }

    pub fn x509_bundles(&self) -> Result<spiffe::X509BundlesResponse, Status> {
        self.check_entitled()?;
        let own = (key(&self.own.trust_domain()), self.roots());
        Ok(spiffe::X509BundlesResponse { bundles: [own].into(), ..Default::default() })
    }

    pub fn jwt_bundles(&self) -> Result<spiffe::JwtBundlesResponse, Status> {
        self.check_entitled()?;
        let own = (key(&self.own.trust_domain()), jwks(self.authorities.iter()).into_bytes());
        Ok(spiffe::JwtBundlesResponse { bundles: [own].into() })
    }

    /// Judges a token for `audience`.
    pub fn validate(
        &self,
        token: &str,
        audience: &str,
        now: std::time::Duration,
    ) -> Result<spiffe::ValidateJwtsvidResponse, Status> {
        self.check_entitled()?;
        if audience.is_empty() || token.is_empty() {
            return Err(Status::invalid_argument("an audience and a token are needed"));
        }
        let domain = self.own.trust_domain();
        let revocations = self.bundles.revocations();
        let verified = self.authorities.verify(token, audience, &domain, revocations, now);
        let verified = verified.map_err(|e| Status::invalid_argument(e.to_string()))?;
        Ok(spiffe::ValidateJwtsvidResponse {
            spiffe_id: verified.spiffe_id.to_string(),
            claims: Some(structure(verified.claims)),
        })
    }
}

fn structure(map: serde_json::Map<String, Json>) -> Struct {
    Struct { fields: map.into_iter().map(|(name, json)| (name, value(json))).collect() }
}

fn value(json: Json) -> Value {
    let kind = match json {
        Json::Null => Kind::NullValue(0),
        Json::Bool(it) => Kind::BoolValue(it),
        Json::Number(it) => Kind::NumberValue(it.as_f64().unwrap_or_default()),
        Json::String(it) => Kind::StringValue(it),
        // As deep as the parser lets it be: 128.
        Json::Array(it) => Kind::ListValue(ListValue { values: it.into_iter().map(value).collect() }),
        Json::Object(it) => Kind::StructValue(structure(it)),
    };
    Value { kind: Some(kind) }
}
