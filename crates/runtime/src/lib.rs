//! What every role needs to run: owned tasks, clock, settings, telemetry, readiness and drain, the admin endpoint.
//!
//! Nothing here knows what a gateway, federator or sidecar does. A role's `build` binds an [`admin::Admin`], takes a
//! [`readiness::BlockReady`] per dependency, hands a [`drain::Drain`] to each task and ends when the drain is over.

pub mod admin;
pub mod clock;
pub mod dirs;
pub mod drain;
pub mod readiness;
pub mod rt;
pub mod settings;
pub mod signals;
pub mod tasks;
pub mod telemetry;
