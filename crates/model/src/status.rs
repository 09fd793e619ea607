//! What `tombolo status -o json` prints: versioned, stable, times in RFC 3339, durations with their unit in the name.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::failover::Shift;
use crate::resource::Condition;

pub const API_VERSION: &str = "tombolo.dev/status/v1";

/// One cluster as its federator sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterStatus {
    pub api_version: String,
    pub cluster: String,
    pub tag: String,
    pub trust_domain: String,
    pub time: String,
    pub federator: FederatorStatus,
    pub gateways: Vec<GatewayStatus>,
    pub links: Vec<LinkStatus>,
    pub exports: Vec<ExportStatus>,
    pub imports: Vec<ImportStatus>,
    pub endpoints: Vec<EndpointStatus>,
    pub identities: Vec<IdentityStatus>,
    /// Foreign trust domains.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub federations: Vec<FederationStatus>,
    /// What an operator should do something about, the worst first.
    #[serde(default)]
    pub findings: Vec<Finding>,
}

/// Something that needs attention.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// `notice`, `warning` or `critical`.
    pub severity: String,
    /// `CaExpiresSoon`, `CaExpired`, `StoreNotWritable`, `ForeignBundleStale`, `UpstreamNotShown` or `IdentityUsedTwice`.
    pub reason: String,
    pub about: String,
    pub message: String,
    /// What to do.
    pub remedy: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FederatorStatus {
    pub version: String,
    pub epoch: u64,
    pub revision: u64,
    pub started_at: String,
    pub overlay: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayStatus {
    pub name: String,
    pub border: String,
    pub inner: String,
    /// `ready`, `draining` or `silent`.
    pub state: String,
    pub last_seen: String,
    pub registered_endpoints: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LinkStatus {
    pub peer: String,
    pub tag: String,
    /// `connected`, `stale`, `expired`, `connecting` or `recreated`.
    pub state: String,
    pub reason: String,
    /// Best of the live gateway paths.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rtt_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_per_mille: Option<u32>,
    /// Since the peer's federator was last heard.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
    pub gateways: Vec<String>,
    pub carrier: String,
    pub paths: Vec<PathStatus>,
}

/// One gateway-to-gateway hop, as the near gateway probes it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PathStatus {
    pub from: String,
    pub to: String,
    pub alive: bool,
    pub rtt_ms: f64,
    pub loss_per_mille: u32,
    pub mtu: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExportStatus {
    pub service: String,
    /// Cluster names, or `*`.
    pub export_to: Vec<String>,
    pub healthy: u32,
    pub total: u32,
    pub conditions: Vec<Condition>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImportStatus {
    pub service: String,
    pub clusters: Vec<ImportCluster>,
    /// Name of the failover policy, empty for the default.
    pub policy: String,
    pub consumers: Vec<Consumer>,
    /// The last ten, newest first.
    pub shifts: Vec<ShiftStatus>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImportCluster {
    pub cluster: String,
    pub healthy: u32,
    pub total: u32,
    /// `local`, `fresh`, `stale` or `expired`.
    pub state: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
}

/// A sidecar that calls the service: which tier serves it, and why.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Consumer {
    pub sidecar: String,
    pub tier: i32,
    pub serving: Vec<String>,
    pub reason: String,
    pub connections: u32,
    pub open_streams: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ShiftStatus {
    pub sidecar: String,
    pub at: String,
    #[serde(flatten)]
    pub shift: Shift,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointStatus {
    pub id: String,
    pub holder: String,
    pub spiffe_id: String,
    pub services: Vec<String>,
    pub healthy: bool,
    pub reason: String,
    /// `ip:port`, or `registers` for one behind NAT.
    pub address: String,
    pub last_seen: String,
    /// Backends without a sidecar behind this one: to them the last hop is plain.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plain: Vec<String>,
    /// Of services whose weight is not the default 100: its share of their calls, relative to other endpoints.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub weights: BTreeMap<String, u32>,
}

/// A foreign trust domain and what is known of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FederationStatus {
    pub name: String,
    pub trust_domain: String,
    pub profile: String,
    /// `fetched`, `initial` (the object's own bundle), `empty` (everything of it is revoked), `unknown` (no bundle yet) or
    /// `elsewhere` (it does not hold in this cluster).
    pub state: String,
    pub sequence: u64,
    pub roots: u32,
    pub jwt_keys: u32,
    /// Since its endpoint last gave a bundle.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
    /// Why the last attempt failed; empty when it did not.
    pub error: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IdentityStatus {
    pub spiffe_id: String,
    /// `root`, `intermediate`, `federator`, `gateway`, `sidecar` or `vm`.
    pub role: String,
    pub not_after: String,
    pub expires_in_seconds: i64,
}
