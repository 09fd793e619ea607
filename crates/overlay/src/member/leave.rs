//! Leaving for good: the federator is told that this member serves nothing any more and won't come back.

use std::net::SocketAddr;
use std::time::Duration;

use tombolo_proto::v1;
use tombolo_proto::v1::config_client::ConfigClient;
use tombolo_runtime::clock;
use tombolo_runtime::tasks::TaskGroup;

use super::{ControlError, Member};
use crate::cid::Kind;
use crate::endpoint::{BindError, Overlay, OverlayConfig};
use crate::lease::LeaseError;
use crate::transport::Limits;

/// The temporary overlay's tasks end by then.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);
/// The federator waits two seconds for a process that may still live.
const AGAIN: Duration = Duration::from_millis(500);
const MOST_AGAIN: u32 = 6;

/// Why no federator could be told.
#[derive(Debug, thiserror::Error)]
pub enum LeaveError {
    #[error(transparent)]
    Lease(#[from] LeaseError),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("{0}")]
    Control(ControlError),
    #[error("the federator refused: {0}")]
    Refused(String),
    #[error("no federator answered within {} s", .0.as_secs())]
    Late(Duration),
}

impl Member {
    /// Tells a federator that this member leaves, over an overlay of its own: the process that served must have ended.
    /// What is on disk stays.
    pub async fn leave(&self, bind: SocketAddr, patience: Duration) -> Result<(), LeaveError> {
        let tasks = TaskGroup::new();
        let endpoint = self.burn_endpoint()?;
        let config = OverlayConfig {
            tag: self.tag(),
            endpoint,
            keys: self.lease().keys_at(clock::since_unix_epoch()),
            kind: Kind::Endpoint,
            bind,
            registers: self.control().federators.iter().all(|(_, address)| address.is_none()),
            learns: false,
            server: None,
            svid: Some(self.svid().clone()),
            limits: Limits::default(),
        };
        let overlay = Overlay::bind(config, &tasks)?;
        overlay.set_routes(self.first_routes());
        let told = tokio::time::timeout(patience, self.say_farewell(&overlay)).await;
        self.disconnect().await;
        overlay.close().await;
        drop(overlay);
        tasks.shutdown(CLOSE_PATIENCE).await;
        told.unwrap_or(Err(LeaveError::Late(patience)))
    }

    async fn say_farewell(&self, overlay: &Overlay) -> Result<(), LeaveError> {
        let lease = v1::EndpointLease { keys: None, renewal_key: Vec::new(), ..self.lease().to_wire() };
        let request = v1::LeaveRequest { lease: Some(lease) };
        let mut again = MOST_AGAIN;
        loop {
            let channel = match self.connect(overlay).await {
                Ok(channel) => channel,
                // The registration at a gateway takes its time; the caller's patience bounds this.
                Err(ControlError::Dial { source, .. }) if source.is_retryable() => continue,
                Err(error) => return Err(LeaveError::Control(error)),
            };
            match ConfigClient::new(channel).leave(request.clone()).await {
                Ok(_) => return Ok(()),
                Err(status) if status.code() == tonic::Code::Unavailable => {
                    self.disconnect().await;
                }
                // A process of it was heard of a moment ago: it has ended, or is another machine's.
                Err(status) if status.code() == tonic::Code::ResourceExhausted && again > 0 => {
                    again -= 1;
                    tokio::time::sleep(AGAIN).await;
                }
                Err(status) => return Err(LeaveError::Refused(super::join::refusal(&status))),
            }
        }
    }
}
