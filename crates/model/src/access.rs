//! Who may open a stream to a service: `AccessPolicy`, decided (pure).
//!
//! A DENY that matches wins. Where any ALLOW selects the service and port, only what some ALLOW matches is admitted.
//! Without a policy, whoever the export admits may call. A dry run decides nothing; it is told what it would deny if
//! every dry run were enforced. The order of policies does not matter, also not for which of them is named: the first by
//! name, then by rule.
//!
//! An identity of a foreign trust domain is trusted only for what a policy names it for: it needs an ALLOW whose
//! `identities` include it, and no export, rule for everyone, or cluster's name or property admits it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::names::{ClusterName, Namespace, ServiceKey, ServiceName};
use crate::resource::FieldError;
use crate::resource::access_policy::{AccessPolicySpec, Rule, Source};

mod read;
#[cfg(test)]
mod tests;

/// Stands for the policy's name where none decided: a metric label that no policy can have.
pub const NO_POLICY: &str = "-";

/// What a policy does with what its rules match.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    Allow,
    Deny,
}

/// A policy, read once.
#[derive(Clone, PartialEq, Debug)]
pub struct Policy {
    name: Arc<str>,
    namespace: Namespace,
    /// `None`: every service of the namespace.
    services: Option<BTreeSet<ServiceName>>,
    /// `None`: every port.
    ports: Option<BTreeSet<u16>>,
    action: Action,
    dry_run: bool,
    rules: Vec<Callers>,
}

/// Whom one rule matches.
#[derive(Clone, PartialEq, Debug)]
enum Callers {
    Everyone,
    AnyOf(Vec<CallersOf>),
}

/// One source: what is `None` matches everybody.
#[derive(Clone, PartialEq, Debug, Default)]
struct CallersOf {
    identities: Option<Identities>,
    clusters: Option<BTreeSet<ClusterName>>,
    /// `@self` is among the clusters.
    local: bool,
    namespaces: Option<BTreeSet<Namespace>>,
    properties: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Debug, Default)]
struct Identities {
    exact: BTreeSet<String>,
    /// Each ends in `/`.
    below: Vec<String>,
}

/// An authenticated caller.
#[derive(Clone, Copy, Debug)]
pub struct Caller<'a> {
    identity: &'a str,
    /// `None`: of a foreign trust domain, which has no clusters here.
    cluster: Option<&'a ClusterName>,
    namespace: Option<&'a str>,
    local: bool,
    properties: Option<&'a BTreeMap<String, String>>,
}

impl<'a> Caller<'a> {
    /// `cluster`: as the issuer of its certificate is bound to; `own`: the cluster that decides; `properties`: what is
    /// known of the caller's cluster.
    pub fn new(
        spiffe_id: &'a str,
        cluster: &'a ClusterName,
        own: &ClusterName,
        properties: Option<&'a BTreeMap<String, String>>,
    ) -> Self {
        let namespace = namespace_of(spiffe_id);
        Self { identity: spiffe_id, cluster: Some(cluster), namespace, local: cluster == own, properties }
    }

    /// Of a foreign trust domain: nothing but its name counts, whatever that looks like.
    pub fn foreign(spiffe_id: &'a str) -> Self {
        Self { identity: spiffe_id, cluster: None, namespace: None, local: false, properties: None }
    }
}

/// The `shop` of `spiffe://<td>/cluster/<c>/ns/shop/sa/cart`; machines and infrastructure have none.
fn namespace_of(spiffe_id: &str) -> Option<&str> {
    let mut segments = spiffe_id.strip_prefix("spiffe://")?.split('/').skip(1);
    let path = [segments.next()?, segments.next()?, segments.next()?];
    let namespace = segments.next()?;
    let account = (segments.next()?, segments.next()?);
    let workload = path[0] == "cluster" && path[2] == "ns" && account.0 == "sa" && segments.next().is_none();
    workload.then_some(namespace)
}

/// What was decided about one stream, and by which policy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verdict {
    pub allowed: bool,
    pub decided_by: DecidedBy,
    /// Dry runs that would deny this admitted stream, by name.
    pub dry_run_denials: Vec<Arc<str>>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DecidedBy {
    /// No policy selects the service and port: the export admits.
    Export,
    /// This rule matches.
    Rule { policy: Arc<str>, index: usize },
    /// ALLOW policies select the service and port (this is the first by name), and none of their rules matches.
    NoRule { policy: Arc<str> },
    /// The caller is of a foreign trust domain, and no policy selects the service and port.
    Foreign,
}

impl DecidedBy {
    /// `namespace/name`, or [`NO_POLICY`].
    pub fn policy(&self) -> &str {
        match self {
            Self::Export | Self::Foreign => NO_POLICY,
            Self::Rule { policy, .. } | Self::NoRule { policy } => policy,
        }
    }
}

