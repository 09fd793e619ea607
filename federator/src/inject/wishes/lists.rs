//! Annotations that are lists, separated by commas.

use super::*;

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
            None => Ok(all),
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
        self.each(read, "NAMESPACE/NAME:PORT, with =127.0.0.1:PORT where it is to be called there")
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
