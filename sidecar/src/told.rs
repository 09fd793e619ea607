//! Services that the cluster's Kubernetes sends to this sidecar's pod, as the federator tells them from EndpointSlices: served
//! without a setting, from the moment that a Service selects the pod until it does so no more.
//!
//! [`ToldTask`] compares what is told with what is served ([`step`](Told::step) decides) and starts and ends health checks. A
//! service counts as healthy while its own check passes and Kubernetes calls the pod ready: one that is ending is taken out
//! of rotation when Kubernetes says so, before its application stops to accept. What is told no more is served for the drain
//! time longer, unhealthy. A federator that says nothing changes nothing. What the settings name is theirs.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tombolo_model::names::ServiceKey;
use tombolo_model::protocol::Protocol;
use tombolo_proto::convert::{self, FieldError};
use tombolo_proto::v1;
use tombolo_runtime::drain::Drain;
use tombolo_runtime::tasks::TaskGroup;

use crate::client::Checked;
use crate::config::{LocalPort, ServiceConfig, SidecarConfig};
use crate::data_path::Local;
use crate::health::{self, HealthCheck, Verdict};
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
    ready: watch::Sender<bool>,
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
    local: Local,
    /// For the federator.
    said: watch::Sender<Vec<v1::LocalService>>,
    health: watch::Sender<Vec<Checked>>,
    checks: BTreeMap<ServiceKey, Check>,
    drain: Drain,
    tasks: TaskGroup,
}

impl ToldTask {
    pub fn new(
        config: &SidecarConfig,
        address: IpAddr,
        local: Local,
        (said, health): (watch::Sender<Vec<v1::LocalService>>, watch::Sender<Vec<Checked>>),
        drain: Drain,
        tasks: TaskGroup,
    ) -> Self {
        let fixed = config.services.clone();
        Self { fixed, address, patience: config.drain, local, said, health, checks: BTreeMap::new(), drain, tasks }
    }

    /// Until the configuration's sender is gone, or the drain starts.
    pub async fn run(mut self, mut tables: watch::Receiver<Option<Arc<Tables>>>) {
        let mut told = Told::default();
        let drain = self.drain.clone();
        loop {
            let now = tables.borrow_and_update().clone();
            let services = now.as_ref().and_then(|tables| tables.pod_services.as_deref());
            told.step(services, self.address, &self.fixed, Instant::now(), self.patience);
            self.serve(&told);
            let next = told.next();
            tokio::select! {
                changed = tables.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
                () = drain.started() => return std::future::pending().await,
            }
        }
    }

    fn serve(&mut self, told: &Told) {
        let same = |check: &Check| told.services.get(&check.config.service).is_some_and(|k| k.config == check.config);
        let ended = self.checks.values().any(|check| !same(check));
        self.checks.retain(|_, check| same(check));
        let new: Vec<&Known> =
            told.services.values().filter(|known| !self.checks.contains_key(&known.config.service)).collect();
        let changed = ended || !new.is_empty();
        for known in new {
            let Some(check) = self.check(known) else { continue };
            tracing::info!(service = %known.config.service, "Kubernetes sends a service to this pod: it is served");
            self.checks.insert(known.config.service.clone(), check);
        }
        for (service, check) in &self.checks {
            let ready = told.services.get(service).is_some_and(|known| known.ready);
            check.ready.send_if_modified(|before| std::mem::replace(before, ready) != ready);
        }
        if changed {
            let told = self.checks.values().map(|check| check.config.clone());
            self.local.replace(self.fixed.iter().cloned().chain(told).collect());
            self.said.send_replace(self.checks.values().map(|check| check.config.to_wire()).collect());
            let checked = self.checks.iter().map(|(service, check)| (service.clone(), check.verdict.clone()));
            self.health.send_replace(checked.collect());
        }
    }

    fn check(&self, known: &Known) -> Option<Check> {
        let (check, target) = known.config.checked()?;
        let (own, seen) = watch::channel(None);
        let (ready, is_ready) = watch::channel(known.ready);
        let (out, verdict) = watch::channel(None);
        let checking = health::watch_service(check, target, own, self.drain.clone());
        let checking = self.tasks.spawn("health", checking).abort_handle();
        let judging = self.tasks.spawn("readiness", judge(seen, is_ready, out)).abort_handle();
        Some(Check { config: known.config.clone(), ready, verdict, tasks: [checking, judging] })
    }
}

/// Until a sender is gone.
async fn judge(
    mut own: watch::Receiver<Option<Verdict>>,
    mut ready: watch::Receiver<bool>,
    out: watch::Sender<Option<Verdict>>,
) {
    loop {
        let verdict = match (own.borrow_and_update().clone(), *ready.borrow_and_update()) {
            (_, false) => {
                let reason = "Kubernetes does not count on this pod: it is not ready, or ending".to_owned();
                Some(Verdict { healthy: false, reason })
            }
            (own, true) => own,
        };
        out.send_if_modified(|before| *before != verdict && { *before = verdict; true });
        let changed = tokio::select! {
            changed = own.changed() => changed,
            changed = ready.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
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
            let ports: Vec<String> = known.config.ports.iter().map(|port| format!("{}={}", port.port, port.target)).collect();
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

    #[tokio::test]
    async fn a_pod_that_kubernetes_does_not_count_on_is_unhealthy_whatever_its_check_says() {
        let healthy = || Some(Verdict { healthy: true, reason: String::new() });
        let ((own, seen), (ready, is_ready)) = (watch::channel(None), watch::channel(true));
        let (out, mut verdict) = watch::channel(None::<Verdict>);
        let look = async {
            own.send_replace(healthy());
            assert!(verdict.wait_for(Option::is_some).await.unwrap().as_ref().unwrap().healthy);
            ready.send_replace(false);
            let not = |verdict: &Option<Verdict>| verdict.as_ref().is_some_and(|verdict| !verdict.healthy);
            assert!(verdict.wait_for(not).await.unwrap().as_ref().unwrap().reason.contains("Kubernetes"));
            ready.send_replace(true);
            let back = |verdict: &Option<Verdict>| verdict.as_ref().is_some_and(|verdict| verdict.healthy);
            verdict.wait_for(back).await.unwrap();
            drop((own, ready));
        };
        tokio::join!(judge(seen, is_ready, out), look);
    }
}
