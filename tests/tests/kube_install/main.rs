//! Installing into Kubernetes: the chart by helm and by the command, against a real API server that judges every object and
//! every right.
//!
//! No kubelet: nothing of what is installed runs here. What pods do is in `gateways`: the same roles, started beside the API
//! server, with tokens that it has bound to pods.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_tests::capability::require_netns;
use tombolo_tests::kube::{ControlPlane, Object, Tools, require_control_plane, require_tools};
use tombolo_tests::mesh::{Layout, Mesh};

mod gateways;
mod render;

const NAMESPACE: &str = "tombolo-system";
const GIVEN: [&str; 4] = ["--set", "cluster=east", "--set", "trustDomain=acme.example"];

fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/helm/tombolo")
}

/// One cluster with its administrator's tools.
struct World {
    mesh: Mesh,
    plane: ControlPlane,
    tools: Tools,
    kubeconfig: PathBuf,
}

impl World {
    fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.tools.kubectl(&self.mesh, "east", &self.kubeconfig, args)
    }

    /// The command, by the administrator's kubeconfig.
    fn tombolo(&self, args: &[&str]) -> Result<String> {
        let kubeconfig = self.kubeconfig.display().to_string();
        let spec = self.mesh.spec("east", "install", &[args, &["--kubeconfig", &kubeconfig]].concat())?;
        spec.run(&self.mesh.logs()?, Duration::from_secs(60))
    }

    fn refused(&self, args: &[&str]) -> Result<String> {
        let done = self.tombolo(args);
        Ok(done.err().with_context(|| format!("{args:?} was not refused"))?.to_string())
    }

    fn get(&self, version: &str, kind: &str, name: &str) -> Result<Option<Value>> {
        let cluster_wide =
            kind.starts_with("ClusterRole") || kind.ends_with("Configuration") || kind == "Namespace";
        let namespace = if cluster_wide { "" } else { NAMESPACE };
        self.plane.api.get(&Object::new(version, kind, namespace, name))
    }

    /// What is installed, by what the API server holds.
    fn install(&self) -> Result<()> {
        let trust = self.mesh.path("east/trust").display().to_string();
        let install = |more: &[&str]| {
            let args = ["install", "--cluster", "east", "--trust-dir", &trust, "--no-wait"];
            [&args[..], more].concat().iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>()
        };
        let run = |args: Vec<String>| self.tombolo(&args.iter().map(String::as_str).collect::<Vec<_>>());
        let no_storage = run(install(&[])).err().context("a claim that nobody provides for was made")?;
        ensure!(no_storage.to_string().contains("no default StorageClass"), "{no_storage}");
        ensure!(self.get("v1", "Namespace", NAMESPACE)?.is_none(), "it was refused after it had begun");

        let without = ["--set", "federator.persistence.enabled=false", "--preset", "node-port"];
        let said = run(install(&[&without[..], &["--set", "gateway.replicas=3"]].concat()))?;
        ensure!(said.contains("objects applied") && said.contains("link token"), "{said}");
        for (version, kind, name) in [
            ("v1", "Secret", "tombolo-trust"),
            ("apps/v1", "StatefulSet", "tombolo-federator"),
            ("apps/v1", "StatefulSet", "tombolo-gateway"),
            ("v1", "Service", "tombolo-gateway-2"),
            ("rbac.authorization.k8s.io/v1", "ClusterRole", "tombolo-federator"),
            ("policy/v1", "PodDisruptionBudget", "tombolo-gateway"),
        ] {
            self.get(version, kind, name)?.with_context(|| format!("no {kind}/{name}"))?;
        }
        let secret = self.get("v1", "Secret", "tombolo-trust")?.unwrap_or_default();
        let files = secret["data"].as_object().context("the Secret is empty")?;
        ensure!(
            ["ca.key", "ca.crt", "bundle.json", "cluster.json"].iter().all(|f| files.contains_key(*f)),
            "{files:?}"
        );
        let federator = self.get("apps/v1", "StatefulSet", "tombolo-federator")?.unwrap_or_default();
        let args = federator["spec"]["template"]["spec"]["containers"][0]["args"].to_string();
        ensure!(args.contains("--kubernetes-gateways=tombolo-system/tombolo-gateway"), "{args}");
        let again = run(install(&without)).err().context("it was installed twice")?.to_string();
        ensure!(again.contains("tombolo upgrade"), "{again}");
        Ok(())
    }

    /// Values stay, what is rendered no more goes, and the keys are left alone.
    fn upgrade(&self) -> Result<()> {
        let before = self.get("v1", "Secret", "tombolo-trust")?.context("no Secret")?;
        let said = self.tombolo(&["upgrade", "--set", "gateway.replicas=2", "--no-wait"])?;
        ensure!(said.contains("service/tombolo-gateway-2 in tombolo-system is needed no more"), "{said}");
        ensure!(self.get("v1", "Service", "tombolo-gateway-2")?.is_none());
        let gateway = self.get("apps/v1", "StatefulSet", "tombolo-gateway")?.context("no gateways")?;
        ensure!(gateway["spec"]["replicas"] == 2, "{gateway}");
        let service = self.get("v1", "Service", "tombolo-gateway-0")?.context("no Service")?;
        ensure!(service["spec"]["type"] == "NodePort", "the preset was forgotten: {service}");
        let federator = self.get("apps/v1", "StatefulSet", "tombolo-federator")?.context("no federator")?;
        ensure!(federator["spec"].get("volumeClaimTemplates").is_none(), "the values were forgotten");
        let after = self.get("v1", "Secret", "tombolo-trust")?.context("the keys are gone")?;
        ensure!(
            before["metadata"]["resourceVersion"] == after["metadata"]["resourceVersion"],
            "they were written"
        );
        let wrong = self.refused(&["upgrade", "--set", "gateway.replica=2"])?;
        ensure!(wrong.contains("gateway.replica: there is no such value"), "{wrong}");
        // A later version is not taken back.
        let record = Object::new("v1", "ConfigMap", NAMESPACE, "tombolo-install");
        self.plane.api.merge(&record, json!({ "data": { "version": "9.0.0" } }))?;
        let later = self.refused(&["upgrade", "--no-wait"])?;
        ensure!(
            later.contains("version 9.0.0 is installed") && later.contains("--allow-downgrade"),
            "{later}"
        );
        self.tombolo(&["upgrade", "--no-wait", "--allow-downgrade"]).map(drop)
    }

    /// The federator may do what it has to, and neither it nor the gateways more.
    fn rights(&self) -> Result<()> {
        for (account, verb, what, may) in [
            ("tombolo-federator", "create", "tokenreviews.authentication.k8s.io", true),
            ("tombolo-federator", "patch", "configmaps/tombolo-trust-bundle", true),
            ("tombolo-federator", "patch", "configmaps/other", false),
            ("tombolo-federator", "get", "secrets/tombolo-trust", false),
            ("tombolo-federator", "create", "pods", false),
            ("tombolo-gateway", "get", "services/tombolo-gateway-0", true),
            ("tombolo-gateway", "get", "services/tombolo-federator", false),
            ("tombolo-gateway", "list", "services", false),
            ("tombolo-gateway", "get", "secrets/tombolo-trust", false),
        ] {
            let who = format!("--as=system:serviceaccount:{NAMESPACE}:{account}");
            let said = self.kubectl(&["auth", "can-i", verb, what, "-n", NAMESPACE, &who]);
            let can = said.is_ok_and(|said| said.lines().any(|line| line.trim() == "yes"));
            ensure!(can == may, "{account} {verb} {what}: {can}");
        }
        Ok(())
    }

    /// Nothing is left but the definitions and other people's objects.
    fn uninstall(&self) -> Result<()> {
        let made = json!({ "app.kubernetes.io/managed-by": "tombolo" });
        let derived = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": "derived-x", "namespace": "default", "labels": made },
            "spec": { "ports": [{ "port": 80 }] },
        });
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4", "endpoints": [],
            "metadata": { "name": "imported-x", "namespace": "default", "labels": made },
        });
        let import = json!({
            "apiVersion": "multicluster.x-k8s.io/v1beta1", "kind": "ServiceImport",
            "metadata": { "name": "x", "namespace": "default", "labels": made },
            "spec": { "type": "ClusterSetIP", "ports": [{ "port": 80 }] },
        });
        let other = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "others", "namespace": "default" },
            "spec": { "ports": [{ "port": 80 }] },
        });
        for object in [&derived, &slice, &import, &other] {
            self.plane.api.apply(object)?;
        }
        let asked = self.refused(&["uninstall"])?;
        ensure!(asked.contains("with the cluster's keys and links") && asked.contains("--yes"), "{asked}");
        let dry = self.tombolo(&["uninstall", "--dry-run"])?;
        for what in [
            "statefulset/tombolo-gateway in",
            "clusterrole/tombolo-federator would",
            "service/derived-x in default",
        ] {
            ensure!(dry.contains(what), "{what}: {dry}");
        }
        ensure!(!dry.contains("others"), "{dry}");
        ensure!(
            self.get("apps/v1", "StatefulSet", "tombolo-gateway")?.is_some(),
            "a dry run removed something"
        );
        let said = self.tombolo(&["uninstall", "--yes", "--timeout", "3s"])?;
        ensure!(said.contains("tombolo is removed") && said.contains("links are not taken down"), "{said}");
        self.nothing_is_left()?;
        let others = Object::new("v1", "Service", "default", "others");
        ensure!(self.plane.api.get(&others)?.is_some(), "somebody else's Service was removed");
        let crd = "serviceexports.multicluster.x-k8s.io";
        let definition = Object::new("apiextensions.k8s.io/v1", "CustomResourceDefinition", "", crd);
        ensure!(self.plane.api.get(&definition)?.is_some(), "definitions are to stay");
        let none = self.refused(&["uninstall", "--yes"])?;
        ensure!(none.contains("nothing is installed"), "{none}");
        Ok(())
    }

    fn nothing_is_left(&self) -> Result<()> {
        ensure!(self.get("v1", "Namespace", NAMESPACE)?.is_none(), "the namespace is left");
        for (version, kind) in [
            ("rbac.authorization.k8s.io/v1", "ClusterRole"),
            ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"),
            ("admissionregistration.k8s.io/v1", "MutatingWebhookConfiguration"),
            ("v1", "Service"),
            ("v1", "Secret"),
            ("v1", "ConfigMap"),
            ("apps/v1", "StatefulSet"),
            ("discovery.k8s.io/v1", "EndpointSlice"),
            ("multicluster.x-k8s.io/v1beta1", "ServiceImport"),
            ("coordination.k8s.io/v1", "Lease"),
        ] {
            for object in self.plane.api.list(&Object::new(version, kind, "", ""))? {
                let metadata = &object["metadata"];
                let name = metadata["name"].as_str().unwrap_or_default();
                let ours = metadata["labels"]["app.kubernetes.io/managed-by"].as_str().unwrap_or_default();
                ensure!(
                    !name.starts_with("tombolo") && !ours.starts_with("tombolo"),
                    "{kind} is left: {object}"
                );
            }
        }
        Ok(())
    }
}

