//! The sidecar's talk with its federator: configuration in, reports out.
//!
//! [`ControlTask`] watches snapshots through the [`Member`]'s control connection, parses each once, publishes the
//! [`Tables`] and keeps the raw snapshot on disk, so that the next start needs no federator. [`ReportTask`] sends health,
//! shifts and probes on change and at least once a second. Both go on for ever: an absent federator costs nothing but
//! news.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::sync::watch;
use tombolo_identity::files;
use tombolo_model::names::ServiceKey;
use tombolo_overlay::member::Member;
use tombolo_overlay::revoking::Enforcer;
use tombolo_overlay::{Overlay, grpc};
use tombolo_proto::v1;
use tombolo_proto::v1::config_client::ConfigClient;
use tombolo_runtime::clock;
use tombolo_runtime::drain::Drain;

use crate::capture::wanted::Wanted;
use crate::carry::Carry;
use crate::failover::{Routes, ShiftLog};
use crate::health::Verdict;
use crate::metrics::{Metrics, RejectLabels, UpstreamLabels};
use crate::provided::{self, Provided, ProvidedService};
use crate::tables::Tables;

/// A snapshot comes at least every 5 s: three missed ones, and another federator is tried.
const SILENCE: Duration = Duration::from_secs(16);
/// The report is also the heartbeat of the lease.
const REPORT_EVERY: Duration = Duration::from_secs(1);
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// What is served is told anew this often at most.
const BETWEEN_HELLOS: Duration = Duration::from_millis(100);
/// After a stream that a federator ended at once.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);
/// How often a refused clone says so.
const CLONED_REMINDER: Duration = Duration::from_secs(3600);
const FILE: &str = "snapshot.pb";
/// Thousands of upstreams with their keys; tonic refuses more than 4 MB anyway.
const MAX_SNAPSHOT_BYTES: u64 = 16 * 1024 * 1024;

/// The last snapshot on disk; `None` when there is none that can be read. A damaged one is only a lost head start.
pub fn last_snapshot(dir: &Path) -> Option<v1::SidecarSnapshot> {
    let path = dir.join(FILE);
    if !path.exists() {
        return None;
    }
    let read = files::read(&path, MAX_SNAPSHOT_BYTES).map_err(|e| e.to_string());
    let snapshot = read.and_then(|bytes| v1::SidecarSnapshot::decode(&*bytes).map_err(|e| e.to_string()));
    snapshot
        .map_err(
            |reason| tracing::warn!(path = %path.display(), reason, "the last configuration can't be read"),
        )
        .ok()
}

/// Another process holds this identity, and lives.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Cloned(String);

fn is_clone(status: &tonic::Status) -> bool {
    status.metadata().contains_key(grpc::CLONED)
}

/// Watches the configuration.
#[derive(Debug)]
pub struct ControlTask {
    pub member: Member,
    pub overlay: Overlay,
    pub hello: v1::SidecarHello,
    pub tables: watch::Sender<Option<Arc<Tables>>>,
    pub metrics: Metrics,
    pub carry: Carry,
    /// The own zone, empty when unknown.
    pub zone: String,
    pub enforcer: Enforcer,
    /// Services to ask for beside those of `hello`.
    pub wanted: Wanted,
    /// The federator's last question whether this process lives.
    pub question: watch::Sender<u64>,
    /// Services to tell of beside those of `hello`.
    pub provided: Option<Provided>,
    /// Counts what the federator was told, for reports to follow at once.
    pub greeted: watch::Sender<u64>,
}

impl ControlTask {
    /// Publishes the snapshot that an earlier process left. True when there was one that could be used.
    pub fn restore(&mut self) -> bool {
        let Some(snapshot) = last_snapshot(self.member.dir()) else { return false };
        let restored = self.apply(&snapshot, false);
        let upstreams = snapshot.upstreams.iter().filter_map(|upstream| upstream.service.parse().ok());
        self.wanted.restore(upstreams, std::time::Instant::now());
        self.carry.over(&snapshot, clock::since_unix_epoch());
        if restored {
            tracing::info!(
                revision = snapshot.revision,
                "serving with the last configuration until a federator answers"
            );
        }
        restored
    }

    pub async fn run(mut self) {
        let mut stored: Option<PathBuf> = None;
        loop {
            let watched = self.watch(&mut stored).await;
            if let Err(cloned) = &watched
                && let Some(Cloned(reason)) = cloned.downcast_ref()
            {
                return self.give_way(reason).await;
            }
            if let Err(error) = watched {
                tracing::info!(%error, "no configuration from a federator; what is known keeps serving");
            }
            self.metrics.own.control_connected.set(0);
            if self.member.disconnect().await {
                // Peers have cut us; their word may not get here any more, since no gateway leads to us.
                tracing::error!(spiffe_id = %self.member.spiffe_id(),
                    "this sidecar's identity is revoked: its connections are cut, and it is let in again once an operator takes the revocation back (`tombolo unrevoke`)");
                self.member.set_refused(true);
                self.overlay.cut_all().await;
            }
            tokio::time::sleep(REOPEN_PAUSE.mul_f64(0.5 + rand::random::<f64>())).await;
        }
    }

