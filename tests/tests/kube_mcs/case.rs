//! One case: a namespace in both clusters, the service `hello` in it, and what is asked about it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_tests::kube::{ControlPlane, Object, condition};

pub const MCS: &str = "multicluster.x-k8s.io/v1beta1";
pub const OLD_MCS: &str = "multicluster.x-k8s.io/v1alpha1";
pub const SOON: Duration = Duration::from_secs(10);
/// Creation times have whole seconds, and the older export wins.
const A_SECOND: Duration = Duration::from_millis(1100);

/// What a case holds.
pub type Check = fn(&Case<'_>) -> Result<()>;

/// One case's namespace in both clusters.
pub struct Case<'a> {
    pub east: &'a ControlPlane,
    pub west: &'a ControlPlane,
    pub namespace: String,
}

pub fn namespace(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } })
}

impl Case<'_> {
    pub fn both(&self) -> [&ControlPlane; 2] {
        [self.east, self.west]
    }

    pub fn object(&self, api_version: &str, kind: &str, name: &str) -> Object {
        Object::new(api_version, kind, &self.namespace, name)
    }

    /// The service `hello` with two ports, changed by `spec`.
    pub fn service(&self, at: &ControlPlane, spec: Value) -> Result<Value> {
        let mut whole = json!({
            "ports": [
                { "name": "tcp", "port": 42, "protocol": "TCP", "appProtocol": "tombolo.dev/echo" },
                { "name": "udp", "port": 42, "protocol": "UDP" },
            ],
        });
        for (field, value) in spec.as_object().into_iter().flatten() {
            whole[field] = value.clone();
        }
        let metadata = json!({ "name": "hello", "namespace": self.namespace });
        let document = json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": whole });
        at.api.apply(&document)
    }

    pub fn export(&self, at: &ControlPlane, spec: Value) -> Result<Value> {
        self.export_with(at, MCS, json!({}), spec)
    }

    pub fn export_with(
        &self,
        at: &ControlPlane,
        version: &str,
        annotations: Value,
        spec: Value,
    ) -> Result<Value> {
        let metadata = json!({ "name": "hello", "namespace": self.namespace, "annotations": annotations });
        let document =
            json!({ "apiVersion": version, "kind": "ServiceExport", "metadata": metadata, "spec": spec });
        at.api.create(&document)
    }

    pub fn unexport(&self, at: &ControlPlane) -> Result<()> {
        at.api.delete(&self.object(MCS, "ServiceExport", "hello"))
    }

    pub fn imported<T>(&self, at: &ControlPlane, check: impl Fn(&Value) -> Result<T>) -> Result<T> {
        let import = self.object(MCS, "ServiceImport", "hello");
        at.api.until(&import, SOON, |found| check(found.context("there is no import")?))
    }

    /// An import that callers can use.
    pub fn usable(&self, at: &ControlPlane) -> Result<Value> {
        self.imported(at, |import| {
            ensure!(condition(import, "Ready").0 == "True Ready", "{import}");
            Ok(import.clone())
        })
    }

    pub fn gone(&self, at: &ControlPlane) -> Result<()> {
        at.api.until(&self.object(MCS, "ServiceImport", "hello"), SOON, |found| {
            ensure!(found.is_none(), "it is still there: {found:?}");
            Ok(())
        })
    }

    pub fn exporting(&self, at: &ControlPlane, r#type: &str, expected: &str) -> Result<String> {
        at.api.until(&self.object(MCS, "ServiceExport", "hello"), SOON, |found| {
            let export = found.context("there is no export")?;
            let (found, message) = condition(export, r#type);
            ensure!(found == expected, "{type} is {found}: {message}");
            Ok(message)
        })
    }

    /// Two exports, east's the older one.
    pub fn conflicting(&self, east: (Value, Value), west: (Value, Value)) -> Result<()> {
        self.service(self.east, east.0)?;
        self.service(self.west, west.0)?;
        self.export(self.east, east.1)?;
        self.usable(self.west)?;
        std::thread::sleep(A_SECOND);
        self.export(self.west, west.1)?;
        Ok(())
    }
}

pub fn clusters(import: &Value) -> Vec<&str> {
    let clusters = import.pointer("/status/clusters").and_then(Value::as_array).into_iter().flatten();
    clusters.filter_map(|cluster| cluster["cluster"].as_str()).collect()
}

/// Imported slices of a case.
pub fn slices<T>(case: &Case<'_>, at: &ControlPlane, check: impl Fn(&[Value]) -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        let all = at.api.list(&case.object("discovery.k8s.io/v1", "EndpointSlice", ""))?;
        let name =
            |slice: &Value| slice["metadata"]["labels"]["multicluster.kubernetes.io/service-name"] == "hello";
        let imported: Vec<Value> = all.into_iter().filter(name).collect();
        match check(&imported) {
            Ok(found) => return Ok(found),
            Err(error) if start.elapsed() > SOON => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
