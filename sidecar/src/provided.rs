//! Services that come, go and change while the sidecar runs: those of applications behind a shared sidecar in Kubernetes, and
//! those of the pod that it is in ([`crate::told`]).
//!
//! Whoever knows them says all of them anew through a [`Provided`]. Followed by the data path ([`follow`]: where streams go), by
//! the control task (what the federator is told is served) and by the reports ([`Standing`] says what is healthy).

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;
use tombolo_model::names::ServiceKey;
use tombolo_model::protocol::Protocol;
use tombolo_proto::v1;

use crate::agentless::{Alive, Destination};
use crate::health::Verdict;
use crate::inbound::{Leaving, LocalTarget};
use crate::metrics::Metrics;

/// Of one backend, in a service's weight: as a sidecar of its own would have.
const BACKEND_WEIGHT: u32 = 100;
/// Beyond this more backends make no difference: one endpoint carries no more than its process can.
const MOST_WEIGHT: u32 = 10_000;
/// For people: where the mesh ends.
const PLAIN: &str = "pods without a sidecar";

/// A service with where each of its ports is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProvidedService {
    pub service: ServiceKey,
    pub ports: Vec<ProvidedPort>,
    /// Only the first of them is kept in files.
    #[serde(skip)]
    pub standing: Standing,
}

/// Whose backends they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// Of pods without a sidecar, whose readiness has been judged already: without any the service is not healthy.
    #[default]
    Behind,
    /// Of the pod that this sidecar is in; `None`: not checked yet.
    Own(Option<Verdict>),
    /// The same, and Kubernetes does not count on it: its callers are sent elsewhere.
    Leaving(Verdict),
}

/// A port as callers name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProvidedPort {
    pub name: String,
    pub port: u16,
    pub protocol: Protocol,
    pub app_protocol: String,
    /// Sorted.
    pub backends: Vec<SocketAddr>,
}

impl ProvidedService {
    /// Of the port that has most.
    fn backends(&self) -> usize {
        self.ports.iter().map(|port| port.backends.len()).max().unwrap_or(0)
    }

    /// As the federator is told.
    pub(crate) fn to_wire(&self) -> v1::LocalService {
        let port = |port: &ProvidedPort| v1::ServicePort {
            name: port.name.clone(),
            port: port.port.into(),
            app_protocol: port.app_protocol.clone(),
            protocol: port.protocol.to_string(),
        };
        let count = u32::try_from(self.backends()).unwrap_or(u32::MAX).max(1);
        let plain = match self.standing {
            Standing::Behind => vec![PLAIN.to_owned()],
            Standing::Own(_) | Standing::Leaving(_) => Vec::new(),
        };
        v1::LocalService {
            service: self.service.to_string(),
            ports: self.ports.iter().map(port).collect(),
            weight: BACKEND_WEIGHT.saturating_mul(count).min(MOST_WEIGHT),
            plain,
        }
    }

    /// `None`: there is nothing to say yet.
    pub(crate) fn verdict(&self) -> Option<Verdict> {
        match (&self.standing, self.backends()) {
            (Standing::Own(verdict), _) => verdict.clone(),
            (Standing::Leaving(verdict), _) => Some(verdict.clone()),
            (Standing::Behind, 0) => Some(Verdict { healthy: false, reason: "no pod is ready".to_owned() }),
            (Standing::Behind, count) => {
                Some(Verdict { healthy: true, reason: format!("{count} pods are ready") })
            }
        }
    }
}

/// All of them, by service.
pub type Services = Arc<Vec<ProvidedService>>;

/// Follows what is provided.
#[derive(Clone, Debug)]
pub struct Provided(watch::Receiver<Services>);

impl Provided {
    pub fn channel(services: Services) -> (watch::Sender<Services>, Self) {
        let (sender, receiver) = watch::channel(services);
        (sender, Self(receiver))
    }

    pub fn now(&self) -> Services {
        Arc::clone(&self.0.borrow())
    }

