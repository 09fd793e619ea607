//! What names resolve to: a snapshot, read by many, replaced whole (pure).
//!
//! A change clones the map of shared services and alters what differs: with 10,000 names a millisecond, and no reader
//! waits for it. What does not read is left out, one service at a time.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use arc_swap::ArcSwap;
use tombolo_model::names::{ClusterName, ServiceKey, ServiceName};
use tombolo_proto::convert::{self, FieldError};
use tombolo_proto::v1;

/// Of one service: the federator sends at most as many, and a reply has no room for more.
const MAX_ENDPOINTS: usize = 1000;
const MAX_PORTS: usize = 100;
/// One per family.
const MAX_ADDRESSES: usize = 8;
/// What a federator may fill: 10,000 names of each of several clusters.
pub const MAX_SERVICES: usize = 100_000;

/// Where the newest table is found; clones share it.
#[derive(Clone, Debug, Default)]
pub struct TableHandle(Arc<ArcSwap<NameTable>>);

impl TableHandle {
    pub fn load(&self) -> Arc<NameTable> {
        self.0.load_full()
    }
    pub fn store(&self, table: NameTable) {
        self.0.store(Arc::new(table));
    }
}

/// The services of a cluster by name.
#[derive(Clone, Debug, Default)]
pub struct NameTable {
    /// By `namespace/name`.
    services: HashMap<Arc<str>, Arc<NamedService>>,
    /// How many services with a multi-cluster name each namespace has: a name under which there are others exists.
    namespaces: HashMap<Arc<str>, usize>,
    /// Of the zone; grows with every change.
    serial: u32,
}

/// One service.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NamedService {
    /// `SERVICE.NAMESPACE.svc.clusterset.local` exists.
    pub clusterset: bool,
    /// `SERVICE.NAMESPACE.svc.cluster.local` is answered here.
    pub local: bool,
    pub v4: Vec<Ipv4Addr>,
    pub v6: Vec<Ipv6Addr>,
    /// Stand for it as well, and are no answer.
    pub aliases: Vec<IpAddr>,
    pub ports: Vec<NamedPort>,
    /// It resolves to its endpoints.
    pub headless: bool,
    /// Ready ones.
    pub endpoints: Vec<NamedEndpoint>,
}

/// A port; without a name it has no SRV record of its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NamedPort {
    pub name: String,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: &'static str,
    pub port: u16,
}

/// A ready endpoint of a headless service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NamedEndpoint {
    pub cluster: ClusterName,
    pub hostname: String,
    pub address: IpAddr,
}

impl NameTable {
    pub fn len(&self) -> usize {
        self.services.len()
    }
    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
    }
    pub fn serial(&self) -> u32 {
        self.serial
    }

    /// A service by its namespace and name, both in lower case.
    pub fn service(&self, namespace: &str, name: &str) -> Option<&NamedService> {
        // Two labels of 63 bytes at most and a slash.
        let mut key = String::with_capacity(128);
        key.push_str(namespace);
        key.push('/');
        key.push_str(name);
        self.services.get(key.as_str()).map(Arc::as_ref)
    }

    /// Whether a service with a multi-cluster name is in this namespace.
    pub fn has_namespace(&self, namespace: &str) -> bool {
        self.namespaces.contains_key(namespace)
    }

    /// This table with one service added, changed or (`None`) removed.
    fn set(&mut self, key: &ServiceKey, service: Option<NamedService>) {
        let text: Arc<str> = key.to_string().into();
        let visible = |service: Option<&NamedService>| service.is_some_and(|service| service.clusterset);
        let now = visible(service.as_ref());
        let before = match service {
            Some(service) => self.services.insert(text, Arc::new(service)),
            None => self.services.remove(&text),
        };
        let namespace = key.namespace.as_str();
        match (visible(before.as_deref()), now) {
            (false, true) => *self.namespaces.entry(namespace.into()).or_insert(0) += 1,
            (true, false) => {
                let left = self.namespaces.get_mut(namespace).map_or(0, |count| {
                    *count = count.saturating_sub(1);
                    *count
                });
                if left == 0 {
                    self.namespaces.remove(namespace);
                }
            }
            _ => {}
        }
    }

    /// This table as a federator's update makes it, and what could not be read. `whole`: what is not in it is gone.
    pub fn updated(
        &self,
        whole: bool,
        services: &[v1::NamedService],
        gone: &[String],
    ) -> (Self, Vec<FieldError>) {
        let mut table = if whole { Self::default() } else { self.clone() };
        table.serial = self.serial.wrapping_add(1).max(1);
        let mut refused = Vec::new();
        for key in gone.iter().filter_map(|key| key.parse().ok()) {
            table.set(&key, None);
        }
        for wire in services {
            if table.len() >= MAX_SERVICES {
                let expected = format!("at most {MAX_SERVICES} names");
                refused.push(FieldError::new("services", services.len(), expected));
                break;
            }
            match NamedService::from_wire(wire) {
                Ok((key, service)) => table.set(&key, Some(service)),
                Err(error) => refused.push(error),
            }
        }
        (table, refused)
    }

    /// Every address that is captured, and the service, `namespace/name`, that it stands for.
    pub fn virtual_addresses(&self) -> impl Iterator<Item = (IpAddr, &str)> {
        self.services.iter().flat_map(|(key, service)| {
            let v4 = service.v4.iter().copied().map(IpAddr::V4);
            let all =
                v4.chain(service.v6.iter().copied().map(IpAddr::V6)).chain(service.aliases.iter().copied());
            all.map(|address| (address, &**key))
        })
    }

    /// Every service, as [`NameTable::updated`] reads it.
    pub fn to_wire(&self) -> Vec<v1::NamedService> {
        self.services.iter().map(|(key, service)| service.to_wire(key)).collect()
    }
}

