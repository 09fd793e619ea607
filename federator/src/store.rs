//! The store: small tables of versioned values, changed by atomic compare-and-swap transactions.
//!
//! Reads of a [`Store`] are of the last committed state, [`Store::commit`] applies all writes if all checks hold, else
//! nothing. [`redb`](mod@redb) is the embedded one, a file; [`etcd`] is for several federators of a cluster, of which one
//! works. [`record`] gives values a type and a version. Who writes: the core thread alone.

use std::fmt;
use std::path::PathBuf;

pub mod etcd;
mod mirror;
pub mod record;
pub mod redb;

pub use record::{Record, get, list};

/// The tables, each with one kind of value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Table {
    /// What operators applied: `Kind/namespace/name`.
    Objects,
    /// Blocks of endpoint ids, by block in hex.
    Leases,
    /// Handles, by number in hex.
    Handles,
    /// Join and link tokens, by id; secrets hashed.
    Tokens,
    /// Links, by peer.
    Links,
    /// SVIDs issued, by serial.
    Identities,
    /// Epoch, start counter, keys; JWT signing keys.
    Meta,
    /// Failover decisions that sidecars reported, by reporter and sequence.
    Shifts,
    /// What a peer exports to us, last state, by peer.
    Imports,
    /// The audit log, by sequence.
    Audit,
    /// Virtual addresses, by service.
    Addresses,
}

impl Table {
    pub const ALL: [Self; 11] = [
        Self::Objects,
        Self::Leases,
        Self::Handles,
        Self::Tokens,
        Self::Links,
        Self::Identities,
        Self::Meta,
        Self::Shifts,
        Self::Imports,
        Self::Audit,
        Self::Addresses,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Objects => "objects",
            Self::Leases => "leases",
            Self::Handles => "handles",
            Self::Tokens => "tokens",
            Self::Links => "links",
            Self::Identities => "identities",
            Self::Meta => "meta",
            Self::Shifts => "shifts",
            Self::Imports => "imports",
            Self::Audit => "audit",
            Self::Addresses => "addresses",
        }
    }

    /// Whether all of it is in memory. Else it is a log: its keys are written once, in ascending order, and read page by
    /// page from the disk.
    pub fn is_mirrored(self) -> bool {
        self != Self::Audit
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why the store could not do what was asked. The state is as before in every case.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{table}/{key} was changed by somebody else in the meantime; nothing was written")]
    Conflict { table: Table, key: String },
    #[error("the disk under {} is full; nothing was written: free some space", path.display())]
    Full { path: PathBuf },
    #[error("the store {} can't be written ({reason}); nothing was changed: check the disk", path.display())]
    Io { path: PathBuf, reason: String },
    #[error(
        "the store {} is damaged ({reason}): restore it from a backup, or move it away; then members keep their leases, and links are made anew",
        path.display()
    )]
    Damaged { path: PathBuf, reason: String },
    #[error("the store {} is in use by another process: stop the other federator, or give another --state-dir", path.display())]
    InUse { path: PathBuf },
    #[error(
        "{table}/{key} does not read ({reason}): it was written by a newer version, or the store is damaged"
    )]
    Value { table: Table, key: String, reason: String },
    #[error("etcd at {endpoints} can't be used ({reason}); nothing was changed: check it, and the way to it")]
    Unreachable { endpoints: String, reason: String },
    #[error(
        "{owner} has taken over this cluster's store in etcd; what this federator wanted to write was not written"
    )]
    NotOwner { owner: String },
}

impl StoreError {
    /// A metric label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Conflict { .. } => "conflict",
            Self::Full { .. } => "full",
            Self::Io { .. } => "io",
            Self::Damaged { .. } => "damaged",
            Self::InUse { .. } => "in_use",
            Self::Value { .. } => "value",
            Self::Unreachable { .. } => "unreachable",
            Self::NotOwner { .. } => "not_owner",
        }
    }
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Conflict { .. } | Self::Full { .. } | Self::Io { .. } | Self::Unreachable { .. })
    }
}

/// A value that must be found as expected for a transaction to apply.
#[derive(Clone, Debug)]
pub struct Check {
    pub table: Table,
    pub key: String,
    /// `None`: the key must not exist.
    pub expected: Option<Vec<u8>>,
}

/// One change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Write {
    Put { table: Table, key: String, value: Vec<u8> },
    Delete { table: Table, key: String },
}

impl Write {
    /// What it is about.
    pub fn at(&self) -> (Table, String) {
        match self {
            Self::Put { table, key, .. } | Self::Delete { table, key } => (*table, key.clone()),
        }
    }
}

/// Checks and writes that apply together or not at all.
#[derive(Clone, Debug, Default)]
pub struct Transaction {
    pub checks: Vec<Check>,
    pub writes: Vec<Write>,
}

impl Transaction {
    pub fn new() -> Self {
        Self::default()
    }
    /// Only if `key` does not exist.
    pub fn absent(mut self, table: Table, key: impl Into<String>) -> Self {
        self.checks.push(Check { table, key: key.into(), expected: None });
        self
    }
    /// Only if `key` has exactly this value.
    pub fn unchanged(mut self, table: Table, key: impl Into<String>, value: Vec<u8>) -> Self {
        self.checks.push(Check { table, key: key.into(), expected: Some(value) });
        self
    }
    pub fn put<R: Record>(mut self, key: impl Into<String>, record: &R) -> Self {
        let value = record::encode(record);
        self.writes.push(Write::Put { table: R::TABLE, key: key.into(), value });
        self
    }
    pub fn delete(mut self, table: Table, key: impl Into<String>) -> Self {
        self.writes.push(Write::Delete { table, key: key.into() });
        self
    }
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }
    /// What it appends to logs.
    fn appended(&self) -> impl Iterator<Item = (Table, String)> + '_ {
        self.writes.iter().filter_map(|write| match write {
            Write::Put { table, key, .. } if !table.is_mirrored() => Some((*table, key.clone())),
            _ => None,
        })
    }
}

/// Keys and values of a log.
pub type Page = Vec<(String, Vec<u8>)>;

/// Where the federator keeps what must survive it.
pub trait Store: Send + Sync {
    /// The committed value of a key.
    fn get(&self, table: Table, key: &str) -> Option<Vec<u8>>;
    /// Every committed key and value of a table, in order of keys.
    fn list(&self, table: Table) -> Vec<(String, Vec<u8>)>;
    /// At most `limit` committed keys and values of a log, in order, whose keys come after `key`.
    fn after(&self, table: Table, key: &str, limit: usize) -> Result<Page, StoreError>;
    /// The same backwards from before `key`: the newest first.
    fn before(&self, table: Table, key: &str, limit: usize) -> Result<Page, StoreError>;
    /// Applies a transaction; on return it is on the disk.
    fn commit(&self, transaction: &Transaction) -> Result<(), StoreError>;
    /// Whether the last commit worked: what readiness and `status` show.
    fn is_writable(&self) -> bool;
}
