//! The service that is called, nginx in one cluster, and who calls it: a pod without a sidecar in the other.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_tests::kube::{MCS, Object, condition};
use tombolo_tests::requests::{Connections, Load, OpenLoad};
use tombolo_tests::testbed::{Cluster, NAMESPACE, Testbed, eventually};

pub const SHOP: &str = "shop";
pub const SOON: Duration = Duration::from_secs(30);

/// Says which cluster's it is. Connections stay for as long as the client wants them.
fn nginx(cluster: &str) -> String {
    format!(
        "worker_processes 1; error_log stderr warn; pid /tmp/nginx.pid;
         events {{ worker_connections 8192; }}
         http {{
           access_log off; keepalive_timeout 3600s; keepalive_requests 1000000000;
           client_body_temp_path /tmp/client; proxy_temp_path /tmp/proxy; fastcgi_temp_path /tmp/fastcgi;
           uwsgi_temp_path /tmp/uwsgi; scgi_temp_path /tmp/scgi;
           server {{ listen 8080 backlog=4096; location / {{ return 200 \"{cluster}\\n\"; }} }}
         }}"
    )
}

/// What PodSecurity "restricted" wants of a pod and of its container.
fn restricted(mut pod: Value) -> Value {
    pod["securityContext"] =
        json!({ "runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": { "type": "RuntimeDefault" } });
    for container in pod["containers"].as_array_mut().into_iter().flatten() {
        container["securityContext"] =
            json!({ "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } });
    }
    pod
}

/// Two replicas of nginx behind a Service, which is exported.
pub fn serve(at: &Cluster, name: &str) -> Result<()> {
    let (metadata, labels) = (json!({ "name": name, "namespace": SHOP }), json!({ "app": name }));
    let pod = restricted(json!({
        "terminationGracePeriodSeconds": 2,
        "containers": [{
            "name": "web", "image": "nginx:1", "args": ["nginx", "-c", "/conf/nginx.conf", "-g", "daemon off;"],
            "readinessProbe": { "tcpSocket": { "port": 8080 }, "periodSeconds": 1 },
            "volumeMounts": [{ "name": "conf", "mountPath": "/conf" }],
        }],
        "volumes": [{ "name": "conf", "configMap": { "name": name } }],
    }));
    let object =
        |version: &str, kind: &str| json!({ "apiVersion": version, "kind": kind, "metadata": metadata });
    let mut config = object("v1", "ConfigMap");
    config["data"] = json!({ "nginx.conf": nginx(&at.name) });
    let mut deployment = object("apps/v1", "Deployment");
    deployment["spec"] = json!({
        "replicas": 2, "selector": { "matchLabels": labels },
        "template": { "metadata": { "labels": labels }, "spec": pod },
    });
    let mut service = object("v1", "Service");
    service["spec"] =
        json!({ "selector": labels, "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }] });
    for object in [config, deployment, service, object(MCS, "ServiceExport")] {
        at.api.apply(&object)?;
    }
    at.rolled_out(SHOP, &format!("deployment/{name}"))
}

/// A pod that sleeps, and has curl.
pub fn client(at: &Cluster, namespace: &str, name: &str, annotations: &Value) -> Result<()> {
    at.api.apply(&json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": namespace, "annotations": annotations },
        "spec": restricted(json!({
            "terminationGracePeriodSeconds": 1,
            "containers": [{ "name": "client", "image": "nicolaka/netshoot:v0.15" }],
        })),
    }))?;
    at.pod_ready(namespace, name)
}

pub fn open(bed: &Testbed) -> Result<()> {
    for cluster in &bed.clusters {
        cluster.namespace(SHOP)?;
    }
    let (east, west) = (bed.cluster("east")?, bed.cluster("west")?);
    serve(west, "web")?;
    ["client", "keeper"].iter().try_for_each(|name| client(east, SHOP, name, &json!({})))
}

/// The address of an imported service, once it is one that callers can use.
pub fn imported(at: &Cluster, name: &str) -> Result<String> {
    at.api.until(&Object::new(MCS, "ServiceImport", SHOP, name), SOON, |found| {
        let import = found.context("there is no import")?;
        let (ready, why) = condition(import, "Ready");
        ensure!(ready.starts_with("True"), "{ready}: {why}");
        let address = import["spec"]["ips"][0].as_str().context("it has no address")?;
        Ok(address.to_owned())
    })
}

/// What a pod of a cluster gets, once it is what is expected.
pub fn call(at: &Cluster, (namespace, pod): (&str, &str), url: &str, expect: &str) -> Result<()> {
    eventually(&format!("{pod} of {} calls {url}", at.name), SOON, || {
        let said = at.exec(namespace, pod, "client", &["curl", "-sS", "-m", "5", url])?;
        ensure!(said.trim() == expect, "{said:?}, expected {expect:?}");
        Ok(())
    })
}

/// Requests of a pod in east to the service in west, through the derived Service.
pub fn load(bed: &Testbed, pod: &str, per_second: u32, connections: Connections) -> Result<OpenLoad> {
    let east = bed.cluster("east")?;
    let ip = imported(east, "web")?;
    call(east, (SHOP, pod), &format!("http://{ip}/"), "west")?;
    let address = format!("{ip}:80").parse()?;
    let load = Load { address, path: "/".into(), expect: "west".into(), per_second, connections };
    OpenLoad::start(&east.network_of(SHOP, pod, "client")?, load)
}

/// After a failure: what the clusters look like.
pub fn explain(bed: &Testbed) {
    for cluster in &bed.clusters {
        for args in [
            &["get", "pods", "-A", "-o", "wide"][..],
            &["get", "events", "-n", NAMESPACE, "--sort-by=.lastTimestamp"],
        ] {
            let said = cluster.kubectl(args).unwrap_or_else(|error| format!("{error:#}"));
            println!("--- {} {}\n{said}", cluster.name, args.join(" "));
        }
    }
}
