//! A store in etcd, for several federators of one cluster: one of them owns it and works, the others stand by, and the
//! next takes over when its lease ends (ADR 26).
//!
//! *One writer.* The owner's key hangs on a lease; every write is a transaction that compares that key's revision, so
//! that a federator which has been replaced and does not know it writes nothing. What is mirrored is as good as etcd's.
//! *An error means "unchanged".* The outcome of a request that got no answer is unknown: the next commit first puts back
//! what it may have written, and each compares the revision of the one before, so that a late request does nothing.
//! *etcd's limits* (128 operations, 1.5 MB a request): what is larger is written to a journal first, part by part, counts from the
//! moment when the journal is marked complete, and is applied from there, if need be by the next owner.
//! *etcd away*: the owner keeps serving and writes nothing; it ends only when somebody else owns the store.

mod keys;
mod link;
mod load;
mod owner;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use tokio::sync::watch;

use self::keys::{Journal, Layout, Op};
use self::link::Link;
use self::load::Loaded;
use self::owner::Ownership;
use super::mirror::Mirror;
use super::redb::RedbStore;
use super::{Page, Store, StoreError, Table, Transaction, Write};

/// An answer of an etcd that is well takes milliseconds; the core's thread waits no longer than this.
const PATIENCE: Duration = Duration::from_secs(3);
/// Values of a log that are asked for at once.
const PAGE: usize = 500;

/// Where the store is.
#[derive(Clone, Debug)]
pub struct EtcdConfig {
    /// `http://` or `https://` URLs of members.
    pub endpoints: Vec<String>,
    /// Before every key; what else is in that etcd lies elsewhere.
    pub prefix: String,
    /// PEM files: CAs of the servers, and the client's certificate and key.
    pub ca: Option<PathBuf>,
    pub certificate: Option<(PathBuf, PathBuf)>,
    pub user: Option<(String, PathBuf)>,
    /// An owner that is not heard for so long is replaced.
    pub lease: Duration,
    /// How this federator is called in logs of others; unique to the process.
    pub owner: String,
}

