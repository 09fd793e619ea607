//! Pods' networks: each pod has a namespace with one point-to-point device; everything it sends goes through the node,
//! so that the node's rules (kube-proxy's) see all of it, what returns from a pod of the same node included.
//!
//! The node's program runs in the node's namespace; a pod's namespace ends with its [`Sandbox`].

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};

use super::plan::HostPort;
use crate::netns::{NETNS_DIR, Namespace};

/// Where a pod sends everything: the same at every node and pod.
const GATEWAY: &str = "169.254.1.1";
const GATEWAY_V6: &str = "fe80::1";
/// The first address that a pod may have: below are the network's own, and what somebody may want to fix.
const FIRST: u8 = 4;

/// A node's addresses.
#[derive(Clone, Debug)]
pub struct Addresses {
    pub node: Ipv4Addr,
    pub node_v6: Ipv6Addr,
    /// Network of the node's pods: a /24 and a /64.
    pub pods: Ipv4Addr,
    pub pods_v6: Ipv6Addr,
    /// Of all pods of the cluster, with prefix lengths: what goes elsewhere has the node's address.
    pub cluster: String,
    pub cluster_v6: String,
}

/// The node's side.
#[derive(Debug)]
pub struct Network {
    pub addresses: Addresses,
    /// Addresses in use, and the last one given away: none is given again at once.
    taken: Mutex<(BTreeSet<u8>, u8)>,
}

/// A pod's namespace and addresses, until dropped.
#[derive(Debug)]
pub struct Sandbox {
    namespace: Namespace,
    network: Arc<Network>,
    number: u8,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    ports: Vec<HostPort>,
}

impl Network {
    /// Prepares the namespace that this process is in.
    pub fn prepare(addresses: Addresses) -> Result<Self> {
        for (key, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
            ("ipv6/conf/default/accept_dad", "0"),
        ] {
            std::fs::write(format!("/proc/sys/net/{key}"), value)
                .with_context(|| format!("set net/{key}"))?;
        }
        let Addresses { cluster, cluster_v6, .. } = &addresses;
        feed(
            Command::new("nft").args(["-f", "-"]),
            &format!(
                "table ip testbed {{
                   map hostports_tcp {{ type inet_service : ipv4_addr . inet_service; }}
                   map hostports_udp {{ type inet_service : ipv4_addr . inet_service; }}
                   chain hostports {{
                     meta l4proto tcp dnat ip to tcp dport map @hostports_tcp
                     meta l4proto udp dnat ip to udp dport map @hostports_udp
                   }}
                   chain arriving {{
                     type nat hook prerouting priority dstnat - 5;
                     fib daddr type local jump hostports
                   }}
                   chain local {{
                     type nat hook output priority -105;
                     ip daddr != 127.0.0.0/8 fib daddr type local jump hostports
                   }}
                   chain leaving {{
                     type nat hook postrouting priority srcnat + 5;
                     ip saddr {cluster} ip daddr != {cluster} oifname \"eth0\" masquerade
                   }}
                 }}
                 table ip6 testbed {{
                   chain leaving {{
                     type nat hook postrouting priority srcnat + 5;
                     ip6 saddr {cluster_v6} ip6 daddr != {cluster_v6} oifname \"eth0\" masquerade
                   }}
                 }}\n"
            ),
        )?;
        Ok(Self { addresses, taken: Mutex::new((BTreeSet::new(), FIRST - 1)) })
    }

    fn allot(&self) -> Result<u8> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let after = taken.1.saturating_add(1);
        let free = (after..=254).chain(FIRST..after).find(|number| !taken.0.contains(number));
        let number = free.context("the node has no pod address left")?;
        taken.0.insert(number);
        taken.1 = number;
        Ok(number)
    }

    /// A namespace for a pod, connected.
    pub fn attach(self: &Arc<Self>, sysctls: &[(String, String)], ports: &[HostPort]) -> Result<Sandbox> {
        let number = self.allot()?;
        let [a, b, c, _] = self.addresses.pods.octets();
        let v4 = Ipv4Addr::new(a, b, c, number);
        let v6 = Ipv6Addr::from(u128::from(self.addresses.pods_v6) + u128::from(number));
        let namespace = match Namespace::create("pod") {
            Ok(namespace) => namespace,
            Err(error) => {
                self.release(number);
                return Err(error);
            }
        };
        let sandbox = Sandbox { namespace, network: Arc::clone(self), number, v4, v6, ports: ports.to_vec() };
        let inside = &sandbox.namespace;
        inside.sysctl("net.ipv6.conf.default.accept_dad", "0")?;
        for (key, value) in sysctls {
            inside.sysctl(key, value)?;
        }
        let (device, name) = (sandbox.device(), inside.name());
        let Addresses { node, node_v6, .. } = &self.addresses;
        feed(
            Command::new("ip").args(["-batch", "-"]),
            &format!(
                "link add {device} type veth peer name eth0 netns {name}
                 addr add {GATEWAY}/32 dev {device} scope link
                 addr add {GATEWAY_V6}/64 dev {device} nodad
                 link set {device} up
                 route add {v4} dev {device} src {node}
                 route add {v6} dev {device} src {node_v6}\n"
            ),
        )?;
        feed(
            Command::new("ip").args(["-n", name, "-batch", "-"]),
            &format!(
                "addr add {v4}/32 dev eth0
                 addr add {v6}/128 dev eth0 nodad
                 link set eth0 up
                 route add {GATEWAY} dev eth0 scope link
                 route add default via {GATEWAY} dev eth0
                 route add default via {GATEWAY_V6} dev eth0\n"
            ),
        )?;
        sandbox.host_ports("add")?;
        Ok(sandbox)
    }

    fn release(&self, number: u8) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).0.remove(&number);
    }
}

impl Sandbox {
    fn device(&self) -> String {
        format!("pod{}", self.number)
    }

    pub fn addresses(&self) -> Vec<IpAddr> {
        vec![self.v4.into(), self.v6.into()]
    }

    /// The namespace's file.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(NETNS_DIR).join(self.namespace.name())
    }

    fn host_ports(&self, verb: &str) -> Result<()> {
        let element = |port: &HostPort| {
            let (map, value) = (
                if port.udp { "hostports_udp" } else { "hostports_tcp" },
                format!("{} . {}", self.v4, port.container),
            );
            format!("{verb} element ip testbed {map} {{ {} : {value} }}\n", port.host)
        };
        let all: String = self.ports.iter().map(element).collect();
        if all.is_empty() { Ok(()) } else { feed(Command::new("nft").args(["-f", "-"]), &all) }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if let Err(error) = self.host_ports("delete") {
            tracing::warn!("take host ports away: {error:#}");
        }
        // The device goes at once; the namespace goes when the last process in it has.
        if let Err(error) =
            feed(Command::new("ip").args(["-batch", "-"]), &format!("link del {}\n", self.device()))
        {
            tracing::warn!("take a pod's device away: {error:#}");
        }
        self.network.release(self.number);
    }
}

/// Runs a short command with `input`.
pub fn feed(command: &mut Command, input: &str) -> Result<()> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("no standard input")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
