//! Access policies on two clusters of real processes: applied with the command line, enforced by the far sidecar.

use std::cell::Cell;
use std::time::Duration;

use anyhow::{Result, ensure};
use tombolo_tests::capability::require_netns;
use tombolo_tests::mesh::{Layout, http_get};
use tombolo_tests::scenario::{World, flowing, metric};
use tombolo_tests::traffic::StreamReader;

const PATIENCE: Duration = Duration::from_secs(10);

/// A policy of west about both services.
fn policy(action: &str, dry_run: bool) -> String {
    format!(
        "apiVersion: tombolo.dev/v1alpha1
kind: AccessPolicy
metadata: {{ name: client, namespace: shop }}
spec:
  action: {action}
  dryRun: {dry_run}
  rules:
    - from:
        - {{ clusters: [ east ], identities: [ spiffe://acme.example/cluster/east/ns/shop/sa/client ] }}
"
    )
}

#[test]
fn a_policy_at_the_destination_denies_across_the_link_and_cuts_what_is_open() -> Result<()> {
    let test = "a_policy_at_the_destination_denies_across_the_link_and_cuts_what_is_open";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let world = World::start(&Layout { gateways: 1, ..Layout::default() })?;
    let mesh = &world.mesh;
    let readers = world.readers(2)?;
    flowing(&readers, 100_000, PATIENCE)?;
    let counted = |verdict: &str, policy: &str| -> Result<f64> {
        let labels = [format!("verdict=\"{verdict}\""), format!("policy=\"{policy}\"")];
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        Ok(metric(&mesh.metrics("west", 21)?, "tombolo_sidecar_access_total", &labels))
    };

    // A dry run denies nothing, and counts what it would.
    mesh.apply("west", &policy("DENY", true))?;
    let shown = mesh.operate("west", &["get", "ap", "-n", "shop", "-o", "wide"])?;
    ensure!(shown.contains("DryRun") && shown.contains("DENY *, 1 rule (dry run)"), "{shown}");
    mesh.eventually("the dry run counts", PATIENCE, |mesh| {
        http_get(&mesh.cluster("east")?.namespace, world.web, "/")?;
        ensure!(counted("would_deny", "shop/client")? > 0.0, "nothing counted");
        Ok(())
    })?;
    flowing(&readers, 100_000, PATIENCE)?;

    mesh.apply("west", &policy("DENY", false))?;
    mesh.eventually("the open streams are cut", PATIENCE, |_| {
        let cut = counted("cut", "shop/client")?;
        ensure!(cut >= 2.0, "{cut} are cut");
        Ok(())
    })?;
    // Denied is an answer: the second tier, east itself, is not tried.
    ensure!(http_get(&mesh.cluster("east")?.namespace, world.web, "/").is_err(), "a denied call is answered");
    ensure!(counted("denied", "shop/client")? > 0.0, "no denial is counted");
    // What had reached the reader's socket before the reset is still read; then there is nothing more.
    let last = Cell::new(0);
    mesh.eventually("nothing more is read", PATIENCE, |_| {
        std::thread::sleep(Duration::from_millis(200));
        let now: u64 = readers.iter().map(StreamReader::bytes).sum();
        ensure!(now == last.replace(now), "{now} bytes and more");
        Ok(())
    })?;
    for reader in readers {
        ensure!(reader.finish().is_err(), "a cut stream looked whole");
    }

    mesh.apply("west", &policy("ALLOW", false))?;
    world.answered_by("west", PATIENCE)?;
    ensure!(counted("allowed", "shop/client")? > 0.0, "the rule that admits is counted");
    Ok(())
}
