//! Two clusters of real processes: what breaks when gateways, services and whole clusters go.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tombolo_tests::capability::require_netns;
use tombolo_tests::link::Shape;
use tombolo_tests::mesh::{Mesh, http_get, require_roles};
use tombolo_tests::traffic::{Answer, RequestLoad, StreamReader, StreamServer};

/// East calls what west serves (and east itself, as the second tier).
struct World {
    mesh: Mesh,
    servers: Vec<StreamServer>,
    caller: std::net::SocketAddr,
    web: std::net::SocketAddr,
}

const MANIFEST: &str = "
apiVersion: tombolo.dev/v1alpha1
kind: FailoverPolicy
metadata: { name: web, namespace: shop }
spec:
  targetRef: { kind: ServiceImport, name: web }
  tiers: [ { clusters: [ west ] }, { clusters: [ \"@self\" ] } ]
  failover: { whenHealthyBelow: 50%, for: 500ms }
  failback: { whenHealthyAbove: 80%, for: 2s }
";

fn export(name: &str) -> String {
    format!(
        "---\napiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\nmetadata: {{ name: {name}, namespace: shop }}\n"
    )
}

fn world(gateways: usize, shape: Shape) -> Result<World> {
    let mut mesh = Mesh::start(&["east", "west"], gateways, shape)?;
    let mut servers = Vec::new();
    for name in ["east", "west"] {
        let (stream, app) = (mesh.cluster(name)?.address(21, 9000), mesh.cluster(name)?.address(21, 8080));
        servers.push(StreamServer::start(&mesh.cluster(name)?.namespace, stream)?);
        let namespace = &mesh.cluster(name)?.namespace;
        let spec =
            tombolo_tests::process::ProcessSpec::new(format!("{name}-app"), tombolo_tests::mesh::binary()?)
                .args(["demo-app", "--listen", &app.to_string(), "--name", name])
                .within(namespace);
        mesh.spawn(&format!("{name}/app"), spec)?;
        let services = [
            "--service".to_owned(),
            format!("shop/web:80={app},http=/healthz"),
            "--service".to_owned(),
            format!("shop/stream:9000={stream},tcp"),
        ];
        mesh.sidecar(name, "web", &services)?;
        mesh.apply(name, &(export("web") + &export("stream")))?;
    }
    mesh.apply("east", MANIFEST)?;
    mesh.apply("east", &MANIFEST.replace("name: web", "name: stream"))?;
    let (web, caller) = (mesh.cluster("east")?.address(22, 9080), mesh.cluster("east")?.address(22, 9090));
    let calls = [
        "--upstream".to_owned(),
        format!("shop/web:80={web}"),
        "--upstream".to_owned(),
        format!("shop/stream:9000={caller}"),
    ];
    mesh.sidecar("east", "client", &calls)?;
    mesh.eventually("east reaches the service in west", Duration::from_secs(10), |mesh| {
        let answer = http_get(&mesh.cluster("east")?.namespace, web, "/")?;
        ensure!(answer.contains("west"), "{answer}");
        Ok(())
    })?;
    Ok(World { mesh, servers, caller, web })
}

/// Lets the streams run, does `harm`, and says the longest stall of each.
fn stalls(
    readers: &[StreamReader],
    settle: Duration,
    harm: impl FnOnce() -> Result<()>,
    watch: Duration,
) -> Result<Vec<Duration>> {
    std::thread::sleep(settle);
    readers.iter().for_each(|r| {
        r.take_longest_stall();
    });
    let before: Vec<u64> = readers.iter().map(StreamReader::bytes).collect();
    harm()?;
    std::thread::sleep(watch);
    for (reader, before) in readers.iter().zip(before) {
        ensure!(reader.bytes() > before, "a stream stands still");
    }
    Ok(readers.iter().map(StreamReader::take_longest_stall).collect())
}

fn failed(answers: &[Answer]) -> Vec<&Answer> {
    answers.iter().filter(|a| a.body.is_err()).collect()
}

#[test]
fn a_gateway_killed_stopped_or_restarted_breaks_no_stream() -> Result<()> {
    let test = "a_gateway_killed_stopped_or_restarted_breaks_no_stream";
    let (Some(_), Some(())) = (require_netns(test), require_roles(test)) else { return Ok(()) };
    let mut world = world(2, Shape { rate_bits_per_second: Some(200_000_000), ..Shape::PERFECT })?;
    let east = &world.mesh.cluster("east")?.namespace;
    let readers: Vec<_> = (0..4).map(|_| StreamReader::start(east, world.caller)).collect::<Result<_>>()?;
    let load = RequestLoad::start(east, world.web, "/", 50);
    let (settle, watch) = (Duration::from_secs(1), Duration::from_secs(3));

    for gateway in ["west/gw-1", "east/gw-1"] {
        let stalls = stalls(&readers, settle, || world.mesh.process_mut(gateway)?.kill().map(drop), watch)?;
        println!("{gateway} kill -9: longest stalls {stalls:?}");
        ensure!(stalls.iter().all(|s| *s <= Duration::from_millis(1500)), "{stalls:?}");
        world.mesh.restart(gateway)?;
        world.mesh.ready(gateway.split('/').next().context("cluster")?, 11, "gw-1")?;
    }
    for gateway in ["west/gw-2", "east/gw-2"] {
        let stop = || world.mesh.process(gateway)?.signal(Signal::SIGSTOP);
        let stalls = stalls(&readers, settle, stop, watch)?;
        println!("{gateway} SIGSTOP: longest stalls {stalls:?}");
        ensure!(stalls.iter().all(|s| *s <= Duration::from_millis(1500)), "{stalls:?}");
        world.mesh.process(gateway)?.signal(Signal::SIGCONT)?;
    }
    // Every gateway of a cluster at once: nothing passes until they are back, and nothing breaks.
    let restart = || {
        for gateway in ["west/gw-1", "west/gw-2"] {
            world.mesh.process_mut(gateway)?.kill()?;
        }
        for gateway in ["west/gw-1", "west/gw-2"] {
            world.mesh.restart(gateway)?;
        }
        Ok(())
    };
    let stalls = stalls(&readers, settle, restart, Duration::from_secs(6))?;
    println!("all gateways of west restarted: longest stalls {stalls:?}");

    for reader in readers {
        let bytes = reader.finish()?;
        ensure!(bytes > 10_000_000, "only {bytes} bytes");
    }
    let answers = load.finish()?;
    let failed = failed(&answers);
    println!("{} requests, {} failed", answers.len(), failed.len());
    ensure!(failed.len() * 100 <= answers.len(), "{failed:?}");
    drop(world.servers);
    Ok(())
}

#[test]
fn a_dead_service_moves_traffic_to_the_next_tier_and_back() -> Result<()> {
    let test = "a_dead_service_moves_traffic_to_the_next_tier_and_back";
    let (Some(_), Some(())) = (require_netns(test), require_roles(test)) else { return Ok(()) };
    let mut world = world(1, Shape::PERFECT)?;
    for (victim, what) in
        [("west/app", "application"), ("west/web", "sidecar"), ("west/gw-1", "only gateway")]
    {
        let load = RequestLoad::start(&world.mesh.cluster("east")?.namespace, world.web, "/", 100);
        std::thread::sleep(Duration::from_secs(1));
        let killed = Instant::now();
        world.mesh.process_mut(victim)?.kill()?;
        std::thread::sleep(Duration::from_secs(5));
        let answers = load.finish()?;
        let east = |a: &Answer| a.body.as_ref().is_ok_and(|b| b.contains("east"));
        ensure!(answers.iter().take(20).all(|a| !east(a)), "{what}: west served before");
        let first = answers.iter().find(|a| east(a)).with_context(|| format!("{what}: nothing moved"))?;
        let settled = answers.iter().rev().find(|a| !east(a)).map_or(killed, |a| a.at);
        let failures = failed(&answers);
        println!(
            "{what} killed: first answer of the next tier after {:?}, all from it after {:?}, {} of {} failed",
            (first.at + first.took).saturating_duration_since(killed),
            settled.saturating_duration_since(killed),
            failures.len(),
            answers.len()
        );
        ensure!(settled.saturating_duration_since(killed) <= Duration::from_secs(3), "{what}: too late");
        ensure!(failures.len() * 100 <= answers.len(), "{what}: {failures:?}");

        world.mesh.restart(victim)?;
        let web = world.web;
        world.mesh.eventually("traffic is back in west", Duration::from_secs(20), |mesh| {
            let answer = http_get(&mesh.cluster("east")?.namespace, web, "/")?;
            ensure!(answer.contains("west"), "{answer}");
            Ok(())
        })?;
        let status = world.mesh.status("east")?;
        let shifts = status.pointer("/imports").and_then(|i| i.as_array()).into_iter().flatten();
        let reasons: Vec<String> = shifts
            .flat_map(|import| import["shifts"].as_array().cloned().unwrap_or_default())
            .filter_map(|shift| shift["reason"].as_str().map(str::to_owned))
            .collect();
        ensure!(reasons.iter().any(|r| r.contains("healthy")), "status shows why: {status}");
    }
    Ok(())
}
