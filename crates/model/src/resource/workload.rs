//! `Workload` (tombolo.dev): what a sidecar serves and calls, outside Kubernetes and on VMs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::duration::DurationText;
use super::fields::FieldError;
use super::schema::{LABEL, SERVICE_KEY};
use crate::names::{Namespace, ServiceKey, ServiceName};
use crate::protocol::Protocol;

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [
    { "rule": "!(has(self.sidecar) && has(self.via))", "message": "give either sidecar or via", "fieldPath": ".via" },
    { "rule": "has(self.via) || !has(self.services) || self.services.all(s, !has(s.backends) || size(s.backends) == 0)",
      "message": "give via: the sidecar that stands in front of the backends", "fieldPath": ".services" },
]))]
pub struct WorkloadSpec {
    /// The joined sidecar or VM that serves it; the object's name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sidecar: Option<String>,
    /// The same for services whose backends have no sidecar: the one that stands in front of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    pub services: Vec<WorkloadService>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    pub upstreams: Vec<WorkloadUpstream>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [
    { "rule": "!has(self.backends) || size(self.backends) == 0 || (size(self.ports) == 1 && self.ports.all(p, !has(p.targetPort) && !has(p.targetHost) && (!has(p.protocol) || p.protocol == 'TCP')))",
      "message": "a service with backends has one TCP port without targetPort and targetHost: where its backends listen is in their addresses",
      "fieldPath": ".ports" },
    { "rule": "!has(self.backends) || size(self.backends) == 0 || !has(self.healthCheck) || !has(self.healthCheck.command)",
      "message": "give tcp or http: a command can't tell backends apart", "fieldPath": ".healthCheck" },
]))]
pub struct WorkloadService {
    #[schemars(length(max = 63), regex(pattern = LABEL))]
    pub name: String,
    #[schemars(length(min = 1, max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["port", "protocol"]))]
    pub ports: Vec<WorkloadPort>,
    /// Addresses or names without a sidecar, which `via` stands in front of; the service has one port then.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub backends: Vec<WorkloadBackend>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    /// Share of traffic within the cluster, relative to others; 100 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub weight: Option<u32>,
}

/// A backend without a sidecar.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkloadBackend {
    /// `HOST:PORT`, a DNS name or an IP address.
    #[schemars(length(max = 261), regex(pattern = r"^.+:[1-9][0-9]{0,4}$"))]
    pub address: String,
    /// Share of connections, relative to the other backends; 100 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1000))]
    pub weight: Option<u32>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkloadPort {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// As callers name it.
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
    /// Where the application listens; `port` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub target_port: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_host: Option<String>,
    /// `TCP` or `UDP`; TCP when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["TCP", "UDP"], "x-tombolo-default" = "TCP"))]
    pub protocol: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_protocol: Option<String>,
}

/// How the sidecar tells whether the application lives.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [
    { "rule": "[has(self.tcp), has(self.http), has(self.command)].filter(given, given).size() == 1",
      "message": "give one of tcp, http and command" },
]))]
pub struct HealthCheck {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<TcpCheck>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpCheck>,
    /// A program of the machine that ends with 0 while the application is healthy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<CommandCheck>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<DurationText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<DurationText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthy_threshold: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unhealthy_threshold: Option<u32>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TcpCheck {
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpCheck {
    pub path: String,
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
    /// 200 to 399 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_status: Option<u16>,
}

/// Exactly one of the two.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [
    { "rule": "(has(self.exec) && size(self.exec) > 0) != has(self.shell)",
      "message": "give either exec (a program and its arguments) or shell (a line)" },
    { "rule": "!has(self.exec) || size(self.exec) == 0 || self.exec[0].startsWith('/')",
      "message": "give the program's absolute path first, such as /usr/bin/pg_isready", "fieldPath": ".exec" },
]))]
pub struct CommandCheck {
    /// A program by its absolute path, and its arguments; no shell is involved.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 4096)))]
    pub exec: Vec<String>,
    /// A line for `/bin/sh -c`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096), regex(pattern = r"\S"))]
    pub shell: Option<String>,
}

