//! `Workload`: `Joined` (its sidecar is there) and `Ready` (it serves what the object says, in rotation).

use tombolo_model::resource::{Condition, WorkloadSpec};

use super::super::text::{listed, sentences};
use super::super::{View, members};
use super::condition;
use crate::registry::Member;

/// Of a workload with its members; `name` is the sidecar's.
pub fn of(
    view: &View<'_>,
    namespace: &str,
    name: &str,
    spec: &WorkloadSpec,
    found: &[&Member],
) -> Vec<Condition> {
    if found.is_empty() {
        let text = format!(
            "no sidecar or machine named {name} has joined: make a token with `tombolo token create --role sidecar --name {name} -n {namespace}`, or `tombolo vm token {name}`"
        );
        return vec![
            condition("Joined", false, "NotJoined", text),
            condition("Ready", false, "NotJoined", "waits for its sidecar: see Joined"),
        ];
    }
    let who =
        listed(found.iter().map(|member| format!("{} at {}", member.spiffe_id, members::address(member))));
    vec![condition("Joined", true, "Joined", who), ready(view, namespace, name, spec, found)]
}

fn ready(view: &View<'_>, namespace: &str, name: &str, spec: &WorkloadSpec, found: &[&Member]) -> Condition {
    let mut absent = Vec::new();
    for service in &spec.services {
        let key = format!("{namespace}/{}", service.name);
        let served = found.iter().any(|member| member.services.keys().any(|k| k.to_string() == key));
        let refused = found.iter().find_map(|member| member.refused.get(&key));
        match (served, refused) {
            (true, _) => {}
            (false, Some(reason)) => {
                let text = format!("{key} is not accepted: {reason}");
                return condition("Ready", false, "Refused", text);
            }
            (false, None) => absent.push(key),
        }
    }
    if !absent.is_empty() {
        let text = format!(
            "{name} does not serve {}: give its sidecar this manifest with --workload, or --service",
            listed(absent)
        );
        return condition("Ready", false, "NotServed", text);
    }
    let verdicts: Vec<_> =
        found.iter().map(|member| (members::id(member), members::verdict(view, member))).collect();
    let healthy = verdicts.iter().filter(|(_, verdict)| verdict.healthy).count();
    let said = verdicts.iter().filter(|(_, verdict)| !verdict.reason.is_empty());
    let said = said.map(|(id, verdict)| format!("{id}: {}", verdict.reason));
    let count = format!("{healthy} of {} endpoints are in order", verdicts.len());
    let text = sentences(std::iter::once(count).chain(said));
    condition("Ready", healthy > 0, if healthy > 0 { "Ready" } else { "Unhealthy" }, text)
}
