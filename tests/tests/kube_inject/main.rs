//! Sidecars for pods of a real Kubernetes API server: its webhook call, PodSecurity and TokenReview are the real ones, and the
//! federator has the rights of rbac.yaml and no others. No kubelet: what was injected is started by the test as the pod's
//! spec says. A control plane is expensive to start, so one test runs every case and names all that fail.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tombolo_tests::capability::{require_netns, require_programs};
use tombolo_tests::kube::{ControlPlane, Object, documents, require_control_plane};
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::scenario::metric;

mod admission;
mod data;
mod identity;

const WEBHOOK: &str = include_str!("../../../deploy/kubernetes/webhook.yaml");
const CONFIGURATION: &str = "MutatingWebhookConfiguration";
const ADMISSION: &str = "admissionregistration.k8s.io/v1";
const SYSTEM: &str = "tombolo-system";
const SOON: Duration = Duration::from_secs(20);

/// West, whose API server asks its federator about pods.
struct World {
    mesh: Mesh,
    west: ControlPlane,
    /// Names of pods that are made again and again.
    made: AtomicU32,
}

impl World {
    fn start(mut mesh: Mesh, west: ControlPlane) -> Result<Self> {
        west.install_crds(&mesh)?;
        let (webhook, federator) = {
            let cluster = mesh.cluster("west")?;
            (cluster.address(1, 9443), cluster.address(1, 7443).to_string())
        };
        let listen = webhook.to_string();
        west.federate_with(&mut mesh, &["--kubernetes-inject", &listen, "--inject-federator", &federator])?;
        for mut document in documents(WEBHOOK)? {
            if document["kind"] == "Service" {
                // No pod of this cluster is the federator: its endpoint is written by hand.
                document["spec"]["selector"] = Value::Null;
            }
            west.api.apply(&document)?;
        }
        let world = Self { mesh, west, made: AtomicU32::new(0) };
        world.endpoint(webhook)?;
        world.trusted()?;
        Ok(world)
    }

    fn endpoint(&self, webhook: SocketAddr) -> Result<()> {
        let metadata = json!({
            "name": "tombolo-webhook-1", "namespace": SYSTEM, "labels": { "kubernetes.io/service-name": "tombolo-webhook" },
        });
        self.west.api.apply(&json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata, "addressType": "IPv4",
            "endpoints": [{ "addresses": [webhook.ip().to_string()], "conditions": { "ready": true } }],
            "ports": [{ "name": "webhook", "port": webhook.port(), "protocol": "TCP" }],
        }))?;
        self.west.api.apply(&json!({
            "apiVersion": "v1", "kind": "Endpoints", "metadata": { "name": "tombolo-webhook", "namespace": SYSTEM },
            "subsets": [{
                "addresses": [{ "ip": webhook.ip().to_string() }],
                "ports": [{ "name": "webhook", "port": webhook.port(), "protocol": "TCP" }],
            }],
        }))?;
        Ok(())
    }

    fn configuration(&self) -> Object {
        Object::new(ADMISSION, CONFIGURATION, "", "tombolo-inject")
    }

    /// Waits until the API server trusts the webhook, and asks it.
    fn trusted(&self) -> Result<()> {
        self.west.api.until(&self.configuration(), SOON, |found| {
            let found = found.context("no configuration")?;
            for webhook in found["webhooks"].as_array().context("no webhooks")? {
                ensure!(webhook["clientConfig"]["caBundle"].is_string(), "{webhook}");
            }
            Ok(())
        })?;
        self.namespace("trusted", &[("tombolo.dev/inject", "enabled")])?;
        self.until_made("trusted", true)
    }

    /// Makes pods until one has a sidecar, or none.
    fn until_made(&self, namespace: &str, with_sidecar: bool) -> Result<()> {
        self.mesh.eventually("pods are made as they should be", SOON, |_| {
            let number = self.made.fetch_add(1, Relaxed);
            let made = self.create(&pod(namespace, &format!("made-{number}"), json!({}), json!({})))?;
            ensure!(sidecar(&made).is_some() == with_sidecar, "{made}");
            Ok(())
        })?;
        Ok(())
    }

    /// A namespace with its service accounts.
    fn namespace(&self, name: &str, labels: &[(&str, &str)]) -> Result<()> {
        let labels: serde_json::Map<_, _> =
            labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())).collect();
        let metadata = json!({ "name": name, "labels": labels });
        self.west.api.apply(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": metadata }))?;
        let web = json!({ "name": "web", "namespace": name });
        self.west.api.apply(&json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": web }))?;
        let account = Object::new("v1", "ServiceAccount", name, "default");
        self.west.api.until(&account, SOON, |found| found.context("no service account yet").map(drop))
    }

    fn create(&self, pod: &Value) -> Result<Value> {
        self.west.api.create(pod)
    }

    /// Why a pod is not made.
    fn refused(&self, pod: &Value) -> Result<String> {
        match self.create(pod) {
            Ok(made) => bail!("it was made: {made}"),
            Err(error) => Ok(format!("{error:#}")),
        }
    }
}

