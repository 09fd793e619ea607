//! Two clusters with an API server, a federator and a shared sidecar each, and pods as far as the API server sees them:
//! their addresses are the namespace's own, what runs there is real.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_tests::kube::{Binaries, ControlPlane, Object, condition};
use tombolo_tests::mesh::{Layout, Mesh, http_get_from};
use tombolo_tests::scenario::{application, metric};
use tombolo_tests::usage;

pub const MCS: &str = "multicluster.x-k8s.io/v1beta1";
pub const SOON: Duration = Duration::from_secs(15);
const SYSTEM: &str = "tombolo-system";
const SHOP: &str = "shop";
/// Of the shared sidecars, and of pods.
pub const SHARED: [u8; 2] = [30, 32];
pub const CART: u8 = 33;
pub const OTHER: u8 = 34;
pub const NOBODY: u8 = 35;
pub const WEB: [u8; 2] = [36, 37];

pub struct Site {
    pub mesh: Mesh,
    pub east: ControlPlane,
    pub west: ControlPlane,
}

impl Site {
    pub fn start(bin: &Binaries) -> Result<Self> {
        let mut mesh = Mesh::start(&Layout { gateways: 1, ..Layout::default() })?;
        let east = ControlPlane::start(bin, &mut mesh, "east")?;
        let west = ControlPlane::start(bin, &mut mesh, "west")?;
        for plane in [&east, &west] {
            plane.federate_with(&mut mesh, &["--kubernetes-shared", "tombolo-system/tombolo-shared"])?;
        }
        let site = Self { mesh, east, west };
        for cluster in ["east", "west"] {
            let api = &site.plane(cluster).api;
            api.apply(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": SHOP } }))?;
            ["cart", "other", "web"].iter().try_for_each(|name| site.account(cluster, name))?;
            // Kubernetes' own controller leaves pods out whose node it does not know.
            api.apply(&json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node" } }))?;
            let metadata = json!({ "name": "tombolo-shared", "namespace": SYSTEM });
            let spec = json!({ "clusterIP": "None", "ports": [{ "name": "metrics", "port": 7445 }] });
            api.apply(&json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec }))?;
        }
        Ok(site)
    }

    pub fn plane(&self, cluster: &str) -> &ControlPlane {
        if cluster == "east" { &self.east } else { &self.west }
    }

    pub fn ip(&self, cluster: &str, host: u8) -> Result<IpAddr> {
        Ok(self.at(cluster, host, 0)?.ip())
    }

    pub fn at(&self, cluster: &str, host: u8, port: u16) -> Result<SocketAddr> {
        Ok(self.mesh.cluster(cluster)?.address(host, port))
    }

    /// A shared sidecar, with nothing but its service account.
    pub fn shared(&mut self, cluster: &str, host: u8) -> Result<()> {
        let name = format!("shared-{host}");
        let kubeconfig = self.plane(cluster).kubeconfig_of("tombolo-shared")?.display().to_string();
        let federator = self.at(cluster, 1, 7443)?.to_string();
        let token = self.mesh.path(&format!("{cluster}/pods.token"));
        std::fs::write(&token, self.mesh.operate(cluster, &["token", "pods", "--federator", &federator])?)?;
        let (token, state) =
            (token.display().to_string(), self.mesh.state(cluster, &name).display().to_string());
        let (ip, admin) = (self.ip(cluster, host)?.to_string(), self.at(cluster, host, 7445)?.to_string());
        let args = ["sidecar", "shared", "--kubernetes", &kubeconfig, "--trust-domain", "acme.example"];
        let args = [&args[..], &["--address", &ip, "--front", &ip, "--name", &name]].concat();
        let args =
            [&args[..], &["--join-token-file", &token, "--state-dir", &state, "--admin", &admin]].concat();
        let spec = self.mesh.spec(cluster, &name, &args)?;
        self.mesh.spawn(&format!("{cluster}/{name}"), spec)?;
        self.mesh.ready(cluster, host, &name)
    }

