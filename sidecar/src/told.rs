//! Services that the cluster's Kubernetes sends to this sidecar's pod, as the federator tells them from EndpointSlices: served
//! without a setting, from the moment that a Service selects the pod until it does so no more.
//!
//! [`ToldTask`] compares what is told with what is served ([`step`](Told::step) decides) and starts and ends health checks. A
//! service counts as healthy while its own check passes and Kubernetes calls the pod ready: one that is ending is taken out
//! of rotation when Kubernetes says so, before its application stops to accept; callers that hold connections are sent elsewhere a
//! second later. What is told no more is served for the drain
//! time longer, unhealthy. A federator that says nothing changes nothing. What the settings name is theirs.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tombolo_model::names::ServiceKey;
use tombolo_model::protocol::Protocol;
use tombolo_proto::convert::{self, FieldError};
use tombolo_proto::v1;
use tombolo_runtime::drain::Drain;
use tombolo_runtime::tasks::TaskGroup;

use crate::config::{LocalPort, ServiceConfig, SidecarConfig};
use crate::health::{self, HealthCheck, Verdict};
use crate::provided::{Provided, ProvidedPort, ProvidedService, Services, Standing};
use crate::tables::Tables;

/// Services that select one pod: a handful.
pub(crate) const MAX_SERVICES: usize = 100;
const MAX_PORTS: usize = 100;

/// A service of the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodService {
    pub service: ServiceKey,
    pub ports: Vec<PodPort>,
    /// Kubernetes counts on it.
    pub ready: bool,
}

/// A port of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPort {
    pub name: String,
    pub port: u16,
    pub target: u16,
    pub protocol: Protocol,
    pub app_protocol: String,
}

/// Reads one; ports of protocols that are not carried are left out.
pub(crate) fn read(wire: &v1::PodService) -> Result<PodService, FieldError> {
    let number = |field, number: u32| {
        let port = u16::try_from(number).ok().filter(|port| *port != 0);
        port.ok_or_else(|| FieldError::new(field, number, "1..=65535"))
    };
    let port = |port: &v1::PodPort| {
        let Some(protocol) = Protocol::parse(&port.protocol) else { return Ok(None) };
        Ok(Some(PodPort {
            name: port.name.clone(),
            port: number("pod_services.ports.port", port.port)?,
            target: number("pod_services.ports.target", port.target)?,
            protocol,
            app_protocol: port.app_protocol.clone(),
        }))
    };
    let ports = wire.ports.iter().take(MAX_PORTS).filter_map(|wire| port(wire).transpose());
    Ok(PodService {
        service: convert::parse("pod_services.service", &wire.service)?,
        ports: ports.collect::<Result<_, _>>()?,
        ready: wire.ready,
    })
}

/// What is served because it was told (pure, time passed in).
#[derive(Debug, Default)]
struct Told {
    services: BTreeMap<ServiceKey, Known>,
}

#[derive(Clone, Debug, PartialEq)]
struct Known {
    config: ServiceConfig,
    ready: bool,
    /// It is told no more, and goes then.
    goes: Option<Instant>,
}

impl Told {
    /// What is served from now on. `told`: `None` when nothing is known.
    fn step(
        &mut self,
        told: Option<&[PodService]>,
        address: IpAddr,
        fixed: &[ServiceConfig],
        now: Instant,
        patience: Duration,
    ) {
        if let Some(told) = told {
            let ours = told.iter().filter(|told| !told.ports.is_empty());
            let ours = ours.filter(|told| fixed.iter().all(|fixed| fixed.service != told.service));
            let mut services: BTreeMap<ServiceKey, Known> = ours
                .map(|told| {
                    let known = Known { config: config(told, address), ready: told.ready, goes: None };
                    (told.service.clone(), known)
                })
                .collect();
            for (service, before) in std::mem::take(&mut self.services) {
                let goes = Some(before.goes.unwrap_or(now + patience));
                services.entry(service).or_insert(Known { ready: false, goes, ..before });
            }
            self.services = services;
        }
        self.services.retain(|_, known| known.goes.is_none_or(|goes| goes > now));
    }

    fn next(&self) -> Option<Instant> {
        self.services.values().filter_map(|known| known.goes).min()
    }
}

