//! `Federation`: a linked peer watches what is exported to it.
//!
//! One record log per peer, so that a reader that was away a moment resumes where it was. A stream sends what its reader
//! lacks whenever the facts change, and a heartbeat every second.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tombolo_identity::PeerIdentity;
use tombolo_model::ids::{Epoch, Revision};
use tombolo_model::names::ClusterName;
use tombolo_model::sync::{RecordLog, Update};
use tombolo_proto::v1::federation_server::Federation;
use tombolo_proto::v1::watch_response::Event;
use tombolo_proto::{convert, v1};
use tombolo_runtime::tasks::TaskGroup;
use tonic::{Request, Response, Status};

use super::caller;
use crate::core::{CoreError, CoreHandle};
use crate::facts::Facts;
use crate::records::{self, Told};

/// Its readers call us stale after three missed ones.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Changes that come within this are one delta.
const PACE: Duration = Duration::from_millis(20);
/// The version of the protocol spoken here.
pub const PROTOCOL: u32 = 1;
/// Starts the message by which a stream ends when the link has been removed here.
pub const UNLINKED: &str = "unlinked";

/// The record logs of all linked peers.
#[derive(Default)]
pub struct Logs(Mutex<HashMap<ClusterName, PeerLog>>);

struct PeerLog {
    /// Of the facts that it was brought up to; `None`: of none yet.
    facts: Option<u64>,
    log: RecordLog<Told>,
}

impl Logs {
    /// Brings a peer's log up to the facts; what a reader at `position` lacks.
    fn since(&self, facts: &Facts, peer: &ClusterName, position: (Epoch, Revision)) -> Option<Update<Told>> {
        let mut logs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        logs.retain(|peer, _| facts.links.contains_key(peer));
        let fresh = || {
            let log = RecordLog::new(facts.cluster.epoch, Revision(facts.revision));
            PeerLog { facts: None, log }
        };
        let PeerLog { facts: known, log } = logs.entry(peer.clone()).or_insert_with(fresh);
        // Heartbeats ask every second, and another stream of the peer may have newer facts.
        if known.is_none_or(|known| known < facts.revision) {
            log.replace(records::told(facts, peer));
            *known = Some(facts.revision);
        }
        log.since(position.0, position.1)
    }
}

pub struct FederationService {
    pub core: CoreHandle,
    pub logs: Arc<Logs>,
    pub tasks: TaskGroup,
}

type Watched = Pin<Box<dyn Stream<Item = Result<v1::WatchResponse, Status>> + Send>>;

impl FederationService {
    /// Lets an authenticated caller watch, if it is a federator of a linked peer.
    fn watch_as(&self, caller: &PeerIdentity, request: v1::WatchRequest) -> Result<Watched, Status> {
        let v1::WatchRequest { cluster, epoch, revision, protocol } = request;
        let peer: ClusterName = convert::parse("cluster", &cluster).map_err(CoreError::from)?;
        if protocol < PROTOCOL {
            let text = format!(
                "protocol {protocol} is not spoken here: upgrade {peer} to one that speaks {PROTOCOL}"
            );
            return Err(Status::failed_precondition(text));
        }
        let facts = self.core.facts();
        let link = facts.links.get(&peer).filter(|_| caller.cluster == peer);
        let link = link.ok_or_else(|| unlinked(&peer))?;
        if link.tag != caller.tag || !link.federator_ids.contains(&caller.spiffe_id) {
            let text = format!("{} is not a federator of {peer} as it was linked", caller.spiffe_id);
            return Err(Status::permission_denied(text));
        }
        tracing::info!(%peer, "peer watches our exports");
        if link.unconfirmed {
            let peer = peer.clone();
            self.core.post(move |core, _| core.confirm_link(&peer));
        }
        let (sender, receiver) = mpsc::channel(1);
        let task = watch_task(
            self.core.clone(),
            Arc::clone(&self.logs),
            peer,
            (Epoch(epoch), Revision(revision)),
            sender,
        );
        self.tasks.spawn("federation watch", task);
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }
}

#[tonic::async_trait]
impl Federation for FederationService {
    type WatchStream = Watched;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Watched>, Status> {
        let caller = caller(&request)?.identity;
        self.watch_as(&caller, request.into_inner()).map(Response::new)
    }
}

fn unlinked(peer: &ClusterName) -> Status {
    Status::failed_precondition(format!("{UNLINKED}: there is no link to {peer} here"))
}

async fn watch_task(
    core: CoreHandle,
    logs: Arc<Logs>,
    peer: ClusterName,
    mut position: (Epoch, Revision),
    sender: mpsc::Sender<Result<v1::WatchResponse, Status>>,
) {
    let mut facts = core.watch();
    loop {
        let current = facts.borrow_and_update().clone();
        if !current.links.contains_key(&peer) {
            let _ = sender.send(Err(unlinked(&peer))).await;
            return;
        }
        let event = match logs.since(&current, &peer, position) {
            Some(update) => {
                let (reached, event) = to_wire(current.cluster.epoch, update);
                position = reached;
                event
            }
            None => {
                let sent_unix_ms = i64::try_from(core.now().unix.as_millis()).unwrap_or(i64::MAX);
                Event::Heartbeat(v1::HeartbeatEvent { sent_unix_ms })
            }
        };
        let response = v1::WatchResponse { epoch: position.0.0, revision: position.1.0, event: Some(event) };
        if sender.send(Ok(response)).await.is_err() {
            return;
        }
        // Heartbeats go on although the facts change for other peers all the time.
        let heartbeat = tokio::time::sleep(HEARTBEAT);
        tokio::pin!(heartbeat);
        loop {
            tokio::select! {
                changed = facts.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    // Said before our own gateways stop carrying packets to the peer.
                    if !facts.borrow().links.contains_key(&peer) {
                        break;
                    }
                    tokio::time::sleep(PACE).await;
                    let newest = facts.borrow_and_update().clone();
                    if !newest.links.contains_key(&peer) || logs.since(&newest, &peer, position).is_some() {
                        break;
                    }
                }
                () = sender.closed() => return,
                () = &mut heartbeat => break,
            }
        }
    }
}

fn to_wire(epoch: Epoch, update: Update<Told>) -> ((Epoch, Revision), Event) {
    match update {
        Update::Snapshot { epoch, revision, records } => {
            let records = records.iter().map(|(key, told)| told.record(key)).collect();
            ((epoch, revision), Event::Snapshot(v1::SnapshotEvent { records }))
        }
        Update::Delta { revision, upserts, deletes } => {
            let upserts = upserts.iter().map(|(key, told)| told.record(key)).collect();
            ((epoch, revision), Event::Delta(v1::DeltaEvent { upserts, deletes }))
        }
    }
}

#[cfg(test)]
mod tests;
