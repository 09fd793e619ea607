//! Annotations that are lists, separated by commas. Entries that a sidecar would not start with together are refused, too.

use std::net::IpAddr;

use super::*;
use crate::inject::pod::ALIASES;

/// Where a sidecar that captures listens on loopback addresses (`--capture-listen`, `--inbound-listen`).
const OWN_PORTS: [u16; 2] = [7447, 7448];

/// A service that the pod serves beside those that Kubernetes says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    pub service: ServiceKey,
    pub port: u16,
    pub protocol: Protocol,
    /// Where the application listens.
    pub target: Target,
}

/// A port of the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Number(u16),
    /// Of a container's port.
    Name(String),
}

/// A service that the pod calls at a local address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    pub service: ServiceKey,
    pub port: u16,
    pub protocol: Protocol,
    /// `None`: at an address that is found for it, under the service's name.
    pub listen: Option<SocketAddr>,
}

/// An annotation's entries.
pub(super) struct List<'a> {
    key: &'static str,
    entries: Vec<&'a str>,
}

impl<'a> List<'a> {
    pub fn of(key: &'static str, value: Option<&'a str>) -> Self {
        let entries = value.unwrap_or_default().split(',').map(str::trim);
        Self { key, entries: entries.filter(|entry| !entry.is_empty()).collect() }
    }

    fn each<T>(&self, read: impl Fn(&'a str) -> Option<T>, expected: &str) -> Result<Vec<T>, WishError> {
        if self.entries.len() > MAX_LISTED {
            let count = self.entries.len().to_string();
            return Err(annotation_error(
                self.key,
                &count,
                format!("entries are too many, at most {MAX_LISTED}"),
            ));
        }
        let wrong = |entry: &str| annotation_error(self.key, entry, format!("is not {expected}"));
        self.entries.iter().map(|entry| read(entry).ok_or_else(|| wrong(entry))).collect()
    }

    /// `keys` are of the entries, in order: no two may be the same. `wanted` says what the second one would need again.
    fn once<K: Ord>(
        &self,
        keys: impl Iterator<Item = K>,
        wanted: impl Fn(&K) -> String,
        remedy: &str,
    ) -> Result<(), WishError> {
        let mut seen: BTreeMap<K, &str> = BTreeMap::new();
        for (key, entry) in keys.zip(self.entries.iter().copied()) {
            if let Some(first) = seen.get(&key) {
                let reason = format!("{}, which {first:?} before it has already: {remedy}", wanted(&key));
                return Err(annotation_error(self.key, entry, reason));
            }
            seen.insert(key, entry);
        }
        Ok(())
    }

    pub fn ports(&self) -> Result<BTreeSet<u16>, WishError> {
        Ok(self.each(port, "a port in 1..=65535")?.into_iter().collect())
    }

    pub fn cidrs(&self) -> Result<Vec<IpNet>, WishError> {
        self.each(cidr, "an address or a CIDR, such as 10.0.0.0/8")
    }

    /// `10.0.0.0/24`, `10.0.0.1=8080` or `=8080`.
    pub fn sources(&self) -> Result<Vec<String>, WishError> {
        let read = |entry: &'a str| {
            let (source, of) = entry.split_once('=').map_or((entry, None), |(source, of)| (source, Some(of)));
            let source_ok = (source.is_empty() && of.is_some()) || cidr(source).is_some();
            (source_ok && of.is_none_or(|of| port(of).is_some())).then(|| entry.to_owned())
        };
        self.each(read, "SOURCE, SOURCE=PORT or =PORT, such as 10.0.0.0/24=8080")
    }

