//! Joining a cluster with a one-use token, or as a pod with its service account's (protocol.md section 4).
//!
//! The joiner makes its key here, opens a temporary overlay, dials the join handle, shows the token's secret and a CSR,
//! and stores what it gets. Inside the cluster it dials the federator's address directly, under a join-kind source ID;
//! outside it REGISTERs with the token's provisional lease at the gateways, so that answers find it.

mod pod;

pub use pod::{PodRole, ServiceAccountToken, TokenSource};

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tombolo_identity::issuer::KeyAndCsr;
use tombolo_identity::{ExpectedPeer, tls};
use tombolo_model::ids::{Block, ClusterTag, EndpointId, Handle, Incarnation};
use tombolo_model::names::ClusterName;
use tombolo_proto::convert::{self, FieldError};
use tombolo_proto::token::{self, TokenError};
use tombolo_proto::v1;
use tombolo_proto::v1::join_client::JoinClient;
use tombolo_runtime::tasks::TaskGroup;
use tombolo_runtime::{clock, dirs};

use super::state::State;
use super::{Control, Member, MemberError, check_svid, control_targets, gateway_hops};
use crate::cid::Kind;
use crate::connection::PeerConnection;
use crate::dial::{DialError, DialTarget};
use crate::endpoint::{BindError, Overlay, OverlayConfig};
use crate::grpc;
use crate::keys::{CidKey, KeyRing};
use crate::lease::{EndpointLease, LeaseFile};
use crate::routes::{GatewayHop, Routes};
use crate::transport::Limits;

/// Each dial ends after 3 s by itself; five cover a gateway that is just starting and a registration under loss.
pub(super) const DIALS: u32 = 5;
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// A federator lets so many join a second and turns the others away. They ask again, each about a second later and at a
/// moment of its own, for as long as a rollout of a few thousand takes.
const TURNED_AWAY_PAUSE: Duration = Duration::from_secs(1);
const TURNED_AWAY_PATIENCE: Duration = Duration::from_secs(120);
/// The temporary overlay's tasks end by then.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);

/// How the joiner shows who it is.
#[derive(Clone, Debug)]
enum Proof {
    /// A join token's secret.
    Secret,
    /// A service account's token, and the role that is asked for.
    ServiceAccount(ServiceAccountToken, PodRole),
}

/// What a token says, ready to be used.
#[derive(Clone, Debug)]
pub struct JoinPlan {
    /// Federators (direct) or gateways.
    pub addresses: Vec<SocketAddr>,
    pub direct: bool,
    /// `sha256:<hex>` of the federation's root.
    pub root_fingerprint: String,
    pub cluster: ClusterName,
    pub tag: ClusterTag,
    pub token_id: String,
    pub secret: Vec<u8>,
    /// Unix seconds; the federator judges, with its clock.
    pub not_after: u64,
    /// Block and keys that answers are routed by until we have joined; only when not direct.
    pub provisional: Option<(Block, KeyRing)>,
    /// Of the join handle.
    pub join_keys: KeyRing,
}

impl JoinPlan {
    /// Reads a token. `name`, where the joiner has one, must be the token's: asking with another one would use it up.
    pub fn from_token(text: &str, name: Option<&str>, now: Duration) -> Result<(Self, String), JoinError> {
        Self::read(token::parse(text, v1::TokenKind::Workload, now)?, name)
    }

    /// Reads a link token, which must be bound to the cluster `own`.
    pub fn from_link_token(text: &str, own: &ClusterName, now: Duration) -> Result<Self, JoinError> {
        let token = token::parse(text, v1::TokenKind::Link, now)?;
        Self::read(token, Some(own.as_str())).map(|(plan, _)| plan)
    }

