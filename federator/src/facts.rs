//! What this cluster's federator knows, as one value: the tables in memory.
//!
//! The core thread is the only writer; everybody else reads an `Arc<Facts>` that is replaced whole. What must survive a
//! restart has a record type here and lies in the store; [`Registry`] and freshness are volatile.

pub mod imported;
mod leases;
mod links;
pub mod pods;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use tombolo_identity::authority::adopt::Upstream;
use tombolo_identity::bundle::{TrustBundle, fingerprint};
use tombolo_identity::jwt::JwtAuthority;
use tombolo_identity::{SpiffeId, TrustDomain};
use tombolo_model::ids::{Block, ClusterTag, EndpointId, Epoch, Handle};
pub use tombolo_model::mcs::Port;
use tombolo_model::mcs::ServiceProperties;
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::ranges::AllowedRanges;
use tombolo_model::resource::{ClusterLinkSpec, Object, ObjectKey, Spec};
use tombolo_model::virtual_ranges::VirtualRanges;
use tombolo_overlay::keys::{ClusterKey, HandleBinding, LinkKey};

pub use self::leases::{GatewayRecord, LeaseRecord, PodRecord, Role, ServedRecord};
pub use self::links::{
    ControlHandle, FirstContact, Import, ImportRecord, ImportedExport, Link, NamedEndpoint, PeerGateway,
};
use crate::foreign::Federation;
use crate::registry::Registry;
use crate::rotation::Word;
use crate::store::{Record, Table};

/// The `service` of control handles.
pub const CONTROL: &str = "control";
/// The `service` of handles of first contact.
pub const FIRST_CONTACT: &str = "first-contact";
/// The `service` of the reserved join handle.
pub const JOIN: &str = "join";
/// The `service` of the reserved renewal handle.
pub const RENEWAL: &str = "renewal";

/// What does not change while the process runs, but for properties; replaced whole.
#[derive(Clone, Debug)]
pub struct ClusterFacts {
    pub name: ClusterName,
    pub tag: ClusterTag,
    pub trust_domain: TrustDomain,
    pub federator_id: SpiffeId,
    pub cluster_key: ClusterKey,
    pub self_link_key: LinkKey,
    pub epoch: Epoch,
    /// `ClusterProperty` values of this cluster.
    pub properties: BTreeMap<String, String>,
    pub started_unix: u64,
}

/// What this cluster trusts and issues with; replaced whole (`core::trust`).
#[derive(Clone, Debug)]
pub struct TrustFacts {
    pub bundle: TrustBundle,
    /// The same, as members get it.
    pub bundle_json: String,
    /// The update that brought it, as it was signed; `None` before a first rotation.
    pub update: Option<Arc<[u8]>>,
    /// Lead from roots of before to the one that this cluster's intermediate is of.
    pub crosses: Vec<CertificateDer<'static>>,
    /// Intermediates of every cluster that the root has signed anew.
    pub reissued: Arc<[CertificateDer<'static>]>,
    /// Of the same key, as it lies in the trust directory: what a restart begins with.
    pub directory_certificate: CertificateDer<'static>,
    /// The certificate that is issued with.
    pub intermediate: CertificateDer<'static>,
    pub issuer_sha256: [u8; 32],
    /// Of the root that the intermediate is of.
    pub root_fingerprint: String,
    /// Unix seconds; 0: unknown.
    pub root_not_after: u64,
    /// Unix seconds; 0: unknown.
    pub intermediate_not_after: u64,
    /// Members whose leaf is older renew. Unix seconds.
    pub leaves_after: u64,
    /// Updates that were refused since the start, by reason.
    pub refused: BTreeMap<&'static str, u64>,
}

impl TrustFacts {
    /// Leaves older than this are renewed: [`Self::leaves_after`], unless the clock has been set back since.
    pub fn leaves_since(&self, unix: u64) -> u64 {
        self.leaves_after.min(unix)
    }