/// A pod that meets the standard `restricted` by itself. `annotations` and `spec` are added.
fn pod(namespace: &str, name: &str, annotations: Value, spec: Value) -> Value {
    let context =
        json!({ "runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": { "type": "RuntimeDefault" } });
    let own = json!({ "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } });
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": namespace, "annotations": annotations, "labels": { "app": "web" } },
        "spec": {
            "serviceAccountName": "web", "securityContext": context,
            "containers": [{
                "name": "app", "image": "app", "ports": [{ "name": "http", "containerPort": 8080 }], "securityContext": own,
                "readinessProbe": { "httpGet": { "path": "/healthz", "port": 8080 } },
            }],
        },
    });
    for (field, value) in spec.as_object().into_iter().flatten() {
        pod["spec"][field] = value.clone();
    }
    pod
}

fn container<'a>(pod: &'a Value, name: &str) -> Option<&'a Value> {
    let list = pod["spec"]["initContainers"].as_array()?;
    list.iter().find(|container| container["name"] == name)
}

fn sidecar(pod: &Value) -> Option<&Value> {
    container(pod, "tombolo-sidecar")
}

fn args(container: &Value) -> Vec<String> {
    let args = container["args"].as_array().into_iter().flatten();
    args.filter_map(Value::as_str).map(str::to_owned).collect()
}

#[test]
fn pods_of_a_real_api_server_get_sidecars_that_join_and_serve() -> Result<()> {
    let test = "pods_of_a_real_api_server_get_sidecars_that_join_and_serve";
    let programs = ["curl", "nft", "dig"];
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &programs)) else { return Ok(()) };
    let Some(bin) = require_control_plane(test) else { return Ok(()) };
    let mut mesh = Mesh::start(&Layout { clusters: &["west"], gateways: 1, ..Layout::default() })?;
    let west = ControlPlane::start(&bin, &mut mesh, "west")?;
    let mut world = World::start(mesh, west)?;
    type Case = fn(&mut World) -> Result<()>;
    let cases: [(&str, Case); 15] = [
        ("restricted", admission::restricted_namespaces_admit_pods_with_their_sidecar),
        ("baseline", admission::baseline_forbids_capture_and_says_so),
        ("captured", admission::pods_are_captured_where_nothing_forbids_it),
        ("choice", admission::pods_and_namespaces_choose),
        ("wrong", admission::what_a_pod_asks_for_wrongly_is_named),
        ("strangers", admission::strangers_get_clear_words_and_no_more),
        ("tokens", identity::only_the_pods_own_token_lets_it_join),
        ("served", data::a_pod_serves_what_kubernetes_sends_to_it),
        ("set_ip", data::a_cluster_set_ip_is_the_services_address),
        ("captured_pod", data::a_captured_pod_calls_as_always_and_is_called_by_the_mesh_alone),
        ("rotation", admission::certificates_rotate_while_pods_are_made),
        ("lost", admission::a_secret_that_is_lost_is_made_anew),
        ("foreign", admission::others_webhooks_are_left_alone),
        ("away", admission::without_a_federator_the_failure_policy_decides),
        ("rights", rights),
    ];
    let mut failed = Vec::new();
    #[allow(clippy::disallowed_methods)] // the test's own settings
    let only = std::env::var("TOMBOLO_CASE").ok();
    for (name, case) in cases.into_iter().filter(|(name, _)| only.as_deref().is_none_or(|only| only == *name))
    {
        let start = Instant::now();
        match case(&mut world) {
            Ok(()) => println!("{name}: ok in {:?}", start.elapsed()),
            Err(error) => {
                println!("{name}: FAILED: {error:#}");
                failed.push(format!("{name}: {error:#}"));
            }
        }
    }
    let World { mut mesh, west, made: _ } = world;
    let stopped = west.stop(&mut mesh);
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    stopped
}

/// The federator was let do everything that it asked for.
fn rights(world: &mut World) -> Result<()> {
    let forbidden = world.west.forbidden_to_federator()?;
    ensure!(forbidden.is_empty(), "{forbidden:?}");
    let metrics = world.mesh.metrics("west", 1)?;
    let injected = metric(&metrics, "tombolo_federator_inject_reviews_total", &["result=\"injected\""]);
    let failed = metric(&metrics, "tombolo_federator_inject_reviews_total", &["result=\"failed\""]);
    ensure!(injected > 0.0 && failed == 0.0, "{metrics}");
    Ok(())
}
