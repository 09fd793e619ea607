//! What injected sidecars carry.

use tombolo_tests::captured::{capture, counter, run};
use tombolo_tests::mesh::http_get;
use tombolo_tests::scenario::{application, flag};

use super::identity::{audience, started};
use super::*;

const MCS: &str = "multicluster.x-k8s.io/v1beta1";
/// Where the pod's application is.
const PORT: u16 = 8080;
const POD: u8 = 21;

fn service(world: &World, name: &str) -> Result<()> {
    let spec = json!({ "ports": [{ "name": "http", "port": 80, "targetPort": PORT }] });
    let metadata = json!({ "name": name, "namespace": "shop" });
    world
        .west
        .api
        .apply(&json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec }))?;
    Ok(())
}

/// What the endpoints controller would say of the pod.
fn endpoint(world: &World, service: &str, pod: &Value, ready: bool) -> Result<()> {
    let labels = json!({ "kubernetes.io/service-name": service });
    let target = json!({ "kind": "Pod", "namespace": "shop", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"] });
    let address = world.mesh.cluster("west")?.address(POD, PORT).ip().to_string();
    world.west.api.apply(&json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": { "name": format!("{service}-1"), "namespace": "shop", "labels": labels },
        "endpoints": [{ "addresses": [address], "conditions": { "ready": ready }, "targetRef": target }],
        "ports": [{ "name": "http", "port": PORT, "protocol": "TCP" }],
    }))?;
    Ok(())
}

fn export(world: &World, service: &str) -> Result<()> {
    let metadata = json!({ "name": service, "namespace": "shop" });
    world.west.api.apply(&json!({ "apiVersion": MCS, "kind": "ServiceExport", "metadata": metadata }))?;
    Ok(())
}

fn answers(world: &World, at: SocketAddr, expected: bool) -> Result<Duration> {
    world.mesh.eventually(if expected { "it answers" } else { "nobody answers" }, SOON, |mesh| {
        let answer = http_get(&mesh.cluster("west")?.namespace, at, "/");
        let answered = answer.as_ref().is_ok_and(|answer| answer.contains("the pod"));
        ensure!(answered == expected, "{answer:?}");
        Ok(())
    })
}

pub fn a_pod_serves_what_kubernetes_sends_to_it(world: &mut World) -> Result<()> {
    world.namespace("shop", &[("tombolo.dev/inject", "enabled"), ("tombolo.dev/capture", "disabled")])?;
    // The pod is there before its Service: nothing of it was known when it was made.
    let pod = world.create(&pod("shop", "web-0", json!({}), json!({})))?;
    let token = world.west.api.pod_token(&pod, audience(&pod)?)?;
    let app = world.mesh.cluster("west")?.address(POD, PORT);
    application(&mut world.mesh, "west", "app", app, "the pod")?;
    let spec = started(world, &pod, "web-0", POD, &token)?;
    world.mesh.spawn("west/web-0", spec)?;
    world.mesh.ready("west", POD, "web-0")?;
    world.mesh.skip_host("west")?;
    let web = world.mesh.cluster("west")?.address(22, 9080);
    let admin = world.mesh.cluster("west")?.address(22, 9081);
    let flags = [flag("--upstream", "web", 80, web), flag("--upstream", "admin", 80, admin)].concat();
    let names = world.mesh.cluster("west")?.address(22, 53).to_string();
    let flags =
        [&flags[..], &["--dns-listen".into(), names, "--dns-upstream".into(), "none".into()]].concat();
    let captures = ["--capture-listen".to_owned(), "127.0.0.1:7447".to_owned()];
    world.mesh.sidecar("west", "client", &[&flags[..], &captures].concat())?;

    service(world, "web")?;
    endpoint(world, "web", &pod, true)?;
    let start = Instant::now();
    export(world, "web")?;
    answers(world, web, true)?;
    println!("FIGURE exported -> served by the pod that its endpoints name: {:?}", start.elapsed());
    // A second Service of the same pod costs the first one nothing.
    let connections = |world: &World| -> Result<f64> {
        let metrics = world.mesh.metrics("west", POD)?;
        Ok(metric(&metrics, "tombolo_sidecar_inbound_connections", &[]))
    };
    let before = connections(world)?;
    service(world, "admin")?;
    endpoint(world, "admin", &pod, true)?;
    export(world, "admin")?;
    answers(world, admin, true)?;
    ensure!(connections(world)? > before, "the connection of the first service was lost");
    // Kubernetes does not count on the pod: neither does anybody here.
    let counted_on = |world: &World, expected: bool| {
        world.mesh.eventually("who counts on it", SOON, |mesh| {
            let status = mesh.status("west")?.to_string();
            let not = status.contains("Kubernetes does not count on this pod");
            ensure!(not != expected, "{status}");
            Ok(())
        })
    };
    let start = Instant::now();
    endpoint(world, "web", &pod, false)?;
    counted_on(world, false)?;
    println!("FIGURE not ready in Kubernetes -> out of rotation: {:?}", start.elapsed());
    answers(world, admin, true)?;
    endpoint(world, "web", &pod, true)?;
    counted_on(world, true)?;
    answers(world, web, true)?;
    // Federators that start anew know nothing at first: that takes nothing away.
    world.mesh.process_mut("west/federator")?.kill()?;
    world.mesh.process_mut("west/web-0")?.kill()?;
    world.mesh.restart("west/web-0")?;
    world.mesh.ready("west", POD, "web-0")?;
    world.mesh.restart("west/federator")?;
    world.mesh.ready("west", 1, "federator")?;
    answers(world, web, true)?;
    std::thread::sleep(Duration::from_secs(3));
    answers(world, admin, true)?;
    // It is exported no more.
    world.west.api.delete(&Object::new(MCS, "ServiceExport", "shop", "admin"))?;
    answers(world, admin, false)?;
    answers(world, web, true)?;
    Ok(())
}

