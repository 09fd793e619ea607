//! What the API server holds, and what follows for the shared sidecar (pure, time passed in): who calls from where, who serves
//! what on which pods, and where derived `Service`s lead.
//!
//! An address is one service account's only while exactly one account's pods claim it: pods with a sidecar of their own,
//! those that use the node's network, and two accounts with one address are nobody here. A backend counts only where the
//! pod that the slice names has the address itself, so that nobody is led elsewhere by a slice that he may write.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use kube::core::DynamicObject;
use kube::runtime::watcher::Event;
use serde::{Deserialize, Serialize};
use tombolo_kubernetes::table::{Place, Row, Table};
use tombolo_kubernetes::words::FRONT_PORTS;
use tombolo_model::names::ServiceKey;
use tombolo_model::protocol::Protocol;

use super::rows::{ExportRow, PodRow, ServiceRow, SliceRow};
use crate::provided::{ProvidedPort, ProvidedService, Standing};

/// What one sidecar may serve, as federators have it.
const MAX_SERVICES: usize = 256;

/// Kinds that are watched.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    Pod,
    Service,
    EndpointSlice,
    ServiceExport,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Pod, Self::Service, Self::EndpointSlice, Self::ServiceExport];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::ServiceExport => "ServiceExport",
        }
    }
}

/// The tables of one watch per kind: of a namespace, or of all.
#[derive(Debug, Default)]
struct Scope {
    pods: Table<PodRow>,
    services: Table<ServiceRow>,
    slices: Table<SliceRow>,
    exports: Table<ExportRow>,
}

/// Every table.
#[derive(Debug)]
pub struct Tables(Vec<Scope>);

/// A service account: namespace and name.
pub type Account = (String, String);

/// What follows for one service account.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct AccountPicture {
    /// Sorted.
    pub sources: Vec<IpAddr>,
    pub services: Vec<ProvidedService>,
}

/// What is called by a number.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Numbered {
    pub number: u16,
    pub service: ServiceKey,
    pub port: u16,
    pub protocol: Protocol,
}

/// What follows of all of it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Picture {
    pub accounts: BTreeMap<Account, AccountPicture>,
    pub numbered: Vec<Numbered>,
    /// Endpoints of exported services that are no pod's: nobody can stand for them.
    pub nobodys: usize,
    /// Addresses that more than one account claims.
    pub contested: usize,
    /// Services beyond what one account's sidecar may serve.
    pub too_many: usize,
    /// When a pod's time is over: things look different then. Unix seconds.
    pub changes_unix: Option<u64>,
}

impl Tables {
    /// With so many scopes.
    pub fn new(scopes: usize) -> Self {
        Self((0..scopes.max(1)).map(|_| Scope::default()).collect())
    }

    /// Takes an event of a scope's watch over; whether anything has changed.
    pub fn apply(&mut self, scope: usize, kind: Kind, event: Event<DynamicObject>) -> bool {
        let Some(scope) = self.0.get_mut(scope) else { return false };
        // A list that was empty has changed nothing, but now it is known.
        let whole = matches!(event, Event::InitDone);
        fn changed<R: Row>(table: &mut Table<R>, event: Event<DynamicObject>) -> bool {
            !table.apply(event).is_empty()
        }
        let changed = match kind {
            Kind::Pod => changed(&mut scope.pods, event),
            Kind::Service => changed(&mut scope.services, event),
            Kind::EndpointSlice => changed(&mut scope.slices, event),
            Kind::ServiceExport => changed(&mut scope.exports, event),
        };
        changed || whole
    }

    /// Whether everything was received once.
    pub fn is_synced(&self) -> bool {
        self.0.iter().all(|scope| {
            scope.pods.is_synced()
                && scope.services.is_synced()
                && scope.slices.is_synced()
                && scope.exports.is_synced()
        })
    }

    fn pod(&self, place: &Place) -> Option<&PodRow> {
        self.0.iter().find_map(|scope| scope.pods.get(place))
    }

    fn service(&self, place: &Place) -> Option<&ServiceRow> {
        self.0.iter().find_map(|scope| scope.services.get(place))
    }

    /// What follows at a time (unix seconds). `v6`: pods of two families are called over IPv6.
    /// `before`: what numbers led to; who has one keeps it for as long as he claims it.
    pub fn picture(&self, unix: u64, v6: bool, before: &[Numbered]) -> Picture {
        let mut picture = Picture::default();
        self.callers(&mut picture, unix);
        self.serving(&mut picture, v6);
        for account in picture.accounts.values_mut() {
            account.sources.sort_unstable();
            picture.too_many += account.services.len().saturating_sub(MAX_SERVICES);
            account.services.truncate(MAX_SERVICES);
        }
        self.numbers(&mut picture, before);
        picture
    }

