//! What a pod becomes (pure): the sidecar as a native sidecar container (`restartPolicy: Always` among the init containers), its
//! token and state as volumes, and, where connections are captured, an init container that makes the rules.
//!
//! Done again it changes nothing: parts of ours are found by their names, left as they are where they hold all that is
//! wanted (API servers fill in defaults, and other webhooks add to them), and replaced otherwise. Without capture the pod
//! meets the Pod Security Standard `restricted`; with it, `privileged`.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::settings::InjectSettings;
use super::wishes::{INJECTED, JOIN_TOKEN, Wishes};

mod containers;
mod ports;

pub const SIDECAR: &str = "tombolo-sidecar";
pub const CAPTURE: &str = "tombolo-capture";
const STATE_VOLUME: &str = "tombolo-state";
const JOIN_VOLUME: &str = "tombolo-join";
/// First address of upstreams that name none; nobody else's by chance.
pub(super) const ALIASES: [u8; 3] = [127, 116, 98];
/// Kubernetes takes no shorter life; the kubelet replaces the token long before its end.
const TOKEN_SECONDS: u32 = 3600;
/// Key, certificates, last configuration and names are a few megabytes at most.
const STATE_BYTES: &str = "64Mi";
/// Ports below it need a privilege, or the sysctl that is set for them.
const UNPRIVILEGED: u16 = 1024;
const PORT_SYSCTL: &str = "net.ipv4.ip_unprivileged_port_start";

/// What every pod of the cluster is given.
#[derive(Clone, Debug)]
pub struct Given<'a> {
    pub settings: &'a InjectSettings,
    /// What `tombolo token pods` prints.
    pub join_token: String,
    /// Of the projected service account token.
    pub audience: String,
    /// Where virtual addresses lie.
    pub virtual_ranges: Vec<String>,
    /// Whether pods are captured over IPv6, too.
    pub ipv6: bool,
}

/// Why a pod can't get a sidecar as it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct PodError {
    field: String,
    reason: String,
}

impl PodError {
    fn new(field: &str, reason: impl Into<String>) -> Self {
        Self { field: field.to_owned(), reason: reason.into() }
    }
}

/// The pod with its sidecar.
pub fn inject(pod: &Value, wishes: &Wishes, given: &Given<'_>) -> Result<Value, PodError> {
    let ports = ports::Ports::of(pod)?;
    let sidecar = containers::sidecar(wishes, given, &ports)?;
    let capture = wishes
        .capture
        .as_ref()
        .map(|capture| containers::capture(wishes, capture, given, &ports))
        .transpose()?;
    let mut pod = pod.clone();
    let metadata = object(&mut pod, "metadata")?;
    object_in(metadata, "metadata", "labels")?.insert(INJECTED.to_owned(), "true".into());
    object_in(metadata, "metadata", "annotations")?
        .insert(JOIN_TOKEN.to_owned(), given.join_token.as_str().into());
    let spec = object(&mut pod, "spec")?;
    if let Some(name) = named(spec.get("containers")).find(|name| [SIDECAR, CAPTURE].contains(name)) {
        return Err(PodError::new(
            "spec.containers",
            format!("{name:?} is the name of the injected container: choose another"),
        ));
    }
    let wanted = capture.into_iter().chain([sidecar]);
    replace(list(spec, "initContainers")?, &[CAPTURE, SIDECAR], wanted.collect(), true);
    replace(list(spec, "volumes")?, &[STATE_VOLUME, JOIN_VOLUME], volumes(given), false);
    aliases(spec, wishes)?;
    if wishes
        .upstreams
        .iter()
        .any(|upstream| upstream.listen.map_or(upstream.port, |at| at.port()) < UNPRIVILEGED)
    {
        let context = object_in(spec, "spec", "securityContext")?;
        let sysctls = list(context, "sysctls")?;
        // One that the pod sets itself is its own business.
        if !named(Some(&Value::Array(sysctls.clone()))).any(|name| name == PORT_SYSCTL) {
            sysctls.push(json!({ "name": PORT_SYSCTL, "value": "0" }));
        }
    }
    Ok(pod)
}

/// A JSON patch (RFC 6902) that makes `after` of `before`: whole fields of metadata and spec.
pub fn patch(before: &Value, after: &Value) -> Vec<Value> {
    let none = Map::new();
    let mut operations = Vec::new();
    for part in ["metadata", "spec"] {
        let fields =
            |of: &Value| of.get(part).and_then(Value::as_object).cloned().unwrap_or_else(|| none.clone());
        let (then, now) = (fields(before), fields(after));
        let names: BTreeSet<&String> = then.keys().chain(now.keys()).collect();
        for name in names {
            // RFC 6901 section 3.
            let path = format!("/{part}/{}", name.replace('~', "~0").replace('/', "~1"));
            match (then.get(name), now.get(name)) {
                (before, Some(value)) if before != Some(value) => {
                    operations.push(json!({ "op": "add", "path": path, "value": value }));
                }
                (Some(_), None) => operations.push(json!({ "op": "remove", "path": path })),
                _ => {}
            }
        }
    }
    operations
}

