//! The way to a federator: one control connection at a time, dialled when it is asked for, with jittered backoff.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;
use tombolo_identity::{ExpectedPeer, tls};
use tonic::transport::Channel;

use super::Member;
use super::backoff::Backoff;
use crate::cid::Kind;
use crate::connection::PeerConnection;
use crate::dial::{DialError, DialTarget};
use crate::endpoint::Overlay;
use crate::grpc;

/// The first retry is soon (a federator's restart takes a second), the last ones spare a cluster that is down.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Why no federator is connected.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("no federator of cluster {cluster} can be reached: {source}")]
    Dial { cluster: String, source: DialError },
    #[error("the TLS configuration can't be made: {0}")]
    Tls(#[from] rustls::Error),
}

#[derive(Debug)]
pub(super) struct Link(Mutex<LinkState>);

#[derive(Debug)]
struct LinkState {
    live: Option<(PeerConnection, Channel)>,
    backoff: Backoff,
    not_before: Option<Instant>,
}

impl Default for Link {
    fn default() -> Self {
        Self(Mutex::new(LinkState {
            live: None,
            backoff: Backoff::new(FIRST_WAIT, LONGEST_WAIT),
            not_before: None,
        }))
    }
}

/// Kicks follow each other every 200 ms: after two seconds of silence a federator that was killed has most often been
/// started again, and its new process knows nothing of the old one's connections.
const SILENT_KICKS: u32 = 10;

/// A federator whose identity has ended gets no new calls; those in progress go on until the connection is closed.
fn usable(connection: &PeerConnection) -> bool {
    !connection.is_closed() && !connection.expired() && !silent(connection)
}

fn silent(connection: &PeerConnection) -> bool {
    connection.stall().unanswered_kicks() >= SILENT_KICKS
}

impl Member {
    /// A channel to a federator: the live one, or a new one. Ask again after a call has failed; attempts are spaced by
    /// jittered backoff, so callers may simply loop.
    pub async fn connect(&self, overlay: &Overlay) -> Result<Channel, ControlError> {
        let mut link = self.0.link.0.lock().await;
        if let Some((connection, channel)) = &link.live
            && usable(connection)
        {
            return Ok(channel.clone());
        }
        if let Some((connection, _)) = link.live.take()
            && silent(&connection)
        {
            // What waits on it for news asks again.
            connection.close(crate::close_code::DONE, "no answer");
        }
        if let Some(not_before) = link.not_before {
            tokio::time::sleep_until(not_before).await;
        }
        match self.dial_federator(overlay).await {
            Ok(connection) => {
                tracing::info!(peer = ?connection.identity().map(|id| id.spiffe_id.clone()), "federator connected");
                link.backoff.worked();
                // A federator that accepts and drops us at once must not make us spin.
                link.not_before = Some(Instant::now() + FIRST_WAIT);
                let channel = grpc::channel(connection.clone());
                link.live = Some((connection, channel.clone()));
                Ok(channel)
            }
            Err(error) => {
                let wait = link.backoff.failed(rand::random());
                link.not_before = Some(Instant::now() + wait);
                Err(error)
            }
        }
    }

    /// Whether a federator is connected right now.
    pub fn is_connected(&self) -> bool {
        // Somebody is dialling: not connected.
        self.0.link.0.try_lock().is_ok_and(|link| link.live.as_ref().is_some_and(|(c, _)| usable(c)))
    }

    /// Drops the live connection after a call on it failed in a way that a new one may cure. True: the federator has ended
    /// it because this member's identity is revoked.
    pub async fn disconnect(&self) -> bool {
        let Some((connection, _)) = self.0.link.0.lock().await.live.take() else { return false };
        let revoked = connection.refused_as_revoked();
        connection.close(crate::close_code::DONE, "another federator is tried");
        revoked
    }

    async fn dial_federator(&self, overlay: &Overlay) -> Result<PeerConnection, ControlError> {
        let control = self.control();
        let expected = ExpectedPeer::OneOf(Arc::clone(&control.spiffe_ids));
        let tls = tls::mesh_client_config(self.svid(), expected)?;
        let target = DialTarget {
            kind: Kind::Control,
            tag: self.tag(),
            handle: control.handle,
            keys: Arc::clone(&control.keys),
        };
        overlay
            .dial(&target, tls)
            .await
            .map_err(|source| ControlError::Dial { cluster: self.cluster().to_string(), source })
    }
}