impl CommandCheck {
    /// The program and its arguments; an error says what would be right.
    pub fn command(&self) -> Result<Vec<String>, &'static str> {
        match (self.exec.as_slice(), self.shell.as_deref()) {
            ([], Some(line)) if !line.trim().is_empty() => {
                Ok(["/bin/sh", "-c", line].map(str::to_owned).to_vec())
            }
            ([program, ..], None) if program.starts_with('/') => Ok(self.exec.clone()),
            ([_, ..], None) => Err("the program's absolute path first, such as /usr/bin/pg_isready"),
            _ => Err("either exec (a program and its arguments) or shell (a line)"),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [
    { "rule": "isIP(self.listen.substring(0, self.listen.lastIndexOf(':')).replace('[', '').replace(']', '')) && int(self.listen.substring(self.listen.lastIndexOf(':') + 1)) <= 65535",
      "message": "give ip:port", "fieldPath": ".listen" },
]))]
pub struct WorkloadUpstream {
    /// `name` (in the workload's namespace) or `namespace/name`.
    #[schemars(length(max = 127), regex(pattern = SERVICE_KEY))]
    pub service: String,
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
    /// `TCP` or `UDP`; TCP when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["TCP", "UDP"]))]
    pub protocol: Option<String>,
    /// `ip:port` that the application connects to.
    #[schemars(length(max = 64), regex(pattern = r"^([0-9.]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}$"))]
    pub listen: String,
    /// Connections kept open without traffic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm: Option<u32>,
}

impl WorkloadPort {
    /// What validation has let through.
    pub fn protocol(&self) -> Protocol {
        self.protocol.as_deref().and_then(Protocol::parse).unwrap_or_default()
    }
}

impl WorkloadUpstream {
    /// What validation has let through.
    pub fn protocol(&self) -> Protocol {
        self.protocol.as_deref().and_then(Protocol::parse).unwrap_or_default()
    }
    /// The service, with the workload's namespace where none is given.
    pub fn key(&self, namespace: &Namespace) -> Option<ServiceKey> {
        if self.service.contains('/') {
            self.service.parse().ok()
        } else {
            self.service.parse().ok().map(|name| ServiceKey::new(namespace.clone(), name))
        }
    }
}

/// Backends of one service.
const MAX_BACKENDS: usize = 32;
pub const MAX_WEIGHT: u32 = 1000;
/// Of a service or backend that names none.
pub const DEFAULT_WEIGHT: u32 = 100;

impl WorkloadSpec {
    /// The sidecar that serves it; `name` is the object's.
    pub fn holder<'a>(&'a self, name: &'a str) -> &'a str {
        self.sidecar.as_deref().or(self.via.as_deref()).unwrap_or(name)
    }

    pub(super) fn validate(&self, errors: &mut Vec<FieldError>) {
        if let (Some(_), Some(via)) = (&self.sidecar, &self.via) {
            errors.push(FieldError::new("spec.via", via, "either sidecar or via"));
        }
        for (index, service) in self.services.iter().enumerate() {
            let path = format!("spec.services[{index}]");
            if !service.backends.is_empty() && self.via.is_none() {
                errors.push(FieldError::missing(
                    "spec.via",
                    "the sidecar that stands in front of the backends",
                ));
            }
            service.validate(&path, errors);
        }
        for (index, upstream) in self.upstreams.iter().enumerate() {
            let path = format!("spec.upstreams[{index}]");
            let key = if upstream.service.contains('/') {
                upstream.service.parse::<ServiceKey>().map(drop)
            } else {
                upstream.service.parse::<ServiceName>().map(drop)
            };
            if let Err(error) = key {
                errors.push(FieldError::new(format!("{path}.service"), &upstream.service, error));
            }
            if upstream.listen.parse::<std::net::SocketAddr>().is_err() {
                errors.push(FieldError::new(format!("{path}.listen"), &upstream.listen, "ip:port"));
            }
            check_protocol(upstream.protocol.as_deref(), &path, errors);
        }
    }
}

