//! The ranges from which a cluster's services get their virtual (clusterset) addresses, and which address a service gets.
//!
//! Virtual addresses lie on no interface and cross no wire: a name resolves to one, and the caller's own sidecar takes
//! what is sent there. So a range only has to be unused where callers are. A service's address follows from its name as
//! long as it is free, so that a federator that has lost its store gives nearly every service the same one again.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use sha2::{Digest, Sha256};

use crate::names::ServiceKey;

/// Class E: unicast for Linux and routed nowhere, and not where other meshes take theirs from (Istio 240.240.0.0/16,
/// Consul the start of 240.0.0.0/4). Private ranges and 100.64.0.0/10 are in use by clouds, VPNs and carriers.
const DEFAULT_V4: (Ipv4Addr, u8) = (Ipv4Addr::new(241, 64, 0, 0), 16);
/// A /8 is 16 million; /29 are 6.
const V4_PREFIX: std::ops::RangeInclusive<u8> = 8..=29;
/// RFC 4193 allots /48; /125 are 6.
const V6_PREFIX: std::ops::RangeInclusive<u8> = 8..=125;

/// Where virtual addresses come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VirtualRanges {
    v4: Ipv4Net,
    v6: Option<Ipv6Net>,
}

/// What is wrong with a range, and what would be right.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RangeError {
    #[error("{value:?} is no range: give a CIDR such as 241.64.0.0/16 or fd00:1234::/112")]
    Syntax { value: String },
    #[error("{range}: the prefix is not in /{} to /{}", .accepted.start(), .accepted.end())]
    Prefix { range: IpNet, accepted: std::ops::RangeInclusive<u8> },
    #[error(
        "{range} holds {what} addresses, which can't be virtual: give an unused unicast range, such as 241.64.0.0/16 or fd00:1234::/112"
    )]
    Reserved { range: IpNet, what: &'static str },
    #[error("{first} and {second} are both {family}: give one range per family")]
    Twice { first: IpNet, second: IpNet, family: &'static str },
}

impl Default for VirtualRanges {
    /// 241.64.0.0/16, no IPv6.
    fn default() -> Self {
        let (address, prefix) = DEFAULT_V4;
        Self { v4: Ipv4Net::new_assert(address, prefix), v6: None }
    }
}

impl VirtualRanges {
    /// One range per family at most; IPv4 has a default, IPv6 is off unless given.
    pub fn parse<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Self, RangeError> {
        let (mut v4, mut v6) = (None, None);
        for text in texts {
            let range: IpNet = text.trim().parse().map_err(|_| {
                let value = text.chars().take(100).collect();
                RangeError::Syntax { value }
            })?;
            let range = range.trunc();
            let before = match range {
                IpNet::V4(range) => v4.replace(range).map(IpNet::V4),
                IpNet::V6(range) => v6.replace(range).map(IpNet::V6),
            };
            if let Some(first) = before {
                let family = if matches!(range, IpNet::V4(_)) { "IPv4" } else { "IPv6" };
                return Err(RangeError::Twice { first, second: range, family });
            }
            check(range)?;
        }
        Ok(Self { v4: v4.unwrap_or(Self::default().v4), v6 })
    }

    pub fn v4(&self) -> Ipv4Net {
        self.v4
    }
    pub fn v6(&self) -> Option<Ipv6Net> {
        self.v6
    }
    pub fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.v4.contains(&address),
            IpAddr::V6(address) => self.v6.is_some_and(|range| range.contains(&address)),
        }
    }
    /// How many services the IPv4 range is enough for.
    pub fn capacity_v4(&self) -> u64 {
        capacity(32 - self.v4.prefix_len())
    }
    /// How many services the IPv6 range is enough for; 0 without one.
    pub fn capacity_v6(&self) -> u64 {
        self.v6.map_or(0, |range| capacity(128 - range.prefix_len()))
    }

    /// The service's IPv4 address: the one of its name, else the next that is free. `None`: all are taken.
    pub fn draw_v4(&self, service: &ServiceKey, taken: impl Fn(Ipv4Addr) -> bool) -> Option<Ipv4Addr> {
        let base = u32::from(self.v4.network());
        let at = |index: u64| Some(Ipv4Addr::from(base.checked_add(u32::try_from(index).ok()?)?));
        draw(service, self.capacity_v4(), |index| at(index).filter(|address| !taken(*address)))
    }

    /// The same for IPv6; `None` without a range, too.
    pub fn draw_v6(&self, service: &ServiceKey, taken: impl Fn(Ipv6Addr) -> bool) -> Option<Ipv6Addr> {
        let base = u128::from(self.v6?.network());
        let at = |index: u64| Some(Ipv6Addr::from(base.checked_add(index.into())?));
        draw(service, self.capacity_v6(), |index| at(index).filter(|address| !taken(*address)))
    }
}

