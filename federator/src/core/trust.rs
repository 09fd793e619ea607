//! What this cluster trusts and issues with: taken from the trust directory and from updates that a root has signed.
//!
//! An update is stored before it holds, and what it brings holds at once for everybody who reads the facts: members by
//! their snapshots, peers by their records, the federator's own SVID by its task. Nothing that is refused changes
//! anything.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use rustls::pki_types::CertificateDer;
use tombolo_identity::authority::ClusterMaterial;
use tombolo_identity::bundle::fingerprint;
use tombolo_identity::cluster_binding::ClusterBinding;
use tombolo_identity::issuer::{IssueError, LeafIssuer};
use tombolo_identity::rotation::{self, Held, SignedUpdate, TrustUpdate, UpdateError};
use tombolo_identity::verify;
use tombolo_model::audit::{Action, Event};
use tombolo_model::names::ClusterName;
use tombolo_proto::v1;

use super::{Core, CoreError, Moment};
use crate::facts::{TrustFacts, TrustRecord};
use crate::import;
use crate::registry::{self, HeldTrust};
use crate::rotation::{PROGRESS_LABEL, TRUST, Word, is_progress_key, own_progress};
use crate::store::Transaction;

/// Key of [`TrustRecord`] in its table.
pub const RECORD: &str = "trust";
/// A cluster's word costs a signature here and one verification in every other cluster.
const WORDS_APART: Duration = Duration::from_millis(500);

/// What follows from the trust directory and the update that is kept, if any. The later of their bundles counts.
pub fn settle(
    material: &ClusterMaterial,
    record: &TrustRecord,
    unix: Duration,
) -> Result<TrustFacts, UpdateError> {
    let stored = record.update.as_deref().and_then(|text| hex::decode(text).ok());
    let update: Option<(Vec<u8>, TrustUpdate)> = match stored {
        Some(bytes) => {
            let update = SignedUpdate::from_bytes(&bytes)?.read()?;
            Some((bytes, update))
        }
        None => None,
    };
    let update = update.filter(|(_, update)| update.sequence >= material.bundle.sequence);
    let bundle = update.as_ref().map_or_else(|| material.bundle.clone(), |(_, update)| update.bundle());
    if bundle.sequence < record.sequence {
        return Err(UpdateError::Old { held: record.sequence, found: bundle.sequence });
    }
    let stranded = || UpdateError::Stranded { cluster: material.cluster.clone() };
    let binding = ClusterBinding { cluster: material.cluster.clone(), tag: material.tag };
    let reissued: Vec<_> = update
        .iter()
        .flat_map(|(_, update)| update.intermediates.iter().map(|reissued| reissued.certificate.clone()))
        .collect();
    let spki = rotation::spki_of(&material.certificate).ok_or_else(stranded)?;
    let kept: Option<CertificateDer<'static>> =
        record.intermediate.as_deref().and_then(|text| hex::decode(text).ok()).map(Into::into);
    let candidates = || kept.iter().chain([&material.certificate]).chain(&reissued);
    // A clock that is off, or a CA that has ended, is for peers and operators to see: the federator starts all the same.
    let begun = candidates().map(|certificate| rotation::not_before(certificate)).max().unwrap_or(0);
    let chosen = [unix, Duration::from_secs(begun)].into_iter().find_map(|at| {
        let chosen = rotation::choose_intermediate(candidates(), &spki, &binding, &bundle.roots, at)?;
        Some((chosen.clone(), rotation::root_of(chosen, &bundle.roots, at)?))
    });
    let (intermediate, root) = chosen.ok_or_else(stranded)?;
    let crosses = update.iter().flat_map(|(_, update)| update.crosses.iter());
    let crosses = crosses.filter(|cross| {
        // Only what leads to the root that is in use.
        rotation::spki_of(cross) == rotation::spki_of(root)
            && verify::not_after(cross).is_ok_and(|end| end > unix.as_secs())
    });
    Ok(TrustFacts {
        bundle_json: bundle.to_json(),
        root_fingerprint: fingerprint(root),
        root_not_after: verify::not_after(root).unwrap_or(0),
        intermediate_not_after: verify::not_after(&intermediate).unwrap_or(0),
        issuer_sha256: rotation::sha256(&intermediate),
        crosses: crosses.cloned().collect(),
        reissued: reissued.into(),
        update: update.map(|(bytes, _)| bytes.into()),
        directory_certificate: material.certificate.clone(),
        leaves_after: record.leaves_after,
        refused: Default::default(),
        intermediate,
        bundle,
    })
}

