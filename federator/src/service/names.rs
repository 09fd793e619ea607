//! `Config.WatchNames`: what names resolve to in this cluster, for the resolvers of its sidecars and for its own.
//!
//! One task brings one log up to the facts; every reader is sent what it lacks: everything in pieces at first, then what
//! has changed. A sidecar gets all names of the cluster, since applications look up what they like: 10,000 are 1 MB once.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::Stream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tombolo_model::ids::{Epoch, Revision};
use tombolo_model::sync::{RecordLog, Update};
use tombolo_names::metrics::Metrics;
use tombolo_names::table::TableHandle;
use tombolo_proto::v1;
use tombolo_runtime::tasks::TaskGroup;
use tonic::Status;

use crate::core::CoreHandle;
use crate::facts::Facts;
use crate::names;

/// Changes that come within this are one: a name is there within a second of its export, across clusters too.
const PACE: Duration = Duration::from_millis(100);
/// And this many times what the last look at all names took: at most a twentieth of the thread, whatever the rate of
/// changes (10,000 names take some 20 ms).
const REST: u32 = 20;
/// Readers take three missed ones for a dead federator.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Services in one message: some 100 KB, well below what a reader takes (4 MB) with long names and headless ones.
const PIECE: usize = 500;

pub type Watched = Pin<Box<dyn Stream<Item = Result<v1::NamesEvent, Status>> + Send>>;

type Position = (Epoch, Revision);

/// The names of this cluster, and who follows them. Clones share them.
#[derive(Clone)]
pub struct Names {
    log: Arc<Mutex<RecordLog<v1::NamedService>>>,
    changed: watch::Sender<Position>,
}

impl Names {
    pub fn new(facts: &Facts) -> Self {
        let mut log = RecordLog::new(facts.cluster.epoch, Revision(facts.revision));
        log.replace(names::records(facts));
        let (changed, _) = watch::channel(log.position());
        Self { log: Arc::new(Mutex::new(log)), changed }
    }

    /// Brings the log up to the facts until the core has ended.
    pub async fn follow(self, core: CoreHandle) {
        let mut facts = core.watch();
        loop {
            let current = facts.borrow_and_update().clone();
            let begun = Instant::now();
            let wanted = names::records(&current);
            let position = {
                let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
                log.replace(wanted);
                log.position()
            };
            self.changed.send_if_modified(|known| std::mem::replace(known, position) != position);
            tokio::time::sleep(PACE.max(begun.elapsed() * REST)).await;
            if facts.changed().await.is_err() {
                return;
            }
        }
    }

