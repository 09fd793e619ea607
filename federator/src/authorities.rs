//! The CAs that this cluster lives on, and who is told how soon they end. Pure: the time is passed in.
//!
//! One function names them ([`of`]); findings, metrics and the log are made of what it says.

use std::collections::BTreeMap;
use std::time::Duration;

use tombolo_identity::bundle::fingerprint;
use tombolo_identity::verify;
use tombolo_model::expiry::{self, Urgency};
use tombolo_model::status::Finding;

use crate::facts::Facts;
use crate::view::rfc3339_seconds;

/// A clone that was refused, and has not come since, is shown for so long.
const CLONES_SHOWN: Duration = Duration::from_secs(3600);

/// A certificate that others depend on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Authority {
    /// `root` or `intermediate`.
    pub role: &'static str,
    /// Tells roots apart: the start of the SHA-256 of the certificate; empty for the intermediate.
    pub fingerprint: String,
    /// Unix seconds.
    pub not_after: u64,
}

/// The cluster's intermediate and every root that it trusts.
pub fn of(facts: &Facts) -> Vec<Authority> {
    let trust = &facts.trust;
    let intermediate = Authority {
        role: "intermediate",
        fingerprint: String::new(),
        not_after: trust.intermediate_not_after,
    };
    let roots = trust.bundle.roots.iter().filter_map(|root| {
        let hash = fingerprint(root);
        let hash = hash.rsplit(':').next().unwrap_or_default();
        let fingerprint = hash.chars().take(16).collect();
        Some(Authority { role: "root", fingerprint, not_after: verify::not_after(root).ok()? })
    });
    [intermediate].into_iter().filter(|authority| authority.not_after > 0).chain(roots).collect()
}

impl Authority {
    fn name(&self, cluster: &str) -> String {
        match self.role {
            "root" => format!("root {}", self.fingerprint),
            role => format!("{role} of {cluster}"),
        }
    }

    fn message(&self, cluster: &str, unix: u64) -> String {
        let verb = if self.not_after > unix { "expires" } else { "has expired" };
        let (words, end) = (expiry::in_words(self.not_after, unix), rfc3339_seconds(self.not_after));
        let then = match self.role {
            "root" => "then nobody in the federation is believed any more",
            _ => "then nobody in this cluster gets an identity or is believed any more",
        };
        format!("the {} {verb} {words} ({end}); {then}", self.name(cluster))
    }

    fn remedy(&self, cluster: &str) -> String {
        match self.role {
            "root" => "where the root is, run `tombolo trust rotate --wait`".to_owned(),
            _ => format!(
                "where the root is, run `tombolo trust cluster {cluster} --renew` (or `tombolo trust sign` with its CSR), put the files into the federator's --trust-dir and run `tombolo trust reload` there"
            ),
        }
    }
}

/// What an operator should do something about.
pub fn findings(facts: &Facts, unix: Duration) -> Vec<Finding> {
    let now = unix.as_secs();
    let cluster = facts.cluster.name.as_str();
    let mut found: Vec<(Urgency, Finding)> = of(facts)
        .iter()
        .filter_map(|authority| {
            let urgency = Urgency::at(authority.not_after, now)?;
            let finding = Finding {
                severity: urgency.severity().to_owned(),
                reason: if urgency == Urgency::Expired { "CaExpired" } else { "CaExpiresSoon" }.to_owned(),
                about: authority.name(cluster),
                message: authority.message(cluster, now),
                remedy: authority.remedy(cluster),
            };
            Some((urgency, finding))
        })
        .collect();
    if !facts.store_writable {
        let finding = Finding {
            severity: "critical".to_owned(),
            reason: "StoreNotWritable".to_owned(),
            about: format!("federator of {cluster}"),
            message: "the store can't be written: nothing new is issued, applied or linked".to_owned(),
            remedy: "free space on its disk, or see what the federator's log says of it".to_owned(),
        };
        found.push((Urgency::Day, finding));
    }
    found.extend(used_twice(facts, now).map(|finding| (Urgency::Day, finding)));
    found.extend(stale_bundles(facts, now).map(|finding| (Urgency::Week, finding)));
    found.extend(upstream_not_shown(facts, unix).map(|finding| (Urgency::Week, finding)));
    found.sort_by_key(|(urgency, _)| std::cmp::Reverse(*urgency));
    found.into_iter().map(|(_, finding)| finding).collect()
}

