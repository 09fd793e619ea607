//! What happens to long-running clusters: a federator killed or its store lost under traffic, a path whose MTU shrinks.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::capability::require_netns;
use tombolo_tests::link::Shape;
use tombolo_tests::mesh::Layout;
use tombolo_tests::scenario::{World, entry, failed, flowing, metric, stalls};
use tombolo_tests::traffic::{RequestLoad, StreamReader};

const RATE: Shape = Shape { rate_bits_per_second: Some(50_000_000), ..Shape::PERFECT };
/// A control plane that comes back is linked again within this: a probe, a dial with back-off, a watch.
const LINKED_AGAIN: Duration = Duration::from_secs(20);
/// A path that eats large packets is noticed by three probes, 100 ms apart, and by loss.
const SHRUNK: Duration = Duration::from_secs(5);

fn linked(world: &World) -> Result<Duration> {
    world.mesh.eventually("both sides say connected", LINKED_AGAIN, |mesh| {
        for (cluster, peer) in [("east", "west"), ("west", "east")] {
            let status = mesh.status(cluster)?;
            let link = entry(&status, "links", "peer", peer)?;
            ensure!(link["state"] == "connected", "{link}");
        }
        let status = mesh.status("east")?;
        let import = entry(&status, "imports", "service", "shop/web")?;
        let west = import["clusters"].as_array().into_iter().flatten().find(|c| c["cluster"] == "west");
        let west = west.with_context(|| format!("west is not in {import}"))?;
        ensure!(west["healthy"] == 1 && west["state"] == "fresh", "{west}");
        Ok(())
    })
}

#[test]
fn a_killed_federator_and_a_lost_store_do_not_touch_the_data_plane_and_the_link_comes_back() -> Result<()> {
    let test = "a_killed_federator_and_a_lost_store_do_not_touch_the_data_plane_and_the_link_comes_back";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut world = World::start(&Layout { shape: RATE, ..Layout::default() })?;
    let readers = world.readers(2)?;
    let load = RequestLoad::start(&world.mesh.cluster("east")?.namespace, world.web, "/", 50);
    flowing(&readers, 1_000_000, Duration::from_secs(10))?;
    for (cluster, lose_store) in [("west", false), ("east", false), ("west", true)] {
        let name = format!("{cluster}/federator");
        let state = world.mesh.state(cluster, "federator");
        let mesh = &mut world.mesh;
        let harm = || -> Result<()> {
            mesh.process_mut(&name)?.kill()?;
            if lose_store {
                std::fs::remove_dir_all(&state).with_context(|| format!("remove {}", state.display()))?;
            }
            Ok(())
        };
        // Away for some seconds: the data plane stands alone.
        let stalls = stalls(&readers, harm, Duration::from_secs(3), Duration::from_secs(10))?;
        println!("{name} killed, store lost: {lose_store}: longest stalls {stalls:?}");
        ensure!(stalls.iter().all(|stall| *stall < Duration::from_secs(1)), "{stalls:?}");
        world.mesh.restart(&name)?;
        world.mesh.ready(cluster, 1, "federator")?;
        if !lose_store {
            println!("{name} back: linked again after {:?}", linked(&world)?);
        }
    }
    // A federator with an empty store knows neither link nor exports: it adopts the leases that are shown to it, and what
    // carried traffic carries it on. The operator links anew.
    world.mesh.eventually("members have shown their leases", LINKED_AGAIN, |mesh| {
        let status = mesh.status("west")?;
        let endpoints = status["endpoints"].as_array().map_or(0, Vec::len);
        ensure!(endpoints >= 1 && status["gateways"].as_array().is_some_and(|g| g.len() == 2), "{status}");
        Ok(())
    })?;
    flowing(&readers, 1_000_000, Duration::from_secs(10))?;
    let bytes = readers.into_iter().map(StreamReader::finish).sum::<Result<u64>>()?;
    let answers = load.finish()?;
    let failures = failed(&answers);
    println!("{bytes} bytes checked; {} requests, {} failed", answers.len(), failures.len());
    ensure!(failures.is_empty(), "{failures:?}");
    Ok(())
}

