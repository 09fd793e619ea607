//! The control plane of one cluster.
pub mod facts;
pub mod registry;
pub mod store;
