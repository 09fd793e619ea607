//! The applications of a shared sidecar as a Kubernetes cluster has them: one per service account whose pods have no sidecar.
//!
//! Sources are the pods' addresses, services are what is exported of them, the front's listeners are the numbers of derived
//! `Service`s. [`watching`] keeps the watches going in a task of its own; [`KubernetesSource`] owns the tables they fill
//! ([`picture`], pure), and says the configuration anew when it has changed. A service account's sidecar runs while it serves
//! something, or once one of its pods has called; it joins with a token that Kubernetes gives for that account ([`token`]).
//!
//! While the API server is away what is known stays, also over a restart ([`remembered`]), but not for ever: addresses may be
//! others' by then. After [`KubernetesConfig::stale_after`] nobody is told apart any more, until it is back.

pub mod picture;
mod remembered;
pub mod rows;
mod token;
mod watching;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use ipnet::IpNet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tombolo_overlay::member::ServiceAccountToken;
use tombolo_runtime::clock;
use tombolo_runtime::tasks::TaskGroup;

use self::picture::{Account, AccountPicture, Picture, Tables};
use self::remembered::Remembered;
use self::token::AskedToken;
pub use self::watching::{Connect, Session};
use self::watching::{News, WatchTask};
use super::Source;
use super::config::{Application, Register, SharedConfig, Start};
use crate::config::{SidecarConfig, UpstreamConfig};
use crate::provided::{Provided, Services};

/// What comes together is taken over together; a backend that changes is followed within this and a little. In a cluster of
/// thousands of pods a look takes milliseconds: then within so many times as long, so that bytes have the thread for the
/// rest.
const SETTLE: Duration = Duration::from_millis(20);
const SETTLE_FACTOR: u32 = 10;
const LONGEST_SETTLE: Duration = Duration::from_millis(500);
/// Events that wait to be taken over: more only wait where they are cheaper.
const QUEUED: usize = 256;
/// Directories of service accounts that are gone are looked for this often.
const SWEEP_EVERY: Duration = Duration::from_secs(3600);

/// What a shared sidecar in Kubernetes is told.
#[derive(Clone, Debug)]
pub struct KubernetesConfig {
    /// Empty: all.
    pub namespaces: Vec<String>,
    /// Where the front listens, at every number.
    pub front: Vec<IpAddr>,
    /// Of overlay sockets.
    pub overlay_ports: RangeInclusive<u16>,
    /// Every application's sidecar, but for its name, state and what it serves; `bind` says the address.
    pub sidecar: SidecarConfig,
    /// A directory per service account.
    pub state_dir: PathBuf,
    /// The audience that the federator asks of tokens.
    pub audience: String,
    /// What this replica calls itself, unlike others.
    pub holder: String,
    pub stale_after: Duration,
    pub admin: SocketAddr,
}

#[derive(Clone, Debug, Default)]
struct Metrics {
    accounts: Gauge,
    reachable: Gauge,
    watch_errors: Counter,
    nobodys: Gauge,
    contested: Gauge,
}

/// Says what a shared sidecar is to do, as the API server has it.
pub struct KubernetesSource {
    config: KubernetesConfig,
    news: mpsc::Receiver<News>,
    session: watch::Receiver<Option<Session>>,
    tables: Tables,
    remembered: Remembered,
    /// What numbers led to when it was last looked at.
    numbered: Vec<picture::Numbered>,
    /// What each service account's sidecar is told.
    told: BTreeMap<Account, (watch::Sender<Services>, Provided)>,
    /// When the picture is to be looked at anew.
    due: Option<Instant>,
    settle: Duration,
    /// Since when the API server has not been heard.
    away: Option<Instant>,
    /// It has not been heard for too long: callers are not told apart.
    stale: bool,
    /// Said once.
    warned: BTreeSet<&'static str>,
    swept: Option<Instant>,
    metrics: Metrics,
}

