//! Fetches one bundle: HTTPS, bounded in time and size, no redirects followed (SPIFFE Federation, section 5.2).
//!
//! Whom an answer is believed from is TLS's to say (`tombolo_identity::foreign::tls`); what is in it is read elsewhere.
//! Nothing that a certificate points to (CRLs, issuers, OCSP) is ever fetched.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::Body;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{CertificateError, ClientConfig, OtherError};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tombolo_identity::files;
use tombolo_identity::foreign::MAX_BUNDLE_BYTES;
use tombolo_model::resource::trust_domain_federation::EndpointUrl;

/// Where distributions keep the web's CAs.
const SYSTEM_ROOTS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
/// Mozilla's list has 220 KB.
const MAX_ROOTS_BYTES: u64 = 4 * 1024 * 1024;
/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 4;
/// Headers of an answer.
const MAX_HEADER_BYTES: usize = 16 * 1024;

/// How long an endpoint may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a connection to one address.
    pub connect: Duration,
    /// For everything: three round trips and 64 KB, over the worst of paths.
    pub whole: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { connect: Duration::from_secs(5), whole: Duration::from_secs(20) }
    }
}

/// The CAs of the web, for profile `https_web`; read for each fetch, since they change under a running process.
#[derive(Clone, Debug, Default)]
pub struct WebRoots(Option<PathBuf>);

impl WebRoots {
    /// `None`: where the system keeps them.
    pub fn new(file: Option<PathBuf>) -> Self {
        Self(file)
    }

    pub(super) fn load(&self) -> Result<Vec<CertificateDer<'static>>, FetchError> {
        let system = || SYSTEM_ROOTS.iter().map(Path::new).find(|path| path.exists()).map(Path::to_owned);
        let failed = |reason: String| FetchError::WebRoots { reason };
        let path = self.0.clone().or_else(system).ok_or_else(|| failed("there are none".to_owned()))?;
        let pem = files::read(&path, MAX_ROOTS_BYTES).map_err(|e| failed(e.to_string()))?;
        let roots: Vec<_> = CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok).collect();
        if roots.is_empty() {
            return Err(failed(format!("{} holds no certificate in PEM", path.display())));
        }
        Ok(roots)
    }
}

/// Why nothing was fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error(
        "the web's CAs can't be used ({reason}): install ca-certificates, or name a file with --bundle-client-roots"
    )]
    WebRoots { reason: String },
    #[error(
        "no bundle of trust domain {0} is held, by which the endpoint could prove itself: give one as spec.trustDomainBundle"
    )]
    NoBundle(String),
    #[error("the bundle of trust domain {0} is empty: its endpoint can't prove itself any more")]
    Revoked(String),
    #[error("{host} can't be resolved: {source}")]
    Resolve { host: String, source: io::Error },
    #[error("{address} can't be reached: {source}")]
    Connect { address: SocketAddr, source: io::Error },
    #[error("the endpoint is not believed: {0}")]
    Tls(String),
    #[error("the endpoint did not answer within {0:?}")]
    TimedOut(Duration),
    #[error("the endpoint speaks no HTTP/1.1: {0}")]
    Http(String),
    #[error(
        "the endpoint redirects to {0:?}, which is not followed: give that URL as spec.bundleEndpointURL"
    )]
    Redirect(String),
    #[error("the endpoint answered {0}")]
    Status(StatusCode),
    #[error("the endpoint's answer has more than {MAX_BUNDLE_BYTES} bytes")]
    TooLarge,
    #[error("spec: {0}")]
    Spec(String),
}

impl FetchError {
    /// A metric label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::WebRoots { .. } => "web_roots",
            Self::NoBundle(_) | Self::Revoked(_) => "no_bundle",
            Self::Resolve { .. } => "resolve",
            Self::Connect { .. } => "connect",
            Self::Tls(_) => "tls",
            Self::TimedOut(_) => "timed_out",
            Self::Http(_) => "http",
            Self::Redirect(_) => "redirect",
            Self::Status(_) => "status",
            Self::TooLarge => "too_large",
            Self::Spec(_) => "spec",
        }
    }
}

