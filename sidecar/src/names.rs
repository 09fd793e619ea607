//! The sidecar's names: followed from the federator, kept on disk for the next start, served to local applications,
//! and what their captured connections are carried to.
//!
//! [`NamesTask`] applies what the federator streams to a [`TableHandle`]; the name server reads it on a thread of its own.
//! Without a federator the last names keep being served. Ends with the sidecar.

use std::path::{Path, PathBuf};
use std::time::Duration;

use prost::Message;
use tokio::sync::watch;
use tokio::time::Instant;
use tombolo_identity::files;
use tombolo_names::metrics::Metrics;
use tombolo_names::table::{MAX_SERVICES, NameTable, TableHandle};
use tombolo_overlay::Overlay;
use tombolo_overlay::member::Member;
use tombolo_proto::v1;
use tombolo_proto::v1::config_client::ConfigClient;

/// An event comes at least every 5 s: three missed ones, and another federator is tried.
const SILENCE: Duration = Duration::from_secs(16);
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// After a stream that a federator ended at once.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);
const FILE: &str = "names.pb";
/// 10,000 names are 1 MB; a start with names that are some seconds old is as good.
const STORE_EVERY: Duration = Duration::from_secs(10);
/// As many names as a table holds, with a few hundred bytes each.
const MAX_FILE_BYTES: u64 = 64 * 1024 * 1024;

/// Follows the names of the cluster.
#[derive(Debug)]
pub struct NamesTask {
    member: Member,
    overlay: Overlay,
    table: TableHandle,
    metrics: Metrics,
    /// Whether a federator has told all names; sent with every change of the table.
    whole: watch::Sender<bool>,
    position: v1::NamesHello,
    /// Of an update that is not complete yet.
    pending: Vec<v1::NamedService>,
    unsaved: bool,
    saved: Option<Instant>,
}

impl NamesTask {
    /// With the names that an earlier process left, if they can be read.
    pub fn new(member: Member, overlay: Overlay, table: TableHandle, metrics: Metrics) -> Self {
        if let Some(services) = last_names(member.dir()) {
            let (restored, _) = NameTable::default().updated(true, &services, &[]);
            metrics.names.set(i64::try_from(restored.len()).unwrap_or(i64::MAX));
            tracing::info!(names = restored.len(), "resolving by the last names until a federator answers");
            table.store(restored);
        }
        Self {
            member,
            overlay,
            table,
            metrics,
            whole: watch::channel(false).0,
            position: v1::NamesHello::default(),
            pending: Vec::new(),
            unsaved: false,
            saved: None,
        }
    }

    /// Wakes up with every change of the table; false until a federator has told all names.
    pub fn whole(&self) -> watch::Receiver<bool> {
        self.whole.subscribe()
    }

    pub async fn run(mut self) {
        loop {
            if let Err(error) = self.watch().await {
                tracing::info!(%error, "no names from a federator; those that are known stay");
            }
            tokio::time::sleep(REOPEN_PAUSE.mul_f64(0.5 + rand::random::<f64>())).await;
        }
    }

    async fn watch(&mut self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let channel = self.member.connect(&self.overlay).await?;
        let mut client = ConfigClient::new(channel);
        let opened = tokio::time::timeout(CALL_TIMEOUT, client.watch_names(self.position)).await?;
        let mut events = opened.map_err(|status| status.message().to_owned())?.into_inner();
        self.pending.clear();
        loop {
            let wait = if self.unsaved { STORE_EVERY } else { SILENCE };
            let next = match tokio::time::timeout(wait, events.message()).await {
                Ok(next) => next,
                Err(_) if self.unsaved => {
                    self.save().await;
                    continue;
                }
                Err(silent) => return Err(silent.into()),
            };
            let Some(event) = next.map_err(|status| status.message().to_owned())? else { return Ok(()) };
            if let Err(error) = self.apply(event) {
                self.position = v1::NamesHello::default();
                return Err(error.into());
            }
            if self.unsaved && self.saved.is_none_or(|saved| saved.elapsed() >= STORE_EVERY) {
                self.save().await;
            }
        }
    }

    /// Takes an event over. The error: what comes does not follow from what is known, everything is asked for anew.
    fn apply(&mut self, event: v1::NamesEvent) -> Result<(), String> {
        let v1::NamesEvent { epoch, revision, whole, services, gone, more } = event;
        if !whole && epoch != self.position.epoch {
            return Err(format!(
                "a change of epoch {epoch:016x}, while that of {:016x} is known",
                self.position.epoch
            ));
        }
        self.pending.extend(services);
        if self.pending.len() > MAX_SERVICES {
            return Err(format!("an update of more than {MAX_SERVICES} names"));
        }
        if more {
            return Ok(());
        }
        let services = std::mem::take(&mut self.pending);
        self.position = v1::NamesHello { epoch, revision };
        if !whole && services.is_empty() && gone.is_empty() {
            return Ok(());
        }
        let (table, refused) = self.table.load().updated(whole, &services, &gone);
        if let Some(first) = refused.first() {
            tracing::warn!(count = refused.len(), %first, "names that can't be read are left out");
        }
        self.metrics.names.set(i64::try_from(table.len()).unwrap_or(i64::MAX));
        self.table.store(table);
        self.whole.send_replace(true);
        self.unsaved = true;
        Ok(())
    }

    async fn save(&mut self) {
        (self.unsaved, self.saved) = (false, Some(Instant::now()));
        let (table, path) = (self.table.load(), file(self.member.dir()));
        let write = move || {
            let event = v1::NamesEvent { services: table.to_wire(), ..Default::default() };
            files::write_atomic(&path, &event.encode_to_vec(), 0o600)
        };
        match tokio::task::spawn_blocking(write).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the names can't be kept for the next start"),
            Err(error) => tracing::warn!(%error, "the names can't be kept for the next start"),
        }
    }
}

fn file(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

fn last_names(dir: &Path) -> Option<Vec<v1::NamedService>> {
    let path = file(dir);
    if !path.exists() {
        return None;
    }
    let read = files::read(&path, MAX_FILE_BYTES).map_err(|e| e.to_string());
    let event = read.and_then(|bytes| v1::NamesEvent::decode(&*bytes).map_err(|e| e.to_string()));
    event
        .map(|event| event.services)
        .map_err(|reason| tracing::warn!(path = %path.display(), reason, "the last names can't be read"))
        .ok()
}
