//! The name server of federators and sidecars: the multi-cluster names of this cluster, everything else forwarded.
//!
//! [`table`] is what names resolve to, a snapshot swapped whole; [`answer`] turns a question and a table into an answer by
//! the MCS DNS specification (KEP-1645, schema 1.0.0) and [`message`] reads and writes packets: all pure. [`cache`] and
//! [`upstream`] decide about forwarding, pure too, with the time passed in. [`exchange`] talks to upstream resolvers,
//! [`forward`] bounds and joins what is forwarded, [`server`] owns the sockets and a thread of its own, so that a flood
//! of questions costs the byte path nothing but that thread. [`host`] sets a machine's resolver up and back.
//!
//! DNS messages are hickory-proto's; the server and the forwarder are our own, because their bounds are what matters here.

pub mod answer;
pub mod cache;
pub mod exchange;
pub mod forward;
pub mod host;
pub mod message;
pub mod metrics;
pub mod server;
pub mod table;
pub mod upstream;
