//! HTTPS for strangers: so many connections, each for so long, one document.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tombolo_runtime::tasks::TaskGroup;

use super::Published;

/// Foreign trust domains ask every five minutes: a few hundred of them are one at a time.
const MAX_CONNECTIONS: usize = 64;
/// Handshake and request of an honest reader are two round trips.
const LONGEST: Duration = Duration::from_secs(15);
/// After accept fails for want of descriptors: time for others to close some.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Until the group ends.
pub(super) async fn accept(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    published: Published,
    tasks: TaskGroup,
) {
    let acceptor = TlsAcceptor::from(tls);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // Never closed; further connections wait in the kernel.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, from)) => {
                let (acceptor, published) = (acceptor.clone(), Arc::clone(&published));
                tasks.spawn("bundle endpoint connection", async move {
                    let _place = place;
                    match tokio::time::timeout(LONGEST, serve(stream, acceptor, published)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => tracing::debug!(%from, error, "a bundle reader got nothing"),
                        Err(_) => tracing::debug!(%from, "a bundle reader took too long"),
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "bundle endpoint: accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, acceptor: TlsAcceptor, published: Published) -> Result<(), String> {
    let stream = acceptor.accept(stream).await.map_err(|e| e.to_string())?;
    let answer = service_fn(move |request: Request<Incoming>| {
        let answer = answer(request.method(), &published);
        async move { Ok::<_, Infallible>(answer) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(LONGEST)
        // A reader comes back in five minutes: its place is somebody else's until then.
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    served.await.map_err(|e| e.to_string())
}

/// The document, whatever the path: the URL is the operators' to agree on.
fn answer(method: &Method, published: &Published) -> Response<Full<Bytes>> {
    let (status, body) = match (method, published.load_full()) {
        (&Method::GET, Some(document)) => (StatusCode::OK, Bytes::clone(&document)),
        (&Method::GET, None) => (StatusCode::SERVICE_UNAVAILABLE, Bytes::from_static(b"{}")),
        _ => (StatusCode::METHOD_NOT_ALLOWED, Bytes::from_static(b"{}")),
    };
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}