    fn read(token: v1::Token, name: Option<&str>) -> Result<(Self, String), JoinError> {
        if let Some(name) = name.filter(|name| *name != token.name) {
            return Err(JoinError::WrongName { given: name.to_owned(), bound: token.name });
        }
        let (federators, rejected) = control_targets(&token.federators);
        log_rejected(&rejected);
        let (gateways, rejected) = gateway_hops(&token.gateways);
        log_rejected(&rejected);
        let federators: Vec<_> = federators.into_iter().filter_map(|(_, address)| address).collect();
        let direct = !federators.is_empty();
        let missing = |field| JoinError::from(FieldError::new(field, "nothing", "present"));
        let provisional = token.provisional.as_ref().map(EndpointLease::from_wire).transpose()?;
        let plan = Self {
            addresses: if direct { federators } else { gateways.into_iter().map(|g| g.address).collect() },
            direct,
            root_fingerprint: token.root_fingerprint,
            cluster: convert::parse("token.cluster", &token.cluster)?,
            tag: convert::tag("token.tag", token.tag)?,
            token_id: token.token_id,
            secret: token.secret,
            not_after: u64::try_from(token.not_after_unix).unwrap_or(0),
            provisional: provisional.map(|lease| (lease.block, lease.keys)),
            join_keys: KeyRing::from_wire(
                token.join_keys.as_ref().ok_or_else(|| missing("token.join_keys"))?,
            )?,
        };
        Ok((plan, token.name))
    }
}

/// What the joiner brings.
#[derive(Clone, Debug)]
pub struct JoinOptions {
    /// Must be the name that the token is bound to.
    pub name: String,
    /// Where the member's overlay will listen; joining uses it too, so that a port clash shows at once.
    pub bind: SocketAddr,
}

/// Why joining failed.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(
        "the token is for {bound:?}, not for {given:?}: start with --name {bound}, or ask for a token for {given:?}"
    )]
    WrongName { given: String, bound: String },
    #[error(
        "the pod's token is that of {id}, not of gateway {given:?}: start it with the name of its pod as --name"
    )]
    OtherPod { given: String, id: String },
    #[error("{} is already joined as {name}: use another state directory, or move this one away", dir.display())]
    AlreadyJoined { dir: PathBuf, name: String },
    #[error("the token names no address to join at")]
    NoAddress,
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error(
        "{} did not answer ({source}): check that {what} runs there, and that this machine may send UDP to it (port {ports}) and get answers",
        list(addresses)
    )]
    Unreachable { addresses: Vec<SocketAddr>, what: &'static str, ports: String, source: DialError },
    #[error(
        "whoever answers at {} is not the federator of cluster {cluster}: {source}: is the token from another federation?",
        list(addresses)
    )]
    WrongPeer { addresses: Vec<SocketAddr>, cluster: ClusterName, source: DialError },
    #[error("cluster {cluster} refused to let {name:?} join: {reason}")]
    Refused { cluster: ClusterName, name: String, reason: String },
    #[error(
        "cluster {cluster} did not answer the join request in time: the token may be used up; if joining again is refused, ask for a new one"
    )]
    Late { cluster: ClusterName },
    #[error("there is no token of the service account: {0}")]
    ServiceAccount(String),
    #[error("the federator's answer can't be used: {0}")]
    Answer(#[from] FieldError),
    #[error(transparent)]
    State(#[from] MemberError),
    #[error("the TLS configuration can't be made: {0}")]
    Tls(#[from] rustls::Error),
}

fn list(addresses: &[SocketAddr]) -> String {
    addresses.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(", ")
}

impl JoinError {
    /// A metric or exit label: a closed set.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Token(TokenError::Expired { .. }) => "expired",
            Self::Token(_) | Self::NoAddress => "token",
            Self::WrongName { .. } | Self::OtherPod { .. } => "wrong_name",
            Self::AlreadyJoined { .. } => "already_joined",
            Self::Bind(_) => "bind",
            Self::Unreachable { .. } => "unreachable",
            Self::WrongPeer { .. } => "wrong_peer",
            Self::Refused { .. } => "refused",
            Self::Late { .. } => "late",
            Self::ServiceAccount(_) => "service_account",
            Self::Answer(_) => "answer",
            Self::State(_) => "state",
            Self::Tls(_) => "tls",
        }
    }
    /// Whether the same token may work later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Bind(_) | Self::ServiceAccount(_))
    }
}