    /// What a reader at `position` lacks.
    pub fn since(&self, (epoch, revision): Position) -> Option<Update<v1::NamedService>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).since(epoch, revision)
    }

    /// Wakes up whenever [`Names::since`] may have something new.
    pub fn changes(&self) -> watch::Receiver<Position> {
        self.changed.subscribe()
    }

    /// Keeps the table of this federator's own name server.
    pub async fn fill(self, table: TableHandle, metrics: Metrics) {
        let mut changed = self.changes();
        let mut position = (Epoch(0), Revision(0));
        loop {
            changed.borrow_and_update();
            if let Some(update) = self.since(position) {
                for event in to_wire(position.0, update) {
                    // Only the first piece of a whole update replaces what is there.
                    let whole = event.whole && position != (Epoch(event.epoch), Revision(event.revision));
                    let (updated, _) = table.load().updated(whole, &event.services, &event.gone);
                    position = (Epoch(event.epoch), Revision(event.revision));
                    metrics.names.set(i64::try_from(updated.len()).unwrap_or(i64::MAX));
                    table.store(updated);
                }
            }
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// A reader's stream.
    pub fn watch(&self, hello: &v1::NamesHello, tasks: &TaskGroup) -> Watched {
        let (sender, receiver) = mpsc::channel(1);
        let position = (Epoch(hello.epoch), Revision(hello.revision));
        tasks.spawn("names stream", self.clone().send(position, sender));
        Box::pin(ReceiverStream::new(receiver))
    }

    async fn send(self, mut position: Position, sender: mpsc::Sender<Result<v1::NamesEvent, Status>>) {
        let mut changed = self.changes();
        loop {
            changed.borrow_and_update();
            let events = match self.since(position) {
                Some(update) => to_wire(position.0, update),
                None => vec![v1::NamesEvent {
                    epoch: position.0.0,
                    revision: position.1.0,
                    ..v1::NamesEvent::default()
                }],
            };
            for event in events {
                position = (Epoch(event.epoch), Revision(event.revision));
                if sender.send(Ok(event)).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                news = changed.changed() => if news.is_err() {
                    return;
                },
                () = sender.closed() => return,
                () = tokio::time::sleep(HEARTBEAT) => {}
            }
        }
    }
}

/// An update in pieces; the last one says that it is complete.
fn to_wire(reader: Epoch, update: Update<v1::NamedService>) -> Vec<v1::NamesEvent> {
    let (epoch, revision, whole, services, gone) = match update {
        Update::Snapshot { epoch, revision, records } => (epoch, revision, true, records, Vec::new()),
        Update::Delta { revision, upserts, deletes } => (reader, revision, false, upserts, deletes),
    };
    let event = |services: &[(String, v1::NamedService)]| v1::NamesEvent {
        epoch: epoch.0,
        revision: revision.0,
        whole,
        services: services.iter().map(|(_, service)| service.clone()).collect(),
        gone: Vec::new(),
        more: true,
    };
    let mut events: Vec<v1::NamesEvent> = services.chunks(PIECE).map(event).collect();
    if events.is_empty() {
        events.push(event(&[]));
    }
    if let Some(last) = events.last_mut() {
        (last.gone, last.more) = (gone, false);
    }
    events
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;
    use crate::core::tests::{at, export, linked};

    async fn next(stream: &mut Watched) -> v1::NamesEvent {
        tokio::time::timeout(Duration::from_secs(20), stream.next()).await.unwrap().unwrap().unwrap()
    }

    #[test]
    fn a_large_update_comes_in_pieces_of_which_the_last_says_so() {
        let record = |n: usize| (format!("shop/s{n:05}"), v1::NamedService::default());
        let records: Vec<_> = (0..PIECE * 2 + 1).map(record).collect();
        let update = Update::Snapshot { epoch: Epoch(7), revision: Revision(9), records };
        let events = to_wire(Epoch(0), update);
        let sizes: Vec<_> = events.iter().map(|event| (event.services.len(), event.more)).collect();
        assert_eq!(sizes, [(PIECE, true), (PIECE, true), (1, false)]);
        assert!(events.iter().all(|event| event.whole && (event.epoch, event.revision) == (7, 9)));
        let empty = Update::Snapshot { epoch: Epoch(7), revision: Revision(9), records: Vec::new() };
        assert_eq!(to_wire(Epoch(0), empty).len(), 1, "that there is nothing is said, too");
    }

    #[tokio::test]
    async fn a_reader_gets_everything_then_changes_and_resumes_where_it_was() {
        let (_world, mut east, _west) = linked();
        east.serving("web", &["shop/web"], at(1));
        let core = east.core.start().unwrap();
        let tasks = TaskGroup::new();
        let names = Names::new(&core.facts());
        tasks.spawn("names", names.clone().follow(core.clone()));
        let mut stream = names.watch(&v1::NamesHello::default(), &tasks);
        let first = next(&mut stream).await;
        assert!(first.whole && !first.more);
        let [web] = first.services.as_slice() else { panic!("{first:?}") };
        assert!(!web.clusterset && web.local && web.addresses.len() == 1, "served and not exported: {web:?}");
        core.attempt(|core, moment| core.apply(export("shop/web", "west"), false, moment)).await.unwrap();
        let second = next(&mut stream).await;
        assert!(!second.whole && second.services.len() == 1 && second.services[0].clusterset, "{second:?}");
        assert_eq!(second.services[0].addresses, web.addresses, "the same address as before");
        let mut resumed =
            names.watch(&v1::NamesHello { epoch: first.epoch, revision: first.revision }, &tasks);
        assert_eq!(next(&mut resumed).await, second);
    }
}