/// Issues with the certificate that was settled on.
pub fn issuer_of(material: ClusterMaterial, trust: &TrustFacts) -> Result<LeafIssuer, IssueError> {
    LeafIssuer::new(ClusterMaterial { certificate: trust.intermediate.clone(), ..material })
}

/// What is another way from now on, in words; `None`: nothing is.
fn change(before: &TrustFacts, now: &TrustFacts) -> Option<String> {
    let mut changes = Vec::new();
    if before.bundle != now.bundle {
        let roots: Vec<String> = now.bundle.roots.iter().map(|root| fingerprint(root)).collect();
        changes.push(format!("trusted roots: {}", roots.join(", ")));
    }
    if before.issuer_sha256 != now.issuer_sha256 {
        changes.push(format!("intermediate sha256:{}", hex::encode(now.issuer_sha256)));
    }
    if before.leaves_after != now.leaves_after {
        changes.push("every leaf is renewed".to_owned());
    }
    (!changes.is_empty()).then(|| changes.join("; "))
}

/// As it was stored.
pub(super) fn held_record(trust: &TrustFacts) -> TrustRecord {
    TrustRecord {
        sequence: trust.bundle.sequence,
        update: trust.update.as_deref().map(hex::encode),
        intermediate: Some(hex::encode(&trust.intermediate)),
        leaves_after: trust.leaves_after,
    }
}

fn copy(material: &ClusterMaterial) -> ClusterMaterial {
    ClusterMaterial {
        cluster: material.cluster.clone(),
        tag: material.tag,
        trust_domain: material.trust_domain.clone(),
        key_pem: material.key_pem.clone(),
        certificate: material.certificate.clone(),
        bundle: material.bundle.clone(),
    }
}

impl Core {
    /// Takes an update over, wherever it came from. False: it is held already.
    pub fn update_trust(&mut self, bytes: &[u8], moment: Moment) -> Result<bool, CoreError> {
        let taken = self.judge_trust(bytes, moment);
        if let Err(CoreError::Trust(error)) = &taken {
            *Arc::make_mut(&mut self.facts.trust).refused.entry(error.kind()).or_default() += 1;
            self.dirty = true;
            // A peer that has not heard of the newest one yet is no event.
            if !matches!(error, UpdateError::Old { .. }) {
                self.note_refusal(Event::refused(Action::Rotation, "trust", error.to_string()), moment);
            }
        }
        taken
    }

    fn judge_trust(&mut self, bytes: &[u8], moment: Moment) -> Result<bool, CoreError> {
        let trust = Arc::clone(&self.facts.trust);
        let held = Held { bundle: &trust.bundle, update: trust.update.as_deref() };
        let Some(update) = rotation::accept(bytes, held, moment.unix)? else { return Ok(false) };
        let record = TrustRecord { update: Some(hex::encode(bytes)), ..held_record(&trust) };
        let certificate = trust.directory_certificate.clone();
        let material = ClusterMaterial { certificate, ..copy(&self.issuer.material) };
        self.adopt(material, &record, moment)?;
        tracing::info!(
            sequence = update.sequence,
            roots = update.roots.len(),
            intermediates = update.intermediates.len(),
            "a trust update is taken over"
        );
        Ok(true)
    }

