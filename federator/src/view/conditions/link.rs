//! `ClusterLink`: `Connected` (the peer's federator is heard), `Reachable` (packets get to its gateways), and only when
//! there is something to say `PastGateways`, `Recreated` and `RecordsAccepted`.

use tombolo_model::names::ClusterName;
use tombolo_model::resource::Condition;

use super::super::text::{sentences, span};
use super::super::{View, links};
use super::{condition, unknown};

pub fn of(view: &View<'_>, peer: &ClusterName) -> Vec<Condition> {
    let standing = links::standing(view, peer);
    let mut conditions = Vec::new();
    let connected = if standing.is_connected() {
        let heard = standing.age.map(|age| format!("heard {} ago", span(age))).unwrap_or_default();
        condition("Connected", true, "Connected", heard)
    } else {
        condition("Connected", false, standing.reason, standing.message.as_str())
    };
    conditions.push(connected);
    if !matches!(standing.reason, "NotLinked" | "EndedByPeer") {
        conditions.push(reachable(view, peer));
    }
    conditions.extend(past_gateways(view, peer));
    if standing.reason == "Recreated" {
        conditions.push(condition("Recreated", true, "OtherTag", standing.message));
    }
    let rejected = view.facts.imports.get(peer).map(|import| &import.rejected);
    if let Some(rejected) = rejected.filter(|rejected| !rejected.is_empty()) {
        let records = sentences(rejected.iter().map(|(key, reason)| format!("{key}: {reason}")));
        let text = format!("{} of {peer}'s records are not accepted: {records}", rejected.len());
        conditions.push(condition("RecordsAccepted", false, "RecordsRejected", text));
    }
    conditions
}

/// What `egress: remote` and `flat` came to.
fn past_gateways(view: &View<'_>, peer: &ClusterName) -> Option<Condition> {
    let spec = view.facts.link_spec(peer).filter(|spec| spec.flat || spec.egress_is_remote())?;
    let (mut alive, mut all) = (0u32, 0u32);
    for path in links::past_gateways(view, peer) {
        all += 1;
        alive += u32::from(path.alive);
    }
    let ranges = view.facts.allowed_ranges(peer);
    let exports = view.facts.imports.get(peer).into_iter().flat_map(|import| import.exports.values());
    let told = exports.flat_map(|export| &export.endpoints).filter(|_| spec.flat);
    let outside = match told.filter(|(_, address)| !ranges.allows(*address)).count() {
        0 => String::new(),
        outside => {
            format!("; {outside} of {peer}'s endpoints lie outside allowedGatewayRanges and are not used")
        }
    };
    let message = format!("{alive} of {all} paths of our sidecars past our gateways are alive{outside}");
    let waits = "no sidecar tells of a path past our gateways yet";
    Some(match (alive, all, spec.flat) {
        (0, 0, false) => unknown("PastGateways", "NotProbed", waits.to_owned()),
        (0, 0, true) => {
            let text = format!(
                "{waits}: on a flat link, {peer}'s ClusterLink must say `flat: true` as well{outside}"
            );
            unknown("PastGateways", "NotProbed", text)
        }
        (0, _, _) => condition("PastGateways", false, "NoPath", message + ": packets take our gateways"),
        _ => condition("PastGateways", true, "PathAlive", message),
    })
}

fn reachable(view: &View<'_>, peer: &ClusterName) -> Condition {
    let paths = links::paths(view, peer);
    let links::Reachability { reachable, reason, message } = links::reachability(view, peer, &paths);
    match reachable {
        Some(reachable) => condition("Reachable", reachable, reason, message),
        None => unknown("Reachable", reason, message),
    }
}
