//! The SPIFFE Workload API: the application asks its sidecar, over a Unix socket, who it is and whom to believe.
//!
//! ```text
//!  application --gRPC, Unix socket--> listener (who asks?) --> service (what may it know?) --> federator, where it must
//! ```
//! [`listener`] admits connections and knows the user behind each, [`identity`] keeps the application's own X509-SVID
//! renewed, [`tokens`] those JWT-SVIDs that were asked for, [`answers`] makes the messages, [`service`] is the API. An
//! SVID's key is made in this process, shown to the application alone, and written nowhere. Everything ends with the
//! sidecar's tasks.

use std::path::PathBuf;
use std::sync::Arc;

use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tombolo_overlay::Overlay;
use tombolo_overlay::member::Member;
use tombolo_proto::spiffe::spiffe_workload_api_server::SpiffeWorkloadApiServer;
use tombolo_runtime::tasks::TaskGroup;
use tonic::transport::Server;

use crate::tables::Tables;

mod answers;
mod identity;
pub mod listener;
mod metrics;
mod service;
#[cfg(test)]
mod tests;
mod tokens;

pub use listener::BindError;
use listener::Listener;
use metrics::Metrics;
use service::{Service, Sources};

/// Where it is served, and to whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadApiConfig {
    /// Absolute; its directory is made if need be.
    pub path: PathBuf,
    /// Users who may ask, beside root and the sidecar's own.
    pub uids: Vec<u32>,
}

/// A bound Workload API.
#[derive(Debug)]
pub struct WorkloadApi {
    listener: Listener,
    metrics: Metrics,
}

impl WorkloadApi {
    pub async fn bind(config: &WorkloadApiConfig, registry: &mut Registry) -> Result<Self, BindError> {
        Ok(Self { listener: Listener::bind(config).await?, metrics: Metrics::register(registry) })
    }

    /// Serves until the group ends. The socket's file goes with it.
    pub fn spawn(
        self,
        member: &Member,
        overlay: &Overlay,
        tables: watch::Receiver<Option<Arc<Tables>>>,
        tasks: &TaskGroup,
    ) {
        let Self { listener, metrics } = self;
        let (svid, issued) = watch::channel(None);
        tasks.spawn(
            "workload SVID",
            identity::keep_issued(member.clone(), overlay.clone(), tables.clone(), svid),
        );
        let sources = Sources { member: member.clone(), overlay: overlay.clone(), tables, issued };
        let service = SpiffeWorkloadApiServer::with_interceptor(
            Service::new(sources, metrics.clone(), tasks.clone()),
            service::admit(listener.policy(), metrics),
        );
        let stop = tasks.stop_token();
        tasks.spawn("workload API", async move {
            let path = listener.path().to_owned();
            let server = Server::builder().add_service(service);
            tokio::select! {
                served = server.serve_with_incoming(listener.incoming()) => if let Err(error) = served {
                    tracing::error!(%error, "the Workload API has ended");
                },
                () = stop.cancelled() => {}
            }
            let _ = std::fs::remove_file(path);
        });
    }
}