    fn callers(&self, picture: &mut Picture, unix: u64) {
        // `None`: it is not to be said whose.
        let mut claims: HashMap<IpAddr, Option<(&str, &str)>> = HashMap::new();
        for ((namespace, _), pod) in self.0.iter().flat_map(|scope| scope.pods.iter()) {
            if pod.ends_unix.is_some_and(|ends| ends <= unix) || pod.host_network {
                continue;
            }
            if let Some(ends) = pod.ends_unix {
                picture.changes_unix = Some(picture.changes_unix.map_or(ends, |known| known.min(ends)));
            }
            let account = (!pod.injected).then_some((namespace.as_str(), pod.account.as_str()));
            for address in &pod.addresses {
                let claim = claims.entry(address.to_canonical()).or_insert(account);
                if *claim != account {
                    picture.contested += 1;
                    *claim = None;
                }
            }
        }
        for (address, account) in claims {
            let Some((namespace, name)) = account else { continue };
            let account = (namespace.to_owned(), name.to_owned());
            picture.accounts.entry(account).or_default().sources.push(address);
        }
    }

    fn serving(&self, picture: &mut Picture, v6: bool) {
        let mut slices: BTreeMap<(&str, &str), Vec<&SliceRow>> = BTreeMap::new();
        for ((namespace, _), row) in self.0.iter().flat_map(|scope| scope.slices.iter()) {
            slices.entry((namespace, &row.service)).or_default().push(row);
        }
        for place in self.0.iter().flat_map(|scope| scope.exports.places()) {
            let (namespace, name) = place;
            let key = || Some(ServiceKey::new(namespace.parse().ok()?, name.parse().ok()?));
            let (Some(row), Some(service)) = (self.service(place), key()) else { continue };
            // By account, then port and pod.
            let mut found: BTreeMap<&str, BTreeMap<usize, BTreeMap<&str, Backend>>> = BTreeMap::new();
            for slice in slices.get(&(namespace.as_str(), name.as_str())).into_iter().flatten() {
                for endpoint in &slice.endpoints {
                    let place = (namespace.clone(), endpoint.pod.clone());
                    let pod = self.pod(&place).filter(|pod| pod.addresses.contains(&endpoint.address));
                    let Some(pod) = pod else {
                        picture.nobodys += 1;
                        continue;
                    };
                    if pod.injected {
                        continue;
                    }
                    let of_account = found.entry(&pod.account).or_default();
                    for (nth, port) in row.ports.iter().enumerate() {
                        let target = slice
                            .ports
                            .iter()
                            .find(|(name, protocol, _)| *name == port.name && *protocol == port.protocol);
                        let Some((_, _, target)) = target else { continue };
                        let backend = Backend { at: (endpoint.address, *target), ready: endpoint.ready };
                        let known =
                            of_account.entry(nth).or_default().entry(&endpoint.pod).or_insert(backend);
                        if endpoint.address.is_ipv6() == v6 {
                            *known = backend;
                        }
                    }
                }
            }
            for (account, mut by_port) in found {
                let ports = row.ports.iter().enumerate().map(|(nth, port)| {
                    let backends = by_port.remove(&nth).unwrap_or_default();
                    let ready = backends.values().filter(|backend| backend.ready);
                    let mut backends: Vec<_> = ready.map(|backend| backend.at.into()).collect();
                    backends.sort_unstable();
                    ProvidedPort {
                        name: port.name.clone(),
                        port: port.port,
                        protocol: port.protocol,
                        app_protocol: port.app_protocol.clone(),
                        backends,
                    }
                });
                let service = ProvidedService {
                    service: service.clone(),
                    ports: ports.collect(),
                    standing: Standing::Behind,
                };
                let account = (namespace.clone(), account.to_owned());
                picture.accounts.entry(account).or_default().services.push(service);
            }
        }
    }

    /// Two that claim a number that nobody had before: the older has it, and the federator gives the other one of its own.
    fn numbers(&self, picture: &mut Picture, before: &[Numbered]) {
        let mut owners: BTreeMap<u16, (u64, Numbered)> = BTreeMap::new();
        for row in self.0.iter().flat_map(|scope| scope.services.iter().map(|(_, row)| row)) {
            let Some(service) = &row.import else { continue };
            for port in &row.ports {
                let Some(number) = port.target.filter(|number| FRONT_PORTS.contains(number)) else {
                    continue;
                };
                let claim =
                    Numbered { number, service: service.clone(), port: port.port, protocol: port.protocol };
                let order = |created: u64, claim: &Numbered| {
                    (!before.contains(claim), created, claim.service.clone(), claim.port, claim.protocol)
                };
                let older = owners.get(&number).is_some_and(|(created, known)| {
                    order(*created, known) <= order(row.created_unix, &claim)
                });
                if !older {
                    owners.insert(number, (row.created_unix, claim));
                }
            }
        }
        picture.numbered = owners.into_values().map(|(_, numbered)| numbered).collect();
    }
}

#[derive(Clone, Copy)]
struct Backend {
    at: (IpAddr, u16),
    ready: bool,
}

#[cfg(test)]
mod tests;
