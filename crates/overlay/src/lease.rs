//! The lease of a block of endpoint ids, and its state on disk (protocol.md section 1, "Allotment").
//!
//! [`EndpointLease`] is what a cluster's CA signed: this SPIFFE ID holds this block until then; its derived keys come
//! with it, unsigned, and are renewed with every snapshot. [`LeaseFile`] keeps it in a directory, so that a restart needs
//! no federator:
//!
//! ```text
//!  <dir>/lease.json          the lease with its keys
//!  <dir>/incarnations.json   which of the block's 16 incarnations were used when
//!  <dir>/lease.lock          held while either is written: two processes never burn one incarnation
//! ```
//! Invariants: files are written whole (temporary file, fsync, rename, fsync of the directory) with mode 0600; an incarnation
//! is on the disk before it is returned, so no two starts share one; a file that is torn or not ours is an error that says
//! what to do, never a reason to start over by itself, because that could give out an endpoint id again.

mod file;
#[cfg(test)]
mod tests;

use std::time::Duration;

use tombolo_model::ids::{Block, ClusterTag};
use tombolo_model::names::ClusterName;
use tombolo_proto::convert::{self, FieldError};
use tombolo_proto::v1;

use crate::keys::{CidKey, KeyRing};

pub use file::{LeaseError, LeaseFile, RELEASED_AFTER};

/// SPIFFE IDs are at most 2048 bytes (SPIFFE-ID section 2.3).
const MAX_SPIFFE_ID: usize = 2048;
/// ECDSA P-384 in DER is 104 bytes; RSA-4096 is 512.
const MAX_SIGNATURE: usize = 512;
/// Separates these signatures from everything else that the CA key signs.
const SIGNED_LABEL: &[u8] = b"tombolo endpoint lease 1";

/// A block of 16 endpoint ids, leased to one SPIFFE ID.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointLease {
    pub cluster: ClusterName,
    pub tag: ClusterTag,
    pub block: Block,
    pub spiffe_id: String,
    /// Unix seconds.
    pub not_after: u64,
    /// By the cluster's CA over [`EndpointLease::signed_bytes`].
    pub signature: Vec<u8>,
    /// Of the block, for the hours ahead; not signed.
    pub keys: KeyRing,
    /// Of a machine: what it comes back by when `keys` have run out; not signed.
    pub renewal_key: Option<CidKey>,
}

impl EndpointLease {
    /// What the CA signs: a label, then every field with its length in front, so that no two leases encode alike.
    pub fn signed_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(128);
        let mut part = |bytes: &[u8]| {
            out.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
            out.extend_from_slice(bytes);
        };
        part(SIGNED_LABEL);
        part(self.cluster.as_str().as_bytes());
        part(&self.tag.to_bytes());
        part(&self.block.value().to_be_bytes());
        part(self.spiffe_id.as_bytes());
        part(&self.not_after.to_be_bytes());
        out
    }

    pub fn is_valid_at(&self, unix_seconds: u64) -> bool {
        unix_seconds < self.not_after
    }

    pub fn to_wire(&self) -> v1::EndpointLease {
        v1::EndpointLease {
            cluster: self.cluster.to_string(),
            tag: self.tag.value(),
            block: self.block.value(),
            spiffe_id: self.spiffe_id.clone(),
            not_after_unix: i64::try_from(self.not_after).unwrap_or(i64::MAX),
            signature: self.signature.clone(),
            keys: Some(self.keys.to_wire()),
            renewal_key: self.renewal_key.iter().flat_map(|key| *key.as_bytes()).collect(),
        }
    }

    /// What IDs are made with at this time: the keys of these hours, or, once they have run out, the renewal key.
    pub fn keys_at(&self, since_unix_epoch: Duration) -> KeyRing {
        match &self.renewal_key {
            Some(key) if self.keys.current(since_unix_epoch).is_none() => {
                KeyRing::constant(since_unix_epoch, key)
            }
            _ => self.keys.clone(),
        }
    }

    /// Checks every field but not the signature.
    pub fn from_wire(wire: &v1::EndpointLease) -> Result<Self, FieldError> {
        if wire.spiffe_id.len() > MAX_SPIFFE_ID || !wire.spiffe_id.starts_with("spiffe://") {
            return Err(FieldError::new("lease.spiffe_id", &wire.spiffe_id, "a SPIFFE ID"));
        }
        if wire.signature.len() > MAX_SIGNATURE {
            let bytes = format!("{} bytes", wire.signature.len());
            return Err(FieldError::new("lease.signature", bytes, format!("at most {MAX_SIGNATURE} bytes")));
        }
        let not_after = u64::try_from(wire.not_after_unix)
            .map_err(|_| FieldError::new("lease.not_after_unix", wire.not_after_unix, "a time since 1970"))?;
        Ok(Self {
            cluster: convert::parse("lease.cluster", &wire.cluster)?,
            tag: convert::tag("lease.tag", wire.tag)?,
            block: convert::block("lease.block", wire.block)?,
            spiffe_id: wire.spiffe_id.clone(),
            not_after,
            signature: wire.signature.clone(),
            keys: KeyRing::from_wire(wire.keys.as_ref().unwrap_or(&v1::KeyRing::default()))?,
            renewal_key: match wire.renewal_key.as_slice() {
                [] => None,
                key => Some(CidKey::from_bytes(convert::bytes("lease.renewal_key", key)?)),
            },
        })
    }
}
