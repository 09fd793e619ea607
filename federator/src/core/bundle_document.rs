//! The sequence number of the bundle that foreign trust domains fetch: it grows with every change, over restarts too, and
//! with nothing else.

use serde::{Deserialize, Serialize};

use super::{Core, CoreError};
use crate::store::{Record, Table, Transaction, record};

/// Key of the one record, in [`Table::Meta`].
const KEY: &str = "bundle-document";

#[derive(Serialize, Deserialize)]
struct SequenceRecord {
    /// SHA-256 of the keys, hex.
    content: String,
    sequence: u64,
}
impl Record for SequenceRecord {
    const TABLE: Table = Table::Meta;
}

impl Core {
    /// The sequence number of a document with this content. After a lost store it starts from the time: readers refuse
    /// one that goes back.
    pub fn bundle_sequence(&mut self, content: &str, unix: u64) -> Result<u64, CoreError> {
        let known = record::get::<SequenceRecord>(&*self.store, KEY)?;
        let sequence = match known {
            Some(known) if known.content == content => return Ok(known.sequence),
            Some(known) => known.sequence.saturating_add(1).max(unix),
            None => unix,
        };
        let record = SequenceRecord { content: content.to_owned(), sequence };
        self.store.commit(&Transaction::new().put(KEY, &record))?;
        Ok(sequence)
    }
}