#[test]
fn where_nobody_else_serves_a_new_connection_waits_an_outage_out() -> Result<()> {
    let test = "where_nobody_else_serves_a_new_connection_waits_an_outage_out";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut world = World::start(&Layout { shape: RATE, ..Layout::default() })?;
    world.mesh.process_mut("east/web")?.kill()?;
    world.mesh.eventually("east's own endpoint is out of rotation", Duration::from_secs(10), |mesh| {
        let status = mesh.status("east")?;
        let import = entry(&status, "imports", "service", "shop/web")?;
        let own = import["clusters"].as_array().into_iter().flatten().find(|c| c["cluster"] == "east");
        ensure!(own.is_none_or(|own| own["healthy"] == 0), "{import}");
        Ok(())
    })?;
    world.answered_by("west", Duration::from_secs(5))?;
    // A stream under way shows the outage to the connection; requests come in while it is seen, and after.
    let readers = world.readers(1)?;
    flowing(&readers, 100_000, Duration::from_secs(10))?;
    world.mesh.wire("east", "west")?.set_black_hole(true);
    std::thread::sleep(Duration::from_millis(500));
    let load = RequestLoad::start(&world.mesh.cluster("east")?.namespace, world.web, "/", 10);
    std::thread::sleep(Duration::from_millis(1500));
    world.mesh.wire("east", "west")?.set_black_hole(false);
    std::thread::sleep(Duration::from_secs(1));
    let answers = load.finish()?;
    let longest = answers.iter().map(|answer| answer.took).max().unwrap_or_default();
    println!("{} requests during an outage of 2 s: longest wait {longest:?}", answers.len());
    ensure!(failed(&answers).is_empty(), "{:?}", failed(&answers));
    ensure!(longest > Duration::from_secs(1), "no request met the outage: {longest:?}");
    readers.into_iter().try_for_each(|reader| reader.finish().map(drop))
}

#[test]
fn a_path_whose_mtu_shrinks_from_9000_to_1420_carries_on() -> Result<()> {
    let test = "a_path_whose_mtu_shrinks_from_9000_to_1420_carries_on";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let shape = Shape { mtu: 9000, delay: Duration::from_millis(2), ..RATE };
    let world = World::start(&Layout { shape, ..Layout::default() })?;
    let mtu = |mesh: &tombolo_tests::mesh::Mesh| -> Result<u64> {
        let status = mesh.status("east")?;
        entry(&status, "links", "peer", "west")?["mtu"].as_u64().context("no MTU in status")
    };
    let before = world.mesh.eventually("status shows a large MTU", Duration::from_secs(20), |mesh| {
        let found = mtu(mesh)?;
        ensure!(found > 8000, "{found}");
        Ok(())
    })?;
    let large = mtu(&world.mesh)?;
    let readers = world.readers(2)?;
    flowing(&readers, 1_000_000, Duration::from_secs(10))?;
    let wire = world.mesh.wire("east", "west")?;
    let shrink = || wire.update(|shape| shape.mtu = 1420);
    let stalls = stalls(&readers, shrink, Duration::from_secs(3), Duration::from_secs(20))?;
    println!("MTU {large} found after {before:?}; shrunk to 1420: longest stalls {stalls:?}");
    flowing(&readers, 1_000_000, Duration::from_secs(10))?;
    for reader in readers {
        reader.finish()?;
    }
    ensure!(stalls.iter().all(|stall| *stall <= SHRUNK), "{stalls:?}");
    let shown = world.mesh.eventually("status shows the small MTU", Duration::from_secs(15), |mesh| {
        let found = mtu(mesh)?;
        ensure!(found <= 1420, "{found}");
        Ok(())
    })?;
    println!("status: {} bytes, {shown:?} later", mtu(&world.mesh)?);
    let metrics = world.mesh.metrics("east", 22)?;
    ensure!(metric(&metrics, "tombolo_sidecar_open_streams", &[]) >= 0.0, "{metrics}");
    Ok(())
}
