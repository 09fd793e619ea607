//! What a shared sidecar is told: applications with the addresses that they call from, and where they call.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;

use ipnet::IpNet;
use prometheus_client::registry::Registry;

use crate::config::{ConfigError, SidecarConfig, UpstreamConfig};

/// An overlay socket and a lease each.
pub const MAX_APPLICATIONS: usize = 1000;
/// Of one application.
pub const MAX_SOURCES: usize = 256;

/// An application without a sidecar of its own.
#[derive(Clone, Debug)]
pub struct Application {
    /// Where its connections come from. Empty: it only serves.
    pub sources: Vec<IpNet>,
    /// Its sidecar's settings; those that only a sidecar beside its application can have are refused.
    pub sidecar: SidecarConfig,
    /// Changes when the sidecar has to be started anew.
    pub fingerprint: String,
    pub start: Start,
}

/// When an application's sidecar runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Start {
    #[default]
    Now,
    /// Once it calls, until it has not for long.
    WhenCalled,
}

impl Application {
    pub fn name(&self) -> &str {
        &self.sidecar.name
    }
}

/// Everything that a shared sidecar is told.
#[derive(Clone, Debug)]
pub struct SharedConfig {
    pub applications: Vec<Application>,
    /// Where every application calls these services; whose identity carries a call is told by where it comes from.
    pub upstreams: Vec<UpstreamConfig>,
    pub admin: SocketAddr,
    /// For overlay sockets that are given no port.
    pub overlay_ports: Option<RangeInclusive<u16>>,
    /// More is to come before anybody may be told that all is ready.
    pub incomplete: bool,
    /// Adds the source's own metrics.
    pub register: Option<Register>,
}

/// Adds metrics to those of the shared sidecar.
#[derive(Clone)]
pub struct Register(pub Arc<dyn Fn(&mut Registry) + Send + Sync>);

impl std::fmt::Debug for Register {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Register")
    }
}

/// What is wrong with a setting, and what would be right.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SharedConfigError {
    #[error("no applications: list at least one under `applications`")]
    Nothing,
    #[error("{count} applications, at most {MAX_APPLICATIONS}: run another shared sidecar for the others")]
    TooMany { count: usize },
    #[error("application {application}: {source}")]
    Sidecar { application: String, source: ConfigError },
    #[error(
        "application {application}: `{setting}` is for a sidecar beside its application: leave it out here"
    )]
    OwnOnly { application: String, setting: &'static str },
    #[error("application {application}: {count} sources, at most {MAX_SOURCES}: name a network instead")]
    Sources { application: String, count: usize },
    #[error(
        "application {application} has neither `sources` nor services: it could neither call nor be called"
    )]
    Idle { application: String },
    #[error("applications {first} and {second} have the same {what} ({value}): give each its own")]
    Twice { first: String, second: String, what: &'static str, value: String },
    #[error(
        "sources {first_source} of {first} and {second_source} of {second} overlap: a caller can have one identity only"
    )]
    Overlap { first: String, first_source: IpNet, second: String, second_source: IpNet },
    #[error("upstreams {first} and {second} both listen on {listen}: choose another address for one")]
    ListenTwice { first: String, second: String, listen: SocketAddr },
}

impl SharedConfig {
    /// Checks what can be checked before anything is bound.
    pub fn check(&self) -> Result<(), SharedConfigError> {
        let count = self.applications.len();
        match count {
            0 => return Err(SharedConfigError::Nothing),
            count if count > MAX_APPLICATIONS => return Err(SharedConfigError::TooMany { count }),
            _ => {}
        }
        let mut seen: HashMap<(&'static str, String), &str> = HashMap::new();
        for application in &self.applications {
            application.check()?;
            let (name, sidecar) = (application.name(), &application.sidecar);
            let mut own =
                vec![("name", name.to_owned()), ("stateDir", sidecar.state_dir.display().to_string())];
            if sidecar.bind.port() != 0 {
                own.push(("bind", sidecar.bind.to_string()));
            }
            for (what, value) in own {
                if let Some(first) = seen.insert((what, value.clone()), name) {
                    let (first, second) = (first.to_owned(), name.to_owned());
                    return Err(SharedConfigError::Twice { first, second, what, value });
                }
            }
        }
        let mut sources: Vec<(IpNet, &str)> =
            self.applications.iter().flat_map(Application::named_sources).collect();
        // Networks overlap only by containing one another: then they are neighbours by their first address.
        sources.sort_by_key(|(source, _)| (source.network(), source.prefix_len()));
        for pair in sources.windows(2) {
            if let [(first_source, first), (second_source, second)] = pair
                && first_source.contains(second_source)
                && first != second
            {
                let (first, second) = ((*first).to_owned(), (*second).to_owned());
                let (first_source, second_source) = (*first_source, *second_source);
                return Err(SharedConfigError::Overlap { first, first_source, second, second_source });
            }
        }
        let mut listening = HashMap::new();
        for upstream in &self.upstreams {
            if let Some(first) = listening.insert((upstream.listen, upstream.protocol), &upstream.service) {
                let (first, second) = (first.to_string(), upstream.service.to_string());
                return Err(SharedConfigError::ListenTwice { first, second, listen: upstream.listen });
            }
        }
        Ok(())
    }
}

impl Application {
    fn named_sources(&self) -> impl Iterator<Item = (IpNet, &str)> {
        // Without those that lie in others of its own: what is left does not overlap.
        let sources: Vec<IpNet> = self.sources.iter().map(IpNet::trunc).collect();
        IpNet::aggregate(&sources).into_iter().map(|source| (source, self.name()))
    }

    fn check(&self) -> Result<(), SharedConfigError> {
        let application = || self.name().to_owned();
        let own_only = [
            ("captureListen", self.sidecar.capture.is_some()),
            ("dnsListen", self.sidecar.names.is_some()),
            ("workloadApi", self.sidecar.workload_api.is_some()),
            ("threads", self.sidecar.threads.get() > 1),
        ];
        if let Some((setting, _)) = own_only.into_iter().find(|(_, given)| *given) {
            return Err(SharedConfigError::OwnOnly { application: application(), setting });
        }
        if self.sources.is_empty() && self.sidecar.services.is_empty() && self.sidecar.upstreams.is_empty() {
            return Err(SharedConfigError::Idle { application: application() });
        }
        match self.sources.len() {
            count if count > MAX_SOURCES => {
                return Err(SharedConfigError::Sources { application: application(), count });
            }
            _ => {}
        }
        match self.sidecar.check() {
            // It calls by the front.
            Err(ConfigError::Nothing) | Ok(()) => Ok(()),
            Err(source) => Err(SharedConfigError::Sidecar { application: application(), source }),
        }
    }
}

/// Who calls from where. Networks do not overlap.
#[derive(Clone, Debug, Default)]
pub struct Callers(Vec<(IpNet, String)>);

impl Callers {
    pub fn new(applications: &[Application]) -> Self {
        let named = applications.iter().flat_map(Application::named_sources);
        let mut callers: Vec<_> = named.map(|(source, name)| (source, name.to_owned())).collect();
        callers.sort_by_key(|(source, _)| source.network());
        Self(callers)
    }

    /// The application that calls from an address.
    pub fn of(&self, address: IpAddr) -> Option<&str> {
        let address = address.to_canonical();
        let after = self.0.partition_point(|(source, _)| source.network() <= address);
        let (source, name) = self.0.get(after.checked_sub(1)?)?;
        source.contains(&address).then_some(name.as_str())
    }
}

#[cfg(test)]
mod tests;
