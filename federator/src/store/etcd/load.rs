//! Reading the store: what a journal holds first, then every table but the logs, and the logs' keys.

use std::collections::BTreeSet;

use etcd_client::{Client, Compare, CompareOp, Error, GetOptions, KeyValue, Txn, TxnOp};

use super::keys::{self, Journal, Layout, Op, Stored};
use super::owner::{self, Ownership};
use crate::store::mirror::Values;
use crate::store::{StoreError, Table, Write};

/// Keys with values that are asked for at once, and keys alone.
const WITH_VALUES: i64 = 100;
const KEYS: i64 = 10_000;
/// Of one answer: a hundred values of half a megabyte.
const MAX_ANSWER: usize = 64 * 1024 * 1024;

/// What was there.
pub(super) struct Loaded {
    pub(super) values: Values,
    pub(super) logs: BTreeSet<(Table, String)>,
    pub(super) empty: bool,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum LoadError {
    #[error(transparent)]
    Etcd(#[from] Error),
    #[error(transparent)]
    Store(#[from] StoreError),
}

pub(super) async fn load(
    mut client: Client,
    layout: &Layout,
    ownership: &Ownership,
) -> Result<Loaded, LoadError> {
    let sequence = client.get(layout.sequence(), None).await?;
    ownership.set_sequence(sequence.kvs().first().map_or(0, KeyValue::mod_revision));
    let empty = sequence.kvs().is_empty();
    finish_journal(&mut client, layout, ownership).await?;
    let mut loaded = Loaded { values: Values::new(), logs: BTreeSet::new(), empty };
    for table in Table::ALL {
        let (from, to) = layout.table(table);
        if table.is_mirrored() {
            loaded.values.extend(range(client.clone(), layout, from, to, 0).await?);
            continue;
        }
        let mut from = from;
        loop {
            let options = GetOptions::new().with_range(to.clone()).with_keys_only().with_limit(KEYS);
            let found = client.get(from, Some(options)).await?;
            let keys = found.kvs().iter().filter_map(|kv| layout.key_of(table, kv.key()));
            loaded.logs.extend(keys.map(|key| (table, key)));
            match found.kvs().last() {
                Some(last) if found.more() => from = after(last.key()),
                _ => break,
            }
        }
    }
    Ok(loaded)
}

fn after(key: &[u8]) -> String {
    format!("{}\0", String::from_utf8_lossy(key))
}

/// Every value between two keys of a table, at one revision (0: the newest).
pub(super) async fn range(
    client: Client,
    layout: &Layout,
    from: String,
    to: String,
    revision: i64,
) -> Result<Vec<((Table, String), Vec<u8>)>, Error> {
    let mut kv = client.kv_client().max_decoding_message_size(MAX_ANSWER);
    let mut found = Vec::new();
    let (mut from, mut revision) = (from, revision);
    loop {
        let options =
            GetOptions::new().with_range(to.clone()).with_limit(WITH_VALUES).with_revision(revision);
        let answer = kv.get(from, Some(options)).await?;
        if revision == 0 {
            revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        }
        for entry in answer.kvs() {
            let Some((table, key)) =
                Table::ALL.into_iter().find_map(|table| Some((table, layout.key_of(table, entry.key())?)))
            else {
                continue;
            };
            let value = match Stored::of(entry.value()) {
                Some(Stored::Whole(value)) => value.to_vec(),
                Some(Stored::Pieces(count)) => {
                    let (first, end) = layout.pieces(table, &key, 0);
                    let options = GetOptions::new().with_range(end).with_revision(revision);
                    let pieces = kv.get(first, Some(options)).await?;
                    if pieces.kvs().len() != count {
                        return Err(broken(entry, "pieces of it are missing"));
                    }
                    pieces.kvs().iter().flat_map(|piece| piece.value().iter().copied()).collect()
                }
                None => return Err(broken(entry, "it is not as this version writes it")),
            };
            found.push(((table, key), value));
        }
        match answer.kvs().last() {
            Some(last) if answer.more() => from = after(last.key()),
            _ => return Ok(found),
        }
    }
}

fn broken(entry: &KeyValue, reason: &str) -> Error {
    let key = String::from_utf8_lossy(entry.key());
    Error::InvalidArgs(format!("{key} does not read ({reason}): restore etcd from a backup"))
}

/// Applies what a former owner had committed, and removes what it had not.
async fn finish_journal(
    client: &mut Client,
    layout: &Layout,
    ownership: &Ownership,
) -> Result<(), LoadError> {
    let mark = client.get(layout.journal_mark(), None).await?;
    if let Some(mark) = mark.kvs().first() {
        let (journal, count) = Journal::marked(mark.value())
            .ok_or_else(|| broken(mark, "it is not as this version writes it"))?;
        let mut bytes = Vec::new();
        for number in 0..count {
            let part = client.get(layout.journal_part(journal, number), None).await?;
            let part = part.kvs().first().ok_or_else(|| broken(mark, "parts of it are missing"))?;
            bytes.extend_from_slice(part.value());
        }
        let writes: Vec<Write> =
            Journal::read(&bytes).ok_or_else(|| broken(mark, "it is not as this version writes it"))?;
        tracing::info!(writes = writes.len(), "a large transaction of the last owner is finished");
        let ops = keys::last_of_each(&writes).iter().flat_map(|write| layout.ops(write, true)).collect();
        for group in keys::groups(ops) {
            fenced(client, layout, ownership, group.into_iter().map(Op::into).collect()).await?;
        }
    }
    fenced(client, layout, ownership, vec![layout.without_journal()]).await
}

async fn fenced(
    client: &mut Client,
    layout: &Layout,
    ownership: &Ownership,
    ops: Vec<TxnOp>,
) -> Result<(), LoadError> {
    let own = Compare::create_revision(layout.owner(), CompareOp::Equal, ownership.revision());
    let get = TxnOp::get(layout.owner(), None);
    let answer = client.txn(Txn::new().when([own]).and_then(ops).or_else([get])).await?;
    if answer.succeeded() {
        return Ok(());
    }
    let owner = owner::found(&answer).map_or_else(|| "nobody".to_owned(), |owner| owner.name);
    Err(StoreError::NotOwner { owner }.into())
}
