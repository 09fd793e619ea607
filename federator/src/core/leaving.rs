//! A member that leaves for good: out of rotation at once, and its identity neither serves nor is renewed any more.

use tombolo_identity::PeerIdentity;
use tombolo_model::audit::{Action, Event, Requester};
use tombolo_proto::v1;

use super::allot::block_key;
use super::leases::member_role;
use super::{Core, CoreError, Moment};
use crate::clones::RECENT;
use crate::facts::Role;
use crate::store::Transaction;

impl Core {
    /// Its block stays its own until nobody remembers it; its services and registration are gone. Not while a process of
    /// it lives: a copy of a machine must not take the first out.
    pub fn leave(
        &mut self,
        caller: &PeerIdentity,
        lease: Option<&v1::EndpointLease>,
        moment: Moment,
    ) -> Result<(), CoreError> {
        let id = &caller.spiffe_id;
        let role = member_role(id)?;
        if role == Role::Gateway {
            return Err(CoreError::Denied(format!("{id} is a gateway: stop it, and it drains")));
        }
        let mut record = self.known_lease(id, role, lease)?;
        let lives =
            self.facts.registry.members.get(&record.block).is_some_and(|holder| {
                !holder.leaving && moment.monotonic.saturating_sub(holder.spoke) < RECENT
            });
        if lives {
            return Err(CoreError::Contested(RECENT));
        }
        record.left = true;
        record.services.clear();
        (record.address, record.registers) = (None, false);
        let event =
            Event { requester: Requester::identity(id.as_str()), ..Event::done(Action::Leave, id.as_str()) };
        let transaction = Transaction::new().put(block_key(record.block), &record);
        self.commit_audited(transaction, event, moment)?;
        tracing::info!(spiffe_id = %id, block = %record.block, "a member has left for good");
        self.facts.registry.forget(record.block);
        self.handles_stale = true;
        self.install_lease(record);
        Ok(())
    }
}
