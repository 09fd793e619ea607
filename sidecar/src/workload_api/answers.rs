//! What the API's messages say, out of what is known. Pure.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use prost_types::value::Kind;
use prost_types::{ListValue, Struct, Value};
use rustls::pki_types::CertificateDer;
use serde_json::Value as Json;
use tombolo_identity::foreign::jwt::claimed_trust_domain;
use tombolo_identity::jwt::{JwtAuthorities, jwks};
use tombolo_identity::{BundleSet, ForeignBundle, SpiffeId, TrustDomain};
use tombolo_overlay::member::workload::WorkloadSvid;
use tombolo_proto::spiffe;
use tonic::Status;

use crate::access::Access;

/// Everything that an answer is made of, at one moment.
pub(super) struct Known {
    pub own: SpiffeId,
    pub bundles: BundleSet,
    pub authorities: Arc<JwtAuthorities>,
    /// Foreign trust domains that this workload is told of.
    pub federated: Arc<BTreeMap<TrustDomain, ForeignBundle>>,
    /// Of the authority above the cluster's CA: of the own trust domain too.
    pub upstream_roots: Arc<[CertificateDer<'static>]>,
    /// Who may call what is served here; `None` before any configuration: no foreigner.
    pub access: Option<Arc<Access>>,
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
        let roots = bundle.into_iter().flat_map(|bundle| &bundle.roots).chain(self.upstream_roots.iter());
        roots.flat_map(|root| root.iter().copied()).collect()
    }

    /// Foreign bundles; a federator would have to be broken to send one of the own trust domain.
    fn federated(&self) -> impl Iterator<Item = (&TrustDomain, &ForeignBundle)> {
        let own = self.own.trust_domain();
        self.federated.iter().filter(move |(domain, _)| **domain != own)
    }

    /// Their roots, DER in a row. One without is left out: readers take it for an error, and absence says the same.
    fn federated_roots(&self) -> HashMap<String, Vec<u8>> {
        let with_roots = self.federated().filter(|(_, bundle)| !bundle.roots().is_empty());
        let roots =
            |bundle: &ForeignBundle| bundle.roots().iter().flat_map(|der| der.iter().copied()).collect();
        with_roots.map(|(domain, bundle)| (key(domain), roots(bundle))).collect()
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
        let federated_bundles = self.federated_roots();
        Ok(spiffe::X509svidResponse { svids: vec![svid], federated_bundles, ..Default::default() })
    }

    pub fn x509_bundles(&self) -> Result<spiffe::X509BundlesResponse, Status> {
        self.check_entitled()?;
        let mut bundles = self.federated_roots();
        bundles.insert(key(&self.own.trust_domain()), self.roots());
        Ok(spiffe::X509BundlesResponse { bundles, ..Default::default() })
    }

    pub fn jwt_bundles(&self) -> Result<spiffe::JwtBundlesResponse, Status> {
        self.check_entitled()?;
        let with_keys = self.federated().filter(|(_, bundle)| bundle.jwt_keys() > 0);
        let mut bundles: HashMap<_, _> =
            with_keys.map(|(domain, bundle)| (key(domain), bundle.jwks().into_bytes())).collect();
        bundles.insert(key(&self.own.trust_domain()), jwks(self.authorities.iter()).into_bytes());
        Ok(spiffe::JwtBundlesResponse { bundles })
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
        if let Some(foreign) = claimed_trust_domain(token).filter(|claimed| *claimed != domain) {
            return self.validate_foreign(&foreign, token, audience, now);
        }
        let revocations = self.bundles.revocations();
        let verified = self.authorities.verify(token, audience, &domain, revocations, now);
        let verified = verified.map_err(|e| Status::invalid_argument(e.to_string()))?;
        Ok(spiffe::ValidateJwtsvidResponse {
            spiffe_id: verified.spiffe_id.to_string(),
            claims: Some(structure(verified.claims)),
        })
    }
}

impl Known {
    /// A token of a foreign trust domain: its keys are held, and a policy of a service here names whom it is about.
    fn validate_foreign(
        &self,
        domain: &TrustDomain,
        token: &str,
        audience: &str,
        now: std::time::Duration,
    ) -> Result<spiffe::ValidateJwtsvidResponse, Status> {
        let bundle = self.federated.get(domain).ok_or_else(|| {
            Status::invalid_argument(format!("no bundle of trust domain {domain} is known to this workload"))
        })?;
        let verified = bundle.verify_jwt(token, audience, now);
        let verified = verified.map_err(|e| Status::invalid_argument(e.to_string()))?;
        let id = &verified.spiffe_id;
        if !self.access.as_ref().is_some_and(|access| access.admits_foreign(id)) {
            return Err(Status::permission_denied(format!(
                "{id} is of a foreign trust domain, and no AccessPolicy of a service here admits it by its name"
            )));
        }
        Ok(spiffe::ValidateJwtsvidResponse {
            spiffe_id: id.to_string(),
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
