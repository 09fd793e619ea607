//! A soft, losable memory of who lately sent to which endpoint, so that a GONE hint finds those whom it concerns.
//!
//! Fixed size, no allocation, shared by all threads: the slot of a pair is its hash, and a newer pair overwrites. Losing an entry, or
//! reading a torn one, costs a hint, and hints are checked by whoever gets them. This is not state per connection:
//! nothing is forwarded by it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tombolo_model::ids::{Block, ClusterTag, EndpointId};

use crate::view::Who;

/// 64 KB; pairs of endpoints that talk at this moment.
const SLOTS: usize = 4096;
const USED: u64 = 1 << 63;
const PEER: u64 = 1 << 62;

/// Who may be told.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Listener {
    Endpoint(Block),
    Peer(ClusterTag),
}

impl Listener {
    pub fn of(who: Who) -> Option<Self> {
        match who {
            Who::Endpoint { block, .. } => Some(Self::Endpoint(block)),
            Who::Peer(tag) => Some(Self::Peer(tag)),
            // A foreign one is told when it sends again: with open streams it does every 20 s.
            Who::Foreign { .. } | Who::Neighbour | Who::Sibling | Who::Stranger => None,
        }
    }
    fn bits(self) -> u64 {
        match self {
            Self::Endpoint(block) => USED | u64::from(block.value()),
            Self::Peer(tag) => USED | PEER | u64::from(tag.value()),
        }
    }
    fn from_bits(bits: u64) -> Option<Self> {
        let value = u32::try_from(bits & u64::from(u32::MAX)).ok()?;
        match bits & (USED | PEER) {
            USED => Block::new(value).map(Self::Endpoint),
            flags if flags == USED | PEER => ClusterTag::new(value).map(Self::Peer),
            _ => None,
        }
    }
}

/// The memory.
#[derive(Debug)]
pub struct Recent(Box<[(AtomicU64, AtomicU64)]>);

impl Default for Recent {
    fn default() -> Self {
        Self((0..SLOTS).map(|_| (AtomicU64::new(0), AtomicU64::new(0))).collect())
    }
}

impl Recent {
    /// `listener` sends to this endpoint.
    pub fn note(&self, tag: ClusterTag, endpoint: EndpointId, listener: Listener) {
        let target = (u64::from(tag.value()) << 32) | u64::from(endpoint.value());
        let bits = listener.bits();
        let Some((about, who)) = self.0.get(place(target, bits)) else { return };
        // Reading first keeps the cache line shared while nothing changes.
        if about.load(Relaxed) != target || who.load(Relaxed) != bits {
            about.store(target, Relaxed);
            who.store(bits, Relaxed);
        }
    }

    /// Everybody who lately sent to an endpoint that `matches`, with that endpoint; each pair once.
    pub fn listeners(
        &self,
        tag: ClusterTag,
        matches: impl Fn(EndpointId) -> bool,
    ) -> Vec<(EndpointId, Listener)> {
        let mut found = Vec::new();
        for (about, who) in &self.0 {
            let target = about.load(Relaxed);
            let low = u32::try_from(target & u64::from(u32::MAX)).unwrap_or(0);
            let endpoint = EndpointId::from_u32(low);
            if target >> 32 == u64::from(tag.value())
                && matches(endpoint)
                && let Some(listener) = Listener::from_bits(who.load(Relaxed))
                && !found.contains(&(endpoint, listener))
            {
                found.push((endpoint, listener));
            }
        }
        found
    }
}

/// Finalizer of splitmix64: two multiplications are enough to spread what nobody gains by colliding.
fn place(target: u64, bits: u64) -> usize {
    let mut x = target ^ bits.rotate_left(17);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    usize::try_from((x ^ (x >> 31)) % SLOTS as u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_who_sent_to_an_endpoint_are_found_and_nobody_else() {
        let recent = Recent::default();
        let tag = |n| ClusterTag::new(n).unwrap();
        let (web, db) = (EndpointId::from_u32(0x71), EndpointId::from_u32(0x80));
        let (a, west) = (Listener::Endpoint(Block::new(9).unwrap()), Listener::Peer(tag(3)));
        recent.note(tag(2), web, a);
        recent.note(tag(2), web, west);
        recent.note(tag(2), db, Listener::Endpoint(Block::new(10).unwrap()));
        let mut found = recent.listeners(tag(2), |e| e == web);
        found.sort_by_key(|(_, l)| l.bits());
        assert_eq!(found, [(web, a), (web, west)]);
        assert!(recent.listeners(tag(1), |_| true).is_empty());
    }
}
