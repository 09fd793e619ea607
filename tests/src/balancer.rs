//! A UDP load balancer as clouds put in front of gateways: one address, sticky by 5-tuple, blind to dead backends.
//!
//! It is the kernel's own NAT in a router namespace: a new flow is hashed to a backend, conntrack keeps every later
//! packet of the 5-tuple there, whatever becomes of the backend. The answers must come back through the router, so
//! backends route to the clients through it. The rules end with the namespace.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Result, bail};

use crate::netns::Namespace;

/// Balances UDP to `front` over `backends` (on the same port). `front`'s address must be routed to `router`.
/// Called again, it replaces the backends for flows that begin from now on.
pub fn sticky(router: &Namespace, front: SocketAddrV4, backends: &[Ipv4Addr]) -> Result<()> {
    if backends.is_empty() {
        bail!("a balancer for {front} needs at least one backend");
    }
    router.enable_forwarding()?;
    let mut map = String::new();
    for (n, backend) in backends.iter().enumerate() {
        let _ = write!(map, "{}{n} : {backend}", if n == 0 { "" } else { ", " });
    }
    let (address, port, count) = (front.ip(), front.port(), backends.len());
    // `add` makes the deletion succeed the first time; all of it is one transaction.
    router.nft(&format!(
        "add table ip tombolo_balancer_{port}
        delete table ip tombolo_balancer_{port}
        table ip tombolo_balancer_{port} {{
            chain prerouting {{
                type nat hook prerouting priority dstnat; policy accept;
                ip daddr {address} udp dport {port} dnat to jhash ip saddr . udp sport mod {count} map {{ {map} }}
            }}
        }}"
    ))
}
