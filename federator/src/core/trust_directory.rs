//! The trust directory at a start: what was exchanged in it while nobody ran, and what lies in it beside the cluster's CA.

use std::sync::Arc;
use std::time::Duration;

use tombolo_identity::authority::adopt::Upstream;
use tombolo_identity::bundle::fingerprint;
use tombolo_model::audit::{Action, Event};

use super::{Core, CoreError, Moment, trust};
use crate::facts::TrustRecord;
use crate::store::{Transaction, record};

impl Core {
    /// At a start: what was exchanged in the trust directory while nobody ran is in the audit log from then on.
    pub fn note_trust_at_start(&mut self, unix: Duration) -> Result<(), CoreError> {
        let facts = Arc::clone(&self.facts.trust);
        let (kept, now) =
            (record::get::<TrustRecord>(&*self.store, trust::RECORD)?, trust::held_record(&facts));
        let same =
            |kept: &TrustRecord| (kept.sequence, &kept.intermediate) == (now.sequence, &now.intermediate);
        if kept.as_ref().is_some_and(same) {
            return Ok(());
        }
        let transaction = Transaction::new().put(trust::RECORD, &now);
        if kept.is_none_or(|kept| kept.intermediate.is_none()) {
            return Ok(self.store.commit(&transaction)?);
        }
        let roots: Vec<String> = facts.bundle.roots.iter().map(|root| fingerprint(root)).collect();
        let reason = format!(
            "the trust directory was exchanged while the federator was stopped: trusted roots: {}; intermediate sha256:{}",
            roots.join(", "),
            hex::encode(facts.issuer_sha256)
        );
        let event =
            Event { reason, ..Event::done(Action::Rotation, format!("trust:{}", facts.bundle.sequence)) };
        let moment = Moment { monotonic: Duration::ZERO, unix };
        Ok(self.commit_audited(transaction, event, moment)?)
    }

    /// What a foreign authority has signed for the cluster's key, as it lies in the trust directory. False: nothing is new.
    pub fn set_upstream(&mut self, upstream: Option<Upstream>) -> bool {
        if self.facts.upstream.as_deref() == upstream.as_ref() {
            return false;
        }
        self.facts.upstream = upstream.map(Arc::new);
        self.dirty = true;
        true
    }

    /// What applications show beside a leaf of the present intermediate.
    pub(super) fn beside_workloads(&self, moment: Moment) -> Vec<Vec<u8>> {
        let upstream = self.facts.upstream.as_ref();
        let chain = upstream.map(|upstream| upstream.beside(&self.facts.trust.intermediate, moment.unix));
        chain.unwrap_or_default().iter().map(|der| der.to_vec()).collect()
    }
}
