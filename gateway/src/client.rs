//! The gateway's talk with its federator: configuration in, reports out.
//!
//! [`ControlTask`] watches snapshots through the [`Member`]'s control connection, parses each once, hands the [`Tables`] to the
//! data plane and keeps the raw snapshot on disk (0600), so that the next start needs no federator. [`ReportTask`] sends
//! counters and probes on change and at least once a second. Both go on for ever: an absent federator costs nothing but
//! news.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message;
use tokio::sync::watch;
use tombolo_identity::files;
use tombolo_overlay::datagram::StartNumber;
use tombolo_overlay::member::Member;
use tombolo_overlay::revoking::Enforcer;
use tombolo_overlay::routes::Routes;
use tombolo_overlay::{GatewayHop, Overlay};
use tombolo_proto::v1;
use tombolo_proto::v1::config_client::ConfigClient;
use tombolo_runtime::clock;
use tombolo_runtime::drain::Drain;

use crate::counters::{Figures, Name};
use crate::dataplane::DataPlaneHandle;
use crate::metrics::{Metrics, NO_LINK, RejectLabels};
use crate::tables::Tables;

/// A snapshot comes at least every 5 s: three missed ones, and another federator is tried.
const SILENCE: Duration = Duration::from_secs(16);
/// The report is also the heartbeat of the lease.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// Health flaps at the pace of probes; the federator need not hear each.
const REPORT_GAP: Duration = Duration::from_millis(100);
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// After a stream that a federator ended at once.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);
const FILE: &str = "snapshot.pb";
/// Tens of thousands of endpoints; tonic refuses more than [`MAX_MESSAGE_BYTES`] anyway.
const MAX_SNAPSHOT_BYTES: u64 = 64 * 1024 * 1024;
/// An endpoint is about 30 bytes: 500,000 of them. tonic's default of 4 MB would cut a large cluster off.
const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;

/// The last snapshot on disk; `None` when there is none that can be read. A damaged one is only a lost head start.
pub fn last_snapshot(dir: &Path) -> Option<v1::GatewaySnapshot> {
    let path = dir.join(FILE);
    if !path.exists() {
        return None;
    }
    let read = files::read(&path, MAX_SNAPSHOT_BYTES).map_err(|e| e.to_string());
    let snapshot = read.and_then(|bytes| v1::GatewaySnapshot::decode(&*bytes).map_err(|e| e.to_string()));
    snapshot
        .map_err(
            |reason| tracing::warn!(path = %path.display(), reason, "the last configuration can't be read"),
        )
        .ok()
}

/// Watches the configuration.
#[derive(Debug)]
pub struct ControlTask {
    pub member: Member,
    pub overlay: Overlay,
    pub hello: v1::GatewayHello,
    pub plane: DataPlaneHandle,
    /// This replica itself: where the own overlay's packets go that can't go directly.
    pub own_hop: GatewayHop,
    pub tables: watch::Sender<Option<Arc<Tables>>>,
    pub metrics: Metrics,
    pub enforcer: Enforcer,
}

impl ControlTask {
    /// Publishes the snapshot that an earlier process left. True when there was one that could be used.
    pub fn restore(&self) -> bool {
        let Some(snapshot) = last_snapshot(self.member.dir()) else { return false };
        let restored = self.apply(&snapshot, false);
        if restored {
            let revision = snapshot.revision;
            tracing::info!(revision, "forwarding with the last configuration until a federator answers");
        }
        restored
    }

    pub async fn run(self) {
        loop {
            if let Err(error) = self.watch().await {
                tracing::info!(%error, "no configuration from a federator; what is known keeps serving");
            }
            self.metrics.control_connected.set(0);
            if self.member.disconnect().await {
                tracing::error!(spiffe_id = %self.member.spiffe_id(),
                    "this gateway's identity is revoked: it is told nothing new until an operator takes the revocation back (`tombolo unrevoke`)");
            }
            tokio::time::sleep(REOPEN_PAUSE.mul_f64(0.5 + rand::random::<f64>())).await;
        }
    }