    /// Stores `record`, then trusts and issues accordingly.
    fn adopt(
        &mut self,
        material: ClusterMaterial,
        record: &TrustRecord,
        moment: Moment,
    ) -> Result<(), CoreError> {
        let settled = settle(&material, record, moment.unix)?;
        let issuer = issuer_of(material, &settled)?;
        let intermediate = Some(hex::encode(&settled.intermediate));
        let record = TrustRecord { sequence: settled.bundle.sequence, intermediate, ..record.clone() };
        let transaction = Transaction::new().put(RECORD, &record);
        match change(&self.facts.trust, &settled) {
            Some(change) => {
                let subject = format!("trust:{}", settled.bundle.sequence);
                let event = Event { reason: change, ..Event::done(Action::Rotation, subject) };
                self.commit_audited(transaction, event, moment)?;
            }
            None => self.store.commit(&transaction)?,
        }
        let refused = self.facts.trust.refused.clone();
        self.facts.trust = Arc::new(TrustFacts { refused, ..settled });
        self.issuer = issuer;
        self.dirty = true;
        self.reread_words(moment);
        self.speak_of_trust(moment, Duration::ZERO);
        Ok(())
    }

    /// The trust directory as it is now: a further intermediate of this cluster, or its bundle after a rotation that
    /// this cluster missed. False: nothing in it is new.
    pub fn reload_trust(
        &mut self,
        material: ClusterMaterial,
        renew_leaves: bool,
        moment: Moment,
    ) -> Result<bool, CoreError> {
        let cluster = &self.facts.cluster;
        if (&material.cluster, material.tag, &material.trust_domain)
            != (&cluster.name, cluster.tag, &cluster.trust_domain)
        {
            return Err(CoreError::Precondition(format!(
                "the trust directory is of {} ({}) in {}, this is {} ({}) in {}",
                material.cluster,
                material.tag,
                material.trust_domain,
                cluster.name,
                cluster.tag,
                cluster.trust_domain
            )));
        }
        let trust = Arc::clone(&self.facts.trust);
        if material.bundle.sequence == trust.bundle.sequence && material.bundle.roots != trust.bundle.roots {
            return Err(CoreError::Trust(UpdateError::Conflict(trust.bundle.sequence)));
        }
        let leaves_after = if renew_leaves { moment.unix.as_secs() } else { trust.leaves_after };
        let record = TrustRecord { leaves_after, ..held_record(&trust) };
        let probe = LeafIssuer::new(copy(&material))?;
        let signature = probe.sign_record(PROGRESS_LABEL, &[])?;
        if !probe.verify_record(PROGRESS_LABEL, &[], &signature) {
            return Err(CoreError::Precondition(
                "ca.key and ca.crt of the trust directory do not belong together: copy all of what `tombolo trust cluster --renew` wrote, then try again"
                    .to_owned(),
            ));
        }
        self.adopt(material, &record, moment)?;
        let now = &self.facts.trust;
        let changed = now.issuer_sha256 != trust.issuer_sha256
            || now.bundle != trust.bundle
            || now.leaves_after != trust.leaves_after;
        if changed {
            tracing::info!(
                intermediate_not_after = now.intermediate_not_after,
                sequence = now.bundle.sequence,
                renew_leaves,
                "the trust directory is read again"
            );
        }
        Ok(changed)
    }

    /// What a peer passes on. The reason of a refusal that an operator should see.
    pub(super) fn offered_trust(
        &mut self,
        peer: &ClusterName,
        bytes: &[u8],
        moment: Moment,
    ) -> Option<String> {
        match self.update_trust(bytes, moment) {
            Ok(_) => None,
            // It has not heard of the newest one yet.
            Err(CoreError::Trust(UpdateError::Old { .. })) => None,
            Err(CoreError::Store(error)) => {
                tracing::warn!(%error, %peer, "a trust update can't be stored yet; tried again in a second");
                self.pending_trust = Some(bytes.to_vec());
                None
            }
            Err(error) => {
                tracing::warn!(%error, %peer, "a trust update is refused");
                Some(error.to_string())
            }
        }
    }