impl NamedService {
    fn from_wire(wire: &v1::NamedService) -> Result<(ServiceKey, Self), FieldError> {
        let bounded = |field: &'static str, count: usize, most: usize| {
            if count <= most {
                return Ok(());
            }
            Err(FieldError::new(field, count, format!("at most {most}")))
        };
        bounded("services.addresses", wire.addresses.len(), MAX_ADDRESSES)?;
        bounded("services.aliases", wire.aliases.len(), MAX_ADDRESSES)?;
        bounded("services.ports", wire.ports.len(), MAX_PORTS)?;
        bounded("services.endpoints", wire.endpoints.len(), MAX_ENDPOINTS)?;
        let mut service = Self {
            clusterset: wire.clusterset,
            local: wire.local,
            headless: wire.headless,
            aliases: wire
                .aliases
                .iter()
                .map(|address| convert::parse("services.aliases", address))
                .collect::<Result<_, _>>()?,
            ports: wire.ports.iter().map(port).collect::<Result<_, _>>()?,
            endpoints: wire.endpoints.iter().map(endpoint).collect::<Result<_, _>>()?,
            ..Self::default()
        };
        for address in &wire.addresses {
            match convert::parse::<IpAddr>("services.addresses", address)? {
                IpAddr::V4(address) => service.v4.push(address),
                IpAddr::V6(address) => service.v6.push(address),
            }
        }
        Ok((convert::parse("services.service", &wire.service)?, service))
    }

    fn to_wire(&self, key: &str) -> v1::NamedService {
        let Self { clusterset, local, v4, v6, aliases, ports, headless, endpoints } = self;
        let v4 = v4.iter().map(ToString::to_string);
        v1::NamedService {
            service: key.to_owned(),
            clusterset: *clusterset,
            local: *local,
            addresses: v4.chain(v6.iter().map(ToString::to_string)).collect(),
            aliases: aliases.iter().map(ToString::to_string).collect(),
            ports: ports
                .iter()
                .map(|port| v1::ServicePort {
                    name: port.name.clone(),
                    port: port.port.into(),
                    app_protocol: String::new(),
                    protocol: port.protocol.to_ascii_uppercase(),
                })
                .collect(),
            headless: *headless,
            endpoints: endpoints
                .iter()
                .map(|endpoint| v1::NamedEndpoint {
                    cluster: endpoint.cluster.to_string(),
                    hostname: endpoint.hostname.clone(),
                    address: endpoint.address.to_string(),
                })
                .collect(),
        }
    }
}

fn port(wire: &v1::ServicePort) -> Result<NamedPort, FieldError> {
    let number = u16::try_from(wire.port).ok().filter(|port| *port != 0);
    let protocol = match wire.protocol.to_ascii_uppercase().as_str() {
        "" | "TCP" => "tcp",
        "UDP" => "udp",
        "SCTP" => "sctp",
        other => return Err(FieldError::new("services.ports.protocol", other, "TCP, UDP or SCTP")),
    };
    // What is no label can be asked for by nobody.
    let name = wire.name.to_ascii_lowercase();
    let name = if name.parse::<ServiceName>().is_ok() { name } else { String::new() };
    let port = number.ok_or_else(|| FieldError::new("services.ports.port", wire.port, "1..=65535"))?;
    Ok(NamedPort { name, protocol, port })
}