    /// This process is a copy: it serves and calls nobody, and tells no gateway where it is. It stays refused, so it
    /// does not ask again.
    async fn give_way(&self, reason: &str) {
        self.metrics.own.control_connected.set(0);
        self.metrics.own.clone_refused.set(1);
        self.member.set_refused(true);
        self.overlay.cut_all().await;
        self.member.disconnect().await;
        self.overlay.set_routes(tombolo_overlay::Routes::empty(self.member.tag()));
        loop {
            tracing::error!(spiffe_id = %self.member.spiffe_id(), reason,
                "this sidecar's identity is used by another process: this one is refused, and has to be started anew");
            tokio::time::sleep(CLONED_REMINDER).await;
        }
    }

    /// Somebody else came with our identity.
    fn tell_of_clones(&self, clones: Option<&v1::Clones>) {
        let Some(v1::Clones { refused, last_unix, host }) = clones else { return };
        if self.metrics.own.clones_seen.set(i64::from(*refused)) != i64::from(*refused) {
            tracing::error!(spiffe_id = %self.member.spiffe_id(), refused, last_unix, host,
                "another process came with this machine's identity and was refused: the machine was copied with its key, or its key is stolen");
        }
    }

    async fn watch(
        &mut self,
        stored: &mut Option<PathBuf>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let channel = self.member.connect(&self.overlay).await?;
        let mut client = ConfigClient::new(channel);
        let mut wanted = self.wanted.changes();
        let mut provided = self.provided.clone();
        let mut told = self.provided();
        let mut snapshots = self.open(&mut client, &mut wanted, &told).await?;
        self.enforcer.tell_again();
        let mut last = None;
        loop {
            let next = tokio::select! {
                next = tokio::time::timeout(SILENCE, snapshots.message()) => next?,
                // The new stream before the end of the old one: a member without a stream is taken out of rotation.
                Ok(()) = wanted.changed() => {
                    snapshots = self.open(&mut client, &mut wanted, &told).await?;
                    continue;
                }
                () = provided::changed(&mut provided) => {
                    let services = self.provided();
                    if services != told {
                        told = services;
                        snapshots = self.open(&mut client, &mut wanted, &told).await?;
                        // A rollout changes weights many times a second.
                        tokio::time::sleep(BETWEEN_HELLOS).await;
                    }
                    continue;
                }
            };
            let Some(mut snapshot) = next.map_err(|status| status.message().to_owned())? else {
                return Ok(());
            };
            self.metrics.own.control_connected.set(1);
            self.member.set_refused(false);
            self.metrics.own.clone_refused.set(0);
            self.tell_of_clones(snapshot.clones.as_ref());
            // No configuration: it is answered, not kept.
            let question = std::mem::take(&mut snapshot.question);
            self.question.send_if_modified(|last| std::mem::replace(last, question) != question);
            let unix = clock::since_unix_epoch();
            // Unchanged ones are heartbeats.
            if last.as_ref() == Some(&snapshot) && !self.carry.is_over(unix) {
                continue;
            }
            let known = self.carry.over(&snapshot, unix);
            if self.apply(&known, true) {
                self.enforcer.enforce(&self.overlay, clock::since_unix_epoch).await;
                self.store(&known, stored).await;
            }
            last = Some(snapshot);
        }
    }

    /// Opens a stream with all that is asked for now.
    async fn open(
        &self,
        client: &mut ConfigClient<tonic::transport::Channel>,
        wanted: &mut watch::Receiver<Vec<ServiceKey>>,
        provided: &[v1::LocalService],
    ) -> Result<tonic::Streaming<v1::SidecarSnapshot>, Box<dyn std::error::Error + Send + Sync>> {
        let mut hello = v1::SidecarHello { lease: Some(self.member.lease().to_wire()), ..self.hello.clone() };
        hello.services.extend_from_slice(provided);
        hello.upstreams.extend(wanted.borrow_and_update().iter().map(ToString::to_string));
        let opened = tokio::time::timeout(CALL_TIMEOUT, client.watch_sidecar(hello)).await?;
        let opened = opened.map_err(|status| -> Box<dyn std::error::Error + Send + Sync> {
            if is_clone(&status) {
                Cloned(status.message().to_owned()).into()
            } else {
                status.message().into()
            }
        });
        let opened = opened?.into_inner();
        self.greeted.send_modify(|count| *count += 1);
        Ok(opened)
    }

