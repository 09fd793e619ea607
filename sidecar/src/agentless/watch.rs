//! One task per service with agentless backends: names are resolved as often as their TTLs ask, every address is looked at
//! by the [`Guard`] and checked, and those in order are published, with one verdict on the service.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use tokio::sync::watch;
use tokio::time::Instant;
use tombolo_model::names::ServiceKey;
use tombolo_runtime::drain::Drain;

use super::{Alive, Backend, Guard, Host, MAX_ADDRESSES};
use crate::config::SidecarConfig;
use crate::health::{self, HealthCheck, Judge, Verdict};

/// A name with no TTL, or a very long one, is asked again all the same.
const TTL: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));
/// After a failure; what was known is used meanwhile, up to the time below.
const RETRY: Duration = Duration::from_secs(5);
/// A resolver that is away for longer leaves addresses that may be others' by now.
const STALE: Duration = Duration::from_secs(600);
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

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
}

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
    let mut names = Names { servers, resolver: None };
    let rounds = async {
        loop {
            for (backend, known) in backends.iter().zip(&mut known) {
                resolve(backend, known, &guard, &mut names).await;
            }
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
            tokio::time::sleep(check.interval).await;
        }
    };
    tokio::select! {
        () = rounds => {}
        () = drain.started() => {
            verdict.send_replace(Some(Verdict { healthy: false, reason: "draining".to_owned() }));
        }
    }
}

/// Resolves one backend when it is due, and leaves out what the guard refuses.
async fn resolve(backend: &Backend, known: &mut Known, guard: &Guard, names: &mut Names) {
    let now = Instant::now();
    if known.due.is_some_and(|due| now < due) {
        return;
    }
    let found = match &backend.host {
        // Nothing to ask; looked at anew because this machine's own addresses change.
        Host::Ip(ip) => Ok((vec![*ip], TTL.1)),
        Host::Name(name) => names.ask(name).await,
    };
    match found {
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
            if known.resolved.is_none_or(|at| now.saturating_duration_since(at) > STALE) {
                known.addresses.clear();
            }
            (known.problem, known.due) = (Some(reason), Some(now + RETRY));
            // The machine's resolvers may have changed.
            names.resolver = None;
        }
    }
}

/// Who resolves names, made when it is needed.
#[derive(Default)]
struct Names {
    servers: Vec<SocketAddr>,
    resolver: Option<TokioResolver>,
}

impl Names {
    fn resolver(&mut self) -> Result<&TokioResolver, NetError> {
        if self.resolver.is_none() {
            let mut builder = if self.servers.is_empty() {
                TokioResolver::builder_tokio()?
            } else {
                let servers = self.servers.iter().map(|server| {
                    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()];
                    let at = |mut connection: ConnectionConfig| {
                        connection.port = server.port();
                        connection
                    };
                    NameServerConfig::new(server.ip(), true, connections.map(at).into())
                });
                let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
                TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
            };
            // Asked when its TTL is over: no second one counts beside that.
            builder.options_mut().cache_size = 0;
            self.resolver = Some(builder.build()?);
        }
        self.resolver.as_ref().ok_or_else(|| NetError::from("there is no resolver"))
    }

    /// A name's addresses, and for how long they are good.
    async fn ask(&mut self, name: &str) -> Result<(Vec<IpAddr>, Duration), String> {
        let failed = |error: &dyn std::fmt::Display| format!("{name} does not resolve: {error}");
        let resolver = self.resolver().map_err(|e| failed(&e))?;
        let answer = tokio::time::timeout(RESOLVE_TIMEOUT, resolver.lookup_ip(name)).await;
        let answer = answer.map_err(|_| failed(&"no answer"))?.map_err(|e| failed(&e))?;
        let left = answer.valid_until().saturating_duration_since(std::time::Instant::now());
        let mut addresses: Vec<IpAddr> = answer.iter().map(|ip| ip.to_canonical()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses.truncate(MAX_ADDRESSES);
        Ok((addresses, left.clamp(TTL.0, TTL.1)))
    }
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

    #[tokio::test]
    async fn a_name_that_leads_to_this_machine_is_refused_until_it_is_allowed() {
        let backend: Backend = "localhost:5432".parse().unwrap();
        let (mut known, mut resolver) = (Known::default(), Names::default());
        resolve(&backend, &mut known, &Guard::default(), &mut resolver).await;
        assert!(known.addresses.is_empty(), "{known:?}");
        let problem = known.problem.clone().unwrap();
        assert!(
            problem.contains("this machine itself") && problem.contains("--agentless-allow"),
            "{problem}"
        );
        let allow = vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()];
        known.due = None;
        resolve(&backend, &mut known, &Guard { allow, ..Guard::default() }, &mut resolver).await;
        assert!(!known.addresses.is_empty() && known.problem.is_none(), "{known:?}");
    }
}
