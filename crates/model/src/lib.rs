//! The pure core of Tombolo: names, resources, exports, merging, failover, sync, allotment, load balancing.
//!
//! Nothing here performs IO, spawns, or reads a clock: decisions are functions of state, event and a time that is
//! passed in, so that a seeded simulation of a hundred federators fits into one test.

pub mod ids;
pub mod names;