impl WorkloadService {
    fn validate(&self, path: &str, errors: &mut Vec<FieldError>) {
        if let Err(error) = self.name.parse::<ServiceName>() {
            errors.push(FieldError::new(format!("{path}.name"), &self.name, error));
        }
        if self.ports.is_empty() {
            errors.push(FieldError::missing(format!("{path}.ports"), "at least one port"));
        }
        for (index, port) in self.ports.iter().enumerate() {
            let path = format!("{path}.ports[{index}]");
            let same = |other: &WorkloadPort| other.port == port.port && other.protocol() == port.protocol();
            if self.ports.iter().take(index).any(same) {
                errors.push(FieldError::new(
                    format!("{path}.port"),
                    port.port,
                    "a port that is not given twice",
                ));
            }
            check_protocol(port.protocol.as_deref(), &path, errors);
        }
        if let Some(weight) = self.weight.filter(|weight| !(1..=MAX_WEIGHT).contains(weight)) {
            let expected = format!("1 to {MAX_WEIGHT}; leave the service out to take it out of rotation");
            errors.push(FieldError::new(format!("{path}.weight"), weight, expected));
        }
        self.validate_backends(path, errors);
        let Some(check) = &self.health_check else { return };
        let path = format!("{path}.healthCheck");
        let kinds = [check.tcp.is_some(), check.http.is_some(), check.command.is_some()];
        if kinds.iter().filter(|given| **given).count() != 1 {
            errors.push(FieldError::missing(&path, "one of tcp, http and command"));
        }
        if let Some(Err(expected)) = check.command.as_ref().map(CommandCheck::command) {
            errors.push(FieldError::missing(format!("{path}.command"), expected));
        }
    }

    fn validate_backends(&self, path: &str, errors: &mut Vec<FieldError>) {
        if self.backends.is_empty() {
            return;
        }
        let udp = |port: &WorkloadPort| port.protocol.as_deref().is_some_and(|protocol| protocol != "TCP");
        let local =
            |port: &WorkloadPort| port.target_port.is_some() || port.target_host.is_some() || udp(port);
        if self.ports.len() != 1 || self.ports.iter().any(local) {
            errors.push(FieldError::missing(
                format!("{path}.ports"),
                "one TCP port without targetPort and targetHost: where its backends listen is in their addresses",
            ));
        }
        if self.backends.len() > MAX_BACKENDS {
            errors.push(FieldError::new(
                format!("{path}.backends"),
                self.backends.len(),
                "at most 32 backends",
            ));
        }
        for (index, backend) in self.backends.iter().enumerate() {
            let path = format!("{path}.backends[{index}]");
            if !backend.address.rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
            }) {
                errors.push(FieldError::new(format!("{path}.address"), &backend.address, "HOST:PORT"));
            }
            if let Some(weight) = backend.weight.filter(|weight| *weight > MAX_WEIGHT) {
                errors.push(FieldError::new(format!("{path}.weight"), weight, "at most 1000"));
            }
        }
        if self.health_check.as_ref().is_some_and(|check| check.command.is_some()) {
            errors.push(FieldError::missing(
                format!("{path}.healthCheck"),
                "tcp or http: a command can't tell backends apart",
            ));
        }
    }
}

fn check_protocol(protocol: Option<&str>, path: &str, errors: &mut Vec<FieldError>) {
    if let Some(protocol) = protocol
        && (protocol.is_empty() || Protocol::parse(protocol).is_none())
    {
        errors.push(FieldError::new(format!("{path}.protocol"), protocol, "TCP or UDP"));
    }
}

#[cfg(test)]
mod tests;
