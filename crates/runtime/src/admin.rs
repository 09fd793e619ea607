//! The admin endpoint of a role: `/metrics`, `/ready`, `/live`. Plain HTTP for scrapers and probes, loopback by default.
//!
//! Bound in `build` (a taken port fails at start, with a remedy), served by [`Admin::run`] until the drain is over: readiness stays
//! visible, red, while draining. Connections are bounded in number and in idle time ([`bounded`]).

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::drain::Drain;
use crate::readiness::Readiness;

mod bounded;

/// Port of metrics and readiness of each role (design section 3).
pub const DEFAULT_PORT: u16 = 7445;
/// Where it listens unless told otherwise: this machine only.
pub const DEFAULT_ADDRESS: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, DEFAULT_PORT));

#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error(
        "admin endpoint: cannot listen on {address} ({source}): choose another with --admin ADDRESS:PORT"
    )]
    Bind { address: SocketAddr, source: std::io::Error },
    #[error("admin endpoint on {address} failed: {source}")]
    Serve { address: SocketAddr, source: std::io::Error },
}

#[derive(Clone)]
struct Shared {
    registry: Arc<Registry>,
    readiness: Readiness,
}

/// A bound admin endpoint.
#[derive(Debug)]
pub struct Admin {
    listener: TcpListener,
    address: SocketAddr,
    router: Router,
    readiness: Readiness,
}

impl Admin {
    /// Binds. `registry` holds every metric of the role: what changes shape at run time registers a `Collector`.
    pub async fn bind(
        address: SocketAddr,
        registry: Registry,
        readiness: Readiness,
    ) -> Result<Self, AdminError> {
        let failed = |source| AdminError::Bind { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let shared = Shared { registry: Arc::new(registry), readiness: readiness.clone() };
        let router = Router::new()
            .route("/metrics", get(metrics))
            .route("/ready", get(ready))
            .route("/live", get(live))
            .with_state(shared);
        Ok(Self { listener, address, router, readiness })
    }

    /// Adds a role's own pages.
    pub fn with_routes(mut self, routes: Router) -> Self {
        self.router = self.router.merge(routes);
        self
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until the drain is forced or its other watchers are gone and the caller drops this future. While
    /// draining, `/ready` answers 503.
    pub async fn run(self, drain: Drain) -> Result<(), AdminError> {
        let Self { listener, address, router, readiness } = self;
        let serve = async { axum::serve(bounded::Bounded::new(listener), router).await };
        // Releases its watcher as soon as draining starts: this endpoint has no work in flight that a drain waits for.
        let turn_red = async {
            drain.started().await;
            drop(drain);
            let _draining = readiness.block("draining");
            std::future::pending::<()>().await
        };
        tokio::select! {
            served = serve => served.map_err(|source| AdminError::Serve { address, source }),
            () = turn_red => Ok(()),
        }
    }
}

async fn metrics(State(shared): State<Shared>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &shared.registry) {
        Ok(()) => {
            ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
                .into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("metrics: {error}\n")).into_response(),
    }
}

async fn ready(State(shared): State<Shared>) -> Response {
    let blocked_by: Vec<String> = shared.readiness.blocked_by().iter().map(|what| what.to_string()).collect();
    let status = if blocked_by.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = serde_json::json!({ "ready": blocked_by.is_empty(), "blockedBy": blocked_by });
    (status, axum::Json(body)).into_response()
}

async fn live() -> Response {
    axum::Json(serde_json::json!({ "live": true })).into_response()
}

#[cfg(test)]
mod tests;
