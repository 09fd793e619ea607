//! What the rules are made of: settings read, defaults filled in.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;
use tombolo_model::protocol::Protocol;
use tombolo_sidecar::capture::InboundMode;

/// Which connections of this machine are handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outbound {
    /// To virtual addresses and those that were taken over; nothing else touches the sidecar.
    Services,
    /// All; the sidecar passes on what is not the mesh's.
    All,
    None,
}

/// What becomes of a connection that could do without the sidecar, while nobody listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Away {
    /// It goes to where it was going.
    Pass,
    Refuse,
}

/// Who may connect to the workload's ports past the sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allow {
    pub source: Option<IpNet>,
    pub port: Option<u16>,
}

/// A port of the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct InboundPort {
    pub number: u16,
    pub protocol: Protocol,
}

/// Connections and datagrams from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inbound {
    pub mode: InboundMode,
    /// The sidecar's listener.
    pub listen_port: u16,
    /// The workload's.
    pub ports: BTreeSet<InboundPort>,
    pub allow: Vec<Allow>,
}

/// Let through untouched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exclude {
    pub uids: BTreeSet<u32>,
    pub gids: BTreeSet<u32>,
    pub marks: BTreeSet<u32>,
    pub ports: BTreeSet<u16>,
    pub ranges: Vec<IpNet>,
    pub interfaces: BTreeSet<String>,
}

/// What the rules are made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub outbound: Outbound,
    /// The sidecar's listener.
    pub port: u16,
    pub virtual_ranges: Vec<IpNet>,
    pub addresses: Vec<(Protocol, SocketAddr)>,
    pub away: Away,
    pub grace: Duration,
    pub inbound: Option<Inbound>,
    pub exclude: Exclude,
}
