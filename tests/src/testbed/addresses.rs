//! Which addresses a cluster has. Every testbed has the same ones: its namespaces are its own.
//!
//! ```text
//! 172.20.C.1          the link's, gateway of cluster C's nodes        fd20:C::1
//! 172.20.C.10+N       node N                                          fd20:C::10+N
//! 172.20.C.100..199   Services of type LoadBalancer
//! 10.60+C.N.0/24      pods of node N                                  fd10:C:N::/64
//! 10.160+C.0.0/16     Services; .1 is the API, .10 DNS                fd11:C::/108
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};

/// Of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses(u8);

impl Addresses {
    /// `cluster` counts from 1.
    pub fn of(cluster: u8) -> Result<Self> {
        ensure!((1..=60).contains(&cluster), "cluster {cluster}: there is room for 60");
        Ok(Self(cluster))
    }

    pub fn bridge(self) -> String {
        format!("br{}", self.0)
    }

    pub fn link(self) -> (Ipv4Addr, Ipv6Addr) {
        (Ipv4Addr::new(172, 20, self.0, 1), Ipv6Addr::new(0xfd20, self.0.into(), 0, 0, 0, 0, 0, 1))
    }

    /// `node` counts from 1.
    pub fn node(self, node: u8) -> (Ipv4Addr, Ipv6Addr) {
        let host = 10 + node;
        (
            Ipv4Addr::new(172, 20, self.0, host),
            Ipv6Addr::new(0xfd20, self.0.into(), 0, 0, 0, 0, 0, host.into()),
        )
    }

    /// First and last.
    pub fn balancers(self) -> (Ipv4Addr, Ipv4Addr) {
        (Ipv4Addr::new(172, 20, self.0, 100), Ipv4Addr::new(172, 20, self.0, 199))
    }

    /// Networks of a node's pods, a /24 and a /64.
    pub fn pods(self, node: u8) -> (Ipv4Addr, Ipv6Addr) {
        let v6 = Ipv6Addr::new(0xfd10, self.0.into(), node.into(), 0, 0, 0, 0, 0);
        (Ipv4Addr::new(10, 60 + self.0, node, 0), v6)
    }

    /// Networks of all pods.
    pub fn cluster_pods(self) -> (String, String) {
        (format!("10.{}.0.0/16", 60 + self.0), format!("fd10:{:x}::/32", self.0))
    }

    pub fn services(self) -> String {
        format!("10.{}.0.0/16,fd11:{:x}::/108", 160 + self.0, self.0)
    }

    pub fn api_service(self) -> IpAddr {
        Ipv4Addr::new(10, 160 + self.0, 0, 1).into()
    }

    pub fn dns(self) -> IpAddr {
        Ipv4Addr::new(10, 160 + self.0, 0, 10).into()
    }

    pub fn api_server(self) -> SocketAddr {
        SocketAddr::from((self.node(1).0, 6443))
    }
}
