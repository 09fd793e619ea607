//! One task per service with agentless backends: names are resolved as often as their TTLs ask, every address is looked at
//! by the [`Guard`] and checked, and those in order are published, with one verdict on the service. Checks do not wait for
//! names: a resolver that is silent must not keep a dead address in rotation.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::watch;
use tokio::time::Instant;
use tombolo_model::names::ServiceKey;
use tombolo_runtime::drain::Drain;

use super::names::{Answer, LONGEST_TTL, Names};
use super::{Alive, Backend, Guard, Host};
use crate::config::SidecarConfig;
use crate::health::{self, HealthCheck, Judge, Verdict};

/// After a failure; what was known is used meanwhile, up to the time below.
const RETRY: Duration = Duration::from_secs(5);
/// A resolver that is away for longer leaves addresses that may be others' by now.
const STALE: Duration = Duration::from_secs(600);
/// For first answers, before anything is said of the service.
const FIRST_ANSWERS: Duration = Duration::from_secs(1);

/// What a service's task works with.
#[derive(Debug)]
pub struct Watched {
    pub service: ServiceKey,
    pub backends: Vec<Backend>,
    pub check: HealthCheck,
    pub guard: Guard,
    /// Who resolves names; none: those of `/etc/resolv.conf`.
    pub servers: Vec<SocketAddr>,
    pub alive: watch::Sender<Arc<Alive>>,
    pub verdict: watch::Sender<Option<Verdict>>,
}

/// What watches the backends of each service that has some, and where what is in order is read.
pub(crate) fn of(config: &SidecarConfig) -> (Vec<Watched>, HashMap<ServiceKey, watch::Receiver<Arc<Alive>>>) {
    let guard = Guard {
        allow: config.agentless_allow.clone(),
        virtual_ranges: config.capture.iter().flat_map(|capture| capture.ranges.clone()).collect(),
        own_ports: config.own_ports(),
    };
    let with_backends = config.services.iter().filter(|service| !service.backends.is_empty());
    let pairs = with_backends.map(|service| {
        let (alive, read) = watch::channel(Arc::default());
        let watched = Watched {
            service: service.service.clone(),
            backends: service.backends.clone(),
            check: service.health.clone(),
            guard: guard.clone(),
            servers: config.names.as_ref().map(|names| names.upstreams.clone()).unwrap_or_default(),
            alive,
            verdict: watch::channel(None).0,
        };
        (watched, (service.service.clone(), read))
    });
    pairs.unzip()
}

/// What is known of one backend.
#[derive(Debug, Default)]
struct Known {
    addresses: Vec<IpAddr>,
    /// When it is to be resolved again; `None`: it has not been yet.
    due: Option<Instant>,
    resolved: Option<Instant>,
    problem: Option<String>,
    /// It is being resolved.
    asked: bool,
}

/// Names that are being resolved: the backend's place, and what comes of it.
type Asking = FuturesUnordered<BoxFuture<'static, (usize, Answer)>>;

/// What is known of one address.
#[derive(Debug)]
struct Checked {
    judge: Judge,
    verdict: Verdict,
}

