//! `Revocation`: `Enforced`, once every sidecar and federator of every cluster that has to has said so.

use serde_json::{Value, json};
use tombolo_model::resource::{Condition, RevocationSpec};
use tombolo_proto::v1;

use super::super::View;
use super::super::text::rfc3339;
use super::condition;
use crate::facts::StoredObject;
use crate::revocations::{self, enforced_key, progress};

/// How far one cluster is.
struct Share {
    cluster: String,
    members: u32,
    enforced: u32,
    pending: Vec<String>,
    last_unix_ms: i64,
}

pub fn of(view: &View<'_>, stored: &StoredObject, spec: &RevocationSpec) -> (Vec<Condition>, Value) {
    let object = stored.object.metadata.name.as_str();
    let Some((_, wire)) = revocations::own(view.facts).find(|(name, _)| *name == object) else {
        let what = spec.spiffe_id.as_deref().unwrap_or_default();
        let text = format!("{what} is no identity of a cluster, so nobody holds it");
        return (vec![condition("Enforced", false, "Invalid", text)], json!({}));
    };
    let here = revocations::holds_here(view.facts, &wire).then(|| own_share(view, &wire));
    let shares: Vec<Share> = here.into_iter().chain(peers(view, &wire)).collect();
    let pending: Vec<String> = shares
        .iter()
        .filter(|share| share.enforced < share.members)
        .map(|share| format!("{}: {}", share.cluster, waiting(share)))
        .collect();
    let members: u32 = shares.iter().map(|share| share.members).sum();
    let condition = if pending.is_empty() {
        let text = format!("all {members} in {} cluster(s) refuse it", shares.len());
        condition("Enforced", true, "Enforced", text)
    } else {
        condition("Enforced", false, "Pending", format!("not yet enforced by {}", pending.join("; ")))
    };
    let clusters: Vec<Value> = shares.iter().map(document).collect();
    (vec![condition], json!({ "clusters": clusters }))
}

fn own_share(view: &View<'_>, wire: &v1::Revocation) -> Share {
    let progress = progress(view.facts, wire);
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let who = |e: &revocations::Enforcement<'_>| {
        let absent = if e.absent { " (not connected)" } else { "" };
        format!("{}{absent}", e.who)
    };
    Share {
        cluster: view.facts.cluster.name.to_string(),
        members: count(progress.len()),
        enforced: count(progress.iter().filter(|e| e.at_unix_ms.is_some()).count()),
        pending: progress.iter().filter(|e| e.at_unix_ms.is_none()).map(who).collect(),
        last_unix_ms: progress.iter().filter_map(|e| e.at_unix_ms).max().unwrap_or(0),
    }
}

/// Linked clusters that have to enforce it too: where it is about our own identities.
fn peers<'a>(view: &'a View<'_>, wire: &'a v1::Revocation) -> impl Iterator<Item = Share> + 'a {
    let everywhere = wire.cluster == view.facts.cluster.name.as_str();
    let links = view.facts.live_links().filter(move |_| everywhere);
    links.map(|link| {
        let told = view.facts.imports.get(&link.peer).and_then(|i| i.enforced.get(&enforced_key(&wire.name)));
        let cluster = link.peer.to_string();
        match told {
            Some(told) => Share {
                cluster,
                members: told.members,
                enforced: told.enforced,
                pending: told.pending.clone(),
                last_unix_ms: told.last_unix_ms,
            },
            None => Share {
                cluster,
                members: 1,
                enforced: 0,
                pending: vec!["its federator has not answered".to_owned()],
                last_unix_ms: 0,
            },
        }
    })
}

fn waiting(share: &Share) -> String {
    let missing = usize::try_from(share.members - share.enforced.min(share.members)).unwrap_or(usize::MAX);
    let more = missing.saturating_sub(share.pending.len());
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", share.pending.join(", "))
}

fn document(share: &Share) -> Value {
    let mut document = json!({
        "cluster": share.cluster,
        "members": share.members,
        "enforced": share.enforced,
        "pending": share.pending,
    });
    if let Ok(at @ 1..) = u64::try_from(share.last_unix_ms) {
        document["lastEnforced"] = rfc3339(std::time::Duration::from_millis(at)).into();
        document["lastEnforcedUnixMs"] = at.into();
    }
    document
}