    async fn watch(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let channel = self.member.connect(&self.overlay).await?;
        let mut client = ConfigClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let hello = v1::GatewayHello { lease: Some(self.member.lease().to_wire()), ..self.hello.clone() };
        let opened = tokio::time::timeout(CALL_TIMEOUT, client.watch_gateway(hello)).await?;
        let mut snapshots = opened.map_err(|status| status.message().to_owned())?.into_inner();
        let mut last = None;
        loop {
            let next = tokio::time::timeout(SILENCE, snapshots.message()).await?;
            let Some(snapshot) = next.map_err(|status| status.message().to_owned())? else { return Ok(()) };
            self.metrics.control_connected.set(1);
            // Unchanged ones are heartbeats.
            if last.as_ref() == Some(&snapshot) {
                continue;
            }
            if self.apply(&snapshot, true) {
                self.enforcer.enforce(&self.overlay, clock::since_unix_epoch).await;
                self.store(&snapshot).await;
            }
            last = Some(snapshot);
        }
    }

    /// Parses and publishes; what can't be used is logged and counted. False: nothing of it counts.
    fn apply(&self, snapshot: &v1::GatewaySnapshot, fresh: bool) -> bool {
        let previous = self.tables.borrow().clone();
        let (own, tag) = (self.member.cluster(), self.member.tag());
        let tables = match Tables::parse(snapshot, own, tag, previous.as_ref(), clock::since_unix_epoch()) {
            Ok(tables) => Arc::new(tables),
            Err(error) => {
                tracing::error!(%error, "a configuration is refused");
                let labels = RejectLabels { record: error.kind() };
                self.metrics.rejected_snapshots.get_or_create(&labels).inc();
                return false;
            }
        };
        for rejected in &tables.rejected {
            tracing::warn!(record = rejected.record, error = %rejected.error, "a record of the configuration is left out");
            let labels = RejectLabels { record: rejected.record };
            self.metrics.rejected_records.get_or_create(&labels).inc();
        }
        for error in self.enforcer.learn(&snapshot.revocations) {
            tracing::warn!(%error, "a revocation is not understood and not enforced");
            self.metrics.rejected_records.get_or_create(&RejectLabels { record: "revocation" }).inc();
        }
        if fresh {
            let kept = self.member.remember(tables.federators(), Vec::new());
            if let Err(error) = kept.and(self.member.update_bundle(&snapshot.trust_bundle_json)) {
                tracing::warn!(%error, "a part of the configuration can't be kept for the next start");
            }
            self.member.ask_renewal(snapshot.renewal.as_ref());
        }
        self.overlay.set_routes(self.routes(Some(&tables)));
        self.plane.set_tables(Arc::clone(&tables));
        self.metrics.config_revision.set(tables.revision);
        self.tables.send_replace(Some(tables));
        true
    }

    /// Where the own overlay sends: straight to whoever has an address, anything else through this very replica.
    pub fn routes(&self, tables: Option<&Tables>) -> Routes {
        routes(&self.member, &self.own_hop, tables)
    }

    async fn store(&self, snapshot: &v1::GatewaySnapshot) {
        let path = self.member.dir().join(FILE);
        let bytes = snapshot.encode_to_vec();
        // fsync takes milliseconds on a busy disk.
        let written = tokio::task::spawn_blocking(move || files::write_atomic(&path, &bytes, 0o600)).await;
        if let Ok(Err(error)) = written {
            tracing::warn!(%error, "the configuration can't be kept for the next start");
        }
    }
}

/// Routes of a gateway's own overlay.
pub fn routes(member: &Member, own_hop: &GatewayHop, tables: Option<&Tables>) -> Routes {
    let mut routes = member.first_routes();
    for (id, address) in &member.control().federators {
        // Answers name the federator's endpoint: it is where its control handle leads.
        if let Some(address) = address {
            routes.endpoints.insert(id.block(), *address);
        }
    }
    if let Some(tables) = tables {
        let known = tables.endpoints.iter().filter(|(_, endpoint)| !endpoint.registers && !endpoint.gone);
        routes.endpoints.extend(known.filter_map(|(block, endpoint)| Some((*block, endpoint.address?))));
    }
    // First through ourselves; the gateways that we joined through serve until a first configuration has come.
    if tables.is_some() {
        routes.gateways = vec![own_hop.clone()];
    }
    routes
}

