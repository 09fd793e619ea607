//! Objects of the API server, read into what is kept of them: each in a row without what nobody here asks for (pure).
//!
//! Whatever they hold was admitted by an API server, which need not be ours to trust: what does not read is left out.

use std::net::IpAddr;
use std::sync::Arc;

use kube::core::DynamicObject;
use serde_json::Value;
use tombolo_kubernetes::table::{Identity, Row, version};
use tombolo_model::mcs::{InternalTrafficPolicy, IpFamily, Port, ServiceProperties, SessionAffinity};
use tombolo_model::names::ServiceKey;
use tombolo_model::protocol::Protocol;
use tombolo_model::resource::{Object, ObjectMeta, ServiceExportSpec, Spec};

use super::labels::{APPLIED, IMPORT, LOCAL_SERVICE, MANAGED_BY, SERVICE_NAME, SOURCE_CLUSTER, TOMBOLO};
use super::targets::ServicePort;
use crate::facts::{ExportedService, KubernetesService};
pub use packed::Packed;

mod packed;

/// Of one slice: Kubernetes' own limit.
const MAX_ENDPOINTS: usize = 1000;
/// Kubernetes' are UUIDs.
const MAX_UID_BYTES: usize = 64;

/// What every row has.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Meta {
    pub uid: String,
    pub version: u64,
    /// Written by this federator or one before it.
    pub ours: bool,
    /// What was written last.
    pub applied: String,
    pub deleting: bool,
}

impl Meta {
    fn of(object: &DynamicObject) -> Self {
        Self {
            uid: object.metadata.uid.clone().unwrap_or_default(),
            version: version(object),
            ours: label(object, MANAGED_BY) == Some(TOMBOLO),
            applied: annotation(object, APPLIED).unwrap_or_default().to_owned(),
            deleting: object.metadata.deletion_timestamp.is_some(),
        }
    }

    fn identity(&self) -> Identity<'_> {
        Identity { uid: &self.uid, version: self.version }
    }
}

fn label<'a>(object: &'a DynamicObject, key: &str) -> Option<&'a str> {
    object.metadata.labels.as_ref()?.get(key).map(String::as_str)
}

fn annotation<'a>(object: &'a DynamicObject, key: &str) -> Option<&'a str> {
    object.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

/// A namespace: whether objects can be made in it.
#[derive(Clone, PartialEq, Debug)]
pub struct NamespaceRow {
    pub meta: Meta,
}

impl Row for NamespaceRow {
    fn read(object: DynamicObject) -> Option<Self> {
        // Its version changes with every label: nobody is to be woken by it.
        let meta = Meta { version: 0, ..Meta::of(&object) };
        Some(Self { meta })
    }
    fn identity(&self) -> Identity<'_> {
        self.meta.identity()
    }
}

/// A `Service`: one that may be exported, or a derived one.
#[derive(Clone, PartialEq, Debug)]
pub struct ServiceRow {
    pub meta: Meta,
    pub service: KubernetesService,
    pub cluster_ips: Vec<IpAddr>,
    /// Of a derived one: the import's name.
    pub import: Option<String>,
    /// Of a derived one, as it is.
    pub spec: Packed,
    pub created_unix: u64,
}

impl ServiceRow {
    /// Of a derived one: the numbers that its ports have at the shared sidecars.
    pub fn targets(&self) -> Vec<(ServicePort, u16)> {
        let spec = self.spec.value();
        let ports = spec.get("ports").and_then(Value::as_array).into_iter().flatten();
        let target = |port: &Value| {
            let number = |field| u16::try_from(port.get(field)?.as_u64()?).ok();
            let protocol = Protocol::parse(text(port, "protocol"))?;
            Some(((protocol, number("port")?), number("targetPort")?))
        };
        ports.filter_map(target).collect()
    }
}

impl Row for ServiceRow {
    fn read(object: DynamicObject) -> Option<Self> {
        let meta = Meta::of(&object);
        let spec = object.data.get("spec").unwrap_or(&Value::Null);
        let ips = spec.get("clusterIPs").and_then(Value::as_array).into_iter().flatten();
        let cluster_ips = ips.filter_map(|ip| ip.as_str()?.parse().ok()).collect();
        let import = annotation(&object, IMPORT).map(str::to_owned).filter(|_| meta.ours);
        let kept = if import.is_some() { Packed::of(spec) } else { Packed::default() };
        let created_unix = created_unix(&object);
        Some(Self { meta, service: service(spec), cluster_ips, import, spec: kept, created_unix })
    }
    fn identity(&self) -> Identity<'_> {
        self.meta.identity()
    }
}

