//! Identities that have ended and are renewed by possession of their key (design section 4), and which leases that takes.
//!
//! A machine outside finds its way back through gateways that know its block: its lease stays known to them until its
//! identity can't be renewed any more. That ends early when it is revoked, or has joined anew.

use std::num::NonZeroU32;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use tombolo_identity::verify::RENEWABLE_FOR;
use tombolo_identity::{PeerIdentity, SpiffeId};
use tombolo_model::audit::{Action, Event, Requester};
use tombolo_proto::v1;

use super::allot::block_key;
use super::leases::{Issued, member_role};
use super::{Core, CoreError, Moment};
use crate::facts::{CONTROL, Facts, LeaseRecord, Role};
use crate::revocations;
use crate::store::Transaction;

/// What the renewal key of a block is bound to beside it: its holder.
pub fn renewal_salt(spiffe_id: &str) -> NonZeroU32 {
    let [a, b, c, d, ..] = <[u8; 32]>::from(Sha256::digest(spiffe_id.as_bytes()));
    NonZeroU32::new(u32::from_be_bytes([a, b, c, d])).unwrap_or(NonZeroU32::MIN)
}

/// Whom gateways let come back by a renewal key at `unix`: machines that have neither been revoked nor joined anew. A lease
/// outlives the identity that it was renewed with by a day or two, so nobody is cut off early.
pub fn may_come_back(facts: &Facts, unix: u64) -> impl Fn(&LeaseRecord) -> bool {
    let revoked: Vec<_> = revocations::targets_in_force(facts);
    move |lease| {
        lease.role == Role::Vm
            && !lease.replaced
            && !lease.left
            && unix <= lease.not_after.saturating_add(RENEWABLE_FOR.as_secs())
            && (revoked.is_empty()
                || lease.spiffe_id.parse::<SpiffeId>().is_ok_and(|id| !revoked.iter().any(|t| t.names(&id))))
    }
}

impl Core {
    /// Renews an identity whose chain holds but for its leaf's end. `revoked`: the revocation that means it.
    pub fn renew_lapsed(
        &mut self,
        caller: &PeerIdentity,
        revoked: Option<&str>,
        request: &v1::RenewLapsedRequest,
        moment: Moment,
    ) -> Result<v1::JoinWorkloadResponse, CoreError> {
        let requester = Requester::identity(caller.spiffe_id.as_str());
        let renewed = self.renew_lapsed_as(caller, revoked, request, &requester, moment);
        if let Err(error) = &renewed {
            let event = Event::refused(Action::Renew, caller.spiffe_id.as_str(), "");
            self.refused(Event { requester, ..event }, error, moment);
        }
        renewed
    }

    fn renew_lapsed_as(
        &mut self,
        caller: &PeerIdentity,
        revoked: Option<&str>,
        request: &v1::RenewLapsedRequest,
        requester: &Requester,
        moment: Moment,
    ) -> Result<v1::JoinWorkloadResponse, CoreError> {
        let id = &caller.spiffe_id;
        let role = member_role(id)?;
        if let Some(revocation) = revoked {
            return Err(CoreError::Denied(format!(
                "{id} is revoked ({revocation}): it is renewed once an operator takes that back, with `tombolo unrevoke`"
            )));
        }
        let lease = self.shown_lease(id, role, request.lease.as_ref())?;
        if lease.replaced {
            return Err(CoreError::Denied(format!(
                "{id} has joined anew since, with another key: this one is not renewed any more"
            )));
        }
        let lease = self.keep_lease(lease, moment)?;
        let issued = self.issue(&request.csr_der, id, role, moment, Transaction::new())?;
        let ended = u64::try_from(caller.not_after).unwrap_or(0);
        let hours = moment.unix.as_secs().saturating_sub(ended) / 3600;
        let mut event = Event { requester: requester.clone(), ..issued.event(Action::Renew) };
        event.reason = format!("{}; the one before had ended {hours} h ago", event.reason);
        let Issued { svid, transaction, record: identity, .. } = issued;
        self.commit_audited(transaction, event, moment)?;
        self.install_identity(identity);
        tracing::info!(spiffe_id = %id, hours, "an identity that had ended is renewed");
        self.membership(svid, &lease, moment)
    }

    /// What a member needs to be one: its identity, its lease, and the way to this federator.
    pub(super) fn membership(
        &self,
        svid: v1::Svid,
        lease: &LeaseRecord,
        moment: Moment,
    ) -> Result<v1::JoinWorkloadResponse, CoreError> {
        let cluster = &self.facts.cluster;
        Ok(v1::JoinWorkloadResponse {
            svid: Some(svid),
            lease: Some(self.lease_to_wire(lease, moment)?),
            control: Some(v1::ControlAccess {
                cluster: cluster.name.to_string(),
                tag: cluster.tag.value(),
                handle: self.facts.handle(&cluster.name, CONTROL).map_or(0, |h| h.handle.value()),
                keys: self.control_keys(moment),
                federators: self.federators(lease.role != Role::Vm),
                spiffe_ids: vec![cluster.federator_id.to_string()],
            }),
            gateways: self.gateways_for(lease.role),
        })
    }

    /// Leases of before of a machine that joins anew: their identities are not renewed once they have ended.
    pub(super) fn replace_leases(
        &self,
        id: &SpiffeId,
        role: Role,
        keep: &LeaseRecord,
        transaction: Transaction,
    ) -> (Transaction, Vec<LeaseRecord>) {
        if role != Role::Vm {
            // Replicas of a service share one identity.
            return (transaction, Vec::new());
        }
        let of_before =
            self.facts.leases.values().filter(|lease| {
                lease.spiffe_id == id.as_str() && lease.block != keep.block && !lease.replaced
            });
        let replaced: Vec<_> = of_before
            .map(|lease| LeaseRecord { replaced: true, ..Arc::unwrap_or_clone(Arc::clone(lease)) })
            .collect();
        let transaction = replaced.iter().fold(transaction, |t, lease| t.put(block_key(lease.block), lease));
        (transaction, replaced)
    }
}
