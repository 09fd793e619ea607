//! What gateways and sidecars say about themselves: checked, entered into the registry, kept for the next start.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

use tombolo_identity::{PeerIdentity, SpiffeId};
use tombolo_model::ids::{Block, EndpointId};
use tombolo_model::names::ServiceKey;
use tombolo_model::resource::Spec;
use tombolo_model::resource::workload::{DEFAULT_WEIGHT, MAX_WEIGHT};
use tombolo_proto::convert::{self, FieldError};
use tombolo_proto::v1;

use super::boot::SHIFTS_KEPT;
use super::clones::MAX_HOST;
use super::leases::member_role;
use super::{Core, CoreError, Moment};
use crate::facts::{GatewayRecord, LeaseRecord, Port, Role, ServedRecord, ShiftRecord};
use crate::import::port_of;
use crate::joining;
use crate::registry::{Event, GatewayHello, Presence, SidecarHello};
use crate::revocations;
use crate::store::{Table, Transaction};

/// One process serves a handful of services.
const MAX_SERVICES: usize = 256;
const MAX_REPORTED_SHIFTS: usize = 100;
/// Kept of one sidecar over all services: one that invents services can't fill the store.
const MAX_SHIFTS_OF_ONE: usize = 500;

/// Services with their ports and weights.
type Services = BTreeMap<ServiceKey, (Vec<Port>, u32)>;

/// Who is behind a connection.
#[derive(Clone, Debug)]
pub enum Session {
    Sidecar { id: SpiffeId, block: Block, watch: u64, hello: Arc<SidecarHello> },
    Gateway { id: SpiffeId, name: String, watch: u64 },
}

impl Session {
    fn watch(&self) -> u64 {
        match self {
            Self::Sidecar { watch, .. } | Self::Gateway { watch, .. } => *watch,
        }
    }
    fn id(&self) -> &SpiffeId {
        match self {
            Self::Sidecar { id, .. } | Self::Gateway { id, .. } => id,
        }
    }
}

/// What a watcher of configuration needs to know about itself.
#[derive(Clone, Copy, Debug)]
pub struct Welcome {
    pub block: Block,
    pub watch: u64,
    pub role: Role,
}

impl Core {
    fn draw_watch(&mut self) -> u64 {
        self.next_watch += 1;
        self.next_watch
    }

    /// A sidecar opens its configuration stream on `connection`.
    pub fn sidecar_hello(
        &mut self,
        caller: &PeerIdentity,
        connection: usize,
        hello: &v1::SidecarHello,
        moment: Moment,
    ) -> Result<Welcome, CoreError> {
        let id = &caller.spiffe_id;
        let role = member_role(id)?;
        if role == Role::Gateway {
            return Err(CoreError::Denied(format!("{id} is a gateway, not a sidecar")));
        }
        let mut record = self.shown_lease(id, role, hello.lease.as_ref())?;
        let instance = self.claim(&record, hello, moment)?;
        let ids = endpoints_of(&record, &hello.endpoints)?;
        let first = hello.endpoint_addresses.first().map(String::as_str).unwrap_or_default();
        let address = usable("endpoint_addresses", convert::address("endpoint_addresses", first)?)?;
        let (services, refused) = self.allowed_services(id, role, &record, &hello.services)?;
        (record.ids, record.address, record.registers) = (ids.clone(), address, address.is_none());
        record.services = served(&record.services, &services);
        if role == Role::Vm {
            let new = services.keys().filter(|key| !record.pinned.contains(key)).cloned().collect::<Vec<_>>();
            record.pinned.extend(new);
        }
        let record = self.keep_what_it_said(record, moment)?;
        let watch = self.draw_watch();
        let mut plain = plain_hops(&hello.services);
        plain.retain(|service, _| services.contains_key(service));
        let said = SidecarHello {
            block: record.block,
            spiffe_id: id.clone(),
            role,
            ids,
            address,
            services,
            refused,
            watch,
            version: hello.version.chars().take(64).collect(),
            instance,
            host: hello.host.chars().take(MAX_HOST).collect(),
            answers: hello.answers,
            plain,
        };
        let hello = Arc::new(said.clone());
        self.step(Event::Sidecar(said), moment);
        self.handles_stale = true;
        let session = Session::Sidecar { id: id.clone(), block: record.block, watch, hello };
        self.sessions.insert(connection, session);
        Ok(Welcome { block: record.block, watch, role })
    }

