//! The demo's web application: says who it is, streams on request, and answers health checks.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;

/// Bounds on what one request may ask for.
const MAX_CHUNKS: u64 = 100_000;
const MAX_CHUNK_BYTES: u64 = 1024 * 1024;
const MAX_PAUSE: Duration = Duration::from_secs(1);

struct App {
    name: String,
    requests: AtomicU64,
}

/// Serves until the process ends.
pub async fn serve(listen: SocketAddr, name: String) -> std::io::Result<()> {
    let listener = TcpListener::bind(listen).await?;
    axum::serve(listener, router(name)).await
}

fn router(name: String) -> Router {
    let app = Arc::new(App { name, requests: AtomicU64::new(0) });
    Router::new()
        .route("/", get(hello))
        .route("/stream", get(stream))
        .route("/healthz", get(|| async { "ok\n" }))
        // What `/ready` is to a role, so that the demo waits for it in the same way.
        .route("/ready", get(|| async { axum::Json(serde_json::json!({ "ready": true, "blockedBy": [] })) }))
        .with_state(app)
}

async fn hello(State(app): State<Arc<App>>) -> impl IntoResponse {
    let request = app.requests.fetch_add(1, Ordering::Relaxed) + 1;
    let body = serde_json::json!({ "service": "shop/web", "servedBy": app.name, "request": request });
    ([("content-type", "application/json")], format!("{body}\n"))
}

#[derive(Debug, serde::Deserialize)]
struct StreamQuery {
    chunks: u64,
    bytes: u64,
    pause_ms: u64,
}

/// A download of `chunks` pieces with a pause before each, every byte of which can be checked.
async fn stream(Query(query): Query<StreamQuery>) -> impl IntoResponse {
    let (chunks, bytes) = (query.chunks.min(MAX_CHUNKS), query.bytes.min(MAX_CHUNK_BYTES));
    let pause = Duration::from_millis(query.pause_ms).min(MAX_PAUSE);
    Body::from_stream(futures::stream::unfold(0, move |chunk| async move {
        if chunk >= chunks {
            return None;
        }
        tokio::time::sleep(pause).await;
        let from = chunk * bytes;
        let piece: Bytes = (from..from + bytes).map(byte_at).collect();
        Some((Ok::<_, Infallible>(piece), chunk + 1))
    }))
}

/// The byte at an offset of a stream: a period that divides no power of two, so that a lost or doubled piece shows.
pub fn byte_at(offset: u64) -> u8 {
    u8::try_from(offset % 251).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::http;

    #[tokio::test]
    async fn it_says_who_it_is_and_streams_bytes_that_can_be_checked() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tasks = tombolo_runtime::tasks::TaskGroup::new();
        tasks.spawn("app", async move { axum::serve(listener, router("west".into())).await });
        let answer = http::get(address, "/", Duration::from_secs(5)).await.unwrap();
        assert_eq!(answer.status, 200);
        assert!(String::from_utf8_lossy(&answer.body).contains(r#""servedBy":"west""#));
        let path = "/stream?chunks=20&bytes=1000&pause_ms=1";
        assert_eq!(http::download(address, path, 20_000).await.unwrap().bytes, 20_000);
        assert!(http::download(address, path, 20_001).await.unwrap_err().contains("20000 of 20001"));
    }
}
