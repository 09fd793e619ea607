//! What the chart can do beside its defaults, with pods that run: by helm with its hook Job, behind balancers, with injection, own
//! objects and NetworkPolicies in east; by the command on the node's network in west.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_tests::kube::{Object, condition};
use tombolo_tests::testbed::{Cluster, NAMESPACE, TRUST_DOMAIN, Testbed, eventually};

use crate::shop::{self, SHOP, SOON};

/// Everything that is off by default.
const ON: [&str; 3] = ["inject.enabled=true", "federator.objects=true", "networkPolicy.enabled=true"];
/// Of namespaces whose pods get a sidecar.
const BANK: &str = "bank";
/// Where the kernel's own choice of ports begins.
const EPHEMERAL: u64 = 32768;

fn by_helm(bed: &Testbed, east: &Cluster) -> Result<()> {
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/helm/tombolo");
    let (preset, chart) =
        (chart.join("presets/metallb.yaml").display().to_string(), chart.display().to_string());
    let (root, keys) =
        (bed.dir().join("trust").display().to_string(), bed.dir().join("east-keys").display().to_string());
    bed.run(&bed.programs.tombolo, &["trust", "cluster", "east", "--dir", &root, "--out", &keys, "--renew"])?;
    east.api.apply(&json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": NAMESPACE, "labels": { "pod-security.kubernetes.io/enforce": "restricted" } },
    }))?;
    let from = format!("--from-file={keys}");
    east.kubectl(&["create", "secret", "generic", "tombolo-trust", "-n", NAMESPACE, &from])?;
    // The Job is what installs them.
    let definition = "clusterlinks.tombolo.dev";
    east.kubectl(&["delete", "crd", definition])?;
    let (cluster, domain) = ("cluster=east".to_owned(), format!("trustDomain={TRUST_DOMAIN}"));
    let mut args =
        vec!["install", "tombolo", &chart, "-n", NAMESPACE, "--kube-context", "east", "-f", &preset];
    for value in [&cluster[..], &domain].into_iter().chain(ON) {
        args.extend(["--set", value]);
    }
    args.extend(["--wait", "--timeout", "120s"]);
    bed.run(&bed.programs.helm, &args)?;
    east.kubectl(&["get", "crd", definition]).context("the hook's Job has not installed it")?;
    let job = east.api.get(&Object::new("batch/v1", "Job", NAMESPACE, "tombolo-crds"))?;
    ensure!(job.is_none(), "the hook's Job is left: {job:?}");
    Ok(())
}

fn by_command(bed: &Testbed, west: &Cluster) -> Result<()> {
    let root = bed.dir().join("trust").display().to_string();
    // One node, one replica on it.
    let mut args = vec!["install", "--cluster", "west", "--trust-root", &root, "--preset", "host-network"];
    for value in ON.into_iter().chain(["gateway.replicas=1"]) {
        args.extend(["--set", value]);
    }
    bed.operate(west, &args, "").map(drop)
}

/// The object by which another cluster links to this one.
fn about(bed: &Testbed, at: &Cluster) -> Result<Value> {
    eventually("gateways have told their addresses", SOON, || {
        let status: Value = serde_json::from_str(&bed.operate(at, &["status", "-o", "json"], "")?)?;
        let gateways: Vec<&Value> =
            status["gateways"].as_array().into_iter().flatten().map(|gateway| &gateway["border"]).collect();
        ensure!(!gateways.is_empty(), "{status}");
        let node = at.addresses.link().0.octets();
        let local = format!("{}.{}.{}.", node[0], node[1], node[2]);
        ensure!(
            gateways.iter().all(|border| border.as_str().is_some_and(|border| border.starts_with(&local))),
            "gateways of {} are not on the network between the clusters: {gateways:?}",
            at.name
        );
        println!("gateways of {}: {gateways:?}", at.name);
        Ok(json!({
            "apiVersion": "tombolo.dev/v1alpha1", "kind": "ClusterLink", "metadata": { "name": at.name },
            "spec": { "tag": status["tag"], "gateways": gateways },
        }))
    })
}

/// Links by objects on both sides, without a token.
fn link(bed: &Testbed, east: &Cluster, west: &Cluster) -> Result<()> {
    let (of_east, of_west) = (about(bed, east)?, about(bed, west)?);
    east.api.apply(&of_west)?;
    west.api.apply(&of_east)?;
    bed.linked()?;
    for (cluster, peer) in [(east, "west"), (west, "east")] {
        let link = Object::new("tombolo.dev/v1alpha1", "ClusterLink", "", peer);
        cluster.api.until(&link, SOON, |found| {
            let (is, why) = condition(found.context("it is gone")?, "Connected");
            ensure!(is.starts_with("True"), "{is}: {why}");
            Ok(())
        })?;
    }
    Ok(())
}

/// What the API server shows of a policy that was made with kubectl.
fn policy(at: &Cluster) -> Result<()> {
    at.api.apply(&json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "FailoverPolicy",
        "metadata": { "name": "web", "namespace": SHOP },
        "spec": { "targetRef": { "kind": "ServiceImport", "name": "web" }, "tiers": [{ "clusters": ["*"] }] },
    }))?;
    at.api.until(&Object::new("tombolo.dev/v1alpha1", "FailoverPolicy", SHOP, "web"), SOON, |found| {
        let (is, why) = condition(found.context("it is gone")?, "Accepted");
        ensure!(is.starts_with("True"), "{is}: {why}");
        Ok(())
    })
}

