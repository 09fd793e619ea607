//! The control plane of one cluster.
pub mod store;
