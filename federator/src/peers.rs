//! Watching the linked peers: one task per link, started and ended as links come and go.
//!
//! A task dials the peer's federators over the overlay, resumes at the last `(epoch, revision)`, and hands every update
//! to the core. A lost connection costs nothing but news: what is known keeps serving, and ages. Ends with the group.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tombolo_identity::{ExpectedPeer, SvidHandle, tls};
use tombolo_model::ids::{Epoch, Revision};
use tombolo_model::names::ClusterName;
use tombolo_model::sync::Update;
use tombolo_overlay::cid::Kind;
use tombolo_overlay::keys::KeyRing;
use tombolo_overlay::member::backoff::Backoff;
use tombolo_overlay::{DialTarget, Overlay, PeerConnection, close_code, grpc};
use tombolo_proto::v1;
use tombolo_proto::v1::federation_client::FederationClient;
use tombolo_proto::v1::watch_response::Event;
use tombolo_runtime::tasks::TaskGroup;
use tonic::Code;

use crate::core::CoreHandle;
use crate::facts::Link;
use crate::service::federation::{PROTOCOL, UNLINKED};

/// Heartbeats come every second; a federator that is silent for this long is dialled anew.
/// A peer's records in one message: 10,000 of them, mostly of 1 to 2 KB.
const MAX_SNAPSHOT_BYTES: usize = 64 * 1024 * 1024;
const SILENCE: Duration = Duration::from_millis(3500);
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Keeps one watcher per live link.
pub struct PeersTask {
    pub core: CoreHandle,
    pub overlay: Overlay,
    pub svid: SvidHandle,
    pub tasks: TaskGroup,
}

/// Why a watch ended.
#[derive(Debug)]
enum Ended {
    /// The peer has removed the link.
    Unlinked,
    /// What it sent does not fit: watch anew from nothing.
    Misfit(String),
    Lost(String),
}

impl PeersTask {
    pub async fn run(self) {
        let mut facts = self.core.watch();
        let mut running: HashMap<ClusterName, (Arc<Link>, tokio::task::JoinHandle<()>)> = HashMap::new();
        loop {
            let links = facts.borrow_and_update().links.clone();
            running.retain(|peer, (link, task)| {
                let stays = links.get(peer).is_some_and(|now| same(now, link) && now.is_live());
                if !stays {
                    task.abort();
                }
                stays
            });
            for (peer, link) in links.iter().filter(|(_, link)| link.is_live()) {
                if !running.contains_key(peer) {
                    let watcher = Watcher {
                        core: self.core.clone(),
                        overlay: self.overlay.clone(),
                        svid: self.svid.clone(),
                        link: Arc::clone(link),
                    };
                    let task = self.tasks.spawn("peer", watcher.run());
                    running.insert(peer.clone(), (Arc::clone(link), task));
                }
            }
            if facts.changed().await.is_err() {
                return;
            }
        }
    }
}

/// Whether a link is dialled as before.
fn same(a: &Link, b: &Link) -> bool {
    (a.tag, &a.key, &a.control, &a.federator_ids) == (b.tag, &b.key, &b.control, &b.federator_ids)
}

struct Watcher {
    core: CoreHandle,
    overlay: Overlay,
    svid: SvidHandle,
    link: Arc<Link>,
}

impl Watcher {
    async fn run(self) {
        let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        let peer = self.link.peer.clone();
        loop {
            let mut worked = false;
            let ended = self.watch(&mut worked).await;
            if worked {
                backoff.worked();
            }
            let peer = peer.clone();
            match ended {
                Ended::Unlinked => {
                    let ended = self.core.attempt(move |core, now| core.ended_by_peer(&peer, now)).await;
                    if let Err(error) = ended {
                        tracing::warn!(%error, "the end of a link can't be stored yet");
                    } else {
                        return;
                    }
                }
                Ended::Misfit(reason) => {
                    tracing::warn!(%peer, reason, "the peer's records do not fit; they are asked for anew");
                    let _ = self
                        .core
                        .call(move |core, _| {
                            core.restart_watch(&peer);
                            core.lost_peer(&peer, reason);
                        })
                        .await;
                }
                Ended::Lost(reason) => {
                    tracing::info!(%peer, reason, "not connected to the peer; what is known keeps serving");
                    let _ = self.core.call(move |core, _| core.lost_peer(&peer, reason)).await;
                }
            }
            tokio::time::sleep(backoff.failed(rand::random())).await;
        }
    }

