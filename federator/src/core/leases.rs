//! Leases of blocks and the identities that go with them: granted, renewed, adopted, forgotten.
//!
//! A lease is signed by the cluster's CA, so a federator that has lost its store believes those it is shown: it adopts
//! them, and no endpoint id ever reaches somebody else. A block is not drawn again until [`REUSE_AFTER`] its lease ended.

use std::sync::Arc;
use std::time::Duration;

use tombolo_identity::issuer::{IssuedLeaf, LEAF_LIFE};
use tombolo_identity::{PeerIdentity, SpiffeId};
use tombolo_model::audit::{Action, Event, Requester};
use tombolo_model::ids::{Block, Handle, Incarnation};
use tombolo_overlay::keys::KeyRing;
use tombolo_overlay::lease::EndpointLease;
use tombolo_proto::v1;

use super::allot::block_key;
use super::{Core, CoreError, Moment, lapsed};
use crate::facts::{CONTROL, FederatorEndpoint, IdentityRecord, LeaseRecord, Role};
use crate::registry::Member;
use crate::revocations;
use crate::store::{Table, Transaction};
use crate::view::rfc3339_seconds;

/// What the CA's signature on a lease is labelled with.
const LABEL: &str = "endpoint lease";
/// Renewed with every hello and SVID renewal; a holder that is away for two days keeps its block for the time below.
pub const LEASE_LIFE: Duration = Duration::from_secs(2 * 24 * 3600);
/// An expired member may come back for 30 days (design section 4) and expects its block.
const REUSE_AFTER: Duration = Duration::from_secs(35 * 24 * 3600);
/// Blocks of tokens are held by nobody once the token has ended; a day covers every key that was handed out.
const PROVISIONAL_REUSE_AFTER: Duration = Duration::from_secs(24 * 3600);
/// Expired identities are shown for a day.
const IDENTITY_KEPT: Duration = Duration::from_secs(24 * 3600);

/// A leaf that is stored with `transaction`.
pub(super) struct Issued {
    pub svid: v1::Svid,
    pub transaction: Transaction,
    pub record: IdentityRecord,
    spki_sha256: String,
}

impl Issued {
    /// What the audit log says of it.
    pub fn event(&self, action: Action) -> Event {
        Event {
            serial: self.record.serial.clone(),
            spki_sha256: self.spki_sha256.clone(),
            reason: format!(
                "{}, until {}",
                self.record.role.as_str(),
                rfc3339_seconds(self.record.not_after)
            ),
            ..Event::done(action, self.record.spiffe_id.as_str())
        }
    }
}

impl Core {
    /// The lease as its holder gets it, with keys for the day ahead.
    pub fn lease_to_wire(
        &self,
        record: &LeaseRecord,
        moment: Moment,
    ) -> Result<v1::EndpointLease, CoreError> {
        let cluster = &self.facts.cluster;
        let mut lease = EndpointLease {
            cluster: cluster.name.clone(),
            tag: cluster.tag,
            block: record.block,
            spiffe_id: record.spiffe_id.clone(),
            not_after: record.not_after,
            signature: Vec::new(),
            keys: KeyRing::derive_now(moment.unix, |hour| {
                cluster.cluster_key.endpoint_key(record.block, hour)
            }),
            renewal_key: (record.role == Role::Vm).then(|| {
                cluster.cluster_key.renewal_key(record.block, lapsed::renewal_salt(&record.spiffe_id).get())
            }),
        };
        lease.signature = self.issuer.sign_record(LABEL, &lease.signed_bytes())?;
        Ok(lease.to_wire())
    }

    /// A record for a new holder, not stored yet.
    pub(super) fn new_lease(
        &self,
        spiffe_id: &str,
        role: Role,
        not_after: u64,
    ) -> Result<LeaseRecord, CoreError> {
        Ok(LeaseRecord {
            block: self.draw_block()?,
            spiffe_id: spiffe_id.to_owned(),
            role,
            not_after,
            adopted: false,
            address: None,
            registers: false,
            ids: Vec::new(),
            services: Vec::new(),
            pinned: Vec::new(),
            gateway: None,
            replaced: false,
            left: false,
            group: String::new(),
            pod: None,
            clones: Vec::new(),
        })
    }

    pub(super) fn install_lease(&mut self, record: LeaseRecord) {
        self.facts.leases.insert(record.block, Arc::new(record));
        self.dirty = true;
    }

