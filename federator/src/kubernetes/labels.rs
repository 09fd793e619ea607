//! The words by which objects of ours are known in Kubernetes, and names that follow from services.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tombolo_kubernetes::words::base32hex;
pub use tombolo_kubernetes::words::{IMPORT, LOCAL_SERVICE, MANAGED_BY, TOMBOLO, derived_name};
use tombolo_model::names::{ClusterName, ServiceKey};

/// Fingerprint of what was written last: tells what is to be written anew from what others have added.
pub const APPLIED: &str = "tombolo.dev/applied";
/// On a `ServiceImport`: its derived `Service`.
pub const DERIVED_SERVICE: &str = "multicluster.kubernetes.io/derived-service";
/// On an imported `EndpointSlice` (KEP-1645).
pub const SERVICE_NAME: &str = "multicluster.kubernetes.io/service-name";
/// On an imported `EndpointSlice` (KEP-1645).
pub const SOURCE_CLUSTER: &str = "multicluster.kubernetes.io/source-cluster";
/// Who keeps an `EndpointSlice`.
pub const SLICE_MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// The value of [`SLICE_MANAGED_BY`] for ours.
pub const SLICE_MANAGER: &str = "federator.tombolo.dev";
/// The `EndpointSlice`s of an import from one cluster.
pub fn slice_name(service: &ServiceKey, source: &ClusterName, index: usize) -> String {
    let digest = Sha256::digest(format!("{service}/{source}"));
    format!("{}-{}-{index}", service.name, base32hex(&digest, 10))
}

/// A fingerprint of a document.
pub fn digest(document: &Value) -> String {
    hex::encode(Sha256::digest(document.to_string()).get(..8).unwrap_or_default())
}

/// Exported labels that Kubernetes takes, and that say nothing in our name.
pub fn labels(exported: &BTreeMap<String, String>) -> Map<String, Value> {
    let taken = exported.iter().filter(|(key, value)| foreign_key(key) && is_label_value(value));
    taken.map(|(key, value)| (key.clone(), value.as_str().into())).collect()
}

/// The same for annotations, whose values are free.
pub fn annotations(exported: &BTreeMap<String, String>) -> Map<String, Value> {
    let taken = exported.iter().filter(|(key, _)| foreign_key(key));
    taken.map(|(key, value)| (key.clone(), value.as_str().into())).collect()
}

/// A qualified name (`prefix/name`) outside what is reserved.
fn foreign_key(key: &str) -> bool {
    let (prefix, _) = key.split_once('/').unwrap_or(("", key));
    let reserved = ["tombolo.dev", "multicluster.kubernetes.io"];
    let is_reserved = reserved.iter().any(|owner| prefix == *owner || prefix.ends_with(&format!(".{owner}")));
    key != MANAGED_BY && !is_reserved && is_qualified(key)
}

/// A qualified name, with or without a prefix, as Kubernetes has it for labels and application protocols.
pub fn is_qualified(key: &str) -> bool {
    let (prefix, name) = key.split_once('/').unwrap_or(("", key));
    let subdomain = |text: &str| {
        text.len() <= 253 && text.split('.').all(|label| is_word(label, 63, |b| b.is_ascii_lowercase(), b"-"))
    };
    (prefix.is_empty() && !key.starts_with('/') || subdomain(prefix))
        && is_word(name, 63, |b| b.is_ascii_alphabetic(), b"-_.")
}

/// A name of a port: a DNS label.
pub fn is_label(text: &str) -> bool {
    is_word(text, 63, |b| b.is_ascii_lowercase(), b"-")
}

fn is_label_value(value: &str) -> bool {
    value.is_empty() || is_word(value, 63, |b| b.is_ascii_alphabetic(), b"-_.")
}

/// Letters and digits, with others between them.
fn is_word(text: &str, longest: usize, letter: fn(&u8) -> bool, between: &[u8]) -> bool {
    let edge = |byte: Option<&u8>| byte.is_some_and(|byte| letter(byte) || byte.is_ascii_digit());
    let bytes = text.as_bytes();
    bytes.len() <= longest
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|byte| letter(byte) || byte.is_ascii_digit() || between.contains(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_reference_implementation_and_fit() {
        // RFC 4648 section 10: BASE32-HEX("foobar") = "CPNMUOJ1E8".
        assert_eq!(base32hex(b"foobar", 10), "cpnmuoj1e8");
        let service: ServiceKey = format!("shop/{}", "a".repeat(63)).parse().unwrap();
        assert_eq!(derived_name(&service).len(), 18);
        let slice = slice_name(&service, &"east.prod".parse().unwrap(), 10);
        assert!(slice.len() < 253 && slice != slice_name(&service, &"east".parse().unwrap(), 10));
    }

    #[test]
    fn what_a_peer_exports_can_neither_break_an_import_nor_speak_in_our_name() {
        let exported: BTreeMap<String, String> = [
            ("team", "shop"),
            ("example.com/tier", "a_b.c"),
            ("tombolo.dev/applied", "x"),
            ("a.tombolo.dev/b", "x"),
            (MANAGED_BY, "other"),
            (DERIVED_SERVICE, "x"),
            ("", "x"),
            ("/name", "x"),
            ("prefix/", "x"),
            ("UP.example/x", "x"),
            ("bad value", "x"),
            ("spaced", "a b"),
        ]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
        assert_eq!(labels(&exported).keys().collect::<Vec<_>>(), ["example.com/tier", "team"]);
        let annotations = annotations(&exported);
        assert_eq!(annotations.keys().collect::<Vec<_>>(), ["example.com/tier", "spaced", "team"]);
    }
}
