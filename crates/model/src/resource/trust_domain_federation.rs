//! `TrustDomainFederation` (tombolo.dev/v1alpha1, cluster-scoped): a foreign trust domain, where its bundle is fetched, and
//! which workloads are told of it. Shaped after SPIRE's `ClusterFederatedTrustDomain`.
//!
//! Nothing is inferred (SPIFFE Federation, section 5): trust domain, URL and profile are given, and for `https_spiffe` the
//! endpoint's identity too. Being federated admits nobody anywhere: that is an `AccessPolicy`'s to say.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::FieldError;
use super::schema::{CLUSTER_OR_SELF, LABEL_OR_ANY, SUBDOMAIN_OR_ANY};
use crate::names::{ClusterName, Namespace, ObjectName};

/// SPIFFE-ID section 2.1 and 2.3.
const MAX_TRUST_DOMAIN_BYTES: usize = 255;
const MAX_ID_BYTES: usize = 2048;
const MAX_URL_BYTES: usize = 2048;
/// Of one list.
const MAX_NAMES: usize = 256;
/// As the federator reads them (`tombolo_identity::foreign::MAX_BUNDLE_BYTES`).
const MAX_BUNDLE_BYTES: usize = 64 * 1024;
const HTTPS_PORT: u16 = 443;

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("required" = ["trustDomain", "bundleEndpointURL", "bundleEndpointProfile"]))]
pub struct TrustDomainFederationSpec {
    /// The foreign trust domain.
    #[serde(default)]
    #[schemars(length(max = 255), regex(pattern = r"^[a-z0-9._-]+$"))]
    pub trust_domain: String,
    #[serde(default, rename = "bundleEndpointURL")]
    #[schemars(
        length(max = 2048),
        regex(
            pattern = r#"^https://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]{1,253})(:[0-9]{1,5})?([/?][!$-;=?A-\[\]-~]*)?$"#
        )
    )]
    pub bundle_endpoint_url: String,
    #[serde(default)]
    pub bundle_endpoint_profile: BundleEndpointProfile,
    /// Its bundle to begin with, a JWKS document. Applying another one replaces what was fetched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 65536))]
    pub trust_domain_bundle: Option<String>,
    /// The clusters in which this holds, `@self` for any: absent, in each to which it is applied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(max = 127), regex(pattern = CLUSTER_OR_SELF)))]
    pub clusters: Vec<String>,
    #[serde(default)]
    pub workloads: FederatedWorkloads,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("required" = ["type"], "x-kubernetes-validations" = [
    { "rule": "self.type != 'https_web' || !has(self.endpointSPIFFEID)",
      "message": "with https_web the URL's name is verified: leave it out", "fieldPath": ".endpointSPIFFEID" },
    { "rule": "self.type != 'https_spiffe' || has(self.endpointSPIFFEID)",
      "message": "give the SPIFFE ID of the endpoint, such as spiffe://partner.example/spire/server", "fieldPath": ".endpointSPIFFEID" },
]))]
pub struct BundleEndpointProfile {
    /// `https_web` or `https_spiffe`.
    #[serde(default, rename = "type")]
    #[schemars(extend("enum" = ["https_web", "https_spiffe"]))]
    pub profile: String,
    #[serde(default, rename = "endpointSPIFFEID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048), regex(pattern = r"^spiffe://[a-z0-9._-]+(/[A-Za-z0-9._-]+)+$"))]
    pub endpoint_spiffe_id: Option<String>,
}

/// Whose Workload API shows the bundle; `*`: all.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FederatedWorkloads {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(max = 63), regex(pattern = LABEL_OR_ANY)))]
    pub namespaces: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(max = 253), regex(pattern = SUBDOMAIN_OR_ANY)))]
    pub machines: Vec<String>,
}

impl FederatedWorkloads {
    pub fn include_namespace(&self, namespace: &str) -> bool {
        self.namespaces.iter().any(|named| named == "*" || named == namespace)
    }
    pub fn include_machine(&self, machine: &str) -> bool {
        self.machines.iter().any(|named| named == "*" || named == machine)
    }
}

/// Where a bundle is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointUrl {
    /// A DNS name, or an address (an IPv6 one without brackets).
    pub host: String,
    pub port: u16,
    /// As it stands in the URL: what the `Host` header says.
    pub authority: String,
    /// With its leading slash, and the query.
    pub path: String,
}

impl EndpointUrl {
    /// Only `https`; no user, no fragment.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let rest = text.strip_prefix("https://").ok_or("an URL that begins with https://")?;
        if text.len() > MAX_URL_BYTES || !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err("an URL of at most 2048 printable ASCII characters");
        }
        if rest.contains(['#', '@', '\\', '"', '<', '>']) {
            return Err("an URL without user, fragment, quotes and backslashes");
        }
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let (host, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, port)) => (host, port.strip_prefix(':').or(port.is_empty().then_some(""))),
            None => authority.split_once(':').map_or((authority, Some("")), |(h, p)| (h, Some(p))),
        };
        let port = match port {
            Some("") if !authority.ends_with(':') => HTTPS_PORT,
            Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or("a port of 1 to 65535")?,
            None => return Err("[IPV6]:PORT"),
        };
        let name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        let is_v6 = authority.starts_with('[');
        let known = if is_v6 { host.parse::<std::net::Ipv6Addr>().is_ok() } else { host.bytes().all(name) };
        if host.is_empty() || host.len() > 253 || !known {
            return Err("an URL with a host name or address");
        }
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        Ok(Self { host: host.to_owned(), port, authority: authority.to_owned(), path })
    }
}

