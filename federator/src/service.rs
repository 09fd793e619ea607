//! The gRPC services of a federator, over the overlay and the admin socket. Thin: they check who calls, hand the request
//! to the core, and turn facts into streams.

pub mod admin;
mod audit;
pub mod config;
pub mod federation;
pub mod join;
pub mod linking;
pub mod names;
mod pace;
pub mod renewal;
pub mod workload;

use std::sync::Arc;

use tombolo_identity::PeerIdentity;
use tombolo_model::names::ClusterName;
use tombolo_overlay::grpc::PeerInfo;
use tonic::{Request, Status};

/// Who calls, of which cluster, on which connection.
struct Caller {
    identity: Arc<PeerIdentity>,
    connection: usize,
}

/// The authenticated caller of a control connection. The handle it dialled with and its certificate name one cluster,
/// which the overlay has checked.
fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let info = request.extensions().get::<PeerInfo>();
    let identity = info.and_then(PeerInfo::identity);
    match (info, identity) {
        (Some(info), _) if info.expired() => {
            Err(Status::unauthenticated("your identity has ended on this connection: dial anew"))
        }
        (Some(info), Some(identity)) => Ok(Caller { identity, connection: info.connection }),
        _ => Err(Status::unauthenticated("this call needs an authenticated overlay connection")),
    }
}

/// The same, for members of the own cluster only.
fn member<T>(request: &Request<T>, own: &ClusterName) -> Result<Caller, Status> {
    let caller = caller(request)?;
    if caller.identity.cluster != *own {
        let text = format!("{} is not a member of cluster {own}", caller.identity.spiffe_id);
        return Err(Status::permission_denied(text));
    }
    Ok(caller)
}
