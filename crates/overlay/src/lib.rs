//! The overlay: end-to-end QUIC connections whose packets are routed by connection ID (docs/protocol.md).
//!
//! [`cid`] and [`keys`] are the wire and its admission keys, [`routes`] says where a packet for a connection ID
//! leaves, [`Overlay`] binds a socket and a quinn endpoint that use them, [`grpc`] carries tonic over its streams.

pub mod cid;
pub mod datagram;
pub mod keys;
pub mod lease;
pub mod probe;
pub mod register;
pub mod rendezvous;