    /// `web:80=8080`, `web:53/udp=dns`; a namespace is the pod's own.
    pub fn served(&self, namespace: &str) -> Result<Vec<Served>, WishError> {
        let read = |entry: &'a str| {
            let (left, target) = entry.split_once('=')?;
            let (service, port, protocol) = service_port(left, namespace)?;
            let number = self::port(target).map(Target::Number);
            let target = number.or_else(|| is_port_name(target).then(|| Target::Name(target.to_owned())))?;
            Some(Served { service, port, protocol, target })
        };
        let all = self.each(read, "NAME:PORT=TARGET, such as web:80=8080 or dns:53/udp=5353")?;
        let elsewhere = |(_, served): &(_, &Served)| served.service.namespace.as_str() != namespace;
        match self.entries.iter().zip(&all).find(elsewhere) {
            Some((entry, _)) => {
                let reason = format!("is of another namespace: pods of {namespace} serve its services");
                Err(annotation_error(self.key, entry, reason))
            }
            None => {
                let key = |served: &Served| (served.service.clone(), served.port, served.protocol);
                let wanted = |(service, port, protocol): &(ServiceKey, u16, Protocol)| {
                    format!("is about {protocol} port {port} of {service}")
                };
                self.once(all.iter().map(key), wanted, "leave one of them out")?;
                Ok(all)
            }
        }
    }

    /// `shop/web:80`, `shop/web:80=127.0.0.1:9080`.
    pub fn upstreams(&self) -> Result<Vec<Upstream>, WishError> {
        let read = |entry: &'a str| {
            let (left, listen) = entry.split_once('=').map_or((entry, None), |(left, at)| (left, Some(at)));
            let (service, port, protocol) = service_port(left, "")?;
            let listen = match listen {
                None => None,
                Some(at) => {
                    Some(at.parse::<SocketAddr>().ok().filter(|at| at.port() != 0 && at.ip().is_loopback())?)
                }
            };
            Some(Upstream { service, port, protocol, listen })
        };
        let all =
            self.each(read, "NAMESPACE/NAME:PORT, with =127.0.0.1:PORT where it is to be called there")?;
        for (entry, upstream) in self.entries.iter().zip(&all) {
            let Some(at) = upstream.listen else { continue };
            let ours = |ip: IpAddr| matches!(ip, IpAddr::V4(v4) if v4.octets().starts_with(&ALIASES));
            if ours(at.ip()) {
                let [a, b, c] = ALIASES;
                let reason = format!(
                    "is in {a}.{b}.{c}.0/24, where upstreams without an address are: leave the address out, or use 127.0.0.1"
                );
                return Err(annotation_error(self.key, entry, reason));
            }
            if upstream.protocol == Protocol::Tcp && OWN_PORTS.contains(&at.port()) {
                let reason = format!("has port {}, where the sidecar itself listens: use another", at.port());
                return Err(annotation_error(self.key, entry, reason));
            }
        }
        let key = |upstream: &Upstream| match upstream.listen {
            Some(at) => (upstream.protocol, Some(at), None),
            None => (upstream.protocol, None, Some((upstream.service.clone(), upstream.port))),
        };
        let wanted =
            |(protocol, at, service): &(Protocol, Option<SocketAddr>, Option<(ServiceKey, u16)>)| match (
                at, service,
            ) {
                (Some(at), _) => format!("wants {protocol} at {at}"),
                (None, Some((service, port))) => format!("is about {protocol} port {port} of {service}"),
                (None, None) => String::new(),
            };
        self.once(all.iter().map(key), wanted, "leave one of them out, or give it an address of its own")?;
        Ok(all)
    }
}

fn port(text: &str) -> Option<u16> {
    text.parse::<u16>().ok().filter(|port| *port != 0)
}

fn cidr(text: &str) -> Option<IpNet> {
    let single = || text.parse::<std::net::IpAddr>().ok().map(IpNet::from);
    text.parse::<IpNet>().ok().or_else(single)
}

/// IANA_SVC_NAME (RFC 6335), as Kubernetes has names of ports.
fn is_port_name(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=15).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// `namespace` is for names without one; empty: there has to be one.
fn service_port(text: &str, namespace: &str) -> Option<(ServiceKey, u16, Protocol)> {
    let (text, protocol) = Protocol::suffix(text);
    let (service, number) = text.rsplit_once(':')?;
    let full = if service.contains('/') { service.to_owned() } else { format!("{namespace}/{service}") };
    Some((full.parse().ok()?, port(number)?, protocol))
}
