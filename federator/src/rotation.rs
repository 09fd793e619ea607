//! How far this cluster and others are with what the federation trusts, and who has to renew. Pure.
//!
//! Whoever holds connections says which bundle it verifies by and which intermediate it shows: members in their reports,
//! this federator by itself. The sum is the cluster's word, signed by its CA key and passed on from cluster to cluster:
//! whoever carries it can hold it back, and neither change nor invent it. Of two words of a cluster the later counts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tombolo_identity::cluster_binding::ClusterBinding;
use tombolo_identity::rotation;
use tombolo_identity::{SpiffeId, issuer};
use tombolo_model::ids::ClusterTag;
use tombolo_model::names::ClusterName;
use tombolo_proto::convert::{self, FieldError};
use tombolo_proto::v1;
use tombolo_proto::v1::record::Value;

use crate::facts::{Facts, Import, TrustFacts};
use crate::registry::{HeldTrust, Presence};

/// Key of the record with the trust update.
pub const TRUST: &str = "trust";
/// What a cluster's word is signed as.
pub const PROGRESS_LABEL: &str = "trust progress";
/// Named in a word; more are counted.
const MAX_NAMED: usize = 20;
const MAX_NAME_CHARS: usize = 200;
/// An intermediate has 550 bytes, twenty names 4 KB.
const MAX_PROGRESS_BYTES: usize = 16 * 1024;
/// Clusters of which one peer may speak.
const MAX_CLUSTERS: usize = 256;
/// An early renewal costs the federator a signature and a commit: 20 ms apart they take a fifth of its disk's time.
const RENEWAL_APART: Duration = Duration::from_millis(20);
const SHORTEST_SPREAD: Duration = Duration::from_millis(500);
const LONGEST_SPREAD: Duration = Duration::from_secs(600);

/// Key of the record with a cluster's word.
pub fn progress_key(cluster: &str) -> String {
    format!("trust-progress/{cluster}")
}

/// Whether this is the key of a word.
pub fn is_progress_key(key: &str) -> bool {
    key.starts_with("trust-progress/")
}

/// A cluster's word whose signature holds.
#[derive(Clone, PartialEq, Debug)]
pub struct Word {
    pub cluster: ClusterName,
    pub at_unix_ms: i64,
    pub wire: v1::SignedTrustProgress,
}

/// Who shows another intermediate than this, or an older leaf, renews.
pub fn renewal(facts: &Facts, unix: Duration) -> v1::RenewalRequest {
    let members = facts.registry.members.len() + facts.registry.gateways.len();
    let spread = RENEWAL_APART.saturating_mul(u32::try_from(members).unwrap_or(u32::MAX));
    let spread = spread.clamp(SHORTEST_SPREAD, LONGEST_SPREAD);
    v1::RenewalRequest {
        issuer_sha256: facts.trust.issuer_sha256.to_vec(),
        issued_after_unix: i64::try_from(facts.trust.leaves_since(unix.as_secs())).unwrap_or(i64::MAX),
        spread_ms: u32::try_from(spread.as_millis()).unwrap_or(u32::MAX),
    }
}

/// Whether what somebody holds is what the cluster's federator trusts, and what it shows is what that issues.
fn standing(trust: &TrustFacts, held: &HeldTrust) -> (bool, bool) {
    let holds = held.sequence == trust.bundle.sequence;
    (holds, held.issuer_sha256 == trust.issuer_sha256 && held.issued_unix >= trust.leaves_after)
}

/// This cluster's word, without the time.
pub fn own_progress(facts: &Facts) -> v1::TrustProgress {
    let trust = &facts.trust;
    let mut progress = v1::TrustProgress {
        cluster: facts.cluster.name.to_string(),
        tag: facts.cluster.tag.value(),
        sequence: trust.bundle.sequence,
        certificate: trust.intermediate.to_vec(),
        ..Default::default()
    };
    let mut count = |who: &dyn Fn() -> String, held: &HeldTrust, absent: bool| {
        let (holds, shows) = standing(trust, held);
        progress.members += 1;
        progress.holding += u32::from(holds);
        progress.showing += u32::from(shows);
        if !(holds && shows) && progress.pending.len() < MAX_NAMED {
            let absent = if absent { " (not connected)" } else { "" };
            let who: String = who().chars().take(MAX_NAME_CHARS).collect();
            progress.pending.push(format!("{who}{absent}"));
        }
    };
    count(&|| "federator".to_owned(), &facts.registry.own_trust, false);
    // One that said farewell has ended.
    for member in facts.registry.members.values().filter(|member| !member.leaving) {
        let id: &SpiffeId = &member.spiffe_id;
        count(&|| id.to_string(), &member.trust, member.presence != Presence::Live);
    }
    for gateway in facts.registry.gateways.values().filter(|gateway| !gateway.draining) {
        count(&|| format!("gateway {}", gateway.name), &gateway.trust, gateway.presence != Presence::Live);
    }
    progress
}

