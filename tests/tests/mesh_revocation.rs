//! Revocation across three linked clusters of real processes, 50 ms apart, with streams and requests running.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tombolo_tests::capability::{amount, require_netns};
use tombolo_tests::link::Shape;
use tombolo_tests::mesh::{Layout, Mesh, http_get};
use tombolo_tests::netns::Namespace;
use tombolo_tests::scenario::{World, entry, flowing, metric};
use tombolo_tests::traffic::StreamReader;

const FAR: Shape = Shape { delay: Duration::from_millis(25), ..Shape::PERFECT };
const ROUNDS: u32 = 5;
/// The promise, of each round here: `docs/benchmarks.md` has the figures.
const CUT: Duration = Duration::from_secs(1);
/// What a debug build on two shared cores may take longer.
const SLACK: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(15);
const WEB: &str = "spiffe://acme.example/cluster/west/ns/shop/sa/web";
const CLIENT: &str = "spiffe://acme.example/cluster/east/ns/shop/sa/client";

/// Revokes, waits for everybody's word; the object with its status.
fn revoke(mesh: &Mesh, cluster: &str, target: &str) -> Result<Value> {
    let args = ["revoke", target, "--reason", "test", "--wait", "--yes", "--timeout", "15s", "-o", "json"];
    Ok(serde_json::from_str(&mesh.operate(cluster, &args)?)?)
}

/// Cluster by cluster, when the last member enforced it.
fn enforced(revocation: &Value) -> Result<Vec<(String, u64)>> {
    let shares = revocation.pointer("/status/clusters").and_then(Value::as_array).context("no clusters")?;
    let share = |share: &Value| {
        let cluster = share["cluster"].as_str().unwrap_or_default().to_owned();
        ensure!(share["enforced"] == share["members"], "{share}");
        Ok((cluster, share["lastEnforcedUnixMs"].as_u64().context("no time")?))
    };
    shares.iter().map(share).collect()
}

fn unix_ms() -> Result<u64> {
    let since = tombolo_runtime::clock::since_unix_epoch();
    Ok(u64::try_from(since.as_millis())?)
}

