//! One case: the suite's namespace, server and client in both clusters.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_tests::kube::Object;
use tombolo_tests::testbed::{Cluster, Testbed, eventually};

pub const MCS: &str = "multicluster.x-k8s.io/v1beta1";
pub const SOON: Duration = Duration::from_secs(20);

pub type Check = fn(&Case<'_>) -> Result<()>;

pub struct Case<'a> {
    pub east: &'a Cluster,
    pub west: &'a Cluster,
    pub namespace: String,
}

/// The suite's server: says its pod's address, over TCP and UDP on port 42.
fn server(kind: &str, namespace: &str) -> Value {
    let container = |name: &str, listen: &str| {
        json!({
            "name": name, "image": "alpine/socat:1.7.4.4",
            "args": ["-v", format!("{listen}:42,crlf,reuseaddr,fork"), "SYSTEM:echo pod ip $(MY_POD_IP)"],
            "env": [{ "name": "MY_POD_IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } }],
        })
    };
    let labels = json!({ "app": "hello" });
    let pod = json!({ "terminationGracePeriodSeconds": 1, "containers": [container("tcp", "TCP-LISTEN"), container("udp", "UDP-LISTEN")] });
    let mut whole = json!({
        "apiVersion": "apps/v1", "kind": kind, "metadata": { "name": "hello", "namespace": namespace },
        "spec": {
            "replicas": 1, "selector": { "matchLabels": labels },
            "template": { "metadata": { "labels": labels }, "spec": pod },
        },
    });
    if kind == "StatefulSet" {
        whole["spec"]["serviceName"] = json!("hello");
        whole["spec"]["replicas"] = json!(3);
    }
    whole
}

impl<'a> Case<'a> {
    pub fn begin(bed: &'a Testbed, namespace: &str) -> Result<Self> {
        let case =
            Self { east: bed.cluster("east")?, west: bed.cluster("west")?, namespace: namespace.to_owned() };
        for cluster in case.both() {
            cluster.namespace(namespace)?;
            cluster.api.apply(&json!({
                "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "request", "namespace": namespace },
                "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "containers": [{ "name": "request", "image": "nicolaka/netshoot:v0.15", "args": ["sleep", "3600"] }],
                },
            }))?;
        }
        case.both().into_iter().try_for_each(|cluster| cluster.pod_ready(namespace, "request"))?;
        Ok(case)
    }

    pub fn both(&self) -> [&Cluster; 2] {
        [self.east, self.west]
    }

    /// The server behind the service `hello`, changed by `spec`; `kind` is Deployment or StatefulSet.
    pub fn serve(&self, at: &Cluster, kind: &str, spec: &Value) -> Result<()> {
        at.api.apply(&server(kind, &self.namespace))?;
        let mut whole = json!({
            "selector": { "app": "hello" }, "ipFamilyPolicy": "PreferDualStack",
            "ports": [
                { "name": "tcp", "port": 42, "protocol": "TCP" }, { "name": "udp", "port": 42, "protocol": "UDP" },
            ],
        });
        for (field, value) in spec.as_object().into_iter().flatten() {
            whole[field] = value.clone();
        }
        let metadata = json!({ "name": "hello", "namespace": self.namespace });
        at.api
            .apply(&json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": whole }))?;
        at.rolled_out(&self.namespace, &format!("{kind}/hello"))
    }

    pub fn export(&self, at: &Cluster) -> Result<()> {
        let metadata = json!({ "name": "hello", "namespace": self.namespace });
        at.api.create(&json!({ "apiVersion": MCS, "kind": "ServiceExport", "metadata": metadata })).map(drop)
    }

    /// In both clusters, east's the older one.
    pub fn export_both(&self) -> Result<()> {
        self.export(self.east)?;
        self.imported(self.west)?;
        // Creation times have whole seconds.
        std::thread::sleep(Duration::from_millis(1100));
        self.export(self.west)?;
        let import = Object::new(MCS, "ServiceImport", &self.namespace, "hello");
        for cluster in self.both() {
            cluster.api.until(&import, SOON, |found| {
                let clusters = found.context("there is no import")?["status"]["clusters"].clone();
                ensure!(clusters.as_array().is_some_and(|clusters| clusters.len() == 2), "{clusters}");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// The import, once it is one that callers can use.
    pub fn imported(&self, at: &Cluster) -> Result<Value> {
        let import = Object::new(MCS, "ServiceImport", &self.namespace, "hello");
        at.api.until(&import, SOON, |found| {
            let import = found.context("there is no import")?;
            let (ready, why) = tombolo_tests::kube::condition(import, "Ready");
            ensure!(ready.starts_with("True"), "{ready}: {why}");
            Ok(import.clone())
        })
    }

    /// What a command in the client pod wrote.
    pub fn request(&self, at: &Cluster, command: &[&str]) -> Result<String> {
        at.exec(&self.namespace, "request", "request", command)
    }

    pub fn name(&self, zone: &str) -> String {
        format!("hello.{}.svc.{zone}", self.namespace)
    }

    /// Answers of a kind, sorted, once `check` is content with them.
    pub fn dig(
        &self,
        at: &Cluster,
        name: &str,
        kind: &str,
        check: impl Fn(&[String]) -> Result<()>,
    ) -> Result<Vec<String>> {
        eventually(&format!("{kind} of {name} in {}", at.name), SOON, || {
            let said = self.request(at, &["dig", "+short", "+time=2", "+tries=1", name, kind])?;
            let mut answers: Vec<String> =
                said.lines().map(|line| line.trim().trim_end_matches('.').to_owned()).collect();
            answers.sort_unstable();
            check(&answers).with_context(|| format!("{answers:?}"))?;
            Ok(answers)
        })
    }

    /// Addresses of the server's pods, sorted; `path` is of a pod's status.
    pub fn pods(&self, at: &Cluster) -> Result<Vec<(String, String, String)>> {
        let path = "jsonpath={range .items[*]}{.metadata.name} {.status.podIPs[0].ip} {.status.podIPs[1].ip}{\"\\n\"}{end}";
        let said = at.kubectl(&["get", "pods", "-n", &self.namespace, "-l", "app=hello", "-o", path])?;
        let row = |line: &str| {
            let mut words = line.split_whitespace().map(str::to_owned);
            Some((words.next()?, words.next()?, words.next()?))
        };
        let mut rows: Vec<_> = said.lines().filter_map(row).collect();
        rows.sort_unstable();
        Ok(rows)
    }
}