    /// Whether a certificate of this fingerprint is a trusted root.
    pub fn trusts(&self, root_fingerprint: &str) -> bool {
        self.bundle.roots.iter().any(|root| fingerprint(root) == root_fingerprint)
    }
}

/// What the core has taken over beside the trust directory; one record, `trust`.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct TrustRecord {
    /// Of the bundle that was trusted: an older one is refused, wherever it comes from.
    #[serde(default)]
    pub sequence: u64,
    /// The update as it was signed, hex.
    #[serde(default)]
    pub update: Option<String>,
    /// What was issued with last, hex: a later update need not carry it again.
    #[serde(default)]
    pub intermediate: Option<String>,
    #[serde(default)]
    pub leaves_after: u64,
}
impl Record for TrustRecord {
    const TABLE: Table = Table::Meta;
}

/// Where this federator's overlay endpoint is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FederatorEndpoint {
    pub endpoint: EndpointId,
    pub address: SocketAddr,
}

/// Everything, at one moment.
#[derive(Clone, Debug)]
pub struct Facts {
    pub cluster: Arc<ClusterFacts>,
    pub trust: Arc<TrustFacts>,
    /// How far this cluster says it is with `trust`.
    pub own_word: Option<Arc<Word>>,
    pub federator: Option<FederatorEndpoint>,
    /// Grows with every change, over restarts too.
    pub revision: u64,
    pub objects: BTreeMap<ObjectKey, Arc<StoredObject>>,
    pub links: BTreeMap<ClusterName, Arc<Link>>,
    /// Clusters that an object is to link; none of them is trusted with anything.
    pub first_contacts: BTreeMap<ClusterName, Arc<FirstContact>>,
    pub handles: BTreeMap<(ClusterName, String), HandleRecord>,
    pub leases: BTreeMap<Block, Arc<LeaseRecord>>,
    pub registry: Registry,
    pub imports: BTreeMap<ClusterName, Arc<Import>>,
    /// Newest first, per service.
    pub shifts: BTreeMap<String, VecDeque<ShiftRecord>>,
    pub identities: BTreeMap<String, IdentityRecord>,
    /// Of this cluster, published.
    pub jwt_authorities: Vec<JwtAuthority>,
    /// Foreign trust domains.
    pub federations: BTreeMap<TrustDomain, Arc<Federation>>,
    /// What a foreign authority has signed for this cluster's key, for applications to show and to judge by.
    pub upstream: Option<Arc<Upstream>>,
    pub addresses: Arc<AddressFacts>,
    /// Of the exported services that have any.
    pub kubernetes_hosts: BTreeMap<ServiceKey, Arc<KubernetesHosts>>,
    pub pods: Arc<pods::Pods>,
    pub store_writable: bool,
}

/// The virtual addresses of the services that are known here; replaced whole (`core::addresses`).
#[derive(Clone, PartialEq, Debug, Default)]
pub struct AddressFacts {
    pub ranges: VirtualRanges,
    pub of: BTreeMap<ServiceKey, VirtualAddresses>,
    /// Of services that are no more: not given to another one yet.
    pub held: usize,
    /// Services for which a range had no address left.
    pub wanting: BTreeSet<ServiceKey>,
}

/// What the names of a service resolve to in this cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VirtualAddresses {
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
}

impl VirtualAddresses {
    /// IPv4 first.
    pub fn all(self) -> impl Iterator<Item = IpAddr> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }
}

/// A service's virtual addresses as they are kept.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AddressRecord {
    pub service: ServiceKey,
    #[serde(default)]
    pub v4: Option<Ipv4Addr>,
    #[serde(default)]
    pub v6: Option<Ipv6Addr>,
    /// Unix seconds since when the service is no more; another one gets them after a day at the earliest.
    #[serde(default)]
    pub released: Option<u64>,
}
impl Record for AddressRecord {
    const TABLE: Table = Table::Addresses;
}

/// An applied object.
#[derive(Clone, PartialEq, Debug)]
pub struct StoredObject {
    pub object: Object,
    pub uid: String,
    pub created_unix: u64,
    pub generation: u64,
    /// Of a `ServiceExport` that Kubernetes keeps; `None`: an operator has applied it here, or it is of another kind.
    pub kubernetes: Option<KubernetesService>,
    /// It is of a kind of our own, and Kubernetes keeps it.
    pub in_kubernetes: bool,
}

impl StoredObject {
    /// Whether it is changed with kubectl, and not here.
    pub fn is_kubernetes(&self) -> bool {
        self.in_kubernetes || self.kubernetes.is_some()
    }
}

