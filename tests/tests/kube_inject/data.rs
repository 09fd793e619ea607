//! What injected sidecars carry.

use std::net::IpAddr;

use tombolo_tests::captured::{capture, counter, run};
use tombolo_tests::mesh::{http_get, http_get_from};
use tombolo_tests::netns::{Namespace, VethEnd, veth};
use tombolo_tests::scenario::{application, flag};

use super::identity::{audience, started};
use super::*;

const MCS: &str = "multicluster.x-k8s.io/v1beta1";
/// Where the pod's application is.
const PORT: u16 = 8080;
const POD: u8 = 21;

fn service(world: &World, namespace: &str, name: &str) -> Result<()> {
    let spec = json!({ "ports": [{ "name": "http", "port": 80, "targetPort": PORT }] });
    let metadata = json!({ "name": name, "namespace": namespace });
    world
        .west
        .api
        .apply(&json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec }))?;
    Ok(())
}

/// What the endpoints controller would say of the pod.
fn endpoint(world: &World, service: &str, pod: &Value, ready: bool) -> Result<()> {
    let address = world.mesh.cluster("west")?.address(POD, PORT).ip();
    endpoint_at(world, service, pod, address, ready)
}

fn endpoint_at(world: &World, service: &str, pod: &Value, address: IpAddr, ready: bool) -> Result<()> {
    let (labels, metadata) = (json!({ "kubernetes.io/service-name": service }), &pod["metadata"]);
    let namespace = &metadata["namespace"];
    let target = json!({
        "kind": "Pod", "namespace": namespace, "name": metadata["name"], "uid": metadata["uid"],
    });
    world.west.api.apply(&json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": { "name": format!("{service}-1"), "namespace": namespace, "labels": labels },
        "endpoints": [{ "addresses": [address.to_string()], "conditions": { "ready": ready }, "targetRef": target }],
        "ports": [{ "name": "http", "port": PORT, "protocol": "TCP" }],
    }))?;
    Ok(())
}

fn export(world: &World, namespace: &str, service: &str) -> Result<()> {
    let metadata = json!({ "name": service, "namespace": namespace });
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

    service(world, "shop", "web")?;
    endpoint(world, "web", &pod, true)?;
    let start = Instant::now();
    export(world, "shop", "web")?;
    answers(world, web, true)?;
    println!("FIGURE exported -> served by the pod that its endpoints name: {:?}", start.elapsed());
    // A second Service of the same pod costs the first one nothing.
    let connections = |world: &World| -> Result<f64> {
        let metrics = world.mesh.metrics("west", POD)?;
        Ok(metric(&metrics, "tombolo_sidecar_inbound_connections", &[]))
    };
    let before = connections(world)?;
    service(world, "shop", "admin")?;
    endpoint(world, "admin", &pod, true)?;
    export(world, "shop", "admin")?;
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

/// After [`a_cluster_set_ip_is_the_services_address`]. The pod has a network of its own, one hop from its node.
pub fn a_captured_pod_calls_as_always_and_is_called_by_the_mesh_alone(world: &mut World) -> Result<()> {
    const NODE: &str = "10.61.200.1";
    const HERE: &str = "10.61.200.2";
    world.namespace("mesh", &[("tombolo.dev/inject", "enabled")])?;
    let pod =
        world.create(&pod("mesh", "caller-0", json!({ "tombolo.dev/inbound": "strict" }), json!({})))?;
    let token = world.west.api.pod_token(&pod, audience(&pod)?)?;
    let network = Namespace::create("pod")?;
    let node = &world.mesh.cluster("west")?.namespace;
    veth(
        VethEnd { namespace: node, device: "pod", address: &format!("{NODE}/24") },
        VethEnd { namespace: &network, device: "eth0", address: &format!("{HERE}/24") },
        1500,
    )?;
    network.add_route("default", NODE.parse()?)?;
    // As a kubelet does: the rules, then the sidecar, then the application.
    let rules = args(container(&pod, "tombolo-capture").context("no rules")?);
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    let rules = world.mesh.spec("west", "capture", &rules)?.env("TOMBOLO_HOST_IPS", NODE).within(&network);
    rules.run(&world.mesh.logs()?, Duration::from_secs(10))?;
    let spec = started(world, &pod, "caller-0", POD, &token)?.env("TOMBOLO_POD_IP", HERE).within(&network);
    world.mesh.spawn("west/caller-0", spec)?;
    let (admin, app): (SocketAddr, SocketAddr) =
        (format!("{HERE}:7445").parse()?, format!("{HERE}:{PORT}").parse()?);
    world.mesh.eventually("the sidecar is ready by its probe", SOON, |mesh| {
        let answer = http_get(&mesh.cluster("west")?.namespace, admin, "/ready")?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        Ok(())
    })?;
    let listen = app.to_string();
    let spec =
        world.mesh.spec("west", "captured-app", &["demo-app", "--listen", &listen, "--name", "captured"])?;
    world.mesh.spawn("west/captured-app", spec.within(&network))?;
    // The kubelet's probe comes from the node; others come through the mesh or not at all.
    world.mesh.eventually("the kubelet's probe is answered", SOON, |mesh| {
        let node = &mesh.cluster("west")?.namespace;
        let answer = http_get_from(node, NODE.parse()?, app, "/healthz")?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        Ok(())
    })?;
    let stranger = world.mesh.cluster("west")?.address(33, 0).ip();
    let answer = http_get_from(&world.mesh.cluster("west")?.namespace, stranger, app, "/");
    ensure!(
        !answer.as_ref().is_ok_and(|answer| answer.contains("captured")),
        "a stranger came in plain: {answer:?}"
    );
    service(world, "mesh", "caller")?;
    endpoint_at(world, "caller", &pod, HERE.parse()?, true)?;
    export(world, "mesh", "caller")?;
    let upstream = world.mesh.cluster("west")?.address(23, 9080);
    let flags = ["--upstream".to_owned(), format!("mesh/caller:80={upstream}")];
    world.mesh.sidecar("west", "second", &flags)?;
    world.mesh.eventually("the mesh comes in", SOON, |mesh| {
        let answer = http_get(&mesh.cluster("west")?.namespace, upstream, "/")?;
        ensure!(answer.contains("captured"), "{answer}");
        Ok(())
    })?;
    // It calls another service at its ClusterSetIP, and what is not the mesh's as before.
    let import = Object::new(MCS, "ServiceImport", "shop", "web");
    let import = world.west.api.get(&import)?.context("no import")?;
    let set = import["spec"]["ips"][0].as_str().context("no ClusterSetIP")?;
    let curl = |url: &str| run(&network, "curl", &["-s", "--max-time", "5", url], "")?.ok();
    world.mesh.eventually("the ClusterSetIP is called", SOON, |_| {
        let answer = curl(&format!("http://{set}/"))?;
        ensure!(answer.contains("the pod"), "{answer}");
        Ok(())
    })?;
    let federator = world.mesh.cluster("west")?.address(1, 7445);
    let passed = curl(&format!("http://{federator}/live"))?;
    ensure!(passed.contains("live"), "{passed}");
    let metrics = http_get(&world.mesh.cluster("west")?.namespace, admin, "/metrics")?;
    let captured =
        |result: &str| metric(&metrics, "tombolo_sidecar_captured_total", &[&format!("result=\"{result}\"")]);
    ensure!(
        captured("service") >= 1.0 && captured("passed") >= 1.0 && captured("plain_refused") >= 1.0,
        "{metrics}"
    );
    for process in ["west/captured-app", "west/caller-0"] {
        world.mesh.process_mut(process)?.stop()?;
    }
    Ok(())
}
