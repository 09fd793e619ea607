//! What `JoinPolicy` objects say of joiners, and of what joined members may serve. Pure: reads the facts.

use tombolo_identity::SpiffeId;
use tombolo_model::names::ServiceKey;
use tombolo_model::resource::join_policy::{self, Attested};
use tombolo_model::resource::{JoinPolicySpec, ObjectKey, Spec};

use crate::facts::{Facts, LeaseRecord};

const KIND: &str = "JoinPolicy";

/// Every policy by its name.
fn policies(facts: &Facts) -> impl Iterator<Item = (&str, &JoinPolicySpec)> {
    let first = ObjectKey { kind: KIND, namespace: String::new(), name: String::new() };
    let of_kind = facts.objects.range(first..).take_while(|(key, _)| key.kind == KIND);
    of_kind.filter_map(|(key, stored)| match &stored.object.spec {
        Spec::JoinPolicy(spec) => Some((key.name.as_str(), spec)),
        _ => None,
    })
}

/// Whether this joiner may have its identity. `Err`: why not, and what to do.
pub fn may_join(facts: &Facts, joiner: Attested<'_>) -> Result<(), String> {
    join_policy::judge(policies(facts), joiner).map(drop)
}

/// What a member has joined by; `None`: by a token of an operator for exactly this sidecar or gateway, which needs no policy.
pub fn attested<'a>(id: &'a SpiffeId, lease: &'a LeaseRecord) -> Option<Attested<'a>> {
    let parts: Vec<&str> = id.within_cluster()?.split('/').skip(1).collect();
    match parts.as_slice() {
        ["vm", name] => Some(Attested::Machine { name, group: &lease.group }),
        ["ns", namespace, "sa", name] if lease.pod.is_some() => {
            Some(Attested::ServiceAccount { namespace, name })
        }
        _ => None,
    }
}

/// Whether a member may serve this. `Err`: why not, and what to do.
pub fn may_serve(
    facts: &Facts,
    id: &SpiffeId,
    lease: &LeaseRecord,
    service: &ServiceKey,
) -> Result<(), String> {
    let Some(joiner) = attested(id, lease) else { return Ok(()) };
    let selecting = join_policy::judge(policies(facts), joiner)?;
    if join_policy::may_serve(&selecting, service) {
        return Ok(());
    }
    Err(format!("no JoinPolicy that selects it has {service} in spec.services: add it there"))
}

/// How many of those that have joined a policy selects.
pub fn selected(facts: &Facts, spec: &JoinPolicySpec) -> usize {
    let members = facts.registry.members.values().filter(|member| {
        let lease = facts.leases.get(&member.block);
        lease.and_then(|lease| attested(&member.spiffe_id, lease)).is_some_and(|joiner| spec.selects(joiner))
    });
    members.count()
}