    /// A gateway opens its configuration stream on `connection`.
    pub fn gateway_hello(
        &mut self,
        caller: &PeerIdentity,
        connection: usize,
        hello: &v1::GatewayHello,
        moment: Moment,
    ) -> Result<Welcome, CoreError> {
        let id = &caller.spiffe_id;
        if member_role(id)? != Role::Gateway
            || id.within_cluster() != Some(&format!("/gateway/{}", hello.name))
        {
            return Err(CoreError::Denied(format!("{id} may not speak for gateway {:?}", hello.name)));
        }
        let mut record = self.shown_lease(id, Role::Gateway, hello.lease.as_ref())?;
        let address = |field, text: &str| -> Result<SocketAddr, CoreError> {
            let missing = || FieldError::new(field, "nothing", "an ip:port");
            Ok(usable(field, convert::address(field, text)?)?.ok_or_else(missing)?)
        };
        let border = address("border_address", &hello.border_address)?;
        let inner = address("inner_address", &hello.inner_address)?;
        record.ids = endpoints_of(&record, &[hello.endpoint])?;
        record.address =
            usable("endpoint_address", convert::address("endpoint_address", &hello.endpoint_address)?)?;
        record.gateway = Some(GatewayRecord {
            name: hello.name.clone(),
            border,
            inner,
            balanced: hello.balanced,
            zone: hello.zone.chars().take(64).collect(),
            start_number: hello.start_number,
        });
        let record = self.keep_what_it_said(record, moment)?;
        let watch = self.draw_watch();
        let event = Event::Gateway(GatewayHello {
            name: hello.name.clone(),
            border,
            inner,
            balanced: hello.balanced,
            zone: hello.zone.chars().take(64).collect(),
            start_number: hello.start_number,
            endpoint: record.ids.first().map(|id| (*id, record.address)),
            watch,
        });
        self.step(event, moment);
        let session = Session::Gateway { id: id.clone(), name: hello.name.clone(), watch };
        self.sessions.insert(connection, session);
        Ok(Welcome { block: record.block, watch, role: Role::Gateway })
    }

    /// A report on `connection`, which must have said hello.
    pub fn report(
        &mut self,
        caller: &PeerIdentity,
        connection: usize,
        mut report: v1::StatusReport,
        moment: Moment,
    ) -> Result<v1::ReportAck, CoreError> {
        let session = self.sessions.get(&connection).filter(|s| *s.id() == caller.spiffe_id).cloned();
        let session = session.ok_or_else(|| {
            CoreError::Precondition("open the configuration stream before reporting".to_owned())
        })?;
        if let Session::Sidecar { hello, .. } = &session {
            self.judge_reporter(hello, moment)?;
        }
        if !report.enforcements.is_empty() {
            // What a member makes up is not kept.
            let held = revocations::in_force(&self.facts);
            let held: BTreeSet<&str> = held.iter().map(|revocation| revocation.name.as_str()).collect();
            report.enforcements.retain(|enforcement| held.contains(enforcement.revocation.as_str()));
        }
        let acknowledged = match &session {
            Session::Sidecar { id, block, .. } => self.record_shifts(id, *block, &report.shifts),
            Session::Gateway { .. } => 0,
        };
        let event = match session {
            Session::Sidecar { block, .. } => Event::SidecarReport { block, report: Box::new(report) },
            Session::Gateway { name, .. } => Event::GatewayReport { name, report: Box::new(report) },
        };
        if self.step(event, moment)
            && let Some(Session::Sidecar { block, .. }) = self.sessions.get(&connection)
        {
            self.remember_health(*block);
        }
        Ok(v1::ReportAck { acknowledged_shift: acknowledged })
    }

