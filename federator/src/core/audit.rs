//! The audit log's writer: every entry in the transaction of what it records, refusals once a second.
//!
//! The head of the chain is here and nowhere else; it moves on when a commit has worked, so an entry is on the disk
//! exactly when what it tells of is. The oldest entries are dropped by count and age: first the anchor (sequence and
//! hash of the last one dropped) is stored, then they are deleted, so that a crash between the two leaves a chain that
//! continues its anchor. Readers take pages from the store by an [`AuditReader`].

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::watch;
use tombolo_model::audit::{Action, Entry, Event, Link, Requester};

use super::{Core, CoreError, Moment};
use crate::refusals::Refusals;
use crate::store::{Record, Store, StoreError, Table, Transaction, record};

/// Key of the anchor in [`Table::Meta`].
const ANCHOR: &str = "audit-anchor";
/// Looked at and dropped in one go: the core's thread is held for some milliseconds, once a second.
const PRUNED_AT_ONCE: usize = 2048;
/// Entries read at a time: under a megabyte.
pub const PAGE: usize = 256;
/// After every key: those are digits.
const END: &str = "~";

/// How much of the log is kept: what is beyond either is dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Retention {
    pub entries: u64,
    pub days: u64,
}

impl Default for Retention {
    /// Some 70 MB, and fifty days of a thousand members that renew twice a day; a year of a small cluster.
    fn default() -> Self {
        Self { entries: 100_000, days: 400 }
    }
}

impl Record for Entry {
    const TABLE: Table = Table::Audit;
}

#[derive(Serialize, Deserialize)]
struct AnchorRecord(Link);
impl Record for AnchorRecord {
    const TABLE: Table = Table::Meta;
}

/// The log as its writer holds it.
pub struct AuditLog {
    heads: watch::Sender<Link>,
    anchor: Link,
    keep: Retention,
    refusals: Refusals,
    /// On whose behalf the present job runs.
    requester: Requester,
}

fn key(sequence: u64) -> String {
    format!("{sequence:020}")
}

/// RFC 3339 in UTC with exactly three digits of milliseconds: texts sort as times do. Empty beyond the year 9999.
pub fn time_text(unix: Duration) -> String {
    let time = i64::try_from(unix.as_secs()).ok().and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok());
    let Some(time) = time.filter(|time| time.year() <= 9999) else { return String::new() };
    let (date, clock) = (time.date(), time.time());
    let (hour, minute, second) = clock.as_hms();
    format!("{date}T{hour:02}:{minute:02}:{second:02}.{:03}Z", unix.subsec_millis())
}

impl AuditLog {
    pub fn load(store: &dyn Store) -> Result<Self, StoreError> {
        let anchor = record::get::<AnchorRecord>(store, ANCHOR)?.map_or_else(Link::genesis, |a| a.0);
        let newest = store.before(Table::Audit, END, 1)?;
        let newest: Option<Entry> =
            newest.first().map(|(key, value)| record::decode(key, value)).transpose()?;
        let head = newest.map_or_else(|| anchor.clone(), |entry| entry.link());
        Ok(Self {
            heads: watch::channel(head).0,
            anchor,
            keep: Retention::default(),
            refusals: Refusals::default(),
            requester: Requester::default(),
        })
    }

    fn entries(&self) -> u64 {
        self.heads.borrow().sequence.saturating_sub(self.anchor.sequence)
    }
}

/// How many of the oldest entries are to be dropped. `entries`: how many there are; `oldest`: some of them, in order;
/// `before`: those of an earlier time are too old. A few more than `keep` may stay, so that not every entry drops one.
fn surplus(oldest: &[Entry], entries: u64, keep: Retention, before: &str) -> usize {
    let slack = (keep.entries / 8).min(256);
    let beyond =
        if entries > keep.entries.saturating_add(slack) { entries.saturating_sub(keep.entries) } else { 0 };
    let old = oldest.iter().take_while(|entry| entry.time.as_str() < before).count();
    usize::try_from(beyond).unwrap_or(usize::MAX).max(old).min(oldest.len())
}

