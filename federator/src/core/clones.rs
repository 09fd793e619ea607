//! Which process of a sidecar holds its block, kept and told: who is refused stays so over a restart of this federator.

use tombolo_model::audit::{Action, Event, Requester};
use tombolo_model::ids::Block;
use tombolo_proto::v1;

use super::allot::block_key;
use super::members::served;
use super::{Core, CoreError, Moment};
use crate::clones::{self, Claim, Holder, Instance, Stray};
use crate::facts::LeaseRecord;
use crate::registry::{self, Presence, SidecarHello};
use crate::snapshot;
use crate::store::Transaction;

/// Characters of a machine's name that are kept.
pub(super) const MAX_HOST: usize = 64;

impl Core {
    /// Whether this process may hold the block.
    pub(super) fn claim(
        &mut self,
        record: &LeaseRecord,
        hello: &v1::SidecarHello,
        moment: Moment,
    ) -> Result<Option<Instance>, CoreError> {
        let claimant = Instance::from_wire(&hello.instance);
        let holder = self.facts.registry.members.get(&record.block).map(|member| Holder {
            instance: member.instance,
            spoke: member.spoke,
            left: member.leaving,
            answered: member.answered,
            // Only one whose configuration stream is open hears the question.
            answers_within: (member.answers && member.presence == Presence::Live)
                .then(|| clones::ANSWER + snapshot::pace(&self.facts)),
        });
        let claim = self.contests.claim(record.block, claimant, holder, &record.clones, moment.monotonic);
        match (claim, claimant) {
            (Claim::Admit, _) | (_, None) => Ok(claimant),
            (Claim::Ask { question, wait }, _) => {
                self.facts.registry.ask(record.block, question);
                self.dirty = true;
                Err(CoreError::Contested(wait))
            }
            (Claim::Wait(wait), _) => Err(CoreError::Contested(wait)),
            (Claim::Refuse, Some(instance)) => {
                let host: String = hello.host.chars().take(MAX_HOST).collect();
                Err(self.refuse_clone(record.block, &record.spiffe_id, instance, host, moment))
            }
        }
    }

    /// A report comes from the holder, from a clone, or from whom a clone was taken for.
    pub(super) fn judge_reporter(&mut self, hello: &SidecarHello, moment: Moment) -> Result<(), CoreError> {
        let Some(instance) = hello.instance else { return Ok(()) };
        let refused = self.facts.leases.get(&hello.block).is_some_and(|l| l.clones.contains(&instance));
        if refused {
            return Err(CoreError::Cloned(in_use(hello.spiffe_id.as_str())));
        }
        let Some(holder) = self.facts.registry.members.get(&hello.block) else { return Ok(()) };
        let (Some(other), host) = (holder.instance, holder.host.clone()) else { return Ok(()) };
        if other == instance {
            return Ok(());
        }
        match self.contests.stray(hello.block, instance, moment.monotonic) {
            Stray::Ignore => {
                Err(CoreError::Precondition("another process of this machine has taken its place".to_owned()))
            }
            Stray::Restore => {
                // It was silent for so long that its own restart looked no different. A restart of this federator must
                // find it, too, and not the clone.
                if let Some(known) = self.facts.leases.get(&hello.block) {
                    let mut record = (**known).clone();
                    record.ids.clone_from(&hello.ids);
                    (record.address, record.registers) = (hello.address, hello.address.is_none());
                    record.services = served(&record.services, &hello.services);
                    self.keep_what_it_said(record, moment)?;
                }
                self.step(registry::Event::Sidecar(hello.clone()), moment);
                self.handles_stale = true;
                self.refuse_clone(hello.block, hello.spiffe_id.as_str(), other, host, moment);
                Ok(())
            }
        }
    }

    /// Keeps that it is refused, and tells the holder.
    fn refuse_clone(
        &mut self,
        block: Block,
        id: &str,
        instance: Instance,
        host: String,
        moment: Moment,
    ) -> CoreError {
        let known = self.facts.leases.get(&block).map(|lease| (**lease).clone());
        let new = known.as_ref().is_some_and(|lease| !lease.clones.contains(&instance));
        if let Some(mut record) = known.filter(|_| new) {
            clones::remember(&mut record.clones, instance);
            let transaction = Transaction::new().put(block_key(block), &record);
            if let Err(error) = self.store.commit(&transaction) {
                tracing::warn!(%error, %block, "that a clone is refused is not kept for the next start");
            }
            self.install_lease(record);
        }
        self.facts.registry.clone_seen(block, new, moment.unix.as_secs(), &host);
        self.dirty = true;
        let reason = format!("a second process, on machine {host:?}, while the first lives");
        if new {
            tracing::error!(spiffe_id = id, %block, host, "an identity is used twice: the second process is refused");
        }
        let event = Event::refused(Action::Clone, id, reason);
        self.note_refusal(Event { requester: Requester::identity(id), ..event }, moment);
        CoreError::Cloned(in_use(id))
    }
}

fn in_use(id: &str) -> String {
    let token = if id.contains("/vm/") { "tombolo vm token NAME" } else { "tombolo token create" };
    format!(
        "{id} is in use by another process, which lives. A copy of a machine needs an identity of its own: `tombolo vm leave` there, or move its state directory away, and join with a token of its own (`{token}`)"
    )
}
