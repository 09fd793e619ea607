//! What every role needs to run: owned tasks, clock, settings, telemetry, readiness and drain, the admin endpoint.

pub mod clock;
pub mod tasks;
