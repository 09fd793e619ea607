//! The control plane of one cluster.
//!
//! [`core`] is the one writer of [`facts`] and [`store`] (which of two kinds it is: [`opening`]); [`registry`] says who is there; [`exports`] and [`policies`]
//! read the operators' objects, [`joining`] who may join, [`authorities`] says which CAs end; [`snapshot`], [`records`] and [`view`] turn facts into what members, peers and operators
//! are told, [`names`] says what they resolve to, [`import`] reads what peers tell; [`service`] and [`peers`] carry it over the overlay, [`linking`] makes
//! links; [`token_review`] asks Kubernetes about pods, [`kubernetes`] exports and imports its services; [`role`] binds and runs the whole.

pub mod authorities;
pub mod bundle_endpoint;
pub mod clones;
pub mod core;
pub mod crl;
pub mod exports;
pub mod facts;
pub mod first_contact;
pub mod foreign;
pub mod import;
pub mod joining;
pub mod jwt;
pub mod kubernetes;
pub mod linking;
pub mod metrics;
pub mod names;
mod opening;
pub mod peers;
pub mod policies;
pub mod records;
pub mod refusals;
pub mod registry;
pub mod revocations;
pub mod role;
pub mod rotation;
pub mod service;
pub mod snapshot;
pub mod store;
pub mod token_review;
pub mod view;
mod wiring;
