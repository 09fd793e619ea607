//! Sidecars on two runtime threads: one endpoint to everybody else.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::capability::require_netns;
use tombolo_tests::link::Shape;
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::scenario::{World, entry, failed, flowing, killed_under_load};
use tombolo_tests::traffic::RequestLoad;

const RATE: Shape = Shape { rate_bits_per_second: Some(100_000_000), ..Shape::PERFECT };

/// CPU ticks of the threads that carry bytes, by thread: the process's own and `tombolo-path-1`.
fn carrying(mesh: &Mesh, process: &str) -> Result<Vec<u64>> {
    let pid = mesh.process(process)?.pid();
    let mut ticks = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = std::fs::read_to_string(task?.path().join("stat"))?;
        let (head, tail) = stat.rsplit_once(") ").context("no name")?;
        let carries = head.ends_with("(tombolo") || head.contains("tombolo-path");
        let fields: Vec<u64> = tail.split(' ').skip(11).take(2).filter_map(|f| f.parse().ok()).collect();
        if carries {
            ticks.push(fields.iter().sum());
        }
    }
    Ok(ticks)
}

#[test]
fn two_threads_carry_the_streams_of_one_endpoint_and_fail_over_as_one() -> Result<()> {
    let test = "two_threads_carry_the_streams_of_one_endpoint_and_fail_over_as_one";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut world = World::start(&Layout { shape: RATE, threads: 2, ..Layout::default() })?;
    let readers = world.readers(12)?;
    let load = RequestLoad::start(&world.mesh.cluster("east")?.namespace, world.web, "/", 50);
    flowing(&readers, 2_000_000, Duration::from_secs(20))?;
    for process in ["east/client", "west/web"] {
        let ticks = carrying(&world.mesh, process)?;
        println!("{process}: CPU ticks by thread {ticks:?}");
        ensure!(ticks.len() == 2, "{process} has {} threads that carry", ticks.len());
        ensure!(ticks.iter().all(|ticks| *ticks > 0), "one thread of {process} does nothing: {ticks:?}");
    }
    let status = world.mesh.status("west")?;
    let web = entry(&status, "exports", "service", "shop/web")?;
    ensure!(web["total"] == 1, "two threads are one endpoint: {web}");

    load.finish()?;
    killed_under_load(&mut world, &readers, "west/gw-1", Duration::from_millis(1500))?;

    // The service goes: the next tier answers on either thread, and the shift is told once.
    drop(readers);
    world.mesh.process_mut("west/web")?.kill()?;
    world.answered_by("east", Duration::from_secs(10))?;
    let load = RequestLoad::start(&world.mesh.cluster("east")?.namespace, world.web, "/", 50);
    std::thread::sleep(Duration::from_secs(2));
    let answers = load.finish()?;
    ensure!(failed(&answers).is_empty(), "{:?}", failed(&answers));
    world.mesh.eventually("the shift is told", Duration::from_secs(10), |mesh| {
        let status = mesh.status("east")?;
        let shifts = entry(&status, "imports", "service", "shop/web")?["shifts"].as_array().cloned();
        let shifts = shifts.unwrap_or_default();
        let away = shifts.iter().filter(|shift| shift["toTier"] == 1).count();
        ensure!(away == 1, "{away} shifts to the next tier: {shifts:?}");
        Ok(())
    })?;

    let metrics = world.mesh.metrics("east", 22)?;
    ensure!(metrics.contains("tombolo_sidecar_dropped_packets_total{reason=\"part_overflow\"}"), "{metrics}");

    // Its addresses are free again at once.
    world.mesh.process_mut("east/client")?.stop()?;
    world.mesh.restart("east/client")?;
    world.answered_by("east", Duration::from_secs(10))?;
    Ok(())
}
