//! [`Overlay`]: one socket, one endpoint id, one quinn endpoint, and the tasks that keep them honest.
//!
//! Owned by a sidecar's runtime thread, a gateway's control side or a federator. Tasks: accepting (one per pending
//! handshake, bounded), one per live connection for its control streams, hops (probes and registrations), liveness
//! (kicks and GONE), attestation (swapped SVIDs, ended ones). All end with the [`TaskGroup`] given to [`Overlay::bind`], or with [`Overlay::close`].

mod stats;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use quinn::{Incoming, TokioRuntime, TransportConfig};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tombolo_identity::{Svid, SvidHandle};
use tombolo_model::ids::{ClusterTag, EndpointId, Handle};
use tombolo_runtime::tasks::TaskGroup;

pub use self::stats::{OverlayCounters, OverlayStats};
use crate::admission::Inbound;
use crate::attestation::task::{self as attestation, AttestationCounters, AttestationHandle, Cut};
use crate::cid::Kind;
use crate::connection::{HandleClass, PeerConnection, Pinned, close_code};
use crate::control_stream::{self, Judge};
use crate::dial::{DialError, DialTarget, Dialler, peer_identity};
use crate::generator::{Generator, Identity};
use crate::hops::{self, HopReport, HopsHandle};
use crate::keys::KeyRing;
use crate::liveness::{self, Hints, LivenessHandle};
use crate::parts::{Part, Place};
use crate::routes::{GatewayHop, RouteState, Routes};
use crate::socket::{ControlPacket, OverlaySocket, Slot};
use crate::transport::{self, Limits, UnusableTls};

/// A handshake of an authenticated peer over the longest paths takes a second; a trickled one is an attack.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Accepted connections that wait for their owner: beyond this, new handshakes wait.
const ACCEPT_QUEUE: usize = 256;
/// Control datagrams that wait for the hops task: probes come every 100 ms per replica.
const CONTROL_QUEUE: usize = 512;
/// Closing frames have left by then.
const CLOSE_PATIENCE: Duration = Duration::from_millis(500);

/// TLS of the server side, by class of handle.
#[derive(Clone, Debug)]
pub struct ServerTls {
    /// Mesh and control: a client certificate is demanded.
    pub mesh: Arc<rustls::ServerConfig>,
    /// Federators only.
    pub join: Option<FirstContactTls>,
}

/// TLS towards those who have no identity that holds.
#[derive(Clone, Debug)]
pub struct FirstContactTls {
    /// Joining: the server alone is authenticated.
    pub join: Arc<rustls::ServerConfig>,
    /// Renewing an identity that has ended.
    pub renewal: Arc<rustls::ServerConfig>,
}

/// How to bind an overlay.
#[derive(Debug)]
pub struct OverlayConfig {
    pub tag: ClusterTag,
    pub endpoint: EndpointId,
    /// Keys of the own block.
    pub keys: KeyRing,
    /// Endpoint; or join, for a joiner that dials a federator directly.
    pub kind: Kind,
    pub bind: SocketAddr,
    /// This endpoint has no address that gateways could know: tell them by REGISTER.
    pub registers: bool,
    /// Answer long-header packets of the own cluster to where they came from: federators, and who joins at one directly.
    pub learns: bool,
    pub server: Option<ServerTls>,
    /// The own identity: shown again on live connections when it is swapped, and its bundles judge what peers show. `None`
    /// for a joiner, whose connection is over in seconds.
    pub svid: Option<SvidHandle>,
    pub limits: Limits,
}

/// Why an overlay could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error(
        "the overlay's UDP address {address} can't be bound: {source}; stop what uses it or choose another with --bind"
    )]
    Socket { address: SocketAddr, source: std::io::Error },
    #[error(transparent)]
    Tls(#[from] UnusableTls),
}

/// What the parts of an endpoint have in common.
#[derive(Clone, Debug)]
struct Shared {
    me: Identity,
    endpoint: EndpointId,
    learns: bool,
    keys: Arc<ArcSwap<KeyRing>>,
    routes: Arc<ArcSwap<RouteState>>,
    inbound: Arc<ArcSwap<Inbound>>,
    /// To all parts.
    hints: Hints,
    control: mpsc::Sender<ControlPacket>,
    svid: Option<SvidHandle>,
}

fn no_socket(address: SocketAddr) -> BindError {
    BindError::Socket { address, source: std::io::ErrorKind::NotConnected.into() }
}