    /// Stores what a holder says in its hello. On a full disk a known one is let in all the same, and what it says holds
    /// for this process; a lease or a right that is new here waits for the disk.
    pub(super) fn keep_what_it_said(
        &mut self,
        record: LeaseRecord,
        moment: Moment,
    ) -> Result<LeaseRecord, CoreError> {
        let known = self.facts.leases.get(&record.block).is_some_and(|known| known.pinned == record.pinned);
        match self.keep_lease(record.clone(), moment) {
            Err(CoreError::Store(error)) if known && error.is_retryable() => {
                tracing::warn!(%error, block = %record.block, "what a member says is not kept for the next start");
                Ok(record)
            }
            kept => kept,
        }
    }

    /// This federator has enforced these revocations: name to milliseconds since the Unix epoch.
    pub fn enforced(&mut self, enforced: BTreeMap<String, i64>, moment: Moment) {
        self.step(Event::OwnEnforced(enforced), moment);
    }

    /// A configuration stream has ended.
    pub fn closed(&mut self, watch: u64, moment: Moment) {
        self.sessions.retain(|_, session| session.watch() != watch);
        if !self.ending {
            self.step(Event::Closed { watch }, moment);
        }
    }

    pub(super) fn step(&mut self, event: Event, moment: Moment) -> bool {
        let changed = self.facts.registry.step(event, moment.monotonic, moment.unix.as_secs());
        self.dirty |= changed;
        changed
    }

    /// What it says it serves, and what of that it may. A pod serves services of its own namespace. A machine serves
    /// what a `Workload` of its name lists; without one, what it said first: a stolen machine gains no other service.
    fn allowed_services(
        &self,
        id: &SpiffeId,
        role: Role,
        record: &LeaseRecord,
        wire: &[v1::LocalService],
    ) -> Result<(Services, BTreeMap<String, String>), CoreError> {
        if wire.len() > MAX_SERVICES {
            let expected = format!("at most {MAX_SERVICES} services");
            return Err(FieldError::new("services", wire.len(), expected).into());
        }
        let (mut services, mut refused) = (BTreeMap::new(), BTreeMap::new());
        for service in wire {
            let key: ServiceKey = convert::parse("services.service", &service.service)?;
            let ports: Vec<Port> =
                service.ports.iter().map(|p| port_of("services.ports", p)).collect::<Result<_, _>>()?;
            match self.may_serve(id, role, record, &key) {
                Ok(()) => {
                    let weight =
                        if service.weight == 0 { DEFAULT_WEIGHT } else { service.weight.min(MAX_WEIGHT) };
                    services.insert(key, (ports, weight));
                }
                Err(reason) => {
                    tracing::warn!(spiffe_id = %id, service = %key, reason, "a service is refused");
                    refused.insert(key.to_string(), reason);
                }
            }
        }
        Ok((services, refused))
    }

    fn may_serve(
        &self,
        id: &SpiffeId,
        role: Role,
        record: &LeaseRecord,
        key: &ServiceKey,
    ) -> Result<(), String> {
        joining::may_serve(&self.facts, id, record, key)?;
        let within = id.within_cluster().unwrap_or_default();
        let parts: Vec<&str> = within.split('/').skip(1).collect();
        match (role, parts.as_slice()) {
            (Role::Sidecar, ["ns", namespace, ..]) if *namespace == key.namespace.as_str() => Ok(()),
            (Role::Sidecar, ["ns", namespace, ..]) => Err(format!(
                "an identity of namespace {namespace} serves only services of it: give it a token for namespace {}",
                key.namespace
            )),
            (Role::Vm, ["vm", name]) => {
                let known = record.pinned.is_empty() || record.pinned.contains(key);
                match self.workload_services(name) {
                    Some(listed) if listed.contains(key) => Ok(()),
                    Some(_) => Err(format!("the Workload of machine {name} does not list it: add it there")),
                    None if known => Ok(()),
                    None => Err(format!(
                        "machine {name} has not served it before: apply a Workload with `sidecar: {name}` that lists it"
                    )),
                }
            }
            _ => Err(format!("{id} serves nothing")),
        }
    }

