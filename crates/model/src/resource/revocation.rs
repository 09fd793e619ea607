//! `Revocation` (tombolo.dev/v1alpha1, cluster-scoped): identities that nobody accepts any more, from now on and on
//! connections that live. Exactly one target is named.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::FieldError;
use super::schema::{CLUSTER, SUBDOMAIN};
use crate::names::{ClusterName, ObjectName};

/// SPIFFE-ID specification, section 2.3.
const MAX_SPIFFE_ID_BYTES: usize = 2048;
/// RFC 5280 section 4.1.2.2: serial numbers have at most 20 octets.
const MAX_SERIAL_BYTES: usize = 20;
const MAX_REASON_CHARS: usize = 256;

/// What is revoked, and why.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [
    { "rule": "[has(self.spiffeId), has(self.serial), has(self.node), has(self.cluster)].filter(given, given).size() == 1",
      "message": "give exactly one of spiffeId, serial, node and cluster" },
]))]
pub struct RevocationSpec {
    /// One identity, whoever holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048), regex(pattern = r"^spiffe://.*/cluster/"))]
    pub spiffe_id: Option<String>,
    /// One certificate that this cluster issued, by its serial number: hex, colons allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), regex(pattern = r"^(0x)?[0-9a-fA-F:]*[1-9a-fA-F][0-9a-fA-F:]*$"))]
    pub serial: Option<String>,
    /// Everything that the machine or gateway of this name holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253), regex(pattern = SUBDOMAIN))]
    pub node: Option<String>,
    /// A whole cluster: this one, refused by all, or a linked one, refused here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 127), regex(pattern = CLUSTER))]
    pub cluster: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 256))]
    pub reason: String,
}

/// The one target that a valid spec names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RevocationTarget<'a> {
    SpiffeId(&'a str),
    Serial(Vec<u8>),
    Node(&'a str),
    Cluster(&'a str),
}

impl RevocationSpec {
    pub(super) fn validate(&self, errors: &mut Vec<FieldError>) {
        let Self { spiffe_id, serial, node, cluster, reason } = self;
        let given: Vec<&str> = [
            ("spiffeId", spiffe_id.is_some()),
            ("serial", serial.is_some()),
            ("node", node.is_some()),
            ("cluster", cluster.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, given)| given.then_some(name))
        .collect();
        let one_of = "exactly one of spiffeId, serial, node and cluster";
        match given.as_slice() {
            [_] => {}
            [] => errors.push(FieldError::missing("spec", one_of)),
            several => errors.push(FieldError::new("spec", several.join(" and "), one_of)),
        }
        if let Some(id) = spiffe_id
            && !(id.starts_with("spiffe://") && id.contains("/cluster/") && id.len() <= MAX_SPIFFE_ID_BYTES)
        {
            let expected = "a SPIFFE ID, e.g. spiffe://acme.example/cluster/east/ns/shop/sa/cart";
            errors.push(FieldError::new("spec.spiffeId", id, expected));
        }
        if let Some(serial) = serial
            && parse_serial(serial).is_none()
        {
            let expected = "a certificate's serial number in hex, e.g. 0a:1b:2c (at most 20 bytes)";
            errors.push(FieldError::new("spec.serial", serial, expected));
        }
        if let Some(node) = node
            && let Err(error) = node.parse::<ObjectName>()
        {
            errors.push(FieldError::new("spec.node", node, error));
        }
        if let Some(cluster) = cluster
            && let Err(error) = cluster.parse::<ClusterName>()
        {
            errors.push(FieldError::new("spec.cluster", cluster, error));
        }
        if reason.chars().count() > MAX_REASON_CHARS {
            let expected = format!("at most {MAX_REASON_CHARS} characters");
            errors.push(FieldError::new("spec.reason", reason, expected));
        }
    }

    /// `None` only for a spec that was not validated.
    pub fn target(&self) -> Option<RevocationTarget<'_>> {
        match self {
            Self { spiffe_id: Some(id), .. } => Some(RevocationTarget::SpiffeId(id)),
            Self { serial: Some(serial), .. } => parse_serial(serial).map(RevocationTarget::Serial),
            Self { node: Some(node), .. } => Some(RevocationTarget::Node(node)),
            Self { cluster: Some(cluster), .. } => Some(RevocationTarget::Cluster(cluster)),
            _ => None,
        }
    }
}

/// Big-endian, without leading zeros: certificates and people pad differently.
fn parse_serial(text: &str) -> Option<Vec<u8>> {
    let digits: String = text.chars().filter(|c| *c != ':').collect();
    let digits = digits.trim_start_matches("0x");
    let padded = if digits.len().is_multiple_of(2) { digits.to_owned() } else { format!("0{digits}") };
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    let bytes: Vec<u8> = padded.as_bytes().chunks(2).map(byte).collect::<Option<_>>()?;
    let bytes = trimmed_serial(&bytes).to_vec();
    (!bytes.is_empty() && bytes.len() <= MAX_SERIAL_BYTES).then_some(bytes)
}

/// A serial number without leading zeros.
pub fn trimmed_serial(serial: &[u8]) -> &[u8] {
    let zeros = serial.iter().take_while(|byte| **byte == 0).count();
    serial.get(zeros..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(spec: &RevocationSpec) -> Vec<String> {
        let mut errors = Vec::new();
        spec.validate(&mut errors);
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn exactly_one_target_is_named_and_each_wrong_one_is_refused_by_its_field() {
        let good = RevocationSpec { node: Some("db-1".into()), ..Default::default() };
        assert!(errors(&good).is_empty());
        let some = |text: &str| Some(text.to_owned());
        let cases = [
            (RevocationSpec::default(), "spec"),
            (RevocationSpec { serial: some("01"), ..good.clone() }, "spec"),
            (RevocationSpec { node: some("Db_1"), ..Default::default() }, "spec.node"),
            (RevocationSpec { spiffe_id: some("acme/web"), ..Default::default() }, "spec.spiffeId"),
            (RevocationSpec { serial: some("xyz"), ..Default::default() }, "spec.serial"),
            (RevocationSpec { serial: some(&"ff".repeat(21)), ..Default::default() }, "spec.serial"),
            (RevocationSpec { cluster: some("No Cluster"), ..Default::default() }, "spec.cluster"),
            (RevocationSpec { reason: "x".repeat(300), ..good }, "spec.reason"),
        ];
        for (spec, field) in cases {
            let errors = errors(&spec);
            assert!(errors.len() == 1 && errors[0].contains(field), "{field}: {errors:?}");
        }
    }

    #[test]
    fn a_serial_is_read_however_it_is_padded() {
        let target = |serial: &str| {
            let spec = RevocationSpec { serial: Some(serial.to_owned()), ..Default::default() };
            match spec.target() {
                Some(RevocationTarget::Serial(bytes)) => bytes,
                other => panic!("{other:?}"),
            }
        };
        for serial in ["0a:1b", "a1b", "0x0a1b", "00:00:0A:1B"] {
            assert_eq!(target(serial), [0x0a, 0x1b], "{serial}");
        }
        assert!(parse_serial("00").is_none() && parse_serial("").is_none());
    }
}
