//! Why a federator does not start, or ends.

use std::io;
use std::path::PathBuf;

use tombolo_identity::authority::AuthorityError;
use tombolo_identity::issuer::IssueError;
use tombolo_identity::tls::SvidError;
use tombolo_model::names::ClusterName;
use tombolo_names::server::NamesError;
use tombolo_overlay::BindError;
use tombolo_runtime::admin::AdminError;
use tombolo_runtime::dirs::DirsError;

use crate::bundle_endpoint::BundleEndpointError;
use crate::core::CoreError;
use crate::core::boot::BootError;
use crate::inject::InjectError;
use crate::store::StoreError;
use crate::store::etcd::OpenError;
use crate::token_review::access::AccessError;

/// Why a federator did not start.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error(transparent)]
    Dir(#[from] DirsError),
    #[error("{source}: make them with `tombolo trust cluster {cluster} --out {dir}`, or name them with --trust-dir", dir = dir.display())]
    Trust { cluster: ClusterName, dir: PathBuf, source: AuthorityError },
    #[error("{dir} holds the keys of cluster {found}, not of {expected}: give --trust-dir or --cluster accordingly", dir = dir.display())]
    OtherCluster { dir: PathBuf, found: ClusterName, expected: ClusterName },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Etcd(#[from] OpenError),
    #[error(
        "{file} holds this cluster's store, and etcd is empty: begin there with what it holds by --etcd-import, or move it away",
        file = file.display()
    )]
    TwoStores { file: PathBuf },
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Core(#[from] CoreError),
    #[error(transparent)]
    Issue(#[from] IssueError),
    #[error("the federator's own SVID can't be used: {0}")]
    Svid(#[from] SvidError),
    #[error("the TLS configuration can't be made: {0}")]
    Tls(#[from] rustls::Error),
    #[error(transparent)]
    Overlay(#[from] BindError),
    #[error("the core thread can't be started: {0}")]
    Thread(io::Error),
    #[error("the operators' socket {path} can't be used ({source}): choose another with --socket", path = path.display())]
    Socket { path: PathBuf, source: io::Error },
    #[error("another federator answers on {path}: end it, or choose another --socket", path = path.display())]
    SocketInUse { path: PathBuf },
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error(transparent)]
    BundleEndpoint(#[from] BundleEndpointError),
    #[error("--kubernetes: {0}")]
    Kubernetes(#[from] AccessError),
    #[error(transparent)]
    Inject(#[from] InjectError),
    #[error(transparent)]
    Names(#[from] NamesError),
}

/// Why a running federator ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error("names can't be served: {0}")]
    Names(io::Error),
    #[error("{owner} has taken over this cluster: start this federator again, and it stands by")]
    Replaced { owner: String },
}
