//! What operators see: `tombolo status`, `get` and `describe`, computed from the facts (pure, time passed in).
//!
//! [`status`] is one document about the whole cluster, [`objects`] are the applied objects and those that follow from
//! the facts (an import from a peer's export, a workload from a sidecar that joined), each with conditions. Whatever
//! peers and members said is odd until shown otherwise: nothing here can fail, and what they wrote is cut short.
//!
//! Two times are passed in: `now` is monotonic, the registry's; `unix` is since the Unix epoch, for what is shown and for
//! ages of what peers said.

mod conditions;
pub mod kubernetes;
mod links;
mod members;
mod objects;
mod status;
mod supply;
mod text;

use std::collections::BTreeMap;
use std::time::Duration;

use tombolo_model::ids::ClusterTag;
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::resource::{Condition, ObjectKey};
use tombolo_model::status::ClusterStatus;

pub use objects::{DERIVED, Query};

use crate::exports;
use crate::facts::Facts;
use crate::registry::Member;

pub use text::rfc3339_seconds;

/// The document that `tombolo status -o json` prints.
pub fn status(facts: &Facts, now: Duration, unix: Duration) -> ClusterStatus {
    status::document(&View::new(facts, now, unix))
}

/// The objects of a kind, by namespace and name, with their status.
pub fn objects(facts: &Facts, query: &Query, now: Duration, unix: Duration) -> Vec<serde_json::Value> {
    objects::list(&View::new(facts, now, unix), query)
}

/// Conditions and status of every object of our own kinds that Kubernetes keeps.
pub fn kept_in_kubernetes(
    facts: &Facts,
    now: Duration,
    unix: Duration,
) -> BTreeMap<ObjectKey, (Vec<Condition>, serde_json::Value)> {
    objects::kept_in_kubernetes(&View::new(facts, now, unix))
}

/// A linked cluster, as the inventory shows it.
#[derive(Clone, PartialEq, Debug)]
pub struct Peer {
    pub name: ClusterName,
    pub tag: ClusterTag,
    pub connected: bool,
    /// Why, or why not: CamelCase.
    pub reason: String,
    pub properties: BTreeMap<String, String>,
}

/// Every linked cluster.
pub fn peers(facts: &Facts, now: Duration, unix: Duration) -> Vec<Peer> {
    let view = View::new(facts, now, unix);
    let peer = |link: &std::sync::Arc<crate::facts::Link>| {
        let standing = links::standing(&view, &link.peer);
        // The peer's own record replaces what was told when the link was made.
        let announced = facts.imports.get(&link.peer).map(|import| &import.properties);
        let properties = announced.filter(|properties| !properties.is_empty()).unwrap_or(&link.properties);
        Peer {
            name: link.peer.clone(),
            tag: link.tag,
            connected: standing.is_connected(),
            reason: standing.reason.to_owned(),
            properties: properties.clone(),
        }
    };
    facts.live_links().map(peer).collect()
}

/// The facts at one moment, with the indexes that more than one part needs.
struct View<'a> {
    facts: &'a Facts,
    now: Duration,
    unix: Duration,
    serving: BTreeMap<&'a ServiceKey, Vec<&'a Member>>,
}

impl<'a> View<'a> {
    fn new(facts: &'a Facts, now: Duration, unix: Duration) -> Self {
        Self { facts, now, unix, serving: exports::members_by_service(facts) }
    }

    /// This cluster's endpoints of a service, in rotation or not.
    fn serving(&self, service: &ServiceKey) -> &[&'a Member] {
        self.serving.get(service).map(Vec::as_slice).unwrap_or_default()
    }

    /// How many of this cluster's endpoints are in rotation, and how many there are.
    fn local_counts(&self, service: &ServiceKey) -> (u32, u32) {
        let members = self.serving(service);
        let healthy = members.iter().filter(|member| member.in_rotation(service)).count();
        (u32::try_from(healthy).unwrap_or(u32::MAX), u32::try_from(members.len()).unwrap_or(u32::MAX))
    }

    /// How long ago something happened; nothing happens in the future.
    fn since(&self, unix: Duration) -> Duration {
        self.unix.saturating_sub(unix)
    }
}

#[cfg(test)]
pub(crate) mod tests;