    /// What `Workload` objects list for a machine; `None` when there is none.
    fn workload_services(&self, machine: &str) -> Option<Vec<ServiceKey>> {
        let mut found = None;
        for (key, stored) in &self.facts.objects {
            let Spec::Workload(spec) = &stored.object.spec else { continue };
            if spec.holder(&key.name) != machine {
                continue;
            }
            let Ok(namespace) = key.namespace.parse::<tombolo_model::names::Namespace>() else { continue };
            let services = spec.services.iter().filter_map(|service| service.name.parse().ok());
            let services = services.map(|name| ServiceKey::new(namespace.clone(), name));
            found.get_or_insert_with(Vec::new).extend(services);
        }
        found
    }

    /// Health as last reported, so that a restarted federator does not start from nothing. Written when it changes.
    fn remember_health(&mut self, block: Block) {
        let Some(record) = self.facts.leases.get(&block).map(|lease| (**lease).clone()) else { return };
        let Some(member) = self.facts.registry.members.get(&block) else { return };
        let mut record = record;
        for served in &mut record.services {
            if let Some(now) = member.services.get(&served.service) {
                // One that said farewell is not in rotation after a restart either.
                served.healthy = now.healthy && !member.leaving;
            }
        }
        if self.facts.leases.get(&block).is_some_and(|known| **known == record) {
            return;
        }
        let transaction = Transaction::new().put(super::allot::block_key(block), &record);
        match self.store.commit(&transaction) {
            Ok(()) => self.install_lease(record),
            Err(error) => tracing::debug!(%error, "health is not kept for the next start"),
        }
    }

    /// Whoever is not there is not healthy, for the next start too: a restart must not bring the dead into rotation.
    pub(super) fn remember_absent(&mut self) {
        let absent = self.facts.registry.members.values().filter(|m| m.presence != Presence::Live);
        let records: Vec<LeaseRecord> = absent
            .filter_map(|member| {
                let mut record = (**self.facts.leases.get(&member.block)?).clone();
                record.services.iter().any(|s| s.healthy).then(|| {
                    record.services.iter_mut().for_each(|s| s.healthy = false);
                    record
                })
            })
            .collect();
        let transaction = records.iter().fold(Transaction::new(), |transaction, record| {
            transaction.put(super::allot::block_key(record.block), record)
        });
        match self.store.commit(&transaction) {
            Ok(()) => records.into_iter().for_each(|record| self.install_lease(record)),
            Err(error) => tracing::debug!(%error, "who is absent is not kept for the next start yet"),
        }
    }

    /// Stores failover decisions; the highest sequence that is safely stored, 0 when the store can't be written: the
    /// sidecar sends them again. What does not read is left out and never stops a heartbeat.
    fn record_shifts(&mut self, id: &SpiffeId, block: Block, shifts: &[v1::Shift]) -> u64 {
        let sent = || shifts.iter().take(MAX_REPORTED_SHIFTS);
        let mut transaction = Transaction::new();
        let mut updated = self.facts.shifts.clone();
        for shift in sent() {
            let Ok(service) = shift.service.parse::<ServiceKey>() else {
                tracing::debug!(spiffe_id = %id, sequence = shift.sequence, "a shift names no service");
                continue;
            };
            let record = ShiftRecord {
                sidecar: id.to_string(),
                block: Some(block),
                sequence: shift.sequence,
                at_unix_ms: u64::try_from(shift.at_unix_ms).unwrap_or(0),
                service: service.to_string(),
                from_tier: usize::try_from(shift.from_tier).unwrap_or(0),
                to_tier: usize::try_from(shift.to_tier).unwrap_or(0),
                clusters: shift.clusters.iter().filter_map(|c| c.parse().ok()).take(100).collect(),
                reason: shift.reason.chars().take(500).collect(),
            };
            let key = shift_key(&record);
            let kept = updated.entry(record.service.clone()).or_default();
            if kept.iter().any(|known| shift_key(known) == key) {
                continue;
            }
            transaction = transaction.put(key, &record);
            kept.push_front(record);
            while kept.len() > SHIFTS_KEPT {
                if let Some(oldest) = kept.pop_back() {
                    transaction = transaction.delete(Table::Shifts, shift_key(&oldest));
                }
            }
        }
        if !transaction.is_empty() {
            transaction = trim_shifts(&mut updated, id, block, transaction);
            if let Err(error) = self.store.commit(&transaction) {
                tracing::warn!(%error, spiffe_id = %id, "failover decisions can't be stored yet");
                return 0;
            }
            self.facts.shifts = updated;
            self.dirty = true;
        }
        sent().map(|shift| shift.sequence).max().unwrap_or(0)
    }
}

