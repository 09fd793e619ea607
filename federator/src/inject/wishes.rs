//! What a pod and its namespace ask for, read from labels and annotations (pure). What can't be read is refused with the
//! annotation, the value and what would be right: a pod that was started with half of its wishes would fail later, and less
//! clearly.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;

use ipnet::IpNet;
use serde_json::Value;
use tombolo_model::names::ServiceKey;
use tombolo_model::protocol::Protocol;

use super::settings::Quantities;

mod lists;

pub use lists::{Served, Target, Upstream};

/// Label of a namespace (`enabled`), label or annotation of a pod (`"true"`, `"false"`).
pub const INJECT: &str = "tombolo.dev/inject";
/// Label of a namespace, annotation of a pod: `enabled` or `disabled`.
pub const CAPTURE: &str = "tombolo.dev/capture";
/// On every pod that has a sidecar of its own (label).
pub const INJECTED: &str = "tombolo.dev/injected";
/// What the sidecar is told of its cluster; nothing of it is secret (annotation that is written here).
pub const JOIN_TOKEN: &str = "tombolo.dev/join-token";
const ENFORCE: &str = "pod-security.kubernetes.io/enforce";
const PREFIX: &str = "tombolo.dev/";

const SERVE: &str = "tombolo.dev/serve";
const UPSTREAMS: &str = "tombolo.dev/upstreams";
const OUTBOUND: &str = "tombolo.dev/outbound";
const INBOUND: &str = "tombolo.dev/inbound";
const INBOUND_ALLOW: &str = "tombolo.dev/inbound-allow";
const EXCLUDE_INBOUND_PORTS: &str = "tombolo.dev/exclude-inbound-ports";
const EXCLUDE_OUTBOUND_PORTS: &str = "tombolo.dev/exclude-outbound-ports";
const EXCLUDE_OUTBOUND_CIDRS: &str = "tombolo.dev/exclude-outbound-cidrs";
const REQUESTS: &str = "tombolo.dev/requests";
const LIMITS: &str = "tombolo.dev/limits";
const LOG_LEVEL: &str = "tombolo.dev/log-level";
const DRAIN: &str = "tombolo.dev/drain";
/// Annotations and labels of pods in our name that mean something, here or elsewhere.
const KNOWN: [&str; 16] = [
    INJECT,
    CAPTURE,
    INJECTED,
    JOIN_TOKEN,
    SERVE,
    UPSTREAMS,
    OUTBOUND,
    INBOUND,
    INBOUND_ALLOW,
    EXCLUDE_INBOUND_PORTS,
    EXCLUDE_OUTBOUND_PORTS,
    EXCLUDE_OUTBOUND_CIDRS,
    REQUESTS,
    LIMITS,
    LOG_LEVEL,
    DRAIN,
];
/// Of one list: a pod's object has to stay small, and so have rules and listeners.
const MAX_LISTED: usize = 100;

/// What is wrong with a pod's wishes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value:?} {reason}")]
pub struct WishError {
    pub field: String,
    pub value: String,
    pub reason: String,
}

impl WishError {
    fn new(field: &str, value: &str, reason: impl fmt::Display) -> Self {
        let value = value.chars().take(200).collect();
        Self { field: field.to_owned(), value, reason: reason.to_string() }
    }
}

/// Labels of the pod's namespace that matter.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct NamespaceLabels {
    inject: Option<String>,
    capture: Option<String>,
    enforce: Option<String>,
}

impl NamespaceLabels {
    pub fn of(labels: &BTreeMap<String, String>) -> Self {
        let label = |name: &str| labels.get(name).cloned();
        Self { inject: label(INJECT), capture: label(CAPTURE), enforce: label(ENFORCE) }
    }

    /// The level of the Pod Security Standards that is enforced, if it forbids the capabilities that capture needs: `baseline`
    /// allows neither NET_ADMIN nor NET_RAW, no more than `restricted` does.
    fn forbids_capture(&self) -> Option<&str> {
        self.enforce.as_deref().filter(|level| matches!(*level, "baseline" | "restricted"))
    }
}

/// What becomes of plain connections from outside to the pod's ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inbound {
    Strict,
    Permissive,
}

impl Inbound {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Permissive => "permissive",
        }
    }
}

/// Which of the pod's connections go to the sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capture {
    /// As `tombolo sidecar capture apply --outbound` has it.
    pub outbound: &'static str,
    pub inbound: Option<Inbound>,
    /// Sources and ports, as `--inbound-allow` has them.
    pub inbound_allow: Vec<String>,
    pub exclude_inbound_ports: BTreeSet<u16>,
    pub exclude_outbound_ports: BTreeSet<u16>,
    pub exclude_outbound_cidrs: Vec<IpNet>,
}

