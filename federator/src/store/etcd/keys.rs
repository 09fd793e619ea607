//! How the store lies in etcd. Below the prefix: `owner`, `sequence` (written by each commit), `t/TABLE/KEY` with a value, `c/TABLE/KEY<NUL>N`
//! with the pieces of a value that is larger than one request takes, `journal` and `j/JOURNAL/N` with a
//! transaction that is.

use std::collections::BTreeMap;

use etcd_client::{DeleteOptions, TxnOp};
use prost::Message;

use crate::store::{Table, Write};

/// A piece of a large value or of the journal: two of them and their keys are less than a request of 1.5 MB.
const PIECE: usize = 512 * 1024;
/// etcd takes 128 operations and 1.5 MB a request, unless told otherwise.
const MAX_OPS: usize = 100;
const MAX_BYTES: usize = 1024 * 1024;
/// First byte of a value: it follows, or the number of its pieces does.
const WHOLE: u8 = 0;
const IN_PIECES: u8 = 1;

/// Whether a value is kept in pieces.
fn is_large(value: &[u8]) -> bool {
    value.len() > PIECE
}

impl Write {
    /// Whether it leaves pieces.
    pub(super) fn is_large(&self) -> bool {
        matches!(self, Self::Put { value, .. } if is_large(value))
    }
}

/// One operation of a transaction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Op {
    Put(String, Vec<u8>),
    Delete(String),
    /// Keys from the first on, before the second.
    DeleteRange(String, String),
}

impl Op {
    fn bytes(&self) -> usize {
        match self {
            Self::Put(key, value) => key.len() + value.len(),
            Self::Delete(key) => key.len(),
            Self::DeleteRange(from, to) => from.len() + to.len(),
        }
    }
}

impl From<Op> for TxnOp {
    fn from(op: Op) -> Self {
        match op {
            Op::Put(key, value) => Self::put(key, value, None),
            Op::Delete(key) => Self::delete(key, None),
            Op::DeleteRange(from, to) => Self::delete(from, Some(DeleteOptions::new().with_range(to))),
        }
    }
}

/// What a stored value is.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Stored<'a> {
    Whole(&'a [u8]),
    Pieces(usize),
}

impl<'a> Stored<'a> {
    pub(super) fn of(bytes: &'a [u8]) -> Option<Self> {
        match bytes.split_first()? {
            (&WHOLE, value) => Some(Self::Whole(value)),
            (&IN_PIECES, count) => Some(Self::Pieces(std::str::from_utf8(count).ok()?.parse().ok()?)),
            _ => None,
        }
    }
}

/// Keys below a prefix.
#[derive(Debug)]
pub(super) struct Layout {
    prefix: String,
}

impl Layout {
    /// The version is of this layout.
    pub(super) fn new(prefix: &str) -> Self {
        Self { prefix: format!("{}/v1/", prefix.trim_end_matches('/')) }
    }
    pub(super) fn owner(&self) -> String {
        format!("{}owner", self.prefix)
    }
    pub(super) fn sequence(&self) -> String {
        format!("{}sequence", self.prefix)
    }
    pub(super) fn journal_mark(&self) -> String {
        format!("{}journal", self.prefix)
    }
    pub(super) fn journal_part(&self, journal: &str, number: usize) -> String {
        format!("{}j/{journal}/{number:08}", self.prefix)
    }
    /// The journal's mark and its parts.
    pub(super) fn without_journal(&self) -> TxnOp {
        // Both lie between `j` and `k`.
        let options = DeleteOptions::new().with_range(format!("{}k", self.prefix));
        TxnOp::delete(format!("{}j", self.prefix), Some(options))
    }
    pub(super) fn value(&self, table: Table, key: &str) -> String {
        format!("{}t/{table}/{key}", self.prefix)
    }
    /// From the first key of a table to the first after it ('0' follows '/').
    pub(super) fn table(&self, table: Table) -> (String, String) {
        (format!("{}t/{table}/", self.prefix), format!("{}t/{table}0", self.prefix))
    }
    /// The table's key in a key of ours.
    pub(super) fn key_of(&self, table: Table, key: &[u8]) -> Option<String> {
        let key = std::str::from_utf8(key).ok()?;
        key.strip_prefix(&self.table(table).0).map(str::to_owned)
    }
    /// All pieces of a value from `number` on.
    pub(super) fn pieces(&self, table: Table, key: &str, number: usize) -> (String, String) {
        let piece = |number| format!("{}c/{table}/{key}\0{number:08}", self.prefix);
        (piece(number), piece(99_999_999))
    }

