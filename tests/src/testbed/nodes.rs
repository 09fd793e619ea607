//! Nodes: their cables, and what runs on each of them.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::Programs;
use super::addresses::Addresses;
use crate::netns::{NETNS_DIR, Namespace, VethEnd, veth};
use crate::pods::node::NodeConfig;
use crate::process::{Process, ProcessSpec};

const KUBELET: u16 = 10250;

/// A cluster's nodes on a bridge of the link namespace; pods of one node are reached by the others.
pub fn wire(link: &Namespace, addresses: Addresses, cluster: &str, count: u8) -> Result<Vec<Namespace>> {
    let bridge = addresses.bridge();
    link.ip(&["link", "add", &bridge, "type", "bridge"])?;
    let (v4, v6) = addresses.link();
    link.add_address(&bridge, &format!("{v4}/24"))?;
    link.add_address(&bridge, &format!("{v6}/64"))?;
    link.ip(&["link", "set", &bridge, "up"])?;
    let label: String =
        cluster.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).take(16).collect();
    let mut nodes = Vec::new();
    for number in 1..=count {
        let node = Namespace::create(&format!("{label}_{number}"))?;
        let (address, address_v6) = addresses.node(number);
        let port = format!("{bridge}n{number}");
        link.sysctl("net.ipv6.conf.default.accept_dad", "0")?;
        node.sysctl("net.ipv6.conf.default.accept_dad", "0")?;
        // The link's end of a bridged cable needs no address of its own; a documentation one does no harm.
        veth(
            VethEnd { namespace: link, device: &port, address: "192.0.2.1/32" },
            VethEnd { namespace: &node, device: "eth0", address: &format!("{address}/24") },
            1500,
        )?;
        link.ip(&["addr", "flush", "dev", &port])?;
        link.ip(&["link", "set", &port, "master", &bridge])?;
        node.add_address("eth0", &format!("{address_v6}/64"))?;
        node.add_route("default", v4.into())?;
        node.add_route("default", v6.into())?;
        for other in (1..=count).filter(|other| *other != number) {
            let (to, to_v6) = addresses.node(other);
            let (pods, pods_v6) = addresses.pods(other);
            node.add_route(&format!("{pods}/24"), to.into())?;
            node.add_route(&format!("{pods_v6}/64"), to_v6.into())?;
        }
        nodes.push(node);
    }
    Ok(nodes)
}

/// kube-proxy, the node's pods, and what kubectl talks to.
pub fn start(
    programs: &Programs,
    cluster: &str,
    addresses: Addresses,
    namespace: &Namespace,
    number: u8,
    dir: &Path,
) -> Result<Vec<Process>> {
    let name = format!("{cluster}-{number}");
    let own = dir.join(format!("node-{number}"));
    fs::create_dir_all(own.join("host"))?;
    fs::create_dir_all(own.join("ended"))?;
    let (logs, kubeconfig) = (dir.join("logs"), dir.join("admin.kubeconfig"));
    let (node_v4, node_v6) = addresses.node(number);
    let (pods_v4, pods_v6) = addresses.pods(number);
    let (cluster_pods_v4, cluster_pods_v6) = addresses.cluster_pods();
    let proxied = format!("{cluster_pods_v4},{cluster_pods_v6}");
    let config = NodeConfig {
        name: name.clone(),
        kubeconfig: kubeconfig.clone(),
        dir: own.clone(),
        // Of the cluster: a volume is there on every node.
        host: dir.join("host"),
        netns: Path::new(NETNS_DIR).join(namespace.name()),
        programs: BTreeMap::from([
            ("tombolo".to_owned(), programs.tombolo.clone()),
            ("coredns".to_owned(), programs.coredns.clone()),
        ]),
        node_v4,
        node_v6,
        pods_v4,
        pods_v6,
        cluster_pods_v4,
        cluster_pods_v6,
        dns: addresses.dns(),
        api_service: addresses.api_service(),
        labels: BTreeMap::from([
            ("topology.kubernetes.io/region".to_owned(), cluster.to_owned()),
            ("topology.kubernetes.io/zone".to_owned(), format!("{cluster}-{number}")),
        ]),
        kubelet_port: KUBELET,
        balancers: (number == 1).then(|| addresses.balancers()),
    };
    let file = own.join("node.json");
    fs::write(&file, serde_json::to_vec_pretty(&config)?)?;
    let agent = ProcessSpec::new(format!("{cluster}-node-{number}"), &programs.testbed).within(namespace);
    let agent = agent.arg("node").arg(&file).spawn(&logs)?;
    let proxy =
        ProcessSpec::new(format!("{cluster}-kube-proxy-{number}"), &programs.kube_proxy).within(namespace);
    let settings = own.join("kube-proxy.json");
    fs::write(&settings, proxy_settings(&name, &kubeconfig, &proxied).to_string())?;
    let proxy = proxy.args([format!("--config={}", settings.display())]);
    let proxy = proxy.spawn(&logs)?;
    let streams =
        ProcessSpec::new(format!("{cluster}-kubelet-{number}"), &programs.kubelet).within(namespace);
    let streams = streams.args([
        format!("--listen={}:{KUBELET}", IpAddr::from(node_v4)),
        format!("--cert={}", dir.join("server.crt").display()),
        format!("--key={}", dir.join("server.key").display()),
        format!("--dir={}", own.display()),
        format!("--enter={}", programs.testbed.display()),
    ]);
    let streams = streams.spawn(&logs)?;
    Ok(vec![agent, streams, proxy])
}

fn proxy_settings(node: &str, kubeconfig: &Path, pods: &str) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "clientConnection": { "kubeconfig": kubeconfig }, "hostnameOverride": node,
        "mode": "nftables", "detectLocalMode": "ClusterCIDR", "clusterCIDR": pods,
        // As soon as something has changed, instead of once a second: tests wait for it.
        "nftables": { "minSyncPeriod": "50ms", "syncPeriod": "60s" },
        // A namespace has no say in these.
        "conntrack": { "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s" },
    })
}
