//! Linked clusters, and what each has told: links and handles as they are kept, imports as they are in memory.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tombolo_identity::SpiffeId;
use tombolo_identity::jwt::JwtAuthority;
use tombolo_model::ids::{ClusterTag, EndpointId, Epoch, Handle, Revision};
use tombolo_model::mcs::ServiceProperties;
use tombolo_model::names::ClusterName;
use tombolo_model::sync::Freshness;
use tombolo_overlay::keys::{HandleBinding, LinkKey};
use tombolo_proto::v1;

use super::imported::ImportedExports;
use super::{CONTROL, FIRST_CONTACT, Port};
use crate::rotation::Word;
use crate::store::{Record, Table};

/// A linked cluster.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Link {
    pub peer: ClusterName,
    pub tag: ClusterTag,
    /// Hex, 32 bytes; held by both sides.
    pub key: String,
    /// The peer's federator, proven when the link was made.
    pub federator_ids: Vec<SpiffeId>,
    /// The handle by which we dial the peer's federators.
    pub control: ControlHandle,
    /// As told when the link was made; the peer's own record replaces them.
    pub first_gateways: Vec<PeerGateway>,
    pub properties: BTreeMap<String, String>,
    pub created_unix: u64,
    /// Loopback gateway addresses are believed: the link was made with such (a demo on one machine).
    #[serde(default)]
    pub loopback: bool,
    /// A cluster of this name but with another tag showed up.
    #[serde(default)]
    pub recreated: Option<ClusterTag>,
    /// The peer said that it has unlinked.
    #[serde(default)]
    pub ended_by_peer: bool,
    /// It was made by objects on both sides, and lives as long as the one here links.
    #[serde(default)]
    pub by_object: bool,
    /// The peer has asked for it, and has not shown yet that it got the answer.
    #[serde(default)]
    pub unconfirmed: bool,
}
impl Record for Link {
    const TABLE: Table = Table::Links;
}

/// A cluster that a `ClusterLink` is to link.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FirstContact {
    pub peer: ClusterName,
    pub tag: ClusterTag,
    /// The object's, resolved.
    pub gateways: Vec<SocketAddr>,
    /// Why it is not linked yet; empty: it has not been tried.
    pub last_error: String,
}

impl FirstContact {
    /// How `caller` dials a federator of the other side.
    pub fn binding(caller: &ClusterName, caller_tag: ClusterTag) -> HandleBinding {
        HandleBinding {
            handle: Handle::first_contact(caller_tag),
            importer: caller.clone(),
            service: FIRST_CONTACT.to_owned(),
            export_uid: [0; 16],
        }
    }
}

impl Link {
    pub fn link_key(&self) -> Option<LinkKey> {
        hex::decode(&self.key).ok()?.try_into().ok().map(LinkKey::from_bytes)
    }
    /// Whether traffic may flow.
    pub fn is_live(&self) -> bool {
        !self.ended_by_peer
    }
}

/// A control handle at the peer.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ControlHandle {
    pub handle: Handle,
    pub export_uid: [u8; 16],
}

impl ControlHandle {
    /// As the peer's gateways know it; `importer` is our own cluster.
    pub fn binding(&self, importer: &ClusterName) -> HandleBinding {
        HandleBinding {
            handle: self.handle,
            importer: importer.clone(),
            service: CONTROL.to_owned(),
            export_uid: self.export_uid,
        }
    }
}

/// A gateway of a peer.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct PeerGateway {
    pub name: String,
    pub address: SocketAddr,
    pub balanced: bool,
    #[serde(default)]
    pub zone: String,
}

/// What a peer exports to us.
#[derive(Clone, PartialEq, Debug)]
pub struct Import {
    pub exports: ImportedExports,
    pub gateways: Vec<PeerGateway>,
    pub properties: BTreeMap<String, String>,
    /// Of the peer's own identities, by record key.
    pub revocations: BTreeMap<String, v1::Revocation>,
    /// How far our revocations are enforced there, by record key.
    pub enforced: BTreeMap<String, v1::EnforcedRecord>,
    /// Of the peer's cluster.
    pub jwt_authorities: Vec<JwtAuthority>,
    /// Of any cluster, by record key: how far it is with what the federation trusts.
    pub words: BTreeMap<String, Arc<Word>>,
    pub position: (Epoch, Revision),
    /// Records that were refused, by key, with the reason.
    pub rejected: BTreeMap<String, String>,
    pub freshness: Freshness,
    /// Since the Unix epoch; `None`: never.
    pub heard: Option<Duration>,
    pub connected: bool,
    pub last_error: String,
}

impl Default for Import {
    fn default() -> Self {
        Self {
            exports: ImportedExports::default(),
            gateways: Vec::new(),
            properties: BTreeMap::new(),
            revocations: BTreeMap::new(),
            enforced: BTreeMap::new(),
            jwt_authorities: Vec::new(),
            words: BTreeMap::new(),
            position: (Epoch(0), Revision(0)),
            rejected: BTreeMap::new(),
            freshness: Freshness::Expired,
            heard: None,
            connected: false,
            last_error: String::new(),
        }
    }
}

/// One service of one peer.
#[derive(Clone, PartialEq, Debug)]
pub struct ImportedExport {
    pub export_uid: [u8; 16],
    pub handle: Handle,
    pub ports: Vec<Port>,
    pub spiffe_ids: Vec<String>,
    /// Of each endpoint of an identity, in the same order; none: all alike.
    pub weights: Vec<u32>,
    pub healthy: u32,
    pub total: u32,
    pub exported_at_unix_ms: i64,
    /// Healthy endpoints and where they are, if the peer calls the link flat.
    pub endpoints: Vec<(EndpointId, SocketAddr)>,
    pub headless: bool,
    /// Of a headless one or one of Kubernetes, if the peer calls the link flat: ready endpoints by host name.
    pub named: Vec<NamedEndpoint>,
    /// Where `named` listen, if it is one of Kubernetes.
    pub named_ports: Vec<Port>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// Of one of Kubernetes.
    pub service: Option<ServiceProperties>,
}

/// A ready endpoint of a headless service of a peer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NamedEndpoint {
    /// A DNS label, unique within the peer's cluster and the service.
    pub hostname: String,
    pub address: IpAddr,
}

/// The last state of a peer's records on disk: wire form, hex.
#[derive(Serialize, Deserialize)]
pub struct ImportRecord {
    pub epoch: Epoch,
    pub revision: Revision,
    pub heard_unix: u64,
    pub records: Vec<String>,
}
impl Record for ImportRecord {
    const TABLE: Table = Table::Imports;
}