impl std::fmt::Display for DecidedBy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Export => f.write_str("the export"),
            Self::Rule { policy, index } => write!(f, "{policy} rules[{index}]"),
            Self::NoRule { policy } => write!(f, "{policy}: no rule matches"),
            Self::Foreign => f.write_str("no policy names this foreign identity"),
        }
    }
}

/// Whether a caller may open a stream to a port of a service.
pub fn decide<'a>(
    policies: impl IntoIterator<Item = &'a Policy>,
    caller: &Caller<'_>,
    service: &ServiceKey,
    port: u16,
) -> Verdict {
    let (mut denied, mut allowed, mut unmatched) = (None, None, None);
    let (mut would_deny, mut would_not_allow, mut would_allow) = (Vec::new(), Vec::new(), false);
    for policy in policies.into_iter().filter(|policy| policy.selects(service, port)) {
        let name = &policy.name;
        match (policy.action, policy.dry_run, policy.first_match(caller)) {
            (Action::Deny, false, Some(index)) => first(&mut denied, (name, index)),
            (Action::Allow, false, Some(index)) => first(&mut allowed, (name, index)),
            (Action::Allow, false, None) => first(&mut unmatched, (name, 0)),
            (Action::Deny, true, Some(_)) => would_deny.push(Arc::clone(name)),
            (Action::Allow, true, Some(_)) => would_allow = true,
            (Action::Allow, true, None) => would_not_allow.push(Arc::clone(name)),
            (Action::Deny, _, None) => {}
        }
    }
    // Dry runs count as one plan: several ALLOWs that admit a caller each must not report each other's.
    if allowed.is_none() && !would_allow {
        would_deny.append(&mut would_not_allow);
    }
    let rule = |(policy, index): (&Arc<str>, usize)| DecidedBy::Rule { policy: Arc::clone(policy), index };
    let (allowed, decided_by) = match (denied, allowed, unmatched) {
        (Some(by), _, _) => (false, rule(by)),
        (None, Some(by), _) => (true, rule(by)),
        (None, None, Some((policy, _))) => (false, DecidedBy::NoRule { policy: Arc::clone(policy) }),
        (None, None, None) if caller.cluster.is_none() => (false, DecidedBy::Foreign),
        (None, None, None) => (true, DecidedBy::Export),
    };
    let mut dry_run_denials = if allowed { would_deny } else { Vec::new() };
    dry_run_denials.sort_unstable();
    Verdict { allowed, decided_by, dry_run_denials }
}

/// Whether these policies of a service admit a foreign identity on any port of it.
pub fn admits_foreign(policies: &[impl AsRef<Policy>], identity: &str, service: &ServiceKey) -> bool {
    let policies = || policies.iter().map(AsRef::as_ref);
    let caller = Caller::foreign(identity);
    // Every port that some policy tells apart, and one that stands for the others.
    let named = policies().flat_map(|policy| policy.ports.iter().flatten().copied());
    named.chain([0]).any(|port| decide(policies(), &caller, service, port).allowed)
}

/// Keeps the first by name, then by rule.
fn first<'a>(kept: &mut Option<(&'a Arc<str>, usize)>, found: (&'a Arc<str>, usize)) {
    if kept.is_none_or(|kept| found < kept) {
        *kept = Some(found);
    }
}

impl Policy {
    /// `namespace/name`.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }
    pub fn action(&self) -> Action {
        self.action
    }
    pub fn is_dry_run(&self) -> bool {
        self.dry_run
    }

    /// Whether it has a say about a service, on any port.
    pub fn targets(&self, service: &ServiceKey) -> bool {
        self.namespace == service.namespace
            && self.services.as_ref().is_none_or(|services| services.contains(&service.name))
    }

    fn selects(&self, service: &ServiceKey, port: u16) -> bool {
        self.targets(service) && self.ports.as_ref().is_none_or(|ports| ports.contains(&port))
    }

    fn first_match(&self, caller: &Caller<'_>) -> Option<usize> {
        self.rules.iter().position(|callers| match callers {
            // "Everyone" is everyone of this trust domain, unless it is about who is refused.
            Callers::Everyone => caller.cluster.is_some() || self.action == Action::Deny,
            Callers::AnyOf(sources) => sources.iter().any(|source| source.include(caller)),
        })
    }

    /// Stands for a policy that can't be read (written for a later version, say): until it can be, nobody is admitted to
    /// a service that it was sent for. Failing open would turn an upgrade into an open door.
    pub fn unreadable(name: &str, service: &ServiceKey) -> Self {
        Self {
            name: name.into(),
            namespace: service.namespace.clone(),
            services: Some([service.name.clone()].into()),
            ports: None,
            action: Action::Deny,
            dry_run: false,
            rules: vec![Callers::Everyone],
        }
    }