impl Core {
    /// How much of the audit log is kept from now on.
    pub fn set_audit_retention(&mut self, keep: Retention) {
        self.audit.keep = keep;
    }

    /// Where everybody else reads the log.
    pub fn audit_reader(&self) -> AuditReader {
        AuditReader { store: Arc::clone(&self.store), heads: self.audit.heads.subscribe() }
    }

    /// Does `work`, which the log shows as done on behalf of `requester`.
    pub fn on_behalf<R>(&mut self, requester: Requester, work: impl FnOnce(&mut Self) -> R) -> R {
        self.audit.requester = requester;
        let done = work(self);
        self.audit.requester = Requester::default();
        done
    }

    /// Commits a transaction together with its entry in the log: both, or neither.
    pub(super) fn commit_audited(
        &mut self,
        transaction: Transaction,
        event: Event,
        moment: Moment,
    ) -> Result<(), StoreError> {
        self.commit_events(transaction, vec![event], moment)
    }

    fn commit_events(
        &mut self,
        mut transaction: Transaction,
        events: Vec<Event>,
        moment: Moment,
    ) -> Result<(), StoreError> {
        let mut head = self.audit.heads.borrow().clone();
        let time = time_text(moment.unix);
        for mut event in events {
            if event.requester == Requester::default() {
                event.requester = self.audit.requester.clone();
            }
            let entry = Entry::after(&head, self.facts.cluster.name.as_str(), time.clone(), event);
            transaction = transaction.put(key(entry.sequence), &entry);
            head = entry.link();
        }
        self.store.commit(&transaction)?;
        self.audit.heads.send_replace(head);
        Ok(())
    }

    /// Records what has no facts of its own in this store, such as steps of a rotation of the root.
    pub fn record_events(&mut self, events: Vec<Event>, moment: Moment) -> Result<(), CoreError> {
        Ok(self.commit_events(Transaction::new(), events, moment)?)
    }

    /// Notes a refusal for the log. What could not be done because of this side's own state is none.
    pub fn refused(&mut self, mut event: Event, error: &CoreError, moment: Moment) {
        if matches!(error, CoreError::Gone | CoreError::Store(_)) {
            return;
        }
        event.reason = error.to_string();
        self.note_refusal(event, moment);
    }

    /// The same with its reason in it.
    pub fn note_refusal(&mut self, mut event: Event, moment: Moment) {
        if event.requester == Requester::default() {
            event.requester = self.audit.requester.clone();
        }
        self.audit.refusals.note(event, moment.monotonic);
    }

    /// Requests that were turned away before anybody looked at them.
    pub fn turned_away(&mut self, action: Action, count: u64, moment: Moment) {
        if count > 0 {
            let reason = "too many requests at a time".to_owned();
            self.audit.refusals.count_only(action, count, reason, moment.monotonic);
        }
    }

    /// Once a second: refusals that are due, and entries whose time is over.
    pub(super) fn keep_audit_log(&mut self, moment: Moment) {
        let events = self.audit.refusals.due(moment.monotonic);
        self.write_refusals(events, moment);
        if let Err(error) = self.prune_audit_log(moment) {
            tracing::debug!(%error, "old audit entries can't be removed yet");
        }
    }

    /// The process ends: what was counted is written.
    pub(super) fn end_audit_log(&mut self, moment: Moment) {
        let events = self.audit.refusals.all();
        self.write_refusals(events, moment);
    }

    fn write_refusals(&mut self, events: Vec<Event>, moment: Moment) {
        if events.is_empty() {
            return;
        }
        if let Err(error) = self.commit_events(Transaction::new(), events.clone(), moment) {
            tracing::debug!(%error, "refusals can't be recorded yet");
            for event in events {
                self.audit.refusals.note(event, moment.monotonic);
            }
        }
    }

