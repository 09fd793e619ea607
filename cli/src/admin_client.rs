//! The operator's end of the admin API: gRPC over the federator's Unix socket.

use std::path::PathBuf;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tombolo_proto::v1::admin_client::AdminClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::args::Connect;
use crate::context;
use crate::failure::{self, Failure};
use crate::kube_client;
use crate::tunnel::Tunnel;

/// A connection to one federator and the deadline of each call.
pub struct Admin {
    pub client: AdminClient<Channel>,
    /// Where the federator is, for messages.
    place: String,
    timeout: Duration,
}

impl Admin {
    pub async fn connect(connect: &Connect) -> Result<Self, Failure> {
        if kube_client::wanted(connect) {
            return Self::through(Tunnel::find(connect).await?, connect.timeout).await;
        }
        Self::at(context::socket(connect)?, connect.timeout).await
    }

    /// Connects to the federator of a Kubernetes cluster.
    async fn through(tunnel: Tunnel, timeout: Duration) -> Result<Self, Failure> {
        let place = tunnel.place();
        let connector = tower::service_fn(move |_| {
            let tunnel = tunnel.clone();
            async move { tunnel.open().await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://federator")
            .connect_timeout(timeout)
            .connect_with_connector(connector)
            .await
            .map_err(|error| unreachable(&place, &failure::chain(&error)))?;
        Ok(Self { client: AdminClient::new(channel), place, timeout })
    }

    /// Connects to a known socket.
    pub async fn at(socket: PathBuf, timeout: Duration) -> Result<Self, Failure> {
        let path = socket.clone();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://federator")
            .connect_timeout(timeout)
            .connect_with_connector(connector)
            .await
            .map_err(|error| unreachable(&socket.display(), &failure::chain(&error)))?;
        let place = socket.display().to_string();
        Ok(Self { client: AdminClient::new(channel), place, timeout })
    }

    /// A request with this command's deadline.
    pub fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.set_timeout(self.timeout);
        request
    }

    /// A federator's refusal, as a failure of the command.
    pub fn failed(&self, status: Status) -> Failure {
        let message = status.message();
        match status.code() {
            Code::Unavailable => unreachable(&self.place, message),
            Code::DeadlineExceeded | Code::Cancelled => {
                Failure::timed_out(format_args!("no answer within {:?}", self.timeout))
                    .remedy("see what the federator's log says, or wait longer with --timeout")
            }
            Code::Unimplemented => {
                Failure::new(format_args!("the federator does not know this call ({message})"))
                    .remedy("use the `tombolo` of the federator's version")
            }
            Code::PermissionDenied => Failure::new(format_args!("not allowed: {message}"))
                .remedy("run the command as the user that runs the federator, or as root"),
            _ => Failure::new(if message.is_empty() {
                "the federator refused without a reason"
            } else {
                message
            }),
        }
    }
}

fn unreachable(place: &dyn std::fmt::Display, reason: &str) -> Failure {
    Failure::new(format_args!("cannot reach the federator at {place}: {reason}"))
        .remedy("check that it runs (`tombolo federator`), that this user may open the socket, and that --socket or --context names it")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_socket_is_named_with_a_remedy() {
        let failed = Admin::at("/nonexistent/admin.sock".into(), Duration::from_secs(1)).await.err().unwrap();
        let text = failed.to_string();
        assert!(text.contains("/nonexistent/admin.sock") && text.contains("--socket"), "{text}");
    }
}