    /// Reads a policy, reporting each field that can't be used. The result counts only if there was none.
    pub fn read(
        name: &str,
        namespace: &Namespace,
        spec: &AccessPolicySpec,
        errors: &mut Vec<FieldError>,
    ) -> Self {
        let AccessPolicySpec { target_refs, ports, action, rules, dry_run } = spec;
        read::size(spec, errors);
        let action = read::action(action, errors);
        if action == Action::Deny && rules.is_empty() {
            let accepted = "at least one rule; `rules: [{}]` denies everyone";
            errors.push(FieldError::missing("spec.rules", accepted));
        }
        read::at_most(read::MAX_RULES, "spec.rules", rules, errors);
        let rules = rules.iter().enumerate();
        Self {
            name: name.into(),
            namespace: namespace.clone(),
            services: target_refs.as_ref().map(|targets| read::targets(targets, errors)),
            ports: ports.as_ref().map(|ports| read::ports(ports, errors)),
            action,
            dry_run: *dry_run,
            rules: rules
                .map(|(index, rule)| Callers::read(&format!("spec.rules[{index}]"), rule, errors))
                .collect(),
        }
    }
}

impl Callers {
    fn read(path: &str, rule: &Rule, errors: &mut Vec<FieldError>) -> Self {
        let Rule { from, requests } = rule;
        if requests.is_some() {
            errors.push(FieldError {
                path: format!("{path}.requests"),
                message: "is not supported yet: streams are authorised, not single requests; leave it out"
                    .into(),
            });
        }
        let Some(sources) = from else { return Self::Everyone };
        let path = format!("{path}.from");
        if sources.is_empty() {
            errors.push(FieldError::missing(&path, "sources, or leave it out for every caller"));
        }
        read::at_most(read::MAX_SOURCES, &path, sources, errors);
        let read = |(index, source)| CallersOf::read(&format!("{path}[{index}]"), source, errors);
        Self::AnyOf(sources.iter().enumerate().map(read).collect())
    }
}

impl CallersOf {
    fn include(&self, caller: &Caller<'_>) -> bool {
        let Self { identities, clusters, local, namespaces, properties } = self;
        let has = |(key, value): (&String, &String)| {
            caller.properties.is_some_and(|known| known.get(key) == Some(value))
        };
        let Some(cluster) = caller.cluster else {
            return clusters.is_none()
                && namespaces.is_none()
                && properties.is_empty()
                && identities.as_ref().is_some_and(|identities| identities.include(caller.identity));
        };
        identities.as_ref().is_none_or(|identities| identities.include(caller.identity))
            && clusters.as_ref().is_none_or(|named| (*local && caller.local) || named.contains(cluster))
            && namespaces.as_ref().is_none_or(|named| {
                caller.namespace.is_some_and(|namespace| named.iter().any(|n| n.as_str() == namespace))
            })
            && properties.iter().all(has)
    }

    fn read(path: &str, source: &Source, errors: &mut Vec<FieldError>) -> Self {
        let Source { identities, clusters, namespaces, cluster_properties } = source;
        if *source == Source::default() {
            let accepted =
                "identities, clusters, namespaces or clusterProperties; for every caller leave `from` out";
            errors.push(FieldError::missing(path, accepted));
        }
        let mut read = Self::default();
        if let Some(texts) = identities {
            let known = read::list(&format!("{path}.identities"), texts, read::identity, errors);
            let mut identities = Identities::default();
            for pattern in known {
                match pattern {
                    read::Pattern::Exact(id) => drop(identities.exact.insert(id)),
                    read::Pattern::Below(prefix) => identities.below.push(prefix),
                }
            }
            read.identities = Some(identities);
        }
        if let Some(texts) = clusters {
            let known = read::list(&format!("{path}.clusters"), texts, read::cluster, errors);
            read.local = known.iter().any(Option::is_none);
            read.clusters = Some(known.into_iter().flatten().collect());
        }
        if let Some(texts) = namespaces {
            let known = read::list(&format!("{path}.namespaces"), texts, read::namespace, errors);
            read.namespaces = Some(known.into_iter().collect());
        }
        if let Some(wanted) = cluster_properties {
            read::properties(&format!("{path}.clusterProperties"), wanted, errors);
            read.properties.clone_from(wanted);
        }
        read
    }
}

impl Identities {
    fn include(&self, identity: &str) -> bool {
        let below = |prefix: &String| identity.len() > prefix.len() && identity.starts_with(prefix.as_str());
        self.exact.contains(identity) || self.below.iter().any(below)
    }
}
