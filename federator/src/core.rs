//! The core: the one writer of this cluster's facts and of its store.
//!
//! A thread of its own, because commits wait for the disk. Everybody else sends it jobs through [`CoreHandle::call`]
//! and reads what it publishes: an `Arc<Facts>`, replaced whole after each batch of jobs that changed something. A job
//! commits to the store before it changes a fact, so an error always means "unchanged". Operations live in the modules
//! below, each `impl Core`: [`boot`], [`allot`], [`addresses`], [`leases`], [`lapsed`], [`tokens`], [`members`], [`links`], [`imports`],
//! `bundle_document`, `clones`, `leaving`, `crl`, `federations`, `jwt`, [`kubernetes`], [`objects`], [`pods`], [`trust`], `trust_directory` and
//! [`audit`]. Ends when the last handle is dropped.

pub mod addresses;
pub mod allot;
pub mod audit;
pub mod boot;
mod bundle_document;
mod clones;
mod crl;
mod error;
mod federations;
pub mod first_contact;
pub mod imports;
mod jwt;
pub mod kubernetes;
pub mod lapsed;
pub mod leases;
mod leaving;
pub mod links;
pub mod members;
pub mod objects;
pub mod pods;
mod properties;
#[cfg(test)]
pub(crate) mod tests;
pub mod tokens;
pub mod trust;
mod trust_directory;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tombolo_identity::issuer::LeafIssuer;
use tombolo_model::expiry::Urgency;
use tombolo_model::ids::Handle;
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_runtime::clock;

use crate::authorities::Announcements;
use crate::clones::Contests;
use crate::facts::{AddressRecord, Facts};
use crate::jwt::JwtKeys;
use crate::store::Store;
use members::Session;

pub use error::CoreError;

/// Jobs that wait; whoever sends one more waits too.
const QUEUE: usize = 1024;
/// Jobs done between two publications: bounds how old the published facts get under load.
const BATCH: usize = 64;

/// When a job runs.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Since the process started; never goes back.
    pub monotonic: Duration,
    /// Since the Unix epoch.
    pub unix: Duration,
}

/// The state that only the core thread touches.
pub struct Core {
    pub facts: Facts,
    store: Arc<dyn Store>,
    issuer: LeafIssuer,
    audit: audit::AuditLog,
    announcements: Announcements,
    /// Of the process's settings.
    given_properties: BTreeMap<String, String>,
    jwt: JwtKeys,
    /// Number of the last CRL: they only grow.
    crl_number: u64,
    /// Whose pods may be gateways.
    gateways: Option<pods::ServiceAccount>,
    /// When this cluster last said how far it is with what the federation trusts.
    last_word: Duration,
    /// A trust update that could not be stored yet.
    pending_trust: Option<Vec<u8>>,
    /// Every handle in `facts.handles`.
    in_use: BTreeSet<Handle>,
    /// Services, exports or links have changed: who needs a handle is to be looked at again.
    handles_stale: bool,
    /// Handles that were in use and may not be given out again yet, with the unix second of their release.
    released: BTreeMap<Handle, u64>,
    /// Virtual addresses in use, and those that are held for services that are no more.
    addresses: BTreeMap<ServiceKey, AddressRecord>,
    /// Services have come or gone: who needs an address is to be looked at again.
    addresses_stale: bool,
    /// The records of each linked peer, as it wrote them.
    views: BTreeMap<ClusterName, imports::View>,
    /// Who said hello on which connection.
    sessions: HashMap<usize, Session>,
    /// Processes that claim what another holds.
    contests: Contests,
    next_watch: u64,
    /// Peers whose records are to be written with the next tick that may.
    unsaved_imports: BTreeSet<ClusterName>,
    /// When each peer was last heard, as far as it is on the disk.
    saved_heard: BTreeMap<ClusterName, Duration>,
    last_save: Duration,
    /// This federator closes its connections: whoever was on them has not gone.
    ending: bool,
    /// The facts differ from what was published.
    dirty: bool,
}

fn moment(origin: Instant) -> Moment {
    Moment { monotonic: origin.elapsed(), unix: clock::since_unix_epoch() }
}

type Job = Box<dyn FnOnce(&mut Core, Moment) + Send>;

/// The core has ended: the process is going away.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the federator is shutting down")]
pub struct CoreGone;

/// Sends jobs and reads facts; clones share the core.
#[derive(Clone)]
pub struct CoreHandle {
    jobs: mpsc::Sender<Job>,
    facts: watch::Receiver<Arc<Facts>>,
    audit: audit::AuditReader,
    origin: Instant,
}

impl CoreHandle {
    /// Now, by the core's clocks.
    pub fn now(&self) -> Moment {
        moment(self.origin)
    }