#[derive(Debug)]
struct Inner {
    shared: Shared,
    quic: quinn::Endpoint,
    socket: Arc<OverlaySocket>,
    /// Further parts of this endpoint; known to the first one.
    others: Mutex<Vec<Overlay>>,
    client_transport: Arc<TransportConfig>,
    accepted: tokio::sync::Mutex<mpsc::Receiver<PeerConnection>>,
    liveness: LivenessHandle,
    hops: HopsHandle,
    attestation: Option<AttestationHandle>,
    judge: Judge,
    counters: OverlayCounters,
    tasks: TaskGroup,
    local_addr: SocketAddr,
    /// Ends the flusher.
    _flusher: DropGuard,
    /// Smoothed handshake-to-RTT knowledge for dial timing, in microseconds; 0 = unknown.
    rtt_micros: Mutex<std::collections::HashMap<ClusterTag, Duration>>,
}

/// One overlay socket with its quinn endpoint; clones share it.
#[derive(Clone, Debug)]
pub struct Overlay(Arc<Inner>);

impl Overlay {
    /// Binds the socket and starts the tasks in the current tokio runtime.
    pub fn bind(config: OverlayConfig, tasks: &TaskGroup) -> Result<Self, BindError> {
        let bind = config.bind;
        let mut parts = Part::bind(bind, 1).map_err(|source| BindError::Socket { address: bind, source })?;
        let part = parts.pop().ok_or_else(|| no_socket(bind))?;
        Self::bind_first(config, part, tasks)
    }

    /// Serves the first of the endpoint's [parts](Part::bind), probing and registration included.
    pub fn bind_first(config: OverlayConfig, part: Part, tasks: &TaskGroup) -> Result<Self, BindError> {
        let OverlayConfig { tag, endpoint, keys, kind, bind, registers, learns, server, svid, limits } =
            config;
        let (control, datagrams) = mpsc::channel(CONTROL_QUEUE);
        let state =
            RouteState { routes: Arc::new(Routes::empty(tag)), paths: Vec::new(), across: Arc::default() };
        let keys = Arc::new(ArcSwap::from_pointee(keys));
        let shared = Shared {
            me: Identity { kind, tag, target: endpoint.value() },
            endpoint,
            learns,
            keys: Arc::clone(&keys),
            routes: Arc::new(ArcSwap::from_pointee(state)),
            inbound: Arc::default(),
            hints: Hints::default(),
            control,
            svid,
        };
        let hints = shared.hints.clone();
        let hops = |socket: &Arc<OverlaySocket>| {
            let config = hops::HopsConfig { tag, endpoint, keys, registers, bind, kind };
            hops::spawn(config, Arc::clone(socket), datagrams, hints, tasks)
        };
        Self::serve(shared, part, bind, server, limits, hops, tasks)
    }

    /// Serves a further part of this endpoint in the current runtime, which may be another thread's. What is set on this
    /// overlay (routes, keys, handles) holds for it, and revocations are enforced on it too.
    pub fn bind_beside(
        &self,
        part: Part,
        server: Option<ServerTls>,
        limits: Limits,
        tasks: &TaskGroup,
    ) -> Result<Self, BindError> {
        let first = &self.0;
        let overlay = Self::serve(
            first.shared.clone(),
            part,
            first.local_addr,
            server,
            limits,
            |_| first.hops.clone(),
            tasks,
        )?;
        first.others.lock().unwrap_or_else(PoisonError::into_inner).push(overlay.clone());
        Ok(overlay)
    }