fn config(told: &PodService, address: IpAddr) -> ServiceConfig {
    let mut ports: Vec<LocalPort> = Vec::new();
    for PodPort { name, port, target, protocol, app_protocol } in told.ports.clone() {
        let twice = ports.iter().any(|known| (known.protocol, known.port) == (protocol, port));
        let target = SocketAddr::new(address, target);
        if !twice {
            ports.push(LocalPort { name, port, protocol, target, app_protocol });
        }
    }
    let health = HealthCheck::default();
    ServiceConfig { service: told.service.clone(), ports, backends: Vec::new(), health, weight: 100 }
}

/// A running check.
#[derive(Debug)]
struct Check {
    config: ServiceConfig,
    verdict: watch::Receiver<Option<Verdict>>,
    tasks: [AbortHandle; 2],
}

impl Drop for Check {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// Serves what is told.
#[derive(Debug)]
pub(crate) struct ToldTask {
    fixed: Vec<ServiceConfig>,
    address: IpAddr,
    patience: Duration,
    provided: watch::Sender<Services>,
    checks: BTreeMap<ServiceKey, Check>,
    /// A check has something to say.
    news: Arc<Notify>,
}

impl ToldTask {
    /// With what it will provide.
    pub fn new(config: &SidecarConfig, address: IpAddr) -> (Self, Provided) {
        let (sender, provided) = Provided::channel(Services::default());
        let task = Self {
            fixed: config.services.clone(),
            address,
            patience: config.drain,
            provided: sender,
            checks: BTreeMap::new(),
            news: Arc::default(),
        };
        (task, provided)
    }

    /// Until the configuration's sender is gone, or the drain starts.
    pub async fn run(
        mut self,
        mut tables: watch::Receiver<Option<Arc<Tables>>>,
        drain: Drain,
        tasks: TaskGroup,
    ) {
        let mut told = Told::default();
        let news = Arc::clone(&self.news);
        loop {
            let now = tables.borrow_and_update().clone();
            let services = now.as_ref().and_then(|tables| tables.pod_services.as_deref());
            told.step(services, self.address, &self.fixed, Instant::now(), self.patience);
            self.check(&told, &drain, &tasks);
            self.provide(&told);
            let next = told.next();
            tokio::select! {
                changed = tables.changed() => if changed.is_err() { return },
                () = news.notified() => {}
                () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
                () = drain.started() => return std::future::pending().await,
            }
        }
    }

    /// One check for each service, as it is now.
    fn check(&mut self, told: &Told, drain: &Drain, tasks: &TaskGroup) {
        self.checks.retain(|service, check| {
            told.services.get(service).is_some_and(|known| known.config == check.config)
        });
        for (service, known) in &told.services {
            if self.checks.contains_key(service) {
                continue;
            }
            let Some((check, target)) = known.config.checked() else { continue };
            tracing::info!(%service, %target, "Kubernetes sends a service to this pod: it is served");
            let (own, verdict) = watch::channel(None);
            let checking = tasks.spawn("health", health::watch_service(check, target, own, drain.clone()));
            let telling = tasks.spawn("health news", tell(verdict.clone(), Arc::clone(&self.news)));
            let tasks = [checking.abort_handle(), telling.abort_handle()];
            self.checks.insert(service.clone(), Check { config: known.config.clone(), verdict, tasks });
        }
    }