    /// The lease that a member shows: known, or signed by us and free, which adopts it.
    pub(super) fn shown_lease(
        &mut self,
        caller: &SpiffeId,
        role: Role,
        wire: Option<&v1::EndpointLease>,
    ) -> Result<LeaseRecord, CoreError> {
        let lease = self.known_lease(caller, role, wire)?;
        if lease.left {
            return Err(CoreError::Denied(format!("{caller} has left: join again with a new token")));
        }
        Ok(lease)
    }

    /// The same, of one that has left, too.
    pub(super) fn known_lease(
        &mut self,
        caller: &SpiffeId,
        role: Role,
        wire: Option<&v1::EndpointLease>,
    ) -> Result<LeaseRecord, CoreError> {
        let wire =
            wire.ok_or_else(|| CoreError::Invalid("field lease: nothing is not a lease".to_owned()))?;
        let lease = EndpointLease::from_wire(wire)?;
        if lease.spiffe_id != caller.as_str() {
            return Err(CoreError::Denied(format!(
                "the lease belongs to {}, not to {caller}",
                lease.spiffe_id
            )));
        }
        if lease.tag != self.facts.cluster.tag || lease.cluster != self.facts.cluster.name {
            return Err(CoreError::Denied(format!(
                "the lease is of cluster {} ({})",
                lease.cluster, lease.tag
            )));
        }
        match self.facts.leases.get(&lease.block) {
            Some(known) if known.spiffe_id == lease.spiffe_id => Ok((**known).clone()),
            Some(known) => Err(CoreError::Denied(format!(
                "block {} is held by {} now: move the state directory away and join again",
                lease.block, known.spiffe_id
            ))),
            None => {
                if !self.issuer.verify_record(LABEL, &lease.signed_bytes(), &lease.signature) {
                    return Err(CoreError::Denied(
                        "the lease is not signed by this cluster's CA: join again with a new token"
                            .to_owned(),
                    ));
                }
                tracing::info!(block = %lease.block, holder = %caller, "a lease unknown here is adopted");
                Ok(LeaseRecord {
                    block: lease.block,
                    adopted: true,
                    ..self.new_lease(caller.as_str(), role, lease.not_after)?
                })
            }
        }
    }

    /// Stores `record` if it differs from what is known. Its end is moved on when half of its life is over.
    pub(super) fn keep_lease(
        &mut self,
        record: LeaseRecord,
        moment: Moment,
    ) -> Result<LeaseRecord, CoreError> {
        let unix = moment.unix.as_secs();
        let mut record = record;
        if record.not_after < unix + LEASE_LIFE.as_secs() / 2 {
            record.not_after = unix + LEASE_LIFE.as_secs();
        }
        if self.facts.leases.get(&record.block).is_some_and(|known| **known == record) {
            return Ok(record);
        }
        self.store.commit(&Transaction::new().put(block_key(record.block), &record))?;
        self.install_lease(record.clone());
        Ok(record)
    }

    /// A leaf for `id`, recorded.
    pub(super) fn issue(
        &mut self,
        csr_der: &[u8],
        id: &SpiffeId,
        role: Role,
        moment: Moment,
        transaction: Transaction,
    ) -> Result<Issued, CoreError> {
        if let Some(object) = revocations::of_identity(&self.facts, id) {
            return Err(CoreError::Denied(format!(
                "{id} is revoked (revocation/{object}): nobody gets it before an operator takes that back, with `tombolo unrevoke {object}`"
            )));
        }
        let leaf = self.issuer.issue(csr_der, id, LEAF_LIFE, moment.unix)?;
        let serial = hex::encode(&leaf.serial);
        let record = IdentityRecord {
            spiffe_id: id.to_string(),
            role,
            serial: serial.clone(),
            issued_unix: moment.unix.as_secs(),
            not_after: leaf.not_after,
            workload: false,
            issuer: self.issuer.spki_sha256(),
        };
        let transaction = transaction.put(serial.as_str(), &record);
        let svid = svid_to_wire(&leaf, &self.facts.trust.bundle_json);
        Ok(Issued { svid, transaction, record, spki_sha256: leaf.spki_sha256 })
    }

    pub(super) fn install_identity(&mut self, record: IdentityRecord) {
        self.facts.identities.insert(record.serial.clone(), record);
        self.dirty = true;
    }

