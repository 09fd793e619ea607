//! The control plane of one cluster.
pub mod exports;
pub mod facts;
pub mod policies;
pub mod registry;
pub mod store;
pub mod view;