/// When each reader's stream has ended, since `start`.
fn ends(readers: &[StreamReader], start: Instant, limit: Duration) -> Result<Vec<Duration>> {
    let mut ended: Vec<Option<Duration>> = vec![None; readers.len()];
    while ended.contains(&None) {
        for (ended, reader) in ended.iter_mut().zip(readers) {
            if ended.is_none() && reader.has_ended() {
                *ended = Some(start.elapsed());
            }
        }
        ensure!(start.elapsed() < limit, "streams go on {limit:?} after the revocation: {ended:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(ended.into_iter().flatten().collect())
}

fn answers(namespace: &Namespace, at: std::net::SocketAddr, cluster: &str) -> Result<()> {
    let answer = http_get(namespace, at, "/")?;
    ensure!(answer.lines().last().unwrap_or_default().contains(cluster), "{answer}");
    Ok(())
}

#[test]
fn a_revoked_identity_is_cut_and_refused_in_every_cluster_and_can_be_taken_back() -> Result<()> {
    let test = "a_revoked_identity_is_cut_and_refused_in_every_cluster_and_can_be_taken_back";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let (world, north_web, north_stream) = World::with_north(FAR)?;
    let mesh = &world.mesh;
    let (east, north) = (&mesh.cluster("east")?.namespace, &mesh.cluster("north")?.namespace);
    let from_west = || -> Result<()> {
        world.answered_by("west", PATIENCE)?;
        mesh.eventually("west answers north", PATIENCE, |_| answers(north, north_web, "west"))?;
        Ok(())
    };

    let mut cuts = Vec::new();
    let mut words = Vec::new();
    for round in 0..amount("TOMBOLO_ROUNDS", ROUNDS) {
        from_west()?;
        let readers = [
            StreamReader::start(east, world.stream)?,
            StreamReader::start(east, world.stream)?,
            StreamReader::start(north, north_stream)?,
        ];
        flowing(&readers, 10_000, PATIENCE)?;
        let (start, start_ms) = (Instant::now(), unix_ms()?);
        let revocation = std::thread::scope(|scope| -> Result<Value> {
            let revoked = scope.spawn(|| revoke(mesh, "west", WEB));
            let ends = ends(&readers, start, PATIENCE)?;
            println!("round {round}: streams cut after {ends:?}");
            cuts.extend(ends);
            revoked.join().map_err(|_| anyhow::anyhow!("the command panicked"))?
        })?;
        let enforced = enforced(&revocation)?;
        ensure!(enforced.len() == 3, "{revocation}");
        let took: Vec<_> = enforced.iter().map(|(c, at)| (c.as_str(), at.saturating_sub(start_ms))).collect();
        println!("round {round}: enforced after (ms) {took:?}");
        words.extend(enforced.iter().map(|(_, at)| Duration::from_millis(at.saturating_sub(start_ms))));
        // Refused from now on: each cluster serves itself, and west answers nobody.
        for _ in 0..20 {
            answers(east, world.web, "east").context("east, after everybody's word")?;
            answers(north, north_web, "north").context("north, after everybody's word")?;
        }
        mesh.operate("west", &["unrevoke", WEB, "--yes"])?;
    }
    cuts.sort();
    words.sort();
    let p99 =
        |times: &[Duration]| times.get((times.len() * 99).div_ceil(100) - 1).copied().unwrap_or_default();
    let worst = |times: &[Duration]| times.last().copied().unwrap_or_default();
    println!("p99: streams cut after {:?}, enforced after {:?}", p99(&cuts), p99(&words));
    println!("{} streams cut, worst {:?}; enforced, worst {:?}", cuts.len(), worst(&cuts), worst(&words));
    ensure!(worst(&cuts) <= CUT + SLACK && worst(&words) <= CUT + SLACK, "{cuts:?} {words:?}");
    from_west()?;

    // A caller: whoever serves it cuts it, and its own cluster knows it no more.
    let readers = [StreamReader::start(east, world.stream)?, StreamReader::start(north, north_stream)?];
    flowing(&readers, 10_000, PATIENCE)?;
    revoke(mesh, "east", CLIENT)?;
    ends(&readers[..1], Instant::now(), PATIENCE)?;
    ensure!(answers(east, world.web, "").is_err(), "a revoked caller is answered");
    flowing(&readers[1..], 10_000, PATIENCE).context("north's stream to west goes on")?;
    mesh.eventually("its federator counts what it cut", PATIENCE, |mesh| {
        let cut = metric(&mesh.metrics("east", 1)?, "tombolo_federator_revoked_connections_total", &[]);
        ensure!(cut >= 1.0, "{cut} cut connections");
        Ok(())
    })?;
    let listed = mesh.operate("east", &["get", "revocations", "-o", "wide"])?;
    ensure!(listed.contains("id-client-"), "{listed}");
    Ok(())
}

#[test]
fn a_revocation_holds_through_restarts_and_partitions_before_any_traffic() -> Result<()> {
    let test = "a_revocation_holds_through_restarts_and_partitions_before_any_traffic";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut world = World::start(&Layout { gateways: 1, ..Layout::default() })?;
    // East's sidecar hears nothing while west's identity is revoked: it is named as the one to wait for.
    world.mesh.process("east/client")?.signal(Signal::SIGSTOP)?;
    let args = ["revoke", WEB, "--wait", "--yes", "--timeout", "4s"];
    let refused = world.mesh.operate("west", &args).err().context("the wait ended without east's client")?;
    ensure!(refused.to_string().contains("sa/client"), "{refused:#}");
    world.mesh.process("east/client")?.signal(Signal::SIGCONT)?;
    world.answered_by("east", PATIENCE)?;
    let mesh = &world.mesh;
    mesh.eventually("everybody has enforced it", PATIENCE, |mesh| {
        let listed: Value = serde_json::from_str(&mesh.operate("west", &["get", "rev", "-o", "json"])?)?;
        let condition = listed.pointer("/items/0/status/conditions/0/status");
        ensure!(condition.and_then(Value::as_str) == Some("True"), "{listed}");
        Ok(())
    })?;

    // Nobody is there to tell it: it knows from before, and so does a federator that was killed.
    for process in ["east/federator", "west/federator", "east/client"] {
        world.mesh.process_mut(process)?.kill()?;
    }
    world.mesh.restart("east/client")?;
    world.mesh.ready("east", 22, "client")?;
    let served_by_east = |world: &World, times: usize| -> Result<()> {
        let east = &world.mesh.cluster("east")?.namespace;
        for _ in 0..times {
            // Without a federator its own cluster may answer or not: west must not.
            if let Ok(answer) = http_get(east, world.web, "/") {
                ensure!(!answer.lines().last().unwrap_or_default().contains("west"), "{answer}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    };
    served_by_east(&world, 50)?;
    world.mesh.restart("west/federator")?;
    world.mesh.restart("east/federator")?;
    served_by_east(&world, 100)?;
    world.answered_by("east", PATIENCE)?;
    // The revoked one has come to its federator in vain all the time.
    let status = world.mesh.status("west")?;
    let endpoint = entry(&status, "endpoints", "spiffeId", WEB);
    ensure!(endpoint.is_err() || endpoint?["healthy"] == false, "{status}");
    world.mesh.operate("west", &["unrevoke", WEB, "--yes"])?;
    world.answered_by("west", PATIENCE)?;
    Ok(())
}