    /// What makes a write; `pieces`: the key may have pieces.
    pub(super) fn ops(&self, write: &Write, pieces: bool) -> Vec<Op> {
        let (table, key) = write.at();
        let at = self.value(table, &key);
        let rest = |number| {
            let (from, to) = self.pieces(table, &key, number);
            Op::DeleteRange(from, to)
        };
        let mut ops = Vec::new();
        match write {
            Write::Put { value, .. } if is_large(value) => {
                let chunks = value.chunks(PIECE);
                let count = chunks.len();
                let put = |(number, piece): (usize, &[u8])| {
                    Op::Put(self.pieces(table, &key, number).0, piece.to_vec())
                };
                ops.extend(chunks.enumerate().map(put));
                ops.push(Op::Put(at, [&[IN_PIECES], count.to_string().as_bytes()].concat()));
                ops.push(rest(count));
                return ops;
            }
            Write::Put { value, .. } => ops.push(Op::Put(at, [&[WHOLE], value.as_slice()].concat())),
            Write::Delete { .. } => ops.push(Op::Delete(at)),
        }
        if pieces {
            ops.push(rest(0));
        }
        ops
    }
}

/// The last write to each key: etcd takes no key twice in a transaction.
pub(super) fn last_of_each(writes: &[Write]) -> Vec<Write> {
    let last: BTreeMap<_, _> = writes.iter().map(|write| (write.at(), write)).collect();
    last.into_values().cloned().collect()
}

/// Operations in their order, as many together as one request takes.
pub(super) fn groups(ops: Vec<Op>) -> Vec<Vec<Op>> {
    let mut groups: Vec<Vec<Op>> = vec![Vec::new()];
    let mut bytes = 0;
    for op in ops {
        let size = op.bytes();
        match groups.last_mut() {
            Some(group) if group.is_empty() || (group.len() < MAX_OPS && bytes + size <= MAX_BYTES) => {
                bytes += size;
                group.push(op);
            }
            _ => {
                bytes = size;
                groups.push(vec![op]);
            }
        }
    }
    groups
}

#[derive(Clone, PartialEq, Message)]
struct JournalWrite {
    #[prost(string, tag = "1")]
    table: String,
    #[prost(string, tag = "2")]
    key: String,
    /// Absent: the key is deleted.
    #[prost(bytes = "vec", optional, tag = "3")]
    value: Option<Vec<u8>>,
}

/// A transaction that is larger than a request.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Journal {
    #[prost(message, repeated, tag = "1")]
    writes: Vec<JournalWrite>,
}

impl Journal {
    pub(super) fn parts(writes: &[Write]) -> Vec<Vec<u8>> {
        let entry = |write: &Write| {
            let (table, key) = write.at();
            let value = match write {
                Write::Put { value, .. } => Some(value.clone()),
                Write::Delete { .. } => None,
            };
            JournalWrite { table: table.name().to_owned(), key, value }
        };
        let journal = Self { writes: writes.iter().map(entry).collect() };
        journal.encode_to_vec().chunks(PIECE).map(<[u8]>::to_vec).collect()
    }

    /// What says that all parts are there.
    pub(super) fn mark(journal: &str, parts: usize) -> String {
        format!("{journal} {parts}")
    }

    /// Which journal a mark is of, and how many parts that has.
    pub(super) fn marked(mark: &[u8]) -> Option<(&str, usize)> {
        let (journal, parts) = std::str::from_utf8(mark).ok()?.split_once(' ')?;
        Some((journal, parts.parse().ok()?))
    }