    /// Once a second: what could not be stored.
    pub(super) fn retry_trust(&mut self, moment: Moment) {
        if let Some(bytes) = self.pending_trust.take()
            && matches!(self.update_trust(&bytes, moment), Err(CoreError::Store(_)))
        {
            self.pending_trust = Some(bytes);
        }
    }

    /// Words of clusters whose roots were not known when they came.
    fn reread_words(&mut self, moment: Moment) {
        let peers: Vec<ClusterName> = self.facts.imports.keys().cloned().collect();
        for peer in peers {
            let scope = import::PeerScope::of(&self.facts, &peer, moment.unix);
            let (Some(view), Some(import)) = (self.views.get(&peer), self.facts.imports.get_mut(&peer))
            else {
                continue;
            };
            let words = view.records().filter(|(key, _)| is_progress_key(key));
            let words = words.filter_map(|(_, kept)| super::imports::read(kept));
            words.for_each(|record| import::put(Arc::make_mut(import), &scope, &record));
        }
    }

    /// What this federator's own handshakes use.
    pub fn own_trust(&mut self, held: HeldTrust, moment: Moment) {
        let event = registry::Event::OwnTrust(held);
        self.dirty |= self.facts.registry.step(event, moment.monotonic, moment.unix.as_secs());
    }

    /// Says how far this cluster is, if that has changed and nothing was said within `apart`.
    pub(super) fn speak_of_trust(&mut self, moment: Moment, apart: Duration) {
        if moment.monotonic.saturating_sub(self.last_word) < apart {
            return;
        }
        let mut progress = own_progress(&self.facts);
        let before = self.facts.own_word.as_ref();
        let said = before.and_then(|word| v1::TrustProgress::decode(word.wire.progress.as_slice()).ok());
        let last = said.as_ref().map_or(0, |said| said.at_unix_ms);
        progress.at_unix_ms = last;
        if said.as_ref() == Some(&progress) {
            return;
        }
        let now = i64::try_from(moment.unix.as_millis()).unwrap_or(i64::MAX);
        progress.at_unix_ms = now.max(last.saturating_add(1));
        let bytes = progress.encode_to_vec();
        match self.issuer.sign_record(PROGRESS_LABEL, &bytes) {
            Ok(signature) => {
                let wire = v1::SignedTrustProgress { progress: bytes, signature };
                let cluster = self.facts.cluster.name.clone();
                let word = Word { cluster, at_unix_ms: progress.at_unix_ms, wire };
                self.facts.own_word = Some(Arc::new(word));
                self.last_word = moment.monotonic;
                self.dirty = true;
            }
            Err(error) => tracing::warn!(%error, "how far this cluster is can't be signed"),
        }
    }

    /// With every tick. Before a first rotation nobody asks.
    pub(super) fn tick_trust(&mut self, moment: Moment) {
        if self.facts.trust.update.is_some() {
            self.speak_of_trust(moment, WORDS_APART);
        }
    }

    /// For an operator: what is trusted and how far everybody is, this cluster as of now.
    pub fn trust_status(&mut self, moment: Moment) -> v1::TrustStatusResponse {
        self.speak_of_trust(moment, Duration::ZERO);
        let own = self.facts.own_word.iter().map(|word| word.wire.clone());
        let others = crate::rotation::words(&self.facts).into_values().map(|word| word.wire.clone());
        v1::TrustStatusResponse {
            sequence: self.facts.trust.bundle.sequence,
            roots_der: self.facts.trust.bundle.roots.iter().map(|root| root.to_vec()).collect(),
            cluster: self.facts.cluster.name.to_string(),
            progress: own.chain(others).collect(),
        }
    }

    /// The update that a record of a peer's carries.
    pub(super) fn trust_in(record: Option<&v1::Record>) -> Option<Vec<u8>> {
        match record?.value.as_ref()? {
            v1::record::Value::Trust(trust) => Some(trust.update.clone()),
            _ => None,
        }
    }

    /// Whether a record's key is that of a trust update.
    pub(super) fn is_trust(key: &str) -> bool {
        key == TRUST
    }
}
