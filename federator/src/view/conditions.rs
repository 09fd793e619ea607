//! Conditions of each kind of object: what holds, why, and what an operator can do about it.
//!
//! Types and reasons of exports and imports are those of the MCS API (KEP-1645); those of policies follow the Gateway
//! API's policy attachment (GEP-713).

pub mod access;
pub mod export;
pub mod federation;
pub mod import;
pub mod joining;
pub mod link;
pub mod policy;
pub mod revocation;
pub mod workload;

use tombolo_model::resource::Condition;

use super::text::message;

/// A condition whose message stays readable.
fn condition(r#type: &str, status: bool, reason: &str, text: impl Into<String>) -> Condition {
    Condition::new(r#type, status, reason, message(text))
}

fn unknown(r#type: &str, reason: &str, text: impl Into<String>) -> Condition {
    Condition::unknown(r#type, reason, message(text))
}
