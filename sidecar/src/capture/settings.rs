//! What a sidecar is told of captured connections; parsed once, shared with the command that makes the rules.

use std::net::SocketAddr;
use std::str::FromStr;

use ipnet::IpNet;
use tombolo_model::names::{NameError, ServiceKey};
use tombolo_model::protocol::Protocol;

use crate::config::ConfigError;

/// Where captured connections arrive, unless told otherwise: after the overlay's, federator's and admin's ports.
pub const DEFAULT_PORT: u16 = 7447;
/// Where connections from outside to the workload's own ports arrive.
pub const DEFAULT_INBOUND_PORT: u16 = 7448;
/// On the sockets that the rules let through: "tb".
pub const DEFAULT_MARK: u32 = 0x7462;
/// A federator sends 256 upstreams at most; a legacy system has a handful of addresses.
pub const MAX_ADDRESSES: usize = 256;

/// An address that stands for a service although nothing of the mesh allotted it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptureAddress {
    pub address: SocketAddr,
    pub protocol: Protocol,
    pub service: ServiceKey,
    /// Of the service; the address's own unless it was named.
    pub port: u16,
}

impl FromStr for CaptureAddress {
    type Err = ConfigError;
    /// `10.0.0.7:5432=shop/db`, `10.0.0.7:5432=shop/db:5433` or `10.0.0.7:53/udp=shop/dns`.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let failed = |reason: String| {
            let value = text.chars().take(200).collect();
            ConfigError::CaptureAddress { value, reason }
        };
        let (address, service) = text.split_once('=').ok_or_else(|| failed("there is no '='".into()))?;
        let (address, protocol) = Protocol::suffix(address);
        let address = destination(address).map_err(&failed)?;
        let (service, port) = match service.rsplit_once(':') {
            None => (service, address.port()),
            Some((service, port)) => match port.parse() {
                Ok(port) if port != 0 => (service, port),
                _ => return Err(failed("the service's port is not in 1..=65535".into())),
            },
        };
        let service = service.parse().map_err(|e: NameError| failed(e.to_string()))?;
        Ok(Self { address, protocol, service, port })
    }
}

/// An address that somebody can connect to, with its port.
pub fn destination(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr =
        text.parse().map_err(|_| format!("{text:?} is not an IP address with a port"))?;
    let ip = address.ip();
    if ip.is_unspecified() || ip.is_multicast() || address.port() == 0 {
        return Err(format!("{text:?} is no address that an application connects to"));
    }
    Ok(address)
}

/// What becomes of connections to the workload's own ports that do not come through the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InboundMode {
    /// Reset.
    Strict,
    /// Handed to the application.
    Permissive,
}

impl FromStr for InboundMode {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "strict" => Ok(Self::Strict),
            "permissive" => Ok(Self::Permissive),
            other => Err(format!("{other:?} is not strict or permissive")),
        }
    }
}

/// Connections to the workload's own ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboundCapture {
    pub mode: InboundMode,
    pub listen: Vec<SocketAddr>,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptureConfig {
    /// Where the rules redirect to; loopback, so that nobody outside can speak to it.
    pub listen: Vec<SocketAddr>,
    pub addresses: Vec<CaptureAddress>,
    /// Where virtual addresses lie: what is called there and stands for nothing is refused, not passed on.
    pub ranges: Vec<IpNet>,
    pub inbound: Option<InboundCapture>,
    /// On the sidecar's own sockets, so that the rules let them through.
    pub mark: u32,
}