    async fn dial(&self) -> Result<PeerConnection, String> {
        let link = &self.link;
        let moment = self.core.now();
        let own = self.core.facts().cluster.name.clone();
        let key = link.link_key().ok_or("the stored link key is damaged: unlink and link anew")?;
        let binding = link.control.binding(&own);
        let expected = ExpectedPeer::OneOf(link.federator_ids.clone().into());
        let tls = tls::mesh_client_config(&self.svid, expected).map_err(|e| e.to_string())?;
        let target = DialTarget {
            kind: Kind::Control,
            tag: link.tag,
            handle: link.control.handle,
            keys: Arc::new(KeyRing::derive_now(moment.unix, |hour| key.handle_key(&binding, hour))),
        };
        self.overlay.dial(&target, tls).await.map_err(|e| format!("no federator of it can be reached: {e}"))
    }

    async fn watch(&self, worked: &mut bool) -> Ended {
        let connection = match self.dial().await {
            Ok(connection) => connection,
            Err(reason) => return Ended::Lost(reason),
        };
        let ended = self.follow(&connection, worked).await;
        connection.close(close_code::DONE, "the watch has ended");
        ended
    }

    async fn follow(&self, connection: &PeerConnection, worked: &mut bool) -> Ended {
        let peer = self.link.peer.clone();
        let own = self.core.facts().cluster.name.to_string();
        let position = {
            let peer = peer.clone();
            self.core.call(move |core, _| core.import_position(&peer)).await
        };
        let Ok((epoch, revision)) = position else { return Ended::Lost("shutting down".to_owned()) };
        let request =
            v1::WatchRequest { cluster: own, epoch: epoch.0, revision: revision.0, protocol: PROTOCOL };
        let mut client = FederationClient::new(grpc::channel(connection.clone()))
            .max_decoding_message_size(MAX_SNAPSHOT_BYTES);
        let late = || Ended::Lost(format!("no word within {} s", SILENCE.as_secs_f32()));
        let opened = match tokio::time::timeout(SILENCE, client.watch(request)).await {
            Ok(opened) => opened,
            Err(_) => return late(),
        };
        let mut events = match opened {
            Ok(response) => response.into_inner(),
            Err(status) => return refused(&status),
        };
        loop {
            let next = match tokio::time::timeout(SILENCE, events.message()).await {
                Ok(next) => next,
                Err(_) => return late(),
            };
            let response = match next {
                Ok(Some(response)) => response,
                Ok(None) => return Ended::Lost("the peer ended the watch".to_owned()),
                Err(status) => return refused(&status),
            };
            *worked = true;
            let peer = peer.clone();
            let applied = self.core.attempt(move |core, moment| match update(response) {
                Some((epoch, update)) => core.apply_update(&peer, epoch, update, moment),
                None => {
                    core.heard_peer(&peer, moment);
                    Ok(())
                }
            });
            if let Err(error) = applied.await {
                return Ended::Misfit(error.to_string());
            }
        }
    }
}

fn refused(status: &tonic::Status) -> Ended {
    let words: String = status.message().chars().take(300).collect();
    if status.code() == Code::FailedPrecondition && words.starts_with(UNLINKED) {
        Ended::Unlinked
    } else {
        Ended::Lost(if words.is_empty() { format!("{:?}", status.code()) } else { words })
    }
}

/// The update of a response; `None` for a heartbeat.
fn update(response: v1::WatchResponse) -> Option<(Epoch, Update<v1::Record>)> {
    let v1::WatchResponse { epoch, revision, event } = response;
    let (epoch, revision) = (Epoch(epoch), Revision(revision));
    let keyed =
        |records: Vec<v1::Record>| records.into_iter().map(|record| (record.key.clone(), record)).collect();
    let update = match event? {
        Event::Snapshot(snapshot) => Update::Snapshot { epoch, revision, records: keyed(snapshot.records) },
        Event::Delta(delta) => {
            Update::Delta { revision, upserts: keyed(delta.upserts), deletes: delta.deletes }
        }
        Event::Heartbeat(_) => return None,
    };
    Some((epoch, update))
}
