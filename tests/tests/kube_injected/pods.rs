//! Objects that the cases make, and what they ask of pods.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_tests::kube::{Object, condition};
use tombolo_tests::mesh::http_get;
use tombolo_tests::scenario::metric;
use tombolo_tests::testbed::{Cluster, eventually};

use super::SOON;

pub const MCS: &str = "multicluster.x-k8s.io/v1beta1";
pub const INJECT: &str = "tombolo.dev/inject";
pub const ENFORCE: &str = "pod-security.kubernetes.io/enforce";

/// A namespace with these labels and service accounts.
pub fn namespace(cluster: &Cluster, name: &str, labels: Value, accounts: &[&str]) -> Result<()> {
    let metadata = json!({ "name": name, "labels": labels });
    cluster.api.apply(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": metadata }))?;
    for account in accounts {
        let metadata = json!({ "name": account, "namespace": name });
        cluster.api.apply(&json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata }))?;
    }
    Ok(())
}

/// A pod of one container `main` that does nothing unless `container` says so.
pub fn pod(namespace: &str, name: &str, account: &str, annotations: Value, container: Value) -> Value {
    let mut main = json!({ "name": "main", "image": "nicolaka/netshoot:v0.15" });
    for (field, value) in container.as_object().into_iter().flatten() {
        main[field] = value.clone();
    }
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": namespace, "labels": { "app": name }, "annotations": annotations },
        "spec": { "serviceAccountName": account, "terminationGracePeriodSeconds": 2, "containers": [main] },
    })
}

/// Meets the Pod Security Standard `restricted` by itself.
pub fn restricted(mut pod: Value) -> Value {
    pod["spec"]["securityContext"] =
        json!({ "runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": { "type": "RuntimeDefault" } });
    pod["spec"]["containers"][0]["securityContext"] =
        json!({ "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } });
    pod
}

/// Makes a pod and waits until it is ready. Its service account may not be known to admission yet.
pub fn started(cluster: &Cluster, pod: &Value) -> Result<Value> {
    let text = |path: &str| pod.pointer(path).and_then(Value::as_str).unwrap_or_default();
    let (namespace, name) = (text("/metadata/namespace"), text("/metadata/name"));
    eventually("the pod is made", SOON, || cluster.api.create(pod).map(drop))?;
    cluster.pod_ready(namespace, name).with_context(|| {
        let described = cluster.kubectl(&["describe", "pod", "-n", namespace, name]).unwrap_or_default();
        let logs = cluster.kubectl(&["logs", "-n", namespace, name, "--all-containers", "--tail=20"]);
        format!("{described}\n{}", logs.unwrap_or_default())
    })?;
    cluster.api.get(&Object::new("v1", "Pod", namespace, name))?.context("the pod is gone")
}

/// Behind a Service of its name on port 80, exported, with as many pods as `replicas`; ready by its own probe.
pub fn serve(cluster: &Cluster, server: &Value, replicas: u8) -> Result<()> {
    let (namespace, name) = (&server["metadata"]["namespace"], &server["metadata"]["name"]);
    let labels = json!({ "app": name });
    let (mut template, metadata) =
        (json!({ "metadata": server["metadata"] }), json!({ "name": name, "namespace": namespace }));
    template["spec"] = server["spec"].clone();
    template["metadata"]["labels"] = labels.clone();
    for field in ["name", "namespace"] {
        template["metadata"].as_object_mut().map(|metadata| metadata.remove(field));
    }
    for object in [
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata,
            "spec": {
                "replicas": replicas, "selector": { "matchLabels": labels }, "template": template,
                "strategy": { "rollingUpdate": { "maxUnavailable": 0, "maxSurge": 1 } },
            },
        }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata,
            "spec": { "selector": labels, "ports": [{ "name": "http", "port": 80, "targetPort": "http" }] },
        }),
        json!({ "apiVersion": MCS, "kind": "ServiceExport", "metadata": metadata }),
    ] {
        cluster.api.apply(&object)?;
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    cluster.rolled_out(&text(namespace), &format!("deployment/{}", text(name)))
}

/// The import, once callers can use it.
pub fn imported(cluster: &Cluster, namespace: &str, name: &str) -> Result<Value> {
    cluster.api.until(&Object::new(MCS, "ServiceImport", namespace, name), SOON, |found| {
        let import = found.context("there is no import")?;
        let (ready, why) = condition(import, "Ready");
        ensure!(ready.starts_with("True"), "{ready}: {why}");
        Ok(import.clone())
    })
}

/// What `curl` wrote in a pod.
pub fn curl(cluster: &Cluster, (namespace, pod): (&str, &str), url: &str) -> Result<String> {
    cluster.exec(namespace, pod, "main", &["curl", "-sS", "--max-time", "5", url])
}

/// `curl` in a pod, until it is answered with `said`.
pub fn answered(cluster: &Cluster, pod: (&str, &str), url: &str, said: &str) -> Result<()> {
    eventually(&format!("{pod:?} is answered by {url}"), SOON, || {
        let answer = curl(cluster, pod, url)?;
        ensure!(answer.contains(said), "{answer}");
        Ok(())
    })
}

/// Addresses of pods with a label, by name.
pub fn addresses(cluster: &Cluster, namespace: &str, label: &str) -> Result<Vec<(String, String)>> {
    let path = "jsonpath={range .items[*]}{.metadata.name} {.status.podIP}{\"\\n\"}{end}";
    let said = cluster.kubectl(&["get", "pods", "-n", namespace, "-l", label, "-o", path])?;
    Ok(said
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, ip)| (name.into(), ip.into()))
        .collect())
}

/// The exposition of whatever is at port 7445 of a pod, as a scraper on the node sees it.
pub fn exposition(cluster: &Cluster, ip: &str) -> Result<String> {
    let at: SocketAddr = format!("{ip}:7445").parse()?;
    http_get(cluster.nodes.first().context("no node")?, at, "/metrics")
}

/// A metric, summed over pods with a label.
pub fn summed(cluster: &Cluster, (namespace, label): (&str, &str), name: &str, of: &[&str]) -> Result<f64> {
    let mut sum = 0.0;
    for (_, ip) in addresses(cluster, namespace, label)? {
        sum += metric(&exposition(cluster, &ip)?, name, of);
    }
    Ok(sum)
}