impl CaptureConfig {
    /// Checks what can be checked before anything is bound.
    pub fn check(&self) -> Result<(), ConfigError> {
        let inbound = self.inbound.iter().flat_map(|inbound| &inbound.listen);
        let mut seen = Vec::new();
        for (flag, listen) in (self.listen.iter().map(|l| ("--capture-listen", l)))
            .chain(inbound.map(|l| ("--inbound-listen", l)))
        {
            if !listen.ip().is_loopback() {
                return Err(ConfigError::CaptureListen { flag, listen: *listen });
            }
            if listen.port() != 0 && seen.contains(listen) {
                return Err(ConfigError::CaptureListenTwice { listen: *listen });
            }
            seen.push(*listen);
        }
        if self.addresses.len() > MAX_ADDRESSES {
            return Err(ConfigError::CaptureAddresses { count: self.addresses.len() });
        }
        for (index, one) in self.addresses.iter().enumerate() {
            let before = self.addresses.iter().take(index);
            if let Some(first) =
                before.clone().find(|first| (first.address, first.protocol) == (one.address, one.protocol))
            {
                return Err(ConfigError::CaptureAddressTwice {
                    address: one.address,
                    first: first.service.clone(),
                    second: one.service.clone(),
                });
            }
            if self.listen.is_empty() {
                return Err(ConfigError::CaptureNowhere { address: one.address });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(listen: &[&str], addresses: &[&str]) -> CaptureConfig {
        CaptureConfig {
            listen: listen.iter().map(|l| l.parse().unwrap()).collect(),
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            ranges: Vec::new(),
            inbound: None,
            mark: DEFAULT_MARK,
        }
    }

    #[test]
    fn an_address_stands_for_a_service_at_its_own_port_or_at_another() {
        let own: CaptureAddress = "10.0.0.7:5432=shop/db".parse().unwrap();
        assert_eq!((own.service.to_string().as_str(), own.port), ("shop/db", 5432));
        let other: CaptureAddress = "[fd00::7]:5432=shop/db:5433".parse().unwrap();
        assert_eq!((other.address.is_ipv6(), other.port), (true, 5433));
        let udp: CaptureAddress = "10.0.0.7:53/udp=shop/dns".parse().unwrap();
        assert_eq!((own.protocol, udp.protocol, udp.port), (Protocol::Tcp, Protocol::Udp, 53));
    }

    #[test]
    fn a_wrong_address_names_the_value_and_what_would_be_right() {
        let wrong = [
            "10.0.0.7:5432",
            "10.0.0.7=shop/db",
            "10.0.0.7:0=shop/db",
            "0.0.0.0:80=shop/db",
            "224.0.0.1:80=shop/db",
            "10.0.0.7:5432=db",
            "10.0.0.7:5432=shop/db:0",
            "db.local:5432=shop/db",
        ];
        for text in wrong {
            let error = text.parse::<CaptureAddress>().unwrap_err().to_string();
            let named =
                ["--capture-address", text, "10.0.0.7:5432=shop/db"].iter().all(|n| error.contains(n));
            assert!(named, "{error}");
        }
    }

    #[test]
    fn contradictions_are_found_before_anything_is_bound() {
        let here = "127.0.0.1:7447";
        let db = "10.0.0.7:5432=shop/db";
        assert_eq!(config(&[here, "[::1]:7447"], &[db]).check(), Ok(()));
        assert!(matches!(config(&["10.0.0.1:7447"], &[]).check(), Err(ConfigError::CaptureListen { .. })));
        let dns = ["10.0.0.7:53=shop/dns", "10.0.0.7:53/udp=shop/dns"];
        assert_eq!(config(&[here], &dns).check(), Ok(()), "each protocol by itself");
        let twice = config(&[here], &[db, "10.0.0.7:5432=shop/other"]).check();
        assert!(matches!(twice, Err(ConfigError::CaptureAddressTwice { .. })), "{twice:?}");
        assert!(matches!(config(&[], &[db]).check(), Err(ConfigError::CaptureNowhere { .. })));
        let mut both = config(&[here], &[]);
        both.inbound =
            Some(InboundCapture { mode: InboundMode::Strict, listen: vec![here.parse().unwrap()] });
        assert!(matches!(both.check(), Err(ConfigError::CaptureListenTwice { .. })));
    }
}
