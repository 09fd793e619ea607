//! `ClusterLink` (tombolo.dev): a linked cluster. Matching objects on both sides under one root link without a token.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::fields::FieldError;
use crate::names::ClusterName;

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterLinkSpec {
    /// The peer's name; the object's name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// The peer's tag, as pinned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<u32>,
    /// `host:port` of the peer's gateways; names are resolved again and again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gateways: Vec<String>,
    /// `local`: through our own gateways.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<String>,
    /// Ranges inside which the peer may announce gateway addresses; empty: any that is not special.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed_gateway_ranges: Vec<IpNet>,
    /// Whether endpoint addresses may cross this link.
    #[serde(default)]
    pub flat: bool,
}

impl ClusterLinkSpec {
    pub(super) fn validate(&self, errors: &mut Vec<FieldError>) {
        if let Some(cluster) = &self.cluster
            && let Err(error) = cluster.parse::<ClusterName>()
        {
            errors.push(FieldError::new("spec.cluster", cluster, error));
        }
        // Known, and refused until they do something: a setting that is taken and ignored is a trap.
        for (index, gateway) in self.gateways.iter().enumerate() {
            let expected = "nothing: the peer announces its gateways once `tombolo link join` has run";
            errors.push(FieldError::new(format!("spec.gateways[{index}]"), gateway, expected));
        }
        if let Some(egress) = self.egress.as_deref().filter(|egress| *egress != "local") {
            errors.push(FieldError::new(
                "spec.egress",
                egress,
                "local, through our own gateways: the only way so far",
            ));
        }
        if self.flat {
            errors.push(FieldError::new("spec.flat", true, "false: endpoint addresses cross no link so far"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_would_do_nothing_are_refused_by_name() {
        let spec: ClusterLinkSpec = serde_json::from_str(
            r#"{"cluster": "west", "gateways": ["192.0.2.1:7440"], "egress": "remote", "flat": true}"#,
        )
        .unwrap();
        let mut errors = Vec::new();
        spec.validate(&mut errors);
        let fields: Vec<String> = errors.iter().map(ToString::to_string).collect();
        for field in ["spec.gateways[0]", "spec.egress", "spec.flat"] {
            assert!(fields.iter().any(|error| error.contains(field)), "{field}: {fields:?}");
        }
        assert_eq!(fields.len(), 3, "{fields:?}");
    }
}