    /// The own identity of this federator: a key made here, a leaf that is recorded like every other.
    pub fn own_svid(&mut self, csr_der: &[u8], moment: Moment) -> Result<v1::Svid, CoreError> {
        let id = self.facts.cluster.federator_id.clone();
        let issued = self.issue(csr_der, &id, Role::Federator, moment, Transaction::new())?;
        let event = Event { requester: Requester::identity(id.as_str()), ..issued.event(Action::OwnSvid) };
        let Issued { mut svid, transaction, record, .. } = issued;
        // Members and peers that missed a rotation find their way across by it.
        svid.chain_der.extend(self.facts.trust.crosses.iter().map(|cross| cross.to_vec()));
        self.commit_audited(transaction, event, moment)?;
        self.install_identity(record);
        Ok(svid)
    }

    /// Renews a member's SVID and lease.
    pub fn renew(
        &mut self,
        caller: &PeerIdentity,
        request: &v1::RenewRequest,
        moment: Moment,
    ) -> Result<v1::RenewResponse, CoreError> {
        let requester = Requester::identity(caller.spiffe_id.as_str());
        let renewed = self.renew_as(caller, request, &requester, moment);
        if let Err(error) = &renewed {
            let event = Event::refused(Action::Renew, caller.spiffe_id.as_str(), "");
            self.refused(Event { requester, ..event }, error, moment);
        }
        renewed
    }

    fn renew_as(
        &mut self,
        caller: &PeerIdentity,
        request: &v1::RenewRequest,
        requester: &Requester,
        moment: Moment,
    ) -> Result<v1::RenewResponse, CoreError> {
        let id = &caller.spiffe_id;
        let role = member_role(id)?;
        let record = self.shown_lease(id, role, request.lease.as_ref())?;
        let record = self.keep_lease(record, moment)?;
        let issued = self.issue(&request.csr_der, id, role, moment, Transaction::new())?;
        let event = Event { requester: requester.clone(), ..issued.event(Action::Renew) };
        let Issued { mut svid, mut transaction, record: mut identity, .. } = issued;
        if request.workload {
            identity.workload = true;
            svid.chain_der.extend(self.beside_workloads(moment));
            // The later write of a key stands.
            transaction = transaction.put(identity.serial.clone(), &identity);
        }
        self.commit_audited(transaction, event, moment)?;
        self.install_identity(identity);
        Ok(v1::RenewResponse {
            svid: Some(svid),
            lease: Some(self.lease_to_wire(&record, moment)?),
            control_keys: self.control_keys(moment),
        })
    }

    /// The keys of the handle that members dial this cluster's federators with.
    pub(super) fn control_keys(&self, moment: Moment) -> Option<v1::KeyRing> {
        let cluster = &self.facts.cluster;
        let binding = self.facts.handle(&cluster.name, CONTROL)?.binding();
        let ring = KeyRing::derive_now(moment.unix, |hour| cluster.self_link_key.handle_key(&binding, hour));
        Some(ring.to_wire())
    }

    /// The endpoint id of this start of the federator: another incarnation than any that a peer may remember.
    pub fn own_endpoint(&mut self, moment: Moment) -> Result<(FederatorEndpoint, KeyRing), CoreError> {
        let unix = moment.unix.as_secs();
        let id = self.facts.cluster.federator_id.to_string();
        let mut own = self.facts.leases.values().filter(|l| l.role == Role::Federator && l.not_after > unix);
        // A block of which all 16 were used rests beside the one that came after it.
        let next = own.find_map(|lease| {
            let last = lease.ids.last()?.incarnation().value();
            Some(((**lease).clone(), Incarnation::new(last + 1)?))
        });
        let (mut record, incarnation) = match next {
            Some(next) => next,
            // All 16 of every block were used: another one.
            None => {
                let record = self.new_lease(&id, Role::Federator, unix + LEASE_LIFE.as_secs())?;
                (record, Incarnation::new(0).ok_or_else(|| CoreError::Invalid("no incarnation".to_owned()))?)
            }
        };
        let endpoint = record.block.endpoint(incarnation);
        record.ids = vec![endpoint];
        let record = self.keep_lease(record, moment)?;
        let address = std::net::SocketAddr::from(([0, 0, 0, 0], 0));
        Ok((FederatorEndpoint { endpoint, address }, self.block_keys(record.block, moment)))
    }

    /// Keys of a block for the day ahead.
    pub fn block_keys(&self, block: Block, moment: Moment) -> KeyRing {
        KeyRing::derive_now(moment.unix, |hour| self.facts.cluster.cluster_key.endpoint_key(block, hour))
    }

    /// Where this federator listens.
    pub fn set_own_endpoint(&mut self, endpoint: FederatorEndpoint) {
        self.facts.federator = Some(endpoint);
        self.dirty = true;
    }

