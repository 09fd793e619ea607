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
    /// `local` (the default): through our own gateways; `remote`: straight to the peer's, while they answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<String>,
    /// Ranges inside which the peer may announce gateway and, on a flat link, endpoint addresses; empty: any that is not
    /// special.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed_gateway_ranges: Vec<IpNet>,
    /// One network on both sides: endpoint addresses cross this link, and endpoints reach each other past all gateways
    /// where both sides say so.
    #[serde(default)]
    pub flat: bool,
}

impl ClusterLinkSpec {
    /// Whether packets for the peer go straight to its gateways.
    pub fn egress_is_remote(&self) -> bool {
        self.egress.as_deref() == Some("remote")
    }

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
        if let Some(egress) = self.egress.as_deref().filter(|egress| !matches!(*egress, "local" | "remote")) {
            let expected = "local (through our own gateways) or remote (straight to the peer's)";
            errors.push(FieldError::new("spec.egress", egress, expected));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_do_nothing_is_refused_by_name_and_the_rest_is_taken() {
        let errors = |spec: &str| {
            let spec: ClusterLinkSpec = serde_json::from_str(spec).unwrap();
            let mut errors = Vec::new();
            spec.validate(&mut errors);
            errors.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let found = errors(r#"{"cluster": "west", "gateways": ["192.0.2.1:7440"], "egress": "far"}"#);
        for field in ["spec.gateways[0]", "spec.egress"] {
            assert!(found.iter().any(|error| error.contains(field)), "{field}: {found:?}");
        }
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(errors(r#"{"cluster": "west", "egress": "remote", "flat": true}"#), Vec::<String>::new());
    }
}
