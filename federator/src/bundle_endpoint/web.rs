//! The operator's certificate, read again when its file changes: whoever renews it (an ACME client) need not know us. A pair
//! that does not fit leaves the last one.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tombolo_identity::{files, tls};

use super::{BundleEndpointError, WebCertificate};

const LOOK: Duration = Duration::from_secs(30);
/// A chain of four with 4096-bit keys has 10 KB.
const MAX_FILE_BYTES: u64 = 256 * 1024;

/// Clones share the certificate.
#[derive(Clone, Debug)]
pub(super) struct WebResolver {
    paths: Arc<WebCertificate>,
    certified: Arc<ArcSwap<CertifiedKey>>,
}

impl ResolvesServerCert for WebResolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.certified.load_full())
    }
}

impl WebResolver {
    pub fn load(paths: &WebCertificate) -> Result<Self, BundleEndpointError> {
        let failed = |reason| {
            let certificate = paths.certificate.clone();
            BundleEndpointError::Certificate { certificate, reason }
        };
        let certified = read(paths).map_err(failed)?;
        Ok(Self { paths: Arc::new(paths.clone()), certified: Arc::new(ArcSwap::from_pointee(certified)) })
    }

    /// For ever.
    pub async fn follow(self) {
        let mut seen = self.changed_at();
        loop {
            tokio::time::sleep(LOOK).await;
            let now = self.changed_at();
            if now == seen {
                continue;
            }
            match read(&self.paths) {
                Ok(certified) => {
                    self.certified.store(Arc::new(certified));
                    seen = now;
                    tracing::info!("the bundle endpoint has a new certificate");
                }
                // Half written: looked at again.
                Err(reason) => tracing::warn!(reason, "the bundle endpoint's new certificate can't be used"),
            }
        }
    }

    fn changed_at(&self) -> [Option<SystemTime>; 2] {
        [&self.paths.certificate, &self.paths.key]
            .map(|path| std::fs::metadata(path).and_then(|found| found.modified()).ok())
    }
}

fn read(paths: &WebCertificate) -> Result<CertifiedKey, String> {
    let certificate = files::read(&paths.certificate, MAX_FILE_BYTES).map_err(|e| e.to_string())?;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&certificate)
        .collect::<Result<_, _>>()
        .map_err(|e| format!("not PEM: {e:?}"))?;
    if chain.is_empty() {
        return Err("no certificate in it".to_owned());
    }
    let key = zeroize::Zeroizing::new(files::read(&paths.key, MAX_FILE_BYTES).map_err(|e| e.to_string())?);
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|e| format!("the key: {e:?}"))?;
    let certified = CertifiedKey::from_der(chain, key, &tls::provider()).map_err(|e| e.to_string())?;
    Ok(certified)
}