/// Reads a word that anybody may have carried here: its certificate is a trusted root's for that cluster and tag, and
/// that certificate's key has signed it.
pub fn read_word(
    trust: &TrustFacts,
    key: &str,
    wire: &v1::SignedTrustProgress,
    unix: Duration,
) -> Result<Word, FieldError> {
    if wire.progress.len() > MAX_PROGRESS_BYTES {
        let expected = format!("at most {MAX_PROGRESS_BYTES} bytes");
        return Err(FieldError::new("trust_progress", wire.progress.len(), expected));
    }
    let progress = v1::TrustProgress::decode(wire.progress.as_slice())
        .map_err(|e| FieldError::new("trust_progress.progress", e, "a TrustProgress"))?;
    let cluster: ClusterName = convert::parse("trust_progress.cluster", &progress.cluster)?;
    let tag: ClusterTag = convert::tag("trust_progress.tag", progress.tag)?;
    let expected = progress_key(cluster.as_str());
    if key != expected {
        return Err(FieldError::new("record.key", key, expected));
    }
    let certificate = progress.certificate.as_slice();
    if rotation::binding_of(certificate) != Some(ClusterBinding { cluster: cluster.clone(), tag }) {
        let expected = format!("an intermediate that is bound to {cluster} ({tag})");
        return Err(FieldError::new("trust_progress.certificate", "another certificate", expected));
    }
    if rotation::root_of(certificate, &trust.bundle.roots, unix).is_none() {
        let expected = "an intermediate of a root that is trusted here";
        return Err(FieldError::new("trust_progress.certificate", cluster, expected));
    }
    if !issuer::verify_record(certificate, PROGRESS_LABEL, &wire.progress, &wire.signature) {
        let expected = format!("by the CA of {cluster}");
        return Err(FieldError::new("trust_progress.signature", "another signature", expected));
    }
    Ok(Word { cluster, at_unix_ms: progress.at_unix_ms, wire: wire.clone() })
}

/// Takes a peer's record of some cluster's word over, unless a later one has come already.
pub fn keep_word(import: &mut Import, key: &str, word: Word) -> Result<(), FieldError> {
    if import.words.len() >= MAX_CLUSTERS && !import.words.contains_key(key) {
        return Err(FieldError::new("trust_progress", key, format!("at most {MAX_CLUSTERS} clusters")));
    }
    match import.words.get(key) {
        Some(known) if known.at_unix_ms > word.at_unix_ms => {}
        _ => {
            import.words.insert(key.to_owned(), Arc::new(word));
        }
    }
    Ok(())
}

/// The latest word of every other cluster that has been heard of.
pub fn words(facts: &Facts) -> BTreeMap<&ClusterName, &Arc<Word>> {
    let mut latest: BTreeMap<&ClusterName, &Arc<Word>> = BTreeMap::new();
    let all = facts.imports.values().flat_map(|import| import.words.values());
    for word in all.filter(|word| word.cluster != facts.cluster.name) {
        let kept = latest.entry(&word.cluster).or_insert(word);
        if word.at_unix_ms > kept.at_unix_ms {
            *kept = word;
        }
    }
    latest
}

/// What `peer` is told: the update, this cluster's word, and those of others that it has not said itself.
pub fn records(facts: &Facts, peer: &ClusterName) -> Vec<(String, Value)> {
    let Some(update) = &facts.trust.update else { return Vec::new() };
    let mut records = vec![(TRUST.to_owned(), Value::Trust(v1::TrustRecord { update: update.to_vec() }))];
    let own = facts.own_word.iter();
    let said = |word: &Word| {
        let said = facts.imports.get(peer).and_then(|import| {
            import.words.get(&progress_key(word.cluster.as_str())).map(|said| said.at_unix_ms)
        });
        word.cluster == *peer || said.is_some_and(|said| said >= word.at_unix_ms)
    };
    let others = words(facts).into_values().filter(|word| !said(word));
    records.extend(
        own.chain(others)
            .map(|word| (progress_key(word.cluster.as_str()), Value::TrustProgress(word.wire.clone()))),
    );
    records
}

#[cfg(test)]
mod tests;