    /// These replicas are ready, as Kubernetes would have it by their readiness.
    pub fn replicas(&self, cluster: &str, hosts: &[u8]) -> Result<()> {
        let endpoint = |host: &u8| {
            Ok(
                json!({ "addresses": [self.ip(cluster, *host)?.to_string()], "conditions": { "ready": true } }),
            )
        };
        let endpoints = hosts.iter().map(endpoint).collect::<Result<Vec<_>>>()?;
        let metadata = json!({
            "name": "tombolo-shared-1", "namespace": SYSTEM,
            "labels": { "kubernetes.io/service-name": "tombolo-shared" },
        });
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata,
            "addressType": "IPv4", "endpoints": endpoints, "ports": [{ "name": "metrics", "port": 7445 }],
        });
        self.plane(cluster).api.apply(&slice).map(drop)
    }

    /// A running pod of a service account with one of the namespace's addresses.
    pub fn pod(&self, cluster: &str, name: &str, account: &str, host: u8, more: Value) -> Result<()> {
        let ip = self.ip(cluster, host)?.to_string();
        self.pod_at(cluster, (name, account), &ip, more)
    }

    /// The same with an address that nobody has.
    pub fn pod_at(&self, cluster: &str, (name, account): (&str, &str), ip: &str, more: Value) -> Result<()> {
        let api = &self.plane(cluster).api;
        let mut metadata = json!({ "name": name, "namespace": SHOP, "labels": { "app": account } });
        for (key, value) in more.as_object().into_iter().flatten() {
            metadata["labels"][key] = value.clone();
        }
        let spec = json!({
            "serviceAccountName": account, "nodeName": "node", "automountServiceAccountToken": false,
            "containers": [{ "name": "app", "image": "app" }],
        });
        api.create(&json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec }))?;
        let status = json!({
            "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }],
            "conditions": [{ "type": "Ready", "status": "True" }],
        });
        api.merge_status(&Object::new("v1", "Pod", SHOP, name), json!({ "status": status }))
    }

    pub fn account(&self, cluster: &str, name: &str) -> Result<()> {
        let metadata = json!({ "name": name, "namespace": SHOP });
        let account = json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata });
        self.plane(cluster).api.apply(&account).map(drop)
    }

    /// What a shared sidecar has made itself: what it costs beside its program.
    pub fn memory_bytes(&self, cluster: &str, host: u8) -> Result<u64> {
        let process = self.mesh.process(&format!("{cluster}/shared-{host}"))?;
        usage::anonymous_bytes(process.pid()).context("it has ended")
    }

    pub fn kill_pod(&self, cluster: &str, name: &str) -> Result<()> {
        self.plane(cluster).api.kill(&Object::new("v1", "Pod", SHOP, name))
    }

    /// An HTTP server that says who it is.
    pub fn server(&mut self, cluster: &str, name: &str, host: u8, says: &str) -> Result<()> {
        let at = self.at(cluster, host, 8080)?;
        application(&mut self.mesh, cluster, name, at, says)
    }

    pub fn service(&self, cluster: &str, name: &str, app: &str, ports: Value) -> Result<()> {
        let metadata = json!({ "name": name, "namespace": SHOP });
        let spec = json!({ "selector": { "app": app }, "ports": ports });
        let service = json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec });
        self.plane(cluster).api.apply(&service).map(drop)
    }

    pub fn export(&self, cluster: &str, name: &str) -> Result<()> {
        let metadata = json!({ "name": name, "namespace": SHOP });
        let export = json!({ "apiVersion": MCS, "kind": "ServiceExport", "metadata": metadata });
        self.plane(cluster).api.create(&export).map(drop)
    }

    /// Where the derived `Service`'s slices lead for one of its ports, as a proxy of a node would read them.
    pub fn led_to(&self, cluster: &str, service: &str, port: u16) -> Result<Vec<SocketAddr>> {
        let api = &self.plane(cluster).api;
        let import = api.get(&Object::new(MCS, "ServiceImport", SHOP, service))?.context("no import")?;
        let derived = &import["metadata"]["annotations"]["multicluster.kubernetes.io/derived-service"];
        let derived = derived.as_str().context("no derived Service")?;
        let found = api.get(&Object::new("v1", "Service", SHOP, derived))?.context("no derived Service")?;
        let of_port = |ports: &Value, number: u16| {
            ports.as_array().into_iter().flatten().find(|p| p["port"] == number).cloned()
        };
        let wanted = of_port(&found["spec"]["ports"], port).context("the Service lacks the port")?;
        let mut addresses = Vec::new();
        for slice in api.list(&Object::new("discovery.k8s.io/v1", "EndpointSlice", SHOP, ""))? {
            if slice["metadata"]["labels"]["kubernetes.io/service-name"] != derived {
                continue;
            }
            let named = |p: &&Value| {
                p["name"].as_str().unwrap_or("") == wanted["name"].as_str().unwrap_or("")
                    && p["protocol"] == wanted["protocol"]
            };
            let number = slice["ports"].as_array().into_iter().flatten().find(named);
            let Some(number) = number.and_then(|p| p["port"].as_u64()) else { continue };
            ensure!(wanted["targetPort"] == number, "{wanted} {slice}");
            for endpoint in slice["endpoints"].as_array().into_iter().flatten() {
                let ip: IpAddr = endpoint["addresses"][0].as_str().context("no address")?.parse()?;
                addresses.push(SocketAddr::new(ip, u16::try_from(number)?));
            }
        }
        Ok(addresses)
    }

    /// What a pod of west or east at `host` is answered by the derived `Service`, over the nth of the replicas.
    pub fn called(&self, cluster: &str, host: u8, service: &str, port: u16, nth: usize) -> Result<String> {
        let addresses = self.led_to(cluster, service, port)?;
        let to = addresses.get(nth).with_context(|| format!("nobody stands for it: {addresses:?}"))?;
        self.called_at(cluster, host, *to)
    }

    pub fn called_at(&self, cluster: &str, host: u8, to: SocketAddr) -> Result<String> {
        let from = self.ip(cluster, host)?;
        let answer = http_get_from(&self.mesh.cluster(cluster)?.namespace, from, to, "/")?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
        Ok(answer.lines().last().unwrap_or_default().to_owned())
    }

    pub fn becomes(&self, what: &str, check: impl Fn(&Self) -> Result<()>) -> Result<Duration> {
        let start = Instant::now();
        let took = self.mesh.eventually(what, SOON, |_| check(self));
        println!("{what} after {:?}", start.elapsed());
        took
    }

    /// Status, reason and message of an import's `Ready`.
    pub fn import_ready(&self, cluster: &str, service: &str) -> Result<(String, String)> {
        let import = Object::new(MCS, "ServiceImport", SHOP, service);
        let import = self.plane(cluster).api.get(&import)?.context("no import")?;
        Ok(condition(&import, "Ready"))
    }

    pub fn shared_metric(&self, cluster: &str, host: u8, name: &str, labels: &[&str]) -> Result<f64> {
        let metrics = self.mesh.metrics(cluster, host)?;
        Ok(metric(&metrics, &format!("tombolo_sidecar_shared_{name}"), labels))
    }

    pub fn stop(self) -> Result<()> {
        let Self { mut mesh, east, west } = self;
        east.stop(&mut mesh)?;
        west.stop(&mut mesh)
    }
}