    fn provide(&self, told: &Told) {
        let service = |known: &Known| {
            let check = self.checks.get(&known.config.service);
            let own = check.and_then(|check| check.verdict.borrow().clone());
            provided(&known.config, judged(own, known.ready))
        };
        let services: Services = Arc::new(told.services.values().map(service).collect());
        self.provided.send_if_modified(|before| {
            let changed = **before != *services;
            *before = services;
            changed
        });
    }
}

fn provided(config: &ServiceConfig, standing: Standing) -> ProvidedService {
    let port = |port: &LocalPort| ProvidedPort {
        name: port.name.clone(),
        port: port.port,
        protocol: port.protocol,
        app_protocol: port.app_protocol.clone(),
        backends: vec![port.target],
    };
    ProvidedService {
        service: config.service.clone(),
        ports: config.ports.iter().map(port).collect(),
        standing,
    }
}

/// What its own check says, while Kubernetes counts on the pod.
fn judged(own: Option<Verdict>, ready: bool) -> Standing {
    if ready {
        return Standing::Own(own);
    }
    let reason = "Kubernetes does not count on this pod: it is not ready, or ending".to_owned();
    Standing::Leaving(Verdict { healthy: false, reason })
}

/// Until the check has ended.
async fn tell(mut verdict: watch::Receiver<Option<Verdict>>, news: Arc<Notify>) {
    while verdict.changed().await.is_ok() {
        news.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAIN: Duration = Duration::from_secs(10);

    fn told(service: &str, target: u32, ready: bool) -> PodService {
        let port = |protocol: &str, target| v1::PodPort {
            port: 80,
            target,
            protocol: protocol.to_owned(),
            ..v1::PodPort::default()
        };
        let ports = vec![port("TCP", target), port("SCTP", 1), port("TCP", 1)];
        read(&v1::PodService { service: service.to_owned(), ports, ready }).unwrap()
    }

    fn served(told: &Told) -> Vec<String> {
        let shown = |known: &Known| {
            let ports: Vec<String> =
                known.config.ports.iter().map(|port| format!("{}={}", port.port, port.target)).collect();
            format!("{} {} {}", known.config.service, ports.join(","), known.ready)
        };
        told.services.values().map(shown).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_told_is_served_and_leaves_slowly_and_silence_changes_nothing() {
        let (address, start) = ("10.1.0.5".parse().unwrap(), Instant::now());
        let mut state = Told::default();
        let mut step = |services: Option<&[PodService]>, after: u64| {
            state.step(services, address, &[], start + Duration::from_secs(after), DRAIN);
            (served(&state), state.next().map(|at| (at - start).as_secs()))
        };
        let web = "shop/web 80=10.1.0.5:8080 true".to_owned();
        assert_eq!(step(None, 0), (Vec::new(), None));
        assert_eq!(step(Some(&[told("shop/web", 8080, true)]), 1), (vec![web.clone()], None));
        assert_eq!(step(None, 100), (vec![web.clone()], None), "a federator that knows nothing");
        let leaves = "shop/web 80=10.1.0.5:8080 false".to_owned();
        assert_eq!(step(Some(&[]), 101), (vec![leaves.clone()], Some(111)));
        assert_eq!(step(Some(&[]), 105), (vec![leaves], Some(111)), "the time does not begin anew");
        assert_eq!(step(Some(&[told("shop/web", 8080, true)]), 106), (vec![web], None), "it is back");
        step(Some(&[]), 107);
        assert_eq!(step(Some(&[]), 117), (Vec::new(), None));
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_settings_name_is_theirs() {
        let fixed = [config(&told("shop/web", 9, true), "127.0.0.1".parse().unwrap())];
        let mut state = Told::default();
        let services = [told("shop/web", 8080, true), told("shop/db", 5432, false)];
        state.step(Some(&services), "10.1.0.5".parse().unwrap(), &fixed, Instant::now(), DRAIN);
        assert_eq!(served(&state), ["shop/db 80=10.1.0.5:5432 false"]);
    }

    #[test]
    fn ports_that_are_none_are_named() {
        let ports = vec![v1::PodPort { port: 80, target: 70_000, ..v1::PodPort::default() }];
        let wire = v1::PodService { service: "shop/web".to_owned(), ports, ready: true };
        assert!(read(&wire).unwrap_err().to_string().contains("pod_services.ports.target"));
    }

    #[test]
    fn a_pod_that_kubernetes_does_not_count_on_is_unhealthy_whatever_its_check_says() {
        let own = Some(Verdict { healthy: true, reason: String::new() });
        assert_eq!(judged(own.clone(), true), Standing::Own(own.clone()));
        assert_eq!(judged(None, true), Standing::Own(None), "not checked yet");
        for own in [own, None] {
            let Standing::Leaving(verdict) = judged(own, false) else { panic!("it is counted on") };
            assert!(!verdict.healthy && verdict.reason.contains("Kubernetes"));
        }
    }
}
