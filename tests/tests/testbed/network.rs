//! What reaches what.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tombolo_tests::testbed::{Cluster, Testbed, eventually};

use super::{hello, pod, ready_ip};

const SOON: Duration = Duration::from_secs(15);

/// A client pod and the server.
fn both(cluster: &Cluster, namespace: &str, replicas: u8) -> Result<()> {
    for object in hello(namespace, replicas) {
        cluster.api.apply(&object)?;
    }
    cluster.api.apply(&pod(namespace, "request", json!({})))?;
    cluster.pod_ready(namespace, "request")?;
    cluster.rolled_out(namespace, "deployment/hello")
}

fn ask(cluster: &Cluster, namespace: &str, args: &[&str]) -> Result<String> {
    cluster.exec(namespace, "request", "main", &[&["nc", "-w", "2"], args].concat())
}

pub fn a_service_by_name(_: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    both(cluster, namespace, 4)?;
    let name = format!("hello.{namespace}.svc.cluster.local");
    let mut answered = BTreeSet::new();
    eventually("every pod answers", Duration::from_secs(30), || {
        ask(cluster, namespace, &["-4", "hello", "42"])
    })?;
    for _ in 0..24 {
        answered.insert(ask(cluster, namespace, &["-4", &name, "42"])?.trim().to_owned());
    }
    let ips = cluster.kubectl(&[
        "get",
        "pods",
        "-n",
        namespace,
        "-l",
        "app=hello",
        "-o",
        "jsonpath={.items[*].status.podIP}",
    ])?;
    let expected: BTreeSet<String> = ips.split_whitespace().map(|ip| format!("pod ip {ip}")).collect();
    ensure!(answered == expected, "{answered:?} answered, expected {expected:?}");
    let nodes: BTreeSet<&str> =
        ips.split_whitespace().filter_map(|ip| ip.rsplit_once('.').map(|(net, _)| net)).collect();
    ensure!(nodes.len() == 2, "the pods are on {nodes:?}");
    let looked = cluster.exec(namespace, "request", "main", &["dig", "+short", "+search", "hello"])?;
    ensure!(looked.trim() == cluster.service_ip(namespace, "hello")?, "{looked}");
    Ok(())
}

pub fn a_pod_by_its_own_service(_: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    let server = json!({ "containers": [{ "image": "alpine/socat", "args": ["TCP-LISTEN:42,reuseaddr,fork", "SYSTEM:echo $$SOCAT_PEERADDR"] }] });
    cluster.api.apply(&pod(namespace, "alone", server))?;
    cluster.api.apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "alone", "namespace": namespace },
        "spec": { "selector": { "app": "alone" }, "ports": [{ "port": 42 }] },
    }))?;
    cluster.pod_ready(namespace, "alone")?;
    let peer = eventually("it answers", SOON, || {
        cluster.exec(namespace, "alone", "main", &["nc", "-w", "2", "alone", "42"])
    })?;
    ensure!(!peer.trim().is_empty() && !peer.starts_with("169.254."), "it sees {peer}");
    Ok(())
}

pub fn services_over_ipv6(_: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    both(cluster, namespace, 2)?;
    let server = json!({ "containers": [{ "image": "alpine/socat", "args": ["TCP6-LISTEN:42,reuseaddr,fork", "SYSTEM:echo six"] }] });
    cluster.api.apply(&pod(namespace, "six", server))?;
    cluster.api.apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "six", "namespace": namespace },
        "spec": { "selector": { "app": "six" }, "ipFamilyPolicy": "RequireDualStack", "ports": [{ "port": 42 }] },
    }))?;
    cluster.pod_ready(namespace, "six")?;
    let answer = eventually("it answers", SOON, || ask(cluster, namespace, &["-6", "six", "42"]))?;
    ensure!(answer.trim() == "six", "{answer}");
    Ok(())
}

pub fn from_outside(bed: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    let port = json!({ "containerPort": 42, "hostPort": 4242, "protocol": "TCP" });
    let server = json!({ "containers": [{ "image": "alpine/socat", "args": ["TCP-LISTEN:42,reuseaddr,fork", "SYSTEM:echo here"], "ports": [port] }] });
    cluster.api.apply(&pod(namespace, "server", server))?;
    cluster.api.apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "server", "namespace": namespace },
        "spec": { "type": "LoadBalancer", "selector": { "app": "server" }, "ports": [{ "port": 80, "targetPort": 42 }] },
    }))?;
    cluster.pod_ready(namespace, "server")?;
    let get = |path: &str, of: &str| {
        cluster.kubectl(&["get", "-n", namespace, of, "server", "-o", &format!("jsonpath={path}")])
    };
    let node = get("{.status.hostIP}", "pod")?;
    let balancer = eventually("an address", SOON, || {
        let address = get("{.status.loadBalancer.ingress[0].ip}", "service")?;
        ensure!(!address.is_empty(), "none yet");
        Ok(address)
    })?;
    // From a pod of the other cluster, whose address there is its node's.
    let west = bed.cluster("west")?;
    west.namespace(namespace)?;
    west.api.apply(&pod(namespace, "request", json!({})))?;
    west.pod_ready(namespace, "request")?;
    for (address, port) in [(node.as_str(), "4242"), (&balancer, "80")] {
        let answer = eventually("it answers", SOON, || ask(west, namespace, &[address, port]))?;
        ensure!(answer.trim() == "here", "{address} {port}: {answer}");
    }
    Ok(())
}

pub fn another_cluster(bed: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    let west = bed.cluster("west")?;
    west.namespace(namespace)?;
    for object in hello(namespace, 1) {
        west.api.apply(&object)?;
    }
    west.rolled_out(namespace, "deployment/hello")?;
    cluster.api.apply(&pod(namespace, "request", json!({})))?;
    cluster.pod_ready(namespace, "request")?;
    let ip = west.kubectl(&["get", "pods", "-n", namespace, "-o", "jsonpath={.items[0].status.podIP}"])?;
    for address in [ip, west.service_ip(namespace, "hello")?] {
        let answer = ask(cluster, namespace, &[&address, "42"]);
        ensure!(answer.is_err(), "{address} of another cluster answered {answer:?}");
    }
    let node = west.addresses.node(1).0.to_string();
    cluster
        .exec(namespace, "request", "main", &["ping", "-c", "1", "-W", "2", &node])
        .context("a node of the other cluster")?;
    Ok(())
}

pub fn the_hosts_network(_: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    let spec = json!({
        "hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet",
        "containers": [{ "image": "alpine/socat", "args": ["TCP-LISTEN:4343,reuseaddr,fork", "SYSTEM:echo host"] }],
    });
    cluster.api.apply(&pod(namespace, "host", spec))?;
    cluster.api.apply(&pod(namespace, "request", json!({})))?;
    let ip = ready_ip(cluster, namespace, "host")?;
    cluster.pod_ready(namespace, "request")?;
    ensure!(ip.starts_with("172.20.1."), "its address is {ip}");
    let answer = eventually("it answers", SOON, || ask(cluster, namespace, &[&ip, "4343"]))?;
    ensure!(answer.trim() == "host", "{answer}");
    // Services work from there too.
    let found = cluster.exec(namespace, "host", "main", &["getent", "ahostsv4", "kubernetes.default"])?;
    ensure!(found.contains("10.161.0.1"), "{found}");
    Ok(())
}
