//! Properties of this cluster: those of `--property`, and those that its Kubernetes has as `ClusterProperty` objects.
//!
//! What the flag says holds over what Kubernetes says. Those of Kubernetes are kept in the store: peers' policies match them,
//! and a restart while the API server is away must not move traffic.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Core, CoreError};
use crate::facts::ClusterFacts;
use crate::import::{MAX_PROPERTIES, MAX_TEXT};
use crate::store::{Record, Store, StoreError, Table, Transaction, record};

/// Key in [`Table::Meta`].
const KEY: &str = "kubernetes-properties";

#[derive(Default, Serialize, Deserialize)]
struct PropertiesRecord {
    properties: BTreeMap<String, String>,
}
impl Record for PropertiesRecord {
    const TABLE: Table = Table::Meta;
}

/// `given` over `found`, as many and as long as peers take.
pub fn merged(
    given: &BTreeMap<String, String>,
    found: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let mut all = given.clone();
    for (name, value) in found {
        let fits = name.len() <= MAX_TEXT && value.len() <= MAX_TEXT && !value.is_empty();
        if fits && all.len() < MAX_PROPERTIES {
            all.entry(name.clone()).or_insert_with(|| value.clone());
        }
    }
    all
}

/// Those that Kubernetes had when they were last told.
pub fn stored(store: &dyn Store) -> Result<BTreeMap<String, String>, StoreError> {
    Ok(record::get::<PropertiesRecord>(store, KEY)?.unwrap_or_default().properties)
}

impl Core {
    /// Takes over what Kubernetes says, all of it.
    pub fn set_kubernetes_properties(&mut self, found: BTreeMap<String, String>) -> Result<(), CoreError> {
        if stored(&*self.store)? != found {
            let record = PropertiesRecord { properties: found.clone() };
            self.store.commit(&Transaction::new().put(KEY, &record))?;
        }
        let properties = merged(&self.given_properties, &found);
        if properties != self.facts.cluster.properties {
            self.facts.cluster = Arc::new(ClusterFacts { properties, ..(*self.facts.cluster).clone() });
            self.dirty = true;
            self.handles_stale = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_holds_and_what_peers_would_refuse_is_left_out() {
        let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
        };
        let long = "x".repeat(300);
        let all = merged(&map(&[("zone", "a")]), &map(&[("zone", "b"), ("region", "eu"), ("long", &long)]));
        assert_eq!(all, map(&[("region", "eu"), ("zone", "a")]));
        let many: BTreeMap<String, String> = (0..100).map(|n| (format!("p{n:03}"), "v".to_owned())).collect();
        assert_eq!(merged(&map(&[("zone", "a")]), &many).len(), MAX_PROPERTIES);
    }
}
