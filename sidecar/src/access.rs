//! Access policies as the federator sent them, read once, and the admission that live streams are held against. Pure.
//!
//! Everything here errs on the closed side: a policy that can't be read admits nobody to the services it was sent for
//! (unless its spec says `dryRun`), and a stream whose connection's handle is not in the same admission is not served.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde_json::Value;
use tombolo_identity::{PeerIdentity, SpiffeId};
use tombolo_model::access::{Caller, Policy, Verdict, admits_foreign, decide};
use tombolo_model::names::{ClusterName, Namespace, ObjectName, ServiceKey};
use tombolo_model::resource::AccessPolicySpec;
use tombolo_overlay::{HandleClass, Inbound, PeerConnection};
use tombolo_proto::convert::{self, FieldError};
use tombolo_proto::v1;

use crate::tables::Rejected;

/// The policies of this sidecar's services, and what they may ask of callers' clusters.
#[derive(Clone, Debug, PartialEq)]
pub struct Access {
    own: ClusterName,
    policies: HashMap<ServiceKey, Vec<Arc<Policy>>>,
    properties: HashMap<ClusterName, BTreeMap<String, String>>,
}

impl Access {
    /// Without any policy: what the handles admit.
    pub fn open(own: ClusterName) -> Self {
        Self { own, policies: HashMap::new(), properties: HashMap::new() }
    }

    /// Reads the policies of a snapshot, and says what it could not.
    pub fn read(wire: &v1::SidecarSnapshot, own: &ClusterName) -> (Self, Vec<Rejected>) {
        let mut access = Self::open(own.clone());
        let mut rejected = Vec::new();
        for wire in &wire.access_policies {
            let read = policy(wire).map(Arc::new);
            for service in &wire.services {
                let service: ServiceKey = match convert::parse("access_policies.services", service) {
                    Ok(service) => service,
                    Err(error) => {
                        rejected.push(Rejected { record: "access_policy", error });
                        continue;
                    }
                };
                let policy = match &read {
                    Ok(policy) => Arc::clone(policy),
                    // It was to deny nothing anyway.
                    Err(unread) if unread.dry_run => continue,
                    Err(_) => Arc::new(Policy::unreadable(&wire.name, &service)),
                };
                access.policies.entry(service).or_default().push(policy);
            }
            if let Err(Unread { error, .. }) = read {
                rejected.push(Rejected { record: "access_policy", error });
            }
        }
        for wire in &wire.cluster_properties {
            match convert::parse("cluster_properties.cluster", &wire.cluster) {
                Ok(cluster) => {
                    access.properties.insert(cluster, wire.properties.clone().into_iter().collect());
                }
                Err(error) => rejected.push(Rejected { record: "cluster_properties", error }),
            }
        }
        (access, rejected)
    }

    /// Whether this caller may open, or keep open, a stream to a port of a service.
    pub fn decide(&self, caller: &PeerIdentity, service: &ServiceKey, port: u16) -> Verdict {
        let policies = self.policies.get(service).into_iter().flatten().map(AsRef::as_ref);
        let properties = self.properties.get(&caller.cluster);
        let caller = Caller::new(caller.spiffe_id.as_str(), &caller.cluster, &self.own, properties);
        decide(policies, &caller, service, port)
    }

    /// Whether any service here may be called by this identity of a foreign trust domain: only where a policy names it.
    pub fn admits_foreign(&self, id: &SpiffeId) -> bool {
        self.policies.iter().any(|(service, policies)| admits_foreign(policies, id.as_str(), service))
    }

    /// Which policies have a say about which services: what metric labels may be made of.
    pub fn names(&self) -> BTreeSet<(ServiceKey, Arc<str>)> {
        let of = |(service, policies): (&ServiceKey, &Vec<Arc<Policy>>)| {
            let service = service.clone();
            policies.clone().into_iter().map(move |policy| (service.clone(), Arc::clone(policy.name())))
        };
        self.policies.iter().flat_map(of).collect()
    }
}

/// Why a policy can't be read.
struct Unread {
    error: FieldError,
    dry_run: bool,
}

fn policy(wire: &v1::AccessPolicy) -> Result<Policy, Unread> {
    let json: Value = serde_json::from_str(&wire.spec_json).unwrap_or_default();
    let dry_run = json.get("dryRun") == Some(&Value::Bool(true));
    let unread = |found: &str, expected: String| Unread {
        error: FieldError::new("access_policies", format!("{found} of {}", wire.name), expected),
        dry_run,
    };
    let named = wire.name.split_once('/').filter(|(_, name)| name.parse::<ObjectName>().is_ok());
    let namespace = named.and_then(|(namespace, _)| namespace.parse::<Namespace>().ok());
    let namespace = namespace.ok_or_else(|| unread("the name", "NAMESPACE/NAME".to_owned()))?;
    let spec = serde_json::from_value::<AccessPolicySpec>(json);
    let spec =
        spec.map_err(|error| unread("the spec", format!("an AccessPolicy of this version ({error})")))?;
    let mut errors = Vec::new();
    let policy = Policy::read(&wire.name, &namespace, &spec, &mut errors);
    match errors.first() {
        None => Ok(policy),
        Some(error) => Err(unread("the spec", error.to_string())),
    }
}

/// What a configuration admits: handles and policies of one snapshot, so that no stream is held against half of each.
#[derive(Clone, Debug)]
pub struct Admission {
    pub inbound: Arc<Inbound>,
    pub access: Arc<Access>,
}

impl Admission {
    /// Before any configuration: nobody.
    pub fn nobody(own: ClusterName) -> Self {
        Self { inbound: Arc::default(), access: Arc::new(Access::open(own)) }
    }

    /// Whether the handle of a live connection still means what the connection was admitted for.
    pub fn admits(&self, connection: &PeerConnection) -> bool {
        let Some(handle) = connection.handle().and_then(|handle| self.inbound.handles.get(&handle)) else {
            return false;
        };
        handle.class == HandleClass::Mesh
            && connection.service() == Some(&handle.service)
            && connection.importer() == handle.importer.as_ref()
    }
}

#[cfg(test)]
mod tests;
