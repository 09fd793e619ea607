//! What the inventory is to hold (pure): this cluster's two well-known properties, and a `ClusterProfile` per linked cluster.

use serde_json::{Value, json};
use tombolo_model::resource::Condition;

use super::tables::{Held, is_ours};
use crate::facts::Facts;
use crate::kubernetes::labels::{MANAGED_BY, TOMBOLO};
use crate::kubernetes::status::{conditions, holds};
use crate::view::Peer;

/// KEP-2149: a cluster's id, and the set that it is a member of.
pub const CLUSTER_ID: &str = "cluster.clusterset.k8s.io";
pub const CLUSTER_SET: &str = "clusterset.k8s.io";
/// Told to peers like any property: their `ClusterProfile` of this cluster has it as its version.
pub const VERSION: &str = "kubernetes.version.tombolo.dev";
const MANAGER: &str = "x-k8s.io/cluster-manager";
const MEMBER: &str = "multicluster.x-k8s.io/inventory-member-id";

const MAX_LABEL: usize = 63;

/// One request.
#[derive(Clone, PartialEq, Debug)]
pub enum Write {
    Apply { name: String, document: Value, force: bool },
    Status { name: String, document: Value },
    Delete { name: String, uid: String },
}

/// The two properties that say who this cluster is; and of those that somebody else keeps, what is wrong with them. An id of
/// somebody else is never changed (it is immutable), and neither is one that says the same.
pub fn properties(facts: &Facts, version: &str, held: &Held) -> (Vec<Write>, Vec<String>) {
    let (mut writes, mut foreign) = (Vec::new(), Vec::new());
    let cluster = &facts.cluster;
    for (name, value) in
        [(CLUSTER_ID, cluster.name.to_string()), (CLUSTER_SET, cluster.trust_domain.to_string())]
    {
        let found = held.get(name);
        let says = found.and_then(|object| object.pointer("/spec/value")).and_then(Value::as_str);
        if says == Some(&value) {
            continue;
        }
        if let (Some(found), Some(says)) = (found, says)
            && (!is_ours(found) || name == CLUSTER_ID)
        {
            foreign.push(format!(
                "the ClusterProperty {name} is {says:?} and is not changed: in the mesh this is {value:?}; delete the object if that is right"
            ));
            continue;
        }
        let document = json!({
            "apiVersion": format!("about.k8s.io/{version}"), "kind": "ClusterProperty",
            "metadata": { "name": name, "labels": { MANAGED_BY: TOMBOLO } },
            "spec": { "value": value },
        });
        writes.push(Write::Apply { name: name.to_owned(), document, force: found.is_some() });
    }
    (writes, foreign)
}

/// The profiles that differ, and those that nobody is linked for any more.
pub fn profiles(peers: &[Peer], version: &str, namespace: &str, held: &Held, clock: &str) -> Vec<Write> {
    let mut writes = Vec::new();
    for peer in peers {
        let name = peer.name.as_str();
        let found = held.get(name);
        if found.is_some_and(|found| !is_ours(found)) {
            continue;
        }
        let head = |more: Value| {
            let mut document = json!({
                "apiVersion": format!("multicluster.x-k8s.io/{version}"), "kind": "ClusterProfile",
                "metadata": { "name": name, "namespace": namespace },
            });
            for (key, value) in more.as_object().into_iter().flatten() {
                match (key.as_str(), value) {
                    ("labels", labels) => document["metadata"]["labels"] = labels.clone(),
                    (key, value) => document[key] = value.clone(),
                }
            }
            document
        };
        let mut labels = json!({ MANAGED_BY: TOMBOLO, MANAGER: TOMBOLO });
        // A cluster's name may have two labels of 63 characters, a label's value has 63.
        if name.len() <= MAX_LABEL {
            labels[MEMBER] = name.into();
        }
        let document = head(json!({
            "labels": labels,
            "spec": { "displayName": name, "clusterManager": { "name": TOMBOLO } },
        }));
        let Some(found) = found else {
            writes.push(Write::Apply { name: name.to_owned(), document, force: false });
            continue;
        };
        let as_it_is = ["spec", "metadata"].iter().all(|part| {
            holds(found.get(*part).unwrap_or(&Value::Null), document.get(*part).unwrap_or(&Value::Null))
        });
        if !as_it_is {
            writes.push(Write::Apply { name: name.to_owned(), document, force: true });
        }
        let status = status(peer, found, clock);
        // Properties come and go: the whole list counts.
        if !found.get("status").is_some_and(|found| holds(found, &status)) {
            writes.push(Write::Status { name: name.to_owned(), document: head(json!({ "status": status })) });
        }
    }
    let is_linked = |name: &String| peers.iter().any(|peer| peer.name.as_str() == name);
    let gone = held.iter().filter(|(name, object)| !is_linked(name) && is_ours(object));
    writes.extend(gone.map(|(name, object)| {
        let uid = object.pointer("/metadata/uid").and_then(Value::as_str).unwrap_or_default();
        Write::Delete { name: name.clone(), uid: uid.to_owned() }
    }));
    writes
}