    fn serve(
        shared: Shared,
        part: Part,
        bind: SocketAddr,
        server: Option<ServerTls>,
        limits: Limits,
        hops: impl FnOnce(&Arc<OverlaySocket>) -> HopsHandle,
        tasks: &TaskGroup,
    ) -> Result<Self, BindError> {
        let me = shared.me;
        let socket_error = |source| BindError::Socket { address: bind, source };
        let place = Some(part.place).filter(Place::has_others);
        let slot = Slot::of(part.socket).map_err(socket_error)?;
        let local_addr = slot.local_addr().map_err(socket_error)?;
        let (routes, control) = (Arc::clone(&shared.routes), shared.control.clone());
        let socket = OverlaySocket::new(me.tag, slot, place.clone(), routes, shared.learns, control);
        let socket = Arc::new(socket);

        let mut endpoint_config = transport::endpoint_config(&limits);
        let generator_keys = Arc::clone(&shared.keys);
        endpoint_config.cid_generator(move || {
            Box::new(Generator { me, keys: Arc::clone(&generator_keys), place: place.clone() })
        });
        let servers = server.map(|tls| Servers::new(&tls, &limits)).transpose()?;
        let quic = quinn::Endpoint::new_with_abstract_socket(
            endpoint_config,
            servers.as_ref().map(|s| (*s.mesh).clone()),
            Arc::clone(&socket) as _,
            Arc::new(TokioRuntime),
        )
        .map_err(socket_error)?;

        let flusher = CancellationToken::new();
        tasks.spawn("overlay flush", Arc::clone(&socket).flush(flusher.clone()));
        let liveness = liveness::spawn(Arc::clone(&socket), tasks);
        shared.hints.add(liveness.clone());
        let hops = hops(&socket);
        let judge = Judge { svid: shared.svid.clone(), counters: Arc::new(AttestationCounters::default()) };
        let attestation = judge
            .svid
            .clone()
            .map(|svid| attestation::spawn(svid, &limits, Arc::clone(&judge.counters), tasks));
        let (accepted_sender, accepted) = mpsc::channel(ACCEPT_QUEUE);
        let overlay = Self(Arc::new(Inner {
            shared,
            client_transport: transport::transport(&limits, true),
            quic,
            socket,
            others: Mutex::default(),
            accepted: tokio::sync::Mutex::new(accepted),
            liveness,
            hops,
            attestation,
            judge,
            counters: OverlayCounters::default(),
            tasks: tasks.clone(),
            local_addr,
            _flusher: flusher.drop_guard(),
            rtt_micros: Mutex::default(),
        }));
        if let Some(servers) = servers {
            // A weak handle: the accept loop must not keep a dropped overlay alive.
            let task = accept_loop(overlay.clone(), servers, limits, accepted_sender);
            tasks.spawn("overlay accept", task);
        }
        Ok(overlay)
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.0.local_addr
    }
    pub fn endpoint_id(&self) -> EndpointId {
        self.0.shared.endpoint
    }
    pub fn tag(&self) -> ClusterTag {
        self.0.shared.me.tag
    }
    /// Where things are, from now on.
    pub fn set_routes(&self, routes: Routes) {
        self.0.hops.set_routes(routes);
    }
    /// Further gateways to try, until the next routes are set.
    pub fn add_gateways(&self, gateways: Vec<GatewayHop>) {
        let mut routes = Routes::clone(&self.0.shared.routes.load().routes);
        for hop in gateways {
            if !routes.gateways.iter().any(|known| known.address == hop.address) {
                routes.gateways.push(hop);
            }
        }
        self.set_routes(routes);
    }
    /// Renewed keys of the own block: IDs made from now on use them.
    pub fn set_keys(&self, keys: KeyRing) {
        self.0.shared.keys.store(Arc::new(keys));
    }
    /// The handles served from now on. Connections that are open keep what is pinned to them.
    pub fn set_inbound(&self, inbound: Inbound) {
        self.0.shared.inbound.store(Arc::new(inbound));
    }

    /// Dials any endpoint of what the target's handle stands for. ALPN and expected identity are in `tls`.
    pub async fn dial(
        &self,
        target: &DialTarget,
        tls: Arc<rustls::ClientConfig>,
    ) -> Result<PeerConnection, DialError> {
        let renews = target.kind == Kind::Control && target.handle == Handle::RENEW;
        let class = match target.kind {
            Kind::Service => HandleClass::Mesh,
            _ if renews => HandleClass::Renewal,
            _ if target.handle.is_first_contact() => HandleClass::FirstContact,
            _ => HandleClass::Control,
        };
        let holder = renews.then(|| self.endpoint_id().block());
        let rtt = self.0.rtt_micros.lock().unwrap_or_else(PoisonError::into_inner).get(&target.tag).copied();
        let dialler = Dialler {
            endpoint: &self.0.quic,
            transport: Arc::clone(&self.0.client_transport),
            rtt,
            class,
            holder,
        };
        let shown = self.own_svid();
        let connection = dialler.dial(target, tls).await?;
        let known = &self.0.rtt_micros;
        known.lock().unwrap_or_else(PoisonError::into_inner).insert(target.tag, connection.rtt());
        self.adopt(&connection, shown.as_deref()).await;
        Ok(connection)
    }

    /// The next authenticated connection; `None` once the overlay is closed or was bound without a server side.
    pub async fn accept(&self) -> Option<PeerConnection> {
        self.0.accepted.lock().await.recv().await
    }

