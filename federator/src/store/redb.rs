//! The embedded store: one redb file, fsync before a commit returns, opened at once after a crash (quick repair).
//!
//! All tables but the audit log are mirrored in memory (a cluster's facts are a few megabytes): reads never touch the disk,
//! so a failing disk stops writes and nothing else. redb refuses everything after an IO error; then the file is reopened by the next
//! commit, and whatever the failed transaction may have left there is put back to the mirror's state first (of a log, what
//! it appended is removed): an error always means "unchanged". Ends when dropped.

use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use redb::backends::InMemoryBackend;
use redb::{
    AccessGuard, CommitError, Database, DatabaseError, Durability, ReadableDatabase, ReadableTable,
    StorageBackend, StorageError, TableDefinition, TableError, TransactionError,
};

use super::mirror::{Mirror, Values};
use super::{Page, Store, StoreError, Table, Transaction, Write};

/// redb's own page cache: everything is mirrored already.
const CACHE_BYTES: usize = 4 * 1024 * 1024;

fn definition(table: Table) -> TableDefinition<'static, &'static str, &'static [u8]> {
    TableDefinition::new(table.name())
}

/// A store in one file.
pub struct RedbStore {
    path: PathBuf,
    /// The lock also serialises commits.
    file: Mutex<Opened>,
    mirror: Mirror,
    writable: AtomicBool,
}

#[derive(Default)]
struct Opened {
    /// `None` after an IO error, until a commit has reopened it.
    database: Option<Database>,
    /// Keys that a failed commit may have appended to logs.
    doubtful: Vec<(Table, String)>,
}

impl RedbStore {
    /// Opens or creates the file. A torn or foreign file is an error with a remedy, and is left as it is.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let database = open(path)?;
        let mirror = Mirror::new(load(path, &database)?);
        Ok(Self {
            path: path.to_owned(),
            file: Mutex::new(Opened { database: Some(database), doubtful: Vec::new() }),
            mirror,
            writable: AtomicBool::new(true),
        })
    }

    fn reopen(&self, doubtful: &[(Table, String)]) -> Result<Database, StoreError> {
        let database = open(&self.path)?;
        let found = load(&self.path, &database)?;
        let mut repair = self.mirror.read(|mirror| {
            let strange = found.keys().filter(|key| !mirror.contains_key(*key));
            let removed = strange.map(|(table, key)| Write::Delete { table: *table, key: key.clone() });
            let other = mirror.iter().filter(|(key, value)| found.get(*key) != Some(*value));
            let put = |((table, key), value): (&(Table, String), &Vec<u8>)| Write::Put {
                table: *table,
                key: key.clone(),
                value: value.clone(),
            };
            removed.chain(other.map(put)).collect::<Vec<_>>()
        });
        repair.extend(doubtful.iter().map(|(table, key)| Write::Delete { table: *table, key: key.clone() }));
        if !repair.is_empty() {
            tracing::warn!(values = repair.len(), "a failed transaction is undone in the store");
            write(&self.path, &database, &repair)?;
        }
        Ok(database)
    }

    /// A part of a log, from the disk. The file is locked only to begin: commits go on meanwhile.
    fn page(&self, table: Table, range: Range<'_>, limit: usize) -> Result<Page, StoreError> {
        let begun = {
            let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            let closed = || io_text(&self.path, "it is closed after a failed write".to_owned());
            file.database.as_ref().ok_or_else(closed)?.begin_read()
        };
        let transaction = begun.map_err(|e| transaction_error(&self.path, e))?;
        let opened = match transaction.open_table(definition(table)) {
            Ok(opened) => opened,
            Err(TableError::TableDoesNotExist(_)) => return Ok(Page::new()),
            Err(error) => return Err(table_error(&self.path, error)),
        };
        let owned = |entry: Result<(AccessGuard<'_, &'static str>, AccessGuard<'_, &'static [u8]>), _>| {
            let (key, value) = entry.map_err(|e| storage_error(&self.path, e))?;
            Ok((key.value().to_owned(), value.value().to_vec()))
        };
        let bounds = match range {
            Range::After(key) => (Bound::Excluded(key), Bound::Unbounded),
            Range::Before(key) => (Bound::Unbounded, Bound::Excluded(key)),
        };
        let found = opened.range::<&str>(bounds).map_err(|e| storage_error(&self.path, e))?;
        match range {
            Range::After(_) => found.take(limit).map(owned).collect(),
            Range::Before(_) => found.rev().take(limit).map(owned).collect(),
        }
    }
}

#[derive(Clone, Copy)]
enum Range<'a> {
    After(&'a str),
    Before(&'a str),
}

impl Store for RedbStore {
    fn get(&self, table: Table, key: &str) -> Option<Vec<u8>> {
        self.mirror.get(table, key)
    }

    fn list(&self, table: Table) -> Vec<(String, Vec<u8>)> {
        self.mirror.list(table)
    }

    fn after(&self, table: Table, key: &str, limit: usize) -> Result<Page, StoreError> {
        self.page(table, Range::After(key), limit)
    }

    fn before(&self, table: Table, key: &str, limit: usize) -> Result<Page, StoreError> {
        self.page(table, Range::Before(key), limit)
    }

    fn commit(&self, transaction: &Transaction) -> Result<(), StoreError> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        self.mirror.check(&transaction.checks)?;
        if transaction.is_empty() {
            return Ok(());
        }
        let database = match file.database.take() {
            Some(database) => database,
            None => self.reopen(&file.doubtful)?,
        };
        if let Err(error) = write(&self.path, &database, &transaction.writes) {
            self.writable.store(false, Ordering::Relaxed);
            drop(database);
            file.doubtful.extend(transaction.appended());
            return Err(error);
        }
        *file = Opened { database: Some(database), doubtful: Vec::new() };
        self.writable.store(true, Ordering::Relaxed);
        self.mirror.apply(&transaction.writes);
        Ok(())
    }

    fn is_writable(&self) -> bool {
        self.writable.load(Ordering::Relaxed)
    }
}

