//! Allotment of block ids and handles, each by compare-and-swap in the store (protocol.md section 1): without a store
//! nothing is allotted, and nothing is given out again while somebody could still hold it.

use std::collections::BTreeSet;

use tombolo_model::ids::{Block, Handle};
use tombolo_model::names::ClusterName;

use super::{Core, CoreError, Moment};
use crate::exports::{self, exported_to};
use crate::facts::{CONTROL, HandleRecord};
use crate::store::{Table, Transaction};

/// An endpoint id may live 80 min, derived keys a day: after that nobody mints IDs for a released handle.
const HANDLE_HOLD_SECONDS: u64 = 24 * 3600;
/// Draws before giving up: with half of 2^28 blocks taken, 64 draws all fail once in 2^64.
const DRAWS: usize = 64;

pub(super) fn block_key(block: Block) -> String {
    format!("{:07x}", block.value())
}

pub(super) fn handle_key(handle: Handle) -> String {
    format!("{:08x}", handle.value())
}

impl Core {
    /// A block that nobody holds or may still remember.
    pub(super) fn draw_block(&self) -> Result<Block, CoreError> {
        (0..DRAWS)
            .filter_map(|_| Block::new(rand::random::<u32>() & Block::MAX))
            .find(|block| !self.facts.leases.contains_key(block))
            .ok_or_else(|| {
                CoreError::Exhausted("no free block of endpoint ids was found; try again".to_owned())
            })
    }

    fn is_free(&self, handle: Handle, taken: &BTreeSet<Handle>) -> bool {
        !handle.is_reserved()
            && !handle.is_first_contact()
            && !taken.contains(&handle)
            && !self.released.contains_key(&handle)
            && !self.in_use.contains(&handle)
    }

    fn draw_handle(&self, taken: &BTreeSet<Handle>) -> Option<Handle> {
        (0..DRAWS).map(|_| Handle::from_u32(rand::random())).find(|handle| self.is_free(*handle, taken))
    }

    /// A fresh record for an importer and a service, not stored yet.
    pub(super) fn new_handle(
        &self,
        importer: &ClusterName,
        service: &str,
        taken: &BTreeSet<Handle>,
    ) -> Result<HandleRecord, CoreError> {
        let none = || CoreError::Exhausted("no free handle was found; try again".to_owned());
        let derived = self.own_control(importer, service).filter(|(handle, _)| self.is_free(*handle, taken));
        let (handle, export_uid) = match derived {
            Some(derived) => derived,
            None => (self.draw_handle(taken).ok_or_else(none)?, rand::random()),
        };
        let (importer, service) = (importer.clone(), service.to_owned());
        Ok(HandleRecord { importer, service, handle, export_uid, released: None })
    }

    /// The handle by which members dial their own federators is the same after a lost store: else nobody could come
    /// back to show a lease.
    fn own_control(&self, importer: &ClusterName, service: &str) -> Option<(Handle, [u8; 16])> {
        if *importer != self.facts.cluster.name || service != CONTROL {
            return None;
        }
        let secret = super::boot::derived(&self.issuer.material, "control handle").ok()?;
        let (handle, rest) = secret.split_first_chunk::<4>()?;
        Some((Handle::from_u32(u32::from_be_bytes(*handle)), *rest.first_chunk::<16>()?))
    }

    pub(super) fn put_handle(transaction: Transaction, record: &HandleRecord) -> Transaction {
        let key = handle_key(record.handle);
        match record.released {
            None => transaction.absent(Table::Handles, key.clone()).put(key, record),
            Some(_) => transaction.put(key, record),
        }
    }

    pub(super) fn install_handle(&mut self, record: HandleRecord) {
        self.in_use.insert(record.handle);
        self.facts.handles.insert((record.importer.clone(), record.service.clone()), record);
        self.dirty = true;
    }

    /// Every (importer, service) that needs a handle: what is served here, for the own cluster, and for each linked
    /// cluster that it is exported to; and the control handle of each.
    fn handles_wanted(&self) -> BTreeSet<(ClusterName, String)> {
        let own = &self.facts.cluster.name;
        let mut wanted = BTreeSet::from([(own.clone(), CONTROL.to_owned())]);
        // Made while linking, before the link is there.
        let control = self.facts.handles.keys().filter(|(_, service)| service == CONTROL);
        wanted.extend(control.cloned());
        for service in self.facts.registry.services() {
            wanted.insert((own.clone(), service.to_string()));
            for link in self.facts.live_links() {
                if exported_to(&self.facts, service, &link.peer) {
                    wanted.insert((link.peer.clone(), service.to_string()));
                }
            }
        }
        // Importers are told of a Kubernetes service before any of its pods has joined.
        for export in exports::exports(&self.facts).filter(|export| export.kubernetes().is_some()) {
            let importers = self.facts.live_links().filter(|link| export.includes(&link.peer));
            wanted.extend(importers.map(|link| (link.peer.clone(), export.service.to_string())));
        }
        wanted
    }

    /// Allots what is wanted and releases what is not, in one transaction.
    pub(super) fn allot_handles(&mut self, moment: Moment) -> Result<(), CoreError> {
        if !self.handles_stale {
            return Ok(());
        }
        let wanted = self.handles_wanted();
        let mut taken = BTreeSet::new();
        let mut transaction = Transaction::new();
        let (mut allotted, mut ended) = (Vec::new(), Vec::new());
        for (importer, service) in wanted.iter().filter(|key| !self.facts.handles.contains_key(*key)) {
            let record = self.new_handle(importer, service, &taken)?;
            taken.insert(record.handle);
            transaction = Self::put_handle(transaction, &record);
            allotted.push(record);
        }
        for record in self.facts.handles.values() {
            if !wanted.contains(&(record.importer.clone(), record.service.clone())) {
                let record = HandleRecord { released: Some(moment.unix.as_secs()), ..record.clone() };
                transaction = Self::put_handle(transaction, &record);
                ended.push(record);
            }
        }
        if !transaction.is_empty() {
            self.store.commit(&transaction)?;
        }
        self.handles_stale = false;
        for record in ended {
            self.note_released(&record);
        }
        allotted.into_iter().for_each(|record| self.install_handle(record));
        Ok(())
    }

    /// After a release has been committed.
    pub(super) fn note_released(&mut self, record: &HandleRecord) {
        self.facts.handles.remove(&(record.importer.clone(), record.service.clone()));
        self.in_use.remove(&record.handle);
        self.released.insert(record.handle, record.released.unwrap_or(0));
        self.dirty = true;
    }

    /// Handles whose hold is over may be given out again.
    pub(super) fn forget_released(
        &mut self,
        unix: u64,
        transaction: Transaction,
    ) -> (Transaction, Vec<Handle>) {
        let over: Vec<Handle> = self
            .released
            .iter()
            .filter(|(_, at)| at.saturating_add(HANDLE_HOLD_SECONDS) < unix)
            .map(|(handle, _)| *handle)
            .collect();
        let transaction = over
            .iter()
            .fold(transaction, |transaction, handle| transaction.delete(Table::Handles, handle_key(*handle)));
        (transaction, over)
    }
}
