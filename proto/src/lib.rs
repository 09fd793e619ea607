//! The wire: gRPC services and messages (generated), the stream header, and conversions into the model's newtypes.
//!
//! Wire types stop at the edge: whoever receives a message turns it into its own tables at once, through [`convert`],
//! and rejects bad records one by one with an error that names the field.

pub mod convert;
pub mod flow;
pub mod stream_header;
pub mod token;

/// Generated from `proto/tombolo/v1/*.proto`.
#[allow(clippy::all, clippy::unwrap_used, clippy::expect_used, missing_docs)]
pub mod v1 {
    tonic::include_proto!("tombolo.v1");
}

/// Generated from `proto/spiffe/workload.proto`, which has no package.
#[allow(clippy::all, clippy::unwrap_used, clippy::expect_used, missing_docs)]
pub mod spiffe {
    tonic::include_proto!("_");
}