    /// Cuts every connection whose peer is revoked by now; how many. `None`: this overlay is ending, or has no identity.
    pub async fn enforce_revocations(&self) -> Option<u64> {
        let mut cut = 0;
        for part in self.parts() {
            cut += part.0.attestation.as_ref()?.cut(Cut::Revoked).await?;
        }
        Some(cut)
    }
    /// Cuts every connection: the own identity is revoked, and nobody may be able to tell us any more.
    pub async fn cut_all(&self) {
        for part in self.parts() {
            if let Some(attestation) = &part.0.attestation {
                attestation.cut(Cut::All).await;
            }
        }
    }

    /// What probing knows of each gateway path.
    pub fn hops(&self) -> Vec<HopReport> {
        self.0.hops.reports()
    }
    /// Clusters that no live gateway of ours reaches now.
    pub fn unreachable_tags(&self) -> watch::Receiver<Arc<HashSet<ClusterTag>>> {
        self.0.hops.unreachable()
    }

    /// Of all parts together.
    pub fn stats(&self) -> OverlayStats {
        let parts = self.parts();
        parts.iter().map(Self::own_stats).fold(OverlayStats::default(), OverlayStats::plus)
    }

    fn own_stats(&self) -> OverlayStats {
        let counters = &self.0.counters;
        let socket = &self.0.socket.counters;
        let attestation = &self.0.judge.counters;
        OverlayStats {
            open_connections: self.0.quic.open_connections(),
            accepted: counters.accepted.load(Relaxed),
            refused: counters.refused.load(Relaxed),
            retried: counters.retried.load(Relaxed),
            handshakes_failed: counters.handshakes_failed.load(Relaxed),
            importer_mismatch: counters.importer_mismatch.load(Relaxed),
            attested: attestation.attested.load(Relaxed),
            attestations_refused: attestation.refusals(),
            expired_closed: attestation.expired_closed.load(Relaxed),
            revoked_closed: attestation.revoked_closed.load(Relaxed),
            no_route: socket.no_route.load(Relaxed),
            send_errors: socket.send_errors.load(Relaxed),
            control_overflow: socket.control_overflow.load(Relaxed),
            part_overflow: socket.part_overflow.load(Relaxed),
            malformed: socket.malformed.load(Relaxed),
        }
    }

    /// This one, and those bound beside it.
    fn parts(&self) -> Vec<Self> {
        let others = self.0.others.lock().unwrap_or_else(PoisonError::into_inner);
        std::iter::once(self).chain(others.iter()).cloned().collect()
    }