impl KubernetesSource {
    /// Starts to watch; tasks are `tasks`'s. The second is what the shared sidecar is built with.
    pub fn start(config: KubernetesConfig, connect: Connect, tasks: &TaskGroup) -> (Self, SharedConfig) {
        let metrics = Metrics::default();
        let (sender, news) = mpsc::channel(QUEUED);
        let (session_sender, session) = watch::channel(None);
        let task = WatchTask {
            namespaces: config.namespaces.clone(),
            connect,
            news: sender,
            session: session_sender,
            errors: metrics.watch_errors.clone(),
        };
        tasks.spawn("Kubernetes watches", task.run());
        let tables = Tables::new(config.namespaces.len());
        let mut source = Self {
            remembered: Remembered::read(&config.state_dir),
            config,
            news,
            session,
            tables,
            told: BTreeMap::new(),
            numbered: Vec::new(),
            due: None,
            settle: SETTLE,
            away: None,
            stale: false,
            warned: BTreeSet::new(),
            swept: None,
            metrics,
        };
        let first = source.configuration();
        (source, first)
    }

    fn take(&mut self, news: News) {
        let now = Instant::now();
        let changed = match news {
            News::Event { scope, kind, event } => self.tables.apply(scope, kind, *event),
            News::Away => {
                if self.away.is_none() {
                    self.went_away(now);
                }
                false
            }
            News::Back => {
                self.away = None;
                false
            }
        };
        let changed = changed || (self.stale && self.away.is_none());
        self.metrics.reachable.set(i64::from(self.away.is_none()));
        if changed && self.tables.is_synced() {
            let at = now + self.settle;
            // What is due later, because a pod's time is over then, is looked at with it.
            self.due = Some(self.due.map_or(at, |due| due.min(at)));
        }
    }

    fn went_away(&mut self, now: Instant) {
        self.away = Some(now);
        if self.tables.is_synced() {
            return;
        }
        // Nothing was received yet: what a former process knew holds for as long as it would have.
        if let Some(heard) = self.remembered.fall_back(clock::since_unix_epoch().as_secs()) {
            tracing::warn!(
                heard_seconds_ago = heard.as_secs(),
                "the API server is away: what was known before is used"
            );
            self.away = now.checked_sub(heard).or(self.away);
            self.due = Some(now);
        }
    }

    /// When callers are told apart no longer, unless the API server is heard; `None`: it is, or they are not already.
    fn stale_at(&self) -> Option<Instant> {
        self.away.filter(|_| !self.stale).map(|since| since + self.config.stale_after)
    }

    fn configuration(&mut self) -> SharedConfig {
        let unix = clock::since_unix_epoch().as_secs();
        let v6 = self.config.sidecar.bind.is_ipv6();
        let now = Instant::now();
        let (mut picture, incomplete) = match (self.tables.is_synced(), self.remembered.former()) {
            (true, _) => {
                let picture = self.tables.picture(unix, v6, &self.numbered);
                self.remembered.know(&picture, now);
                (picture, false)
            }
            (false, Some(former)) => (former.clone(), false),
            (false, None) => (Picture::default(), true),
        };
        if !incomplete {
            self.numbered.clone_from(&picture.numbered);
        }
        self.stale = self.away.is_some_and(|since| since + self.config.stale_after <= now);
        if self.stale {
            picture.accounts.values_mut().for_each(|account| account.sources.clear());
        }
        self.due = picture.changes_unix.map(|at| now + Duration::from_secs(at.saturating_sub(unix).max(1)));
        self.say(&picture);
        let applications = self.applications(&picture);
        self.sweep(&picture, incomplete);
        let upstream = |listen: &IpAddr, numbered: &picture::Numbered| UpstreamConfig {
            service: numbered.service.clone(),
            port: numbered.port,
            protocol: numbered.protocol,
            listen: SocketAddr::new(*listen, numbered.number),
            warm: 0,
        };
        let fronts = self.config.front.iter();
        let upstreams = fronts.flat_map(|ip| picture.numbered.iter().map(move |of| upstream(ip, of)));
        let upstreams = upstreams.collect();
        let metrics = self.metrics.clone();
        self.settle = (now.elapsed() * SETTLE_FACTOR).clamp(SETTLE, LONGEST_SETTLE);
        SharedConfig {
            applications,
            upstreams,
            admin: self.config.admin,
            overlay_ports: Some(self.config.overlay_ports.clone()),
            incomplete,
            register: Some(Register(Arc::new(move |registry| metrics.register(registry)))),
        }
    }

