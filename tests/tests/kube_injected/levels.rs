//! Namespaces whose Pod Security level forbids capture.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tombolo_tests::testbed::Cluster;

use super::World;
use super::mesh::{NGINX, WEB};
use super::pods::{ENFORCE, INJECT, answered, imported, namespace, pod, restricted, serve, started};

fn refused(cluster: &Cluster, pod: &Value) -> Result<String> {
    match cluster.api.create(pod) {
        Ok(made) => bail!("it was made: {made}"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

/// The sidecar's own context, and what it runs as.
fn plain(pod: &Value) -> Result<()> {
    let init = pod["spec"]["initContainers"].as_array().context("nothing is injected")?;
    let [sidecar] = init.as_slice() else { bail!("{init:?}") };
    let context = &sidecar["securityContext"];
    ensure!(
        context["runAsNonRoot"] == true && context["capabilities"]["drop"] == json!(["ALL"]),
        "{context}"
    );
    Ok(())
}

pub fn a_restricted_pod_calls_by_its_explicit_listener(world: &World) -> Result<()> {
    let east = world.east()?;
    namespace(east, "inj-restricted", json!({ INJECT: "enabled", ENFORCE: "restricted" }), &["app"])?;
    let upstreams = json!({ "tombolo.dev/upstreams": "shop/web:80, shop/web:80=127.0.0.1:9080" });
    let made = restricted(pod("inj-restricted", "app", "app", upstreams, json!({})));
    let app = started(east, &made)?;
    plain(&app)?;
    let sysctl = &app["spec"]["securityContext"]["sysctls"][0];
    ensure!(sysctl["name"] == "net.ipv4.ip_unprivileged_port_start", "{sysctl}");
    let at = ("inj-restricted", "app");
    answered(east, at, WEB, NGINX)?;
    answered(east, at, "http://127.0.0.1:9080/", NGINX)?;
    let hosts = east.exec(at.0, at.1, "main", &["getent", "ahostsv4", "web.shop.svc.clusterset.local"])?;
    ensure!(hosts.starts_with("127.116.98.1 "), "the name is not the pod's own: {hosts}");
    let who = east.exec(at.0, at.1, "main", &["id", "-u"])?;
    ensure!(who.trim() == "1000", "{who}");
    // The level is enforced: what needs a capability is refused by the API server itself.
    let capture = json!({ "tombolo.dev/capture": "enabled" });
    let words = refused(east, &restricted(pod("inj-restricted", "forced", "app", capture, json!({}))))?;
    ensure!(words.contains("violates PodSecurity \"restricted"), "{words}");
    // Wishes that a sidecar would not start with are refused at admission.
    let twice = json!({ "tombolo.dev/upstreams": "shop/web:80,shop/web:80" });
    let words = refused(east, &restricted(pod("inj-restricted", "twice", "app", twice, json!({}))))?;
    ensure!(words.contains("tombolo.dev/upstreams") && words.contains("leave one of them out"), "{words}");
    println!("     twice: {words}");
    Ok(())
}

pub fn a_baseline_pod_calls_and_serves(world: &World) -> Result<()> {
    let (east, west) = (world.east()?, world.west()?);
    let labels = json!({ INJECT: "enabled", ENFORCE: "baseline" });
    namespace(east, "inj-baseline", labels.clone(), &["app"])?;
    namespace(west, "inj-baseline", labels, &["app"])?;
    let script = "import http.server as h\nh.ThreadingHTTPServer(('', 8080), h.SimpleHTTPRequestHandler).serve_forever()";
    let server = json!({
        "image": "python:3", "command": ["python3", "-c", script], "workingDir": "/srv",
        "ports": [{ "name": "http", "containerPort": 8080 }],
        "readinessProbe": { "tcpSocket": { "port": "http" }, "periodSeconds": 1 },
    });
    serve(west, &pod("inj-baseline", "files", "app", json!({}), server), 1)?;
    imported(east, "inj-baseline", "files")?;
    let upstreams = json!({ "tombolo.dev/upstreams": "inj-baseline/files:80,shop/web:80" });
    let app = started(east, &pod("inj-baseline", "app", "app", upstreams, json!({})))?;
    plain(&app)?;
    let at = ("inj-baseline", "app");
    answered(east, at, "http://files.inj-baseline.svc.clusterset.local/", "Directory listing for /")?;
    answered(east, at, WEB, NGINX)?;
    let capture = json!({ "tombolo.dev/capture": "enabled" });
    let words = refused(east, &pod("inj-baseline", "forced", "app", capture, json!({})))?;
    ensure!(words.contains("violates PodSecurity \"baseline"), "{words}");
    Ok(())
}
