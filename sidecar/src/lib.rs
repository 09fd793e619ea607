//! The data plane of one workload: takes the application's plain traffic, carries it end to end encrypted.
//!
//! ```text
//!  application --TCP--> outbound --> failover --> pool ==overlay==> peer's inbound --TCP--> application
//! ```
//! [`role`] builds and runs a sidecar from a [`config`]; [`client`] keeps the configuration coming; [`tables`] is that
//! configuration, parsed once; [`access`] says who may open streams here; [`copy`] is the byte path, [`udp`] that of
//! datagrams. [`capture`] takes what applications connect to without knowing of the mesh; [`shared`] is many sidecars in one
//! process; [`workload_api`] hands the application its own identity.

pub mod access;
pub mod agentless;
pub mod capture;
pub mod carry;
pub mod client;
pub mod codes;
pub mod config;
pub mod copy;
mod data_path;
pub mod failover;
pub mod header;
pub mod health;
pub mod inbound;
pub mod listening;
pub mod metrics;
pub mod names;
pub mod outbound;
pub mod pool;
pub mod provided;
pub mod role;
pub mod shared;
pub mod tables;
pub mod udp;
pub mod workload_api;
