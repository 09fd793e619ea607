//! Which store a federator works with.

use std::path::Path;
use std::sync::Arc;

use crate::role::BuildError;
use crate::store::Store;
use crate::store::etcd::{EtcdConfig, EtcdStore};
use crate::store::redb::RedbStore;

const FILE: &str = "store.redb";

/// Opens it; one in etcd when this federator is the one that is to work.
pub(crate) async fn store(
    state_dir: &Path,
    etcd: Option<EtcdConfig>,
    import: bool,
) -> Result<(Arc<dyn Store>, Option<Arc<EtcdStore>>), BuildError> {
    let file = state_dir.join(FILE);
    let Some(config) = etcd else { return Ok((Arc::new(RedbStore::open(&file)?), None)) };
    let store = Arc::new(EtcdStore::open(config).await?);
    if store.is_empty() && file.exists() {
        if !import {
            store.resign().await;
            return Err(BuildError::TwoStores { file });
        }
        let values = store.take_over(&RedbStore::open(&file)?)?;
        // A start without etcd, or with an empty one, must not go back to it by a slip.
        let kept = file.with_extension("redb.imported");
        match std::fs::rename(&file, &kept) {
            Ok(()) => tracing::info!(values, file = %kept.display(), "etcd begins with what the file held"),
            Err(error) => tracing::error!(%error, file = %file.display(),
                "etcd begins with what the file holds, which can't be renamed: move it away"),
        }
    }
    Ok((Arc::clone(&store) as Arc<dyn Store>, Some(store)))
}

/// Ends when another federator has taken over.
pub(crate) async fn replaced(etcd: Option<&EtcdStore>) -> String {
    match etcd {
        Some(etcd) => etcd.lost().await,
        None => std::future::pending().await,
    }
}