#[test]
fn the_chart_and_the_command_install_the_same_into_a_real_cluster_and_leave_nothing_behind() -> Result<()> {
    const TEST: &str =
        "the_chart_and_the_command_install_the_same_into_a_real_cluster_and_leave_nothing_behind";
    let Some(tools) = require_tools(TEST) else { return Ok(()) };
    render::helm_accepts_the_chart(&tools)?;
    render::wrong_values_are_refused_by_both(&tools)?;
    render::the_command_renders_what_helm_renders(&tools)?;
    render::the_charts_rights_are_those_of_the_manifest(&tools)?;
    let Some(_) = require_netns(TEST) else { return Ok(()) };
    let Some(bin) = require_control_plane(TEST) else { return Ok(()) };
    let mut mesh = Mesh::unlinked(&Layout { clusters: &["east"], gateways: 0, ..Layout::default() })?;
    let plane = ControlPlane::start(&bin, &mut mesh, "east")?;
    let kubeconfig = mesh.path("east/kubernetes/admin.kubeconfig");
    let mut world = World { mesh, plane, tools, kubeconfig };
    render::the_api_server_accepts_every_object(&world).context("dry run")?;
    world.install().context("install")?;
    world.rights().context("rights")?;
    gateways::pods_of_the_right_account_become_gateways(&mut world).context("gateways")?;
    world.upgrade().context("upgrade")?;
    world.uninstall().context("uninstall")?;
    let World { mut mesh, plane, .. } = world;
    plane.stop(&mut mesh)
}