    fn prune_audit_log(&mut self, moment: Moment) -> Result<(), CoreError> {
        let keep = self.audit.keep;
        let age = Duration::from_secs(keep.days.saturating_mul(86_400));
        let before = time_text(moment.unix.saturating_sub(age));
        let over = self.audit.entries() > keep.entries;
        // Ages are looked at once a minute: the oldest entry is read from the disk for it.
        if !over && !moment.monotonic.as_secs().is_multiple_of(60) {
            return Ok(());
        }
        let page = self.store.after(Table::Audit, "", PRUNED_AT_ONCE)?;
        let anchor = key(self.audit.anchor.sequence);
        // A crash came between a new anchor and the end of what it stands for.
        let dropped = page.iter().take_while(|(key, _)| *key <= anchor).count();
        let oldest: Vec<Entry> = page
            .iter()
            .skip(dropped)
            .map(|(key, value)| record::decode(key, value))
            .collect::<Result<_, _>>()?;
        let surplus = surplus(&oldest, self.audit.entries(), keep, &before);
        if let Some(last) = surplus.checked_sub(1).and_then(|index| oldest.get(index)) {
            let anchor = last.link();
            self.store.commit(&Transaction::new().put(ANCHOR, &AnchorRecord(anchor.clone())))?;
            self.audit.anchor = anchor;
        }
        let gone = page.into_iter().take(dropped + surplus);
        let transaction = gone.fold(Transaction::new(), |t, (key, _)| t.delete(Table::Audit, key));
        Ok(self.store.commit(&transaction)?)
    }
}

/// Reads the log; clones share it.
#[derive(Clone)]
pub struct AuditReader {
    store: Arc<dyn Store>,
    heads: watch::Receiver<Link>,
}

impl AuditReader {
    /// What the oldest entry continues.
    pub fn anchor(&self) -> Result<Link, StoreError> {
        Ok(record::get::<AnchorRecord>(&*self.store, ANCHOR)?.map_or_else(Link::genesis, |a| a.0))
    }

    /// The newest entry of now, and a change with each later one.
    pub fn heads(&self) -> watch::Receiver<Link> {
        self.heads.clone()
    }

    /// At most [`PAGE`] entries after a sequence.
    pub fn after(&self, sequence: u64) -> Result<Vec<Entry>, StoreError> {
        decoded(self.store.after(Table::Audit, &key(sequence), PAGE)?)
    }

    /// At most [`PAGE`] entries before a sequence, the newest first.
    pub fn before(&self, sequence: u64) -> Result<Vec<Entry>, StoreError> {
        decoded(self.store.before(Table::Audit, &key(sequence), PAGE)?)
    }
}

fn decoded(page: crate::store::Page) -> Result<Vec<Entry>, StoreError> {
    page.iter().map(|(key, value)| record::decode(key, value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_sort_as_texts() {
        let at = |ms| time_text(Duration::from_millis(ms));
        assert_eq!(at(1_795_486_505_000), "2026-11-24T02:15:05.000Z");
        assert_eq!(at(1_795_486_505_007), "2026-11-24T02:15:05.007Z");
        assert!(at(1_795_486_505_999) < at(1_795_486_506_000));
        assert_eq!(time_text(Duration::MAX), "");
    }

    #[test]
    fn the_surplus_is_by_count_and_by_age_and_never_more_than_was_looked_at() {
        let mut head = Link::genesis();
        let oldest: Vec<Entry> = (0..10)
            .map(|n| {
                let time = time_text(Duration::from_secs(n));
                let entry = Entry::after(&head, "east", time, Event::done(Action::Join, "x"));
                head = entry.link();
                entry
            })
            .collect();
        let keep = |entries| Retention { entries, days: 1 };
        let old = |seconds| time_text(Duration::from_secs(seconds));
        assert_eq!(surplus(&oldest, 100, keep(100), &old(0)), 0);
        assert_eq!(surplus(&oldest, 110, keep(100), &old(0)), 0, "within the slack");
        assert_eq!(surplus(&oldest, 113, keep(100), &old(0)), 10, "only what was looked at");
        assert_eq!(surplus(&oldest, 12, keep(10), &old(0)), 2);
        assert_eq!(surplus(&oldest, 10, keep(100), &old(4)), 4);
        assert_eq!(surplus(&[], 113, keep(100), &old(4)), 0);
    }
}
