//! Sidecars as operators know them: by name, with a verdict.

use std::collections::BTreeMap;

use tombolo_identity::SpiffeId;
use tombolo_model::names::ServiceKey;

use super::View;
use super::text::{self, sentences, span};
use crate::registry::{Member, Presence};

/// The name that a member goes by: the last segment of its identity.
pub fn holder(id: &SpiffeId) -> &str {
    id.path().rsplit('/').next().unwrap_or_default()
}

/// The namespace of a sidecar's identity; machines have none.
pub fn namespace(id: &SpiffeId) -> Option<&str> {
    let mut segments = id.within_cluster()?.split('/').skip(1);
    (segments.next() == Some("ns")).then(|| segments.next()).flatten()
}

/// Whether a member is in order, and what there is to say about it.
pub struct Verdict {
    pub healthy: bool,
    pub reason: String,
}

/// Of a member in whole: heard, and every service that it serves healthy.
pub fn verdict(view: &View<'_>, member: &Member) -> Verdict {
    if member.presence != Presence::Live {
        return Verdict { healthy: false, reason: absence(view, member) };
    }
    let unhealthy = member
        .services
        .iter()
        .filter(|(_, served)| !served.healthy)
        .map(|(service, served)| format!("{service}: {}", or(&served.reason, "not healthy")));
    let unhealthy: Vec<String> = unhealthy.collect();
    let refused =
        member.refused.iter().map(|(service, reason)| format!("{service} is not accepted: {reason}"));
    let own = (!member.reason.is_empty()).then(|| member.reason.clone());
    let healthy = unhealthy.is_empty();
    let reason = text::message(sentences(own.into_iter().chain(unhealthy).chain(refused)));
    Verdict { healthy, reason }
}

/// Why a member that is not heard is out of rotation.
fn absence(view: &View<'_>, member: &Member) -> String {
    match member.presence {
        Presence::Live => String::new(),
        Presence::Left => or(&member.reason, "it has left"),
        Presence::Silent => {
            let silence = span(view.now.saturating_sub(member.heard));
            let gone = if member.gone(view.now) { "; it may be gone" } else { "" };
            format!("no report for {silence}{gone}")
        }
    }
}

/// Why the endpoints of a service that are out of rotation are so, by name.
pub fn troubles(view: &View<'_>, service: &ServiceKey) -> Vec<String> {
    let out = view.serving(service).iter().filter(|member| !member.in_rotation(service));
    out.map(|member| {
        let reason = match member.presence {
            Presence::Live => {
                or(member.services.get(service).map_or("", |served| &served.reason), "not healthy")
            }
            Presence::Left | Presence::Silent => absence(view, member),
        };
        format!("{}: {reason}", holder(&member.spiffe_id))
    })
    .collect()
}

fn or(text: &str, otherwise: &str) -> String {
    if text.is_empty() { otherwise.to_owned() } else { text.to_owned() }
}

/// A member's address, or that it has none and registers at the gateways.
pub fn address(member: &Member) -> String {
    member.address.map_or_else(|| "registers".to_owned(), |address| address.to_string())
}

/// Its endpoint id; of a member that has not said which it uses, its block.
pub fn id(member: &Member) -> String {
    member.ids.first().map_or_else(|| member.block.to_string(), ToString::to_string)
}

/// Members of a name and the namespace that the services of one workload are in; replicas share both.
pub fn by_workload<'a>(view: &View<'a>) -> BTreeMap<(String, String), Vec<&'a Member>> {
    let mut workloads: BTreeMap<(String, String), Vec<&Member>> = BTreeMap::new();
    for member in view.facts.registry.members.values() {
        let mut last = None;
        // Services come in order of namespaces.
        for namespace in member.services.keys().map(|service| service.namespace.as_str()) {
            if last != Some(namespace) {
                let key = (namespace.to_owned(), holder(&member.spiffe_id).to_owned());
                workloads.entry(key).or_default().push(member);
                last = Some(namespace);
            }
        }
    }
    workloads
}