    fn provided(&self) -> Vec<v1::LocalService> {
        let services = self.provided.as_ref().map(Provided::now).unwrap_or_default();
        services.iter().map(ProvidedService::to_wire).collect()
    }

    /// Parses and publishes; what can't be used is logged and counted. False: nothing of it counts.
    fn apply(&self, snapshot: &v1::SidecarSnapshot, fresh: bool) -> bool {
        let tables = match Tables::parse(snapshot, self.member.cluster(), self.member.tag()) {
            Ok(tables) => tables,
            Err(error) => {
                tracing::error!(%error, "a configuration of another cluster is refused");
                return false;
            }
        };
        for rejected in &tables.rejected {
            tracing::warn!(record = rejected.record, error = %rejected.error, "a record of the configuration is left out");
            let labels = RejectLabels { record: rejected.record };
            self.metrics.rejected_records.get_or_create(&labels).inc();
        }
        if fresh {
            self.remember(&tables);
            self.member.ask_renewal(snapshot.renewal.as_ref());
        }
        // First of all: nothing that follows may let in who is revoked.
        for error in self.enforcer.learn(&snapshot.revocations) {
            tracing::warn!(%error, "a revocation is not understood and not enforced");
            self.metrics.rejected_records.get_or_create(&RejectLabels { record: "revocation" }).inc();
        }
        let mut routes = tables.routes.clone();
        if routes.gateways.is_empty() {
            // Never cut off by a snapshot: the gateways that worked are kept.
            routes.gateways.clone_from(&self.member.control().gateways);
        }
        routes.zone.clone_from(&self.zone);
        let inbound = (*tables.inbound).clone();
        self.overlay.set_routes(routes);
        self.metrics.own.config_revision.set(tables.revision);
        // Before the handles: nobody is let in by a handle whose policies are not known yet.
        self.tables.send_replace(Some(Arc::new(tables)));
        self.overlay.set_inbound(inbound);
        true
    }

    /// What the member itself keeps for its next start.
    fn remember(&self, tables: &Tables) {
        let mut kept = self.member.remember(tables.federators.clone(), tables.gateways.clone());
        if let Some(lease) = &tables.lease {
            kept = kept.and(self.member.renew_lease(lease.clone()));
            self.overlay.set_keys(self.member.lease().keys.clone());
        }
        kept = kept.and(self.member.update_bundle(&tables.trust_bundle));
        if let Err(error) = kept {
            tracing::warn!(%error, "a part of the configuration can't be kept for the next start");
        }
    }

    async fn store(&self, snapshot: &v1::SidecarSnapshot, stored: &mut Option<PathBuf>) {
        let path = stored.get_or_insert_with(|| self.member.dir().join(FILE)).clone();
        let bytes = snapshot.encode_to_vec();
        // fsync takes milliseconds on a busy disk: not on the byte path's thread.
        let written = tokio::task::spawn_blocking(move || files::write_atomic(&path, &bytes, 0o600)).await;
        if let Ok(Err(error)) = written {
            tracing::warn!(%error, "the configuration can't be kept for the next start");
        }
    }
}

/// Reports to the federator.
#[derive(Debug)]
pub struct ReportTask {
    pub member: Member,
    pub overlay: Overlay,
    pub health: Vec<(ServiceKey, watch::Receiver<Option<Verdict>>)>,
    pub provided: Option<Provided>,
    /// A federator takes health of services only that it was told of.
    pub greeted: watch::Receiver<u64>,
    /// Of each thread; they decide alike.
    pub routes: Vec<Routes>,
    pub log: ShiftLog,
    pub tables: watch::Receiver<Option<Arc<Tables>>>,
    pub metrics: Metrics,
    pub drain: Drain,
    pub enforcer: Enforcer,
    /// What the federator asked last, to be answered at once; 0: nothing.
    pub asked: watch::Receiver<u64>,
}

