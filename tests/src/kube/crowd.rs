//! Thousands of pods that nobody runs: nodes that kwok pretends, the real scheduler that places pods on them, and kwok
//! that calls them running and gives them addresses.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{Binaries, ControlPlane, Object, text};
use crate::mesh::Mesh;

/// kwok and the scheduler have begun.
const READY: Duration = Duration::from_secs(60);
/// As many as kubelet takes by default.
const PODS_OF_A_NODE: usize = 110;
const MANAGED: &str = "kwok.x-k8s.io/node";

impl ControlPlane {
    /// Starts the scheduler and kwok, with nodes for so many pods; each pod gets an address of `10.128.0.0/12`.
    pub fn crowd(&self, bin: &Binaries, mesh: &mut Mesh, pods: usize) -> Result<()> {
        let kubeconfig = text(&self.dir.join("admin.kubeconfig"));
        let settings = self.dir.join("scheduler.json");
        let config = json!({
            "apiVersion": "kubescheduler.config.k8s.io/v1", "kind": "KubeSchedulerConfiguration",
            // As fast as the machine goes.
            "clientConnection": { "kubeconfig": kubeconfig, "qps": 1000, "burst": 1000 },
            "leaderElection": { "leaderElect": false },
        });
        std::fs::write(&settings, config.to_string())?;
        let spec = self.spec(mesh, bin, "kube-scheduler")?;
        let spec = spec.args([&format!("--config={}", text(&settings)), "--bind-address=127.0.0.1"]);
        mesh.spawn(&self.process("scheduler"), spec)?;
        let stages = self.dir.join("stages.yaml");
        let documents = stages_of_nodes_and_pods().map(|stage| stage.to_string());
        std::fs::write(&stages, documents.join("\n---\n"))?;
        let spec = self.spec(mesh, bin, "kwok")?.args([
            "--kubeconfig",
            &kubeconfig,
            &format!("--manage-nodes-with-annotation-selector={MANAGED}=fake"),
            &format!("--config={}", text(&stages)),
            "--node-ip=10.127.0.1",
            "--cidr=10.128.0.0/12",
        ]);
        mesh.spawn(&self.process("kwok"), spec)?;
        let nodes = pods.div_ceil(PODS_OF_A_NODE).max(1);
        for number in 0..nodes {
            let name = format!("fake-{number}");
            self.api.create(&node(&name))?;
            // Admission calls it not ready, and no controller here takes that back.
            self.api.merge(&Object::new("v1", "Node", "", &name), json!({ "spec": { "taints": null } }))?;
        }
        mesh.eventually("kwok's nodes are ready", READY, |mesh| {
            for name in ["scheduler", "kwok"] {
                let process = mesh.process(&self.process(name))?;
                ensure!(!process.has_exited(), "{}", process.tail());
            }
            let last = Object::new("v1", "Node", "", &format!("fake-{}", nodes - 1));
            let found = self.api.get(&last)?.context("no node")?;
            ensure!(super::condition(&found, "Ready").0.starts_with("True"), "{found}");
            Ok(())
        })?;
        Ok(())
    }

    /// Ends what [`Self::crowd`] has started; the pods stay as they are.
    pub fn disperse(&self, mesh: &mut Mesh) -> Result<()> {
        for name in ["scheduler", "kwok"] {
            mesh.process_mut(&self.process(name))?.stop()?;
        }
        Ok(())
    }

    fn process(&self, name: &str) -> String {
        format!("{}/{name}", self.cluster)
    }
}

/// What kwok makes of a node, and of a pod that has been placed: ready, at once.
fn stages_of_nodes_and_pods() -> [Value; 3] {
    let key = |key: &str, operator: &str| json!({ "key": key, "operator": operator });
    let stage = |name: &str, kind: &str, when: Value, next: Value| {
        json!({
            "apiVersion": "kwok.x-k8s.io/v1alpha1", "kind": "Stage", "metadata": { "name": name },
            "spec": {
                "resourceRef": { "apiGroup": "v1", "kind": kind },
                "selector": { "matchExpressions": when }, "next": next,
            },
        })
    };
    let condition = |name: &str| {
        format!(
            "- {{ type: {name}, status: \"True\", reason: Pretended, lastTransitionTime: {{{{ Now | Quote }}}} }}\n"
        )
    };
    let node = format!("phase: Running\nconditions:\n{}", condition("Ready"));
    let conditions: String = ["Initialized", "ContainersReady", "Ready"].map(condition).concat();
    let pod = format!(
        "phase: Running\nstartTime: {{{{ Now | Quote }}}}\nconditions:\n{conditions}{}",
        "hostIP: {{ NodeIPWith .spec.nodeName | Quote }}\n\
         podIP: {{ PodIPWith .spec.nodeName false .metadata.uid .metadata.name .metadata.namespace | Quote }}\n\
         containerStatuses:\n{{ range .spec.containers }}\
         - { name: {{ .name | Quote }}, image: {{ .image | Quote }}, ready: true, started: true, restartCount: 0,\
         \x20state: { running: { startedAt: {{ Now | Quote }} } } }\n{{ end }}"
    );
    let there = key(".metadata.deletionTimestamp", "DoesNotExist");
    let unready = json!([there, key(".status.conditions", "DoesNotExist")]);
    let placed = json!([there, { "key": ".status.phase", "operator": "In", "values": ["Pending"] }]);
    let going = json!([key(".metadata.deletionTimestamp", "Exists")]);
    [
        stage("node", "Node", unready, json!({ "statusTemplate": node })),
        stage("pod", "Pod", placed, json!({ "statusTemplate": pod })),
        stage("pod-goes", "Pod", going, json!({ "delete": true })),
    ]
}

fn node(name: &str) -> Value {
    let room = json!({ "cpu": "64", "memory": "256Gi", "pods": PODS_OF_A_NODE.to_string() });
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": name, "annotations": { (MANAGED): "fake" },
            "labels": { "kubernetes.io/hostname": name, "topology.kubernetes.io/zone": "a" },
        },
        "status": { "allocatable": room, "capacity": room },
    })
}
