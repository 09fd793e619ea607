//! Registration of endpoints without a reachable address (VMs, whole clusters behind NAT): they tell every gateway
//! replica where they are (protocol.md section 3). Pure: time is passed in, the owner sends and receives.
//!
//! [`ClientState`] is one endpoint's registration at one replica. [`Registrations`] is a replica's bounded table.
//! [`Siblings`] is what the other replicas of its cluster have announced, so that a packet can be handed over.
//!
//! Invariants: an address counts only after it echoed a challenge that is bound to it, so nobody can lead an endpoint's
//! packets to a victim; a counter never goes back, so a captured REGISTER can't restore an old address; no state is kept
//! for who has not echoed. Registrations end 45 s after the last REGISTER, three intervals.

mod client;
mod siblings;
mod table;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub use client::ClientState;
pub use siblings::Siblings;
pub use table::{Refusal, Refusals, Registration, Registrations, Side, Verdict};

/// NAT mappings for UDP live 30 s and longer (RFC 4787 REQ-5 asks 2 min): half of that.
pub const REGISTER_EVERY: Duration = Duration::from_secs(15);
/// Three intervals: two lost REGISTERs in a row (each retried several times) do not matter.
pub const HELD: Duration = Duration::from_secs(45);