fn created_unix(object: &DynamicObject) -> u64 {
    let created = object.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second());
    u64::try_from(created).unwrap_or(0)
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or_default()
}

fn service(spec: &Value) -> KubernetesService {
    if text(spec, "type") == "ExternalName" {
        return KubernetesService::ExternalName;
    }
    let ports = spec.get("ports").and_then(Value::as_array).into_iter().flatten();
    let families = spec.get("ipFamilies").and_then(Value::as_array).into_iter().flatten();
    let timeout = spec.pointer("/sessionAffinityConfig/clientIP/timeoutSeconds").and_then(Value::as_u64);
    let affinity = SessionAffinity::parse(text(spec, "sessionAffinity")).unwrap_or_default();
    KubernetesService::Found(ExportedService {
        headless: text(spec, "clusterIP") == "None",
        ports: ports.filter_map(|port| read_port(port, "port")).collect(),
        properties: ServiceProperties {
            session_affinity: affinity,
            affinity_timeout_seconds: timeout
                .filter(|_| affinity == SessionAffinity::ClientIP)
                .and_then(|seconds| u32::try_from(seconds).ok()),
            ip_families: families.filter_map(|family| IpFamily::parse(family.as_str()?)).collect(),
            internal_traffic_policy: InternalTrafficPolicy::parse(text(spec, "internalTrafficPolicy"))
                .unwrap_or_default(),
            traffic_distribution: Some(text(spec, "trafficDistribution"))
                .filter(|text| !text.is_empty())
                .map(str::to_owned),
        },
    })
}

fn read_port(port: &Value, number: &str) -> Option<Port> {
    let protocol = Some(text(port, "protocol")).filter(|text| !text.is_empty()).unwrap_or("TCP");
    Some(Port {
        name: text(port, "name").to_owned(),
        port: u16::try_from(port.get(number)?.as_u64()?).ok()?,
        app_protocol: text(port, "appProtocol").to_owned(),
        protocol: protocol.to_owned(),
    })
}

/// An `EndpointSlice`: of a `Service` of this cluster, or one that is written here.
#[derive(Clone, PartialEq, Debug)]
pub struct SliceRow {
    pub meta: Meta,
    /// Of this cluster's `Service`.
    pub service: Option<String>,
    /// The import, of one that is written here of a source cluster's endpoints.
    pub import: Option<String>,
    /// The import, of one that leads from a derived `Service` to the shared sidecars.
    pub front: Option<String>,
    /// Of a slice of this cluster's `Service`.
    pub ready: Vec<Endpoint>,
    /// Of a slice of this cluster's `Service`: pods by uid, and whether they are ready.
    pub pods: Vec<(Arc<str>, bool)>,
    /// Of a slice of this cluster's `Service`.
    pub ports: Vec<Port>,
}

/// A ready endpoint.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Endpoint {
    pub address: IpAddr,
    pub hostname: Option<String>,
}

