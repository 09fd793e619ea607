//! Where a linked cluster may say that its gateways and endpoints are.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

/// Ranges that a link's `ClusterLink` object allows, and whether loopback is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AllowedRanges {
    pub ranges: Vec<IpNet>,
    pub loopback: bool,
}

impl AllowedRanges {
    /// Whether a peer may announce an address. Without ranges: anything that is an ordinary unicast address.
    pub fn allows(&self, address: SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        if address.port() == 0 || ip.is_unspecified() || ip.is_multicast() {
            return false;
        }
        if !self.ranges.is_empty() {
            return self.ranges.iter().any(|range| range.contains(&ip));
        }
        match ip {
            _ if ip.is_loopback() => self.loopback,
            IpAddr::V4(v4) => !v4.is_link_local() && !v4.is_broadcast() && v4.octets()[0] != 0,
            IpAddr::V6(v6) => !v6.is_unicast_link_local(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_lie_in_the_ranges_of_the_link() {
        let at = |text: &str| text.parse().unwrap();
        let open = AllowedRanges::default();
        for bad in [
            "127.0.0.1:7440",
            "169.254.1.1:7440",
            "224.0.0.1:7440",
            "0.0.0.0:7440",
            "10.0.0.1:0",
            "[fe80::1]:7440",
            "[::ffff:127.0.0.1]:7440",
            "255.255.255.255:1",
        ] {
            assert!(!open.allows(at(bad)), "{bad}");
        }
        assert!(open.allows(at("203.0.113.7:7440")) && open.allows(at("[2001:db8::1]:7440")));
        let demo = AllowedRanges { loopback: true, ..Default::default() };
        assert!(demo.allows(at("127.0.2.11:7440")));
        let narrow = AllowedRanges { ranges: vec!["10.1.0.0/16".parse().unwrap()], loopback: true };
        assert!(narrow.allows(at("10.1.2.3:7440")) && !narrow.allows(at("10.2.2.3:7440")));
        assert!(!narrow.allows(at("127.0.0.1:7440")), "ranges say all that is allowed");
    }
}