impl Member {
    /// Joins with a token's text. `bind` as for the member's overlay; `name`: checked against the token's.
    pub async fn join(
        text: &str,
        dir: &Path,
        name: Option<&str>,
        bind: SocketAddr,
    ) -> Result<Self, JoinError> {
        let (plan, name) = JoinPlan::from_token(text, name, clock::since_unix_epoch())?;
        Self::join_as_planned(&plan, dir, &JoinOptions { name, bind }).await
    }

    /// Joins and stores everything in `dir`. On any error the directory is as before, and the token is used up only if
    /// the federator had accepted it.
    pub async fn join_as_planned(
        plan: &JoinPlan,
        dir: &Path,
        options: &JoinOptions,
    ) -> Result<Self, JoinError> {
        Self::join_by(plan, &Proof::Secret, dir, options).await
    }

    async fn join_by(
        plan: &JoinPlan,
        proof: &Proof,
        dir: &Path,
        options: &JoinOptions,
    ) -> Result<Self, JoinError> {
        if let Some(state) = State::load(dir)? {
            return Err(JoinError::AlreadyJoined { dir: dir.to_owned(), name: state.name });
        }
        // Before the token is used up: a directory that can't be written would waste it.
        dirs::ensure_private(dir).map_err(MemberError::from)?;
        if plan.addresses.is_empty() {
            return Err(JoinError::NoAddress);
        }
        let way = JoinConnection::open(plan, options.bind).await?;
        let joined = match proof {
            Proof::Secret => ask(plan, way.peer(), &options.name).await,
            Proof::ServiceAccount(token, role) => {
                pod::ask(plan, way.peer(), &options.name, (token, *role)).await
            }
        };
        way.close().await;
        let (key, answer) = joined?;
        store(plan, dir, &options.name, &key, answer)
    }
}

/// A connection to the federator that made a token, over an overlay of its own.
#[derive(Debug)]
pub struct JoinConnection {
    peer: PeerConnection,
    overlay: Overlay,
    tasks: TaskGroup,
}

impl JoinConnection {
    /// Dials, with patience for a gateway that is just starting. Needs the runtime for as long as it is used.
    pub async fn open(plan: &JoinPlan, bind: SocketAddr) -> Result<Self, JoinError> {
        let tasks = TaskGroup::new();
        let overlay = open(plan, bind, &tasks)?;
        match dial(plan, &overlay).await {
            Ok(peer) => Ok(Self { peer, overlay, tasks }),
            Err(error) => {
                tasks.shutdown(CLOSE_PATIENCE).await;
                Err(error)
            }
        }
    }

    pub fn peer(&self) -> &PeerConnection {
        &self.peer
    }

    pub async fn close(self) {
        let Self { peer, overlay, tasks } = self;
        overlay.close().await;
        drop((peer, overlay));
        tasks.shutdown(CLOSE_PATIENCE).await;
    }
}

