//! Fields of an `AccessPolicy`, read with errors that name path, value and remedy; sizes are bounded here.

use std::collections::{BTreeMap, BTreeSet};

use super::Action;
use crate::names::{ClusterName, Namespace, ServiceName};
use crate::resource::FieldError;
use crate::resource::access_policy::AccessPolicySpec;
use crate::resource::failover_policy::TargetRef;

/// A sidecar's snapshot is refused above 4 MB: 128 policies of a namespace ([`crate::resource::MAX_ACCESS_POLICIES`]) of
/// this size are half of it. About 200 SPIFFE IDs.
const MAX_SPEC_BYTES: usize = 16 * 1024;
pub(super) const MAX_RULES: usize = 64;
pub(super) const MAX_SOURCES: usize = 64;
/// Values of one list.
const MAX_VALUES: usize = 256;
/// SPIFFE-ID section 2.3.
const MAX_ID_BYTES: usize = 2048;
/// As in a Kubernetes label or a `ClusterProperty` of a usual size.
const MAX_PROPERTY_BYTES: usize = 253;

pub(super) fn size(spec: &AccessPolicySpec, errors: &mut Vec<FieldError>) {
    let bytes = serde_json::to_string(spec).map_or(usize::MAX, |json| json.len());
    if bytes > MAX_SPEC_BYTES {
        let path = "spec".to_owned();
        let message = format!(
            "has {bytes} bytes, at most {MAX_SPEC_BYTES}: use /* in identities, or split it into several policies"
        );
        errors.push(FieldError { path, message });
    }
}

pub(super) fn at_most<T>(max: usize, path: &str, list: &[T], errors: &mut Vec<FieldError>) {
    if list.len() > max {
        errors.push(FieldError::new(path, format!("{} entries", list.len()), format!("at most {max}")));
    }
}

pub(super) fn action(text: &str, errors: &mut Vec<FieldError>) -> Action {
    match text {
        "ALLOW" => Action::Allow,
        "DENY" => Action::Deny,
        other => {
            let (path, accepted) = ("spec.action", "ALLOW or DENY");
            errors.push(match other {
                "" => FieldError::missing(path, accepted),
                other => FieldError::new(path, other, accepted),
            });
            Action::Allow
        }
    }
}

pub(super) fn targets(targets: &[TargetRef], errors: &mut Vec<FieldError>) -> BTreeSet<ServiceName> {
    let path = "spec.targetRefs";
    if targets.is_empty() {
        errors
            .push(FieldError::missing(path, "services, or leave it out for every service of the namespace"));
    }
    at_most(MAX_VALUES, path, targets, errors);
    let mut services = BTreeSet::new();
    for (index, TargetRef { kind, name }) in targets.iter().enumerate() {
        if kind != "Service" {
            errors.push(FieldError::new(format!("{path}[{index}].kind"), kind, "Service"));
        }
        match name.parse() {
            Ok(name) => drop(services.insert(name)),
            Err(error) => errors.push(FieldError::new(format!("{path}[{index}].name"), name, error)),
        }
    }
    services
}

pub(super) fn ports(ports: &[u32], errors: &mut Vec<FieldError>) -> BTreeSet<u16> {
    let path = "spec.ports";
    if ports.is_empty() {
        errors.push(FieldError::missing(path, "ports, or leave it out for every port"));
    }
    at_most(MAX_VALUES, path, ports, errors);
    let mut known = BTreeSet::new();
    for (index, port) in ports.iter().enumerate() {
        match u16::try_from(*port) {
            Ok(port) if port > 0 => drop(known.insert(port)),
            _ => errors.push(FieldError::new(format!("{path}[{index}]"), port, "1 to 65535")),
        }
    }
    known
}

/// Reads a list that must not be empty; `read` returns what would be accepted instead.
pub(super) fn list<T>(
    path: &str,
    texts: &[String],
    read: fn(&str) -> Result<T, String>,
    errors: &mut Vec<FieldError>,
) -> Vec<T> {
    if texts.is_empty() {
        errors.push(FieldError::missing(path, "at least one value, or leave it out for any"));
    }
    at_most(MAX_VALUES, path, texts, errors);
    let mut known = Vec::with_capacity(texts.len().min(MAX_VALUES));
    for (index, text) in texts.iter().enumerate() {
        match read(text) {
            Ok(value) => known.push(value),
            Err(accepted) => errors.push(FieldError::new(format!("{path}[{index}]"), text, accepted)),
        }
    }
    known
}

/// A SPIFFE ID or everything below one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Pattern {
    Exact(String),
    /// Ends in `/`.
    Below(String),
}

pub(super) fn identity(text: &str) -> Result<Pattern, String> {
    let accepted = |why: &str| {
        format!(
            "a SPIFFE ID such as spiffe://acme.example/cluster/west/ns/shop/sa/cart, or one that ends in /* for all below ({why})"
        )
    };
    let rest = text.strip_prefix("spiffe://").ok_or_else(|| accepted("it starts with spiffe://"))?;
    if text.len() > MAX_ID_BYTES {
        return Err(accepted("at most 2048 bytes"));
    }
    let (rest, below) = match rest.strip_suffix("/*") {
        Some(rest) => (rest, true),
        None => (rest, false),
    };
    if rest.contains('*') {
        return Err(accepted("* stands for whole segments, at the end only"));
    }
    let mut segments = rest.split('/');
    let domain = segments.next().unwrap_or_default();
    let in_domain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
    if domain.is_empty() || domain.len() > 255 || !domain.bytes().all(in_domain) {
        return Err(accepted("a trust domain has a-z, 0-9, '.', '-' and '_'"));
    }
    let segment = |s: &str| {
        !matches!(s, "" | "." | "..")
            && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
    };
    if !segments.all(segment) {
        return Err(accepted("segments have a-z, A-Z, 0-9, '.', '-' and '_', none is empty, '.' or '..'"));
    }
    match below {
        true => Ok(Pattern::Below(format!("spiffe://{rest}/"))),
        false if rest == domain => {
            Err(accepted("a trust domain by itself calls nobody; add /* for all of it"))
        }
        false => Ok(Pattern::Exact(text.to_owned())),
    }
}

/// `None`: `@self`.
pub(super) fn cluster(text: &str) -> Result<Option<ClusterName>, String> {
    match text {
        "@self" => Ok(None),
        "*" => Err("names or @self; for any cluster leave clusters out".to_owned()),
        name => name.parse().map(Some).map_err(|error| format!("a cluster name or @self ({error})")),
    }
}

pub(super) fn namespace(text: &str) -> Result<Namespace, String> {
    match text {
        "*" => Err("names; for any namespace leave namespaces out".to_owned()),
        name => name.parse().map_err(|error| format!("a namespace ({error})")),
    }
}

pub(super) fn properties(path: &str, wanted: &BTreeMap<String, String>, errors: &mut Vec<FieldError>) {
    if wanted.is_empty() {
        errors.push(FieldError::missing(path, "properties with their values, or leave it out for any"));
    }
    if wanted.len() > MAX_VALUES {
        let found = format!("{} entries", wanted.len());
        errors.push(FieldError::new(path, found, format!("at most {MAX_VALUES}")));
    }
    for (key, value) in wanted {
        if key.is_empty() || key.len() > MAX_PROPERTY_BYTES || value.len() > MAX_PROPERTY_BYTES {
            let accepted =
                format!("a property of 1 to {MAX_PROPERTY_BYTES} bytes and a value of at most as many");
            errors.push(FieldError::new(path, format!("{key}: {value}"), accepted));
        }
    }
}
