//! `Config`: what gateways and sidecars of this cluster are told, and what they report.
//!
//! A stream's first snapshot comes at once, the next when its content changes, and one every 5 s in any case. Changes
//! are gathered for [`pace`]; a slow reader gets the newest snapshot, not a queue of old ones.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tombolo_model::names::ServiceKey;
use tombolo_overlay::keys::Hour;
use tombolo_proto::v1::config_server::Config;
use tombolo_proto::{convert, v1};
use tombolo_runtime::tasks::TaskGroup;
use tonic::{Request, Response, Status};

use super::names::{self, Names};
use super::{Caller, member};
use crate::core::members::Welcome;
use crate::core::{Core, CoreError, CoreHandle, Moment};
use crate::facts::Facts;
use crate::metrics::Metrics;
use crate::snapshot::rings::Rings;
use crate::snapshot::{gateway, pace, sidecar};

/// A snapshot at least this often: its readers take silence for a dead federator.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Services one sidecar may call.
const MAX_UPSTREAMS: usize = 256;

pub struct ConfigService {
    pub core: CoreHandle,
    pub rings: Arc<Rings>,
    pub metrics: Metrics,
    pub names: Names,
    pub tasks: TaskGroup,
}

type Snapshots<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Tells the core when a stream has ended, however it did.
struct Watch {
    core: CoreHandle,
    id: u64,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let (core, id) = (self.core.clone(), self.id);
        let closed = move |core: &mut Core, moment| core.closed(id, moment);
        // With a full queue it is said when there is room: an end that gets lost leaves a member in rotation for 2 s.
        if !core.post(closed)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move { core.call(closed).await });
        }
    }
}

/// What one stream computes from the facts.
trait Source: Send + 'static {
    type Snapshot: Clone + PartialEq + Send + 'static;
    fn snapshot(&mut self, facts: &Facts, now: Moment) -> impl Future<Output = Self::Snapshot> + Send;
    fn set_revision(snapshot: &mut Self::Snapshot, revision: u64);
}

struct GatewaySource {
    name: String,
}

impl Source for GatewaySource {
    type Snapshot = v1::GatewaySnapshot;
    async fn snapshot(&mut self, facts: &Facts, now: Moment) -> v1::GatewaySnapshot {
        gateway::snapshot(facts, &self.name, now.monotonic, now.unix)
    }
    fn set_revision(snapshot: &mut v1::GatewaySnapshot, revision: u64) {
        snapshot.revision = revision;
    }
}

struct SidecarSource {
    upstreams: Vec<ServiceKey>,
    rings: Arc<Rings>,
    lease: LeaseOf,
}

impl Source for SidecarSource {
    type Snapshot = v1::SidecarSnapshot;
    async fn snapshot(&mut self, facts: &Facts, now: Moment) -> v1::SidecarSnapshot {
        let block = self.lease.welcome.block;
        let mut snapshot =
            sidecar::snapshot(facts, block, &self.upstreams, &self.rings, now.monotonic, now.unix);
        snapshot.lease = self.lease.wire(facts, now).await;
        snapshot
    }
    fn set_revision(snapshot: &mut v1::SidecarSnapshot, revision: u64) {
        snapshot.revision = revision;
    }
}

impl ConfigService {
    /// Lets a sidecar in. One that claims what another process holds waits until it is known whether that one lives.
    async fn welcome(&self, caller: Caller, hello: v1::SidecarHello) -> Result<Welcome, CoreError> {
        let (identity, connection, hello) = (caller.identity, caller.connection, Arc::new(hello));
        loop {
            let (identity, hello) = (Arc::clone(&identity), Arc::clone(&hello));
            let job =
                move |core: &mut Core, moment| core.sidecar_hello(&identity, connection, &hello, moment);
            match self.core.attempt(job).await {
                Err(CoreError::Contested(wait)) => tokio::time::sleep(wait).await,
                refused @ Err(CoreError::Cloned(_)) => {
                    self.metrics.issued("hello", &refused);
                    return refused;
                }
                welcome => return welcome,
            }
        }
    }

    /// Streams what `source` makes of the facts until the reader is gone.
    fn stream<S: Source>(&self, watch: Watch, mut source: S) -> Snapshots<S::Snapshot> {
        let (sender, receiver) = mpsc::channel(1);
        let mut facts = self.core.watch();
        let core = self.core.clone();
        self.tasks.spawn("configuration stream", async move {
            let _watch = watch;
            let mut last: Option<S::Snapshot> = None;
            let mut sent = Instant::now();
            loop {
                let current = facts.borrow_and_update().clone();
                let snapshot = source.snapshot(&current, core.now()).await;
                if last.as_ref() != Some(&snapshot) || sent.elapsed() >= HEARTBEAT {
                    let mut wire = snapshot.clone();
                    S::set_revision(&mut wire, current.revision);
                    if sender.send(Ok(wire)).await.is_err() {
                        return;
                    }
                    (last, sent) = (Some(snapshot), Instant::now());
                }
                if !wait(&mut facts, &sender, sent + HEARTBEAT, pace(&current)).await {
                    return;
                }
            }
        });
        Box::pin(ReceiverStream::new(receiver))
    }
}

