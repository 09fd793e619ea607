//! The pure core of Tombolo: names, resources, multi-cluster services, sync, failover, access, load balancing, status,
//! audit.
//!
//! Nothing here performs IO, spawns, or reads a clock: decisions are functions of state, event and a time that is
//! passed in, so that a seeded simulation of a hundred federators fits into one test.

pub mod access;
pub mod audit;
pub mod balance;
pub mod expiry;
pub mod failover;
pub mod ids;
pub mod mcs;
pub mod names;
pub mod protocol;
pub mod ranges;
pub mod resource;
pub mod status;
pub mod sync;
pub mod virtual_ranges;
