//! What passed and what was dropped, per link and per neighbouring hop: one array of atomics per thread, summed when read.
//!
//! A [`Slot`] is given to each link and each neighbour by the control thread, once per name and for the life of the process,
//! so that a removed link's figures stay monotonic. Labels are bounded: what finds no free slot is counted under slot 0.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

/// Links and peer gateways together; 232 bytes each per thread.
const SLOTS: usize = 1024;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident => $label:literal),* $(,)?) => {
        /// Why a packet was dropped.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u8)]
        pub enum Reason { $($(#[$doc])* $name),* }

        impl Reason {
            pub const ALL: [Self; [$(Self::$name),*].len()] = [$(Self::$name),*];

            /// The metric label.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $label),* }
            }
        }
    };
}

reasons! {
    /// Nothing is known yet: no snapshot since the first start.
    Unconfigured => "unconfigured",
    /// Not a packet of the overlay.
    Malformed => "malformed",
    /// A kind of connection ID that gateways do not route (joiners are answered directly).
    Kind => "kind",
    /// A service- or control-kind ID on a packet that is not a connection's first.
    NotInitial => "not_initial",
    /// Nobody holds this block.
    UnknownEndpoint => "unknown_endpoint",
    /// No such handle here, or of another class; outward: not one that this cluster may call.
    UnknownHandle => "unknown_handle",
    /// The MAC is not the target's.
    Mac => "mac",
    /// The endpoint, or this incarnation of it, is no more.
    Gone => "gone",
    /// No endpoint of the handle is healthy and reachable.
    NoEndpoint => "no_endpoint",
    /// More Initials than the handle's bucket allows.
    RateLimited => "rate_limited",
    /// The endpoint registers, and neither this replica nor a sibling has its registration.
    Unregistered => "unregistered",
    /// For a cluster that is not linked.
    NoLink => "no_link",
    /// Outward, from an address that is not an endpoint of this cluster.
    Source => "source",
    /// No gateway of the peer has ever answered.
    NoPath => "no_path",
    /// Larger than the next hop's MTU.
    TooLarge => "too_large",
    /// The kernel's buffer was full.
    WouldBlock => "would_block",
    /// The kernel refused to send.
    SendError => "send_error",
    /// A control datagram that does not decode or verify, or that nobody waits for.
    Control => "control",
    /// A control datagram for the control thread, whose queue was full.
    ControlOverflow => "control_overflow",
}

/// Index of a link's or hop's counters.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Slot(u16);

impl Slot {
    /// What belongs to nobody known.
    pub const UNKNOWN: Self = Self(0);
}

/// What a slot counts.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Name {
    /// Packets that belong to no link or hop.
    Unknown,
    /// A linked cluster.
    Link(String),
    /// A gateway of a peer or a sibling: cluster and name.
    Gateway(String, String),
    /// All own endpoints together.
    Endpoints,
}

const FIGURES: usize = 4 + Reason::ALL.len();

#[derive(Debug)]
struct Row([AtomicU64; FIGURES]);

/// One thread's counters.
#[derive(Debug)]
pub struct Tally(Box<[Row]>);

/// The figures of one slot.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Figures {
    pub packets_in: u64,
    pub bytes_in: u64,
    pub packets_out: u64,
    pub bytes_out: u64,
    pub drops: Vec<(Reason, u64)>,
}

impl Figures {
    pub fn dropped(&self, reason: Reason) -> u64 {
        self.drops.iter().find(|(r, _)| *r == reason).map_or(0, |(_, n)| *n)
    }
    fn is_zero(&self) -> bool {
        self.packets_in == 0 && self.packets_out == 0 && self.drops.is_empty()
    }
}

impl Tally {
    fn new() -> Self {
        Self((0..SLOTS).map(|_| Row(std::array::from_fn(|_| AtomicU64::new(0)))).collect())
    }

