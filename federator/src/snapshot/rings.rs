//! Derived key rings, kept for the hour: a ring is 27 HMACs, and every snapshot of every sidecar needs a few.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tombolo_overlay::keys::{HandleBinding, Hour, KeyRing, LinkKey};
use tombolo_proto::v1;

/// Rings of handles by what they derive from; emptied when the hour changes, so bounded by the handles in use.
#[derive(Debug, Default)]
pub struct Rings(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    hour: u64,
    rings: HashMap<([u8; 32], HandleBinding), v1::KeyRing>,
}

impl Rings {
    /// The ring of a handle under a link key, as handed out at `unix`.
    pub fn handle(&self, key: &LinkKey, binding: &HandleBinding, unix: Duration) -> v1::KeyRing {
        let hour = Hour::at(unix).0;
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.hour != hour {
            *kept = Kept { hour, rings: HashMap::new() };
        }
        let derive = || KeyRing::derive_now(unix, |hour| key.handle_key(binding, hour)).to_wire();
        kept.rings.entry((*key.as_bytes(), binding.clone())).or_insert_with(derive).clone()
    }
}