impl fmt::Display for VirtualRanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.v4)?;
        self.v6.map_or(Ok(()), |range| write!(f, " and {range}"))
    }
}

/// Without the first (network, subnet-router anycast) and the last (broadcast) address; half of a giant range is enough.
fn capacity(host_bits: u8) -> u64 {
    1u64.checked_shl(host_bits.min(63).into()).map_or(0, |all| all - 2)
}

fn draw<A>(service: &ServiceKey, capacity: u64, free: impl Fn(u64) -> Option<A>) -> Option<A> {
    let digest: [u8; 32] = Sha256::digest(service.to_string().as_bytes()).into();
    let mut first = [0; 8];
    first.iter_mut().zip(digest).for_each(|(byte, digest)| *byte = digest);
    let start = u64::from_be_bytes(first).checked_rem(capacity)?;
    (start..capacity).chain(0..start).find_map(|offset| free(offset + 1))
}

fn check(range: IpNet) -> Result<(), RangeError> {
    let reserved: &[(&str, &str)] = match range {
        IpNet::V4(_) => &[
            ("0.0.0.0/8", "unspecified"),
            ("127.0.0.0/8", "loopback"),
            ("169.254.0.0/16", "link-local"),
            ("224.0.0.0/4", "multicast"),
        ],
        IpNet::V6(_) => {
            &[("::/127", "unspecified and loopback"), ("fe80::/10", "link-local"), ("ff00::/8", "multicast")]
        }
    };
    let accepted = if matches!(range, IpNet::V4(_)) { V4_PREFIX } else { V6_PREFIX };
    if !accepted.contains(&range.prefix_len()) {
        return Err(RangeError::Prefix { range, accepted });
    }
    for (net, what) in reserved {
        let overlaps = net
            .parse::<IpNet>()
            .is_ok_and(|net| net.contains(&range.network()) || range.contains(&net.network()));
        if overlaps {
            return Err(RangeError::Reserved { range, what });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn service(name: &str) -> ServiceKey {
        format!("shop/{name}").parse().unwrap()
    }

    #[test]
    fn each_service_gets_an_address_of_its_own_until_the_range_is_used_up() {
        let ranges = VirtualRanges::parse(["10.9.8.0/29", "fd00::/125"]).unwrap();
        let (mut v4, mut v6) = (BTreeSet::new(), BTreeSet::new());
        for index in 0..6 {
            let service = service(&format!("s{index}"));
            assert!(v4.insert(ranges.draw_v4(&service, |a| v4.contains(&a)).unwrap()));
            assert!(v6.insert(ranges.draw_v6(&service, |a| v6.contains(&a)).unwrap()));
        }
        assert_eq!(v4, (1..=6).map(|n| Ipv4Addr::new(10, 9, 8, n)).collect(), "not the first, not the last");
        assert!(v6.iter().all(|address| ranges.contains((*address).into())));
        assert_eq!(ranges.draw_v4(&service("s7"), |a| v4.contains(&a)), None);
        assert_eq!(ranges.draw_v6(&service("s7"), |a| v6.contains(&a)), None);
    }

    #[test]
    fn an_address_follows_from_the_name_and_lies_in_the_range() {
        let ranges = VirtualRanges::parse(["fd00:1::/64"]).unwrap();
        assert_eq!(ranges.to_string(), "241.64.0.0/16 and fd00:1::/64");
        let (a, b) = (ranges.draw_v4(&service("web"), |_| false), ranges.draw_v4(&service("web"), |_| false));
        assert_eq!(a, b);
        assert_ne!(a, ranges.draw_v4(&service("cart"), |_| false));
        assert!(ranges.contains(a.unwrap().into()));
        assert!(ranges.contains(ranges.draw_v6(&service("web"), |_| false).unwrap().into()));
        assert_eq!(
            VirtualRanges::default().draw_v6(&service("web"), |_| false),
            None,
            "no IPv6 unless given"
        );
        assert_eq!(VirtualRanges::default().capacity_v4(), 65_534);
    }

    #[test]
    fn a_range_that_can_not_be_used_is_refused_with_what_would_be_right() {
        let cases = [
            ("nonsense", "is no range"),
            ("241.64.0.0", "is no range"),
            ("10.0.0.0/30", "/8 to /29"),
            ("10.0.0.0/4", "/8 to /29"),
            ("127.9.0.0/16", "loopback"),
            ("169.254.7.0/24", "link-local"),
            ("239.0.0.0/8", "multicast"),
            ("fe80::/64", "link-local"),
            ("ff00::/16", "multicast"),
            ("::/64", "loopback"),
        ];
        for (text, expected) in cases {
            let error = VirtualRanges::parse([text]).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let twice = VirtualRanges::parse(["10.0.0.0/16", "10.1.0.0/16"]).unwrap_err().to_string();
        assert!(twice.contains("10.1.0.0/16") && twice.contains("one range per family"), "{twice}");
    }
}
