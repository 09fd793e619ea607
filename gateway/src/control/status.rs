//! What the control thread says of itself: for metrics, readiness and reports to the federator.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tombolo_model::ids::ClusterTag;

/// What readers may know.
#[derive(Clone, Debug, Default)]
pub struct Status {
    pub hops: Vec<HopStatus>,
    pub registered: usize,
    pub announced: usize,
    pub unreachable: Vec<ClusterTag>,
    pub refused_registers: u64,
    pub gone_sent: u64,
    pub gone_received: u64,
}

/// One gateway of a peer, or a sibling.
#[derive(Clone, PartialEq, Debug)]
pub struct HopStatus {
    pub cluster: String,
    pub name: String,
    pub sibling: bool,
    pub address: SocketAddr,
    pub alive: bool,
    pub draining: bool,
    pub rtt: Option<Duration>,
    pub loss_per_mille: u32,
    pub mtu: u16,
    pub last_ack: Option<Instant>,
}
