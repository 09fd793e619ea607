//! One replica of a cluster's packet forwarders: reads where a packet's receiver is from its connection ID, and sends it on.
//!
//! ```text
//!  federator --snapshots--> client --tables--> control thread --view--> N workers
//!                                                    ^ probes, registrations, GONE
//!  peers  <==== border socket (7440/udp) ====> decide <==== inner socket (7441/udp) ====> own endpoints
//! ```
//! [`tables`] is the configuration, parsed once; [`decide`] is the pure choice per packet over a [`view`] of it;
//! [`worker`] moves packets; [`control`] is everything that is not forwarding: probes of peers and siblings,
//! registrations, hints. [`dataplane`] owns the sockets and threads, [`role`] the process. There is no state per connection.

pub mod bucket;
pub mod client;
pub mod config;
pub mod control;
pub mod counters;
pub mod dataplane;
pub mod decide;
#[cfg(test)]
mod fixture;
pub mod forward;
pub mod group;
pub mod keys;
pub mod looped;
pub mod metrics;
pub mod port;
pub mod recent;
pub mod role;
mod sys;
pub mod tables;
pub mod view;
pub mod worker;