/// Until something changed and the pace allows, or a heartbeat is due; false when the reader or the core is gone.
async fn wait<T>(
    facts: &mut watch::Receiver<Arc<Facts>>,
    sender: &mpsc::Sender<T>,
    heartbeat: Instant,
    pace: Duration,
) -> bool {
    tokio::select! {
        changed = facts.changed() => {
            if changed.is_err() {
                return false;
            }
            tokio::time::sleep(pace).await;
            true
        }
        () = sender.closed() => false,
        () = tokio::time::sleep_until(heartbeat) => true,
    }
}

/// The signed lease with its keys, made anew only when either has changed: a signature costs more than a snapshot.
struct LeaseOf {
    core: CoreHandle,
    welcome: Welcome,
    made: Option<(Hour, u64, v1::EndpointLease)>,
}

impl LeaseOf {
    async fn wire(&mut self, facts: &Facts, moment: Moment) -> Option<v1::EndpointLease> {
        let record = facts.leases.get(&self.welcome.block)?.clone();
        let hour = Hour::at(moment.unix);
        if let Some((made_hour, not_after, wire)) = &self.made
            && (*made_hour, *not_after) == (hour, record.not_after)
        {
            return Some(wire.clone());
        }
        let not_after = record.not_after;
        let wire = self.core.attempt(move |core, moment| core.lease_to_wire(&record, moment)).await;
        match wire {
            Ok(wire) => {
                self.made = Some((hour, not_after, wire.clone()));
                Some(wire)
            }
            Err(error) => {
                tracing::warn!(%error, "a lease can't be signed");
                None
            }
        }
    }
}

#[tonic::async_trait]
impl Config for ConfigService {
    type WatchGatewayStream = Snapshots<v1::GatewaySnapshot>;
    type WatchSidecarStream = Snapshots<v1::SidecarSnapshot>;
    type WatchNamesStream = names::Watched;

    async fn watch_gateway(
        &self,
        request: Request<v1::GatewayHello>,
    ) -> Result<Response<Self::WatchGatewayStream>, Status> {
        let caller = member(&request, &self.core.facts().cluster.name)?;
        let hello = request.into_inner();
        let name = hello.name.clone();
        let welcome = self
            .core
            .attempt(move |core, moment| {
                core.gateway_hello(&caller.identity, caller.connection, &hello, moment)
            })
            .await?;
        tracing::info!(gateway = name, "gateway connected");
        let watch = Watch { core: self.core.clone(), id: welcome.watch };
        let stream = self.stream(watch, GatewaySource { name });
        Ok(Response::new(stream))
    }

    async fn watch_sidecar(
        &self,
        request: Request<v1::SidecarHello>,
    ) -> Result<Response<Self::WatchSidecarStream>, Status> {
        let caller = member(&request, &self.core.facts().cluster.name)?;
        let hello = request.into_inner();
        if hello.upstreams.len() > MAX_UPSTREAMS {
            let text =
                format!("field upstreams: {} are too many, at most {MAX_UPSTREAMS}", hello.upstreams.len());
            return Err(Status::invalid_argument(text));
        }
        let upstreams = hello.upstreams.iter().map(|service| convert::parse("upstreams", service));
        let upstreams: Vec<ServiceKey> = upstreams.collect::<Result<_, _>>().map_err(CoreError::from)?;
        let id = caller.identity.spiffe_id.clone();
        let welcome = self.welcome(caller, hello).await?;
        tracing::info!(spiffe_id = %id, block = %welcome.block, "sidecar connected");
        let watch = Watch { core: self.core.clone(), id: welcome.watch };
        let rings = Arc::clone(&self.rings);
        let lease = LeaseOf { core: self.core.clone(), welcome, made: None };
        let stream = self.stream(watch, SidecarSource { upstreams, rings, lease });
        Ok(Response::new(stream))
    }

    async fn watch_names(
        &self,
        request: Request<v1::NamesHello>,
    ) -> Result<Response<Self::WatchNamesStream>, Status> {
        member(&request, &self.core.facts().cluster.name)?;
        Ok(Response::new(self.names.watch(request.get_ref(), &self.tasks)))
    }

    async fn report(&self, request: Request<v1::StatusReport>) -> Result<Response<v1::ReportAck>, Status> {
        let caller = member(&request, &self.core.facts().cluster.name)?;
        let report = request.into_inner();
        let ack = self
            .core
            .attempt(move |core, moment| core.report(&caller.identity, caller.connection, report, moment))
            .await?;
        Ok(Response::new(ack))
    }

    async fn leave(&self, request: Request<v1::LeaveRequest>) -> Result<Response<v1::LeaveResponse>, Status> {
        let caller = member(&request, &self.core.facts().cluster.name)?;
        let lease = request.into_inner().lease;
        self.core.attempt(move |core, moment| core.leave(&caller.identity, lease.as_ref(), moment)).await?;
        Ok(Response::new(v1::LeaveResponse {}))
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Result<Response<v1::RenewResponse>, Status> {
        let caller = member(&request, &self.core.facts().cluster.name)?;
        let request = request.into_inner();
        let renewed =
            self.core.attempt(move |core, moment| core.renew(&caller.identity, &request, moment)).await;
        self.metrics.issued("renew", &renewed);
        Ok(Response::new(renewed?))
    }
}
