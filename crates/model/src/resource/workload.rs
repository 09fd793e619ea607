//! `Workload` (tombolo.dev): what a sidecar serves and calls, outside Kubernetes and on VMs.

use serde::{Deserialize, Serialize};

use super::duration::DurationText;
use super::fields::FieldError;
use crate::names::{Namespace, ServiceKey, ServiceName};
use crate::protocol::Protocol;

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkloadSpec {
    /// The joined sidecar or VM that serves it; the object's name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sidecar: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<WorkloadService>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub upstreams: Vec<WorkloadUpstream>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkloadService {
    pub name: String,
    pub ports: Vec<WorkloadPort>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    /// Share of traffic within the cluster, relative to others; 100 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkloadPort {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// As callers name it.
    pub port: u16,
    /// Where the application listens; `port` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_port: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_host: Option<String>,
    /// `TCP` or `UDP`; TCP when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_protocol: Option<String>,
}

/// How the sidecar tells whether the application lives.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HealthCheck {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<TcpCheck>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpCheck>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<DurationText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<DurationText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthy_threshold: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unhealthy_threshold: Option<u32>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TcpCheck {
    pub port: u16,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpCheck {
    pub path: String,
    pub port: u16,
    /// 200 to 399 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_status: Option<u16>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkloadUpstream {
    /// `name` (in the workload's namespace) or `namespace/name`.
    pub service: String,
    pub port: u16,
    /// `TCP` or `UDP`; TCP when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// `ip:port` that the application connects to.
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

impl WorkloadSpec {
    pub(super) fn validate(&self, errors: &mut Vec<FieldError>) {
        for (index, service) in self.services.iter().enumerate() {
            service.validate(&format!("spec.services[{index}]"), errors);
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
        if let Some(check) = &self.health_check
            && (check.tcp.is_some() == check.http.is_some())
        {
            errors.push(FieldError::missing(format!("{path}.healthCheck"), "either tcp or http"));
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
