//! A node: its object, its lease, and the pods that are scheduled to it, each with a task of its own.
//!
//! The program runs in the node's network namespace: what it connects to and probes, it does from the node's address.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Config};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::watch;
use tombolo_runtime::signals::Signals;
use tombolo_runtime::tasks::TaskGroup;

use super::balancers;
use super::network::{Addresses, Network};
use super::pod::{self, Node};
use super::timestamp;

/// A quarter of what the node lifecycle controller waits for.
const RENEW: Duration = Duration::from_secs(10);
/// A node that ends takes its containers with it; this is for what they may still say.
const GRACE: Duration = Duration::from_millis(200);

/// What a node is told, in a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeConfig {
    pub name: String,
    pub kubeconfig: PathBuf,
    pub dir: PathBuf,
    pub host: PathBuf,
    pub netns: PathBuf,
    pub programs: BTreeMap<String, PathBuf>,
    pub node_v4: Ipv4Addr,
    pub node_v6: Ipv6Addr,
    pub pods_v4: Ipv4Addr,
    pub pods_v6: Ipv6Addr,
    pub cluster_pods_v4: String,
    pub cluster_pods_v6: String,
    pub dns: IpAddr,
    pub api_service: IpAddr,
    pub labels: BTreeMap<String, String>,
    /// Where exec, logs and port-forward are served.
    pub kubelet_port: u16,
    /// Addresses for Services of type LoadBalancer, from the first to the last; of one node of a cluster.
    pub balancers: Option<(Ipv4Addr, Ipv4Addr)>,
}

/// Runs until SIGTERM.
pub async fn run(config: NodeConfig) -> Result<()> {
    let mut signals = Signals::listen()?;
    let kubeconfig = Kubeconfig::read_from(&config.kubeconfig)?;
    let client =
        Client::try_from(Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?)?;
    let network = Network::prepare(Addresses {
        node: config.node_v4,
        node_v6: config.node_v6,
        pods: config.pods_v4,
        pods_v6: config.pods_v6,
        cluster: config.cluster_pods_v4.clone(),
        cluster_v6: config.cluster_pods_v6.clone(),
    })?;
    let tasks = TaskGroup::new();
    let names = ["tombolo", "coredns"];
    let programs = names.into_iter().filter_map(|name| Some((name, config.programs.get(name)?.clone())));
    let node = Arc::new(Node {
        client: client.clone(),
        name: config.name.clone(),
        network: Arc::new(network),
        dir: config.dir.clone(),
        host: config.host.clone(),
        netns: config.netns.clone(),
        programs: programs.collect(),
        dns: (config.dns, "cluster.local".to_owned()),
        api_service: config.api_service,
        tasks: tasks.clone(),
    });
    if let Some(pool) = config.balancers {
        tasks.spawn("load balancers", balancers::run(client.clone(), pool));
    }
    tasks.spawn("node status", keep(client, config));
    tokio::select! {
        signal = signals.next() => tracing::info!(signal, "ending"),
        () = pods(node) => {}
    }
    tasks.shutdown(GRACE).await;
    Ok(())
}

/// Keeps the node's object and lease.
async fn keep(client: Client, config: NodeConfig) {
    loop {
        let pause = match register(&client, &config).await {
            Ok(()) => RENEW,
            Err(error) => {
                tracing::warn!("the node's object: {error:#}");
                Duration::from_millis(300)
            }
        };
        tokio::time::sleep(pause).await;
    }
}

async fn register(client: &Client, config: &NodeConfig) -> Result<()> {
    let NodeConfig { name, node_v4, node_v6, pods_v4, pods_v6, .. } = config;
    let mut labels = json!({
        "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
        "node.kubernetes.io/instance-type": "testbed",
    });
    for (key, value) in &config.labels {
        labels[key] = json!(value);
    }
    let object = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": name, "labels": labels },
        "spec": {
            "podCIDR": format!("{pods_v4}/24"), "podCIDRs": [format!("{pods_v4}/24"), format!("{pods_v6}/64")],
            "providerID": format!("testbed://{name}"),
        },
    });
    let core = |kind: &str| ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", kind));
    let nodes: Api<DynamicObject> = Api::all_with(client.clone(), &core("Node"));
    let apply = PatchParams::apply("testbed").force();
    nodes.patch(name, &apply, &Patch::Apply(&object)).await.context("make the node")?;
    let now = timestamp();
    let condition = |kind: &str, status: &str, reason: &str| json!({ "type": kind, "status": status, "reason": reason, "message": "", "lastHeartbeatTime": now });
    let resources = json!({ "cpu": "32", "memory": "128Gi", "pods": "110", "ephemeral-storage": "100Gi" });
    let status = json!({ "status": {
        "addresses": [
            { "type": "InternalIP", "address": node_v4 }, { "type": "InternalIP", "address": node_v6 },
            { "type": "Hostname", "address": name },
        ],
        "daemonEndpoints": { "kubeletEndpoint": { "Port": config.kubelet_port } },
        "capacity": resources, "allocatable": resources,
        "conditions": [
            condition("Ready", "True", "KubeletReady"),
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure"),
            condition("PIDPressure", "False", "KubeletHasSufficientPID"),
        ],
        "nodeInfo": {
            "machineID": name, "systemUUID": name, "bootID": name, "kernelVersion": "", "osImage": "testbed",
            "containerRuntimeVersion": "testbed://1", "kubeletVersion": "v1.37.2", "kubeProxyVersion": "",
            "operatingSystem": "linux", "architecture": "amd64",
        },
    } });
    nodes.patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await.context("its status")?;
    let lease = json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": { "name": name, "namespace": "kube-node-lease" },
        "spec": { "holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": now.replace('Z', ".000000Z") },
    });
    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("coordination.k8s.io", "v1", "Lease"));
    let leases: Api<DynamicObject> = Api::namespaced_with(client.clone(), "kube-node-lease", &kind);
    leases.patch(name, &apply, &Patch::Apply(&lease)).await.context("its lease")?;
    Ok(())
}

/// One task a pod, for as long as the API has it.
async fn pods(node: Arc<Node>) {
    let api: Api<Pod> = Api::all(node.client.clone());
    let config = watcher::Config::default().fields(&format!("spec.nodeName={}", node.name));
    let mut events = Box::pin(watcher(api, config).default_backoff());
    let mut known: BTreeMap<String, watch::Sender<Pod>> = BTreeMap::new();
    let mut listed: Option<Vec<String>> = None;
    let uid = |pod: &Pod| pod.metadata.uid.clone().unwrap_or_default();
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => listed = Some(Vec::new()),
            Ok(Event::InitApply(pod) | Event::Apply(pod)) => {
                let uid = uid(&pod);
                if let Some(listed) = &mut listed {
                    listed.push(uid.clone());
                }
                match known.get(&uid) {
                    Some(task) => drop(task.send_replace(pod)),
                    None => {
                        let (sender, latest) = watch::channel(pod);
                        node.tasks.spawn("pod", pod::run(Arc::clone(&node), latest));
                        known.insert(uid, sender);
                    }
                }
            }
            // A task whose sender is gone takes its pod down at once.
            Ok(Event::Delete(pod)) => drop(known.remove(&uid(&pod))),
            Ok(Event::InitDone) => {
                let listed = listed.take().unwrap_or_default();
                known.retain(|uid, _| listed.contains(uid));
            }
            Err(error) => tracing::warn!("watch pods: {error}"),
        }
    }
}
