//! A link as it stands: whether the peer's federator is heard, and whether packets get to its gateways. The two differ:
//! a control connection may be lost while traffic flows.

use std::time::Duration;

use tombolo_model::names::ClusterName;
use tombolo_model::sync::Freshness;
use tombolo_proto::v1::HopStatus;

use super::View;
use super::text::{listed, message, span};
use crate::facts::{FirstContact, Link};
use crate::registry::{Gateway, Member, Presence};

/// How it is with a peer's federator.
pub struct Standing {
    /// For `status`: `connected`, `stale`, `expired`, `connecting` or `recreated`.
    pub state: &'static str,
    /// For conditions: a reason in CamelCase.
    pub reason: &'static str,
    /// For people, with what to do; empty when all is well.
    pub message: String,
    /// Since it was last heard.
    pub age: Option<Duration>,
}

impl Standing {
    pub fn is_connected(&self) -> bool {
        self.state == "connected"
    }
}

/// Of a peer, linked or only named by a `ClusterLink`.
pub fn standing(view: &View<'_>, peer: &ClusterName) -> Standing {
    let import = view.facts.imports.get(peer);
    let age = import.and_then(|import| import.heard).map(|heard| view.since(heard));
    let stands = |state, reason, text: String| Standing { state, reason, message: message(text), age };
    let Some(link) = view.facts.links.get(peer) else {
        if let Some(contact) = view.facts.first_contacts.get(peer) {
            return stands("connecting", "Pending", pending(view, contact));
        }
        let text = format!(
            "{peer} is not linked yet: give this object its tag and gateways, and make one there about {} in turn; or run `tombolo link token {peer}` here and `tombolo link join` there",
            view.facts.cluster.name
        );
        return stands("connecting", "NotLinked", text);
    };
    if let (false, Some(contact)) = (link.is_live(), view.facts.first_contacts.get(peer)) {
        return stands("connecting", "Pending", pending(view, contact));
    }
    if !link.is_live() {
        let text = format!("{peer} has unlinked: run `tombolo unlink {peer}` here too, or link anew");
        return stands("expired", "EndedByPeer", text);
    }
    if let Some(tag) = link.recreated {
        let text = format!(
            "a cluster {peer} with tag {tag} showed up, known is {}: if its operators made it anew, run `tombolo link accept {peer}`; if not, somebody uses its name",
            link.tag
        );
        return stands("recreated", "Recreated", text);
    }
    let freshness = import.map_or(Freshness::Expired, |import| import.freshness);
    let connected = import.is_some_and(|import| import.connected);
    let error = import.map(|import| import.last_error.as_str()).filter(|error| !error.is_empty());
    let error = error.map(|error| format!(" ({error})")).unwrap_or_default();
    let Some(heard) = age.map(span) else {
        let text = format!("{peer}'s federator has not been heard yet{error}: {}", check(view, link));
        return stands("connecting", "Connecting", text);
    };
    match freshness {
        Freshness::Fresh if connected => stands("connected", "Connected", String::new()),
        Freshness::Fresh => {
            let text = format!("the control connection broke, {heard} ago{error}; dialling again");
            stands("connecting", "Reconnecting", text)
        }
        Freshness::Stale => {
            let text = format!(
                "{peer}'s federator was last heard {heard} ago{error}; what it exports is kept until its lease ends: {}",
                check(view, link)
            );
            stands("stale", "Stale", text)
        }
        Freshness::Expired => {
            let text = format!(
                "{peer}'s federator was last heard {heard} ago{error}, its lease has ended and its exports are out of rotation: {}",
                check(view, link)
            );
            stands("expired", "Expired", text)
        }
    }
}

/// What an object that links waits for.
fn pending(view: &View<'_>, contact: &FirstContact) -> String {
    let (own, peer) = (&view.facts.cluster, &contact.peer);
    let error = match contact.last_error.as_str() {
        "" => String::new(),
        error => format!(" ({error})"),
    };
    format!(
        "waiting for {peer}'s object: there, a ClusterLink about cluster {} with tag \"{}\" and the gateways of {}{error}",
        own.name, own.tag, own.name
    )
}

/// What to look at when a peer is not heard.
fn check(view: &View<'_>, link: &Link) -> String {
    let gateways = view.facts.peer_gateways(link);
    if gateways.is_empty() {
        return format!("none of {}'s gateways is known", link.peer);
    }
    let addresses = listed(gateways.iter().map(|gateway| gateway.address));
    format!("check that its federator and gateways run and that UDP to {addresses} is open")
}

