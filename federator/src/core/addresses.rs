//! Virtual addresses: each service that is known here has its own for as long as it is known, whatever restarts.
//!
//! Kept in the store before anybody is told. One that is released is its service's again when that comes back, and
//! another's after a day at the earliest: connections and caches that still name it must never meet another service. A
//! range that is used up costs new services their address, and nobody else anything ([`AddressFacts::wanting`]).

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use tombolo_model::names::ServiceKey;
use tombolo_model::virtual_ranges::VirtualRanges;

use super::{Core, CoreError, Moment};
use crate::facts::{AddressFacts, AddressRecord, VirtualAddresses};
use crate::names;
use crate::store::{Table, Transaction};

/// As long as an import is served without its peer being heard: whoever still sends to an address means that service.
const ADDRESS_HOLD_SECONDS: u64 = 24 * 3600;

impl Core {
    /// Where addresses come from; before the start. What lies elsewhere is given up: the operator has moved the range.
    pub fn set_virtual_ranges(&mut self, ranges: VirtualRanges) {
        self.facts.addresses = Arc::new(AddressFacts { ranges, ..AddressFacts::default() });
        self.addresses_stale = true;
        self.dirty = true;
    }

    /// Allots what is wanted and releases what is not, in one transaction.
    pub(super) fn allot_addresses(&mut self, moment: Moment) -> Result<(), CoreError> {
        if !self.addresses_stale {
            return Ok(());
        }
        let wanted = names::with_address(&self.facts);
        let ranges = self.facts.addresses.ranges.clone();
        let changed = changes(&self.addresses, &wanted, &ranges, moment.unix.as_secs());
        let transaction = changed
            .iter()
            .fold(Transaction::new(), |transaction, record| transaction.put(key(&record.service), record));
        if !transaction.is_empty() {
            self.store.commit(&transaction)?;
        }
        self.addresses_stale = false;
        for record in changed {
            self.addresses.insert(record.service.clone(), record);
        }
        let facts = facts(&self.addresses, &wanted, ranges);
        if *self.facts.addresses != facts {
            announce(&self.facts.addresses, &facts);
            self.facts.addresses = Arc::new(facts);
            self.dirty = true;
        }
        Ok(())
    }

    /// Services whose hold is over: their addresses may be given out again.
    pub(super) fn forget_addresses(
        &self,
        unix: u64,
        transaction: Transaction,
    ) -> (Transaction, Vec<ServiceKey>) {
        let over = |record: &&AddressRecord| {
            record.released.is_some_and(|at| at.saturating_add(ADDRESS_HOLD_SECONDS) < unix)
        };
        let over: Vec<ServiceKey> =
            self.addresses.values().filter(over).map(|record| record.service.clone()).collect();
        let transaction = over
            .iter()
            .fold(transaction, |transaction, service| transaction.delete(Table::Addresses, key(service)));
        (transaction, over)
    }
}

fn key(service: &ServiceKey) -> String {
    service.to_string()
}

/// The records that differ from those that are kept.
fn changes(
    kept: &BTreeMap<ServiceKey, AddressRecord>,
    wanted: &BTreeSet<ServiceKey>,
    ranges: &VirtualRanges,
    unix: u64,
) -> Vec<AddressRecord> {
    let inside = |record: &AddressRecord| AddressRecord {
        v4: record.v4.filter(|address| ranges.contains((*address).into())),
        v6: record.v6.filter(|address| ranges.contains((*address).into())),
        ..record.clone()
    };
    let addresses = |record: &AddressRecord| {
        VirtualAddresses { v4: record.v4, v6: record.v6 }.all().collect::<Vec<IpAddr>>()
    };
    let mut taken: HashSet<IpAddr> = kept.values().flat_map(|record| addresses(&inside(record))).collect();
    let mut count = (
        taken.iter().filter(|address| address.is_ipv4()).count() as u64,
        taken.iter().filter(|address| address.is_ipv6()).count() as u64,
    );
    let ended = kept.values().filter(|record| !wanted.contains(&record.service)).map(|record| {
        let released = Some(record.released.unwrap_or(unix));
        AddressRecord { released, ..inside(record) }
    });
    let mut records: Vec<AddressRecord> = ended.collect();
    for service in wanted {
        let known = kept.get(service).map(inside);
        let new = || AddressRecord { service: service.clone(), v4: None, v6: None, released: None };
        let mut record = AddressRecord { released: None, ..known.unwrap_or_else(new) };
        // Full ranges are not gone through for each service.
        if record.v4.is_none() && count.0 < ranges.capacity_v4() {
            record.v4 = ranges.draw_v4(service, |address| taken.contains(&address.into()));
            count.0 += u64::from(record.v4.is_some());
        }
        if record.v6.is_none() && count.1 < ranges.capacity_v6() {
            record.v6 = ranges.draw_v6(service, |address| taken.contains(&address.into()));
            count.1 += u64::from(record.v6.is_some());
        }
        taken.extend(addresses(&record));
        records.push(record);
    }
    // One without any address says nothing that would have to be remembered.
    let news = |record: &AddressRecord| match kept.get(&record.service) {
        Some(before) => before != record,
        None => record.v4.is_some() || record.v6.is_some(),
    };
    records.into_iter().filter(news).collect()
}

/// What is published.
fn facts(
    kept: &BTreeMap<ServiceKey, AddressRecord>,
    wanted: &BTreeSet<ServiceKey>,
    ranges: VirtualRanges,
) -> AddressFacts {
    let mut facts = AddressFacts { ranges, ..AddressFacts::default() };
    let lacking = |of: VirtualAddresses| of.v4.is_none() || (facts.ranges.v6().is_some() && of.v6.is_none());
    let mut wanting = BTreeSet::new();
    for service in wanted {
        let record = kept.get(service);
        let of = record.map(|r| VirtualAddresses { v4: r.v4, v6: r.v6 }).unwrap_or_default();
        if lacking(of) {
            wanting.insert(service.clone());
        }
        if of != VirtualAddresses::default() {
            facts.of.insert(service.clone(), of);
        }
    }
    facts.held = kept.values().filter(|record| record.released.is_some()).count();
    facts.wanting = wanting;
    facts
}

/// A range that gets used up, or gets room again, is said once.
fn announce(before: &AddressFacts, now: &AddressFacts) {
    let ranges = &now.ranges;
    match (before.wanting.len(), now.wanting.len()) {
        (0, wanting @ 1..) => tracing::error!(%ranges, wanting, in_use = now.of.len(), held = now.held,
            "the virtual range is used up: new services get no address and their names resolve to nothing; give the federator a larger --virtual-range"),
        (1.., 0) => tracing::info!(%ranges, "every service has a virtual address again"),
        _ => {}
    }
}
