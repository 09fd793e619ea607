//! Names that can't be wrong: parsed once at the edge, newtypes inside.
//!
//! Every name follows an RFC 1123 rule, because each ends up in a DNS name, a SPIFFE path or a Kubernetes object.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a name was refused. The message names the field's kind, the value and what would be accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("{kind} is empty; give {expects}")]
    Empty { kind: &'static str, expects: &'static str },
    #[error("{kind} {value:?} is too long ({len} bytes, at most {max})")]
    TooLong { kind: &'static str, value: String, len: usize, max: usize },
    #[error("{kind} {value:?} is not valid: {expects}")]
    Invalid { kind: &'static str, value: String, expects: &'static str },
}

const LABEL_RULE: &str =
    "lower-case letters, digits and '-', starting and ending with a letter or digit (RFC 1123 label)";
const SUBDOMAIN_RULE: &str = "RFC 1123 labels joined by '.', each of lower-case letters, digits and '-'";
const CLUSTER_RULE: &str = "one RFC 1123 label, or two joined by a dot (MCS cluster id)";

fn is_label(s: &str) -> bool {
    let bytes = s.as_bytes();
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    s.len() <= 63
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

/// Shortens a hostile value before it is quoted in an error or log line.
fn quoted(s: &str) -> String {
    if s.chars().count() <= 80 { s.to_owned() } else { s.chars().take(80).chain("...".chars()).collect() }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $max:expr, $rule:expr, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $name {
            type Err = NameError;
            fn from_str(s: &str) -> Result<Self, NameError> {
                if s.is_empty() {
                    return Err(NameError::Empty { kind: $kind, expects: $rule });
                }
                if s.len() > $max {
                    return Err(NameError::TooLong { kind: $kind, value: quoted(s), len: s.len(), max: $max });
                }
                let valid: fn(&str) -> bool = $valid;
                if !valid(s) {
                    return Err(NameError::Invalid { kind: $kind, value: quoted(s), expects: $rule });
                }
                Ok(Self(Arc::from(s)))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(&self.0)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let s = String::deserialize(d)?;
                s.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

name!(
    /// A cluster of the federation; the `<name>` in `spiffe://<td>/cluster/<name>/...`.
    ClusterName, "cluster name", 127, CLUSTER_RULE, |s| {
        let mut parts = s.split('.');
        parts.clone().count() <= 2 && parts.all(is_label)
    }
);
name!(
    /// A namespace; the same name means the same thing in every cluster (KEP-1645 namespace sameness).
    Namespace, "namespace", 63, LABEL_RULE, is_label
);
name!(
    /// The name of a service, unique within its namespace.
    ServiceName, "service name", 63, LABEL_RULE, is_label
);
name!(
    /// The name of a resource (`metadata.name`), a gateway replica, or a joined machine.
    ObjectName, "name", 253, SUBDOMAIN_RULE, |s| s.split('.').all(is_label)
);
name!(
    /// The name of a port of a service.
    PortName, "port name", 63, LABEL_RULE, is_label
);

/// A service: namespace and name, written `namespace/name`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    pub namespace: Namespace,
    pub name: ServiceName,
}

impl ServiceKey {
    pub fn new(namespace: Namespace, name: ServiceName) -> Self {
        Self { namespace, name }
    }
}

impl FromStr for ServiceKey {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let (namespace, name) = s.split_once('/').ok_or_else(|| NameError::Invalid {
            kind: "service",
            value: quoted(s),
            expects: "NAMESPACE/NAME",
        })?;
        Ok(Self { namespace: namespace.parse()?, name: name.parse()? })
    }
}
impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}
impl fmt::Debug for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl Serialize for ServiceKey {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}
impl<'de> Deserialize<'de> for ServiceKey {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_names_are_one_label_or_two_joined_by_a_dot() {
        assert!("east".parse::<ClusterName>().is_ok());
        assert!("east.prod".parse::<ClusterName>().is_ok());
        for bad in ["", "East", "a.b.c", "-east", "east-", "ea/st", "..", "a."] {
            assert!(bad.parse::<ClusterName>().is_err(), "{bad:?} must be refused");
        }
    }

    #[test]
    fn an_error_names_the_kind_the_value_and_the_rule_and_never_quotes_a_flood() {
        let error = "Shop!".parse::<Namespace>().unwrap_err().to_string();
        assert!(
            error.contains("namespace") && error.contains("Shop!") && error.contains("RFC 1123"),
            "{error}"
        );
        let flood = "x".repeat(100_000).parse::<Namespace>().unwrap_err().to_string();
        assert!(flood.len() < 300);
    }

    #[test]
    fn a_service_key_round_trips() {
        let key: ServiceKey = "shop/checkout".parse().unwrap();
        assert_eq!(key.to_string().parse::<ServiceKey>().unwrap(), key);
        assert!("checkout".parse::<ServiceKey>().is_err());
    }
}
