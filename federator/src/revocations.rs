//! Who is revoked in this cluster, for whom else that holds, and who has enforced it. Pure.
//!
//! A `Revocation` object is this cluster's word. About its own identities it goes to every linked cluster and holds there
//! too; about anybody else's it holds in this cluster alone, as a peer's word holds here about the peer's own identities
//! alone ([`crate::import`] sees to that). Whoever holds connections enforces the list and says when: sidecars in their
//! reports, this federator by itself, linked clusters in a record of theirs.

use std::sync::Arc;

use prost::Message;
use tombolo_identity::SpiffeId;
use tombolo_identity::revocation::Target;
use tombolo_model::names::ClusterName;
use tombolo_model::resource::revocation::trimmed_serial;
use tombolo_model::resource::{ObjectKey, RevocationSpec, RevocationTarget, Spec};
use tombolo_overlay::revoking;
use tombolo_proto::v1;

use crate::facts::{Facts, StoredObject};
use crate::registry::{Member, Presence};

const KIND: &str = "Revocation";
/// Of one cluster: the list travels whole in every snapshot. A node or a cluster counts once.
pub const MAX_REVOCATIONS: usize = 1000;
/// Of this cluster, whatever the next one may be: 3 KB at most.
pub const MAX_OWN_BYTES: usize = 1024 * 1024;
/// Of one peer: its thousand of usual length.
pub const MAX_PEER_BYTES: usize = 256 * 1024;
/// Of all that hold here: half of what a snapshot may have, so that no peer can keep anybody from being configured.
const MAX_BYTES: usize = 2 * 1024 * 1024;
/// Named in a record; more are counted.
const MAX_NAMED: usize = 20;
const MAX_NAME_CHARS: usize = 200;

/// The name by which an object of this cluster is known everywhere: `cluster/object@uid.generation`. One that is changed, or
/// made anew, has another: what was enforced before says nothing about it.
pub fn name_of(cluster: &ClusterName, stored: &StoredObject) -> String {
    let uid: String = stored.uid.chars().take(8).collect();
    format!("{cluster}/{}@{uid}.{}", stored.object.metadata.name, stored.generation)
}

/// The object that a name of `cluster` is about.
pub fn object_of<'a>(cluster: &ClusterName, name: &'a str) -> Option<&'a str> {
    let rest = name.strip_prefix(cluster.as_str())?.strip_prefix('/')?;
    rest.split_once('@').map(|(object, _)| object)
}

/// Key of a revocation's record.
pub fn record_key(object: &str) -> String {
    format!("revocation/{object}")
}

/// Key of the record that says how far a revocation is enforced; `name` is its name everywhere.
pub fn enforced_key(name: &str) -> String {
    format!("enforced/{name}")
}

/// An object as it travels. `None`: it names nothing that exists here.
fn to_wire(own: &ClusterName, stored: &StoredObject, spec: &RevocationSpec) -> Option<v1::Revocation> {
    use v1::revocation::Target as Wire;
    let (cluster, target) = match spec.target()? {
        RevocationTarget::SpiffeId(id) => {
            (id.parse::<SpiffeId>().ok()?.cluster()?, Wire::SpiffeId(id.to_owned()))
        }
        RevocationTarget::Serial(serial) => (own.clone(), Wire::Serial(serial)),
        RevocationTarget::Node(node) => (own.clone(), Wire::Node(node.to_owned())),
        RevocationTarget::Cluster(cluster) => (cluster.parse().ok()?, Wire::Everything(true)),
    };
    Some(v1::Revocation {
        name: name_of(own, stored),
        cluster: cluster.to_string(),
        target: Some(target),
        reason: spec.reason.clone(),
    })
}

/// This cluster's own, with the names of their objects.
pub fn own(facts: &Facts) -> impl Iterator<Item = (&str, v1::Revocation)> {
    let first = ObjectKey { kind: KIND, namespace: String::new(), name: String::new() };
    let revocations = facts.objects.range(first..).take_while(|(key, _)| key.kind == KIND);
    revocations.filter_map(|(_, stored)| match &stored.object.spec {
        Spec::Revocation(spec) => {
            let object = stored.object.metadata.name.as_str();
            Some((object, to_wire(&facts.cluster.name, stored, spec)?))
        }
        _ => None,
    })
}

/// Whether one more, the object of this name, may be stored.
pub fn has_room(facts: &Facts, object: &str) -> bool {
    let others = own(facts).filter(|(name, _)| *name != object);
    let (count, bytes) = others.fold((0, 0), |(n, sum), (_, r)| (n + 1, sum + r.encoded_len()));
    count < MAX_REVOCATIONS && bytes < MAX_OWN_BYTES
}

/// Those that go to every linked cluster: about this cluster's identities.
pub fn for_peers(facts: &Facts) -> impl Iterator<Item = (&str, v1::Revocation)> {
    own(facts).filter(|(_, revocation)| revocation.cluster == facts.cluster.name.as_str())
}

/// All that hold in this cluster, its own first. What peers have beyond [`MAX_BYTES`] is not enforced here, and they see it.
pub fn in_force(facts: &Facts) -> Vec<v1::Revocation> {
    let of_peers = facts.imports.values().flat_map(|import| import.revocations.values().cloned());
    let own = own(facts).map(|(_, revocation)| revocation).filter(|revocation| holds_here(facts, revocation));
    let mut bytes = 0;
    let fits = |revocation: &v1::Revocation| {
        bytes += revocation.encoded_len();
        bytes <= MAX_BYTES
    };
    own.chain(of_peers).take_while(fits).collect()
}

