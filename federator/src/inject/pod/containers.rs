//! The injected containers.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use serde_json::{Value, json};
use tombolo_model::names::ServiceKey;
use tombolo_model::protocol::Protocol;

use super::ports::Ports;
use super::{ALIASES, Given, JOIN_VOLUME, PodError, SIDECAR, STATE_VOLUME};
use crate::inject::wishes::{Capture, Served, Target, Wishes};

/// The image's own (deploy/package/oci.sh): of a sidecar that captures nothing.
const USER: u32 = 65_532;
const STATE: &str = "/var/lib/tombolo";
const JOIN: &str = "/var/run/secrets/tombolo";
const OVERLAY_PORT: u16 = 7442;
const ADMIN_PORT: u16 = 7445;
const CAPTURED: [&str; 2] = ["127.0.0.1:7447", "[::1]:7447"];
const PLAIN: [&str; 2] = ["127.0.0.1:7448", "[::1]:7448"];

/// Services whose upstreams name no address, in the order of their addresses.
pub(super) fn aliased(wishes: &Wishes) -> Vec<&ServiceKey> {
    let without = wishes.upstreams.iter().filter(|upstream| upstream.listen.is_none());
    without.map(|upstream| &upstream.service).collect::<BTreeSet<_>>().into_iter().collect()
}

pub(super) fn alias_address(index: usize) -> String {
    // At most 100 of them.
    let [a, b, c] = ALIASES;
    format!("{a}.{b}.{c}.{}", index + 1)
}

fn mapping(service: &ServiceKey, port: u16, protocol: Protocol, to: &str) -> String {
    let suffix = if protocol == Protocol::Udp { "/udp" } else { "" };
    format!("{service}:{port}{suffix}={to}")
}

/// Arguments of a command.
#[derive(Default)]
struct Args(Vec<String>);

impl Args {
    fn words(mut self, words: &[&str]) -> Self {
        self.0.extend(words.iter().map(|word| (*word).to_owned()));
        self
    }

    fn each(self, flag: &str, values: impl IntoIterator<Item = impl ToString>) -> Self {
        values.into_iter().fold(self, |args, value| args.words(&[flag, &value.to_string()]))
    }
}

fn families<'a>(addresses: &'a [&'a str; 2], given: &Given<'_>) -> impl Iterator<Item = &'a str> {
    addresses.iter().copied().take(if given.ipv6 { 2 } else { 1 })
}

/// Where the application serves a service, by the word of the pod's annotation.
fn target(served: &Served, ports: &Ports) -> Result<u16, PodError> {
    match &served.target {
        Target::Number(number) => Ok(*number),
        Target::Name(name) => ports.by_name(served.protocol, name).ok_or_else(|| {
            let reason = format!(
                "{}={name}: no container has a {} port of that name",
                served.service, served.protocol
            );
            PodError::new("metadata.annotations[tombolo.dev/serve]", reason)
        }),
    }
}

pub(super) fn sidecar(wishes: &Wishes, given: &Given<'_>, ports: &Ports) -> Result<Value, PodError> {
    let (join, token, state) =
        (format!("{JOIN}/join-token"), format!("{JOIN}/token"), format!("{STATE}/sidecar"));
    let mut args = Args::default()
        .words(&[
            "sidecar",
            "--join-token-file",
            &join,
            "--service-account-token",
            &token,
            "--state-dir",
            &state,
        ])
        .each("--log-level", &wishes.log_level)
        .each("--drain", &wishes.drain)
        .each("--virtual-range", given.virtual_ranges.iter());
    for served in &wishes.serve {
        let at = SocketAddr::from(([127, 0, 0, 1], target(served, ports)?)).to_string();
        args = args.each("--service", [mapping(&served.service, served.port, served.protocol, &at)]);
    }
    let aliased = aliased(wishes);
    for upstream in &wishes.upstreams {
        let index = aliased.iter().position(|service| **service == upstream.service).unwrap_or_default();
        let at = upstream.listen.map(|at| at.to_string());
        let at = at.unwrap_or_else(|| format!("{}:{}", alias_address(index), upstream.port));
        args = args.each("--upstream", [mapping(&upstream.service, upstream.port, upstream.protocol, &at)]);
    }
    if let Some(capture) = &wishes.capture {
        args = args.each("--capture-listen", families(&CAPTURED, given));
        if let Some(inbound) = capture.inbound {
            args = args
                .words(&["--inbound", inbound.as_str()])
                .each("--inbound-listen", families(&PLAIN, given));
        }
    }
    let probe = json!({ "path": "/ready", "port": ADMIN_PORT });
    let resources = |of: &crate::inject::settings::Quantities, otherwise| of.over(otherwise).to_value();
    Ok(json!({
        "name": SIDECAR,
        "image": given.settings.image,
        "args": args.0,
        // A container of the pod's life beside the others (KEP-753): started before them, and ended after them.
        "restartPolicy": "Always",
        "env": [
            field("TOMBOLO_NAME", "metadata.name"),
            field("TOMBOLO_POD_IP", "status.podIP"),
            // Kubernetes 1.35 and later copy it from the node; empty before.
            field("TOMBOLO_ZONE", "metadata.labels['topology.kubernetes.io/zone']"),
        ],
        "ports": [
            { "name": "tombolo-mesh", "containerPort": OVERLAY_PORT, "protocol": "UDP" },
            { "name": "tombolo-admin", "containerPort": ADMIN_PORT, "protocol": "TCP" },
        ],
        "resources": {
            "requests": resources(&wishes.requests, &given.settings.requests),
            "limits": resources(&wishes.limits, &given.settings.limits),
        },
        // Why it has ended is in the pod's status, where `kubectl describe pod` shows it.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        // Others start once it has its identity and configuration; two minutes without a federator are another try.
        "startupProbe": { "httpGet": probe, "periodSeconds": 1, "failureThreshold": 120 },
        "readinessProbe": { "httpGet": probe, "periodSeconds": 5, "failureThreshold": 3 },
        "securityContext": if wishes.capture.is_some() { capturing_context() } else { restricted_context() },
        "volumeMounts": [
            { "name": STATE_VOLUME, "mountPath": STATE },
            { "name": JOIN_VOLUME, "mountPath": JOIN, "readOnly": true },
        ],
    }))
}