/// Everything that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wishes {
    pub serve: Vec<Served>,
    pub upstreams: Vec<Upstream>,
    /// `None`: nothing is captured; the pod needs no privilege.
    pub capture: Option<Capture>,
    pub requests: Quantities,
    pub limits: Quantities,
    pub log_level: Option<String>,
    pub drain: Option<String>,
    /// For whoever makes the pod: what is odd, but no reason to refuse it.
    pub warnings: Vec<String>,
}

/// Whether a pod gets a sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    No,
    /// It would, if it could.
    NotPossible(String),
    Yes(Box<Wishes>),
}

/// A pod's texts of one kind (`labels` or `annotations`).
fn texts<'a>(pod: &'a Value, kind: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
    let map = pod.pointer("/metadata").and_then(|metadata| metadata.get(kind)).and_then(Value::as_object);
    map.into_iter().flatten().filter_map(|(key, value)| Some((key.as_str(), value.as_str()?)))
}

fn text<'a>(pod: &'a Value, kind: &'a str, key: &str) -> Option<&'a str> {
    texts(pod, kind).find(|(name, _)| *name == key).map(|(_, value)| value)
}

/// Whether the pod's own label or annotation asks for a sidecar; `None`: it says nothing.
fn asks(pod: &Value) -> Result<Option<bool>, WishError> {
    let mut asked = None;
    for kind in ["labels", "annotations"] {
        let Some(value) = text(pod, kind, INJECT) else { continue };
        let wants = match value {
            "true" | "enabled" => true,
            "false" | "disabled" => false,
            _ => {
                let field = format!("metadata.{kind}[{INJECT}]");
                return Err(WishError::new(&field, value, "is neither \"true\" nor \"false\""));
            }
        };
        // Either of them may keep the sidecar away.
        asked = Some(asked.unwrap_or(true) && wants);
    }
    Ok(asked)
}

/// Reads what a pod in `namespace` asks for.
pub fn wanted(pod: &Value, namespace: &str, labels: &NamespaceLabels) -> Result<Wanted, WishError> {
    let by_namespace = labels.inject.as_deref() == Some("enabled");
    if !asks(pod)?.unwrap_or(by_namespace) {
        return Ok(Wanted::No);
    }
    let not_possible = |why: &str| Ok(Wanted::NotPossible(format!("this pod gets no sidecar: {why}")));
    if pod.pointer("/spec/hostNetwork").and_then(Value::as_bool) == Some(true) {
        return not_possible("with hostNetwork its addresses and ports are its node's");
    }
    if pod.pointer("/spec/os/name").and_then(Value::as_str) == Some("windows") {
        return not_possible("the sidecar runs on Linux");
    }
    let annotation = |key: &str| text(pod, "annotations", key);
    let list = |key: &'static str| lists::List::of(key, annotation(key));
    let mut warnings: Vec<String> = texts(pod, "annotations")
        .map(|(key, _)| key)
        .filter(|key| key.starts_with(PREFIX) && !KNOWN.contains(key))
        .take(10)
        .map(|key| format!("annotation {key:?} means nothing to tombolo: is it misspelt?"))
        .collect();
    let captured = captured(annotation(CAPTURE), labels, &mut warnings)?;
    let only_captured = [
        OUTBOUND,
        INBOUND,
        INBOUND_ALLOW,
        EXCLUDE_INBOUND_PORTS,
        EXCLUDE_OUTBOUND_PORTS,
        EXCLUDE_OUTBOUND_CIDRS,
    ];
    let capture = if captured {
        Some(Capture {
            outbound: match annotation(OUTBOUND).unwrap_or("all") {
                "all" => "all",
                "services" => "services",
                "none" => "none",
                other => return Err(annotation_error(OUTBOUND, other, "is not all, services or none")),
            },
            inbound: match annotation(INBOUND) {
                None | Some("off") => None,
                Some("strict") => Some(Inbound::Strict),
                Some("permissive") => Some(Inbound::Permissive),
                Some(other) => {
                    return Err(annotation_error(INBOUND, other, "is not strict, permissive or off"));
                }
            },
            inbound_allow: list(INBOUND_ALLOW).sources()?,
            exclude_inbound_ports: list(EXCLUDE_INBOUND_PORTS).ports()?,
            exclude_outbound_ports: list(EXCLUDE_OUTBOUND_PORTS).ports()?,
            exclude_outbound_cidrs: list(EXCLUDE_OUTBOUND_CIDRS).cidrs()?,
        })
    } else {
        // Somebody who counts on strict must not get a pod without it.
        if let Some(value) = annotation(INBOUND).filter(|value| *value != "off") {
            let remedy = format!(
                "needs captured connections: set {CAPTURE} to enabled, in a namespace that lets pods have NET_ADMIN"
            );
            return Err(annotation_error(INBOUND, value, remedy));
        }
        let unused = only_captured.into_iter().filter(|key| *key != INBOUND && annotation(key).is_some());
        warnings.extend(
            unused.map(|key| format!("annotation {key:?} means nothing without captured connections")),
        );
        None
    };
    let upstreams = list(UPSTREAMS).upstreams()?;
    warnings.extend(in_the_way(pod, &upstreams));
    let amounts = |key: &'static str| {
        let value = annotation(key).unwrap_or_default();
        value
            .parse::<Quantities>()
            .map_err(|error| annotation_error(key, value, format!("is not understood: {error}")))
    };
    Ok(Wanted::Yes(Box::new(Wishes {
        serve: list(SERVE).served(namespace)?,
        upstreams,
        capture,
        requests: amounts(REQUESTS)?,
        limits: amounts(LIMITS)?,
        log_level: annotation(LOG_LEVEL).map(log_level).transpose()?,
        drain: annotation(DRAIN).map(drain).transpose()?,
        warnings,
    })))
}

