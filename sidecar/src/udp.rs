//! UDP services: datagrams of applications, carried in QUIC DATAGRAM frames (RFC 9221).
//!
//! ```text
//!  application --> listener --flow table--> lane ==DATAGRAM==> demux --flow--> socket --> application
//!                      ^                                                          |
//!                      `---- socket <--flow-- demux <==DATAGRAM== lane <----------'
//! ```
//! A flow is one caller's socket address and one port of a service. It is opened and held by a stream with the header of
//! TCP streams, so that admission, policies, choice of endpoint, failover and accounting are the same code; its bytes are
//! drawn in [`tombolo_proto::flow`]. [`listener`] takes datagrams of local applications, explicit or captured; [`outbound`]
//! is a flow on the caller's side, [`inbound`] on the callee's; [`lane`] sends to the peer, [`demux`] receives from it,
//! [`socket`] is the local side, [`queue`] what waits.
//!
//! Nothing grows with what is sent: flows are counted ([`UdpLimits`]), every queue drops its oldest, and what is dropped is
//! counted by reason ([`metrics::Dropped`]).

pub mod demux;
mod flow;
pub mod inbound;
pub mod lane;
pub mod listener;
pub mod metrics;
pub mod outbound;
mod peers;
pub mod queue;
pub mod socket;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};

pub use self::peers::PeerFlows;

use self::metrics::UdpMetrics;
use self::queue::Budget;

/// Bounds of UDP flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpLimits {
    /// Each way: a flow costs 5 to 10 KB, and a socket where it is served.
    pub max_flows: usize,
    /// Of one caller's identity where they are served, so that one caller can't take all.
    pub max_flows_per_peer: usize,
    /// A flow without a datagram for this long ends. A minute is what most protocols expect of NATs (RFC 4787 has two).
    pub idle: Duration,
}

impl Default for UdpLimits {
    fn default() -> Self {
        Self { max_flows: 4096, max_flows_per_peer: 1024, idle: Duration::from_secs(60) }
    }
}

/// What all flows of a sidecar have in common; clones share it.
#[derive(Clone, Debug)]
pub struct UdpContext {
    pub limits: UdpLimits,
    /// One held per flow of local applications: all of them free means that there is none.
    pub outbound: Arc<Semaphore>,
    /// One held per flow of a caller.
    pub inbound: Arc<Semaphore>,
    pub peers: PeerFlows,
    /// Woken, once a second at most, while there is no room for another flow of local applications.
    pub pressure: Arc<Notify>,
    pub budget: Budget,
    pub metrics: UdpMetrics,
}

/// What waits in all flows' queues of one sidecar together.
const QUEUED_BYTES: usize = 16 * 1024 * 1024;
/// The same of all sidecars of one process: of a thousand applications, most are quiet.
const QUEUED_BYTES_SHARED: usize = 64 * 1024 * 1024;

/// Of a process with many sidecars.
pub fn shared_budget() -> Budget {
    Budget::new(QUEUED_BYTES_SHARED)
}

impl UdpContext {
    /// `shared`: of the process, where it has many sidecars.
    pub fn new(limits: UdpLimits, shared: Option<&Budget>, metrics: UdpMetrics) -> Self {
        let budget = shared.map_or_else(|| Budget::new(QUEUED_BYTES), |whole| whole.part(QUEUED_BYTES));
        Self {
            limits,
            outbound: Arc::new(Semaphore::new(limits.max_flows)),
            inbound: Arc::new(Semaphore::new(limits.max_flows)),
            peers: PeerFlows::new(limits.max_flows_per_peer),
            pressure: Arc::default(),
            budget,
            metrics,
        }
    }
}
