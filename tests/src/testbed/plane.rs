//! A cluster's control plane, on its first node: begun for all clusters at once, finished one by one.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::addresses::Addresses;
use super::forward::Forward;
use super::{Cluster, Programs, READY, eventually, nodes, storage};
use crate::kube::{self, ADMIN_TOKEN, Api, Object};
use crate::netns::Namespace;
use crate::process::{Process, ProcessSpec};

/// What the controller manager does; others need clouds or volumes' drivers.
const CONTROLLERS: &[&str] = &[
    "namespace-controller",
    "garbage-collector-controller",
    "serviceaccount-controller",
    "deployment-controller",
    "replicaset-controller",
    "statefulset-controller",
    "daemonset-controller",
    "job-controller",
    "endpoints-controller",
    "endpointslice-controller",
    "root-ca-certificate-publisher-controller",
    "node-lifecycle-controller",
    "taint-eviction-controller",
    "disruption-controller",
    "pod-garbage-collector-controller",
    "persistentvolume-binder-controller",
    "persistentvolumeclaim-protection-controller",
    "clusterrole-aggregation-controller",
];

/// An API server that starts.
pub struct Begun {
    name: String,
    addresses: Addresses,
    dir: PathBuf,
    nodes: Vec<Namespace>,
    etcd: Process,
    api_server: Process,
}

pub fn begin(
    programs: &Programs,
    link: &Namespace,
    name: &str,
    addresses: Addresses,
    dir: &Path,
    nodes: u8,
) -> Result<Begun> {
    fs::create_dir_all(dir.join("logs"))?;
    let nodes = nodes::wire(link, addresses, name, nodes)?;
    let first = nodes.first().context("a cluster has a node at least")?;
    let at = addresses.api_server();
    let names = [
        "127.0.0.1",
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ];
    let names = names
        .map(str::to_owned)
        .into_iter()
        .chain([at.ip().to_string(), addresses.api_service().to_string()]);
    kube::secrets(dir, &names.collect::<Vec<_>>())?;
    fs::write(dir.join("admin.kubeconfig"), kube::kubeconfig(dir, at, ADMIN_TOKEN)?)?;
    let logs = dir.join("logs");
    let spec = |program: &str| {
        ProcessSpec::new(format!("{name}-{program}"), programs.kubernetes.join(program)).within(first)
    };
    let etcd = spec("etcd").args(etcd_args(dir, at)).spawn(&logs)?;
    let api_server = spec("kube-apiserver").args(api_server_args(dir, addresses)).spawn(&logs)?;
    Ok(Begun { name: name.to_owned(), addresses, dir: dir.to_owned(), nodes, etcd, api_server })
}

impl Begun {
    /// Everything else, once the API server answers. `merged` is the directory of the kubeconfig for all clusters.
    pub fn finish(self, programs: &Programs, merged: &Path) -> Result<Cluster> {
        let Self { name, addresses, dir, nodes, etcd, api_server } = self;
        let first = nodes.first().context("a cluster has a node at least")?;
        let kubeconfig = dir.join("admin.kubeconfig");
        let api = Api::connect(first, &kubeconfig)?;
        eventually("the API server answers", READY, || {
            ensure!(!api_server.has_exited() && !etcd.has_exited(), "{}\n{}", api_server.tail(), etcd.tail());
            api.get(&Object::new("v1", "Namespace", "", "kube-node-lease"))?
                .context("no namespaces yet")
                .map(drop)
        })?;
        let config = kubeconfig.display().to_string();
        let logs = dir.join("logs");
        let spec = |program: &str| {
            let spec = ProcessSpec::new(format!("{name}-{program}"), programs.kubernetes.join(program))
                .within(first);
            spec.args(["--kubeconfig", &config, "--leader-elect=false", "--bind-address=127.0.0.1"])
        };
        let scheduler = spec("kube-scheduler").spawn(&logs)?;
        let file = |name: &str| dir.join(name).display().to_string();
        let controllers = spec("kube-controller-manager").args([
            "--use-service-account-credentials=false".to_owned(),
            format!("--service-account-private-key-file={}", file("sa.key")),
            format!("--root-ca-file={}", file("ca.crt")),
            format!("--controllers={}", CONTROLLERS.join(",")),
        ]);
        let controllers = controllers.spawn(&logs)?;
        let mut processes = Vec::new();
        for (number, node) in (1..).zip(&nodes) {
            processes.extend(nodes::start(programs, &name, addresses, node, number, &dir)?);
        }
        processes.extend([scheduler, controllers, api_server, etcd]);
        storage::prepare(&api)?;
        let forward = Forward::start(first, addresses.api_server())?;
        let merged = merged.join("kubeconfig");
        add_context(&merged, &name, forward.address, &dir)?;
        Ok(Cluster {
            name,
            addresses,
            api,
            processes,
            _forward: forward,
            nodes,
            kubeconfig: merged,
            kubectl: programs.kubectl.clone(),
            dir,
        })
    }
}

fn etcd_args(dir: &Path, at: SocketAddr) -> Vec<String> {
    let (client, peer) = (format!("http://{}:2379", at.ip()), format!("http://{}:2380", at.ip()));
    vec![
        format!("--data-dir={}", dir.join("etcd").display()),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        "--unsafe-no-fsync".to_owned(),
        "--auto-compaction-retention=1".to_owned(),
    ]
}

fn api_server_args(dir: &Path, addresses: Addresses) -> Vec<String> {
    let (at, file) = (addresses.api_server(), |name: &str| dir.join(name).display().to_string());
    vec![
        format!("--etcd-servers=http://{}:2379", at.ip()),
        format!("--bind-address={}", at.ip()),
        format!("--advertise-address={}", at.ip()),
        format!("--secure-port={}", at.port()),
        format!("--service-cluster-ip-range={}", addresses.services()),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--allow-privileged=true".to_owned(),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        format!("--token-auth-file={}", file("tokens.csv")),
        format!("--client-ca-file={}", file("ca.crt")),
        format!("--tls-cert-file={}", file("server.crt")),
        format!("--tls-private-key-file={}", file("server.key")),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        format!("--service-account-key-file={}", file("sa.pub")),
        format!("--service-account-signing-key-file={}", file("sa.key")),
        format!("--audit-policy-file={}", file("audit.yaml")),
        format!("--audit-log-path={}", file("audit.log")),
        "--audit-log-mode=blocking".to_owned(),
    ]
}

/// Adds a context for programs on the machine itself; the first one is the current one.
fn add_context(path: &Path, name: &str, server: SocketAddr, dir: &Path) -> Result<()> {
    let mut config: Value = match fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text)?,
        Err(_) => {
            json!({ "apiVersion": "v1", "kind": "Config", "current-context": name, "clusters": [], "contexts": [], "users": [] })
        }
    };
    let ca =
        base64::Engine::encode(&base64::engine::general_purpose::STANDARD, fs::read(dir.join("ca.crt"))?);
    for (list, entry) in [
        ("clusters", json!({ "server": format!("https://{server}"), "certificate-authority-data": ca })),
        ("contexts", json!({ "cluster": name, "user": name })),
        ("users", json!({ "token": ADMIN_TOKEN })),
    ] {
        let key = list.trim_end_matches('s');
        config[list].as_array_mut().context("no list")?.push(json!({ "name": name, key: entry }));
    }
    Ok(fs::write(path, serde_json::to_string_pretty(&config)?)?)
}
