//! SPIFFE IDs and trust domains, parsed by the rules of the SPIFFE ID specification (section 2).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tombolo_model::names::ClusterName;

/// SPIFFE-ID section 2.3: implementations support at least this many bytes; more is refused.
pub const MAX_ID_BYTES: usize = 2048;
const MAX_TRUST_DOMAIN_BYTES: usize = 255;

/// Why a SPIFFE ID was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    #[error("SPIFFE ID has {0} bytes, at most {MAX_ID_BYTES}")]
    TooLong(usize),
    #[error("{0:?} does not start with spiffe://")]
    Scheme(String),
    #[error("trust domain {0:?}: give 1 to 255 of a-z, 0-9, '.', '-', '_' (no port, no user)")]
    TrustDomain(String),
    #[error(
        "path of {0:?}: segments of a-z, A-Z, 0-9, '.', '-', '_', none empty, '.' or '..', no trailing slash"
    )]
    Path(String),
}

fn quoted(s: &str) -> String {
    s.chars().take(100).collect()
}

/// A trust domain: one per federation.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}
impl FromStr for TrustDomain {
    type Err = SpiffeIdError;
    fn from_str(s: &str) -> Result<Self, SpiffeIdError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        if s.is_empty() || s.len() > MAX_TRUST_DOMAIN_BYTES || !s.bytes().all(allowed) {
            return Err(SpiffeIdError::TrustDomain(quoted(s)));
        }
        Ok(Self(s.into()))
    }
}

/// A SPIFFE ID: trust domain and path.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    uri: Arc<str>,
    /// Where the path starts.
    path_at: usize,
}

const SCHEME: &str = "spiffe://";

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;
    fn from_str(s: &str) -> Result<Self, SpiffeIdError> {
        if s.len() > MAX_ID_BYTES {
            return Err(SpiffeIdError::TooLong(s.len()));
        }
        let rest = s.strip_prefix(SCHEME).ok_or_else(|| SpiffeIdError::Scheme(quoted(s)))?;
        let slash = rest.find('/').unwrap_or(rest.len());
        let (domain, path) = rest.split_at(slash);
        domain.parse::<TrustDomain>()?;
        let segment = |seg: &str| {
            !matches!(seg, "" | "." | "..")
                && seg.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
        };
        if let Some(path) = path.strip_prefix('/')
            && !path.split('/').all(segment)
        {
            return Err(SpiffeIdError::Path(quoted(s)));
        }
        Ok(Self { uri: s.into(), path_at: SCHEME.len() + slash })
    }
}

impl SpiffeId {
    fn build(domain: &TrustDomain, path: fmt::Arguments<'_>) -> Result<Self, SpiffeIdError> {
        format!("{SCHEME}{}{path}", domain.as_str()).parse()
    }
    /// `spiffe://<td>/cluster/<cluster>/ns/<namespace>/sa/<account>`.
    pub fn workload(
        domain: &TrustDomain,
        cluster: &ClusterName,
        namespace: &str,
        account: &str,
    ) -> Result<Self, SpiffeIdError> {
        Self::build(domain, format_args!("/cluster/{cluster}/ns/{namespace}/sa/{account}"))
    }
    /// `spiffe://<td>/cluster/<cluster>/vm/<name>`.
    pub fn vm(domain: &TrustDomain, cluster: &ClusterName, name: &str) -> Result<Self, SpiffeIdError> {
        Self::build(domain, format_args!("/cluster/{cluster}/vm/{name}"))
    }
    /// `spiffe://<td>/cluster/<cluster>/gateway/<name>`.
    pub fn gateway(domain: &TrustDomain, cluster: &ClusterName, name: &str) -> Result<Self, SpiffeIdError> {
        Self::build(domain, format_args!("/cluster/{cluster}/gateway/{name}"))
    }
    /// `spiffe://<td>/cluster/<cluster>/federator`.
    pub fn federator(domain: &TrustDomain, cluster: &ClusterName) -> Result<Self, SpiffeIdError> {
        Self::build(domain, format_args!("/cluster/{cluster}/federator"))
    }

    pub fn as_str(&self) -> &str {
        &self.uri
    }
    pub fn trust_domain(&self) -> TrustDomain {
        TrustDomain(self.uri.get(SCHEME.len()..self.path_at).unwrap_or_default().into())
    }
    /// With its leading slash; empty for a trust domain's own ID.
    pub fn path(&self) -> &str {
        self.uri.get(self.path_at..).unwrap_or_default()
    }
    /// The `<name>` of `/cluster/<name>/...`.
    pub fn cluster(&self) -> Option<ClusterName> {
        let mut segments = self.path().split('/').skip(1);
        if segments.next() != Some("cluster") {
            return None;
        }
        let name = segments.next()?.parse().ok()?;
        segments.next().map(|_| name)
    }
    /// The path after `/cluster/<name>`, e.g. `/gateway/gw-1`.
    pub fn within_cluster(&self) -> Option<&str> {
        self.cluster()?;
        let rest = self.path().strip_prefix("/cluster/")?;
        rest.find('/').and_then(|at| rest.get(at..))
    }
}

macro_rules! text {
    ($name:ty, $text:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.$text())
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(self.$text(), f)
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(self.$text())
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
text!(SpiffeId, as_str);
text!(TrustDomain, as_str);