/// The temporary overlay.
fn open(plan: &JoinPlan, bind: SocketAddr, tasks: &TaskGroup) -> Result<Overlay, JoinError> {
    let mut routes = Routes::empty(plan.tag);
    let (kind, endpoint, keys) = match &plan.provisional {
        Some((block, keys)) if !plan.direct => {
            routes.gateways = plan.addresses.iter().copied().map(GatewayHop::at).collect();
            // The provisional block is ours alone; any incarnation will do.
            let incarnation = Incarnation::new(rand::random::<u8>() % Incarnation::COUNT);
            let endpoint = incarnation.map_or(EndpointId::from_u32(0), |i| block.endpoint(i));
            (Kind::Endpoint, endpoint, keys.clone())
        }
        None if !plan.direct => {
            return Err(TokenError::Incomplete { field: "provisional lease" }.into());
        }
        _ => {
            let federator = |(index, address): (usize, &SocketAddr)| {
                (EndpointId::from_u32(u32::try_from(index).unwrap_or(0)), *address)
            };
            routes.control = plan.addresses.iter().enumerate().map(federator).collect();
            // Nobody checks it: answers go to where the packets came from.
            let key = CidKey::from_bytes(rand::random());
            let keys = KeyRing::derive_now(clock::since_unix_epoch(), |_| key.clone());
            (Kind::Join, EndpointId::from_u32(rand::random()), keys)
        }
    };
    let config = OverlayConfig {
        tag: plan.tag,
        endpoint,
        keys,
        kind,
        bind,
        registers: !plan.direct,
        learns: plan.direct,
        server: None,
        svid: None,
        limits: Limits::default(),
    };
    let overlay = Overlay::bind(config, tasks)?;
    overlay.set_routes(routes);
    Ok(overlay)
}

/// Dials the join handle until somebody answers.
async fn dial(plan: &JoinPlan, overlay: &Overlay) -> Result<PeerConnection, JoinError> {
    let expected = ExpectedPeer::Role { cluster: plan.cluster.clone(), path: "/federator".into() };
    let tls = tls::join_client_config(&plan.root_fingerprint, expected, clock::since_unix_epoch)?;
    let target = DialTarget {
        kind: Kind::Control,
        tag: plan.tag,
        handle: Handle::JOIN,
        keys: Arc::new(plan.join_keys.clone()),
    };
    let mut dials = 0;
    loop {
        dials += 1;
        match overlay.dial(&target, Arc::clone(&tls)).await {
            Ok(connection) => return Ok(connection),
            Err(error) if error.is_retryable() && dials < DIALS => {
                tracing::info!(%error, addresses = %list(&plan.addresses), "no answer yet, trying again");
            }
            Err(source) => return Err(unreachable(plan, source)),
        }
    }
}

/// Asks; the key and the answer.
async fn ask(
    plan: &JoinPlan,
    peer: &PeerConnection,
    name: &str,
) -> Result<(KeyAndCsr, v1::JoinWorkloadResponse), JoinError> {
    let fresh = KeyAndCsr::generate().map_err(MemberError::from)?;
    let request = v1::JoinWorkloadRequest {
        token_id: plan.token_id.clone(),
        secret: plan.secret.clone(),
        csr_der: fresh.csr_der.clone(),
        name: name.to_owned(),
        lease_request_nonce: rand::random::<[u8; 16]>().to_vec(),
    };
    let client = JoinClient::new(grpc::channel(peer.clone()));
    let call = || {
        let (mut client, request) = (client.clone(), request.clone());
        async move { client.join_workload(request).await }
    };
    Ok((fresh, answered(plan, name, call).await?))
}

fn unreachable(plan: &JoinPlan, source: DialError) -> JoinError {
    let addresses = plan.addresses.clone();
    match source {
        DialError::NoAnswer | DialError::Handshake(quinn::ConnectionError::TimedOut) => {
            let ports: HashSet<_> = addresses.iter().map(SocketAddr::port).collect();
            let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
            let what = if plan.direct { "a federator" } else { "a gateway" };
            JoinError::Unreachable { addresses, what, ports, source }
        }
        source => JoinError::WrongPeer { addresses, cluster: plan.cluster.clone(), source },
    }
}