/// A pod that gets a sidecar under PodSecurity "restricted", and calls a service of the other cluster by its name.
fn injected(at: &Cluster, service: &str, expect: &str) -> Result<()> {
    at.api.apply(&json!({
        "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": BANK, "labels": {
            "tombolo.dev/inject": "enabled", "pod-security.kubernetes.io/enforce": "restricted" } },
    }))?;
    let upstreams = json!({ "tombolo.dev/upstreams": format!("{SHOP}/{service}:80") });
    shop::client(at, BANK, "teller", &upstreams)?;
    let pod = at.api.get(&Object::new("v1", "Pod", BANK, "teller"))?.context("the pod is gone")?;
    ensure!(pod["metadata"]["labels"]["tombolo.dev/injected"] == "true", "it has no sidecar: {pod}");
    let url = format!("http://{service}.{SHOP}.svc.clusterset.local/");
    shop::call(at, (BANK, "teller"), &url, expect)
}

/// The webhook's Service leads to federators that are ready, and to nobody else.
fn webhook(at: &Cluster) -> Result<()> {
    let slices = at.api.list(&Object::new("discovery.k8s.io/v1", "EndpointSlice", NAMESPACE, ""))?;
    let of = slices
        .iter()
        .filter(|slice| slice["metadata"]["labels"]["kubernetes.io/service-name"] == "tombolo-webhook");
    let mut endpoints = 0;
    for endpoint in of.flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten()) {
        endpoints += 1;
        ensure!(endpoint["targetRef"]["name"] == "tombolo-federator-0", "{endpoint}");
        ensure!(endpoint["conditions"]["ready"] == true, "{endpoint}");
    }
    // One for each family of addresses that the Service has.
    ensure!(endpoints >= 1, "{slices:?}");
    let service =
        at.api.get(&Object::new("v1", "Service", NAMESPACE, "tombolo-webhook"))?.context("no Service")?;
    ensure!(service["spec"].get("publishNotReadyAddresses").is_none(), "{service}");
    Ok(())
}

/// Whether a policy lets a port in. Who may send is not looked at.
fn lets_in(policy: &Value, protocol: &str, port: u64) -> bool {
    let rules = policy["spec"]["ingress"].as_array().into_iter().flatten();
    rules.flat_map(|rule| rule["ports"].as_array().into_iter().flatten()).any(|allowed| {
        let first = allowed["port"].as_u64().unwrap_or_default();
        let last = allowed["endPort"].as_u64().unwrap_or(first);
        allowed["protocol"] == protocol && (first..=last).contains(&port)
    })
}

/// Every port that a pod listens on is let in by its policy: none was forgotten. (Nothing here enforces policies.)
fn policies(at: &Cluster) -> Result<()> {
    let pods = at.api.list(&Object::new("v1", "Pod", NAMESPACE, ""))?;
    let mut looked = 0;
    for pod in pods.iter().filter(|pod| pod["spec"].get("hostNetwork").is_none()) {
        let component = pod["metadata"]["labels"]["app.kubernetes.io/component"].as_str().unwrap_or_default();
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        let policy =
            Object::new("networking.k8s.io/v1", "NetworkPolicy", NAMESPACE, &format!("tombolo-{component}"));
        let policy = at.api.get(&policy)?.with_context(|| format!("no policy for {name}"))?;
        let said = at.exec(NAMESPACE, name, component, &["ss", "-Hlntu"])?;
        for line in said.lines() {
            let mut words = line.split_whitespace();
            let (kind, local) = (words.next().unwrap_or_default(), words.nth(3).unwrap_or_default());
            let (address, port) = local.rsplit_once(':').with_context(|| line.to_owned())?;
            if address.starts_with("127.") || address == "[::1]" {
                continue;
            }
            let (protocol, port) = (if kind == "udp" { "UDP" } else { "TCP" }, port.parse()?);
            // What a process sends from by itself: answers come in without a rule.
            if protocol == "UDP" && port >= EPHEMERAL {
                continue;
            }
            looked += 1;
            ensure!(lets_in(&policy, protocol, port), "{name} listens on {local}/{protocol}: {policy}");
        }
    }
    ensure!(looked >= 6, "{looked} sockets were found");
    println!("{looked} sockets of pods in {} are let in by their policies", at.name);
    Ok(())
}

pub fn in_other_ways(bed: &Testbed) -> Result<()> {
    let (east, west) = (bed.cluster("east")?, bed.cluster("west")?);
    let start = Instant::now();
    let timed = |what: &str, done: Result<()>| -> Result<Duration> {
        done.with_context(|| what.to_owned()).map(|()| start.elapsed())
    };
    let (helm, command) = std::thread::scope(|scope| {
        let helm = scope.spawn(|| timed("helm install into east", by_helm(bed, east)));
        let command = timed("install into west", by_command(bed, west));
        (helm.join().unwrap_or_else(|_| anyhow::bail!("it panicked")), command)
    });
    println!(
        "FIGURE helm install of east, balancers: {:.1?}; install of west, the node's network: {:.1?}",
        helm?, command?
    );
    link(bed, east, west).context("links by objects")?;
    println!("FIGURE both installed in other ways and linked by objects: {:.1?}", start.elapsed());
    policy(east).context("a FailoverPolicy in east")?;
    shop::serve(east, "api")?;
    shop::client(west, SHOP, "client", &json!({}))?;
    for (cluster, service, expect) in [(east, "web", "west"), (west, "api", "east")] {
        let address = shop::imported(cluster, service)?;
        shop::call(cluster, (SHOP, "client"), &format!("http://{address}/"), expect)
            .with_context(|| format!("{} without a sidecar", cluster.name))?;
        injected(cluster, service, expect).with_context(|| format!("{} with a sidecar", cluster.name))?;
        webhook(cluster)?;
        policies(cluster)?;
    }
    println!(
        "FIGURE calls each way, without and with a sidecar: {:.1?} after the beginning",
        start.elapsed()
    );
    Ok(())
}