    /// Closes every connection of every part, waits until the peers have been told, and lets the port go.
    pub async fn close(&self) {
        let parts = self.parts();
        futures::future::join_all(parts.iter().map(Self::close_own)).await;
        self.0.others.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    async fn close_own(&self) {
        self.0.quic.close(close_code::DRAINING.into(), b"closing");
        let _ = tokio::time::timeout(CLOSE_PATIENCE, self.0.quic.wait_idle()).await;
        // An attempt to dial that lost the race drains for seconds in quinn, and holds the socket object as long: who
        // joins through gateways binds the same port again at once.
        self.0.socket.set_slots(Vec::new());
    }

    fn own_svid(&self) -> Option<Arc<Svid>> {
        self.0.judge.svid.as_ref().map(SvidHandle::load)
    }

    /// Announces ourselves on the connection, listens to the peer's control stream, and watches its liveness and
    /// identity. `shown`: the own SVID from before the handshake.
    async fn adopt(&self, connection: &PeerConnection, shown: Option<&Svid>) {
        self.0.liveness.watch(connection.clone()).await;
        if let (Some(attestation), Some(shown)) = (&self.0.attestation, shown) {
            attestation.watch(connection.clone(), shown).await;
        }
        let me = (self.0.shared.me.tag, self.0.shared.endpoint);
        let (connection, judge) = (connection.clone(), self.0.judge.clone());
        let hints = self.0.shared.hints.clone();
        self.0.tasks.spawn("control streams", async move {
            control_stream::run(connection, judge, me, |peer| hints.announced(peer)).await;
        });
    }
}

/// quinn server configurations, one per class of handle.
struct Servers {
    mesh: Arc<quinn::ServerConfig>,
    join: Option<Arc<quinn::ServerConfig>>,
    renewal: Option<Arc<quinn::ServerConfig>>,
}

impl Servers {
    fn new(tls: &ServerTls, limits: &Limits) -> Result<Self, UnusableTls> {
        let token_key = transport::token_key();
        let config = |tls: &Arc<rustls::ServerConfig>| transport::server_config(tls, &token_key, limits);
        let first = tls.join.as_ref();
        Ok(Self {
            mesh: config(&tls.mesh)?,
            join: first.map(|tls| config(&tls.join)).transpose()?,
            renewal: first.map(|tls| config(&tls.renewal)).transpose()?,
        })
    }
}

async fn accept_loop(
    overlay: Overlay,
    servers: Servers,
    limits: Limits,
    accepted: mpsc::Sender<PeerConnection>,
) {
    let pending = Arc::new(AtomicUsize::new(0));
    while let Some(incoming) = overlay.0.quic.accept().await {
        let counters = &overlay.0.counters;
        let pinned =
            match overlay.0.shared.inbound.load().admit(overlay.0.shared.me.tag, &incoming.orig_dst_cid()) {
                Ok(pinned) => pinned,
                Err(refusal) => {
                    counters.refused.fetch_add(1, Relaxed);
                    tracing::debug!(reason = refusal.kind(), "first packet ignored");
                    incoming.ignore();
                    continue;
                }
            };
        let in_progress = pending.load(Relaxed);
        if in_progress >= limits.max_pending {
            counters.refused.fetch_add(1, Relaxed);
            incoming.ignore();
            continue;
        }
        // The key of first contact is no secret: whoever uses it has to show that it is where it says.
        let retries = in_progress >= limits.retry_above_pending || pinned.class == HandleClass::FirstContact;
        if retries && !incoming.remote_address_validated() {
            counters.retried.fetch_add(1, Relaxed);
            if let Err(error) = incoming.retry() {
                error.into_incoming().ignore();
            }
            continue;
        }
        let server = match pinned.class {
            HandleClass::Mesh | HandleClass::Control | HandleClass::FirstContact => Some(&servers.mesh),
            HandleClass::Join => servers.join.as_ref(),
            HandleClass::Renewal => servers.renewal.as_ref(),
        };
        let Some(server) = server.cloned() else {
            counters.refused.fetch_add(1, Relaxed);
            incoming.ignore();
            continue;
        };
        pending.fetch_add(1, Relaxed);
        let slot = PendingSlot(Arc::clone(&pending));
        let (overlay, accepted) = (overlay.clone(), accepted.clone());
        let tasks = overlay.0.tasks.clone();
        tasks.spawn("handshake", async move {
            let shown = overlay.own_svid();
            let connection = handshake(&overlay, incoming, server, pinned).await;
            drop(slot);
            if let Some(connection) = connection {
                overlay.adopt(&connection, shown.as_deref()).await;
                let _ = accepted.send(connection).await;
            }
        });
    }
}

/// Counts a handshake in progress for as long as it is held.
struct PendingSlot(Arc<AtomicUsize>);

impl Drop for PendingSlot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

async fn handshake(
    overlay: &Overlay,
    incoming: Incoming,
    server: Arc<quinn::ServerConfig>,
    pinned: Pinned,
) -> Option<PeerConnection> {
    let counters = &overlay.0.counters;
    let connecting = incoming.accept_with(server).ok()?;
    let connection = match tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            counters.handshakes_failed.fetch_add(1, Relaxed);
            tracing::debug!(%error, service = %pinned.service, "handshake failed");
            return None;
        }
        Err(_) => {
            counters.handshakes_failed.fetch_add(1, Relaxed);
            tracing::debug!(service = %pinned.service, "handshake timed out");
            return None;
        }
    };
    let identity = peer_identity(&connection).ok()?;
    // The handle was allotted to one cluster: nobody else may use it, whoever leaked the key.
    let caller = identity.as_ref().map(|id| &id.cluster);
    let admitted = match pinned.class {
        HandleClass::Join => true,
        _ => caller.is_some() && pinned.importer.as_ref() == caller,
    };
    if !admitted {
        counters.importer_mismatch.fetch_add(1, Relaxed);
        tracing::warn!(?caller, importer = ?pinned.importer, service = %pinned.service, "caller is not of the handle's cluster");
        connection.close(close_code::NOT_ADMITTED.into(), b"the handle is another cluster's");
        return None;
    }
    counters.accepted.fetch_add(1, Relaxed);
    Some(PeerConnection::new(connection, identity, pinned.class, Some(pinned)))
}