    /// Runs `job` on the core thread.
    pub async fn call<R, F>(&self, job: F) -> Result<R, CoreGone>
    where
        R: Send + 'static,
        F: FnOnce(&mut Core, Moment) -> R + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |core, moment| {
            let _ = answer.send(job(core, moment));
        });
        self.jobs.send(job).await.map_err(|_| CoreGone)?;
        answered.await.map_err(|_| CoreGone)
    }

    /// The same, for jobs that can be refused.
    pub async fn attempt<R, F>(&self, job: F) -> Result<R, CoreError>
    where
        R: Send + 'static,
        F: FnOnce(&mut Core, Moment) -> Result<R, CoreError> + Send + 'static,
    {
        self.call(job).await.map_err(|_| CoreError::Gone)?
    }

    /// A job whose outcome nobody waits for; false when the queue is full or the core gone.
    pub fn post(&self, job: impl FnOnce(&mut Core, Moment) + Send + 'static) -> bool {
        self.jobs.try_send(Box::new(job)).is_ok()
    }

    /// What was last published.
    pub fn facts(&self) -> Arc<Facts> {
        self.facts.borrow().clone()
    }

    pub fn watch(&self) -> watch::Receiver<Arc<Facts>> {
        self.facts.clone()
    }

    /// The audit log, read from the store and not from the core's thread.
    pub fn audit(&self) -> &audit::AuditReader {
        &self.audit
    }
}

impl Core {
    /// Starts the thread.
    pub fn start(mut self) -> std::io::Result<CoreHandle> {
        let (jobs, receiver) = mpsc::channel(QUEUE);
        self.dirty = false;
        let (publisher, facts) = watch::channel(Arc::new(self.facts.clone()));
        let origin = Instant::now();
        let audit = self.audit_reader();
        let work = move || self.run(receiver, &publisher, origin);
        std::thread::Builder::new().name("core".to_owned()).spawn(work)?;
        Ok(CoreHandle { jobs, facts, audit, origin })
    }

    fn run(mut self, mut jobs: mpsc::Receiver<Job>, publisher: &watch::Sender<Arc<Facts>>, origin: Instant) {
        while let Some(job) = jobs.blocking_recv() {
            job(&mut self, moment(origin));
            for _ in 1..BATCH {
                let Ok(job) = jobs.try_recv() else { break };
                job(&mut self, moment(origin));
            }
            if self.publish(moment(origin)) {
                publisher.send_replace(Arc::new(self.facts.clone()));
            }
        }
    }

    /// Makes the facts ready to be published; false when they have not changed.
    fn publish(&mut self, moment: Moment) -> bool {
        if !self.dirty {
            return false;
        }
        self.settle(moment);
        self.dirty = false;
        self.facts.revision += 1;
        true
    }

    /// What follows from the facts, after any change: handles and addresses are allotted and released.
    fn settle(&mut self, moment: Moment) {
        self.addresses_stale |= self.handles_stale;
        if let Err(error) = self.allot_addresses(moment) {
            tracing::warn!(%error, "virtual addresses can't be allotted now");
        }
        if let Err(error) = self.allot_handles(moment) {
            // Tried again with every change and tick: without a store nothing is allotted.
            tracing::warn!(%error, "handles can't be allotted now");
        }
        self.facts.store_writable = self.store.is_writable();
    }

    /// CAs that end are said loudly: once they have, nobody is let in.
    fn announce_expiry(&mut self, moment: Moment) {
        for (urgency, text) in self.announcements.due(&self.facts, moment.unix) {
            match urgency {
                Urgency::Month => tracing::warn!("{text}"),
                _ => tracing::error!("{text}"),
            }
        }
    }

    /// From now on nobody is blamed for a connection that ends.
    pub fn end(&mut self, moment: Moment) {
        self.ending = true;
        self.end_audit_log(moment);
    }

    /// Every 250 ms: silence, freshness, leases, and what is written at leisure.
    pub fn tick(&mut self, moment: Moment) {
        let unix = moment.unix.as_secs();
        if self.facts.registry.step(crate::registry::Event::Tick, moment.monotonic, unix) {
            self.dirty = true;
        }
        if self.facts.store_writable != self.store.is_writable() {
            self.dirty = true;
        }
        self.refresh_imports(moment);
        self.tick_trust(moment);
        // An attempt that failed is made again.
        self.dirty |= self.handles_stale || self.addresses_stale;
        if moment.monotonic.saturating_sub(self.last_save) >= Duration::from_secs(1) {
            self.last_save = moment.monotonic;
            self.save_imports();
            self.retry_trust(moment);
            self.keep_own_lease(moment);
            self.remember_absent();
            self.forget_expired(unix, moment.monotonic);
            self.keep_audit_log(moment);
            self.announce_expiry(moment);
            self.renew_jwt_keys(unix);
        }
    }
}