/// Whether an address is one of this machine's: it can be bound.
fn is_own(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

/// Checks until the drain starts; then says unhealthy once more.
pub async fn run(watched: Watched, drain: Drain) {
    let Watched { service, backends, check, guard, servers, alive, verdict } = watched;
    let mut known: Vec<Known> = backends.iter().map(|_| Known::default()).collect();
    let mut checked: BTreeMap<SocketAddr, Checked> = BTreeMap::new();
    let (mut names, mut asking) = (Names::new(servers), Asking::new());
    let rounds = async {
        ask_due(&backends, &mut known, &guard, &mut names, &asking);
        let first = async {
            while let Some((at, answer)) = asking.next().await {
                take(&backends, &mut known, &guard, &mut names, at, answer);
            }
        };
        let _ = tokio::time::timeout(FIRST_ANSWERS, first).await;
        loop {
            let addresses = shares(&backends, &known);
            checked.retain(|address, _| addresses.contains_key(address));
            let probes = addresses.keys().map(|address| health::probe(&check, *address));
            let results = futures::future::join_all(probes).await;
            for (address, result) in addresses.keys().zip(results) {
                observe(&mut checked, *address, &check, result);
            }
            let in_order = |address: &SocketAddr| checked.get(address).is_some_and(|c| c.verdict.healthy);
            let list = addresses.iter().filter(|(address, weight)| **weight > 0 && in_order(address));
            let list = Arc::new(Alive(list.map(|(address, weight)| (*address, *weight)).collect()));
            let said = judged(&backends, &known, &checked, &list);
            alive.send_if_modified(|now| {
                let changed = **now != *list;
                *now = Arc::clone(&list);
                changed
            });
            verdict.send_if_modified(|now| {
                let changed = now.as_ref() != Some(&said);
                if changed {
                    tracing::info!(%service, healthy = said.healthy, reason = said.reason, "agentless backends");
                    *now = Some(said);
                }
                changed
            });
            let next = tokio::time::sleep(check.interval);
            tokio::pin!(next);
            loop {
                ask_due(&backends, &mut known, &guard, &mut names, &asking);
                tokio::select! {
                    () = &mut next => break,
                    Some((at, answer)) = asking.next() => {
                        // New addresses are checked at once.
                        if take(&backends, &mut known, &guard, &mut names, at, answer) {
                            break;
                        }
                    }
                }
            }
        }
    };
    tokio::select! {
        () = rounds => {}
        () = drain.started() => {
            verdict.send_replace(Some(Verdict { healthy: false, reason: "draining".to_owned() }));
        }
    }
}

/// Starts to resolve what is due. An address needs no answer, and is looked at anew because this machine's own change.
fn ask_due(backends: &[Backend], known: &mut [Known], guard: &Guard, names: &mut Names, asking: &Asking) {
    let now = Instant::now();
    for (at, backend) in backends.iter().enumerate() {
        let Some(state) = known.get_mut(at) else { continue };
        if state.asked || state.due.is_some_and(|due| now < due) {
            continue;
        }
        match &backend.host {
            Host::Ip(ip) => {
                take(backends, known, guard, names, at, Ok((vec![*ip], LONGEST_TTL)));
            }
            Host::Name(name) => {
                state.asked = true;
                let answer = names.ask(name.clone());
                asking.push(Box::pin(async move { (at, answer.await) }));
            }
        }
    }
}

/// Takes an answer over, without what the guard refuses; whether addresses have changed.
fn take(
    backends: &[Backend],
    known: &mut [Known],
    guard: &Guard,
    names: &mut Names,
    at: usize,
    answer: Answer,
) -> bool {
    let (Some(backend), Some(known)) = (backends.get(at), known.get_mut(at)) else { return false };
    let now = Instant::now();
    let before = std::mem::take(&mut known.addresses);
    known.asked = false;
    match answer {
        Ok((addresses, ttl)) => {
            let mut problem = None;
            known.addresses = addresses;
            known.addresses.retain(|ip| {
                let to = SocketAddr::new(*ip, backend.port);
                let refusal = guard.refusal(to, is_own(*ip));
                if let Some(reason) = refusal {
                    problem = Some(format!("{to} {reason}: --agentless-allow {ip} would let it be"));
                }
                refusal.is_none()
            });
            if problem.is_some() && problem != known.problem {
                tracing::warn!(%backend, problem, "an agentless backend is refused");
            }
            (known.problem, known.resolved, known.due) = (problem, Some(now), Some(now + ttl));
        }
        Err(reason) => {
            if known.resolved.is_some_and(|at| now.saturating_duration_since(at) <= STALE) {
                known.addresses.clone_from(&before);
            }
            (known.problem, known.due) = (Some(reason), Some(now + RETRY));
            // The machine's resolvers may have changed.
            names.forget();
        }
    }
    known.addresses != before
}

/// The weight of each address: a backend's is shared out among its own. Scaled, so that none is rounded to nothing.
fn shares(backends: &[Backend], known: &[Known]) -> BTreeMap<SocketAddr, u32> {
    const SCALE: u32 = 1000;
    let mut shares: BTreeMap<SocketAddr, u32> = BTreeMap::new();
    for (backend, known) in backends.iter().zip(known) {
        let count = u32::try_from(known.addresses.len()).unwrap_or(u32::MAX).max(1);
        let share = backend.weight.saturating_mul(SCALE) / count;
        for ip in &known.addresses {
            let entry = shares.entry(SocketAddr::new(*ip, backend.port)).or_default();
            *entry = entry.saturating_add(share);
        }
    }
    shares
}

fn observe(
    checked: &mut BTreeMap<SocketAddr, Checked>,
    address: SocketAddr,
    check: &HealthCheck,
    result: Result<(), String>,
) {
    let unknown = || Checked {
        judge: Judge::new(check),
        verdict: Verdict { healthy: false, reason: "not checked yet".to_owned() },
    };
    let entry = checked.entry(address).or_insert_with(unknown);
    if let Some(changed) = entry.judge.observe(result) {
        entry.verdict = changed;
    }
}

/// One verdict on all of them: healthy while any gets connections.
fn judged(
    backends: &[Backend],
    known: &[Known],
    checked: &BTreeMap<SocketAddr, Checked>,
    alive: &Alive,
) -> Verdict {
    let problems = backends
        .iter()
        .zip(known)
        .filter_map(|(backend, known)| known.problem.as_ref().map(|problem| format!("{backend}: {problem}")));
    let unhealthy = checked.iter().filter(|(_, checked)| !checked.verdict.healthy);
    let unhealthy = unhealthy.map(|(address, checked)| format!("{address}: {}", checked.verdict.reason));
    let said: Vec<String> = problems.chain(unhealthy).collect();
    let reason = format!("{} of {} addresses in order", alive.0.len(), checked.len());
    let reason = if said.is_empty() { reason } else { format!("{reason}; {}", said.join("; ")) };
    Verdict { healthy: !alive.0.is_empty(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_many_addresses_gets_no_more_than_its_backends_share() {
        let backends: Vec<Backend> = ["a.example:80".parse().unwrap(), "10.0.0.9:80".parse().unwrap()].into();
        let known = |addresses: &[&str]| Known {
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            ..Known::default()
        };
        let shares = shares(&backends, &[known(&["10.0.0.1", "10.0.0.2"]), known(&["10.0.0.9"])]);
        assert_eq!(shares.values().copied().collect::<Vec<_>>(), [50_000, 50_000, 100_000]);
    }

    async fn resolved(backend: &Backend, known: &mut Known, guard: &Guard) {
        let (mut names, asking) = (Names::new(Vec::new()), Asking::new());
        let backends = std::slice::from_ref(backend);
        ask_due(backends, std::slice::from_mut(known), guard, &mut names, &asking);
        let (at, answer) = asking.into_future().await.0.unwrap();
        take(backends, std::slice::from_mut(known), guard, &mut names, at, answer);
    }

    #[tokio::test]
    async fn a_name_that_leads_to_this_machine_is_refused_until_it_is_allowed() {
        let backend: Backend = "localhost:5432".parse().unwrap();
        let mut known = Known::default();
        resolved(&backend, &mut known, &Guard::default()).await;
        assert!(known.addresses.is_empty(), "{known:?}");
        let problem = known.problem.clone().unwrap();
        assert!(
            problem.contains("this machine itself") && problem.contains("--agentless-allow"),
            "{problem}"
        );
        let allow = vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()];
        known.due = None;
        resolved(&backend, &mut known, &Guard { allow, ..Guard::default() }).await;
        assert!(!known.addresses.is_empty() && known.problem.is_none(), "{known:?}");
    }

    #[tokio::test]
    async fn a_resolver_that_is_silent_keeps_no_dead_address_in_rotation() {
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let application = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = application.local_addr().unwrap();
        let (alive, seen) = watch::channel(Arc::default());
        let (verdict, mut said) = watch::channel(None);
        let interval = Duration::from_millis(50);
        let watched = Watched {
            service: "shop/db".parse().unwrap(),
            backends: vec!["db.example:5432".parse().unwrap(), address.to_string().parse().unwrap()],
            check: HealthCheck { interval, ..HealthCheck::default() },
            guard: Guard { allow: vec!["127.0.0.0/8".parse().unwrap()], ..Guard::default() },
            servers: vec![silent.local_addr().unwrap()],
            alive,
            verdict,
        };
        let (_trigger, drain) = tombolo_runtime::drain::channel();
        let told = async {
            said.wait_for(|said| said.as_ref().is_some_and(|said| said.healthy)).await.unwrap();
            assert_eq!(seen.borrow().0.len(), 1);
            let begun = Instant::now();
            drop(application);
            said.wait_for(|said| said.as_ref().is_some_and(|said| !said.healthy)).await.unwrap();
            // Less than one question to the silent resolver takes.
            assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
        };
        tokio::select! {
            () = run(watched, drain) => panic!("it ended"),
            told = tokio::time::timeout(Duration::from_secs(10), told) => told.unwrap(),
        }
    }
}
