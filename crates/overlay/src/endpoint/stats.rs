//! What an overlay counts.

use std::sync::atomic::AtomicU64;

use crate::attestation::task::RefusalCounts;

/// Counters of one overlay, for metrics.
#[derive(Debug, Default)]
pub struct OverlayCounters {
    pub accepted: AtomicU64,
    pub refused: AtomicU64,
    pub retried: AtomicU64,
    pub handshakes_failed: AtomicU64,
    pub importer_mismatch: AtomicU64,
}

/// A snapshot of what an overlay did.
#[derive(Clone, Copy, Debug, Default)]
pub struct OverlayStats {
    pub open_connections: usize,
    pub accepted: u64,
    pub refused: u64,
    pub retried: u64,
    pub handshakes_failed: u64,
    pub importer_mismatch: u64,
    /// Re-attestations of peers that were believed.
    pub attested: u64,
    pub attestations_refused: RefusalCounts,
    /// Connections that ended after their peer's identity had.
    pub expired_closed: u64,
    /// Connections that were cut because their peer is revoked.
    pub revoked_closed: u64,
    pub no_route: u64,
    pub send_errors: u64,
    pub control_overflow: u64,
    pub part_overflow: u64,
    pub malformed: u64,
}

impl OverlayStats {
    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            open_connections: self.open_connections + other.open_connections,
            accepted: self.accepted + other.accepted,
            refused: self.refused + other.refused,
            retried: self.retried + other.retried,
            handshakes_failed: self.handshakes_failed + other.handshakes_failed,
            importer_mismatch: self.importer_mismatch + other.importer_mismatch,
            attested: self.attested + other.attested,
            attestations_refused: self.attestations_refused.plus(other.attestations_refused),
            expired_closed: self.expired_closed + other.expired_closed,
            revoked_closed: self.revoked_closed + other.revoked_closed,
            no_route: self.no_route + other.no_route,
            send_errors: self.send_errors + other.send_errors,
            control_overflow: self.control_overflow + other.control_overflow,
            part_overflow: self.part_overflow + other.part_overflow,
            malformed: self.malformed + other.malformed,
        }
    }
}
