//! Typed values: JSON with a version, so that a later federator reads what an earlier one wrote.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Store, StoreError, Table};

/// A value of one table.
pub trait Record: Serialize + DeserializeOwned {
    const TABLE: Table;
    /// Raised when a field changes its meaning; fields that are added carry `#[serde(default)]` instead.
    const VERSION: u32 = 1;
}

#[derive(Serialize)]
struct Written<'a, R> {
    v: u32,
    d: &'a R,
}

#[derive(Deserialize)]
struct Read<R> {
    v: u32,
    d: R,
}

/// The bytes of a record.
pub fn encode<R: Record>(record: &R) -> Vec<u8> {
    // Records are structs of strings, numbers, lists and maps with string keys: they always serialise.
    serde_json::to_vec(&Written { v: R::VERSION, d: record }).unwrap_or_default()
}

/// Reads a record; `key` is for the error.
pub fn decode<R: Record>(key: &str, value: &[u8]) -> Result<R, StoreError> {
    let broken = |reason: String| StoreError::Value { table: R::TABLE, key: key.to_owned(), reason };
    let Read { v, d } = serde_json::from_slice::<Read<R>>(value).map_err(|e| broken(e.to_string()))?;
    if v > R::VERSION {
        return Err(broken(format!("version {v}, this federator knows up to {}", R::VERSION)));
    }
    Ok(d)
}

/// One record.
pub fn get<R: Record>(store: &dyn Store, key: &str) -> Result<Option<R>, StoreError> {
    store.get(R::TABLE, key).map(|value| decode(key, &value)).transpose()
}

/// Every record of a table, by key.
pub fn list<R: Record>(store: &dyn Store) -> Result<Vec<(String, R)>, StoreError> {
    store.list(R::TABLE).into_iter().map(|(key, value)| Ok((key.clone(), decode(&key, &value)?))).collect()
}