/// Reports to the federator.
#[derive(Debug)]
pub struct ReportTask {
    pub member: Member,
    pub overlay: Overlay,
    pub plane: DataPlaneHandle,
    pub start: StartNumber,
    pub tables: watch::Receiver<Option<Arc<Tables>>>,
    pub drain: Drain,
}

impl ReportTask {
    /// Until the drain is forced; from its start on every report says that this process leaves.
    pub async fn run(self) {
        let mut changes = self.plane.changes();
        let mut leaving = false;
        loop {
            if let Err(error) = self.report(leaving).await {
                tracing::debug!(error, "report not delivered");
            }
            tokio::time::sleep(REPORT_GAP).await;
            tokio::select! {
                _ = tokio::time::timeout(REPORT_EVERY - REPORT_GAP, changes.changed()) => {}
                () = self.drain.started(), if !leaving => leaving = true,
                () = self.drain.forced() => return,
            }
        }
    }

    async fn report(&self, leaving: bool) -> Result<(), String> {
        let report = self.assemble(leaving);
        let send = async {
            let channel = self.member.connect(&self.overlay).await.map_err(|e| e.to_string())?;
            let answer = ConfigClient::new(channel).report(report).await;
            answer.map_err(|status| status.message().to_owned())
        };
        let late = |_| format!("no answer within {}s", CALL_TIMEOUT.as_secs());
        tokio::time::timeout(CALL_TIMEOUT, send).await.map_err(late)?.map(drop)
    }

    fn assemble(&self, leaving: bool) -> v1::StatusReport {
        let status = self.plane.status();
        let (now, monotonic) = (clock::since_unix_epoch(), Instant::now());
        let millis = |at: Instant| {
            let at = now.saturating_sub(monotonic.saturating_duration_since(at));
            i64::try_from(at.as_millis()).unwrap_or(i64::MAX)
        };
        let hops = status.hops.iter().map(|hop| v1::HopStatus {
            peer: if hop.sibling { hop.name.clone() } else { format!("{}/{}", hop.cluster, hop.name) },
            address: hop.address.to_string(),
            alive: hop.alive,
            rtt_us: hop.rtt.map_or(0, |rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
            loss_per_mille: hop.loss_per_mille,
            mtu: hop.mtu.into(),
            last_ack_unix_ms: hop.last_ack.map_or(0, millis),
            carrier: "udp".to_owned(),
            cluster: hop.cluster.clone(),
        });
        v1::StatusReport {
            reporter: self.member.name().to_owned(),
            hops: hops.collect(),
            config_revision: self.tables.borrow().as_ref().map_or(0, |t| t.revision),
            gateway: Some(v1::GatewayCounters {
                links: links(self.plane.counters().read()),
                start_number: self.start.0,
                draining: leaving || self.plane.is_draining(),
                registered: u32::try_from(status.registered).unwrap_or(u32::MAX),
            }),
            leaving,
            trust: Some(self.member.trust()),
            ..Default::default()
        }
    }
}

/// Counters of every link; what belongs to none has a name that no cluster can have.
fn links(read: Vec<(Name, Figures)>) -> Vec<v1::LinkCounters> {
    let link = |(name, figures): (Name, Figures)| {
        let peer = match name {
            Name::Link(cluster) => cluster,
            Name::Unknown => NO_LINK.to_owned(),
            Name::Gateway(..) | Name::Endpoints => return None,
        };
        Some(v1::LinkCounters {
            peer,
            packets_in: figures.packets_in,
            bytes_in: figures.bytes_in,
            packets_out: figures.packets_out,
            bytes_out: figures.bytes_out,
            drops: figures
                .drops
                .into_iter()
                .map(|(reason, count)| (reason.as_str().to_owned(), count))
                .collect(),
        })
    };
    read.into_iter().filter_map(link).collect()
}
