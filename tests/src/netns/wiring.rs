//! Cables, addresses and routes between namespaces. All of it ends with the namespaces it is in.

use std::net::IpAddr;

use anyhow::{Context as _, Result};

use super::{Namespace, run};

/// One end of a veth pair.
#[derive(Debug, Clone, Copy)]
pub struct VethEnd<'a> {
    pub namespace: &'a Namespace,
    /// Device name inside the namespace, at most 15 bytes.
    pub device: &'a str,
    /// Address with prefix length, as `10.0.0.1/24`.
    pub address: &'a str,
}

/// Connects two namespaces by a veth pair, both ends up with their addresses. `mtu` in bytes (1500 where unsure).
pub fn veth(a: VethEnd<'_>, b: VethEnd<'_>, mtu: u16) -> Result<()> {
    run(std::process::Command::new("ip").args([
        "-n",
        a.namespace.name(),
        "link",
        "add",
        a.device,
        "type",
        "veth",
        "peer",
        "name",
        b.device,
        "netns",
        b.namespace.name(),
    ]))?;
    for end in [a, b] {
        end.namespace.add_address(end.device, end.address)?;
        end.namespace.ip(&["link", "set", end.device, "mtu", &mtu.to_string(), "up"])?;
    }
    Ok(())
}

impl Namespace {
    /// Adds `address` (with prefix length) to `device`. IPv6 addresses skip duplicate detection: it takes a second.
    pub fn add_address(&self, device: &str, address: &str) -> Result<()> {
        let mut args = vec!["addr", "add", address, "dev", device];
        if address.contains(':') {
            args.push("nodad");
        }
        self.ip(&args).with_context(|| format!("give {device} the address {address}"))
    }

    /// Routes `destination` (a prefix or `default`) through `via`.
    pub fn add_route(&self, destination: &str, via: IpAddr) -> Result<()> {
        self.ip(&["route", "add", destination, "via", &via.to_string()])
    }

    /// Routes `destination` out of a point-to-point device.
    pub fn add_device_route(&self, destination: &str, device: &str) -> Result<()> {
        self.ip(&["route", "add", destination, "dev", device])
    }

    /// Lets the namespace forward packets between its devices, IPv4 and IPv6.
    pub fn enable_forwarding(&self) -> Result<()> {
        self.sysctl("net.ipv4.ip_forward", "1")?;
        self.sysctl("net.ipv6.conf.all.forwarding", "1")
    }
}