    fn add(&self, slot: Slot, figure: usize, by: u64) {
        if let Some(count) = self.0.get(usize::from(slot.0)).and_then(|row| row.0.get(figure)) {
            count.fetch_add(by, Relaxed);
        }
    }
    pub fn received(&self, slot: Slot, packets: u64, bytes: u64) {
        self.add(slot, 0, packets);
        self.add(slot, 1, bytes);
    }
    pub fn sent(&self, slot: Slot, packets: u64, bytes: u64) {
        self.add(slot, 2, packets);
        self.add(slot, 3, bytes);
    }
    pub fn dropped(&self, slot: Slot, reason: Reason, packets: u64) {
        self.add(slot, 4 + reason as usize, packets);
    }
}

/// All threads' counters and the names of the slots.
#[derive(Debug)]
pub struct Counters {
    threads: Vec<Arc<Tally>>,
    slots: Mutex<BTreeMap<Name, Slot>>,
}

impl Counters {
    pub fn new(threads: usize) -> Self {
        let slots = BTreeMap::from([(Name::Unknown, Slot::UNKNOWN), (Name::Endpoints, Slot(1))]);
        Self { threads: (0..threads).map(|_| Arc::new(Tally::new())).collect(), slots: Mutex::new(slots) }
    }

    /// The slot of [`Name::Endpoints`].
    pub const ENDPOINTS: Slot = Slot(1);

    pub fn thread(&self, index: usize) -> Option<Arc<Tally>> {
        self.threads.get(index).cloned()
    }

    /// The slot of a name: the same one for ever.
    pub fn slot(&self, name: Name) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let next = slots.len();
        match slots.get(&name) {
            Some(slot) => *slot,
            None if next < SLOTS => {
                let slot = Slot(u16::try_from(next).unwrap_or(0));
                slots.insert(name, slot);
                slot
            }
            None => Slot::UNKNOWN,
        }
    }

    /// Every slot that counted something, by name.
    pub fn read(&self) -> Vec<(Name, Figures)> {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let read = slots.into_iter().map(|(name, slot)| (name, self.figures(slot)));
        read.filter(|(name, figures)| !figures.is_zero() || matches!(name, Name::Link(_))).collect()
    }

    /// The figures of one name.
    pub fn of(&self, name: &Name) -> Figures {
        let slot = self.slots.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied();
        slot.map(|slot| self.figures(slot)).unwrap_or_default()
    }

    fn figures(&self, slot: Slot) -> Figures {
        let sum = |figure: usize| -> u64 {
            let rows = self.threads.iter().filter_map(|t| t.0.get(usize::from(slot.0)));
            rows.filter_map(|row| row.0.get(figure)).map(|count| count.load(Relaxed)).sum()
        };
        let drops = Reason::ALL.into_iter().map(|reason| (reason, sum(4 + reason as usize)));
        Figures {
            packets_in: sum(0),
            bytes_in: sum(1),
            packets_out: sum(2),
            bytes_out: sum(3),
            drops: drops.filter(|(_, count)| *count > 0).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_summed_and_names_keep_their_slots() {
        let counters = Counters::new(2);
        let west = counters.slot(Name::Link("west".into()));
        assert_eq!(counters.slot(Name::Link("west".into())), west);
        counters.thread(0).unwrap().sent(west, 2, 100);
        counters.thread(1).unwrap().sent(west, 3, 50);
        counters.thread(1).unwrap().dropped(west, Reason::Mac, 7);
        let figures = counters.of(&Name::Link("west".into()));
        assert_eq!((figures.packets_out, figures.bytes_out, figures.dropped(Reason::Mac)), (5, 150, 7));
    }

    #[test]
    fn more_names_than_slots_are_counted_together() {
        let counters = Counters::new(1);
        let slots: Vec<_> = (0..2 * SLOTS).map(|n| counters.slot(Name::Link(n.to_string()))).collect();
        assert_eq!(slots.last(), Some(&Slot::UNKNOWN));
        assert_eq!(counters.slot(Name::Link("0".into())), slots[0]);
    }

    #[test]
    fn every_reason_has_a_label_of_its_own() {
        let labels: std::collections::HashSet<_> = Reason::ALL.iter().map(|r| r.as_str()).collect();
        assert_eq!(labels.len(), Reason::ALL.len());
    }
}