    /// Until they are said anew; for ever once nobody says them any more.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// As [`Provided::changed`], of one that may not be there.
pub(crate) async fn changed(provided: &mut Option<Provided>) {
    match provided {
        Some(provided) => provided.changed().await,
        None => std::future::pending().await,
    }
}

/// What is served now, by the service's name.
pub(crate) type Served = Arc<ArcSwap<HashMap<Arc<str>, Arc<LocalTarget>>>>;

/// A port with its backends' sender.
type Backends = BTreeMap<(ServiceKey, Protocol, u16), watch::Sender<Arc<Alive>>>;

/// Keeps `served` at what is provided beside `fixed`. Streams that are open go on.
pub(crate) async fn follow(
    mut provided: Provided,
    fixed: Arc<HashMap<Arc<str>, Arc<LocalTarget>>>,
    served: Served,
    metrics: Metrics,
) {
    let mut backends = Backends::new();
    loop {
        let services = Arc::clone(&provided.0.borrow_and_update());
        update(&services, &fixed, &served, &mut backends, &metrics);
        provided.changed().await;
    }
}

fn update(
    services: &[ProvidedService],
    fixed: &HashMap<Arc<str>, Arc<LocalTarget>>,
    served: &Served,
    backends: &mut Backends,
    metrics: &Metrics,
) {
    let mut now = Backends::new();
    let before = served.load_full();
    let mut table = fixed.clone();
    for service in services {
        let mut ports = HashMap::new();
        for port in &service.ports {
            let alive =
                Arc::new(Alive(port.backends.iter().map(|backend| (*backend, BACKEND_WEIGHT)).collect()));
            let key = (service.service.clone(), port.protocol, port.port);
            let sender = backends.remove(&key).unwrap_or_else(|| watch::channel(Arc::default()).0);
            ports.insert((port.protocol, port.port), Destination::Agentless(sender.subscribe()));
            sender.send_if_modified(|known| {
                let changed = *known != alive;
                *known = alive;
                changed
            });
            now.insert(key, sender);
        }
        let name: Arc<str> = service.service.to_string().into();
        let same = before.get(&name).filter(|known| {
            known.ports.len() == ports.len() && ports.keys().all(|port| known.ports.contains_key(port))
        });
        let target = same.cloned().unwrap_or_else(|| {
            let flows = metrics.udp.service("inbound", &name);
            let metrics = metrics.service("inbound", &name);
            let leaving = Leaving::default();
            Arc::new(LocalTarget { service: service.service.clone(), ports, metrics, flows, leaving })
        });
        target.leaving.set(matches!(service.standing, Standing::Leaving(_)), Instant::now());
        table.insert(name, target);
    }
    // Whoever still holds a port that is gone is told that nobody is behind it.
    for sender in backends.values() {
        sender.send_replace(Arc::default());
    }
    *backends = now;
    served.store(Arc::new(table));
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;

    fn service(name: &str, ports: &[(u16, &[&str])]) -> ProvidedService {
        let port = |(port, backends): &(u16, &[&str])| ProvidedPort {
            name: String::new(),
            port: *port,
            protocol: Protocol::Tcp,
            app_protocol: String::new(),
            backends: backends.iter().map(|backend| backend.parse().unwrap()).collect(),
        };
        ProvidedService {
            service: format!("shop/{name}").parse().unwrap(),
            ports: ports.iter().map(port).collect(),
            standing: Standing::Behind,
        }
    }

    #[test]
    fn open_connections_follow_backends_and_a_port_that_is_gone_leads_to_nobody() {
        let metrics = Metrics::register(&mut Registry::default());
        let (fixed, served, mut backends) = (HashMap::new(), Served::default(), Backends::new());
        let mut say =
            |services: &[ProvidedService]| update(services, &fixed, &served, &mut backends, &metrics);
        say(&[service("web", &[(80, &["10.0.0.1:8080"])])]);
        let held = served.load().get("shop/web").cloned().unwrap();
        let at = |target: &LocalTarget, port| target.ports[&(Protocol::Tcp, port)].candidates();
        assert_eq!(at(&held, 80), ["10.0.0.1:8080".parse().unwrap()]);
        say(&[service("web", &[(80, &["10.0.0.2:8080"])])]);
        assert_eq!(at(&held, 80), ["10.0.0.2:8080".parse().unwrap()]);
        assert!(Arc::ptr_eq(&held, served.load().get("shop/web").unwrap()), "the same service");
        say(&[service("web", &[(81, &["10.0.0.2:8081"])])]);
        assert!(at(&held, 80).is_empty(), "nobody is behind it any more");
        let now = served.load().get("shop/web").cloned().unwrap();
        assert_eq!(at(&now, 81), ["10.0.0.2:8081".parse().unwrap()]);
        say(&[]);
        assert!(served.load().is_empty() && at(&now, 81).is_empty());
    }

    #[test]
    fn a_service_weighs_as_much_as_its_pods_and_is_healthy_while_one_is_ready() {
        let some = service("web", &[(80, &["10.0.0.1:1", "10.0.0.2:1"]), (81, &["10.0.0.1:2"])]);
        assert_eq!((some.to_wire().weight, some.verdict().unwrap().healthy), (200, true));
        let none = service("web", &[(80, &[])]);
        assert_eq!((none.to_wire().weight, none.verdict().unwrap().healthy), (100, false));
        let own = ProvidedService { standing: Standing::Own(None), ..some };
        assert_eq!(
            (own.verdict(), own.to_wire().plain),
            (None, Vec::new()),
            "not checked yet, and no plain hop"
        );
    }
}
