//! Derived keys, cached per known target and hour: one per thread, so nothing is shared or locked.
//!
//! A derivation takes a microsecond, a look-up 20 ns. Only keys of *known* targets are ever asked for, so what strangers
//! send can't fill the cache; it is bounded all the same, and starts over when full.

use std::collections::HashMap;
use std::hash::Hasher;
use std::sync::OnceLock;

use siphasher::sip::SipHasher24;
use tombolo_overlay::keys::{CidKey, Hour};

/// Four live hours of 64,000 targets; 56 bytes each.
const CAPACITY: usize = 256 * 1024;

/// Names a secret and what is derived from it without holding it: equal secrets of two snapshots have equal names, so a
/// new snapshot costs no derivation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct KeyName(u64);

impl KeyName {
    /// `parts` are hashed with their lengths, under a key of this process.
    pub fn of(purpose: &str, parts: &[&[u8]]) -> Self {
        static PROCESS: OnceLock<[u8; 16]> = OnceLock::new();
        let mut hasher = SipHasher24::new_with_key(PROCESS.get_or_init(rand::random));
        for part in std::iter::once(&purpose.as_bytes()).chain(parts) {
            hasher.write_usize(part.len());
            hasher.write(part);
        }
        Self(hasher.finish())
    }

    /// A part of another name.
    pub fn to_bytes(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }
}

/// The cache of one thread.
#[derive(Debug, Default)]
pub struct KeyCache {
    keys: HashMap<(KeyName, u32, Hour), CidKey>,
    newest: Option<Hour>,
}

impl KeyCache {
    /// The key of `target` under the named secret in `hour`. `now` is the present hour: keys that no receiver accepts any
    /// more are dropped when it changes.
    pub fn get(
        &mut self,
        name: KeyName,
        target: u32,
        hour: Hour,
        now: Hour,
        derive: impl FnOnce() -> CidKey,
    ) -> &CidKey {
        if self.newest != Some(now) {
            self.newest = Some(now);
            self.keys.retain(|(_, _, hour), _| *hour >= now.ring_start() && hour.0 <= now.0 + 1);
        }
        let id = (name, target, hour);
        if self.keys.len() >= CAPACITY && !self.keys.contains_key(&id) {
            self.keys.clear();
        }
        self.keys.entry(id).or_insert_with(derive)
    }

    pub fn len(&self) -> usize {
        self.keys.len()
    }
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_derived_once_and_forgotten_when_its_hour_is_over() {
        let mut cache = KeyCache::default();
        let name = KeyName::of("test", &[b"secret"]);
        assert_eq!(name, KeyName::of("test", &[b"secret"]));
        assert_ne!(name, KeyName::of("tes", &[b"tsecret"]));
        let mut derived = 0;
        for _ in 0..3 {
            cache.get(name, 7, Hour(100), Hour(100), || {
                derived += 1;
                CidKey::from_bytes([1; 16])
            });
        }
        assert_eq!((derived, cache.len()), (1, 1));
        cache.get(name, 8, Hour(103), Hour(103), || CidKey::from_bytes([2; 16]));
        assert_eq!(cache.len(), 1);
    }
}
