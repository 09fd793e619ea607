//! Backends that have no sidecar: addresses and DNS names that this one stands in front of (pure but for [`watch`](mod@watch)).
//!
//! A service may have several, with weights; each is resolved and checked from here, and only those in order get
//! connections. Whoever writes the manifest can make this process connect to what only it can reach, so a [`Guard`] looks
//! at every address, each time that a name is resolved: this machine itself, link-local addresses (where clouds keep
//! credentials), multicast and virtual addresses are refused unless the sidecar's own flag allows them, its own ports always.

mod names;
pub mod watch;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use tombolo_model::balance;

/// A name's answers beyond these are not used.
pub const MAX_ADDRESSES: usize = 16;
/// One that refuses or hangs is not the only one that is asked.
pub const TRIES: usize = 3;
/// Amazon's instance metadata over IPv6, which is not link-local.
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
/// Alibaba's, in the range of carriers' NAT; others keep theirs at link-local addresses.
const METADATA_V4: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 200);

/// Where a backend is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    Ip(IpAddr),
    Name(String),
}

/// A backend as the manifest has it: `HOST:PORT` and a weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    pub host: Host,
    pub port: u16,
    pub weight: u32,
}

impl FromStr for Backend {
    type Err = &'static str;
    /// `db.legacy:5432`, `10.0.0.5:5432`, `[2001:db8::1]:5432`; the weight is 100.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str = "HOST:PORT, such as db.legacy:5432 or 10.0.0.5:5432";
        if let Ok(address) = text.parse::<SocketAddr>() {
            let host = Host::Ip(address.ip().to_canonical());
            return if address.port() == 0 {
                Err(EXPECTED)
            } else {
                Ok(Self { host, port: address.port(), weight: 100 })
            };
        }
        let (name, port) = text.rsplit_once(':').ok_or(EXPECTED)?;
        let port = port.parse::<u16>().ok().filter(|port| *port != 0).ok_or(EXPECTED)?;
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        let bare = name.strip_suffix('.').unwrap_or(name);
        let digits = bare.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        if bare.len() > 253 || digits || !bare.split('.').all(label) {
            return Err(EXPECTED);
        }
        Ok(Self { host: Host::Name(name.to_ascii_lowercase()), port, weight: 100 })
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]:{}", self.port),
            Host::Ip(ip) => write!(f, "{ip}:{}", self.port),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

/// Where this sidecar connects to for others.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    /// By the sidecar's own flag.
    pub allow: Vec<IpNet>,
    /// Where virtual addresses lie.
    pub virtual_ranges: Vec<IpNet>,
    /// Ports that this process listens on.
    pub own_ports: Vec<u16>,
}

impl Guard {
    /// Why an address is not connected to; `own`: it is one of this machine's.
    pub fn refusal(&self, to: SocketAddr, own: bool) -> Option<&'static str> {
        let ip = behind(to.ip());
        if (own || ip.is_loopback() || ip.is_unspecified()) && self.own_ports.contains(&to.port()) {
            return Some("is a port of this sidecar itself");
        }
        if self.allow.iter().any(|range| range.contains(&ip)) {
            return None;
        }
        let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
        let link_local = match ip {
            IpAddr::V4(ip) => ip.is_link_local() || ip == METADATA_V4,
            IpAddr::V6(ip) => ip.is_unicast_link_local() || ip == METADATA_V6,
        };
        match () {
            () if ip.is_unspecified() || ip.is_multicast() || broadcast => {
                Some("is no address of one machine")
            }
            () if ip.is_loopback() || own => Some("is this machine itself"),
            () if link_local => Some("is link-local, where clouds keep machines' credentials"),
            () if self.virtual_ranges.iter().any(|range| range.contains(&ip)) => {
                Some("is a virtual address of the mesh")
            }
            () => None,
        }
    }
}

/// The IPv4 address that an IPv6 one leads to by itself or by a translator of the network: mapped (RFC 4291), the
/// well-known prefix of NAT64 (RFC 6052), 6to4 (RFC 3056). What is no such address stays.
fn behind(ip: IpAddr) -> IpAddr {
    let ip = ip.to_canonical();
    let IpAddr::V6(v6) = ip else { return ip };
    let [a, b, c, d, e, f, g, h] = v6.segments();
    let v4 = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    };
    match (a, b) {
        (0x64, 0xff9b) if [c, d, e, f] == [0; 4] => v4(g, h),
        (0x2002, high) => v4(high, c),
        _ => ip,
    }
}

/// Backends that are in order, with the share of each address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Alive(pub Vec<(SocketAddr, u32)>);