impl Row for SliceRow {
    fn read(object: DynamicObject) -> Option<Self> {
        let meta = Meta::of(&object);
        let imported = label(&object, SOURCE_CLUSTER).is_some();
        let import = label(&object, SERVICE_NAME).map(str::to_owned).filter(|_| meta.ours && imported);
        let front = annotation(&object, IMPORT).map(str::to_owned).filter(|_| meta.ours && !imported);
        let local = !imported && front.is_none();
        let service = label(&object, LOCAL_SERVICE).map(str::to_owned).filter(|_| local);
        if import.is_none() && service.is_none() && front.is_none() {
            return None;
        }
        let list = |field| object.data.get(field).and_then(Value::as_array).into_iter().flatten();
        // Of those that are written here the fingerprint says enough.
        let most = if service.is_some() { MAX_ENDPOINTS } else { 0 };
        let ready = |endpoint: &&Value| endpoint.pointer("/conditions/ready") != Some(&Value::Bool(false));
        let mut endpoints: Vec<Endpoint> = list("endpoints")
            .filter(ready)
            .take(most)
            .filter_map(|endpoint| {
                let address = endpoint.pointer("/addresses/0")?.as_str()?.parse().ok()?;
                let hostname = endpoint.get("hostname").and_then(Value::as_str).map(str::to_owned);
                Some(Endpoint { address, hostname })
            })
            .collect();
        endpoints.sort_unstable();
        let pod = |endpoint: &Value| {
            let pod = endpoint.get("targetRef").filter(|target| text(target, "kind") == "Pod")?;
            let uid = Some(text(pod, "uid")).filter(|uid| (1..=MAX_UID_BYTES).contains(&uid.len()))?;
            Some((Arc::from(uid), ready(&endpoint)))
        };
        let mut pods: Vec<(Arc<str>, bool)> = list("endpoints").take(most).filter_map(pod).collect();
        pods.sort_unstable();
        let ports = list("ports").filter(|_| service.is_some());
        let ports = ports.filter_map(|port| read_port(port, "port")).collect();
        Some(Self { meta, service, import, front, ready: endpoints, pods, ports })
    }
    fn identity(&self) -> Identity<'_> {
        self.meta.identity()
    }
}

/// A `ServiceExport`.
#[derive(Clone, PartialEq, Debug)]
pub struct ExportRow {
    pub meta: Meta,
    pub object: Object,
    pub created_unix: u64,
    pub generation: u64,
    /// A list.
    pub conditions: Packed,
}

impl Row for ExportRow {
    fn read(object: DynamicObject) -> Option<Self> {
        let meta = Meta::of(&object);
        let spec = object.data.get("spec").cloned().filter(|spec| !spec.is_null());
        let spec = spec.unwrap_or_else(|| Value::Object(Default::default()));
        // Fields of a later version are theirs to use, and no reason to export nothing.
        let map = |field: &str| serde_json::from_value(spec.get(field).cloned().unwrap_or_default());
        let spec = ServiceExportSpec {
            exported_labels: map("exportedLabels").unwrap_or_default(),
            exported_annotations: map("exportedAnnotations").unwrap_or_default(),
        };
        let created_unix = created_unix(&object);
        let mut metadata = ObjectMeta::default();
        metadata.name = object.metadata.name.clone()?;
        metadata.namespace = object.metadata.namespace.clone();
        let annotations = object.metadata.annotations.iter().flatten();
        // Others are nobody's business here, and may be long.
        let ours = annotations.filter(|(key, _)| key.starts_with("tombolo.dev/"));
        metadata.annotations = ours.map(|(key, value)| (key.clone(), value.clone())).collect();
        let api_version = object.types.as_ref().map(|types| types.api_version.clone()).unwrap_or_default();
        Some(Self {
            meta: Meta { ours: false, ..meta },
            object: Object { api_version, metadata, spec: Spec::ServiceExport(spec) },
            created_unix,
            generation: u64::try_from(object.metadata.generation.unwrap_or(0)).unwrap_or(0),
            conditions: conditions(&object.data),
        })
    }
    fn identity(&self) -> Identity<'_> {
        self.meta.identity()
    }
}

fn conditions(data: &Value) -> Packed {
    data.pointer("/status/conditions").map(Packed::of).unwrap_or_default()
}

/// A `ServiceImport`, ours or not.
#[derive(Clone, PartialEq, Debug)]
pub struct ImportRow {
    pub meta: Meta,
    /// Nothing for one that is not ours.
    pub spec: Packed,
    pub status: Packed,
    /// It has `spec.ips`.
    pub addressed: bool,
}

impl Row for ImportRow {
    fn read(object: DynamicObject) -> Option<Self> {
        let meta = Meta::of(&object);
        let part = |field: &str| object.data.get(field).filter(|_| meta.ours);
        let packed = |field: &str| part(field).map(Packed::of).unwrap_or_default();
        let addressed = part("spec").is_some_and(|spec| spec.get("ips").is_some());
        Some(Self { spec: packed("spec"), status: packed("status"), addressed, meta })
    }
    fn identity(&self) -> Identity<'_> {
        self.meta.identity()
    }
}

/// A service by the names of an object; `None` for names that no service has.
pub fn key(namespace: &str, name: &str) -> Option<ServiceKey> {
    Some(ServiceKey::new(namespace.parse().ok()?, name.parse().ok()?))
}