/// One GET. Dropping it closes the connection.
pub async fn fetch(
    url: &EndpointUrl,
    tls: Arc<ClientConfig>,
    patience: Patience,
) -> Result<Bytes, FetchError> {
    let whole = tokio::time::timeout(patience.whole, attempt(url, tls, patience.connect)).await;
    whole.unwrap_or(Err(FetchError::TimedOut(patience.whole)))
}

async fn attempt(url: &EndpointUrl, tls: Arc<ClientConfig>, patience: Duration) -> Result<Bytes, FetchError> {
    let name = ServerName::try_from(url.host.clone())
        .map_err(|e| FetchError::Spec(format!("bundleEndpointURL: {}: {e}", url.host)))?;
    let stream = connect(url, patience).await?;
    let stream =
        TlsConnector::from(tls).connect(name, stream).await.map_err(|e| FetchError::Tls(reason(&e)))?;
    let http = |e: hyper::Error| FetchError::Http(e.to_string());
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(MAX_HEADER_BYTES)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(http)?;
    let request = Request::get(&url.path)
        .header(header::HOST, &url.authority)
        .header(header::ACCEPT, "application/json")
        .header(header::CONNECTION, "close")
        .header(header::USER_AGENT, concat!("tombolo/", env!("CARGO_PKG_VERSION")))
        .body(Empty::<Bytes>::new())
        .map_err(|e| FetchError::Spec(format!("bundleEndpointURL: {e}")))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(http)?;
        let status = response.status();
        if status.is_redirection() {
            let target = response.headers().get(header::LOCATION).map(|value| value.as_bytes());
            let target = String::from_utf8_lossy(target.unwrap_or_default());
            return Err(FetchError::Redirect(target.chars().take(200).collect()));
        }
        if status != StatusCode::OK {
            return Err(FetchError::Status(status));
        }
        if response.body().size_hint().lower() > MAX_BUNDLE_BYTES as u64 {
            return Err(FetchError::TooLarge);
        }
        let body = Limited::new(response.into_body(), MAX_BUNDLE_BYTES).collect().await;
        body.map(|body| body.to_bytes()).map_err(|error| match error.downcast::<LengthLimitError>() {
            Ok(_) => FetchError::TooLarge,
            Err(error) => FetchError::Http(error.to_string()),
        })
    };
    tokio::pin!(answer);
    tokio::pin!(connection);
    tokio::select! {
        answer = &mut answer => answer,
        // It ends by itself when the answer is whole, and by its own fault before.
        ended = &mut connection => match ended {
            Ok(()) => answer.await,
            Err(error) => Err(http(error)),
        },
    }
}

/// What the verifier said, without the layers around it.
fn reason(error: &io::Error) -> String {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(inner)))) => {
            inner.to_string()
        }
        Some(rustls::Error::InvalidCertificate(CertificateError::Expired)) => {
            "its certificate has expired".to_owned()
        }
        _ => error.to_string(),
    }
}

async fn connect(url: &EndpointUrl, patience: Duration) -> Result<TcpStream, FetchError> {
    let failed = |source| FetchError::Resolve { host: url.host.clone(), source };
    let addresses = tokio::net::lookup_host((url.host.as_str(), url.port)).await.map_err(failed)?;
    let mut last = failed(io::Error::other("it has no address"));
    for address in addresses.take(MAX_ADDRESSES) {
        let connected = tokio::time::timeout(patience, TcpStream::connect(address)).await;
        match connected.unwrap_or_else(|elapsed| Err(elapsed.into())) {
            Ok(stream) => return Ok(stream),
            Err(source) => last = FetchError::Connect { address, source },
        }
    }
    Err(last)
}