fn object<'a>(of: &'a mut Value, field: &str) -> Result<&'a mut Map<String, Value>, PodError> {
    let found = of.get_mut(field).and_then(Value::as_object_mut);
    found.ok_or_else(|| PodError::new(field, "is missing, or is no object"))
}

/// A field that is made where it is missing.
fn object_in<'a>(
    of: &'a mut Map<String, Value>,
    parent: &str,
    field: &str,
) -> Result<&'a mut Map<String, Value>, PodError> {
    let value = of.entry(field).or_insert(Value::Null);
    if value.is_null() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().ok_or_else(|| PodError::new(&format!("{parent}.{field}"), "is no object"))
}

fn list<'a>(of: &'a mut Map<String, Value>, field: &str) -> Result<&'a mut Vec<Value>, PodError> {
    let value = of.entry(field).or_insert(Value::Null);
    if value.is_null() {
        *value = Value::Array(Vec::new());
    }
    value.as_array_mut().ok_or_else(|| PodError::new(&format!("spec.{field}"), "is no list"))
}

fn name_of(value: &Value) -> Option<&str> {
    value.get("name").and_then(Value::as_str)
}

fn named(list: Option<&Value>) -> impl Iterator<Item = &str> {
    list.and_then(Value::as_array).into_iter().flatten().filter_map(name_of)
}

/// Puts `wanted` among `entries`, instead of those of ours that were there; `first`: before all others.
fn replace(entries: &mut Vec<Value>, ours: &[&str], wanted: Vec<Value>, first: bool) {
    let is_ours = |entry: &Value| name_of(entry).is_some_and(|name| ours.contains(&name));
    let (known, others): (Vec<Value>, Vec<Value>) = std::mem::take(entries).into_iter().partition(is_ours);
    let kept = wanted.into_iter().map(|wanted| {
        let same = known.iter().find(|known| name_of(known) == name_of(&wanted) && holds(known, &wanted));
        same.cloned().unwrap_or(wanted)
    });
    *entries =
        if first { kept.chain(others).collect() } else { others.iter().cloned().chain(kept).collect() };
}

/// Whether `known` has everything that `wanted` has. Objects in lists may have others beside them, texts may not: those of a
/// command would change it.
fn holds(known: &Value, wanted: &Value) -> bool {
    match (known, wanted) {
        (Value::Object(known), Value::Object(wanted)) => {
            wanted.iter().all(|(key, value)| known.get(key).is_some_and(|known| holds(known, value)))
        }
        (Value::Array(known), Value::Array(wanted))
            if wanted.iter().all(Value::is_object) && !wanted.is_empty() =>
        {
            wanted.iter().all(|wanted| known.iter().any(|known| holds(known, wanted)))
        }
        (known, wanted) => known == wanted,
    }
}

fn volumes(given: &Given<'_>) -> Vec<Value> {
    vec![
        // In memory: a node's disk holds no key.
        json!({ "name": STATE_VOLUME, "emptyDir": { "medium": "Memory", "sizeLimit": STATE_BYTES } }),
        json!({ "name": JOIN_VOLUME, "projected": { "sources": [
            { "serviceAccountToken": { "path": "token", "audience": given.audience, "expirationSeconds": TOKEN_SECONDS } },
            { "downwardAPI": { "items": [
                { "path": "join-token", "fieldRef": { "fieldPath": format!("metadata.annotations['{JOIN_TOKEN}']") } },
            ] } },
        ] } }),
    ]
}

/// Upstreams that name no address get one each, and their names resolve to it inside the pod.
fn aliases(spec: &mut Map<String, Value>, wishes: &Wishes) -> Result<(), PodError> {
    let alias = |(address, service): (String, &tombolo_model::names::ServiceKey)| {
        let name = format!("{}.{}.svc.clusterset.local", service.name, service.namespace);
        json!({ "ip": address, "hostnames": [name] })
    };
    let ours = format!("{}.{}.{}.", ALIASES[0], ALIASES[1], ALIASES[2]);
    let wanted: Vec<Value> = containers::aliased(wishes)
        .into_iter()
        .enumerate()
        .map(|(index, service)| alias((containers::alias_address(index), service)))
        .collect();
    if wanted.is_empty() && spec.get("hostAliases").is_none() {
        return Ok(());
    }
    let entries = list(spec, "hostAliases")?;
    entries.retain(|entry| !entry.get("ip").and_then(Value::as_str).is_some_and(|ip| ip.starts_with(&ours)));
    entries.extend(wanted);
    Ok(())
}

#[cfg(test)]
mod tests;
