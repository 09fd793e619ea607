//! The SPIFFE Workload API as go-spiffe sees it: applications of two linked clusters get their identities from their
//! sidecars' sockets, talk mTLS to each other, and judge each other's tokens.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tombolo_tests::capability::require_netns;
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::process::ProcessSpec;
use tombolo_tests::scenario::metric;
use tombolo_tests::spiffe_probe::{Probe, require_probe};

const PATIENCE: Duration = Duration::from_secs(15);
const EAST: &str = "spiffe://acme.example/cluster/east/ns/shop/sa/client";
const WEST: &str = "spiffe://acme.example/cluster/west/ns/shop/sa/api";
/// A user of the machine who may ask at east's socket, and one who may not.
const FRIEND: u32 = 1000;
const STRANGER: u32 = 1001;

/// Linked clusters with one sidecar each that does nothing but serve the Workload API, and their sockets.
struct World {
    mesh: Mesh,
    probe: Probe,
    /// Where other users can get: the harness's own directory is root's alone.
    open: tempfile::TempDir,
    east: String,
    west: String,
    other: String,
}

fn socket(dir: &Path, name: &str) -> String {
    format!("unix://{}/{name}/workload.sock", dir.display())
}

impl World {
    fn start(probe: Probe) -> Result<Self> {
        let mut mesh = Mesh::start(&Layout { gateways: 1, ..Layout::default() })?;
        let open = tempfile::tempdir()?;
        std::fs::set_permissions(open.path(), std::fs::Permissions::from_mode(0o755))?;
        let [east, west, other] = ["client", "api", "other"].map(|name| socket(open.path(), name));
        let flags = |socket: &str, more: &[&str]| {
            let path = socket.trim_start_matches("unix://").to_owned();
            let more = more.iter().map(ToString::to_string);
            ["--workload-api".to_owned(), path].into_iter().chain(more).collect::<Vec<_>>()
        };
        mesh.sidecar("east", "client", &flags(&east, &["--workload-api-uid", &FRIEND.to_string()]))?;
        mesh.sidecar("east", "other", &flags(&other, &[]))?;
        mesh.sidecar("west", "api", &flags(&west, &[]))?;
        Ok(Self { mesh, probe, open, east, west, other })
    }

    fn run(&self, cluster: &str, args: &[&str]) -> Result<Value> {
        self.probe.run(&self.mesh.cluster(cluster)?.namespace, args)
    }

    /// Starts a command that goes on, as a process of the mesh.
    fn spawn(&mut self, cluster: &str, name: &str, args: &[&str]) -> Result<()> {
        let namespace = &self.mesh.cluster(cluster)?.namespace;
        let spec = ProcessSpec::new(name, self.probe.path()).args(args).within(namespace);
        self.mesh.spawn(name, spec)
    }

