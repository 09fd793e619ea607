//! The overlay: end-to-end QUIC connections whose packets are routed by connection ID (docs/protocol.md).
//!
//! [`cid`] and [`keys`] are the wire and its admission keys, [`datagram`], [`probe`] and [`register`] the small keyed
//! datagrams beside QUIC, [`routes`] says where a packet for a connection ID leaves, `across` which ways there are past the own gateways, [`Overlay`] binds a socket and a
//! quinn endpoint that use them, [`attestation`] renews identities on live connections, [`revoking`] cuts the revoked, [`congestion`] is the model-based controller, [`grpc`] carries tonic over streams.

mod across;
mod admission;
pub mod attestation;
pub mod cid;
pub mod congestion;
mod connection;
mod control_stream;
pub mod datagram;
mod dial;
mod endpoint;
mod generator;
pub mod grpc;
mod hops;
pub mod keys;
mod kick;
mod learned;
pub mod lease;
mod liveness;
pub mod member;
mod parts;
pub mod probe;
pub mod register;
pub mod rendezvous;
pub mod reuseport;
pub mod revoking;
pub mod routes;
mod socket;
pub mod socket_option;
mod transport;

pub use across::{Across, Flat, FlatEndpoint};
pub use admission::{Inbound, InboundHandle, Refusal};
pub use attestation::task::RefusalCounts;
pub use connection::{HandleClass, PeerConnection, Pinned, Stall, close_code};
pub use dial::{DIAL_TIMEOUT, DialError, DialTarget, renewal_holder, renewal_nonce};
pub use endpoint::{BindError, FirstContactTls, Overlay, OverlayConfig, OverlayStats, ServerTls};
pub use hops::{DRAINING, HopReport};
pub use parts::{MAX_PARTS, Part};
pub use routes::{GatewayHop, Routes};
pub use transport::{Limits, UnusableTls};
