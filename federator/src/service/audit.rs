//! `Admin.Audit`: the audit log as a stream of pages, whole or filtered, and what comes while the reader stays.
//!
//! Pages come from the store, not from the core: a reader of the whole log holds up no issuance.

use std::pin::Pin;
use std::time::Duration;

use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tombolo_model::audit::{Action, Entry, Link, Outcome};
use tombolo_proto::v1;
use tombolo_runtime::tasks::TaskGroup;
use tonic::Status;

use crate::core::CoreError;
use crate::core::audit::{AuditReader, time_text};
use crate::store::StoreError;

/// What `limit` may ask for: they are held in memory, a kilobyte each.
const MOST_NEWEST: usize = 10_000;
/// A reader may meet the log while its oldest entries are dropped; the next look finds it settled.
const LOOKS: usize = 3;

pub type Entries = Pin<Box<dyn Stream<Item = Result<v1::AuditResponse, Status>> + Send>>;

/// Which entries a reader wants.
#[derive(Clone, Debug, Default)]
pub struct Query {
    after: u64,
    since: String,
    actions: Vec<Action>,
    identity: String,
    outcome: Option<Outcome>,
    limit: usize,
    follow: bool,
}

impl Query {
    pub fn from_wire(request: v1::AuditRequest) -> Result<Self, Status> {
        let v1::AuditRequest { after, since_unix_ms, actions, identity, outcome, limit, follow } = request;
        let since = match u64::try_from(since_unix_ms) {
            Ok(0) | Err(_) => String::new(),
            Ok(ms) => time_text(Duration::from_millis(ms)),
        };
        let actions = actions.iter().map(|action| action.parse()).collect::<Result<_, String>>();
        let outcome = if outcome.is_empty() { Ok(None) } else { outcome.parse().map(Some) };
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        if limit > MOST_NEWEST {
            let text = format!("field limit: {limit} is too many, at most {MOST_NEWEST}, or 0 for all");
            return Err(Status::invalid_argument(text));
        }
        Ok(Self {
            after,
            since,
            actions: actions.map_err(Status::invalid_argument)?,
            identity,
            outcome: outcome.map_err(Status::invalid_argument)?,
            limit,
            follow,
        })
    }

    fn wants(&self, entry: &Entry) -> bool {
        entry.sequence > self.after
            && entry.time >= self.since
            && (self.actions.is_empty() || self.actions.contains(&entry.action))
            && self.outcome.is_none_or(|outcome| outcome == entry.outcome)
            && (entry.subject.contains(&self.identity) || entry.requester.identity.contains(&self.identity))
    }
}

/// Streams what `query` wants.
pub fn stream(reader: AuditReader, query: Query, tasks: &TaskGroup) -> Entries {
    let (sender, receiver) = mpsc::channel(1);
    tasks.spawn("operator's audit", async move {
        if let Err(status) = send(&reader, &query, &sender).await {
            let _ = sender.send(Err(status)).await;
        }
    });
    Box::pin(ReceiverStream::new(receiver))
}

type Sender = mpsc::Sender<Result<v1::AuditResponse, Status>>;

async fn send(reader: &AuditReader, query: &Query, sender: &Sender) -> Result<(), Status> {
    let mut heads = reader.heads();
    let head = heads.borrow_and_update().clone();
    let mut last = if query.limit > 0 {
        let newest = newest(reader, query, &head).await.map_err(CoreError::from)?;
        let anchor = reader.anchor().map_err(CoreError::from)?;
        let response = response(newest.iter(), Some(&anchor));
        if sender.send(Ok(response)).await.is_err() {
            return Ok(());
        }
        head.sequence
    } else {
        let mut last = query.after;
        if !all(reader, query, &mut last, sender).await? {
            return Ok(());
        }
        last
    };
    if !query.follow {
        return Ok(());
    }
    loop {
        tokio::select! {
            changed = heads.changed() => if changed.is_err() { return Ok(()) },
            () = sender.closed() => return Ok(()),
        }
        heads.borrow_and_update();
        if !all(reader, query, &mut last, sender).await? {
            return Ok(());
        }
    }
}

/// The newest `limit` that are wanted, in order.
async fn newest(reader: &AuditReader, query: &Query, head: &Link) -> Result<Vec<Entry>, StoreError> {
    let anchor = reader.anchor()?.sequence.max(query.after);
    let mut found = Vec::new();
    let mut before = head.sequence + 1;
    'pages: loop {
        let page = reader.before(before)?;
        tokio::task::yield_now().await;
        let Some(oldest) = page.last() else { break };
        before = oldest.sequence;
        for entry in page {
            if entry.sequence <= anchor || entry.time < query.since || found.len() == query.limit {
                break 'pages;
            }
            if query.wants(&entry) {
                found.push(entry);
            }
        }
    }
    found.reverse();
    Ok(found)
}

/// Everything after `last` that is wanted; false when the reader is gone.
async fn all(reader: &AuditReader, query: &Query, last: &mut u64, sender: &Sender) -> Result<bool, Status> {
    let mut first = *last == query.after;
    loop {
        let (page, anchor) = continued(reader, *last).map_err(CoreError::from)?;
        // A page is read at once; others have their turn between two.
        tokio::task::yield_now().await;
        *last =
            page.last().map_or(*last, |entry| entry.sequence).max(anchor.as_ref().map_or(0, |a| a.sequence));
        let wanted = page.iter().filter(|entry| query.wants(entry));
        let response = response(wanted, anchor.as_ref());
        if (first || !response.entries_json.is_empty() || !response.anchor_hash.is_empty())
            && sender.send(Ok(response)).await.is_err()
        {
            return Ok(false);
        }
        if page.is_empty() {
            return Ok(true);
        }
        first = false;
    }
}

/// The next page, and the anchor when the page continues it. Entries up to an anchor count as dropped.
fn continued(reader: &AuditReader, last: u64) -> Result<(Vec<Entry>, Option<Link>), StoreError> {
    for _ in 0..LOOKS {
        let anchor = reader.anchor()?;
        let from = last.max(anchor.sequence);
        let page = reader.after(from)?;
        if page.first().is_none_or(|entry| entry.sequence == from + 1) {
            // A reader that has read up to the anchor needs none.
            return Ok((page, Some(anchor).filter(|anchor| last == 0 || anchor.sequence > last)));
        }
    }
    // As it is: whoever checks it will say where it breaks.
    Ok((reader.after(last)?, Some(reader.anchor()?)))
}

fn response<'a>(entries: impl Iterator<Item = &'a Entry>, anchor: Option<&Link>) -> v1::AuditResponse {
    v1::AuditResponse {
        entries_json: entries.map(|entry| serde_json::to_string(entry).unwrap_or_default()).collect(),
        anchor_sequence: anchor.map_or(0, |anchor| anchor.sequence),
        anchor_hash: anchor.map(|anchor| anchor.hash.clone()).unwrap_or_default(),
    }
}
