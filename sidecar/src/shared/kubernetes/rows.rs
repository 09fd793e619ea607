//! Objects of the API server, read into what is kept of them (pure): a few dozen bytes of each pod.
//!
//! Whatever they hold was admitted by an API server: what does not read is left out. Versions are left out too, since they
//! change with every label, and nothing here is written.

use std::net::IpAddr;

use kube::core::DynamicObject;
use serde_json::Value;
use tombolo_kubernetes::table::{Identity, Row};
use tombolo_kubernetes::words::{IMPORT, INJECTED, LOCAL_SERVICE, MANAGED_BY, TOMBOLO, derived_name};
use tombolo_model::names::ServiceKey;
use tombolo_model::protocol::Protocol;

/// Of one slice: Kubernetes' own limit.
const MAX_ENDPOINTS: usize = 1000;
/// Of one `Service`, as federators take it.
const MAX_PORTS: usize = 100;

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn list<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

fn number(value: &Value, field: &str) -> Option<u16> {
    u16::try_from(value.get(field)?.as_u64()?).ok().filter(|number| *number != 0)
}

fn label<'a>(object: &'a DynamicObject, key: &str) -> Option<&'a str> {
    object.metadata.labels.as_ref()?.get(key).map(String::as_str)
}

fn uid(object: &DynamicObject) -> String {
    object.metadata.uid.clone().unwrap_or_default()
}

/// A pod that has addresses and has not ended.
#[derive(Clone, PartialEq, Debug)]
pub struct PodRow {
    uid: String,
    pub addresses: Vec<IpAddr>,
    pub account: String,
    /// It has a sidecar of its own.
    pub injected: bool,
    /// Its addresses are the node's.
    pub host_network: bool,
    /// Its containers have been killed by then: from then on its addresses may be another's. Unix seconds.
    pub ends_unix: Option<u64>,
}

impl Row for PodRow {
    fn read(object: DynamicObject) -> Option<Self> {
        let data = &object.data;
        if matches!(text(data, "/status/phase"), "Succeeded" | "Failed") {
            return None;
        }
        let addresses = list(data, "/status/podIPs").filter_map(|ip| text(ip, "/ip").parse().ok());
        let mut addresses: Vec<IpAddr> = addresses.collect();
        if addresses.is_empty() {
            addresses.extend(text(data, "/status/podIP").parse::<IpAddr>().ok());
        }
        let account = Some(text(data, "/spec/serviceAccountName")).filter(|name| !name.is_empty());
        let deletion = object.metadata.deletion_timestamp.as_ref().map(|time| time.0.as_second());
        let row = Self {
            uid: uid(&object),
            account: account.unwrap_or("default").to_owned(),
            injected: label(&object, INJECTED) == Some("true"),
            host_network: data.pointer("/spec/hostNetwork") == Some(&Value::Bool(true)),
            ends_unix: deletion.and_then(|seconds| u64::try_from(seconds).ok()),
            addresses,
        };
        (!row.addresses.is_empty()).then_some(row)
    }

    fn identity(&self) -> Identity<'_> {
        Identity { uid: &self.uid, version: 0 }
    }
}

/// A port of a `Service`.
#[derive(Clone, PartialEq, Debug)]
pub struct ServicePort {
    pub name: String,
    pub port: u16,
    pub protocol: Protocol,
    pub app_protocol: String,
    /// `targetPort`, where it is a number.
    pub target: Option<u16>,
}

/// A `Service`: one of the cluster, or one that is derived from an import.
#[derive(Clone, PartialEq, Debug)]
pub struct ServiceRow {
    uid: String,
    pub ports: Vec<ServicePort>,
    /// Of a derived one.
    pub import: Option<ServiceKey>,
    /// Of a derived one: of two that claim a number the older is believed.
    pub created_unix: u64,
}

impl Row for ServiceRow {
    fn read(object: DynamicObject) -> Option<Self> {
        let data = &object.data;
        if text(data, "/spec/type") == "ExternalName" {
            return None;
        }
        let port = |port: &Value| {
            Some(ServicePort {
                name: text(port, "/name").to_owned(),
                port: number(port, "port")?,
                protocol: Protocol::parse(text(port, "/protocol"))?,
                app_protocol: text(port, "/appProtocol").to_owned(),
                target: number(port, "targetPort"),
            })
        };
        let import = object.metadata.annotations.as_ref().and_then(|notes| notes.get(IMPORT));
        let import = import.filter(|_| label(&object, MANAGED_BY) == Some(TOMBOLO)).and_then(|name| {
            let namespace = object.metadata.namespace.as_deref()?;
            let service = ServiceKey::new(namespace.parse().ok()?, name.parse().ok()?);
            // Nobody makes one stand for another by an annotation.
            (object.metadata.name.as_deref()? == derived_name(&service)).then_some(service)
        });
        let created = object.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second());
        Some(Self {
            uid: uid(&object),
            ports: list(data, "/spec/ports").take(MAX_PORTS).filter_map(port).collect(),
            import,
            created_unix: u64::try_from(created).unwrap_or(0),
        })
    }

    fn identity(&self) -> Identity<'_> {
        Identity { uid: &self.uid, version: 0 }
    }
}

/// An `EndpointSlice` of a `Service` of the cluster.
#[derive(Clone, PartialEq, Debug)]
pub struct SliceRow {
    uid: String,
    pub service: String,
    /// Pods by name.
    pub endpoints: Vec<Endpoint>,
    pub ports: Vec<(String, Protocol, u16)>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Endpoint {
    pub address: IpAddr,
    pub pod: String,
    pub ready: bool,
}

impl Row for SliceRow {
    fn read(object: DynamicObject) -> Option<Self> {
        // Those that lead here.
        if label(&object, MANAGED_BY) == Some(TOMBOLO) {
            return None;
        }
        let data = &object.data;
        let endpoint = |endpoint: &Value| {
            let pod = Some(text(endpoint, "/targetRef/name"));
            Some(Endpoint {
                address: text(endpoint, "/addresses/0").parse().ok()?,
                pod: pod.filter(|_| text(endpoint, "/targetRef/kind") == "Pod")?.to_owned(),
                ready: endpoint.pointer("/conditions/ready") != Some(&Value::Bool(false)),
            })
        };
        let port = |port: &Value| {
            let protocol = Protocol::parse(text(port, "/protocol"))?;
            Some((text(port, "/name").to_owned(), protocol, number(port, "port")?))
        };
        Some(Self {
            uid: uid(&object),
            service: label(&object, LOCAL_SERVICE)?.to_owned(),
            endpoints: list(data, "/endpoints").take(MAX_ENDPOINTS).filter_map(endpoint).collect(),
            ports: list(data, "/ports").take(MAX_PORTS).filter_map(port).collect(),
        })
    }

    fn identity(&self) -> Identity<'_> {
        Identity { uid: &self.uid, version: 0 }
    }
}

/// A `ServiceExport`: that it is there is all.
#[derive(Clone, PartialEq, Debug)]
pub struct ExportRow {
    uid: String,
}

impl Row for ExportRow {
    fn read(object: DynamicObject) -> Option<Self> {
        object.metadata.deletion_timestamp.is_none().then(|| Self { uid: uid(&object) })
    }

    fn identity(&self) -> Identity<'_> {
        Identity { uid: &self.uid, version: 0 }
    }
}
