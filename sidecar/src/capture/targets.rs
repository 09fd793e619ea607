//! What an original destination stands for. Pure.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use tombolo_model::names::ServiceKey;
use tombolo_model::protocol::Protocol;

use super::settings::{CaptureAddress, CaptureConfig};

/// What is to become of a captured connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Carried to a service's port.
    Service { service: ServiceKey, port: u16 },
    /// A virtual address that stands for nothing (any more): there is nowhere to pass it on to.
    Unknown,
    /// Not ours: goes on to where it was going.
    Other,
}

/// Addresses by what they stand for.
#[derive(Clone, Debug, Default)]
pub struct Targets {
    taken_over: HashMap<(Protocol, SocketAddr), (ServiceKey, u16)>,
    ranges: Vec<IpNet>,
    virtual_addresses: HashMap<IpAddr, ServiceKey>,
    complete: bool,
}

impl Targets {
    pub fn new(config: &CaptureConfig) -> Self {
        let taken_over = config.addresses.iter().map(|one| {
            let CaptureAddress { address, protocol, service, port } = one;
            ((*protocol, canonical(*address)), (service.clone(), *port))
        });
        Self {
            taken_over: taken_over.collect(),
            ranges: config.ranges.clone(),
            virtual_addresses: HashMap::new(),
            complete: false,
        }
    }

    /// The same with these virtual addresses; one that lies in no range of ours is believed all the same, since the own
    /// federator says it. `complete`: these are all that there are.
    pub fn with(&self, addresses: impl IntoIterator<Item = (IpAddr, ServiceKey)>, complete: bool) -> Self {
        let virtual_addresses = addresses.into_iter().map(|(address, s)| (address.to_canonical(), s));
        Self {
            taken_over: self.taken_over.clone(),
            ranges: self.ranges.clone(),
            virtual_addresses: virtual_addresses.collect(),
            complete,
        }
    }

    /// Whether an address that stands for nothing will not be one that has not been heard of yet.
    pub fn complete(&self) -> bool {
        self.complete
    }

    /// What the operator has said comes before what was allotted.
    pub fn of(&self, protocol: Protocol, destination: SocketAddr) -> Target {
        let destination = canonical(destination);
        if let Some((service, port)) = self.taken_over.get(&(protocol, destination)) {
            return Target::Service { service: service.clone(), port: *port };
        }
        let ip = destination.ip();
        match self.virtual_addresses.get(&ip) {
            Some(service) => Target::Service { service: service.clone(), port: destination.port() },
            None if self.ranges.iter().any(|range| range.contains(&ip)) => Target::Unknown,
            None => Target::Other,
        }
    }
}

/// `::ffff:10.0.0.7` is 10.0.0.7.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets() -> Targets {
        let config = CaptureConfig {
            listen: Vec::new(),
            addresses: vec![
                "10.0.0.7:5432=shop/db".parse().unwrap(),
                "241.64.0.9:80=shop/legacy".parse().unwrap(),
                "10.0.0.7:53/udp=shop/dns".parse().unwrap(),
            ],
            ranges: vec!["241.64.0.0/16".parse().unwrap(), "fd00:1::/64".parse().unwrap()],
            inbound: None,
            mark: 1,
        };
        let key = |text: &str| text.parse::<ServiceKey>().unwrap();
        Targets::new(&config).with(
            [
                ("241.64.0.1".parse().unwrap(), key("shop/web")),
                ("fd00:1::1".parse().unwrap(), key("shop/web")),
            ],
            true,
        )
    }

    fn of(text: &str) -> String {
        let (text, protocol) = Protocol::suffix(text);
        match targets().of(protocol, text.parse().unwrap()) {
            Target::Service { service, port } => format!("{service}:{port}"),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn a_virtual_address_stands_for_its_service_at_every_port_and_in_both_families() {
        assert_eq!(of("241.64.0.1:80"), "shop/web:80");
        assert_eq!(of("241.64.0.1:81"), "shop/web:81");
        assert_eq!(of("[fd00:1::1]:80"), "shop/web:80");
        assert_eq!(of("[::ffff:241.64.0.1]:80"), "shop/web:80");
        assert_eq!(of("241.64.0.1:80/udp"), "shop/web:80");
    }

    #[test]
    fn an_address_taken_over_stands_for_its_service_at_that_port_only() {
        assert_eq!(of("10.0.0.7:5432"), "shop/db:5432");
        assert_eq!(of("10.0.0.7:22"), "Other");
        assert_eq!((of("10.0.0.7:53/udp").as_str(), of("10.0.0.7:53").as_str()), ("shop/dns:53", "Other"));
        assert_eq!(of("10.0.0.7:5432/udp"), "Other", "each protocol by itself");
        assert_eq!(of("241.64.0.9:80"), "shop/legacy:80", "what the operator says comes first");
    }

    #[test]
    fn nothing_is_passed_on_to_a_virtual_address() {
        assert_eq!(of("241.64.200.200:80"), "Unknown");
        assert_eq!(of("[fd00:1::99]:80"), "Unknown");
        assert_eq!(of("203.0.113.1:443"), "Other");
    }
}