/// What the Pod Security Standard `restricted` demands.
fn restricted_context() -> Value {
    json!({
        "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] }, "readOnlyRootFilesystem": true,
        "runAsNonRoot": true, "runAsUser": USER, "runAsGroup": USER, "seccompProfile": { "type": "RuntimeDefault" },
    })
}

/// With CAP_NET_RAW, to mark own connections and to answer from addresses that were called. A user other than root would not
/// have it: container runtimes give no ambient capabilities.
fn capturing_context() -> Value {
    json!({
        "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"], "add": ["NET_RAW"] },
        "readOnlyRootFilesystem": true, "runAsNonRoot": false, "runAsUser": 0, "runAsGroup": 0,
        "seccompProfile": { "type": "RuntimeDefault" },
    })
}

fn field(name: &str, path: &str) -> Value {
    json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } })
}

/// Makes the rules, and ends.
pub(super) fn capture(
    wishes: &Wishes,
    capture: &Capture,
    given: &Given<'_>,
    ports: &Ports,
) -> Result<Value, PodError> {
    let mut args = Args::default()
        .words(&["sidecar", "capture", "apply", "--outbound", capture.outbound])
        .each("--virtual-range", given.virtual_ranges.iter())
        .each("--exclude-port", capture.exclude_outbound_ports.iter())
        .each("--exclude-cidr", capture.exclude_outbound_cidrs.iter());
    let mut env = Vec::new();
    if let Some(inbound) = capture.inbound {
        let mut own = ports.tcp.clone();
        for served in wishes.serve.iter().filter(|served| served.protocol == Protocol::Tcp) {
            own.insert(target(served, ports)?);
        }
        own.retain(|port| !capture.exclude_inbound_ports.contains(port) && *port != ADMIN_PORT);
        if own.is_empty() {
            let reason =
                format!("{:?}: no container declares a TCP port that it would be about", inbound.as_str());
            return Err(PodError::new("metadata.annotations[tombolo.dev/inbound]", reason));
        }
        let scraped = ports.scraped.filter(|port| own.contains(port));
        args = args
            .words(&["--inbound", inbound.as_str()])
            .each("--inbound-port", own.iter())
            .each("--inbound-allow", capture.inbound_allow.iter())
            .each("--inbound-allow", scraped.map(|port| format!("={port}")));
        // Whose probes come from there.
        env.push(field("TOMBOLO_HOST_IPS", "status.hostIPs"));
    } else if capture.outbound == "none" {
        return Err(PodError::new(
            "metadata.annotations[tombolo.dev/outbound]",
            "\"none\" without tombolo.dev/inbound captures nothing: set tombolo.dev/capture to disabled instead",
        ));
    }
    Ok(json!({
        "name": super::CAPTURE,
        "image": given.settings.capture_image,
        "args": args.0,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "env": env,
        "resources": {
            "requests": given.settings.requests.to_value(), "limits": given.settings.limits.to_value(),
        },
        "securityContext": {
            "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"], "add": ["NET_ADMIN"] },
            "readOnlyRootFilesystem": true, "runAsNonRoot": false, "runAsUser": 0, "runAsGroup": 0,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
    }))
}
