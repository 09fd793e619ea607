//! Two federators of one cluster over an etcd: the store moves there from its file, one works and the other stands by, and when
//! the first is killed under load the second goes on as the same federator.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use tombolo_tests::capability::require_netns;
use tombolo_tests::kube::{self, require_control_plane};
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::scenario::{World, failed};
use tombolo_tests::traffic::RequestLoad;

const LEASE: u64 = 4;
const PATIENCE: Duration = Duration::from_secs(40);

/// Links, gateways and endpoints of east, as far as operators are told.
fn is_whole(mesh: &Mesh) -> Result<()> {
    let status = mesh.status("east")?;
    for (list, state, count) in [("gateways", "ready", 2), ("links", "connected", 1)] {
        let entries = status[list].as_array().map(Vec::as_slice).unwrap_or_default();
        ensure!(entries.len() == count && entries.iter().all(|e| e["state"] == state), "{list}: {status}");
    }
    Ok(())
}

#[test]
fn a_federator_that_is_killed_is_replaced_by_the_one_that_stands_by_with_everything_it_knew() -> Result<()> {
    let name = "a_federator_that_is_killed_is_replaced_by_the_one_that_stands_by_with_everything_it_knew";
    let (Some(_), Some(bin)) = (require_netns(name), require_control_plane(name)) else { return Ok(()) };
    let mut world = World::start(&Layout::default())?;
    let etcd = kube::store(&bin, &mut world.mesh, "east")?;
    let lease = LEASE.to_string();
    let endpoint = format!("http://{etcd}");
    let flags = ["--etcd-endpoint", &endpoint, "--etcd-lease-seconds", &lease];
    let load = RequestLoad::start(&world.mesh.cluster("east")?.namespace, world.web, "/", 50);

    // Two stores would be two truths.
    let refused = world.mesh.federator_with("east", &flags).map(drop).unwrap_err().to_string();
    ensure!(refused.contains("--etcd-import"), "{refused}");
    world.mesh.federator_with("east", &[&flags[..], &["--etcd-import"]].concat())?;
    let moved = world.mesh.eventually("the cluster is whole on etcd", PATIENCE, is_whole)?;

    // The same command once more stands by, and binds nothing meanwhile.
    let first = world.mesh.process("east/federator")?.pid();
    let spec = world.mesh.federator_spec("east", &flags)?;
    world.mesh.spawn("east/standby", spec.clone())?;
    let standby = world.mesh.process("east/standby")?;
    standby.wait_for_log("standing by: another federator", Duration::from_secs(10))?;
    std::thread::sleep(Duration::from_secs(LEASE + 2));
    ensure!(!world.mesh.process("east/standby")?.has_exited(), "it waits");
    is_whole(&world.mesh)?;

    let killed = Instant::now();
    world.mesh.process_mut("east/federator")?.kill()?;
    world.mesh.ready("east", 1, "standby")?;
    let took_over = killed.elapsed();
    ensure!(world.mesh.process("east/standby")?.pid() != first, "another process");
    world.mesh.eventually("the cluster is whole under the second", PATIENCE, is_whole)?;
    let whole = killed.elapsed();
    // It issues, and stores.
    world.mesh.operate("east", &["token", "create", "--role", "sidecar", "--name", "late", "-n", "shop"])?;
    ensure!(world.mesh.operate("east", &["get", "clusterlinks"])?.contains("west"), "the link is known");
    world.mesh.operate("east", &["audit", "verify"])?;

    // One that ends in order gives way at once; etcd away cuts nobody off.
    world.mesh.spawn("east/federator", spec)?;
    world.mesh.process("east/federator")?.wait_for_log("standing by", Duration::from_secs(10))?;
    let ended = Instant::now();
    world.mesh.process_mut("east/standby")?.stop()?;
    world.mesh.ready("east", 1, "federator")?;
    let gave_way = ended.elapsed();
    ensure!(gave_way < Duration::from_secs(LEASE), "it gave its lease up: {gave_way:?}");
    world.mesh.eventually("the cluster is whole under the third", PATIENCE, is_whole)?;
    world.mesh.process("east/etcd")?.signal(Signal::SIGSTOP)?;
    std::thread::sleep(Duration::from_secs(LEASE * 2));
    let refused =
        world.mesh.operate("east", &["token", "create", "--role", "sidecar", "--name", "x", "-n", "shop"]);
    let refused = refused.unwrap_err().to_string();
    ensure!(refused.contains("etcd at http://"), "{refused}");
    world.mesh.process("east/etcd")?.signal(Signal::SIGCONT)?;
    world.mesh.eventually("it writes again", PATIENCE, |mesh| {
        mesh.operate("east", &["token", "create", "--role", "sidecar", "--name", "y", "-n", "shop"]).map(drop)
    })?;
    is_whole(&world.mesh)?;

    let answers = load.finish()?;
    ensure!(failed(&answers).is_empty(), "{:?}", failed(&answers));
    println!(
        "moved to etcd, whole after {moved:?}; owner killed: the next is ready after {took_over:?} (lease {LEASE} s), whole after {whole:?}; owner ended: {gave_way:?}; {} requests, none failed",
        answers.len()
    );
    Ok(())
}
