//! Captured pods: nothing in them knows of the mesh.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tombolo_tests::kube::Object;
use tombolo_tests::scenario::{metric, only};
use tombolo_tests::testbed::{NAMESPACE, eventually};

use super::pods::{
    INJECT, addresses, answered, curl, exposition, imported, namespace, pod, serve, started, summed,
};
use super::{SOON, World};

pub const WEB: &str = "http://web.shop.svc.clusterset.local/";
pub const CLIENT: (&str, &str) = ("shop", "client");
/// On nginx's own page.
pub const NGINX: &str = "Welcome to nginx";
const SHARED: (&str, &str) = (NAMESPACE, "app.kubernetes.io/component=shared");

fn shared_calls(world: &World) -> Result<f64> {
    let calls = |cluster| summed(cluster, SHARED, "tombolo_sidecar_shared_calls_total", &[]);
    Ok(calls(world.east()?)? + calls(world.west()?)?)
}

pub fn a_captured_pod_calls_another_clusters_service_by_its_own_sidecar(world: &World) -> Result<()> {
    let (east, west) = (world.east()?, world.west()?);
    namespace(east, "shop", json!({ INJECT: "enabled" }), &["client", "other"])?;
    namespace(west, "shop", json!({ INJECT: "enabled" }), &["web"])?;
    let nginx = json!({
        "image": "nginx:1.27", "ports": [{ "name": "http", "containerPort": 80 }],
        "readinessProbe": { "httpGet": { "path": "/", "port": "http" }, "periodSeconds": 1 },
        "lifecycle": { "preStop": { "sleep": { "seconds": 5 } } },
    });
    let mut server = pod("shop", "web", "web", json!({}), nginx);
    server["spec"]["terminationGracePeriodSeconds"] = json!(30);
    serve(west, &server, 2)?;
    let import = imported(east, "shop", "web")?;
    let client = started(east, &pod("shop", "client", "client", json!({}), json!({})))?;
    started(east, &pod("shop", "other", "other", json!({}), json!({})))?;
    let init: Vec<&str> = client["spec"]["initContainers"]
        .as_array()
        .context("nothing is injected")?
        .iter()
        .filter_map(|of| of["name"].as_str())
        .collect();
    ensure!(init == ["tombolo-capture", "tombolo-sidecar"], "{init:?}");

    // The name is CoreDNS's, and the address that of the derived Service.
    let set = import["spec"]["ips"][0].as_str().context("no ClusterSetIP")?.to_owned();
    let services = east.api.list(&Object::new("v1", "Service", "shop", ""))?;
    let derived = services.iter().find(|service| service["spec"]["clusterIP"] == set.as_str());
    let derived = derived.with_context(|| format!("no Service has {set}: {services:?}"))?;
    ensure!(
        derived["metadata"]["name"].as_str().is_some_and(|name| name.starts_with("derived-")),
        "{derived}"
    );
    eventually("its name is answered with the ClusterSetIP", SOON, || {
        let said =
            east.exec("shop", "client", "main", &["dig", "+short", "web.shop.svc.clusterset.local"])?;
        ensure!(said.trim() == set, "{said:?} is not {set}");
        Ok(())
    })?;

    let before = shared_calls(world)?;
    answered(east, CLIENT, WEB, NGINX)?;
    for _ in 0..20 {
        ensure!(curl(east, CLIENT, WEB)?.contains(NGINX));
    }
    let sidecar = exposition(east, client["status"]["podIP"].as_str().context("no address")?)?;
    let captured = metric(&sidecar, "tombolo_sidecar_captured_total", &["result=\"service\""]);
    ensure!(captured >= 20.0, "{captured} of them were captured: {sidecar}");
    let arrived = summed(west, ("shop", "app=web"), "tombolo_sidecar_inbound_connections", &[])?;
    ensure!(arrived >= 1.0, "no sidecar of the server's has a connection");
    let after = shared_calls(world)?;
    ensure!(before == after, "shared sidecars carried {} of these calls", after - before);

    // The counter counts: a pod beside it that has none of its own goes by the shared one.
    let without = json!({ INJECT: "false" });
    started(east, &pod("shop", "bare", "client", without, json!({})))?;
    answered(east, ("shop", "bare"), WEB, NGINX)?;
    let counted = shared_calls(world)? - after;
    ensure!(counted >= 1.0, "the shared sidecars count no calls at all");
    println!(
        "     21 calls by the pod's own sidecar, 0 by shared ones; {counted} by shared ones from the pod beside it"
    );
    Ok(())
}

pub fn the_server_sees_who_calls(world: &World) -> Result<()> {
    let (east, west) = (world.east()?, world.west()?);
    let other = ("shop", "other");
    answered(east, other, WEB, NGINX)?;
    world.bed.operate(west, &["apply", "-f", "-"], &only("client"))?;
    let words =
        eventually("the other service account's pod is refused", SOON, || match curl(east, other, WEB) {
            Ok(answer) => anyhow::bail!("it is let in: {answer}"),
            Err(error) => Ok(error.to_string()),
        })?;
    ensure!(curl(east, CLIENT, WEB)?.contains(NGINX), "the one that the policy names is let in");
    let access = |verdict: &str| -> Result<f64> {
        summed(
            west,
            ("shop", "app=web"),
            "tombolo_sidecar_access_total",
            &[&format!("verdict=\"{verdict}\"")],
        )
    };
    let denied = access("denied")?;
    ensure!(
        denied >= 1.0,
        "no server's sidecar has denied anybody: {:?}",
        addresses(west, "shop", "app=web")?
    );
    println!("     refused: {}", words.lines().last().unwrap_or_default());
    world.bed.operate(west, &["delete", "accesspolicy", "only", "-n", "shop", "--yes"], "")?;
    answered(east, other, WEB, NGINX)
}
