//! Two clusters of real processes on one network: ways past the own gateways.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::capability::require_netns;
use tombolo_tests::link::Shape;
use tombolo_tests::mesh::{Layout, Mesh, http_get};
use tombolo_tests::scenario::{World, entry, failed, flowing, killed_under_load, metric, stalls};
use tombolo_tests::traffic::RequestLoad;

const SETTLED: Duration = Duration::from_secs(20);
const RATE: Shape = Shape { rate_bits_per_second: Some(100_000_000), ..Shape::PERFECT };

fn link(peer: &str, spec: &str) -> String {
    format!(
        "apiVersion: tombolo.dev/v1alpha1
kind: ClusterLink
metadata: {{ name: {peer} }}
spec: {{ {spec} }}
"
    )
}

/// Waits until `cluster`'s sidecar `from` has this many live paths to the peer past its gateways.
fn paths(mesh: &Mesh, cluster: &str, peer: &str, from: &str, wanted: usize) -> Result<()> {
    mesh.eventually(&format!("{wanted} paths of {from} are alive"), SETTLED, |mesh| {
        let status = mesh.status(cluster)?;
        let paths = entry(&status, "links", "peer", peer)?["paths"].as_array().cloned().unwrap_or_default();
        let alive = paths.iter().filter(|path| path["from"] == from && path["alive"] == true).count();
        ensure!(alive == wanted, "{alive} are: {paths:?}");
        Ok(())
    })?;
    Ok(())
}

/// Packets for and from a peer that a cluster's gateways forwarded, `in` and `out`.
fn forwarded(mesh: &Mesh, cluster: &str, peer: &str) -> Result<(f64, f64)> {
    let mut sum = (0.0, 0.0);
    for host in [11, 12] {
        let metrics = mesh.metrics(cluster, host)?;
        let of = |direction: &str| {
            let labels = [format!("link=\"{peer}\""), format!("direction=\"{direction}\"")];
            metric(&metrics, "tombolo_gateway_packets_total", &labels.each_ref().map(String::as_str))
        };
        sum = (sum.0 + of("in"), sum.1 + of("out"));
    }
    Ok(sum)
}

#[test]
fn remote_egress_leaves_the_own_gateways_out_and_falls_back_to_them() -> Result<()> {
    let test = "remote_egress_leaves_the_own_gateways_out_and_falls_back_to_them";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut world = World::start(&Layout { shape: RATE, ..Layout::default() })?;
    world.mesh.apply("east", &link("west", "egress: remote"))?;
    paths(&world.mesh, "east", "west", "client", 2)?;
    let conditions = world.mesh.operate("east", &["get", "clusterlink", "west", "-o", "json"])?;
    ensure!(conditions.contains("PastGateways"), "{conditions}");
    // The federators talk on, a few packets a second; the stream is tens of thousands.
    let readers = world.readers(4)?;
    flowing(&readers, 1_000_000, Duration::from_secs(10))?;
    let before = forwarded(&world.mesh, "east", "west")?;
    flowing(&readers, 10_000_000, Duration::from_secs(30))?;
    let after = forwarded(&world.mesh, "east", "west")?;
    let (incoming, outgoing) = (after.0 - before.0, after.1 - before.1);
    println!("east's gateways carried {incoming} packets in and {outgoing} out of four streams of 10 MB");
    ensure!(outgoing < incoming / 20.0, "{outgoing} packets left by the own gateways, {incoming} came in");

    // The peer's gateways go, one after the other: the streams go on, at last by the own ones.
    killed_under_load(&mut world, &readers, "west/gw-1", Duration::from_millis(1500))?;
    // The border of west takes nothing from east's sidecars any more, only from its gateways.
    world.mesh.cluster("west")?.namespace.nft(
        "table ip tombolo_dropped {
            chain in {
                type filter hook input priority 0; policy accept;
                ip saddr 10.61.0.22 udp dport 7440 counter drop
            }
        }",
    )?;
    paths(&world.mesh, "east", "west", "client", 0)?;
    flowing(&readers, 1_000_000, Duration::from_secs(10))?;
    world.answered_by("west", Duration::from_secs(5))?;
    Ok(())
}

#[test]
fn on_a_flat_link_endpoints_reach_each_other_without_any_gateway() -> Result<()> {
    let test = "on_a_flat_link_endpoints_reach_each_other_without_any_gateway";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut world = World::start(&Layout { shape: RATE, ..Layout::default() })?;
    let flat = |network: u8| format!("flat: true, allowedGatewayRanges: [ 10.{network}.0.0/16 ]");
    world.mesh.apply("east", &link("west", &flat(62)))?;
    // One side alone tells nobody's addresses.
    std::thread::sleep(Duration::from_secs(2));
    paths(&world.mesh, "east", "west", "client", 0)?;
    world.mesh.apply("west", &link("east", &flat(61)))?;
    paths(&world.mesh, "east", "west", "client", 1)?;
    paths(&world.mesh, "west", "east", "web", 1)?;

    let readers = world.readers(4)?;
    flowing(&readers, 1_000_000, Duration::from_secs(10))?;
    let before = forwarded(&world.mesh, "east", "west")?;
    flowing(&readers, 10_000_000, Duration::from_secs(30))?;
    let after = forwarded(&world.mesh, "east", "west")?;
    let carried = (after.0 - before.0) + (after.1 - before.1);
    let bytes: u64 = readers.iter().map(tombolo_tests::traffic::StreamReader::bytes).sum();
    println!("east's gateways carried {carried} packets meanwhile, the streams {bytes} bytes in all");
    ensure!(carried < 2_000.0, "{carried} packets went through the gateways");

    // No gateway is left anywhere: open streams go on, and new connections are made.
    let load = RequestLoad::start(&world.mesh.cluster("east")?.namespace, world.web, "/", 50);
    let mesh = &mut world.mesh;
    let stalled = stalls(
        &readers,
        || {
            for gateway in ["east/gw-1", "east/gw-2", "west/gw-1", "west/gw-2"] {
                mesh.process_mut(gateway)?.kill()?;
            }
            Ok(())
        },
        Duration::from_secs(3),
        Duration::from_secs(10),
    )?;
    println!("every gateway of both clusters killed: stalls {stalled:?}");
    ensure!(stalled.iter().max().is_some_and(|worst| *worst < Duration::from_secs(1)), "{stalled:?}");
    let answers = load.finish()?;
    ensure!(failed(&answers).is_empty(), "{:?}", failed(&answers));
    world.mesh.process_mut("east/client")?.kill()?;
    world.mesh.restart("east/client")?;
    let east = world.mesh.cluster("east")?;
    world.mesh.eventually("a restarted caller is answered by west", Duration::from_secs(10), |_| {
        let answer = http_get(&east.namespace, world.web, "/")?;
        ensure!(answer.lines().last().context("an answer")?.contains("west"), "{answer}");
        Ok(())
    })?;
    Ok(())
}
