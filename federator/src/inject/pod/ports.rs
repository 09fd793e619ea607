//! The ports of a pod's own containers.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tombolo_model::protocol::Protocol;

use super::{CAPTURE, PodError, SIDECAR, name_of};

/// What containers declare.
#[derive(Debug, Default)]
pub(super) struct Ports {
    /// Of TCP.
    pub tcp: BTreeSet<u16>,
    named: BTreeMap<(Protocol, String), u16>,
    /// Where Prometheus scrapes by the usual annotations.
    pub scraped: Option<u16>,
}

impl Ports {
    pub fn of(pod: &Value) -> Result<Self, PodError> {
        let spec = pod.get("spec").ok_or_else(|| PodError::new("spec", "is missing"))?;
        let containers = spec.get("containers").and_then(Value::as_array);
        let containers = containers.filter(|containers| !containers.is_empty());
        let containers = containers.ok_or_else(|| PodError::new("spec.containers", "there is none"))?;
        let init = spec.get("initContainers").and_then(Value::as_array).into_iter().flatten();
        let mut ports = Self::default();
        let others =
            |container: &&Value| !name_of(container).is_some_and(|name| [SIDECAR, CAPTURE].contains(&name));
        for container in containers.iter().chain(init).filter(others) {
            for port in container.get("ports").and_then(Value::as_array).into_iter().flatten() {
                let protocol = port.get("protocol").and_then(Value::as_str).unwrap_or_default();
                let number =
                    port.get("containerPort").and_then(Value::as_u64).and_then(|n| u16::try_from(n).ok());
                let (Some(protocol), Some(number)) = (Protocol::parse(protocol), number.filter(|n| *n != 0))
                else {
                    continue;
                };
                if protocol == Protocol::Tcp {
                    ports.tcp.insert(number);
                }
                if let Some(name) = name_of(port) {
                    ports.named.insert((protocol, name.to_owned()), number);
                }
            }
        }
        let annotation = |key: &str| pod.get("metadata")?.get("annotations")?.get(key)?.as_str();
        if annotation("prometheus.io/scrape") == Some("true") {
            ports.scraped =
                annotation("prometheus.io/port").and_then(|port| port.parse().ok()).filter(|p| *p != 0);
        }
        Ok(ports)
    }

    pub fn by_name(&self, protocol: Protocol, name: &str) -> Option<u16> {
        self.named.get(&(protocol, name.to_owned())).copied()
    }
}
