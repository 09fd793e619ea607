//! A snapshot of the federator, parsed once into what the byte path looks up. Pure.
//!
//! Records are refused one by one, with the field and the value; the rest of the snapshot counts. A snapshot of another
//! cluster is refused whole.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use tombolo_identity::jwt::{JwtAuthorities, JwtAuthority};
use tombolo_identity::{ForeignBundle, SpiffeId, TrustDomain};
use tombolo_model::ids::{ClusterTag, EndpointId, Handle};
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::protocol::Protocol;
use tombolo_model::resource::workload::DEFAULT_WEIGHT;
use tombolo_overlay::keys::KeyRing;
use tombolo_overlay::lease::EndpointLease;
use tombolo_overlay::member::{control_targets, gateway_hops};
use tombolo_overlay::{Across, GatewayHop, HandleClass, Inbound, InboundHandle, Routes};
use tombolo_proto::convert::{self, FieldError};
use tombolo_proto::v1;

use crate::access::Access;
use crate::told::{self, PodService};

/// Identities that may serve one backend: a service runs under a handful; more is a mistake or an attack.
const MAX_IDENTITIES: usize = 64;

/// One cluster's share of a service.
#[derive(Clone, Debug, PartialEq)]
pub struct Backend {
    pub cluster: ClusterName,
    pub tag: ClusterTag,
    pub handle: Handle,
    pub keys: Arc<KeyRing>,
    /// One of which a peer must prove.
    pub identities: Arc<[SpiffeId]>,
    /// Of each endpoint of an identity, in the same order; none: all alike.
    pub weights: Arc<[u32]>,
    pub healthy: u32,
    pub total: u32,
    pub properties: BTreeMap<String, String>,
    pub stale: bool,
    /// That this cluster serves; none: it has not said.
    pub ports: Vec<(Protocol, u16)>,
}

impl Backend {
    /// The share of one endpoint of this identity, relative to others.
    pub fn weight(&self, id: &SpiffeId) -> u32 {
        let at = self.identities.iter().position(|known| known == id);
        at.and_then(|at| self.weights.get(at)).copied().unwrap_or(DEFAULT_WEIGHT)
    }
    /// Whether endpoints have shares of their own.
    pub fn is_weighted(&self) -> bool {
        !self.weights.is_empty()
    }
}

/// A service that local applications call.
#[derive(Clone, Debug, PartialEq)]
pub struct Upstream {
    pub service: ServiceKey,
    /// None: nobody has said yet.
    pub ports: Vec<(Protocol, u16)>,
    /// Virtual: what its names resolve to in this cluster.
    pub addresses: Vec<IpAddr>,
    pub backends: Vec<Arc<Backend>>,
    /// Spec of the policy; empty for the default.
    pub policy_json: String,
    pub policy_name: String,
}

impl Upstream {
    /// Whether any port is called over this, as far as that is known.
    pub fn may_have(&self, protocol: Protocol) -> bool {
        self.ports.is_empty() || self.ports.iter().any(|(known, _)| *known == protocol)
    }
    /// Whether it has this port, as far as that is known.
    pub fn may_serve(&self, protocol: Protocol, port: u16) -> bool {
        self.ports.is_empty() || self.ports.contains(&(protocol, port))
    }
}

/// A record that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// A metric label.
    pub record: &'static str,
    pub error: FieldError,
}

