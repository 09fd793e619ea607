//! What every scenario test and the benchmark stand on: network namespaces, processes inside them, and an emulated
//! wide-area link between them.
//!
//! Everything made here is owned by a value: dropping a [`netns::Namespace`] removes it, dropping a
//! [`process::Process`] ends exactly that process group, dropping a [`link::Link`] takes its two devices away. What a
//! killed test run could not drop is reaped by the next run (see [`netns::reap_stale`]).
//!
//! A test that needs root or namespaces opens with [`capability::require_netns`]; where they are missing the test is
//! listed as skipped and counted, never silently passed.

pub mod balancer;
pub mod capability;
pub mod captured;
pub mod cases;
pub mod datagrams;
pub mod hostile;
pub mod kube;
pub mod legacy;
pub mod link;
pub mod machine;
pub mod mesh;
pub mod nat;
pub mod netns;
pub mod pods;
pub mod postgres;
pub mod process;
pub mod requests;
pub mod resolver;
pub mod scenario;
pub mod spiffe_probe;
pub mod spire;
pub mod stolen;
pub mod systemd;
pub mod testbed;
pub mod times;
pub mod token_review;
pub mod traffic;
pub mod usage;
pub mod wire;