/// What a foreign authority signed for this cluster's key is of no use any more.
fn upstream_not_shown(facts: &Facts, unix: Duration) -> Option<Finding> {
    let upstream = facts.upstream.as_ref()?;
    upstream.beside(&facts.trust.intermediate, unix).is_empty().then(|| Finding {
        severity: "warning".to_owned(),
        reason: "UpstreamNotShown".to_owned(),
        about: format!("intermediate of {}", facts.cluster.name),
        message: "upstream.crt in the trust directory has ended, or is about another key or name: who knows the foreign authority alone does not believe this cluster's applications".to_owned(),
        remedy: "have the authority sign ca.csr again; where the root is, `tombolo trust adopt --renew`; then `tombolo trust reload`".to_owned(),
    })
}

/// Identities that a second process came with while the first lived.
fn used_twice(facts: &Facts, now: u64) -> impl Iterator<Item = Finding> {
    let recent = facts.registry.members.values().filter(move |member| {
        member.clones.refused > 0 && now.saturating_sub(member.clones.last_unix) < CLONES_SHOWN.as_secs()
    });
    recent.map(|member| {
        let id = member.spiffe_id.as_str();
        Finding {
            severity: "critical".to_owned(),
            reason: "IdentityUsedTwice".to_owned(),
            about: id.to_owned(),
            message: format!(
                "a second process, on machine {:?}, came with the identity of the one on {:?}, which lives; it was refused",
                member.clones.host, member.host
            ),
            remedy: format!(
                "on the copy, move the state directory away and join with a token of its own; if it is none of yours, the key is stolen: `tombolo revoke {id}`, and join this machine anew"
            ),
        }
    })
}

/// Foreign trust domains whose endpoints have given nothing for too long: what they revoke is not heard of.
fn stale_bundles(facts: &Facts, now: u64) -> impl Iterator<Item = Finding> {
    let stale = facts.federations.values().filter(move |federation| federation.is_stale(now));
    stale.map(|federation| Finding {
        severity: "warning".to_owned(),
        reason: "ForeignBundleStale".to_owned(),
        about: format!("trust domain {}", federation.trust_domain),
        message: format!(
            "the bundle of {} has not been fetched lately; what that trust domain revokes or rotates is not heard of",
            federation.trust_domain
        ),
        remedy: format!("`tombolo describe trustdomainfederation {}` says why", federation.object),
    })
}

/// What the log was told of each authority.
#[derive(Debug, Default)]
pub struct Announcements(BTreeMap<(&'static str, String), (Urgency, Duration)>);

impl Announcements {
    /// What is to be logged now: each step at once, then again as often as it is urgent.
    pub fn due(&mut self, facts: &Facts, unix: Duration) -> Vec<(Urgency, String)> {
        let (now, cluster) = (unix.as_secs(), facts.cluster.name.as_str());
        let authorities = of(facts);
        let mut due = Vec::new();
        for authority in &authorities {
            let key = (authority.role, authority.fingerprint.clone());
            let Some(urgency) = Urgency::at(authority.not_after, now) else {
                self.0.remove(&key);
                continue;
            };
            let told = self.0.get(&key);
            let silent = told.is_some_and(|(before, at)| {
                *before == urgency && unix.saturating_sub(*at) < urgency.repeat_after()
            });
            if !silent {
                self.0.insert(key, (urgency, unix));
                due.push((
                    urgency,
                    format!("{}: {}", authority.message(cluster, now), authority.remedy(cluster)),
                ));
            }
        }
        due
    }
}