/// The trust domain of a SPIFFE ID with a path.
fn domain_of(id: &str) -> Option<&str> {
    let (domain, path) = id.strip_prefix("spiffe://")?.split_once('/')?;
    let segment = |s: &str| {
        !matches!(s, "" | "." | "..")
            && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
    };
    (is_trust_domain(domain) && id.len() <= MAX_ID_BYTES && path.split('/').all(segment)).then_some(domain)
}

fn is_trust_domain(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
    !text.is_empty() && text.len() <= MAX_TRUST_DOMAIN_BYTES && text.bytes().all(allowed)
}

impl TrustDomainFederationSpec {
    pub fn is_https_spiffe(&self) -> bool {
        self.bundle_endpoint_profile.profile == "https_spiffe"
    }

    /// Whether it is in force in this cluster.
    pub fn holds_in(&self, cluster: &ClusterName) -> bool {
        let named = |name: &String| name == "@self" || name == cluster.as_str();
        self.clusters.is_empty() || self.clusters.iter().any(named)
    }

    /// The trust domain by whose bundle the endpoint proves itself; `None` for `https_web`.
    pub fn endpoint_trust_domain(&self) -> Option<&str> {
        let id = self.bundle_endpoint_profile.endpoint_spiffe_id.as_deref();
        id.filter(|_| self.is_https_spiffe()).and_then(domain_of)
    }

    pub(super) fn validate(&self, errors: &mut Vec<FieldError>) {
        let Self { trust_domain, bundle_endpoint_url, .. } = self;
        if !is_trust_domain(trust_domain) {
            let expected =
                "a trust domain such as partner.example: a-z, 0-9, '.', '-' and '_', without spiffe://";
            errors.push(FieldError::new("spec.trustDomain", trust_domain, expected));
        }
        if let Err(expected) = EndpointUrl::parse(bundle_endpoint_url) {
            let expected = format!("{expected}, such as https://spire.partner.example:8443/");
            errors.push(FieldError::new("spec.bundleEndpointURL", bundle_endpoint_url, expected));
        }
        self.validate_profile(errors);
        if let Some(bundle) = &self.trust_domain_bundle
            && bundle.len() > MAX_BUNDLE_BYTES
        {
            let found = format!("{} bytes", bundle.len());
            let expected = format!("a bundle of at most {MAX_BUNDLE_BYTES} bytes");
            errors.push(FieldError::new("spec.trustDomainBundle", found, expected));
        }
        let Self { clusters, workloads: FederatedWorkloads { namespaces, machines }, .. } = self;
        let cluster = |name: &str| name == "@self" || name.parse::<ClusterName>().is_ok();
        names("spec.clusters", clusters, "a cluster's name or @self", cluster, errors);
        let namespace = |name: &str| name == "*" || name.parse::<Namespace>().is_ok();
        names("spec.workloads.namespaces", namespaces, "a namespace or *", namespace, errors);
        let machine = |name: &str| name == "*" || name.parse::<ObjectName>().is_ok();
        names("spec.workloads.machines", machines, "a machine's name or *", machine, errors);
    }

    fn validate_profile(&self, errors: &mut Vec<FieldError>) {
        let BundleEndpointProfile { profile, endpoint_spiffe_id } = &self.bundle_endpoint_profile;
        let path = "spec.bundleEndpointProfile.endpointSPIFFEID";
        match (profile.as_str(), endpoint_spiffe_id) {
            ("https_web", None) => {}
            ("https_web", Some(id)) => {
                errors.push(FieldError::new(path, id, "nothing: with https_web the URL's name is verified"));
            }
            ("https_spiffe", Some(id)) if domain_of(id).is_some() => {}
            ("https_spiffe", id) => {
                let expected = "the SPIFFE ID of the endpoint, such as spiffe://partner.example/spire/server";
                errors.push(FieldError::new(path, id.as_deref().unwrap_or_default(), expected));
            }
            (other, _) => {
                let path = "spec.bundleEndpointProfile.type";
                errors.push(FieldError::new(path, other, "https_web or https_spiffe"));
            }
        }
    }

    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.workloads == FederatedWorkloads::default() {
            warnings.push(
                "spec.workloads names nobody: the bundle is fetched, and no workload is told of it"
                    .to_owned(),
            );
        }
        if self.endpoint_trust_domain() == Some(self.trust_domain.as_str())
            && self.trust_domain_bundle.is_none()
        {
            warnings.push("spec.trustDomainBundle is missing: without a first bundle an https_spiffe endpoint of the same trust domain can't prove itself".to_owned());
        }
        warnings
    }
}

fn names(
    path: &str,
    list: &[String],
    expected: &str,
    known: impl Fn(&str) -> bool,
    errors: &mut Vec<FieldError>,
) {
    if list.len() > MAX_NAMES {
        errors.push(FieldError::new(path, format!("{} entries", list.len()), format!("at most {MAX_NAMES}")));
        return;
    }
    for (index, name) in list.iter().enumerate().filter(|(_, name)| !known(name)) {
        errors.push(FieldError::new(format!("{path}[{index}]"), name, expected));
    }
}

#[cfg(test)]
mod tests;