/// The federator's answer, asked for again while it turns joiners away because they are too many.
async fn answered<T, F: Future<Output = Result<tonic::Response<T>, tonic::Status>>>(
    plan: &JoinPlan,
    name: &str,
    call: impl Fn() -> F,
) -> Result<T, JoinError> {
    let until = tokio::time::Instant::now() + TURNED_AWAY_PATIENCE;
    loop {
        let answer = tokio::time::timeout(CALL_TIMEOUT, call()).await;
        match answer.map_err(|_| JoinError::Late { cluster: plan.cluster.clone() })? {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status)
                if status.metadata().contains_key(grpc::RETRY_AFTER)
                    && tokio::time::Instant::now() < until =>
            {
                tracing::info!(cluster = %plan.cluster, "too many join at once; asking again");
                tokio::time::sleep(TURNED_AWAY_PAUSE.mul_f64(0.5 + rand::random::<f64>())).await;
            }
            Err(status) => {
                return Err(JoinError::Refused {
                    cluster: plan.cluster.clone(),
                    name: name.to_owned(),
                    reason: refusal(&status),
                });
            }
        }
    }
}

/// The federator's words, cut to what a terminal bears.
pub(super) fn refusal(status: &tonic::Status) -> String {
    let words: String = status.message().chars().take(300).collect();
    if words.is_empty() { format!("{:?}", status.code()) } else { words }
}

fn store(
    plan: &JoinPlan,
    dir: &Path,
    name: &str,
    key: &KeyAndCsr,
    answer: v1::JoinWorkloadResponse,
) -> Result<Member, JoinError> {
    let v1::JoinWorkloadResponse { svid, lease, control, gateways } = answer;
    let missing = |field| FieldError::new(field, "nothing", "present");
    let svid = svid.ok_or_else(|| missing("svid"))?;
    let lease = EndpointLease::from_wire(&lease.ok_or_else(|| missing("lease"))?)?;
    let control = control.ok_or_else(|| missing("control"))?;
    let checked = check_svid(&key.key_der, &svid)?;
    if checked.spiffe_id.cluster().as_ref() != Some(&plan.cluster) {
        return Err(FieldError::new(
            "svid.spiffe_id",
            &checked.spiffe_id,
            format!("of cluster {}", plan.cluster),
        )
        .into());
    }
    if lease.cluster != plan.cluster || lease.tag != plan.tag {
        let expected = format!("of cluster {} ({})", plan.cluster, plan.tag);
        return Err(
            FieldError::new("lease.cluster", format!("{} ({})", lease.cluster, lease.tag), expected).into()
        );
    }
    if lease.spiffe_id != checked.spiffe_id.as_str() {
        return Err(FieldError::new("lease.spiffe_id", &lease.spiffe_id, checked.spiffe_id.as_str()).into());
    }
    let (mut hops, rejected) = gateway_hops(&gateways);
    log_rejected(&rejected);
    if hops.is_empty() && !plan.direct {
        // The gateways that we came through are known to work.
        hops = plan.addresses.iter().copied().map(GatewayHop::at).collect();
    }
    let control = parse_control(&control, hops)?;
    let mut state = State::new(name, plan.cluster.clone(), plan.tag, &key.key_der, &svid, &control)?;
    if !plan.direct {
        state.origins.clone_from(&plan.addresses);
    }
    LeaseFile::save(dir, &lease).map_err(MemberError::from)?;
    state.save(dir)?;
    Ok(Member::assemble(dir, state, lease)?)
}

pub(super) fn log_rejected(rejected: &[FieldError]) {
    for error in rejected {
        tracing::warn!(%error, "a record of the federator's answer is not usable and was left out");
    }
}

pub(super) fn parse_control(
    wire: &v1::ControlAccess,
    gateways: Vec<GatewayHop>,
) -> Result<Control, FieldError> {
    let keys = wire.keys.as_ref().ok_or_else(|| FieldError::new("control.keys", "nothing", "present"))?;
    let ids = wire.spiffe_ids.iter().map(|id| convert::parse("control.spiffe_ids", id));
    let (federators, rejected) = control_targets(&wire.federators);
    log_rejected(&rejected);
    Ok(Control {
        handle: Handle::from_u32(wire.handle),
        keys: Arc::new(KeyRing::from_wire(keys)?),
        spiffe_ids: ids.collect::<Result<Vec<_>, _>>()?.into(),
        federators,
        gateways,
    })
}
