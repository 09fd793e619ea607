//! A peer's watch, called without a network: what it is sent, and who is refused.

use tonic::Code;

use super::*;
use crate::core::tests::{World, assert_says, at, export, identity_of, linked, name};

/// Events come within milliseconds, heartbeats within a second.
const PATIENCE: Duration = Duration::from_secs(20);

struct Watched {
    _world: World,
    service: FederationService,
    /// The federator of `west`, as its certificate shows it.
    peer: tombolo_identity::PeerIdentity,
}

fn watched() -> Watched {
    let (world, mut east, west) = linked();
    east.serving("web", &["shop/web"], at(1));
    let peer = identity_of(&west.core, west.core.facts.cluster.federator_id.as_str());
    let core = east.core.start().unwrap();
    let service = FederationService { core, logs: Arc::default(), tasks: TaskGroup::new() };
    Watched { _world: world, service, peer }
}

impl Watched {
    async fn ask(
        &self,
        request: v1::WatchRequest,
        identity: Option<tombolo_identity::PeerIdentity>,
    ) -> Result<<FederationService as Federation>::WatchStream, Status> {
        match identity {
            Some(identity) => self.service.watch_as(&identity, request),
            None => self.service.watch(Request::new(request)).await.map(Response::into_inner),
        }
    }

    async fn from(&self, epoch: u64, revision: u64) -> <FederationService as Federation>::WatchStream {
        let request = v1::WatchRequest { cluster: "west".into(), epoch, revision, protocol: PROTOCOL };
        self.ask(request, Some(self.peer.clone())).await.unwrap()
    }
}

async fn next(
    stream: &mut <FederationService as Federation>::WatchStream,
) -> Result<v1::WatchResponse, Status> {
    let next = futures::StreamExt::next(stream);
    tokio::time::timeout(PATIENCE, next).await.expect("nothing comes").expect("the stream has ended")
}

/// The next event that is no heartbeat.
async fn news(stream: &mut <FederationService as Federation>::WatchStream) -> v1::WatchResponse {
    loop {
        let response = next(stream).await.unwrap();
        if !matches!(response.event, Some(Event::Heartbeat(_))) {
            return response;
        }
    }
}

fn keys(response: &v1::WatchResponse) -> Vec<&str> {
    let records = match response.event.as_ref().unwrap() {
        Event::Snapshot(snapshot) => &snapshot.records,
        Event::Delta(delta) => &delta.upserts,
        Event::Heartbeat(_) => panic!("a heartbeat"),
    };
    records.iter().map(|record| record.key.as_str()).collect()
}

#[tokio::test]
async fn a_peer_gets_a_snapshot_then_deltas_and_resumes_where_it_was() {
    let watched = watched();
    let mut stream = watched.from(0, 0).await;
    let first = news(&mut stream).await;
    assert!(matches!(first.event, Some(Event::Snapshot(_))));
    assert_eq!(keys(&first), ["gateways", "jwt-authorities", "properties"], "nothing is exported yet");
    watched
        .service
        .core
        .attempt(|core, now| core.apply(export("shop/web", "west"), false, now))
        .await
        .unwrap();
    let second = news(&mut stream).await;
    assert!(matches!(second.event, Some(Event::Delta(_))));
    assert_eq!(keys(&second), ["export/shop/web"]);
    assert_eq!(second.epoch, first.epoch);
    assert!(second.revision > first.revision);

    let resumed = news(&mut watched.from(first.epoch, first.revision).await).await;
    assert!(matches!(resumed.event, Some(Event::Delta(_))), "what it lacks, not everything");
    assert_eq!((keys(&resumed), resumed.revision), (vec!["export/shop/web"], second.revision));
    let other = news(&mut watched.from(first.epoch ^ 1, first.revision).await).await;
    assert!(matches!(other.event, Some(Event::Snapshot(_))), "of another epoch nothing is believed");
    let idle = next(&mut watched.from(second.epoch, second.revision).await).await.unwrap();
    assert!(matches!(idle.event, Some(Event::Heartbeat(_))), "one that lacks nothing hears that we live");

    let key = export("shop/web", "west").key();
    watched.service.core.attempt(move |core, now| core.delete(&key, false, now)).await.unwrap();
    let third = news(&mut stream).await;
    let Some(Event::Delta(delta)) = third.event else { panic!("{third:?}") };
    assert_eq!(delta.deletes, ["export/shop/web"]);
}