fn open(path: &Path) -> Result<Database, StoreError> {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    // A file cut short or overwritten trips assertions inside redb in some places: a damaged file must not be a crash.
    let opened = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        verify(path, &builder)?;
        builder.create(path).map_err(|error| database_error(path, error))
    }));
    let database = opened.unwrap_or_else(|_| Err(damaged(path, "its pages are torn")))?;
    // Keys and hashed secrets: for the owner alone.
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(path, private).map_err(|e| io_error(path, &e))?;
    Ok(database)
}

/// Whether every page of an existing file is as it was written: redb alone would read other values from flipped bytes, or
/// go back to an earlier commit without a word. On a copy in memory, because looking repairs, and what is damaged is left
/// as it is; a few megabytes, once per start.
fn verify(path: &Path, builder: &redb::Builder) -> Result<(), StoreError> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.len() > 0 => {}
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error(path, &error)),
    }
    // Only to see whether another process is writing: then what is read below may be half of a commit.
    if let Err(DatabaseError::DatabaseAlreadyOpen) = builder.open_read_only(path) {
        return Err(StoreError::InUse { path: path.to_owned() });
    }
    let bytes = std::fs::read(path).map_err(|e| io_error(path, &e))?;
    let copy = InMemoryBackend::new();
    copy.set_len(bytes.len() as u64)
        .and_then(|()| copy.write(0, &bytes))
        .map_err(|error| io_text(path, error.to_string()))?;
    drop(bytes);
    // Memory does not fail: what can't be read here is not in the file.
    let mut database = builder.create_with_backend(copy).map_err(|error| damaged(path, error))?;
    match database.check_integrity() {
        Ok(true) => Ok(()),
        Ok(false) => Err(damaged(path, "its checksums do not hold")),
        Err(error) => Err(damaged(path, error)),
    }
}

fn load(path: &Path, database: &Database) -> Result<Values, StoreError> {
    let read = || -> Result<Values, StoreError> {
        let mut mirror = Values::new();
        let transaction = database.begin_read().map_err(|e| transaction_error(path, e))?;
        for table in Table::ALL.into_iter().filter(|table| table.is_mirrored()) {
            let opened = match transaction.open_table(definition(table)) {
                Ok(opened) => opened,
                Err(TableError::TableDoesNotExist(_)) => continue,
                Err(error) => return Err(table_error(path, error)),
            };
            for entry in opened.iter().map_err(|e| storage_error(path, e))? {
                let (key, value) = entry.map_err(|e| storage_error(path, e))?;
                mirror.insert((table, key.value().to_owned()), value.value().to_vec());
            }
        }
        Ok(mirror)
    };
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(damaged(path, "its pages are torn")))
}

fn write(path: &Path, database: &Database, writes: &[Write]) -> Result<(), StoreError> {
    let mut transaction = database.begin_write().map_err(|e| transaction_error(path, e))?;
    transaction.set_durability(Durability::Immediate).map_err(|e| damaged(path, e.to_string()))?;
    transaction.set_quick_repair(true);
    for change in writes {
        match change {
            Write::Put { table, key, value } => {
                let mut table =
                    transaction.open_table(definition(*table)).map_err(|e| table_error(path, e))?;
                table.insert(key.as_str(), value.as_slice()).map_err(|e| storage_error(path, e))?;
            }
            Write::Delete { table, key } => {
                let mut table =
                    transaction.open_table(definition(*table)).map_err(|e| table_error(path, e))?;
                table.remove(key.as_str()).map_err(|e| storage_error(path, e))?;
            }
        }
    }
    transaction.commit().map_err(|error| match error {
        CommitError::Storage(error) => storage_error(path, error),
        error => io_text(path, error.to_string()),
    })
}

fn damaged(path: &Path, reason: impl ToString) -> StoreError {
    StoreError::Damaged { path: path.to_owned(), reason: reason.to_string() }
}

fn io_text(path: &Path, reason: String) -> StoreError {
    StoreError::Io { path: path.to_owned(), reason }
}

fn io_error(path: &Path, error: &std::io::Error) -> StoreError {
    use std::io::ErrorKind;
    match error.kind() {
        // EFBIG is what a file size limit (RLIMIT_FSIZE) answers, EDQUOT a quota.
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            StoreError::Full { path: path.to_owned() }
        }
        ErrorKind::UnexpectedEof | ErrorKind::InvalidData => damaged(path, error),
        _ => io_text(path, error.to_string()),
    }
}

fn storage_error(path: &Path, error: StorageError) -> StoreError {
    match error {
        StorageError::Io(error) => io_error(path, &error),
        StorageError::Corrupted(reason) => damaged(path, reason),
        error => io_text(path, error.to_string()),
    }
}

fn table_error(path: &Path, error: TableError) -> StoreError {
    match error {
        TableError::Storage(error) => storage_error(path, error),
        error => damaged(path, error),
    }
}

fn transaction_error(path: &Path, error: TransactionError) -> StoreError {
    match error {
        TransactionError::Storage(error) => storage_error(path, error),
        error => io_text(path, error.to_string()),
    }
}

fn database_error(path: &Path, error: DatabaseError) -> StoreError {
    match error {
        DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path: path.to_owned() },
        DatabaseError::Storage(error) => storage_error(path, error),
        error => damaged(path, error),
    }
}