/// What this cluster itself revokes here.
pub fn targets_in_force(facts: &Facts) -> Vec<Target> {
    let own = own(facts).filter(|(_, revocation)| holds_here(facts, revocation));
    own.filter_map(|(_, revocation)| revoking::from_wire(&revocation).ok())
        .map(|(target, _)| target)
        .collect()
}

/// A revocation of the own cluster is for the linked ones: here it would cut the members from the federator that alone
/// could take it back.
pub fn holds_here(facts: &Facts, revocation: &v1::Revocation) -> bool {
    let everything = matches!(revocation.target, Some(v1::revocation::Target::Everything(_)));
    !(everything && revocation.cluster == facts.cluster.name.as_str())
}

/// Whether a spec means this cluster's own federator by itself.
pub fn means_federator(facts: &Facts, spec: &RevocationSpec) -> bool {
    let federator = facts.cluster.federator_id.as_str();
    match spec.target() {
        Some(RevocationTarget::SpiffeId(id)) => id == federator,
        Some(RevocationTarget::Serial(serial)) => {
            let mut held = facts.identities.values().filter(|record| record.spiffe_id == federator);
            held.any(|record| is_serial(&record.serial, &serial))
        }
        _ => false,
    }
}

/// Whether a stored serial (hex, as in the certificate) is this one (without leading zeros).
fn is_serial(stored: &str, serial: &[u8]) -> bool {
    hex::decode(stored).is_ok_and(|stored| trimmed_serial(&stored) == serial)
}

/// How far one revocation is enforced by one holder of connections.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Enforcement<'a> {
    /// `federator`, or a sidecar's identity.
    pub who: &'a str,
    /// Milliseconds since the Unix epoch; `None`: not yet.
    pub at_unix_ms: Option<i64>,
    /// It can't be reached now: it enforces before any traffic when it is back, or keeps what it knows until then.
    pub absent: bool,
}

/// Everybody in this cluster who has to enforce it.
pub fn progress<'a>(facts: &'a Facts, revocation: &v1::Revocation) -> Vec<Enforcement<'a>> {
    let target = revoking::from_wire(revocation).ok().map(|(target, _)| target);
    let federator = Enforcement {
        who: "federator",
        at_unix_ms: facts.registry.own_enforced.get(&revocation.name).copied(),
        absent: false,
    };
    let members = facts.registry.members.values().filter(|member| {
        // Who is revoked itself has been cut off, and is not asked. One that said farewell has ended.
        !member.leaving && !target.as_ref().is_some_and(|target| is_meant(facts, target, member))
    });
    let member = |member: &'a Member| Enforcement {
        who: member.spiffe_id.as_str(),
        at_unix_ms: member.enforced.get(&revocation.name).copied(),
        absent: member.presence != Presence::Live,
    };
    std::iter::once(federator).chain(members.map(member)).collect()
}

/// The object that revokes an identity of this cluster as such, whatever certificate it shows.
pub fn of_identity<'a>(facts: &'a Facts, id: &SpiffeId) -> Option<&'a str> {
    let mut own = own(facts).filter(|(_, revocation)| holds_here(facts, revocation));
    own.find(|(_, r)| revoking::from_wire(r).is_ok_and(|(target, _)| target.names(id))).map(|(name, _)| name)
}

/// Whether a member is among those that are revoked.
fn is_meant(facts: &Facts, target: &Target, member: &Member) -> bool {
    let id = &member.spiffe_id;
    match target {
        Target::Serial { serial, .. } => {
            let issued = facts.identities.values().filter(|record| record.spiffe_id == id.as_str());
            // What the workload shows is not what the member holds connections with.
            let newest = issued.filter(|record| !record.workload).max_by_key(|record| record.issued_unix);
            newest.is_some_and(|record| is_serial(&record.serial, serial))
        }
        target => target.names(id),
    }
}

/// What a peer is told about a revocation of its own.
pub fn enforced_record(facts: &Facts, revocation: &v1::Revocation) -> v1::EnforcedRecord {
    let progress = progress(facts, revocation);
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let pending = progress.iter().filter(|e| e.at_unix_ms.is_none());
    v1::EnforcedRecord {
        revocation: revocation.name.clone(),
        pending: pending.take(MAX_NAMED).map(|e| e.who.chars().take(MAX_NAME_CHARS).collect()).collect(),
        enforced: count(progress.iter().filter(|e| e.at_unix_ms.is_some()).count()),
        members: count(progress.len()),
        last_unix_ms: progress.iter().filter_map(|e| e.at_unix_ms).max().unwrap_or(0),
    }
}

/// What has to be told to `peer` about its own revocations.
pub fn enforced_for<'a>(
    facts: &'a Facts,
    peer: &ClusterName,
) -> impl Iterator<Item = v1::EnforcedRecord> + 'a {
    let import: Option<&'a Arc<crate::facts::Import>> = facts.imports.get(peer);
    import.into_iter().flat_map(|import| import.revocations.values()).map(|r| enforced_record(facts, r))
}
