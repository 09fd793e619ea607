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
    /// `local`: through our own gateways; `remote`: from each sidecar straight to the peer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<String>,
    /// Ranges inside which the peer may announce gateway addresses; empty: any that is not special.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed_gateway_ranges: Vec<IpNet>,
    /// Endpoint addresses may cross this link.
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
        for (index, gateway) in self.gateways.iter().enumerate() {
            let good = gateway
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
            if !good {
                errors.push(FieldError::new(format!("spec.gateways[{index}]"), gateway, "host:port"));
            }
        }
        if let Some(egress) = &self.egress
            && !matches!(egress.as_str(), "local" | "remote")
        {
            errors.push(FieldError::new("spec.egress", egress, "local or remote"));
        }
    }
}
