//! The bundle endpoint: foreign trust domains fetch this one's bundle over HTTPS (SPIFFE Federation, section 5).
//!
//! Off unless the operator gives an address. Anybody may ask: the document holds public keys only. One task follows what is
//! trusted and gives the document its sequence number, one accepts connections, bounded in number and time ([`serve`]).
//! Profile `https_spiffe` shows the federator's SVID, `https_web` the operator's files ([`web`]).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tombolo_identity::bundle_document::{document, keys};
use tombolo_identity::{SvidHandle, tls};
use tombolo_runtime::tasks::TaskGroup;

use crate::core::CoreHandle;
use crate::jwt;

mod serve;
mod web;

/// What is trusted changes by the month; facts do 300 times a second.
const PACE: Duration = Duration::from_secs(1);
/// The SVID's bundle may have changed without the facts.
const LOOK: Duration = Duration::from_secs(10);

/// Where the bundle is served, and with which certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleEndpointConfig {
    pub listen: SocketAddr,
    /// Profile `https_web`; `None`: `https_spiffe`, with the federator's own SVID.
    pub web: Option<WebCertificate>,
}

/// The operator's certificate files, PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebCertificate {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Why there is no endpoint.
#[derive(Debug, thiserror::Error)]
pub enum BundleEndpointError {
    #[error("--bundle-endpoint {listen}: cannot listen ({source}): choose another address")]
    Listen { listen: SocketAddr, source: std::io::Error },
    #[error(
        "--bundle-endpoint-certificate {certificate}: {reason}: give a PEM chain, leaf first, and its key",
        certificate = certificate.display()
    )]
    Certificate { certificate: PathBuf, reason: String },
    #[error("the bundle endpoint's TLS configuration can't be made: {0}")]
    Tls(#[from] rustls::Error),
}

/// The document, once there is one; clones share it.
type Published = Arc<ArcSwapOption<Bytes>>;

/// A bound endpoint.
pub struct BundleEndpoint {
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    web: Option<web::WebResolver>,
}

impl BundleEndpoint {
    pub async fn bind(config: &BundleEndpointConfig, svid: &SvidHandle) -> Result<Self, BundleEndpointError> {
        let BundleEndpointConfig { listen, web } = config;
        let web = web.as_ref().map(web::WebResolver::load).transpose()?;
        let tls = match &web {
            Some(resolver) => tls::https_server_config_with(Arc::new(resolver.clone()))?,
            None => tls::https_server_config(svid)?,
        };
        let failed = |source| BundleEndpointError::Listen { listen: *listen, source };
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let profile = if web.is_some() { "https_web" } else { "https_spiffe" };
        tracing::info!(listen = ?listener.local_addr().ok(), profile, "bundle endpoint bound");
        Ok(Self { listener, tls, web })
    }

    /// Serves until the group ends.
    pub fn spawn(self, core: &CoreHandle, svid: &SvidHandle, tasks: &TaskGroup) {
        let Self { listener, tls, web } = self;
        let published = Published::default();
        tasks.spawn("bundle document", follow(core.clone(), svid.clone(), Arc::clone(&published)));
        if let Some(resolver) = web {
            tasks.spawn("bundle endpoint's certificate", resolver.follow());
        }
        tasks.spawn("bundle endpoint", serve::accept(listener, tls, published, tasks.clone()));
    }
}

/// Keeps the document up to what is trusted. Until the core is gone.
async fn follow(core: CoreHandle, svid: SvidHandle, published: Published) {
    let mut facts = core.watch();
    let mut last = String::new();
    loop {
        let current = facts.borrow_and_update().clone();
        let identity = svid.load();
        let bundle = identity.bundles.get(&current.cluster.trust_domain);
        let roots = bundle.map(|bundle| bundle.roots.as_slice()).unwrap_or_default();
        match keys(roots, jwt::believed(&current)) {
            Ok(keys) => {
                let content = hex::encode(Sha256::digest(serde_json::to_vec(&keys).unwrap_or_default()));
                if content != last {
                    let asked = content.clone();
                    let numbered =
                        core.attempt(move |core, moment| core.bundle_sequence(&asked, moment.unix.as_secs()));
                    match numbered.await {
                        Ok(sequence) => {
                            published.store(Some(Arc::new(document(&keys, sequence).into())));
                            last = content;
                        }
                        Err(error) => {
                            tracing::warn!(%error, "the bundle can't be numbered; the last one is served")
                        }
                    }
                }
            }
            Err(error) => tracing::error!(%error, "the bundle can't be published; the last one is served"),
        }
        tokio::time::sleep(PACE).await;
        if let Ok(Err(_)) = tokio::time::timeout(LOOK, facts.changed()).await {
            return;
        }
    }
}