fn shift_key(record: &ShiftRecord) -> String {
    match record.block {
        Some(block) => {
            format!("{}/{}/{:020}", record.sidecar, super::allot::block_key(block), record.sequence)
        }
        None => format!("{}/{:020}", record.sidecar, record.sequence),
    }
}

/// Drops the oldest shifts of one sidecar beyond [`MAX_SHIFTS_OF_ONE`].
fn trim_shifts(
    shifts: &mut BTreeMap<String, VecDeque<ShiftRecord>>,
    id: &SpiffeId,
    block: Block,
    mut transaction: Transaction,
) -> Transaction {
    let own = |record: &ShiftRecord| record.block == Some(block) && record.sidecar == id.as_str();
    let mut sequences: Vec<u64> = shifts.values().flatten().filter(|r| own(r)).map(|r| r.sequence).collect();
    if sequences.len() <= MAX_SHIFTS_OF_ONE {
        return transaction;
    }
    sequences.sort_unstable();
    let first_kept = sequences.get(sequences.len() - MAX_SHIFTS_OF_ONE).copied().unwrap_or(u64::MAX);
    for kept in shifts.values_mut() {
        kept.retain(|record| {
            let stays = !own(record) || record.sequence >= first_kept;
            if !stays {
                transaction = std::mem::take(&mut transaction).delete(Table::Shifts, shift_key(record));
            }
            stays
        });
    }
    shifts.retain(|_, kept| !kept.is_empty());
    transaction
}

/// The endpoint ids of this start: of the lease's block, at least one.
fn endpoints_of(record: &LeaseRecord, wire: &[u32]) -> Result<Vec<EndpointId>, CoreError> {
    let ids: Vec<EndpointId> = wire.iter().copied().map(EndpointId::from_u32).collect();
    let foreign = ids.iter().find(|id| id.block() != record.block);
    match (ids.is_empty(), foreign) {
        (true, _) => Err(FieldError::new("endpoints", "none", "at least one endpoint id").into()),
        (_, Some(id)) => {
            Err(CoreError::Denied(format!("endpoint {id} is not of the leased block {}", record.block)))
        }
        _ if ids.len() > usize::from(tombolo_model::ids::Incarnation::COUNT) => {
            Err(FieldError::new("endpoints", ids.len(), "at most 16").into())
        }
        _ => Ok(ids),
    }
}

/// An address that something can be sent to.
fn usable(field: &'static str, address: Option<SocketAddr>) -> Result<Option<SocketAddr>, FieldError> {
    match address {
        Some(a) if a.ip().is_unspecified() || a.ip().is_multicast() || a.port() == 0 => {
            Err(FieldError::new(field, a, "an address that packets can be sent to"))
        }
        address => Ok(address),
    }
}

/// Backends past the mesh, as a sidecar names them: for people, and bounded.
fn plain_hops(wire: &[v1::LocalService]) -> BTreeMap<ServiceKey, Vec<String>> {
    const MOST: usize = 32;
    let hops = wire.iter().filter(|service| !service.plain.is_empty()).filter_map(|service| {
        let plain = service.plain.iter().take(MOST).map(|hop| hop.chars().take(260).collect());
        Some((service.service.parse().ok()?, plain.collect()))
    });
    hops.collect()
}

/// What is kept of the services: their health stays as it was until it is reported.
pub(super) fn served(before: &[ServedRecord], services: &Services) -> Vec<ServedRecord> {
    let healthy = |key: &ServiceKey| before.iter().any(|s| s.service == *key && s.healthy);
    services
        .iter()
        .map(|(service, (ports, weight))| ServedRecord {
            service: service.clone(),
            ports: ports.clone(),
            weight: *weight,
            healthy: healthy(service),
        })
        .collect()
}
