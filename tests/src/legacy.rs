//! A machine outside that serves `shop/legacy`, and one caller: what scenarios of a machine's life start from.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::mesh::{Layout, Mesh, binary, http_get};
use crate::process::ProcessSpec;
use crate::scenario::flag;

pub const VM: &str = "vm-1";
/// On the machine itself.
pub const VM_APP: &str = "127.0.0.1:8080";

/// West with one gateway, and a machine behind NAT that serves `shop/legacy` to a sidecar of west.
pub struct Legacy {
    pub mesh: Mesh,
    pub machine: usize,
    legacy: SocketAddr,
}

impl Legacy {
    /// `more`: further flags of the machine's sidecar.
    pub fn start(more: &[&str]) -> Result<Self> {
        let mut mesh = Mesh::start(&Layout { clusters: &["west"], gateways: 1, ..Layout::default() })?;
        let service = flag("--service", "legacy", 80, VM_APP.parse()?);
        let flags: Vec<String> =
            service.into_iter().chain(more.iter().map(|&more| more.to_owned())).collect();
        let machine = mesh.machine("west", VM, &flags)?;
        let app = ProcessSpec::new("vm-app", binary()?)
            .args(["demo-app", "--listen", VM_APP, "--name", VM])
            .within(mesh.outside(machine)?);
        mesh.spawn("vm/app", app)?;
        let legacy = mesh.cluster("west")?.address(21, 9080);
        mesh.sidecar("west", "client", &flag("--upstream", "legacy", 80, legacy))?;
        let started = Self { mesh, machine, legacy };
        started.served(Duration::from_secs(15))?;
        Ok(started)
    }

    /// Waits until the caller is answered by the machine; for how long it had to.
    pub fn served(&self, limit: Duration) -> Result<Duration> {
        self.mesh.eventually("the machine serves", limit, |mesh| {
            let answer = http_get(&mesh.cluster("west")?.namespace, self.legacy, "/")?;
            ensure!(answer.contains(VM), "{answer}");
            Ok(())
        })
    }
}
