//! `tombolo demo`: two clusters and a machine outside them, as processes of this binary on loopback addresses.
//!
//! [`plan`] says which processes run with which arguments and is pure; [`supervisor`] runs them and ends them;
//! [`stage`] walks the plan; [`scenario`] breaks things on purpose and measures. Nothing here takes a shortcut: what the
//! plan lists can be typed by hand.

pub mod app;
pub mod expect;
pub mod guide;
pub mod http;
pub mod load;
pub mod plan;
pub mod progress;
pub mod scenario;
pub mod stage;
pub mod supervisor;
pub mod workspace;