impl Alive {
    /// Addresses to try in turn: drawn by weight, without repetition.
    pub fn order(&self, mut random: impl FnMut() -> u64) -> Vec<SocketAddr> {
        let mut left = self.0.clone();
        let mut order = Vec::new();
        while !left.is_empty() && order.len() < TRIES {
            // Those of weight 0 get nothing.
            let weights = left.iter().map(|(_, weight)| *weight);
            let Some(drawn) = balance::weighted(weights, random()) else { break };
            order.push(left.swap_remove(drawn).0);
        }
        order
    }
}

/// Where the streams of a port go.
#[derive(Clone, Debug)]
pub enum Destination {
    Local(SocketAddr),
    Agentless(tokio::sync::watch::Receiver<Arc<Alive>>),
}

impl Destination {
    pub fn candidates(&self) -> Vec<SocketAddr> {
        match self {
            Self::Local(address) => vec![*address],
            Self::Agentless(alive) => Arc::clone(&alive.borrow()).order(rand::random::<u64>),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_is_a_host_with_a_port_and_nothing_else() {
        let backend: Backend = "DB.legacy:5432".parse().unwrap();
        assert_eq!((backend.host, backend.port), (Host::Name("db.legacy".into()), 5432));
        assert_eq!("[2001:db8::1]:80".parse::<Backend>().unwrap().to_string(), "[2001:db8::1]:80");
        let mapped: Backend = "[::ffff:169.254.169.254]:80".parse().unwrap();
        assert_eq!(mapped.to_string(), "169.254.169.254:80", "what hides behind IPv6 is seen");
        for bad in [
            "db.legacy",
            "db.legacy:0",
            ":80",
            "a..b:80",
            "10.1:80",
            "2130706433:80",
            "a b:80",
            "http://a:80",
            "a:99999",
        ] {
            assert!(bad.parse::<Backend>().is_err(), "{bad}");
        }
    }

    #[test]
    fn dangerous_destinations_are_refused_unless_allowed_and_own_ports_always() {
        let guard = Guard {
            virtual_ranges: vec!["241.64.0.0/16".parse().unwrap()],
            own_ports: vec![7445],
            ..Guard::default()
        };
        let refused = |guard: &Guard, to: &str, own| guard.refusal(to.parse().unwrap(), own);
        for bad in [
            "127.0.0.1:5432",
            "[::1]:80",
            "[::ffff:127.0.0.1]:80",
            "169.254.169.254:80",
            "[fe80::1]:80",
            "[fd00:ec2::254]:80",
            "100.100.100.200:80",
            "[64:ff9b::169.254.169.254]:80",
            "[64:ff9b::7f00:1]:80",
            "[64:ff9b::100.100.100.200]:80",
            "[2002:a9fe:a9fe::1]:80",
            "224.0.0.1:80",
            "[ff02::1]:80",
            "0.0.0.0:80",
            "255.255.255.255:80",
            "241.64.0.7:80",
        ] {
            assert!(refused(&guard, bad, false).is_some(), "{bad}");
        }
        assert_eq!(refused(&guard, "10.0.0.5:5432", false), None);
        assert_eq!(
            refused(&guard, "[64:ff9b::10.0.0.5]:5432", false),
            None,
            "a translator's way to what is allowed"
        );
        assert_eq!(refused(&guard, "[64:ff9b:1::169.254.169.254]:80", false), None, "another prefix");
        assert!(refused(&guard, "10.0.0.5:5432", true).is_some(), "an address of this machine");
        let open =
            Guard { allow: vec!["127.0.0.0/8".parse().unwrap(), "10.0.0.5/32".parse().unwrap()], ..guard };
        assert_eq!(refused(&open, "127.0.0.1:5432", true), None);
        assert!(refused(&open, "127.0.0.1:7445", true).unwrap().contains("sidecar itself"));
        assert!(
            refused(&open, "10.0.0.5:7445", true).is_some()
                && refused(&open, "10.0.0.5:7445", false).is_none()
        );
    }

    #[test]
    fn connections_are_shared_out_by_weight_and_go_to_another_when_one_fails() {
        let at = |n: u8| SocketAddr::from(([10, 0, 0, n], 80));
        let alive = Alive(vec![(at(1), 30), (at(2), 10)]);
        let firsts = (0..100).map(|n| alive.order(|| n)[0]).filter(|a| *a == at(1)).count();
        // 2.5 rounds of 40 draws, 30 of each.
        assert_eq!(firsts, 80);
        assert_eq!(alive.order(|| 0), vec![at(1), at(2)]);
        assert_eq!(Alive(vec![(at(1), 0), (at(2), 1)]).order(|| 7), vec![at(2)], "weight 0 gets nothing");
        assert!(Alive::default().order(|| 5).is_empty());
    }
}
