//! Who is in the registry, as it was last heard: sidecars with what they serve, and gateways.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tombolo_identity::SpiffeId;
use tombolo_model::ids::{Block, EndpointId};
use tombolo_model::names::ServiceKey;
use tombolo_proto::v1;

use crate::clones::{Instance, Seen};
use crate::facts::{Port, Role};

/// A silent endpoint's peers are told that it may be gone after this; they check for themselves.
pub(super) const GONE_AFTER: Duration = Duration::from_secs(10);

/// Whether a member is heard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Presence {
    Live,
    /// No report for too long.
    Silent,
    /// It said so, or its control connection closed.
    Left,
}

/// What somebody verifies by and shows, as it says itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HeldTrust {
    /// Of its bundle; 0: it has not said.
    pub sequence: u64,
    /// Of the intermediate that it shows.
    pub issuer_sha256: [u8; 32],
    /// Start of its leaf, unix seconds.
    pub issued_unix: u64,
}

impl HeldTrust {
    /// What does not read is nothing: it counts as not said.
    pub(super) fn from_wire(wire: &v1::TrustHeld) -> Self {
        let v1::TrustHeld { sequence, issuer_sha256, issued_unix } = wire;
        Self {
            sequence: *sequence,
            issuer_sha256: issuer_sha256.as_slice().try_into().unwrap_or_default(),
            issued_unix: u64::try_from(*issued_unix).unwrap_or(0),
        }
    }
}

/// A service as one endpoint serves it.
#[derive(Clone, PartialEq, Debug)]
pub struct Served {
    pub ports: Vec<Port>,
    pub weight: u32,
    pub healthy: bool,
    pub reason: String,
}

/// A sidecar.
#[derive(Clone, Debug)]
pub struct Member {
    pub block: Block,
    pub spiffe_id: SpiffeId,
    pub role: Role,
    /// One per socket.
    pub ids: Vec<EndpointId>,
    /// `None`: it registers at the gateways.
    pub address: Option<SocketAddr>,
    pub services: BTreeMap<ServiceKey, Served>,
    /// What it said it serves and may not.
    pub refused: BTreeMap<String, String>,
    pub presence: Presence,
    /// It said that it drains: it counts for nothing any more.
    pub leaving: bool,
    pub reason: String,
    pub heard: Duration,
    pub heard_unix: u64,
    /// Of its newest configuration stream.
    pub watch: u64,
    pub version: String,
    /// Of this process; `None`: not heard yet, or an older one.
    pub instance: Option<Instance>,
    /// What it calls its machine.
    pub host: String,
    /// When it last sent anything. Unlike `heard` never credited.
    pub spoke: Duration,
    pub clones: Seen,
    /// It answers questions.
    pub answers: bool,
    /// The last question whether it lives, and the last one that it has answered.
    pub asked: u64,
    pub answered: u64,
    /// Where services lead past the mesh: the last hop is plain.
    pub plain: BTreeMap<ServiceKey, Vec<String>>,
    pub upstreams: Vec<v1::UpstreamStatus>,
    pub hops: Vec<v1::HopStatus>,
    /// Revocations by name, and when this process enforced them: milliseconds since the Unix epoch.
    /// Shared, since the registry is copied with every change of the facts.
    pub enforced: Arc<BTreeMap<String, i64>>,
    pub trust: HeldTrust,
}

impl Member {
    pub fn in_rotation(&self, service: &ServiceKey) -> bool {
        self.presence == Presence::Live && self.services.get(service).is_some_and(|s| s.healthy)
    }
    /// How long it has not been there.
    pub fn absent_for(&self, now: Duration) -> Duration {
        match self.presence {
            Presence::Live => Duration::ZERO,
            Presence::Left | Presence::Silent => now.saturating_sub(self.heard),
        }
    }
    pub fn gone(&self, now: Duration) -> bool {
        match self.presence {
            Presence::Live => false,
            Presence::Left => true,
            Presence::Silent => now.saturating_sub(self.heard) >= GONE_AFTER,
        }
    }
}

/// A gateway replica.
#[derive(Clone, Debug)]
pub struct Gateway {
    pub name: String,
    pub border: SocketAddr,
    pub inner: SocketAddr,
    pub balanced: bool,
    pub zone: String,
    pub start_number: u64,
    /// The endpoint that it dials us with.
    pub endpoint: Option<(EndpointId, Option<SocketAddr>)>,
    pub presence: Presence,
    pub draining: bool,
    pub registered: u32,
    pub heard: Duration,
    pub heard_unix: u64,
    pub watch: u64,
    pub links: Vec<v1::LinkCounters>,
    pub hops: Vec<v1::HopStatus>,
    pub trust: HeldTrust,
}