/// After [`a_pod_serves_what_kubernetes_sends_to_it`].
pub fn a_cluster_set_ip_is_the_services_address(world: &mut World) -> Result<()> {
    let import = Object::new(MCS, "ServiceImport", "shop", "web");
    let set = world.west.api.until(&import, SOON, |found| {
        let ip = found.and_then(|found| found["spec"]["ips"][0].as_str().map(str::to_owned));
        ip.context("no ClusterSetIP")
    })?;
    let local = world.west.api.get(&Object::new("v1", "Service", "shop", "web"))?.context("no Service")?;
    let local = local["spec"]["clusterIP"].as_str().context("no ClusterIP")?.to_owned();
    let namespace = &world.mesh.cluster("west")?.namespace;
    let resolver = format!("@{}", world.mesh.cluster("west")?.address(22, 53).ip());
    world.mesh.eventually("its name resolves to it", SOON, |_| {
        let asked =
            run(namespace, "dig", &[&resolver, "+short", "web.shop.svc.clusterset.local"], "")?.ok()?;
        ensure!(asked.trim() == set, "{asked:?} is not {set}");
        Ok(())
    })?;
    // Both are captured, as `--outbound all` would; nothing of this cluster leads there.
    namespace.ip(&["route", "add", "10.96.0.0/16", "dev", "lo"])?;
    let (to_set, to_local) = (format!("{set}:80"), format!("{local}:80"));
    let range = ["--outbound", "services", "--address", &to_set, "--address", &to_local, "--away", "refuse"];
    capture(namespace, &[&["apply"], &range[..]].concat())?.ok()?;
    let (to_set, to_local): (SocketAddr, SocketAddr) = (to_set.parse()?, to_local.parse()?);
    answers(world, to_set, true)?;
    ensure!(http_get(namespace, to_local, "/").is_err(), "no policy is about the Service");
    world.mesh.apply(
        "west",
        "
apiVersion: tombolo.dev/v1alpha1
kind: FailoverPolicy
metadata: { name: web, namespace: shop }
spec: { targetRef: { kind: Service, name: web }, tiers: [ { clusters: [ \"@self\" ] } ] }
",
    )?;
    answers(world, to_local, true)?;
    ensure!(counter(namespace, "taken")? >= 2);
    // Without the import, its name has the address again that it is given here.
    capture(namespace, &["remove"])?.ok()?;
    world.mesh.operate("west", &["delete", "failoverpolicy", "web", "-n", "shop", "--yes"])?;
    Ok(())
}
