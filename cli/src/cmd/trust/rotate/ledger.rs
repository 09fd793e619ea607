//! Who has acknowledged what: a federator's answer, held against the register of the root. Pure.
//!
//! Every cluster of the register has to acknowledge, linked or not: each of them is cut off when the root that it knows
//! is retired. So has every cluster that has been heard of, in the register or not.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use prost::Message;
use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};
use tombolo_identity::authority::RegistryEntry;
use tombolo_identity::issuer::verify_record;
use tombolo_identity::rotation::{binding_of, is_issued_by, root_of};
use tombolo_model::names::ClusterName;
use tombolo_proto::v1;

use super::state::{Rotation, Step};
use crate::output;

/// As federators sign it.
const PROGRESS_LABEL: &str = "trust progress";

/// How far the clusters are.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// Of the federator that was asked.
    pub sequence: u64,
    clusters: BTreeMap<ClusterName, Option<v1::TrustProgress>>,
}

impl Ledger {
    /// `without`: clusters that nobody waits for.
    pub fn new(
        (register, roots): (&[RegistryEntry], &[CertificateDer<'static>]),
        answer: &v1::TrustStatusResponse,
        without: &BTreeSet<ClusterName>,
        now: Duration,
    ) -> Self {
        let registered = register.iter().filter(|entry| !entry.superseded);
        let mut clusters: BTreeMap<ClusterName, Option<v1::TrustProgress>> =
            registered.map(|entry| (entry.name.clone(), None)).collect();
        for (cluster, progress) in answer.progress.iter().filter_map(|wire| said_by_its_ca(wire, roots, now))
        {
            // A cluster that was recreated speaks with another tag: the old one is gone.
            let stale = register
                .iter()
                .any(|entry| entry.name == cluster && entry.superseded && entry.tag.value() == progress.tag);
            if !stale {
                clusters.insert(cluster, Some(progress));
            }
        }
        clusters.retain(|cluster, _| !without.contains(cluster));
        Self { sequence: answer.sequence, clusters }
    }

    pub fn clusters(&self) -> impl Iterator<Item = &ClusterName> {
        self.clusters.keys()
    }

    /// The intermediates that clusters issue with.
    pub fn intermediates(&self) -> BTreeMap<&ClusterName, &[u8]> {
        let heard = self.clusters.iter().filter_map(|(cluster, heard)| Some((cluster, heard.as_ref()?)));
        heard.map(|(cluster, progress)| (cluster, progress.certificate.as_slice())).collect()
    }

    /// Who has not done what a step is about yet, and whom that cluster waits for.
    pub fn lacking(&self, rotation: &Rotation, new_root: &CertificateDer<'_>, now: Duration) -> Vec<String> {
        let lacks = |(cluster, heard): (&ClusterName, &Option<v1::TrustProgress>)| {
            let what = match heard {
                None => "nothing has been heard of it: is it linked, and does its federator run?".to_owned(),
                Some(progress) => lack(progress, rotation, new_root, now)?,
            };
            Some(output::printable(&format!("{cluster}: {what}")))
        };
        self.clusters.iter().filter_map(lacks).collect()
    }

    /// How many have acknowledged a step, and how many there are.
    pub fn count(&self, rotation: &Rotation) -> (u32, u32) {
        let heard = self.clusters.values().map(|heard| match heard {
            None => (0, 1),
            Some(p) if p.sequence < rotation.sequence() => (0, p.members),
            Some(p) if rotation.step == Step::Reissuing => (p.showing.min(p.holding), p.members),
            Some(p) => (p.holding, p.members),
        });
        heard.fold((0, 0), |(done, all), (d, a)| (done + d, all + a))
    }

    /// For `-o json` and tables.
    pub fn document(&self, roots: &[(&str, &CertificateDer<'static>)], now: Duration) -> Vec<Value> {
        let one = |(cluster, heard): (&ClusterName, &Option<v1::TrustProgress>)| match heard {
            None => json!({ "cluster": cluster, "heard": false }),
            Some(progress) => {
                let of = |(_, root): &&(&str, &CertificateDer<'static>)| {
                    root_of(&progress.certificate, std::slice::from_ref(*root), now).is_some()
                };
                let pending: Vec<String> = progress.pending.iter().map(|p| output::printable(p)).collect();
                json!({
                    "cluster": cluster,
                    "heard": true,
                    "sequence": progress.sequence,
                    "members": progress.members,
                    "holding": progress.holding,
                    "showing": progress.showing,
                    "root": roots.iter().find(of).map(|(name, _)| *name),
                    "pending": pending,
                })
            }
        };
        self.clusters.iter().map(one).collect()
    }
}

/// A cluster's word: signed by a CA that one of the roots has bound to this cluster. The federator that is asked only passes
/// it on, and could otherwise say anything of anybody.
fn said_by_its_ca(
    wire: &v1::SignedTrustProgress,
    roots: &[CertificateDer<'static>],
    now: Duration,
) -> Option<(ClusterName, v1::TrustProgress)> {
    let progress = v1::TrustProgress::decode(wire.progress.as_slice()).ok()?;
    let cluster: ClusterName = progress.cluster.parse().ok()?;
    let binding = binding_of(&progress.certificate)?;
    let holds = binding.cluster == cluster
        && binding.tag.value() == progress.tag
        && root_of(&progress.certificate, roots, now).is_some()
        && verify_record(&progress.certificate, PROGRESS_LABEL, &wire.progress, &wire.signature);
    holds.then_some((cluster, progress))
}

/// What a cluster lacks for a step; `None`: nothing.
fn lack(
    progress: &v1::TrustProgress,
    rotation: &Rotation,
    new_root: &CertificateDer<'_>,
    now: Duration,
) -> Option<String> {
    let v1::TrustProgress { sequence, members, holding, showing, certificate, .. } = progress;
    if *sequence < rotation.sequence() {
        return Some(format!(
            "its federator has not taken the update over (it has {sequence}, this is {})",
            rotation.sequence()
        ));
    }
    if holding < members {
        return Some(format!("{holding} of {members} trust what it says; waiting for {}", names(progress)));
    }
    if rotation.step != Step::Reissuing {
        return None;
    }
    if !is_issued_by(certificate, new_root, now) {
        return Some("its intermediate is not of the new root".to_owned());
    }
    (showing < members)
        .then(|| format!("{showing} of {members} show a chain of it; waiting for {}", names(progress)))
}

fn names(progress: &v1::TrustProgress) -> String {
    let missing = progress.members - progress.holding.min(progress.showing).min(progress.members);
    let named = u32::try_from(progress.pending.len()).unwrap_or(u32::MAX);
    let more = match missing.saturating_sub(named) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{}{more}", progress.pending.join(", "))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tombolo_identity::authority::{ClusterMaterial, Existing, RootAuthority};
    use tombolo_identity::issuer::LeafIssuer;

    use super::*;

    const NOW: Duration = Duration::from_secs(1_795_000_000);

    fn root(dir: &Path) -> RootAuthority {
        RootAuthority::init(dir, "acme.example".parse().unwrap(), NOW).unwrap()
    }

    fn word(
        material: ClusterMaterial,
        change: impl FnOnce(&mut v1::TrustProgress),
    ) -> v1::SignedTrustProgress {
        let mut progress = v1::TrustProgress {
            cluster: material.cluster.to_string(),
            tag: material.tag.value(),
            sequence: 2,
            certificate: material.certificate.to_vec(),
            members: 3,
            holding: 3,
            showing: 3,
            ..Default::default()
        };
        change(&mut progress);
        let bytes = progress.encode_to_vec();
        let signature = LeafIssuer::new(material).unwrap().sign_record(PROGRESS_LABEL, &bytes).unwrap();
        v1::SignedTrustProgress { progress: bytes, signature }
    }

    #[test]
    fn a_step_waits_for_every_cluster_of_the_register_and_names_whom_for() {
        let dir = std::env::temp_dir().join(format!("tombolo-ledger-{}", std::process::id()));
        let (mut old, new) = (root(&dir.join("old")), root(&dir.join("new")));
        let sign = |root: &mut RootAuthority, name: &str| {
            root.sign_cluster(&name.parse().unwrap(), Existing::Refuse, NOW).unwrap()
        };
        let east = sign(&mut old, "east");
        sign(&mut old, "west");
        let new_root = new.certificate().clone();
        let rotation = |step: Step| {
            let mut rotation = Rotation::new("old".into(), "new".into(), 2, String::new());
            while rotation.step != step {
                rotation.step = rotation.step.next();
            }
            rotation
        };
        let copy = || ClusterMaterial::load(&dir.join("east")).unwrap();
        east.save(&dir.join("east")).unwrap();
        let ledger = |words: Vec<v1::SignedTrustProgress>, without: &[&str]| {
            let answer = v1::TrustStatusResponse { progress: words, ..Default::default() };
            let without = without.iter().map(|name| name.parse().unwrap()).collect();
            let roots = [old.certificate().clone(), new.certificate().clone()];
            Ledger::new((old.registry(), &roots), &answer, &without, NOW)
        };
        let lacking =
            |ledger: &Ledger, step: Step| ledger.lacking(&rotation(step), &new_root, NOW).join("; ");
        // What a CA of nobody's root, or of another cluster, says counts as nothing.
        let mut other = root(&dir.join("other"));
        let forged = word(sign(&mut other, "west"), |_| ());
        let borrowed = word(copy(), |p| p.cluster = "west".into());
        let words = lacking(&ledger(vec![forged, borrowed], &[]), Step::Staging);
        assert!(words.contains("west: nothing has been heard"), "{words}");
        // West has not been heard of.
        let words = lacking(&ledger(vec![word(copy(), |_| ())], &[]), Step::Staging);
        assert!(words.starts_with("west: nothing has been heard") && !words.contains("east"), "{words}");
        let alone = |change: &dyn Fn(&mut v1::TrustProgress)| ledger(vec![word(copy(), change)], &["west"]);
        assert_eq!(lacking(&alone(&|_| ()), Step::Staging), "");
        assert_eq!(alone(&|_| ()).count(&rotation(Step::Staging)), (3, 3));
        assert!(
            lacking(&alone(&|p| p.sequence = 1), Step::Staging).contains("has not taken the update over")
        );
        let one = |p: &mut v1::TrustProgress| {
            (p.holding, p.pending) = (1, vec!["sa/web".into()]);
        };
        let words = lacking(&alone(&one), Step::Staging);
        assert_eq!(words, "east: 1 of 3 trust what it says; waiting for sa/web and 1 more");
        // Its intermediate is of the old root still.
        let later = |p: &mut v1::TrustProgress| p.sequence = 3;
        assert!(lacking(&alone(&later), Step::Reissuing).contains("not of the new root"));
        let again = new.reissue(&east.certificate, old.registry(), NOW).unwrap().certificate;
        let shows = |p: &mut v1::TrustProgress| {
            (p.sequence, p.certificate, p.showing) = (3, again.to_vec(), 2);
        };
        assert!(lacking(&alone(&shows), Step::Reissuing).contains("2 of 3 show a chain"));
        assert_eq!(alone(&shows).count(&rotation(Step::Reissuing)), (2, 3));
        // A word that nobody has signed is none.
        let mut forged = word(copy(), |_| ());
        forged.signature[10] ^= 1;
        assert!(lacking(&ledger(vec![forged], &["west"]), Step::Staging).contains("nothing has been heard"));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
