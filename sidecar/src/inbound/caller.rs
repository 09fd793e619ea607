//! Who has opened a stream, and what the newest configuration says of it.

use std::sync::Arc;

use tokio::sync::watch;
use tombolo_model::access::Verdict;
use tombolo_model::names::ServiceKey;
use tombolo_overlay::PeerConnection;

use crate::access::Admission;
use crate::udp::demux::Demux;

pub(super) fn identity(connection: &PeerConnection) -> String {
    connection.identity().map(|id| id.spiffe_id.to_string()).unwrap_or_default()
}

/// Who opened a stream, and what they may.
pub(super) struct Caller {
    pub connection: PeerConnection,
    pub admitted: watch::Receiver<Arc<Admission>>,
    /// Where the datagrams of its flows are received.
    pub demux: Demux,
}

impl Caller {
    /// What the newest configuration says; `None`: it does not know the connection's handle any more.
    pub fn verdict(&mut self, service: &ServiceKey, port: u16) -> Option<Verdict> {
        let admission = Arc::clone(&self.admitted.borrow_and_update());
        let caller = self.connection.identity().filter(|_| admission.admits(&self.connection))?;
        Some(admission.access.decide(&caller, service, port))
    }

    /// Ends when a change no longer admits an admitted stream.
    pub async fn revoked(&mut self, service: &ServiceKey, port: u16) -> Verdict {
        while self.admitted.changed().await.is_ok() {
            // Without its handle the whole connection is closed, by its own task.
            if let Some(verdict) = self.verdict(service, port).filter(|verdict| !verdict.allowed) {
                return verdict;
            }
        }
        std::future::pending().await
    }
}