/// What Kubernetes says of the `Service` that is exported.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum KubernetesService {
    Missing,
    /// A name elsewhere: it has no endpoints that could be exported.
    ExternalName,
    /// More than peers take; why.
    TooLarge(String),
    Found(ExportedService),
}

impl KubernetesService {
    pub fn found(&self) -> Option<&ExportedService> {
        match self {
            Self::Found(service) => Some(service),
            Self::Missing | Self::ExternalName | Self::TooLarge(_) => None,
        }
    }
}

/// A Kubernetes `Service` as far as importers are told of it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExportedService {
    pub headless: bool,
    pub ports: Vec<Port>,
    pub properties: ServiceProperties,
}

/// Ready endpoints of an exported Kubernetes service.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct KubernetesHosts {
    pub hosts: Vec<NamedEndpoint>,
    /// Where they listen, by the names of the service's ports.
    pub ports: Vec<Port>,
}

/// As it lies in the store: the document as the user wrote it.
#[derive(Serialize, Deserialize)]
pub struct ObjectRecord {
    pub json: serde_json::Value,
    pub uid: String,
    pub created_unix: u64,
    pub generation: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<KubernetesService>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub in_kubernetes: bool,
}
impl Record for ObjectRecord {
    const TABLE: Table = Table::Objects;
}

/// Epoch and keys; one record, `cluster`.
#[derive(Serialize, Deserialize)]
pub struct MetaRecord {
    pub cluster: ClusterName,
    pub tag: ClusterTag,
    pub epoch: Epoch,
    /// Of this process's start: revisions are `starts << 32` and up, so they never go back.
    pub starts: u64,
    pub cluster_key: String,
    pub self_link_key: String,
}
impl Record for MetaRecord {
    const TABLE: Table = Table::Meta;
}

/// An allotted handle.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct HandleRecord {
    pub importer: ClusterName,
    pub service: String,
    pub handle: Handle,
    pub export_uid: [u8; 16],
    /// Unix seconds since when nobody may use it; not given again for a day.
    #[serde(default)]
    pub released: Option<u64>,
}
impl Record for HandleRecord {
    const TABLE: Table = Table::Handles;
}

impl HandleRecord {
    pub fn binding(&self) -> HandleBinding {
        HandleBinding {
            handle: self.handle,
            importer: self.importer.clone(),
            service: self.service.clone(),
            export_uid: self.export_uid,
        }
    }
}

/// A token as it is kept: the secret is hashed.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TokenRecord {
    pub kind: TokenPurpose,
    /// SHA-256 of the secret, hex.
    pub secret_sha256: String,
    pub not_after: u64,
    pub provisional: Option<Block>,
    /// Hash of the request that used it: the same request may be repeated when its answer was lost.
    #[serde(default)]
    pub used_by: Option<String>,
    /// What that request was given: it gets the same again.
    #[serde(default)]
    pub lease: Option<Block>,
    #[serde(default)]
    pub wrong_secrets: u32,
}
impl Record for TokenRecord {
    const TABLE: Table = Table::Tokens;
}

/// What a token is bound to.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum TokenPurpose {
    Workload {
        role: Role,
        name: String,
        namespace: String,
        /// Of a machine; empty: none.
        #[serde(default)]
        group: String,
    },
    Link {
        peer: ClusterName,
    },
}

/// A failover decision of a sidecar.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ShiftRecord {
    pub sidecar: String,
    /// Of the sidecar: replicas share an identity, and each counts for itself.
    #[serde(default)]
    pub block: Option<Block>,
    pub sequence: u64,
    pub at_unix_ms: u64,
    pub service: String,
    pub from_tier: usize,
    pub to_tier: usize,
    pub clusters: Vec<ClusterName>,
    pub reason: String,
}
impl Record for ShiftRecord {
    const TABLE: Table = Table::Shifts;
}

/// An SVID that was issued.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct IdentityRecord {
    pub spiffe_id: String,
    pub role: Role,
    pub serial: String,
    pub issued_unix: u64,
    pub not_after: u64,
    /// Shown by the workload itself, not by the sidecar on the overlay.
    #[serde(default)]
    pub workload: bool,
    /// SHA-256 of the issuing key, hex: a CRL lists what its signer has issued. Empty: of before this was noted.
    #[serde(default)]
    pub issuer: String,
}
impl Record for IdentityRecord {
    const TABLE: Table = Table::Identities;
}