fn endpoint(wire: &v1::NamedEndpoint) -> Result<NamedEndpoint, FieldError> {
    let hostname: ServiceName = convert::parse("services.endpoints.hostname", &wire.hostname)?;
    Ok(NamedEndpoint {
        cluster: convert::parse("services.endpoints.cluster", &wire.cluster)?,
        hostname: hostname.to_string(),
        address: convert::parse("services.endpoints.address", &wire.address)?,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub fn wire(service: &str, addresses: &[&str]) -> v1::NamedService {
        v1::NamedService {
            service: service.into(),
            clusterset: true,
            addresses: addresses.iter().map(ToString::to_string).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_delta_changes_what_it_names_and_a_whole_update_everything() {
        let (first, refused) = NameTable::default().updated(
            true,
            &[wire("shop/web", &["241.64.0.1"]), wire("bank/web", &["241.64.0.2", "fd00::2"])],
            &[],
        );
        assert!(refused.is_empty() && first.len() == 2);
        assert!(first.has_namespace("shop") && first.has_namespace("bank"));
        let (second, _) = first.updated(false, &[wire("shop/cart", &[])], &["bank/web".into()]);
        assert_eq!(second.len(), 2);
        assert!(second.service("bank", "web").is_none() && !second.has_namespace("bank"));
        assert!(second.service("shop", "web").is_some() && second.serial() > first.serial());
        let (third, _) = second.updated(true, &[wire("bank/web", &[])], &[]);
        assert_eq!((third.len(), third.has_namespace("shop")), (1, false));
    }

    #[test]
    fn a_service_without_a_multi_cluster_name_makes_no_namespace() {
        let hidden = v1::NamedService { clusterset: false, local: true, ..wire("shop/web", &["241.64.0.1"]) };
        let (table, _) = NameTable::default().updated(true, &[hidden], &[]);
        assert!(table.service("shop", "web").unwrap().local && !table.has_namespace("shop"));
        let (table, _) = table.updated(false, &[wire("shop/web", &["241.64.0.1"])], &[]);
        assert!(table.has_namespace("shop"));
    }

    #[test]
    fn a_service_that_does_not_read_costs_the_others_nothing() {
        let bad_port = |port: u32, protocol: &str| v1::NamedService {
            ports: vec![v1::ServicePort { port, protocol: protocol.into(), ..Default::default() }],
            ..wire("shop/bad", &[])
        };
        let endpoint =
            v1::NamedEndpoint { cluster: "east".into(), hostname: "a.b".into(), address: "::1".into() };
        let bad = [
            wire("no-slash", &[]),
            wire("shop/web/x", &[]),
            wire("shop/bad", &["not an address"]),
            bad_port(0, "TCP"),
            bad_port(70_000, "TCP"),
            bad_port(80, "QUIC"),
            v1::NamedService { endpoints: vec![endpoint], ..wire("shop/bad", &[]) },
            v1::NamedService { ports: vec![Default::default(); 101], ..wire("shop/bad", &[]) },
        ];
        for service in bad {
            let text = format!("{service:?}");
            let services = [service, wire("shop/good", &["241.64.0.9"])];
            let (table, refused) = NameTable::default().updated(true, &services, &[]);
            assert_eq!(refused.len(), 1, "{text}");
            assert!(table.service("shop", "good").is_some(), "{text}");
        }
    }

    #[test]
    fn a_table_is_read_again_as_it_was_written() {
        let mut service = wire("shop/db", &["241.64.0.1", "fd00::1"]);
        service.aliases = vec!["10.96.0.7".into()];
        service.ports = vec![v1::ServicePort { name: "sql".into(), port: 5432, ..Default::default() }];
        service.endpoints = vec![v1::NamedEndpoint {
            cluster: "east.prod".into(),
            hostname: "db-0".into(),
            address: "10.0.0.1".into(),
        }];
        let (table, _) = NameTable::default().updated(true, &[service], &[]);
        let (again, refused) = NameTable::default().updated(true, &table.to_wire(), &[]);
        assert!(refused.is_empty());
        assert_eq!(again.service("shop", "db"), table.service("shop", "db"));
        assert_eq!(again.virtual_addresses().count(), 3, "an alias is captured, too");
    }
}
