//! The ways from a client to the origin that are compared. Each starts its processes on a [`Site`] and says where
//! clients enter; everything it started ends with the [`Running`] value.
//!
//! `tombolo` is the mesh's own path; the others are what it is compared with.

mod direct;
mod haproxy;
mod nginx;
mod quic;
pub mod tombolo;

use std::net::SocketAddr;

use anyhow::Result;
use tombolo_tests::process::Process;

use crate::site::Site;

/// The QUIC congestion control of a topology that has one to choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum QuicCongestion {
    Cubic,
    Bbr,
}

/// One way to the origin.
pub trait Topology {
    /// Short name, as in the table and in `--only`.
    fn name(&self) -> String;

    /// What runs, in one line.
    fn description(&self) -> String;

    /// The kernel's congestion control while this topology runs.
    fn kernel_congestion(&self) -> &'static str {
        "cubic"
    }

    fn start(&self, site: &Site) -> Result<Running>;
}

/// A started topology.
#[derive(Debug)]
pub struct Running {
    pub http: SocketAddr,
    pub bulk: SocketAddr,
    /// Everything between client and origin, first hop first. The name is the role; same roles are reported apart.
    pub hops: Vec<Process>,
    /// What runs beside the path, such as control planes; not measured, ended with the rest.
    #[allow(dead_code)] // held, never read: dropping it ends them
    pub support: Vec<Process>,
}

/// Compared over loopback.
pub fn local() -> Vec<Box<dyn Topology>> {
    vec![
        Box::new(direct::Direct { kernel_congestion: "cubic" }),
        Box::new(haproxy::HaproxyChain { resumption: false, kernel_congestion: "cubic" }),
        Box::new(haproxy::HaproxyChain { resumption: true, kernel_congestion: "cubic" }),
        Box::new(nginx::NginxStream),
        Box::new(quic::TerminatingQuic { congestion: QuicCongestion::Cubic }),
        Box::new(tombolo::Tombolo { max_udp_payload: tombolo::USUAL, captured: None, datagrams: false }),
        // Loopback carries 64 KB: packets are as large as the sidecar makes them.
        Box::new(tombolo::Tombolo { max_udp_payload: tombolo::JUMBO, captured: None, datagrams: false }),
    ]
}

/// Compared over the emulated link.
pub fn wide_area() -> Vec<Box<dyn Topology>> {
    vec![
        Box::new(direct::Direct { kernel_congestion: "cubic" }),
        Box::new(haproxy::HaproxyChain { resumption: false, kernel_congestion: "cubic" }),
        Box::new(haproxy::HaproxyChain { resumption: false, kernel_congestion: "bbr" }),
        Box::new(quic::TerminatingQuic { congestion: QuicCongestion::Bbr }),
        Box::new(tombolo::Tombolo { max_udp_payload: tombolo::USUAL, captured: None, datagrams: false }),
    ]
}

/// What the others are compared with, by name, in the local and the wide-area scenarios.
pub const LOCAL_BASELINES: &[&str] = &["haproxy"];
pub const WIDE_AREA_BASELINES: &[&str] = &["haproxy", "haproxy-bbr"];