    /// What a spawned command has printed.
    fn lines(&self, name: &str) -> Result<Vec<Value>> {
        let output = self.mesh.process(name)?.log();
        Ok(output.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    fn line(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        self.mesh.eventually(what, PATIENCE, |_| {
            let lines = self.lines(name)?;
            ensure!(lines.iter().any(&wanted), "{lines:?}");
            Ok(())
        })?;
        self.lines(name)?.into_iter().rfind(|line| wanted(line)).context("it was there")
    }

    fn judged(&self, cluster: &str, socket: &str, token: &str, audience: &str) -> Result<Value> {
        self.run(cluster, &["validate", "-socket", socket, "-token", token, "-audience", audience])
    }
}

#[test]
fn go_spiffe_applications_of_two_clusters_know_each_other_by_our_sockets() -> Result<()> {
    let test = "go_spiffe_applications_of_two_clusters_know_each_other_by_our_sockets";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let Some(probe) = require_probe(test) else { return Ok(()) };
    let mut world = World::start(probe?)?;

    // mTLS by X509Source, both ways, straight between the clusters' networks; nobody else is let in.
    let address = world.mesh.cluster("west")?.address(30, 9443).to_string();
    let (west, east, other) = (world.west.clone(), world.east.clone(), world.other.clone());
    world.spawn("west", "server", &["serve", "-socket", &west, "-address", &address, "-peer", EAST])?;
    world.spawn("east", "watcher", &["watch", "-socket", &east])?;
    world.line("server", "the server listens", |line| line.get("listening").is_some())?;
    let call = |socket: &str, peer: &str| {
        world.run("east", &["call", "-socket", socket, "-address", &address, "-peer", peer])
    };
    ensure!(call(&east, WEST)?["takenFor"] == EAST);
    ensure!(call(&other, WEST).is_err(), "an identity that the server does not allow is answered");
    ensure!(call(&east, EAST).is_err(), "a server that is not the expected one is talked to");

    // A token of east holds in west, by the bundles and by the API's word, for its audience alone.
    let fetched = world.run("east", &["jwt", "-socket", &east, "-audience", "west-api"])?;
    let token = fetched["token"].as_str().context("no token")?.to_owned();
    ensure!(
        fetched["id"] == EAST && fetched["secondsLeft"].as_f64().is_some_and(|s| s <= 300.0),
        "{fetched}"
    );
    world.mesh.eventually("west believes east's token", PATIENCE, |_| {
        let judged = world.judged("west", &west, &token, "west-api")?;
        ensure!(judged["bundles"] == EAST && judged["api"] == EAST, "{judged}");
        Ok(())
    })?;
    let judged = world.judged("west", &west, &token, "bank")?;
    ensure!(judged["apiError"] == "InvalidArgument" && judged.get("bundlesError").is_some(), "{judged}");

    // A certificate that is revoked by its serial is replaced, key and all, and pushed.
    let first = world.line("watcher", "the SVID is there", |line| line["id"] == EAST)?;
    ensure!(first["chain"] == 2 && first["domains"] == serde_json::json!(["acme.example"]), "{first}");
    let serial = first["serial"].as_str().context("no serial")?;
    let target = format!("serial:{serial}");
    world.mesh.operate("east", &["revoke", &target, "--reason", "key leaked", "--yes", "--wait"])?;
    let fresh = |line: &Value| line["id"] == EAST && line["serial"] != first["serial"];
    let second = world.line("watcher", "the rotation is pushed", fresh)?;
    ensure!(second["key"] != first["key"], "the key is the old one");
    ensure!(call(&east, WEST)?["takenFor"] == EAST, "the new one is not accepted");

    // A revoked identity gets nothing more, and what it has is not believed.
    world.mesh.operate("east", &["revoke", EAST, "--reason", "stolen", "--yes"])?;
    world.line("watcher", "the stream ends", |line| line["error"] == "PermissionDenied")?;
    let codes = world.run("east", &["codes", "-socket", &east])?;
    ensure!(codes["good"] == "PermissionDenied" && codes["token"] == "PermissionDenied", "{codes}");
    world.mesh.eventually("west refuses the token", PATIENCE, |_| {
        let judged = world.judged("west", &west, &token, "west-api")?;
        ensure!(judged["apiError"] == "InvalidArgument", "{judged}");
        Ok(())
    })?;
    world.mesh.operate("east", &["unrevoke", EAST, "--yes"])?;
    world.mesh.eventually("it is let in again", PATIENCE, |_| call(&east, WEST).map(drop))?;
    Ok(())
}

#[test]
fn the_socket_answers_with_the_specifications_codes_and_to_its_users_alone() -> Result<()> {
    let test = "the_socket_answers_with_the_specifications_codes_and_to_its_users_alone";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let Some(probe) = require_probe(test) else { return Ok(()) };
    let world = World::start(probe?)?;
    let args = ["codes", "-socket", &world.east];
    world.mesh.eventually("the SVID is issued", PATIENCE, |_| {
        ensure!(world.run("east", &args)?["good"] == "OK");
        Ok(())
    })?;
    let codes = world.run("east", &args)?;
    let expected = serde_json::json!({
        "good": "OK", "noMetadata": "InvalidArgument", "otherMetadata": "InvalidArgument", "token": "OK",
        "noAudience": "InvalidArgument", "otherID": "PermissionDenied", "invalidToken": "InvalidArgument",
        "witUnsupported": "Unimplemented",
    });
    ensure!(codes == expected, "{codes}");
    let namespace = &world.mesh.cluster("east")?.namespace;
    let run_as = |uid| world.probe.run_as(uid, world.open.path(), namespace, &args);
    ensure!(run_as(FRIEND)? == expected);
    let stranger = run_as(STRANGER)?;
    ensure!(
        stranger["good"] == "PermissionDenied" && stranger["invalidToken"] == "PermissionDenied",
        "{stranger}"
    );
    // West's socket names nobody: the kernel keeps others out.
    let args = ["codes", "-socket", &world.west];
    let kept_out = world.probe.run_as(FRIEND, world.open.path(), namespace, &args)?;
    ensure!(kept_out["good"] == "Unavailable", "{kept_out}");
    let calls = metric(
        &world.mesh.metrics("east", 21)?,
        "tombolo_sidecar_workload_api_calls_total",
        &["call=\"any\"", "result=\"denied\""],
    );
    ensure!(calls >= 1.0, "{calls}");
    Ok(())
}
