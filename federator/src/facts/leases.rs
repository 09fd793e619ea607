//! Who holds blocks of endpoint ids in this cluster: what a lease is for, and what its holder last said, as it is kept.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use tombolo_identity::SpiffeId;
use tombolo_model::ids::{Block, EndpointId};
use tombolo_model::names::ServiceKey;

use super::Port;
use crate::clones::Instance;
use crate::store::{Record, Table};

/// What a lease is held for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Federator,
    Gateway,
    Sidecar,
    Vm,
    /// Of a token: a joiner that registers at gateways.
    Provisional,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Federator => "federator",
            Self::Gateway => "gateway",
            Self::Sidecar => "sidecar",
            Self::Vm => "vm",
            Self::Provisional => "provisional",
        }
    }
    /// By the path within the cluster: `/gateway/NAME`, `/ns/../sa/..`, `/vm/NAME`, `/federator`.
    pub fn of(id: &SpiffeId) -> Option<Self> {
        let parts: Vec<&str> = id.within_cluster()?.split('/').skip(1).collect();
        match parts.as_slice() {
            ["federator"] => Some(Self::Federator),
            ["gateway", _] => Some(Self::Gateway),
            ["ns", _, "sa", _] => Some(Self::Sidecar),
            ["vm", _] => Some(Self::Vm),
            _ => None,
        }
    }
}

/// A leased block, and what its holder last said, so that a restarted federator starts from it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct LeaseRecord {
    pub block: Block,
    pub spiffe_id: String,
    pub role: Role,
    /// Unix seconds.
    pub not_after: u64,
    #[serde(default)]
    pub adopted: bool,
    #[serde(default)]
    pub address: Option<SocketAddr>,
    #[serde(default)]
    pub registers: bool,
    #[serde(default)]
    pub ids: Vec<EndpointId>,
    #[serde(default)]
    pub services: Vec<ServedRecord>,
    /// Of a machine: all that it has ever been allowed to serve.
    #[serde(default)]
    pub pinned: Vec<ServiceKey>,
    /// Of a gateway: what it announced.
    #[serde(default)]
    pub gateway: Option<GatewayRecord>,
    /// Its holder has joined anew: once this one's identity has ended it is not renewed any more.
    #[serde(default)]
    pub replaced: bool,
    /// Its holder has left for good.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub left: bool,
    /// Of a machine: what its token said.
    #[serde(default)]
    pub group: String,
    /// Of a pod that joined by its service account.
    #[serde(default)]
    pub pod: Option<PodRecord>,
    /// Processes that came while the holder lived.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clones: Vec<Instance>,
}
impl Record for LeaseRecord {
    const TABLE: Table = Table::Leases;
}

/// The pod behind a lease.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PodRecord {
    /// Kubernetes gives it to no other pod.
    pub uid: String,
    pub name: String,
    pub joined_unix: u64,
}

/// Where a gateway replica is.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct GatewayRecord {
    pub name: String,
    pub border: SocketAddr,
    pub inner: SocketAddr,
    #[serde(default)]
    pub balanced: bool,
    #[serde(default)]
    pub zone: String,
    pub start_number: u64,
}

/// A service that a lease holder serves.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ServedRecord {
    pub service: ServiceKey,
    pub ports: Vec<Port>,
    pub weight: u32,
    pub healthy: bool,
}