impl Facts {
    /// Where a linked peer may announce gateways.
    pub fn allowed_ranges(&self, peer: &ClusterName) -> AllowedRanges {
        let loopback = self.links.get(peer).is_some_and(|link| link.loopback);
        let ranges = self.link_spec(peer).map(|spec| spec.allowed_gateway_ranges.clone()).unwrap_or_default();
        AllowedRanges { ranges, loopback }
    }

    /// The applied `ClusterLink` of a peer.
    pub fn link_spec(&self, peer: &ClusterName) -> Option<&ClusterLinkSpec> {
        self.link_specs().find_map(|(name, spec)| (name == peer.as_str()).then_some(spec))
    }

    /// Every applied `ClusterLink` with the peer that it is about. They are few beside other objects.
    pub fn link_specs(&self) -> impl Iterator<Item = (&str, &ClusterLinkSpec)> {
        const KIND: &str = "ClusterLink";
        let first = ObjectKey { kind: KIND, namespace: String::new(), name: String::new() };
        let of_kind = self.objects.range(first..).take_while(|(key, _)| key.kind == KIND);
        of_kind.filter_map(|(_, stored)| match &stored.object.spec {
            Spec::ClusterLink(spec) => {
                Some((spec.cluster.as_deref().unwrap_or(&stored.object.metadata.name), spec))
            }
            _ => None,
        })
    }

    /// The tag of a peer that some applied `ClusterLink` is to link without a token.
    pub fn linked_by_object(&self, peer: &ClusterName) -> Option<ClusterTag> {
        self.link_specs().filter(|(name, _)| *name == peer.as_str()).find_map(|(_, spec)| spec.links())
    }

    /// Clusters that are still to be linked by objects.
    pub fn pending_contacts(&self) -> impl Iterator<Item = &Arc<FirstContact>> {
        let live = |peer: &ClusterName| self.links.get(peer).is_some_and(|link| link.is_live());
        self.first_contacts.values().filter(move |contact| !live(&contact.peer))
    }

    /// Where a peer's gateways are, as last said. Those that were named when the link was made are bound by ranges that
    /// were set later, too.
    pub fn peer_gateways(&self, link: &Link) -> Vec<PeerGateway> {
        let announced = self.imports.get(&link.peer).map(|import| &import.gateways);
        match announced {
            Some(gateways) if !gateways.is_empty() => gateways.clone(),
            _ => {
                let AllowedRanges { ranges, .. } = self.allowed_ranges(&link.peer);
                let allowed = |address: SocketAddr| {
                    ranges.is_empty()
                        || ranges.iter().any(|range| range.contains(&address.ip().to_canonical()))
                };
                link.first_gateways.iter().filter(|gateway| allowed(gateway.address)).cloned().collect()
            }
        }
    }

    /// Linked peers between which traffic may flow.
    pub fn live_links(&self) -> impl Iterator<Item = &Arc<Link>> {
        self.links.values().filter(|link| link.is_live())
    }

    /// The handles in use of one importer.
    pub fn handles_of<'a>(
        &'a self,
        importer: &'a ClusterName,
    ) -> impl Iterator<Item = &'a HandleRecord> + 'a {
        let of = self.handles.range((importer.clone(), String::new())..);
        of.take_while(move |((of, _), _)| of == importer)
            .map(|(_, record)| record)
            .filter(|record| record.released.is_none())
    }

    /// The handle allotted to an importer for a service, if it is in use.
    pub fn handle(&self, importer: &ClusterName, service: &str) -> Option<&HandleRecord> {
        self.handles.get(&(importer.clone(), service.to_owned())).filter(|h| h.released.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_is_read_from_the_path_alone() {
        let role = |path: &str| Role::of(&format!("spiffe://a.example/cluster/east{path}").parse().unwrap());
        assert_eq!(role("/gateway/gw-1"), Some(Role::Gateway));
        assert_eq!(role("/ns/shop/sa/web"), Some(Role::Sidecar));
        assert_eq!(role("/vm/db-1"), Some(Role::Vm));
        for other in ["/gateway", "/gateway/a/b", "/ns/shop/web", "/admin"] {
            assert_eq!(role(other), None, "{other}");
        }
    }
}