/// A hop from one of our gateways to one of a peer's.
pub struct Path<'a> {
    pub gateway: &'a Gateway,
    pub hop: &'a HopStatus,
    /// Answered, and the gateway that says so is heard.
    pub alive: bool,
}

impl Path<'_> {
    /// The far gateway's name alone.
    pub fn to(&self) -> &str {
        self.hop.peer.rsplit('/').next().unwrap_or_default()
    }
    pub fn rtt_ms(&self) -> Option<f64> {
        // Microseconds stay exact in an f64 for centuries.
        (self.hop.rtt_us > 0).then_some(self.hop.rtt_us as f64 / 1000.0)
    }
}

/// Every path to a peer that our gateways probe.
pub fn paths<'a>(view: &View<'a>, peer: &ClusterName) -> Vec<Path<'a>> {
    let leads_there = |hop: &HopStatus| {
        if hop.cluster.is_empty() {
            hop.peer.split_once('/').is_some_and(|(cluster, _)| cluster == peer.as_str())
        } else {
            hop.cluster == peer.as_str()
        }
    };
    let gateways = view.facts.registry.gateways.values();
    gateways
        .flat_map(|gateway| gateway.hops.iter().map(move |hop| (gateway, hop)))
        .filter(|(_, hop)| leads_there(hop))
        .map(|(gateway, hop)| Path { gateway, hop, alive: hop.alive && gateway.presence == Presence::Live })
        .collect()
}

/// A path from one of our sidecars to a peer's gateway or endpoint, past our own gateways.
pub struct PastGateways<'a> {
    pub member: &'a Member,
    pub hop: &'a HopStatus,
    /// Answered, and the sidecar that says so is heard.
    pub alive: bool,
}

/// Every one that sidecars tell of.
pub fn past_gateways<'a>(
    view: &View<'a>,
    peer: &'a ClusterName,
) -> impl Iterator<Item = PastGateways<'a>> + 'a {
    let members = view.facts.registry.members.values();
    let hops = members.flat_map(|member| member.hops.iter().map(move |hop| (member, hop)));
    hops.filter(|(_, hop)| hop.cluster == peer.as_str()).map(|(member, hop)| PastGateways {
        member,
        hop,
        alive: hop.alive && member.presence == Presence::Live,
    })
}

/// The live path with the least delay; one that is not measured yet comes last.
pub fn best<'p, 'a>(paths: &'p [Path<'a>]) -> Option<&'p Path<'a>> {
    let live = paths.iter().filter(|path| path.alive);
    live.min_by_key(|path| (path.hop.rtt_us == 0, path.hop.rtt_us, path.hop.loss_per_mille))
}

/// Whether packets get to a peer.
pub struct Reachability {
    /// `None`: can't tell yet.
    pub reachable: Option<bool>,
    pub reason: &'static str,
    pub message: String,
}

pub fn reachability(view: &View<'_>, peer: &ClusterName, paths: &[Path<'_>]) -> Reachability {
    let says = |reachable, reason, text: String| Reachability { reachable, reason, message: message(text) };
    let gateways = &view.facts.registry.gateways;
    if gateways.is_empty() {
        let text = "this cluster has no gateway: start one with `tombolo gateway`".to_owned();
        return says(Some(false), "NoGateway", text);
    }
    if gateways.values().all(|gateway| gateway.presence != Presence::Live) {
        let names = listed(gateways.keys());
        return says(
            Some(false),
            "NoGateway",
            format!("no gateway of this cluster reports ({names}): start one"),
        );
    }
    if let Some(path) = best(paths) {
        let live = paths.iter().filter(|path| path.alive).count();
        let rtt = path.rtt_ms().map(|ms| format!(" in {ms:.1} ms")).unwrap_or_default();
        let text = format!(
            "{live} of {} paths are alive, the best is {} to {}{rtt}",
            paths.len(),
            path.gateway.name,
            path.to()
        );
        return says(Some(true), "PathAlive", text);
    }
    if paths.is_empty() {
        return says(None, "NotProbed", format!("no gateway of {peer} has been probed yet"));
    }
    let tried = listed(paths.iter().map(|path| format!("{} at {}", path.to(), path.hop.address)));
    let text = format!(
        "no gateway of {peer} answers probes ({tried}): check that they run, and that UDP is open from here to there"
    );
    says(Some(false), "NoPath", text)
}
