//! A [`TokenReviewer`] that asks a Kubernetes API server over HTTPS: TLS 1.3, its CA, one request per connection.
//!
//! Plain HTTP on purpose: one POST of one type needs no client library (ADR 12). Who asks at the same time is bounded; the
//! rest waits, for as long as a review may take.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;
use tombolo_runtime::tasks::TaskGroup;

use super::access::{AccessError, Credentials, KubernetesAccess};
use super::{MAX_TOKEN_BYTES, PodIdentity, ReviewError, TokenReviewer, read};

const PATH: &str = "/apis/authentication.k8s.io/v1/tokenreviews";
/// An API server answers in milliseconds; a joiner waits 10 s.
const LONGEST: Duration = Duration::from_secs(5);
/// A rollout asks for some fifty in a second, each a few milliseconds long.
const AT_ONCE: usize = 16;
const MAX_ANSWER_BYTES: usize = 256 * 1024;

/// Asks an API server.
pub struct ApiReviewer {
    access: KubernetesAccess,
    places: Semaphore,
    tasks: TaskGroup,
}

impl ApiReviewer {
    /// Reads the credentials once, so that what is wrong with them shows at the start.
    pub fn new(access: KubernetesAccess, tasks: TaskGroup) -> Result<Self, AccessError> {
        access.read()?;
        Ok(Self { access, places: Semaphore::new(AT_ONCE), tasks })
    }

    async fn ask(&self, token: &str, audience: &str) -> Result<(StatusCode, Bytes), ReviewError> {
        let unavailable = |e: &dyn std::fmt::Display| ReviewError::Unavailable(e.to_string());
        let _place = self.places.acquire().await.map_err(|e| unavailable(&e))?;
        let access = self.access.clone();
        // Small files, but on a disk that may be slow.
        let read = tokio::task::spawn_blocking(move || access.read()).await.map_err(|e| unavailable(&e))?;
        let Credentials { host, port, tls, bearer } = read.map_err(|e| unavailable(&e))?;
        let at = |e: &dyn std::fmt::Display| ReviewError::Unavailable(format!("{host}:{port}: {e}"));
        let stream = TcpStream::connect((host.as_str(), port)).await.map_err(|e| at(&e))?;
        let name = ServerName::try_from(host.clone()).map_err(|e| at(&e))?;
        let stream = TlsConnector::from(Arc::new(tls)).connect(name, stream).await.map_err(|e| at(&e))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| at(&e))?;
        self.tasks.spawn("token review connection", async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to the Kubernetes API server ended badly");
            }
        });
        let body = serde_json::json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
            "spec": { "token": token, "audiences": [audience] },
        });
        let mut request = Request::post(PATH)
            .header(header::HOST, format!("{host}:{port}"))
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json")
            .header(header::CONNECTION, "close");
        if let Some(bearer) = &bearer {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", bearer.as_str()));
        }
        let request = request.body(Full::new(Bytes::from(body.to_string()))).map_err(|e| at(&e))?;
        let answer = sender.send_request(request).await.map_err(|e| at(&e))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES).collect().await.map_err(|e| at(&e))?;
        Ok((status, body.to_bytes()))
    }
}

#[tonic::async_trait]
impl TokenReviewer for ApiReviewer {
    async fn review(&self, token: &str, audience: &str) -> Result<PodIdentity, ReviewError> {
        // Three parts, as every JWT has: what is none bothers nobody else.
        if token.is_empty() || token.len() > MAX_TOKEN_BYTES || token.split('.').count() != 3 {
            return Err(ReviewError::NoToken(token.len()));
        }
        let late = || ReviewError::Unavailable(format!("no answer within {} s", LONGEST.as_secs()));
        let asked = tokio::time::timeout(LONGEST, self.ask(token, audience)).await;
        let (status, body) = asked.map_err(|_| late())??;
        match status {
            StatusCode::OK | StatusCode::CREATED => read(&body, audience),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(ReviewError::NotAllowed(status.to_string()))
            }
            status => Err(ReviewError::Unavailable(format!("it answers {status}"))),
        }
    }
}
