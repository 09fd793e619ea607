//! What Kubernetes' API server is told of the kinds: patterns of the names in [`crate::names`], as regular expressions of RE2.
//!
//! The types carry them beside rules in CEL (`x-kubernetes-validations`), so that what validation here refuses is refused at
//! admission there. Federators validate again by the same code as everywhere: what a pattern can't say is said in a condition.

use schemars::{Schema, SchemaGenerator, json_schema};

/// An RFC 1123 label.
pub const LABEL: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$";
/// A label, or `*`.
pub const LABEL_OR_ANY: &str = r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?|\*)$";
/// Labels joined by dots.
pub const SUBDOMAIN: &str = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";
/// The same, or `*`.
pub const SUBDOMAIN_OR_ANY: &str = r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*|\*)$";
/// A cluster: one label or two.
pub const CLUSTER: &str = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)?$";
/// A cluster, or `@self`.
pub const CLUSTER_OR_SELF: &str =
    r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)?|@self)$";
/// A cluster, `@self`, or `*`.
pub const TIER_CLUSTER: &str =
    r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)?|@self|\*)$";
/// `name` or `namespace/name`.
pub const SERVICE_KEY: &str = "^([a-z0-9]([-a-z0-9]*[a-z0-9])?/)?[a-z0-9]([-a-z0-9]*[a-z0-9])?$";
/// A SPIFFE ID with a path, or what ends in `/*`.
pub const IDENTITY_PATTERN: &str = r"^spiffe://[a-z0-9._-]{1,255}(/[A-Za-z0-9._-]+)*(/\*|/[A-Za-z0-9._-]+)$";
/// A name with `*` for any run of characters.
pub const NAME_PATTERN: &str = r"^[-a-z0-9.*]+$";
/// `NAMESPACE/NAME`, each such a pattern.
pub const SERVICE_PATTERN: &str = r"^[-a-z0-9.*]+/[-a-z0-9.*]+$";

/// A field that may hold anything, so that a rule can refuse it by name.
pub fn anything(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true })
}
