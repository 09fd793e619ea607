//! Workloads: applied ones with the members that they name, and those that are there because a sidecar or a machine
//! joined and serves. Replicas of one identity are one workload.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::{Value, json};
use tombolo_model::names::ServiceKey;
use tombolo_model::resource::workload::{WorkloadPort, WorkloadService};
use tombolo_model::resource::{Condition, Object, Spec, WorkloadSpec};

use super::super::text::rfc3339_seconds;
use super::super::{View, conditions, members};
use super::derived::{TOMBOLO, object};
use crate::exports::served_ports;
use crate::facts::Port;
use crate::registry::Member;

/// Members by the namespace of what they serve, and by name.
pub type ByWorkload<'a> = BTreeMap<(String, String), Vec<&'a Member>>;

/// Members that serve and that no applied `Workload` of that namespace names.
pub fn derived(view: &View<'_>) -> Vec<Object> {
    let applied = view.facts.objects.values().filter_map(|stored| match &stored.object.spec {
        Spec::Workload(spec) => {
            let metadata = &stored.object.metadata;
            let name = spec.holder(&metadata.name).to_owned();
            Some((metadata.namespace.clone().unwrap_or_default(), name))
        }
        _ => None,
    });
    let applied: BTreeSet<(String, String)> = applied.collect();
    let joined = joined(view);
    let serving = members::by_workload(view).into_iter().filter(|(place, _)| !applied.contains(place));
    serving
        .map(|((namespace, name), found)| {
            let ids = found.iter().filter_map(|member| joined.get(member.spiffe_id.as_str()));
            let created = ids.min().copied().map(Duration::from_secs);
            let place = (Some(namespace.as_str()), name.as_str());
            object(view, TOMBOLO, place, created, Spec::Workload(workload(&namespace, &found)))
        })
        .collect()
}

/// When the first SVID that is still on record was issued, by identity.
fn joined<'a>(view: &View<'a>) -> BTreeMap<&'a str, u64> {
    let mut joined: BTreeMap<&str, u64> = BTreeMap::new();
    for record in view.facts.identities.values() {
        let first = joined.entry(&record.spiffe_id).or_insert(record.issued_unix);
        *first = record.issued_unix.min(*first);
    }
    joined
}

/// What members serve in a namespace.
fn workload(namespace: &str, found: &[&Member]) -> WorkloadSpec {
    let mut services: BTreeMap<&ServiceKey, u32> = BTreeMap::new();
    for (service, served) in found.iter().flat_map(|member| &member.services) {
        if service.namespace.as_str() == namespace {
            services.insert(service, served.weight);
        }
    }
    let services = services.into_iter().map(|(service, weight)| WorkloadService {
        name: service.name.to_string(),
        ports: served_ports(found.iter().copied(), service).into_iter().map(port).collect(),
        backends: Vec::new(),
        health_check: None,
        weight: Some(weight),
    });
    WorkloadSpec { services: services.collect(), ..WorkloadSpec::default() }
}

fn port(port: Port) -> WorkloadPort {
    let Port { name, port, app_protocol, protocol } = port;
    let some = |text: String| (!text.is_empty()).then_some(text);
    WorkloadPort {
        name: some(name),
        port,
        target_port: None,
        target_host: None,
        protocol: some(protocol),
        app_protocol: some(app_protocol),
    }
}

/// Conditions and status; `serving` are the members by namespace and name.
pub fn status(
    view: &View<'_>,
    object: &Object,
    spec: &WorkloadSpec,
    serving: &ByWorkload<'_>,
) -> (Vec<Condition>, Value) {
    let namespace = object.metadata.namespace.as_deref().unwrap_or_default();
    let name = spec.holder(&object.metadata.name);
    let found = match serving.get(&(namespace.to_owned(), name.to_owned())) {
        Some(found) => found.clone(),
        None => joined_idle(view, namespace, name),
    };
    let conditions = conditions::workload::of(view, namespace, name, spec, &found);
    let endpoints: Vec<Value> = found.iter().map(|member| endpoint(view, member)).collect();
    (conditions, json!({ "endpoints": endpoints }))
}

/// Members of that name that serve nothing in the namespace: the machine, or the namespace's own sidecar.
fn joined_idle<'a>(view: &View<'a>, namespace: &str, name: &str) -> Vec<&'a Member> {
    let members = view.facts.registry.members.values();
    members
        .filter(|member| members::holder(&member.spiffe_id) == name)
        .filter(|member| members::namespace(&member.spiffe_id).is_none_or(|own| own == namespace))
        .collect()
}

fn endpoint(view: &View<'_>, member: &Member) -> Value {
    let members::Verdict { healthy, reason } = members::verdict(view, member);
    json!({
        "id": members::id(member),
        "spiffeId": member.spiffe_id.as_str(),
        "address": members::address(member),
        "healthy": healthy,
        "reason": reason,
        "lastSeen": rfc3339_seconds(member.heard_unix),
    })
}
