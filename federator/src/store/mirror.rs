//! What a store has committed, in memory: all tables but the logs. Reads never leave the process, and checks are made
//! against it, since one process alone writes.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use super::{Check, StoreError, Table, Write};

/// Values by table and key.
pub(super) type Values = BTreeMap<(Table, String), Vec<u8>>;

#[derive(Default)]
pub(super) struct Mirror(RwLock<Values>);

impl Mirror {
    pub(super) fn new(values: Values) -> Self {
        Self(RwLock::new(values))
    }

    pub(super) fn get(&self, table: Table, key: &str) -> Option<Vec<u8>> {
        self.read(|values| values.get(&(table, key.to_owned())).cloned())
    }

    pub(super) fn list(&self, table: Table) -> Vec<(String, Vec<u8>)> {
        self.read(|values| {
            let from = values.range((table, String::new())..).take_while(|((t, _), _)| *t == table);
            from.map(|((_, key), value)| (key.clone(), value.clone())).collect()
        })
    }

    pub(super) fn read<R>(&self, look: impl FnOnce(&Values) -> R) -> R {
        look(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The first check that does not hold.
    pub(super) fn check(&self, checks: &[Check]) -> Result<(), StoreError> {
        self.read(|values| {
            let held =
                |check: &&Check| values.get(&(check.table, check.key.clone())) != check.expected.as_ref();
            match checks.iter().find(held) {
                Some(check) => Err(StoreError::Conflict { table: check.table, key: check.key.clone() }),
                None => Ok(()),
            }
        })
    }

    /// What a commit has written.
    pub(super) fn apply(&self, writes: &[Write]) {
        let mut values = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for write in writes {
            match write {
                Write::Put { table, .. } | Write::Delete { table, .. } if !table.is_mirrored() => {}
                Write::Put { table, key, value } => {
                    values.insert((*table, key.clone()), value.clone());
                }
                Write::Delete { table, key } => {
                    values.remove(&(*table, key.clone()));
                }
            }
        }
    }
}