/// The parsed snapshot.
#[derive(Clone, Debug)]
pub struct Tables {
    pub revision: u64,
    pub cluster: ClusterName,
    pub routes: Routes,
    pub inbound: Arc<Inbound>,
    pub access: Arc<Access>,
    pub upstreams: HashMap<ServiceKey, Arc<Upstream>>,
    pub lease: Option<EndpointLease>,
    pub federators: Vec<(EndpointId, Option<SocketAddr>)>,
    pub gateways: Vec<GatewayHop>,
    pub trust_bundle: String,
    /// Of this and every linked cluster.
    pub jwt_authorities: Arc<JwtAuthorities>,
    /// Of foreign trust domains: for the Workload API alone, never for handshakes of this sidecar.
    pub federated: Arc<BTreeMap<TrustDomain, ForeignBundle>>,
    /// Of the authority above the cluster's CA: for the Workload API alone, too.
    pub upstream_roots: Arc<[CertificateDer<'static>]>,
    /// What Kubernetes sends to this pod; `None`: not known.
    pub pod_services: Option<Vec<PodService>>,
    pub rejected: Vec<Rejected>,
}

/// Collects what parsed and why the rest did not.
struct Sieve(Vec<Rejected>);

impl Sieve {
    fn take<T>(&mut self, record: &'static str, parsed: Result<T, FieldError>) -> Option<T> {
        parsed.map_err(|error| self.0.push(Rejected { record, error })).ok()
    }
}

impl Tables {
    /// Parses a snapshot that is for a member of `own`.
    pub fn parse(wire: &v1::SidecarSnapshot, own: &ClusterName, tag: ClusterTag) -> Result<Self, FieldError> {
        if wire.cluster != own.as_str() || wire.tag != tag.value() {
            let found = format!("{} (tag {:06x})", wire.cluster, wire.tag);
            return Err(FieldError::new("cluster", found, format!("{own} (tag {tag})")));
        }
        let mut sieve = Sieve(Vec::new());
        let (gateways, rejected) = gateway_hops(&wire.gateways);
        sieve.0.extend(rejected.into_iter().map(|error| Rejected { record: "gateway", error }));
        let (federators, rejected) = control_targets(&wire.federators);
        sieve.0.extend(rejected.into_iter().map(|error| Rejected { record: "federator", error }));

        let mut routes = Routes::empty(tag);
        routes.gateways.clone_from(&gateways);
        routes.control = federators.iter().filter_map(|(id, address)| Some((*id, (*address)?))).collect();
        if wire.direct {
            for endpoint in &wire.endpoints {
                if let Some((block, Some(address))) = sieve.take("endpoint", local_endpoint(endpoint)) {
                    routes.endpoints.insert(block, address);
                }
            }
        }
        for link in &wire.across {
            if let Some((tag, across, rejected)) = sieve.take("across", Across::from_wire(link)) {
                sieve.0.extend(rejected.into_iter().map(|error| Rejected { record: "across", error }));
                routes.across.insert(tag, across);
            }
        }
        let mut handles = HashMap::new();
        for handle in &wire.inbound {
            if let Some((id, handle)) = sieve.take("inbound", inbound(handle)) {
                handles.insert(id, handle);
            }
        }
        let (access, rejected) = Access::read(wire, own);
        sieve.0.extend(rejected);
        let mut upstreams = HashMap::new();
        for wire in &wire.upstreams {
            if let Some(upstream) = sieve.take("upstream", upstream(wire, own, &mut routes)) {
                let (backends, rejected) = upstream;
                sieve.0.extend(rejected);
                upstreams.insert(backends.service.clone(), Arc::new(backends));
            }
        }
        let authorities =
            wire.jwt_authorities.iter().filter_map(|a| sieve.take("jwt authority", jwt_authority(a)));
        let jwt_authorities = Arc::new(JwtAuthorities::new(authorities));
        let federated =
            wire.federated_bundles.iter().filter_map(|b| sieve.take("federated bundle", federated_bundle(b)));
        let federated = federated.map(|bundle| (bundle.trust_domain().clone(), bundle)).collect();
        let pod_services = wire.pod_services.as_ref().map(|told| {
            let services = told.services.iter().take(told::MAX_SERVICES);
            services.filter_map(|service| sieve.take("pod service", told::read(service))).collect()
        });
        let lease = wire.lease.as_ref().and_then(|l| sieve.take("lease", EndpointLease::from_wire(l)));
        Ok(Self {
            revision: wire.revision,
            cluster: own.clone(),
            routes,
            inbound: Arc::new(Inbound { handles }),
            access: Arc::new(access),
            upstreams,
            lease,
            federators,
            gateways,
            trust_bundle: wire.trust_bundle_json.clone(),
            jwt_authorities,
            federated: Arc::new(federated),
            upstream_roots: wire.upstream_roots.iter().cloned().map(CertificateDer::from).collect(),
            pod_services,
            rejected: sieve.0,
        })
    }
}

fn jwt_authority(wire: &v1::JwtAuthority) -> Result<JwtAuthority, FieldError> {
    let cluster = convert::parse("jwt_authorities.cluster", &wire.cluster)?;
    JwtAuthority::new(cluster, &wire.public_key).map_err(|e| {
        let found = format!("a key of {} bytes", wire.public_key.len());
        FieldError::new("jwt_authorities.public_key", found, format!("a point of P-256: {e}"))
    })
}

fn federated_bundle(wire: &v1::FederatedBundle) -> Result<ForeignBundle, FieldError> {
    let domain: TrustDomain = convert::parse("federated_bundles.trust_domain", &wire.trust_domain)?;
    ForeignBundle::parse(domain, wire.bundle_json.as_bytes()).map_err(|e| {
        let found = format!("a bundle of {}", wire.trust_domain);
        FieldError::new("federated_bundles.bundle_json", found, format!("a SPIFFE bundle: {e}"))
    })
}

fn local_endpoint(
    wire: &v1::LocalEndpoint,
) -> Result<(tombolo_model::ids::Block, Option<SocketAddr>), FieldError> {
    let block = convert::block("endpoints.block", wire.block)?;
    Ok((block, convert::address("endpoints.address", &wire.address)?))
}

fn inbound(wire: &v1::InboundHandle) -> Result<(Handle, InboundHandle), FieldError> {
    let class = wire.class();
    if class != v1::HandleClass::Service {
        return Err(FieldError::new("inbound.class", class.as_str_name(), "HANDLE_CLASS_SERVICE"));
    }
    let binding =
        wire.binding.as_ref().ok_or_else(|| FieldError::new("inbound.binding", "nothing", "present"))?;
    let service: ServiceKey = convert::parse("inbound.binding.service", &binding.service)?;
    let handle = Handle::from_u32(binding.handle);
    if handle.is_reserved() {
        return Err(FieldError::new("inbound.binding.handle", handle, "an allotted handle (256 or more)"));
    }
    let importer = convert::parse("inbound.binding.importer", &binding.importer)?;
    let service: Arc<str> = service.to_string().into();
    Ok((handle, InboundHandle { class: HandleClass::Mesh, importer: Some(importer), service }))
}

/// `fields`: what the number and the protocol are called.
fn port(
    [number, protocol]: [&'static str; 2],
    wire: &v1::ServicePort,
) -> Result<(Protocol, u16), FieldError> {
    let port = u16::try_from(wire.port).ok().filter(|port| *port != 0);
    let port = port.ok_or_else(|| FieldError::new(number, wire.port, "1..=65535"))?;
    let known = Protocol::parse(&wire.protocol);
    Ok((known.ok_or_else(|| FieldError::new(protocol, &wire.protocol, "TCP or UDP"))?, port))
}

fn upstream(
    wire: &v1::Upstream,
    own: &ClusterName,
    routes: &mut Routes,
) -> Result<(Upstream, Vec<Rejected>), FieldError> {
    let service: ServiceKey = convert::parse("upstreams.service", &wire.service)?;
    let mut sieve = Sieve(Vec::new());
    let ports = wire
        .ports
        .iter()
        .filter_map(|p| sieve.take("port", port(["upstreams.ports.port", "upstreams.ports.protocol"], p)))
        .collect();
    let mut backends: Vec<Arc<Backend>> = Vec::new();
    for wire in &wire.backends {
        let Some(backend) = sieve.take("backend", backend(wire)) else { continue };
        if backends.iter().any(|b| b.cluster == backend.cluster) {
            let error = FieldError::new("backends.cluster", &backend.cluster, "named once");
            sieve.0.push(Rejected { record: "backend", error });
            continue;
        }
        if backend.cluster == *own {
            // All of them, although one whose address is not known (behind NAT) is reached through a gateway: it is to
            // be chosen as often as the others. With none that is known, the gateway chooses alone.
            let healthy: Vec<_> = wire.endpoints.iter().copied().map(EndpointId::from_u32).collect();
            if healthy.iter().any(|e| routes.endpoints.contains_key(&e.block())) {
                routes.services.insert(backend.handle, healthy);
            }
        }
        backends.push(Arc::new(backend));
    }
    let address = |text: &String| convert::parse::<IpAddr>("upstreams.addresses", text);
    let addresses = wire.addresses.iter().filter_map(|text| sieve.take("address", address(text))).collect();
    let upstream = Upstream {
        service,
        ports,
        addresses,
        backends,
        policy_json: wire.failover_policy_json.clone(),
        policy_name: wire.policy_name.clone(),
    };
    Ok((upstream, sieve.0))
}

fn backend(wire: &v1::Backend) -> Result<Backend, FieldError> {
    if wire.spiffe_ids.is_empty() || wire.spiffe_ids.len() > MAX_IDENTITIES {
        let expected = format!("1 to {MAX_IDENTITIES} identities");
        return Err(FieldError::new("backends.spiffe_ids", wire.spiffe_ids.len(), expected));
    }
    if !wire.weights.is_empty() && wire.weights.len() != wire.spiffe_ids.len() {
        let expected = format!("none, or one for each of {} identities", wire.spiffe_ids.len());
        return Err(FieldError::new("backends.weights", wire.weights.len(), expected));
    }
    let identities = wire.spiffe_ids.iter().map(|id| convert::parse("backends.spiffe_ids", id));
    let keys = wire.keys.as_ref().ok_or_else(|| FieldError::new("backends.keys", "nothing", "present"))?;
    Ok(Backend {
        cluster: convert::parse("backends.cluster", &wire.cluster)?,
        tag: convert::tag("backends.tag", wire.tag)?,
        handle: Handle::from_u32(wire.handle),
        keys: Arc::new(KeyRing::from_wire(keys)?),
        identities: identities.collect::<Result<Vec<SpiffeId>, _>>()?.into(),
        weights: wire.weights.clone().into(),
        healthy: wire.healthy,
        total: wire.total,
        properties: wire.properties.clone().into_iter().collect(),
        stale: wire.stale,
        // One of another protocol is nobody's reason to leave the cluster out.
        ports: wire
            .ports
            .iter()
            .filter_map(|wire| port(["backends.ports.port", "backends.ports.protocol"], wire).ok())
            .collect(),
    })
}
