//! The set-up that most scenarios share: `shop/web` (a small web application) and `shop/stream` (an endless numbered
//! stream) are served in both clusters and exported; a sidecar in east calls both, west first, east itself as the next
//! tier.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::link::Shape;
use crate::mesh::{Layout, Mesh, binary, http_get};
use crate::process::ProcessSpec;
use crate::traffic::{Answer, RequestLoad, StreamReader, StreamServer};

/// Longest time from applied manifests to the first answer from the other cluster.
const FIRST_ANSWER: Duration = Duration::from_secs(15);

/// East's policy for a service: west first, then itself.
pub fn west_first(service: &str) -> String {
    format!(
        "---
apiVersion: tombolo.dev/v1alpha1
kind: FailoverPolicy
metadata: {{ name: {service}, namespace: shop }}
spec:
  targetRef: {{ kind: ServiceImport, name: {service} }}
  tiers: [ {{ clusters: [ west ] }}, {{ clusters: [ \"@self\" ] }} ]
  failover: {{ whenHealthyBelow: 50%, for: 500ms }}
  failback: {{ whenHealthyAbove: 80%, for: 2s }}
"
    )
}

/// What a side of a link says so that endpoints' addresses cross it.
pub fn flat_link(peer: &str) -> Value {
    json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "ClusterLink", "metadata": { "name": peer },
        "spec": { "flat": true },
    })
}

/// An export of `shop/<service>` to every linked cluster.
pub fn export(service: &str) -> String {
    format!(
        "---
apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: {{ name: {service}, namespace: shop }}
"
    )
}

/// Lets `sa/<name>` of east in, and nobody else.
pub fn only(name: &str) -> String {
    format!(
        "apiVersion: tombolo.dev/v1alpha1
kind: AccessPolicy
metadata: {{ name: only, namespace: shop }}
spec:
  action: ALLOW
  rules:
    - from: [ {{ identities: [ spiffe://acme.example/cluster/east/ns/shop/sa/{name} ] }} ]
"
    )
}

/// West with a machine outside that has not joined yet, its application at `listen`; east calls `shop/legacy`, which the machine
/// will serve, and serves `shop/web`. The machine's index, and where east's caller reaches `shop/legacy`.
pub fn before_joining(listen: &str, answers_as: &str) -> Result<(Mesh, usize, SocketAddr)> {
    let mut mesh = Mesh::start(&Layout { gateways: 1, ..Layout::default() })?;
    let app = mesh.cluster("east")?.address(21, 8080);
    application(&mut mesh, "east", "app", app, "east")?;
    mesh.sidecar("east", "web", &flag("--service", "web", 80, app))?;
    mesh.apply("east", &export("web"))?;
    mesh.apply("west", &export("legacy"))?;
    let legacy = mesh.cluster("east")?.address(22, 9080);
    mesh.sidecar("east", "client", &flag("--upstream", "legacy", 80, legacy))?;
    let index = mesh.bare_machine("west")?;
    let app = ProcessSpec::new("vm-app", binary()?)
        .args(["demo-app", "--listen", listen, "--name", answers_as])
        .within(mesh.outside(index)?);
    mesh.spawn("vm/app", app)?;
    Ok((mesh, index, legacy))
}

/// Flags of a sidecar: `--service` (served from `address`), or `--upstream` (called through it).
pub fn flag(flag: &str, service: &str, port: u16, address: SocketAddr) -> [String; 2] {
    [flag.to_owned(), format!("shop/{service}:{port}={address}")]
}

/// East calls what west serves (and east itself, as the second tier).
pub struct World {
    pub mesh: Mesh,
    servers: Vec<StreamServer>,
    /// Where the caller reaches `shop/web`.
    pub web: SocketAddr,
    /// Where the caller reaches `shop/stream`.
    pub stream: SocketAddr,
}

impl World {
    pub fn start(layout: &Layout<'_>) -> Result<Self> {
        let mut mesh = Mesh::start(layout)?;
        let mut servers = Vec::new();
        for name in layout.clusters {
            servers.push(serve(&mut mesh, name)?);
        }
        mesh.apply("east", &(west_first("web") + &west_first("stream")))?;
        let (web, stream) = call(&mut mesh, "east", "client")?;
        let world = Self { mesh, servers, web, stream };
        world.answered_by("west", FIRST_ANSWER)?;
        Ok(world)
    }

    /// Three clusters far from each other, of which north calls west as east does; where it reaches both services.
    pub fn with_north(shape: Shape) -> Result<(Self, SocketAddr, SocketAddr)> {
        let clusters = &["east", "north", "west"];
        let mut world = Self::start(&Layout { clusters, gateways: 1, shape, ..Layout::default() })?;
        world.mesh.apply("north", &(west_first("web") + &west_first("stream")))?;
        let (web, stream) = call(&mut world.mesh, "north", "client")?;
        Ok((world, web, stream))
    }

    /// Waits until a call is answered by `cluster`'s application.
    pub fn answered_by(&self, cluster: &str, limit: Duration) -> Result<Duration> {
        self.mesh.eventually(&format!("{cluster} answers"), limit, |mesh| {
            let answer = http_get(&mesh.cluster("east")?.namespace, self.web, "/")?;
            ensure!(answer.lines().last().unwrap_or_default().contains(cluster), "{answer}");
            Ok(())
        })
    }

    /// Readers of the endless stream, from east.
    pub fn readers(&self, count: usize) -> Result<Vec<StreamReader>> {
        let east = &self.mesh.cluster("east")?.namespace;
        (0..count).map(|_| StreamReader::start(east, self.stream)).collect()
    }

    /// How many endless streams are served.
    pub fn servers(&self) -> usize {
        self.servers.len()
    }
}

/// The application, the stream and their sidecar `web` in one cluster, exported.
fn serve(mesh: &mut Mesh, cluster: &str) -> Result<StreamServer> {
    let (stream, app) = (mesh.cluster(cluster)?.address(21, 9000), mesh.cluster(cluster)?.address(21, 8080));
    let server = StreamServer::start(&mesh.cluster(cluster)?.namespace, stream)?;
    application(mesh, cluster, "app", app, cluster)?;
    let mut flags = [flag("--service", "web", 80, app), flag("--service", "stream", 9000, stream)].concat();
    flags.extend(["--health".to_owned(), "shop/web=http:/healthz".to_owned()]);
    mesh.sidecar(cluster, "web", &flags)?;
    mesh.apply(cluster, &(export("web") + &export("stream")))?;
    Ok(server)
}

/// A small web application that answers with `answers_as`, as the process `<cluster>/<name>`.
pub fn application(
    mesh: &mut Mesh,
    cluster: &str,
    name: &str,
    listen: SocketAddr,
    answers_as: &str,
) -> Result<()> {
    let listen_text = listen.to_string();
    let spec = mesh.spec(cluster, name, &["demo-app", "--listen", &listen_text, "--name", answers_as])?;
    mesh.spawn(&format!("{cluster}/{name}"), spec)?;
    mesh.eventually("the application listens", Duration::from_secs(5), |mesh| {
        http_get(&mesh.cluster(cluster)?.namespace, listen, "/healthz").map(drop)
    })?;
    Ok(())
}

/// A sidecar that calls both services; where it offers them.
pub fn call(mesh: &mut Mesh, cluster: &str, name: &str) -> Result<(SocketAddr, SocketAddr)> {
    let (web, stream) = (mesh.cluster(cluster)?.address(22, 9080), mesh.cluster(cluster)?.address(22, 9090));
    let flags = [flag("--upstream", "web", 80, web), flag("--upstream", "stream", 9000, stream)].concat();
    mesh.sidecar(cluster, name, &flags)?;
    Ok((web, stream))
}

/// Kills a process under readers and 50 requests a second: no request fails, and no stream stalls for longer than `limit`.
pub fn killed_under_load(
    world: &mut World,
    readers: &[StreamReader],
    process: &str,
    limit: Duration,
) -> Result<()> {
    let load = RequestLoad::start(&world.mesh.cluster("east")?.namespace, world.web, "/", 50);
    let harm = || world.mesh.process_mut(process)?.kill().map(drop);
    let stalled = stalls(readers, harm, Duration::from_secs(2), Duration::from_secs(10))?;
    println!("{process} killed: stalls {stalled:?}");
    ensure!(stalled.iter().all(|stall| *stall < limit), "{stalled:?}");
    let answers = load.finish()?;
    ensure!(failed(&answers).is_empty(), "{:?}", failed(&answers));
    Ok(())
}

/// Does `harm` and watches `readers` for at least `watch` and until each moves again, at most `limit`: the longest stall
/// of each since the harm began.
pub fn stalls(
    readers: &[StreamReader],
    harm: impl FnOnce() -> Result<()>,
    watch: Duration,
    limit: Duration,
) -> Result<Vec<Duration>> {
    for reader in readers {
        reader.take_longest_stall();
    }
    harm()?;
    let begun = Instant::now();
    std::thread::sleep(watch);
    // Every stream moves again, not only what was under way when the harm was done.
    let seen: Vec<u64> = readers.iter().map(StreamReader::bytes).collect();
    while readers.iter().zip(&seen).any(|(reader, seen)| reader.bytes() == *seen) {
        ensure!(begun.elapsed() < limit, "a stream stands still after {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(readers.iter().map(StreamReader::take_longest_stall).collect())
}

/// Waits until every reader has received `bytes` more.
pub fn flowing(readers: &[StreamReader], bytes: u64, limit: Duration) -> Result<()> {
    let begun = Instant::now();
    let target: Vec<u64> = readers.iter().map(|reader| reader.bytes() + bytes).collect();
    while readers.iter().zip(&target).any(|(reader, target)| reader.bytes() < *target) {
        ensure!(begun.elapsed() < limit, "a stream carries fewer than {bytes} bytes in {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

pub fn failed(answers: &[Answer]) -> Vec<&Answer> {
    answers.iter().filter(|answer| answer.body.is_err()).collect()
}

/// The first entry of a list in a status document whose `key` is `value`.
pub fn entry<'a>(status: &'a Value, list: &str, key: &str, value: &str) -> Result<&'a Value> {
    let entries = status[list].as_array().map(Vec::as_slice).unwrap_or_default();
    entries
        .iter()
        .find(|entry| entry[key] == value)
        .with_context(|| format!("status has no {list} with {key} {value}: {status}"))
}

/// The sum of a metric's samples whose labels hold all of `labels` (such as `reason="mac"`).
pub fn metric(exposition: &str, name: &str, labels: &[&str]) -> f64 {
    exposition
        .lines()
        .filter(|line| line.split(['{', ' ']).next() == Some(name))
        .filter(|line| labels.iter().all(|label| line.contains(label)))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

impl Mesh {
    /// Makes the link of two clusters flat on both sides.
    pub fn flatten(&self, a: &str, b: &str) -> Result<()> {
        for (cluster, peer) in [(a, b), (b, a)] {
            self.apply(cluster, &flat_link(peer).to_string())?;
        }
        Ok(())
    }

    /// `/metrics` of the process on a host of a cluster.
    pub fn metrics(&self, cluster: &str, host: u8) -> Result<String> {
        let cluster = self.cluster(cluster)?;
        http_get(&cluster.namespace, cluster.address(host, 7445), "/metrics")
    }
}