#[tokio::test]
async fn heartbeats_come_although_nothing_changes_for_the_peer() {
    let watched = watched();
    let mut stream = watched.from(0, 0).await;
    let first = news(&mut stream).await;
    for _ in 0..2 {
        let beat = next(&mut stream).await.unwrap();
        assert!(matches!(beat.event, Some(Event::Heartbeat(_))), "{beat:?}");
        assert_eq!((beat.epoch, beat.revision), (first.epoch, first.revision));
        // A change that is not the peer's.
        watched
            .service
            .core
            .attempt(|core, now| core.apply(export("shop/other", "north"), false, now))
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn an_unlinked_peer_is_told_so_by_the_end_of_its_stream() {
    let watched = watched();
    let mut stream = watched.from(0, 0).await;
    news(&mut stream).await;
    watched.service.core.attempt(|core, now| core.unlink(&name("west"), now)).await.unwrap();
    let status = loop {
        if let Err(status) = next(&mut stream).await {
            break status;
        }
    };
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().starts_with(UNLINKED), "{status:?}");
    let request = v1::WatchRequest { cluster: "west".into(), epoch: 0, revision: 0, protocol: PROTOCOL };
    let again = watched.ask(request, Some(watched.peer.clone())).await.err().unwrap();
    assert!(again.message().starts_with(UNLINKED), "{again:?}");
}

#[tokio::test]
async fn only_the_federators_of_the_linked_cluster_may_watch_and_only_for_it() {
    let watched = watched();
    let good = v1::WatchRequest { cluster: "west".into(), epoch: 0, revision: 0, protocol: PROTOCOL };
    let peer = watched.peer.clone();
    let changed = |change: fn(&mut tombolo_identity::PeerIdentity)| {
        let mut identity = peer.clone();
        change(&mut identity);
        Some(identity)
    };
    let member =
        changed(|p| p.spiffe_id = "spiffe://acme.example/cluster/west/ns/shop/sa/web".parse().unwrap());
    let other_tag = changed(|p| p.tag = tombolo_model::ids::ClusterTag::new(p.tag.value() ^ 1).unwrap());
    let other_cluster = changed(|p| p.cluster = name("north"));
    let cases = [
        ("nobody", good.clone(), None, Code::Unauthenticated, "authenticated"),
        ("a member of it", good.clone(), member, Code::PermissionDenied, "not a federator of west"),
        ("a recreated one", good.clone(), other_tag, Code::PermissionDenied, "as it was linked"),
        ("another cluster's", good.clone(), other_cluster, Code::FailedPrecondition, UNLINKED),
        (
            "for a cluster that is not linked",
            v1::WatchRequest { cluster: "north".into(), ..good.clone() },
            Some(peer.clone()),
            Code::FailedPrecondition,
            UNLINKED,
        ),
        (
            "no name",
            v1::WatchRequest { cluster: "W!".into(), ..good.clone() },
            Some(peer.clone()),
            Code::InvalidArgument,
            "cluster",
        ),
        (
            "an old protocol",
            v1::WatchRequest { protocol: 0, ..good },
            Some(peer.clone()),
            Code::FailedPrecondition,
            "upgrade west",
        ),
    ];
    for (case, request, identity, code, words) in cases {
        let status = watched.ask(request, identity).await.err().unwrap_or_else(|| panic!("{case}: let in"));
        assert_eq!(status.code(), code, "{case}: {status:?}");
        assert_says(status.message(), &[words]);
    }
}

#[test]
fn a_stream_with_older_facts_takes_nothing_back_from_another() {
    let (_world, mut east, _) = linked();
    east.serving("web", &["shop/web"], at(1));
    let peer = name("west");
    let older = east.core.facts.clone();
    let logs = Logs::default();
    let keys = |update: Option<Update<Told>>| match update {
        Some(Update::Snapshot { records, .. }) => {
            records.into_iter().map(|(key, _)| key).filter(|key| key.starts_with("export/")).collect()
        }
        other => panic!("{other:?}"),
    };
    let nothing = (Epoch(0), Revision(0));
    let newer = {
        let core = east.core.start().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let applied = core.attempt(|core, now| core.apply(export("shop/web", "west"), false, now));
        runtime.block_on(applied).unwrap();
        // Published after the answer.
        let mut facts = core.watch();
        runtime.block_on(facts.wait_for(|facts| facts.revision > older.revision)).unwrap().clone()
    };
    let told: Vec<String> = keys(logs.since(&newer, &peer, nothing));
    assert_eq!(told, ["export/shop/web"]);
    let told: Vec<String> = keys(logs.since(&older, &peer, nothing));
    assert_eq!(told, ["export/shop/web"], "what is newer stays");
}