    fn applications(&mut self, picture: &Picture) -> Vec<Application> {
        let known = |account: &Account, _: &mut (watch::Sender<Services>, Provided)| {
            picture.accounts.contains_key(account)
        };
        self.told.retain(known);
        let applications = picture.accounts.iter().map(|(account, AccountPicture { sources, services })| {
            let (told, provided) =
                self.told.entry(account.clone()).or_insert_with(|| Provided::channel(Services::default()));
            told.send_if_modified(|known| {
                let changed = **known != *services;
                if changed {
                    *known = Arc::new(services.clone());
                }
                changed
            });
            let (namespace, name) = account;
            let source = AskedToken {
                session: self.session.clone(),
                account: account.clone(),
                audience: self.config.audience.clone(),
            };
            let sidecar = SidecarConfig {
                name: format!("{namespace}/{name}"),
                state_dir: self.config.state_dir.join(namespace).join(name),
                service_account_token: Some(ServiceAccountToken::Asked {
                    source: Arc::new(source),
                    holder: self.config.holder.clone(),
                }),
                provided: Some(provided.clone()),
                ..self.config.sidecar.clone()
            };
            Application {
                sources: sources.iter().map(|address| IpNet::from(*address)).collect(),
                sidecar,
                fingerprint: String::new(),
                start: if services.is_empty() { Start::WhenCalled } else { Start::Now },
            }
        });
        applications.collect()
    }

    /// For people: what is not as they may expect it, once.
    fn say(&mut self, picture: &Picture) {
        let Picture { accounts, nobodys, contested, too_many, .. } = picture;
        let gauge = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
        self.metrics.accounts.set(gauge(accounts.len()));
        self.metrics.nobodys.set(gauge(*nobodys));
        self.metrics.contested.set(gauge(*contested));
        let said = [
            (
                self.stale,
                "the API server has been away for too long: callers are not told apart any more, since addresses may be others' by now",
            ),
            (
                *nobodys > 0,
                "endpoints of exported services are no pods: nobody can stand for them, and they are left out",
            ),
            (
                *contested > 0,
                "pods of several service accounts have the same address: calls from there are refused",
            ),
            (
                *too_many > 0,
                "a service account's pods serve more exported services than one sidecar may: the last ones are left out",
            ),
        ];
        for (holds, text) in said {
            if !holds {
                self.warned.remove(text);
            } else if self.warned.insert(text) {
                tracing::warn!(nobodys, contested, too_many, "{text}");
            }
        }
    }

    /// Forgets identities of service accounts that are gone.
    fn sweep(&mut self, picture: &Picture, incomplete: bool) {
        let now = Instant::now();
        if incomplete || self.swept.is_some_and(|at| now.saturating_duration_since(at) < SWEEP_EVERY) {
            return;
        }
        self.swept = Some(now);
        let names = |dir: &PathBuf| {
            let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect::<Vec<_>>()
        };
        for namespace in names(&self.config.state_dir) {
            let dir = self.config.state_dir.join(&namespace);
            for name in names(&dir) {
                if picture.accounts.contains_key(&(namespace.clone(), name.clone())) {
                    continue;
                }
                if let Err(error) = std::fs::remove_dir_all(dir.join(&name)) {
                    tracing::warn!(%error, namespace, name, "a service account's state can't be removed");
                }
            }
        }
    }
}

impl Source for KubernetesSource {
    async fn next(&mut self, _: &AtomicBool) -> Result<SharedConfig, String> {
        loop {
            let due = [self.due, self.stale_at()].into_iter().flatten().min();
            let keep = self.remembered.due();
            tokio::select! {
                () = tokio::time::sleep_until(keep.unwrap_or_else(Instant::now)), if keep.is_some() => {
                    self.remembered.write(Instant::now(), clock::since_unix_epoch().as_secs(), self.away.is_none());
                }
                news = self.news.recv() => match news {
                    Some(news) => self.take(news),
                    None => std::future::pending().await,
                },
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    return Ok(self.configuration());
                }
            }
        }
    }
}

impl Metrics {
    fn register(&self, registry: &mut prometheus_client::registry::Registry) {
        let registry = registry.sub_registry_with_prefix("kubernetes");
        registry.register(
            "accounts",
            "Service accounts whose pods call or serve here",
            self.accounts.clone(),
        );
        registry.register("api_reachable", "1 while the API server is heard", self.reachable.clone());
        registry.register("watch_errors", "Watches that broke or could not begin", self.watch_errors.clone());
        registry.register(
            "unidentified_endpoints",
            "Endpoints of exported services that are no pod's, and are not served",
            self.nobodys.clone(),
        );
        registry.register(
            "contested_addresses",
            "Addresses that pods of several service accounts have, and that are nobody's",
            self.contested.clone(),
        );
    }
}
