//! `ClusterLink` (tombolo.dev): a linked cluster. Matching objects on both sides under one root link without a token: each
//! names the other cluster, its tag, and where its gateways are.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use ipnet::IpNet;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::fields::FieldError;
use super::schema::CLUSTER;
use crate::ids::ClusterTag;
use crate::names::ClusterName;

/// A cluster has a handful of gateways; each is resolved and probed.
const MAX_GATEWAYS: usize = 16;
/// A DNS name and a port.
const MAX_GATEWAY_BYTES: usize = 253 + 6;

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [
    { "rule": "!has(self.gateways) || size(self.gateways) == 0 || has(self.tag)",
      "message": "give the peer's tag, as its `tombolo status` shows it: without it its gateways can't be asked", "fieldPath": ".tag" },
    { "rule": "!has(self.allowedGatewayRanges) || self.allowedGatewayRanges.all(range, isCIDR(range))",
      "message": "ranges are CIDRs such as 203.0.113.0/24", "fieldPath": ".allowedGatewayRanges" },
]))]
pub struct ClusterLinkSpec {
    /// The peer's name; the object's name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 127), regex(pattern = CLUSTER))]
    pub cluster: Option<String>,
    /// The peer's tag, six hex digits: what its certificate has to say beside its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<TagText>,
    /// `host:port` of the peer's gateways; names are resolved again and again. With the tag they link without a token, once
    /// the peer has such an object about this cluster.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 16),
        inner(length(max = 259), regex(pattern = r"^(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):[1-9][0-9]{0,4}$"))
    )]
    pub gateways: Vec<String>,
    /// `local` (the default): through our own gateways; `remote`: straight to the peer's, while they answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["local", "remote"]))]
    pub egress: Option<String>,
    /// Ranges inside which the peer may announce gateway and, on a flat link, endpoint addresses; empty: any that is not
    /// special.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<String>", length(max = 64), inner(length(max = 49)))]
    pub allowed_gateway_ranges: Vec<IpNet>,
    /// One network on both sides: endpoint addresses cross this link, and endpoints reach each other past all gateways
    /// where both sides say so.
    #[serde(default)]
    pub flat: bool,
}

/// A cluster's tag as it is shown: six hex digits. A number is read too.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TagText(pub ClusterTag);

const TAG: &str =
    "a cluster's tag: six hex digits in quotes, as `tombolo status` shows them, such as \"01a2b3\"";

impl FromStr for TagText {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.len() == 6 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let number = digits.then(|| u32::from_str_radix(text, 16).ok()).flatten();
        number.and_then(ClusterTag::new).map(Self).ok_or(TAG)
    }
}

impl fmt::Display for TagText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for TagText {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TagText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl Visitor<'_> for Reader {
            type Value = TagText;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(TAG)
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<TagText, E> {
                text.parse().map_err(|_| E::invalid_value(Unexpected::Str(text), &self))
            }
            fn visit_u64<E: Error>(self, number: u64) -> Result<TagText, E> {
                let tag = u32::try_from(number).ok().and_then(ClusterTag::new);
                tag.map(TagText).ok_or_else(|| E::invalid_value(Unexpected::Unsigned(number), &self))
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

impl JsonSchema for TagText {
    fn schema_name() -> Cow<'static, str> {
        "TagText".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^[0-9a-fA-F]{6}$", "maxLength": 6 })
    }
}

impl ClusterLinkSpec {
    /// Whether packets for the peer go straight to its gateways.
    pub fn egress_is_remote(&self) -> bool {
        self.egress.as_deref() == Some("remote")
    }

    /// The peer's tag, of an object that links by itself: it says where the peer's gateways are.
    pub fn links(&self) -> Option<ClusterTag> {
        self.tag.filter(|_| !self.gateways.is_empty()).map(|TagText(tag)| tag)
    }

    pub(super) fn validate(&self, errors: &mut Vec<FieldError>) {
        if let Some(cluster) = &self.cluster
            && let Err(error) = cluster.parse::<ClusterName>()
        {
            errors.push(FieldError::new("spec.cluster", cluster, error));
        }
        if self.gateways.len() > MAX_GATEWAYS {
            let found = format!("{} entries", self.gateways.len());
            errors.push(FieldError::new("spec.gateways", found, format!("at most {MAX_GATEWAYS}")));
        }
        for (index, gateway) in self.gateways.iter().enumerate().filter(|(_, gateway)| !is_place(gateway)) {
            let expected = "HOST:PORT of a gateway of the peer, such as gw.west.example:7440";
            errors.push(FieldError::new(format!("spec.gateways[{index}]"), gateway, expected));
        }
        if !self.gateways.is_empty() && self.tag.is_none() {
            errors.push(FieldError::missing(
                "spec.tag",
                format!("{TAG}: without it the peer's gateways can't be asked"),
            ));
        }
        if let Some(egress) = self.egress.as_deref().filter(|egress| !matches!(*egress, "local" | "remote")) {
            let expected = "local (through our own gateways) or remote (straight to the peer's)";
            errors.push(FieldError::new("spec.egress", egress, expected));
        }
    }
}

/// `host:port`, with brackets around an IPv6 address.
fn is_place(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let port = port.parse::<u16>().is_ok_and(|port| port > 0) && !port.starts_with('+');
    let host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            let name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
            !host.is_empty() && host.bytes().all(name)
        }
    };
    host && port && text.len() <= MAX_GATEWAY_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(spec: &str) -> Vec<String> {
        let spec: ClusterLinkSpec = serde_json::from_str(spec).unwrap();
        let mut errors = Vec::new();
        spec.validate(&mut errors);
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_leads_nowhere_is_refused_by_name_and_the_rest_is_taken() {
        let found = errors(r#"{"cluster": "west", "gateways": ["192.0.2.1"], "egress": "far"}"#);
        for field in ["spec.gateways[0]", "spec.tag", "spec.egress"] {
            assert!(found.iter().any(|error| error.contains(field)), "{field}: {found:?}");
        }
        assert_eq!(found.len(), 3, "{found:?}");
        for bad in [":7440", "gw:0", "gw:+1", "[1.2.3.4]:1", "a b:1", "::1:7440"] {
            assert!(!is_place(bad), "{bad}");
        }
        assert_eq!(errors(r#"{"cluster": "west", "egress": "remote", "flat": true}"#), Vec::<String>::new());
        let whole = r#"{"tag": "01a2b3", "gateways": ["gw.west.example:7440", "[2001:db8::1]:7440"]}"#;
        assert_eq!(errors(whole), Vec::<String>::new());
    }

    #[test]
    fn a_tag_is_written_as_it_is_shown_and_a_number_is_read_too() {
        let tag = |text: &str| {
            serde_json::from_str::<ClusterLinkSpec>(text).map(|spec| spec.tag.map(|t| t.to_string()))
        };
        assert_eq!(tag(r#"{"tag": "01A2b3"}"#).unwrap().unwrap(), "01a2b3");
        assert_eq!(tag(r#"{"tag": 107187}"#).unwrap().unwrap(), "01a2b3");
        for bad in [r#"{"tag": "1a2b3"}"#, r#"{"tag": "000000"}"#, r#"{"tag": 0}"#, r#"{"tag": 16777216}"#] {
            let error = tag(bad).unwrap_err().to_string();
            assert!(error.contains("six hex digits"), "{error}");
        }
    }
}