    /// `None`: it is not one.
    pub(super) fn read(bytes: &[u8]) -> Option<Vec<Write>> {
        let read = |JournalWrite { table, key, value }| {
            let table = Table::ALL.into_iter().find(|t| t.name() == table)?;
            Some(match value {
                Some(value) => Write::Put { table, key, value },
                None => Write::Delete { table, key },
            })
        };
        Self::decode(bytes).ok()?.writes.into_iter().map(read).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, bytes: usize) -> Write {
        Write::Put { table: Table::Links, key: key.to_owned(), value: vec![7; bytes] }
    }

    #[test]
    fn a_journal_reads_as_it_was_written_and_nothing_else_does() {
        let writes = vec![put("a", 3 * PIECE), Write::Delete { table: Table::Audit, key: "b".into() }];
        let parts = Journal::parts(&writes);
        assert!(parts.len() > 3 && parts.iter().all(|part| part.len() <= PIECE));
        assert_eq!(Journal::read(&parts.concat()), Some(writes));
        assert_eq!(Journal::read(&[1, 2, 3]), None);
        assert_eq!(Journal::marked(Journal::mark("1f-2", 3).as_bytes()), Some(("1f-2", 3)));
        assert_eq!((Journal::marked(b"3"), Journal::marked(b"a b")), (None, None));
    }

    #[test]
    fn groups_keep_order_and_fit_into_requests() {
        let ops: Vec<Op> = (0..250).map(|n| Op::Put(format!("{n:03}"), vec![0; 10_000])).collect();
        let groups = groups(ops.clone());
        assert!(
            groups.iter().all(|g| g.len() <= MAX_OPS && g.iter().map(Op::bytes).sum::<usize>() <= MAX_BYTES)
        );
        assert_eq!(groups.concat(), ops);
        assert_eq!(super::groups(Vec::new()).len(), 1);
    }

    #[test]
    fn a_large_value_is_kept_in_pieces_and_a_small_one_after_it_leaves_none() {
        let layout = Layout::new("/tombolo/east/");
        let ops = layout.ops(&put("a", 2 * PIECE + 1), false);
        assert_eq!(ops.len(), 5);
        assert_eq!(ops[3], Op::Put("/tombolo/east/v1/t/links/a".into(), b"\x013".to_vec()));
        let Op::DeleteRange(from, to) = &ops[4] else { panic!("{ops:?}") };
        assert!(from.ends_with("c/links/a\x0000000003") && from < to);
        let ops = layout.ops(&put("a", 1), true);
        assert_eq!(ops[0], Op::Put("/tombolo/east/v1/t/links/a".into(), vec![WHOLE, 7]));
        assert!(matches!(&ops[1], Op::DeleteRange(from, _) if from.ends_with("c/links/a\x0000000000")));
        assert_eq!(Stored::of(b"\x0012"), Some(Stored::Whole(b"12")));
        assert_eq!(Stored::of(b"\x0112"), Some(Stored::Pieces(12)));
        assert_eq!((Stored::of(b""), Stored::of(b"\x02"), Stored::of(b"\x01x")), (None, None, None));
    }

    #[test]
    fn tables_do_not_reach_into_each_other_and_the_journal_is_apart() {
        let layout = Layout::new("/p");
        let (from, to) = layout.table(Table::Links);
        let inside = |key: &str| from.as_str() <= key && key < to.as_str();
        assert!(inside(&layout.value(Table::Links, "~")) && !inside(&layout.value(Table::Leases, "a")));
        assert_eq!(
            layout.key_of(Table::Links, layout.value(Table::Links, "a/b").as_bytes()),
            Some("a/b".into())
        );
        for key in [layout.journal_mark(), layout.journal_part("a-1", 7)] {
            assert!(key.as_str() >= "/p/v1/j" && key.as_str() < "/p/v1/k", "{key}");
        }
        for key in [layout.owner(), layout.sequence(), layout.value(Table::Links, "a")] {
            assert!(key.as_str() < "/p/v1/j" || key.as_str() >= "/p/v1/k", "{key}");
        }
    }
}
