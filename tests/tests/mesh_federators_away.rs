//! Every federator away for ten hours while leaves live a day: the data plane goes on.
//!
//! Real processes, whose wall clocks are moved on hour by hour while they run ([`tombolo_tests::mesh::Mesh::pass`]). What goes by the
//! wall clock is put to the test: connection IDs' and datagrams' keys, leases, leaves, what restarts read from the disk. What
//! goes by the monotonic clock is not: a connection that really lived for ten hours would have changed its connection IDs every
//! 40 minutes. So connections end by idleness before each hour and are made anew in it, and one stream lives through the two
//! hours for which IDs of before are accepted.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use tombolo_tests::capability::require_netns;
use tombolo_tests::mesh::{Layout, Mesh, http_get};
use tombolo_tests::scenario::{World, failed, flag, flowing, metric};
use tombolo_tests::traffic::RequestLoad;

const HOUR: i64 = 3600;
const HOURS: i64 = 10;
/// The caller's connections end after a second without streams.
const IDLE: &str = "1s";
const IDLED: Duration = Duration::from_millis(2500);

/// Waits until west answers.
fn west_answers(mesh: &Mesh, web: SocketAddr, limit: Duration) -> Result<Duration> {
    mesh.eventually("west answers", limit, |mesh| {
        let answer = http_get(&mesh.cluster("east")?.namespace, web, "/")?;
        ensure!(answer.lines().last().unwrap_or_default().contains("west"), "{answer}");
        Ok(())
    })
}

#[test]
fn with_every_federator_away_for_ten_hours_calls_handshakes_and_restarts_go_on() -> Result<()> {
    let test = "with_every_federator_away_for_ten_hours_calls_handshakes_and_restarts_go_on";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut world = World::start(&Layout { gateways: 2, ..Layout::default() })?;
    let web = world.mesh.cluster("east")?.address(23, 9080);
    let flags = [flag("--upstream", "web", 80, web), ["--idle".to_owned(), IDLE.to_owned()]].concat();
    world.mesh.sidecar("east", "caller", &flags)?;
    west_answers(&world.mesh, web, Duration::from_secs(15))?;
    for federator in ["east/federator", "west/federator"] {
        world.mesh.process_mut(federator)?.kill()?;
    }

    let (mut calls, mut readers) = (0, Vec::new());
    for hour in 1..=HOURS {
        std::thread::sleep(IDLED);
        world.mesh.pass(HOUR)?;
        // All clocks are looked at within a tenth of a second.
        std::thread::sleep(Duration::from_millis(200));
        let restarted = match hour {
            3 => Some("west/web"),
            5 => Some("west/gw-1"),
            7 => Some("east/caller"),
            _ => None,
        };
        if let Some(name) = restarted {
            world.mesh.process_mut(name)?.kill()?;
            world.mesh.restart(name)?;
            let back = west_answers(&world.mesh, web, Duration::from_secs(20))?;
            println!("hour {hour}: {name} restarted without a federator, west answers after {back:?}");
            std::thread::sleep(Duration::from_secs(2));
        }
        let load = RequestLoad::start(&world.mesh.cluster("east")?.namespace, web, "/", 50);
        std::thread::sleep(Duration::from_secs(2));
        let answers = load.finish()?;
        ensure!(failed(&answers).is_empty(), "hour {hour}: {:?}", failed(&answers));
        let of_west = answers.iter().filter(|a| a.body.as_ref().is_ok_and(|body| body.contains("west")));
        ensure!(of_west.count() == answers.len() && answers.len() > 50, "hour {hour}: {answers:?}");
        calls += answers.len();
        if hour == HOURS - 2 {
            readers = world.readers(1)?;
            flowing(&readers, 1_000_000, Duration::from_secs(10))?;
        }
    }
    flowing(&readers, 1_000_000, Duration::from_secs(10))?;
    let bytes = readers.into_iter().map(|reader| reader.finish()).sum::<Result<u64>>()?;
    let metrics = world.mesh.metrics("east", 23)?;
    // Since its restart in the seventh hour.
    let dials = metric(&metrics, "tombolo_sidecar_dials_total", &["result=\"ok\""]);
    ensure!(dials >= 4.0, "each hour had a handshake: {metrics}");
    println!(
        "{HOURS} h without federators: {calls} calls, none failed; a stream over two of them carried {bytes} bytes"
    );

    // They come back, into a world that is ten hours older.
    for cluster in ["east", "west"] {
        world.mesh.restart(&format!("{cluster}/federator"))?;
        world.mesh.ready(cluster, 1, "federator")?;
    }
    let back = world.mesh.eventually("every member is back", Duration::from_secs(60), |mesh| {
        for cluster in ["east", "west"] {
            let status = mesh.status(cluster)?;
            let all_are = |list: &str, state: &str, count: usize| {
                let entries = status[list].as_array().map(Vec::as_slice).unwrap_or_default();
                entries.len() == count && entries.iter().all(|entry| entry["state"] == state)
            };
            ensure!(
                all_are("gateways", "ready", 2) && all_are("links", "connected", 1),
                "{cluster}: {status}"
            );
        }
        Ok(())
    })?;
    let load = RequestLoad::start(&world.mesh.cluster("east")?.namespace, web, "/", 50);
    std::thread::sleep(Duration::from_secs(3));
    let answers = load.finish()?;
    ensure!(failed(&answers).is_empty(), "{:?}", failed(&answers));
    println!("the federators are back: everybody after {back:?}, {} calls, none failed", answers.len());
    Ok(())
}
