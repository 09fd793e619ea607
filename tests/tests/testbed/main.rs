//! The testbed itself: what tests of others take for granted about pods, Services, DNS, probes, tokens and exec. Two
//! clusters of two nodes; one case after the other, each in a namespace of its own.

mod command;
mod life;
mod network;

use std::time::Instant;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tombolo_tests::capability::require_netns;
use tombolo_tests::cases::Cases;
use tombolo_tests::testbed::{Cluster, Layout, Programs, Testbed};

type Check = fn(&Testbed, &Cluster, &str) -> Result<()>;

/// A pod that does nothing but be there, with what is different about it.
fn pod(namespace: &str, name: &str, spec: Value) -> Value {
    let mut whole = json!({
        "terminationGracePeriodSeconds": 1,
        "containers": [{ "name": "main", "image": "nicolaka/netshoot:v0.15" }],
    });
    merge(&mut whole, &spec);
    json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "namespace": namespace, "labels": { "app": name } }, "spec": whole })
}

/// Objects are merged, anything else is replaced; the first element of two lists is merged too.
fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (Value::Array(into), Value::Array(from)) if into.len() == 1 && from.len() == 1 => {
            merge(&mut into[0], &from[0])
        }
        (into, from) => *into = from.clone(),
    }
}

/// The MCS suite's server: says which pod it is, over TCP and UDP.
fn hello(namespace: &str, replicas: u8) -> [Value; 2] {
    let container = |name: &str, listen: &str| {
        json!({
            "name": name, "image": "alpine/socat:1.7.4.4",
            "args": ["-v", format!("{listen}:42,crlf,reuseaddr,fork"), "SYSTEM:echo pod ip $(MY_POD_IP)"],
            "env": [{ "name": "MY_POD_IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } }],
        })
    };
    let labels = json!({ "app": "hello" });
    [
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "hello", "namespace": namespace },
            "spec": { "replicas": replicas, "selector": { "matchLabels": labels }, "template": {
                "metadata": { "labels": labels },
                "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "topologySpreadConstraints": [{ "maxSkew": 1, "topologyKey": "kubernetes.io/hostname",
                        "whenUnsatisfiable": "DoNotSchedule", "labelSelector": { "matchLabels": labels } }],
                    "containers": [container("tcp", "TCP-LISTEN"), container("udp", "UDP-LISTEN")],
                },
            } },
        }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "hello", "namespace": namespace },
            "spec": { "selector": labels, "ports": [
                { "name": "tcp", "port": 42, "protocol": "TCP" }, { "name": "udp", "port": 42, "protocol": "UDP" },
            ] },
        }),
    ]
}

const CASES: &[(&str, Check)] = &[
    ("a service is reached by name from another pod, on every node", network::a_service_by_name),
    ("a pod reaches itself by its service", network::a_pod_by_its_own_service),
    ("services are reached over IPv6", network::services_over_ipv6),
    ("host ports and load balancers are reached from outside the cluster", network::from_outside),
    ("pods of another cluster are out of reach, its nodes are not", network::another_cluster),
    ("a pod of the host's network is at the node's address", network::the_hosts_network),
    ("a readiness probe that fails takes a pod out, and one that succeeds takes it in", life::readiness),
    ("a liveness probe that fails has the container run again", life::liveness),
    ("exec runs in the container: its files, processes, network, name and exit code", life::exec),
    ("a token is for its audience and for its pod", life::tokens),
    ("init containers run before, sidecars beside, volumes are shared", life::init_and_sidecars),
    ("users and capabilities are those of the security context", life::privileges),
    ("files follow their ConfigMap", life::config_maps),
    ("a claim's files outlive the pod", life::claims),
    ("a pod that is deleted is asked to end, and then ended", life::ending),
    ("logs are what the container wrote", life::logs),
    ("whoever attaches sees what it writes until it ends", life::attach),
    ("an image that is not here is said so", life::unknown_images),
];

#[test]
fn pods_of_the_testbed_live_as_pods_do() -> Result<()> {
    let test = "pods_of_the_testbed_live_as_pods_do";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let Some(programs) = Programs::require(test) else { return Ok(()) };
    let begun = Instant::now();
    let bed = Testbed::start(programs, &Layout { nodes: 2, ..Layout::default() })?;
    println!("two clusters are ready after {:?}", begun.elapsed());
    let cluster = bed.cluster("east")?;
    let mut held = Cases::new(begun);
    for (number, (name, check)) in CASES.iter().enumerate() {
        let namespace = format!("case-{number}");
        cluster.namespace(&namespace)?;
        held.run(name, || check(&bed, cluster, &namespace));
    }
    let logs = cluster.logs();
    let stopped = Instant::now();
    let dir = bed.dir().to_owned();
    drop(bed);
    println!("taken down in {:?}", stopped.elapsed());
    anyhow::ensure!(!dir.exists(), "{} is still there", dir.display());
    held.end().context(logs)
}

/// The pod's address, once it is ready.
fn ready_ip(cluster: &Cluster, namespace: &str, name: &str) -> Result<String> {
    cluster.pod_ready(namespace, name)?;
    let ip = cluster.kubectl(&["get", "pod", "-n", namespace, name, "-o", "jsonpath={.status.podIP}"])?;
    (!ip.is_empty()).then_some(ip).context("the pod has no address")
}
