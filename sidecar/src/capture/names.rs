//! Which virtual addresses stand for which services: kept up from the federator's word.

use std::sync::Arc;

use tokio::sync::watch;

use super::targets::Targets;
use crate::tables::Tables;

/// Until the sender of the configuration is gone.
pub(crate) async fn follow(
    mut tables: watch::Receiver<Option<Arc<Tables>>>,
    targets: watch::Sender<Arc<Targets>>,
) {
    loop {
        if let Some(_tables) = tables.borrow_and_update().as_ref() {
            targets.send_modify(|targets| *targets = Arc::new(targets.with([], true)));
        }
        if tables.changed().await.is_err() {
            return;
        }
    }
}