/// Upstreams at ports that the pod's own containers declare: the sidecar listens there first, on a loopback address, and the
/// kernel refuses whoever wants the port on all addresses after it.
fn in_the_way<'a>(pod: &'a Value, upstreams: &'a [Upstream]) -> impl Iterator<Item = String> + 'a {
    let containers = pod.pointer("/spec/containers").and_then(Value::as_array).into_iter().flatten();
    let ports = containers.flat_map(|of| of.get("ports").and_then(Value::as_array).into_iter().flatten());
    let declared: BTreeSet<(u64, Protocol)> = ports
        .filter_map(|port| {
            let protocol = port.get("protocol").and_then(Value::as_str).unwrap_or_default();
            Some((port.get("containerPort")?.as_u64()?, Protocol::parse(protocol)?))
        })
        .collect();
    upstreams.iter().filter_map(move |upstream| {
        let at = upstream.listen.map_or(upstream.port, |at| at.port());
        let Upstream { service, port, protocol, .. } = upstream;
        declared.contains(&(at.into(), *protocol)).then(|| {
            format!(
                "{UPSTREAMS}: the sidecar listens at {protocol} port {at} for {service}:{port}, and a container declares that port: it can't listen there on 0.0.0.0; choose another, such as {service}:{port}=127.0.0.1:{}",
                if at < 50_000 { at.saturating_add(10_000) } else { at.saturating_sub(10_000) }
            )
        })
    })
}

fn annotation_error(key: &str, value: &str, reason: impl fmt::Display) -> WishError {
    WishError::new(&format!("metadata.annotations[{key}]"), value, reason)
}

/// Whether connections are captured: as the pod says, else as its namespace says, else where the namespace's level lets it.
fn captured(
    annotation: Option<&str>,
    labels: &NamespaceLabels,
    warnings: &mut Vec<String>,
) -> Result<bool, WishError> {
    let read = |field: String, value: &str| match value {
        "enabled" | "true" => Ok(true),
        "disabled" | "false" => Ok(false),
        _ => Err(WishError::new(&field, value, "is neither enabled nor disabled")),
    };
    let asked = match (annotation, &labels.capture) {
        (Some(value), _) => Some(read(format!("metadata.annotations[{CAPTURE}]"), value)?),
        (None, Some(value)) => Some(read(format!("label {CAPTURE} of the namespace"), value)?),
        (None, None) => None,
    };
    let forbidden = labels.forbids_capture();
    if let (Some(true), Some(level)) = (asked, forbidden) {
        warnings.push(format!(
            "{CAPTURE} is enabled, and the namespace enforces {level}, which allows no NET_ADMIN: the pod is refused unless it is exempt"
        ));
    }
    Ok(asked.unwrap_or(forbidden.is_none()))
}

fn log_level(value: &str) -> Result<String, WishError> {
    let known = |c: char| c.is_ascii_alphanumeric() || "_-=,:".contains(c);
    if value.is_empty() || value.len() > 200 || !value.chars().all(known) {
        return Err(annotation_error(
            LOG_LEVEL,
            value,
            "is neither a level (info, debug) nor target=level,...",
        ));
    }
    Ok(value.to_owned())
}

/// A duration as the sidecar reads it.
fn drain(value: &str) -> Result<String, WishError> {
    let number: String = value.chars().take_while(char::is_ascii_digit).collect();
    let unit = value.get(number.len()..).unwrap_or_default();
    if number.is_empty() || number.len() > 6 || !matches!(unit, "ms" | "s" | "m") {
        return Err(annotation_error(DRAIN, value, "is no duration: write it as 10s or 500ms"));
    }
    Ok(value.to_owned())
}

#[cfg(test)]
mod tests;
