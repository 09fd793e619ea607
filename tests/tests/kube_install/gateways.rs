//! Gateways as pods of Kubernetes: the federator says what joiners need to know, the API server whose token it is.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_tests::kube::Object;
use tombolo_tests::scenario::metric;

use super::{NAMESPACE, World};

const SOON: Duration = Duration::from_secs(20);
const BUNDLE: &str = "tombolo-trust-bundle";

/// A pod object, as the StatefulSet would make it; nothing runs it.
fn pod(name: &str, account: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "namespace": NAMESPACE },
        "spec": {
            "serviceAccountName": account,
            "securityContext": { "runAsNonRoot": true, "seccompProfile": { "type": "RuntimeDefault" } },
            "containers": [{ "name": "gateway", "image": "tombolo", "securityContext": {
                "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } } }],
        },
    })
}

impl World {
    /// A token of the account, bound to the pod, for an audience.
    fn bound(&self, pod: &str, account: &str, audience: &str) -> Result<String> {
        let (audience, name) = (format!("--audience={audience}"), format!("--bound-object-name={pod}"));
        let args = ["create", "token", account, "-n", NAMESPACE, &audience, "--bound-object-kind=Pod", &name];
        let token = self.kubectl(&args)?.trim().to_owned();
        let path = self.mesh.path(&format!("{pod}.token"));
        std::fs::write(&path, token)?;
        Ok(path.display().to_string())
    }

    /// `tombolo gateway` beside the API server, as that pod would start it.
    fn gateway(&self, name: &str, host: u8, token: &str) -> Result<tombolo_tests::process::ProcessSpec> {
        let c = self.mesh.cluster("east")?;
        let [border, inner, admin] = [7440, 7441, 7445].map(|port| c.address(host, port).to_string());
        let pods = self.mesh.path("pods.token").display().to_string();
        let state = self.mesh.state("east", &format!("{name}-{host}")).display().to_string();
        let args = ["gateway", "--name", name, "--join-token-file", &pods, "--service-account-token", token];
        let args =
            [&args[..], &["--state-dir", &state, "--border", &border, "--inner", &inner, "--admin", &admin]];
        self.mesh.spec("east", &format!("{name}-{host}"), &args.concat())
    }
}

pub fn pods_of_the_right_account_become_gateways(world: &mut World) -> Result<()> {
    let federator = world.mesh.cluster("east")?.address(1, 7443).to_string();
    let account = format!("{NAMESPACE}/tombolo-gateway");
    let more = ["--kubernetes-publish", &federator, "--kubernetes-gateways", &account];
    world.plane.federate_as(&mut world.mesh, &more)?;
    let map = Object::new("v1", "ConfigMap", NAMESPACE, BUNDLE);
    let published = |world: &World| {
        world.plane.api.until(&map, SOON, |found| {
            let data = found.context("nothing is published")?["data"].clone();
            ensure!(
                data["bundle.pem"].as_str().is_some_and(|pem| pem.contains("BEGIN CERTIFICATE")),
                "{data}"
            );
            data["pods.token"].as_str().map(str::to_owned).context("no pods.token")
        })
    };
    let token = published(world)?;
    std::fs::write(world.mesh.path("pods.token"), token)?;

    for (name, account) in [
        ("tombolo-gateway-0", "tombolo-gateway"),
        ("other-0", "default"),
        ("tombolo-gateway-1", "tombolo-gateway"),
    ] {
        world.plane.api.create(&pod(name, account))?;
    }
    let good = world.bound("tombolo-gateway-0", "tombolo-gateway", "tombolo.dev/acme.example")?;
    let spec = world.gateway("tombolo-gateway-0", 11, &good)?;
    world.mesh.spawn("east/tombolo-gateway-0", spec)?;
    world.mesh.ready("east", 11, "tombolo-gateway-0")?;
    let log = world.mesh.process("east/tombolo-gateway-0")?.log();
    ensure!(log.contains("both sockets answer a PROBE of our own"), "ready without its probe: {log}");
    let status = world.mesh.status("east")?.to_string();
    ensure!(status.contains("/cluster/east/gateway/tombolo-gateway-0"), "{status}");

    let logs = world.mesh.logs()?;
    let other = world.bound("other-0", "default", "tombolo.dev/acme.example")?;
    let audience = world.bound("tombolo-gateway-1", "tombolo-gateway", "https://kubernetes.default.svc")?;
    for (name, token, said) in [
        // Another account's pod; another's name; a token for the API server.
        (
            "other-0",
            &other,
            "service account tombolo-system/default may not be a gateway: pods of tombolo-system/tombolo-gateway may",
        ),
        ("tombolo-gateway-9", &good, "gateway/tombolo-gateway-0, not of gateway \"tombolo-gateway-9\""),
        ("tombolo-gateway-1", &audience, "audience"),
    ] {
        let run = world.gateway(name, 12, token)?.run(&logs, SOON);
        let refused = run.err().with_context(|| format!("{name} was let in"))?.to_string();
        ensure!(refused.contains(said), "{name}: {refused}");
    }
    let address = world.mesh.cluster("east")?.address(1, 7445);
    let metrics = tombolo_tests::mesh::http_get(&world.mesh.cluster("east")?.namespace, address, "/metrics")?;
    let denied =
        metric(&metrics, "tombolo_federator_requests_total", &["call=\"join_pod\"", "result=\"denied\""]);
    ensure!(denied >= 2.0, "refusals are not counted: {denied}");

    // Somebody deletes it, and the federator starts anew: it is there again.
    world.plane.api.delete(&map)?;
    world.mesh.process_mut("east/federator")?.stop()?;
    world.mesh.restart("east/federator")?;
    published(world)?;
    let forbidden = world.plane.forbidden_to_federator()?;
    ensure!(forbidden.is_empty(), "{forbidden:?}");
    world.mesh.process_mut("east/federator")?.stop()?;
    Ok(())
}