/// Why no store could be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{path} ({flag}) can't be read: {source}", path = path.display())]
    File { flag: &'static str, path: PathBuf, source: std::io::Error },
    #[error("--etcd-endpoint {endpoints}: {reason}")]
    Refused { endpoints: String, reason: String },
    #[error("the store's thread can't be started: {0}")]
    Thread(std::io::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// See the module.
pub struct EtcdStore {
    layout: Arc<Layout>,
    link: Link,
    ownership: Arc<Ownership>,
    mirror: Mirror,
    /// Keys of logs: etcd finds the newest only by going through all.
    logs: Mutex<BTreeSet<(Table, String)>>,
    commits: Mutex<Commits>,
    writable: AtomicBool,
    empty: bool,
}

/// What earlier commits left to do.
#[derive(Default)]
struct Commits {
    /// What a commit without an answer may have written.
    doubtful: Vec<Write>,
    /// A journal without an answer may be complete; nothing of it has been applied.
    doubtful_journal: bool,
    /// What is committed, and still in the journal alone.
    unapplied: Vec<Write>,
    /// Journals begun: a late part of one is no part of another.
    journals: u32,
}

/// How a fenced transaction ended.
enum Fenced {
    /// At this revision.
    Done(i64),
    /// By somebody else's ownership, if it names one, else by a write that was not expected.
    Refused(Option<String>),
}

impl EtcdStore {
    /// Waits until this federator owns the store, as long as it takes, and reads it.
    pub async fn open(config: EtcdConfig) -> Result<Self, OpenError> {
        let layout = Arc::new(Layout::new(&config.prefix));
        let (link, ownership, loaded) = Link::open(config, Arc::clone(&layout)).await?;
        let Loaded { values, logs, empty } = loaded;
        Ok(Self {
            layout,
            link,
            ownership,
            mirror: Mirror::new(values),
            logs: Mutex::new(logs),
            commits: Mutex::default(),
            writable: AtomicBool::new(true),
            empty,
        })
    }

    /// Whether nobody has ever written to it.
    pub fn is_empty(&self) -> bool {
        self.empty
    }

    /// Takes over everything from an embedded store, whole or not at all.
    ///
    /// # Errors
    /// When either can't be read or written, or something is here already.
    pub fn take_over(&self, from: &RedbStore) -> Result<usize, StoreError> {
        let mut writes = Vec::new();
        let mut put = |table, (key, value)| writes.push(Write::Put { table, key, value });
        for table in Table::ALL {
            if table.is_mirrored() {
                from.list(table).into_iter().for_each(|entry| put(table, entry));
                continue;
            }
            let mut last = String::new();
            loop {
                let page = from.after(table, &last, PAGE)?;
                let Some((key, _)) = page.last() else { break };
                last.clone_from(key);
                page.into_iter().for_each(|entry| put(table, entry));
            }
        }
        let count = writes.len();
        self.commit(&Transaction { checks: Vec::new(), writes })?;
        Ok(count)
    }

    /// Ends when somebody else has become the owner, with their name.
    pub async fn lost(&self) -> String {
        let mut lost: watch::Receiver<Option<String>> = self.ownership.lost();
        match lost.wait_for(Option::is_some).await {
            Ok(name) => name.clone().unwrap_or_default(),
            // The thread has ended: by `resign` alone.
            Err(_) => std::future::pending().await,
        }
    }

    /// Lets the next take over at once.
    pub async fn resign(&self) {
        self.ownership.resign().await;
    }

    fn fence(&self) -> Compare {
        Compare::create_revision(self.layout.owner(), CompareOp::Equal, self.ownership.revision())
    }

    /// A transaction that only the owner can make; with `point`, only after the last commit point, of which it is the next.
    fn fenced(&self, ops: Vec<TxnOp>, point: bool) -> Result<Fenced, StoreError> {
        let mut compares = vec![self.fence()];
        let mut ops = ops;
        if point {
            let sequence = self.layout.sequence();
            let last = self.ownership.sequence();
            compares.push(Compare::mod_revision(sequence.clone(), CompareOp::Equal, last));
            ops.push(TxnOp::put(sequence, self.ownership.name().as_bytes(), None));
        }
        let txn = Txn::new().when(compares).and_then(ops).or_else([TxnOp::get(self.layout.owner(), None)]);
        let answer = self.link.call(PATIENCE, |mut client| async move { client.txn(txn).await })?;
        if answer.succeeded() {
            let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
            if point {
                self.ownership.set_sequence(revision);
            }
            return Ok(Fenced::Done(revision));
        }
        let found = owner::found(&answer);
        Ok(Fenced::Refused(found.filter(|owner| owner.revision != self.ownership.revision()).map(|o| o.name)))
    }

    /// The same where only the owner's loss can be in the way.
    fn owned(&self, ops: Vec<TxnOp>, point: bool) -> Result<i64, StoreError> {
        match self.fenced(ops, point)? {
            Fenced::Done(revision) => Ok(revision),
            Fenced::Refused(Some(owner)) => Err(StoreError::NotOwner { owner }),
            Fenced::Refused(None) => Err(self.link.unreachable(
                "the lease has ended or an earlier request came late; it is looked at again".to_owned(),
            )),
        }
    }

    /// Undoes what has no known outcome, and finishes what is only in the journal.
    fn settle(&self, commits: &mut Commits) -> Result<(), StoreError> {
        if commits.doubtful_journal || !commits.doubtful.is_empty() {
            self.find_sequence()?;
            if commits.doubtful_journal {
                self.owned(vec![self.layout.without_journal()], true)?;
                commits.doubtful_journal = false;
            }
            if !commits.doubtful.is_empty() {
                let doubtful = commits.doubtful.clone();
                let restored: Vec<Write> = doubtful.iter().map(|write| self.restored(write)).collect();
                self.put(commits, &restored, &doubtful)?;
                commits.doubtful.clear();
                // Of a log only appending is undone: what such a commit was to remove is removed.
                let mut logs = self.log();
                for at in doubtful.iter().map(Write::at).filter(|(table, _)| !table.is_mirrored()) {
                    logs.remove(&at);
                }
            }
            tracing::warn!("a transaction without an answer is undone in etcd");
        }
        if !commits.unapplied.is_empty() {
            self.apply(&commits.unapplied)?;
            commits.unapplied.clear();
        }
        Ok(())
    }

    /// The revision of the last commit, which may be the one without an answer, but must be this federator's: what another
    /// has written meanwhile is not in the mirror.
    fn find_sequence(&self) -> Result<(), StoreError> {
        let key = self.layout.sequence();
        let found = self.link.call(PATIENCE, |mut client| async move { client.get(key, None).await })?;
        let last = found.kvs().first();
        let revision = last.map_or(0, etcd_client::KeyValue::mod_revision);
        if revision != self.ownership.sequence() {
            let by = last.map(|last| String::from_utf8_lossy(last.value()).into_owned()).unwrap_or_default();
            if by != self.ownership.name() {
                return Err(StoreError::NotOwner { owner: by });
            }
            self.ownership.set_sequence(revision);
        }
        Ok(())
    }

    /// The write that makes a key what the mirror says it is; entries of logs are written once, so they were not there.
    fn restored(&self, write: &Write) -> Write {
        let (table, key) = write.at();
        match self.mirror.get(table, &key) {
            Some(value) => Write::Put { table, key, value },
            None => Write::Delete { table, key },
        }
    }

    /// From a complete journal, part by part; again does no harm.
    fn apply(&self, writes: &[Write]) -> Result<(), StoreError> {
        let ops = writes.iter().flat_map(|write| self.layout.ops(write, true)).collect();
        for group in keys::groups(ops) {
            self.owned(group.into_iter().map(Op::into).collect(), false)?;
        }
        self.owned(vec![self.layout.without_journal()], false).map(drop)
    }

    /// Commits `writes`; `before`: what may lie at their keys.
    fn put(&self, commits: &mut Commits, writes: &[Write], before: &[Write]) -> Result<(), StoreError> {
        let pieces = |(write, before): (&Write, &Write)| self.layout.ops(write, before.is_large());
        let mut groups = keys::groups(writes.iter().zip(before).flat_map(pieces).collect());
        if groups.len() == 1 {
            let ops = groups.swap_remove(0).into_iter().map(Op::into).collect();
            return self.owned(ops, true).map(drop);
        }
        commits.journals = commits.journals.wrapping_add(1);
        let journal = format!("{:x}-{:x}", self.ownership.revision(), commits.journals);
        let parts = Journal::parts(writes);
        for (number, part) in parts.iter().enumerate() {
            let put = TxnOp::put(self.layout.journal_part(&journal, number), part.clone(), None);
            self.owned(vec![put], false)?;
        }
        let mark = Journal::mark(&journal, parts.len());
        let committed = self.owned(vec![TxnOp::put(self.layout.journal_mark(), mark, None)], true);
        commits.doubtful_journal = matches!(committed, Err(StoreError::Unreachable { .. }));
        committed?;
        // From here on it is committed, whatever happens to this process.
        if let Err(error) = self.apply(writes) {
            tracing::warn!(%error, "a large transaction is committed, and applied in etcd later");
            commits.unapplied = writes.to_vec();
        }
        Ok(())
    }

    fn write(&self, commits: &mut Commits, writes: &[Write]) -> Result<(), StoreError> {
        let before: Vec<Write> = writes.iter().map(|write| self.restored(write)).collect();
        let written = self.put(commits, writes, &before);
        if matches!(written, Err(StoreError::Unreachable { .. })) && !commits.doubtful_journal {
            commits.doubtful = writes.to_vec();
        }
        written
    }

    /// Values of a log by keys that are next to each other.
    fn page(&self, table: Table, keys: &[String]) -> Result<Page, StoreError> {
        let (Some(first), Some(last)) = (keys.first(), keys.last()) else { return Ok(Page::new()) };
        let (layout, from) = (Arc::clone(&self.layout), self.layout.value(table, first));
        let to = self.layout.value(table, &format!("{last}\0"));
        let read = move |client| async move { load::range(client, &layout, from, to, 0).await };
        let found = self.link.call(PATIENCE, read)?;
        Ok(found.into_iter().map(|((_, key), value)| (key, value)).collect())
    }

    fn log(&self) -> std::sync::MutexGuard<'_, BTreeSet<(Table, String)>> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for EtcdStore {
    fn get(&self, table: Table, key: &str) -> Option<Vec<u8>> {
        self.mirror.get(table, key)
    }

    fn list(&self, table: Table) -> Vec<(String, Vec<u8>)> {
        self.mirror.list(table)
    }

    fn after(&self, table: Table, key: &str, limit: usize) -> Result<Page, StoreError> {
        let keys: Vec<String> = {
            let logs = self.log();
            let from = (std::ops::Bound::Excluded((table, key.to_owned())), std::ops::Bound::Unbounded);
            let range = logs.range(from).take_while(|(t, _)| *t == table);
            range.take(limit).map(|(_, key)| key.clone()).collect()
        };
        self.page(table, &keys)
    }

    fn before(&self, table: Table, key: &str, limit: usize) -> Result<Page, StoreError> {
        let mut keys: Vec<String> = {
            let logs = self.log();
            let range = logs.range(..(table, key.to_owned())).rev().take_while(|(t, _)| *t == table);
            range.take(limit).map(|(_, key)| key.clone()).collect()
        };
        keys.reverse();
        let mut page = self.page(table, &keys)?;
        page.reverse();
        Ok(page)
    }

    fn commit(&self, transaction: &Transaction) -> Result<(), StoreError> {
        let mut commits = self.commits.lock().unwrap_or_else(PoisonError::into_inner);
        self.mirror.check(&transaction.checks)?;
        if transaction.is_empty() {
            return Ok(());
        }
        // The core's thread waits here: not for an etcd that is known to be silent.
        self.ownership.check().map_err(|owner| match owner {
            Some(owner) => StoreError::NotOwner { owner },
            None => self.link.unreachable("it does not answer".to_owned()),
        })?;
        let written = self
            .settle(&mut commits)
            .and_then(|()| self.write(&mut commits, &keys::last_of_each(&transaction.writes)));
        self.writable.store(written.is_ok(), Ordering::Relaxed);
        if let Err(StoreError::NotOwner { owner }) = &written {
            self.ownership.lose(owner.clone());
        }
        written?;
        self.mirror.apply(&transaction.writes);
        let mut logs = self.log();
        for write in &transaction.writes {
            match write {
                Write::Put { table, key, .. } if !table.is_mirrored() => {
                    logs.insert((*table, key.clone()));
                }
                Write::Delete { table, key } if !table.is_mirrored() => {
                    logs.remove(&(*table, key.clone()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn is_writable(&self) -> bool {
        self.writable.load(Ordering::Relaxed) && self.ownership.is_heard()
    }
}