fn status(peer: &Peer, found: &Value, clock: &str) -> Value {
    let before = found.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
    let wanted = [
        // Nothing that changes by itself: each write is a request.
        Condition::new("ControlPlaneHealthy", peer.connected, &peer.reason, "as its federator is heard"),
        Condition::new("Joined", true, "Linked", format!("linked, tag {}", peer.tag)),
    ];
    let properties: Vec<Value> = peer
        .properties
        .iter()
        .filter(|(name, value)| (1..=253).contains(&name.len()) && !value.is_empty())
        .map(|(name, value)| json!({ "name": name, "value": value }))
        .collect();
    let mut status =
        json!({ "conditions": conditions(&wanted, &before, 0, clock), "properties": properties });
    if let Some(version) = peer.properties.get(VERSION).filter(|version| !version.is_empty()) {
        status["version"] = json!({ "kubernetes": version });
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(connected: bool) -> Peer {
        Peer {
            name: "west".parse().unwrap(),
            tag: tombolo_model::ids::ClusterTag::new(7).unwrap(),
            connected,
            reason: if connected { "Connected" } else { "Stale" }.to_owned(),
            properties: [("zone".to_owned(), "a".to_owned()), (VERSION.to_owned(), "v1.37.2".to_owned())]
                .into(),
        }
    }

    #[test]
    fn a_linked_cluster_has_a_profile_that_goes_with_the_link() {
        let all = [peer(true)];
        let first = profiles(&all, "v1alpha2", "sys", &Held::new(), "2026-01-01T00:00:00Z");
        let [Write::Apply { document, force: false, .. }] = first.as_slice() else { panic!("{first:?}") };
        let mut found = document.clone();
        found["metadata"]["uid"] = "u".into();
        let held = |found: &Value| Held::from([("west".to_owned(), found.clone())]);
        let second = profiles(&all, "v1alpha2", "sys", &held(&found), "2026-01-01T00:00:00Z");
        let [Write::Status { document, .. }] = second.as_slice() else { panic!("{second:?}") };
        let status = &document["status"];
        assert_eq!(status["version"]["kubernetes"], "v1.37.2");
        assert_eq!(status["properties"].as_array().unwrap().len(), 2);
        found["status"] = status.clone();
        assert!(profiles(&all, "v1alpha2", "sys", &held(&found), "later").is_empty(), "nothing has changed");
        let lost = profiles(&[peer(false)], "v1alpha2", "sys", &held(&found), "2026-01-02T00:00:00Z");
        let [Write::Status { document, .. }] = lost.as_slice() else { panic!("{lost:?}") };
        let conditions = &document["status"]["conditions"];
        assert_eq!((&conditions[0]["status"], &conditions[1]["status"]), (&json!("False"), &json!("True")));
        assert_eq!(conditions[1]["lastTransitionTime"], "2026-01-01T00:00:00Z");
        let gone = profiles(&[], "v1alpha2", "sys", &held(&found), "x");
        assert_eq!(gone, [Write::Delete { name: "west".into(), uid: "u".into() }]);
        found["metadata"]["labels"] = json!({});
        assert!(profiles(&[], "v1alpha2", "sys", &held(&found), "x").is_empty(), "somebody else's");
        assert!(profiles(&all, "v1alpha2", "sys", &held(&found), "x").is_empty(), "somebody else's");
    }
}