    /// A federator that runs for weeks keeps its block.
    pub(super) fn keep_own_lease(&mut self, moment: Moment) {
        let Some(endpoint) = self.facts.federator else { return };
        let Some(lease) = self.facts.leases.get(&endpoint.endpoint.block()).map(|l| (**l).clone()) else {
            return;
        };
        if let Err(error) = self.keep_lease(lease, moment) {
            tracing::debug!(%error, "the federator's own lease can't be renewed yet");
        }
    }

    /// Keys of the reserved join handle.
    pub(super) fn join_keys(&self, moment: Moment) -> v1::KeyRing {
        let key = &self.facts.cluster.cluster_key;
        KeyRing::derive_now(moment.unix, |hour| key.reserved_key(Handle::JOIN, hour)).to_wire()
    }

    /// Leases, identities, tokens and handles whose time is over.
    pub(super) fn forget_expired(&mut self, unix: u64, monotonic: Duration) {
        let mut transaction = Transaction::new();
        let reuse = |lease: &LeaseRecord| match lease.role {
            // A pod never comes back: it joins anew, by its service account.
            _ if lease.pod.is_some() => PROVISIONAL_REUSE_AFTER,
            Role::Provisional => PROVISIONAL_REUSE_AFTER,
            _ => REUSE_AFTER,
        };
        let blocks: Vec<Block> = self
            .facts
            .leases
            .values()
            .filter(|lease| lease.not_after.saturating_add(reuse(lease).as_secs()) < unix)
            .map(|lease| lease.block)
            .collect();
        for block in &blocks {
            transaction = transaction.delete(Table::Leases, block_key(*block));
        }
        let identities: Vec<String> = self
            .facts
            .identities
            .values()
            .filter(|identity| identity.not_after.saturating_add(IDENTITY_KEPT.as_secs()) < unix)
            .map(|identity| identity.serial.clone())
            .collect();
        for serial in &identities {
            transaction = transaction.delete(Table::Identities, serial.as_str());
        }
        let (transaction, handles) = self.forget_released(unix, transaction);
        let (transaction, addresses) = self.forget_addresses(unix, transaction);
        let transaction = self.forget_tokens(unix, transaction);
        self.forget_members(unix, monotonic);
        if transaction.is_empty() {
            return;
        }
        if let Err(error) = self.store.commit(&transaction) {
            tracing::debug!(%error, "what has expired can't be removed from the store yet");
            return;
        }
        for block in blocks {
            self.facts.leases.remove(&block);
        }
        for serial in identities {
            self.facts.identities.remove(&serial);
        }
        for handle in handles {
            self.released.remove(&handle);
        }
        for service in addresses {
            self.addresses.remove(&service);
            self.addresses_stale = true;
        }
        self.dirty = true;
    }

    /// A member whose lease has ended, or that has been away for long, is not shown, counted or sent to any more; a
    /// gateway whose lease has ended neither. Blocks stay their holders'.
    fn forget_members(&mut self, unix: u64, monotonic: Duration) {
        let leases = &self.facts.leases;
        let ended = |block: Block| leases.get(&block).is_none_or(|lease| lease.not_after < unix);
        let members = self.facts.registry.members.values();
        let over: Vec<Block> = members
            .filter(|member| ended(member.block) || member.absent_for(monotonic) > patience(member))
            .map(|member| member.block)
            .collect();
        self.dirty |= self.facts.registry.forget_gateways(ended);
        for block in over {
            self.facts.registry.forget(block);
            self.handles_stale = true;
            self.dirty = true;
        }
    }
}

/// How long an absent member is remembered as one: an hour, or ten minutes when it said goodbye (a rollout replaces
/// hundreds).
fn patience(member: &Member) -> Duration {
    Duration::from_secs(if member.leaving { 600 } else { 3600 })
}

/// The role of a caller that may hold a lease.
pub(super) fn member_role(id: &SpiffeId) -> Result<Role, CoreError> {
    match Role::of(id) {
        Some(role @ (Role::Gateway | Role::Sidecar | Role::Vm)) => Ok(role),
        _ => Err(CoreError::Denied(format!("{id} is neither a gateway nor a sidecar of this cluster"))),
    }
}

/// An issued leaf as its holder gets it.
pub fn svid_to_wire(leaf: &IssuedLeaf, bundle_json: &str) -> v1::Svid {
    v1::Svid {
        spiffe_id: leaf.spiffe_id.to_string(),
        chain_der: leaf.chain.iter().map(|der| der.to_vec()).collect(),
        trust_bundle_json: bundle_json.to_owned(),
        not_after_unix: i64::try_from(leaf.not_after).unwrap_or(i64::MAX),
    }
}
