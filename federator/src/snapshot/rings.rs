//! Derived key rings, kept for the hour: a ring is 27 HMACs, and every snapshot of every sidecar needs a few.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tombolo_model::ids::ClusterTag;
use tombolo_overlay::keys::{AcrossTarget, HandleBinding, Hour, KeyRing, LinkKey};
use tombolo_proto::v1;

/// Rings by what they derive from; emptied when the hour changes, so bounded by the handles and endpoints in use.
#[derive(Debug, Default)]
pub struct Rings(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    hour: u64,
    rings: HashMap<([u8; 32], HandleBinding), v1::KeyRing>,
    across: HashMap<([u8; 32], ClusterTag, AcrossTarget), Arc<KeyRing>>,
}

impl Rings {
    /// The ring of a handle under a link key, as handed out at `unix`.
    pub fn handle(&self, key: &LinkKey, binding: &HandleBinding, unix: Duration) -> v1::KeyRing {
        let mut kept = self.of_hour(unix);
        let derive = || KeyRing::derive_now(unix, |hour| key.handle_key(binding, hour)).to_wire();
        kept.rings.entry((*key.as_bytes(), binding.clone())).or_insert_with(derive).clone()
    }

    /// The ring that keys of probers derive from, for a target of cluster `tag`.
    pub fn across(
        &self,
        key: &LinkKey,
        tag: ClusterTag,
        target: AcrossTarget,
        unix: Duration,
    ) -> Arc<KeyRing> {
        let mut kept = self.of_hour(unix);
        let derive = || Arc::new(KeyRing::derive_now(unix, |hour| key.across_key(tag, target, hour)));
        Arc::clone(kept.across.entry((*key.as_bytes(), tag, target)).or_insert_with(derive))
    }

    fn of_hour(&self, unix: Duration) -> MutexGuard<'_, Kept> {
        let hour = Hour::at(unix).0;
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.hour != hour {
            *kept = Kept { hour, ..Kept::default() };
        }
        kept
    }
}