impl ReportTask {
    /// Until the drain starts; then says once that this process leaves.
    pub async fn run(mut self) {
        let drain = self.drain.clone();
        let reports = async {
            loop {
                if let Err(error) = self.report(false).await {
                    tracing::debug!(error, "report not delivered");
                }
                let changes = self.health.iter_mut().map(|(_, verdict)| Box::pin(verdict.changed()));
                let changed = futures::future::select_all(
                    changes.map(|c| c as futures::future::BoxFuture<'_, _>).chain([never()]),
                );
                tokio::select! {
                    _ = tokio::time::timeout(REPORT_EVERY, changed) => {}
                    () = self.enforcer.news() => {}
                    Ok(()) = self.asked.changed() => {}
                    () = provided::changed(&mut self.provided) => {}
                    Ok(()) = self.greeted.changed() => {}
                }
            }
        };
        tokio::select! {
            () = reports => {}
            () = drain.started() => {}
        }
        if let Err(error) = self.report(true).await {
            tracing::info!(error, "the federator could not be told that this sidecar leaves");
        }
    }

    async fn report(&mut self, leaving: bool) -> Result<(), String> {
        let answer = *self.asked.borrow_and_update();
        let report = v1::StatusReport { answer, ..self.assemble(leaving) };
        let enforcements = report.enforcements.clone();
        let send = async {
            let channel = self.member.connect(&self.overlay).await.map_err(|e| e.to_string())?;
            let answer = ConfigClient::new(channel).report(report).await;
            if let Err(status) = &answer
                && is_clone(status)
            {
                // The configuration stream is opened anew, and is told why it may not.
                self.member.disconnect().await;
            }
            answer.map_err(|status| status.message().to_owned())
        };
        let late = |_| format!("no answer within {}s", CALL_TIMEOUT.as_secs());
        let ack = tokio::time::timeout(CALL_TIMEOUT, send).await.map_err(late)??;
        self.enforcer.told(&enforcements);
        self.log.acknowledge(ack.into_inner().acknowledged_shift);
        Ok(())
    }

    fn assemble(&self, leaving: bool) -> v1::StatusReport {
        // Not checked yet: nothing to say.
        let checked = self.health.iter().filter_map(|(service, verdict)| {
            let verdict = verdict.borrow().clone()?;
            Some((service.clone(), verdict))
        });
        let provided = self.provided.as_ref().map(Provided::now).unwrap_or_default();
        let provided = provided.iter().map(|of| (of.service.clone(), of.verdict()));
        let health = checked.chain(provided).map(|(service, verdict)| {
            let healthy = verdict.healthy && !leaving;
            let labels = UpstreamLabels { service: service.to_string() };
            self.metrics.healthy.get_or_create(&labels).set(i64::from(healthy));
            let reason = if leaving { "draining".to_owned() } else { verdict.reason };
            v1::ServiceHealth { service: service.to_string(), healthy, reason }
        });
        self.metrics.overlay(&self.overlay.stats());
        let (now, monotonic) = (clock::since_unix_epoch(), std::time::Instant::now());
        let hops = self.overlay.hops().into_iter().map(|hop| v1::HopStatus {
            peer: hop.name,
            address: hop.address.to_string(),
            alive: hop.alive,
            rtt_us: hop.rtt.map_or(0, |rtt| rtt.as_micros() as u64),
            loss_per_mille: hop.loss_per_mille,
            mtu: hop.mtu.into(),
            last_ack_unix_ms: hop.last_ack.map_or(0, |at| {
                now.saturating_sub(monotonic.saturating_duration_since(at)).as_millis() as i64
            }),
            carrier: "udp".to_owned(),
            cluster: hop.across.unwrap_or_else(|| self.member.cluster().to_string()),
        });
        let upstreams = self.routes.first().map(Routes::all).unwrap_or_default();
        let upstreams = upstreams.into_iter().map(|route| {
            let on_threads = self.routes.iter().filter_map(|routes| routes.of(&route.service));
            let usage = on_threads.map(|route| {
                let pools = route.pools.values().chain(route.datagrams.values());
                pools.map(|pool| pool.usage()).fold((0, 0), add)
            });
            let (connections, streams) = usage.fold((0, 0), add);
            v1::UpstreamStatus {
                service: route.service.to_string(),
                tier: i32::try_from(route.tier).unwrap_or(i32::MAX),
                clusters: route.serving().iter().map(ToString::to_string).collect(),
                reason: route.reason.clone(),
                connections: u32::try_from(connections).unwrap_or(u32::MAX),
                open_streams: streams,
            }
        });
        v1::StatusReport {
            reporter: self.member.name().to_owned(),
            health: health.collect(),
            shifts: self.log.pending(),
            hops: hops.collect(),
            upstreams: upstreams.collect(),
            config_revision: self.tables.borrow().as_ref().map_or(0, |t| t.revision),
            gateway: None,
            enforcements: self.enforcer.untold(),
            leaving,
            trust: Some(self.member.trust()),
            answer: 0,
        }
    }
}

fn add((connections, streams): (usize, u32), (more, further): (usize, u32)) -> (usize, u32) {
    (connections + more, streams + further)
}

/// Keeps `select_all` from being empty.
fn never() -> futures::future::BoxFuture<'static, Result<(), watch::error::RecvError>> {
    Box::pin(std::future::pending())
}
