//! Rotation of roots, intermediates and leaves across linked clusters of real processes, with streams and requests
//! running: nothing fails, nothing is dropped, whatever is killed in between.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tombolo_tests::capability::{amount, require_netns};
use tombolo_tests::link::Shape;
use tombolo_tests::mesh::{Layout, Mesh, binary, http_get};
use tombolo_tests::process::ProcessSpec;
use tombolo_tests::scenario::{World, failed, flag, flowing, metric};
use tombolo_tests::traffic::{RequestLoad, StreamReader};

const FAR: Shape = Shape { delay: Duration::from_millis(10), ..Shape::PERFECT };
const PATIENCE: Duration = Duration::from_secs(30);
/// Of each of two clusters.
const PER_SECOND: u32 = 40;
/// A sidecar's or gateway's, for `kill -9` of a component in the middle.
const STALL: Duration = Duration::from_secs(2);

/// `tombolo trust rotate ...` against a cluster's federator.
fn rotate_args(mesh: &Mesh, cluster: &str, more: &[&str]) -> Vec<String> {
    let (socket, dir) = (mesh.socket(cluster), mesh.path("trust").display().to_string());
    let args = ["--socket", &socket, "trust", "rotate", "--dir", &dir];
    let mut args: Vec<String> = args.iter().chain(more).map(ToString::to_string).collect();
    let passphrase = mesh.path("passphrase");
    if passphrase.exists() {
        args.extend(["--passphrase-file".to_owned(), passphrase.display().to_string()]);
    }
    args
}

/// The exit code, standard output and standard error of a run.
fn rotate(mesh: &Mesh, cluster: &str, more: &[&str]) -> Result<(i32, String, String)> {
    let output = Command::new(binary()?)
        .args(rotate_args(mesh, cluster, more))
        .stdin(Stdio::null())
        .output()
        .context("tombolo does not start")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let code = output.status.code().context("killed")?;
    Ok((code, text(&output.stdout), text(&output.stderr)))
}

fn finished(mesh: &Mesh, cluster: &str) -> Result<Value> {
    let (code, stdout, stderr) = rotate(mesh, cluster, &["--wait", "--timeout", "60s", "-o", "json"])?;
    ensure!(code == 0, "exit {code}: {stderr}");
    println!("{stderr}");
    Ok(serde_json::from_str(&stdout)?)
}

/// What `--status` says of a cluster.
fn standing(mesh: &Mesh, asked: &str, cluster: &str) -> Result<Value> {
    let (code, stdout, stderr) = rotate(mesh, asked, &["--status", "-o", "json"])?;
    ensure!(code == 0, "exit {code}: {stderr}");
    let status: Value = serde_json::from_str(&stdout)?;
    let clusters = status["clusters"].as_array().context("no clusters")?;
    clusters
        .iter()
        .find(|c| c["cluster"] == cluster)
        .cloned()
        .with_context(|| format!("no {cluster}: {status}"))
}

/// Every cluster trusts by `sequence`, and everybody in it trusts and shows what its federator does.
fn everybody(document: &Value, sequence: u64, clusters: usize) -> Result<()> {
    let listed = document["clusters"].as_array().context("no clusters")?;
    ensure!(listed.len() == clusters, "{document}");
    for cluster in listed {
        let all = &cluster["members"];
        ensure!(cluster["sequence"] == sequence, "{cluster}");
        ensure!(cluster["holding"] == *all && cluster["showing"] == *all, "{cluster}");
        ensure!(all.as_u64() >= Some(2), "{cluster}");
    }
    Ok(())
}

fn refused_attestations(exposition: &str) -> f64 {
    let all = metric(exposition, "tombolo_sidecar_attestations_total", &[]);
    all - metric(exposition, "tombolo_sidecar_attestations_total", &[r#"result="ok""#])
}

/// Where a rotation is, by its file.
fn step(trust: &Path) -> String {
    let text = std::fs::read_to_string(trust.join("rotation.json")).unwrap_or_default();
    let rotation: Value = serde_json::from_str(&text).unwrap_or_default();
    rotation["step"].as_str().unwrap_or("no rotation").to_owned()
}

/// A sidecar that joins now and calls `shop/web`: new connections, whatever is trusted at this moment.
fn newcomer(mesh: &mut Mesh, name: &str, port: u16) -> Result<()> {
    let at = mesh.cluster("north")?.address(22, port);
    mesh.sidecar("north", name, &flag("--upstream", "web", 80, at))?;
    let north = &mesh.cluster("north")?.namespace;
    for _ in 0..10 {
        let answer = http_get(north, at, "/").with_context(|| format!("{name}, which has just joined"))?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    Ok(())
}

/// A further intermediate of a cluster, brought to its running federator.
fn further_intermediate(mesh: &Mesh, cluster: &str) -> Result<()> {
    let (root, out) = (mesh.path("trust"), mesh.path(&format!("{cluster}-renewed")));
    let [root, out_text] = [&root, &out].map(|path: &PathBuf| path.display().to_string());
    mesh.tombolo(&["trust", "cluster", cluster, "--renew", "--dir", &root, "--out", &out_text])?;
    for file in ["ca.key", "ca.crt", "bundle.json", "cluster.json"] {
        std::fs::copy(out.join(file), mesh.path(&format!("{cluster}/trust/{file}")))?;
    }
    let answer = mesh.operate(cluster, &["trust", "reload", "--wait", "--timeout", "30s", "-o", "json"])?;
    let answer: Value = serde_json::from_str(&answer)?;
    ensure!(answer["changed"] == true && answer["showing"] == answer["members"], "{answer}");
    Ok(())
}

#[test]
fn roots_intermediates_and_leaves_rotate_under_load_and_whatever_is_killed() -> Result<()> {
    let test = "roots_intermediates_and_leaves_rotate_under_load_and_whatever_is_killed";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let (mut world, north_web, north_stream) = World::with_north(FAR)?;
    world.mesh.eventually("west answers north", PATIENCE, |mesh| {
        let answer = http_get(&mesh.cluster("north")?.namespace, north_web, "/")?;
        ensure!(answer.lines().last().unwrap_or_default().contains("west"), "{answer}");
        Ok(())
    })?;
    let east = &world.mesh.cluster("east")?.namespace;
    let north = &world.mesh.cluster("north")?.namespace;
    let readers = [
        StreamReader::start(east, world.stream)?,
        StreamReader::start(east, world.stream)?,
        StreamReader::start(north, north_stream)?,
    ];
    let per_second = amount("TOMBOLO_REQUESTS_PER_SECOND", PER_SECOND);
    let loaded = Instant::now();
    let loads = [
        RequestLoad::start(east, world.web, "/", per_second),
        RequestLoad::start(north, north_web, "/", per_second),
    ];
    flowing(&readers, 100_000, PATIENCE)?;
    for reader in &readers {
        reader.take_longest_stall();
    }

    let (code, stdout, _) = rotate(&world.mesh, "east", &["--dry-run"])?;
    ensure!(code == 0 && stdout.contains("east, north, west"), "{stdout}");
    let trust = world.mesh.path("trust");
    ensure!(
        !trust.join("rotation.json").exists() && !trust.join("next").exists(),
        "the dry run changed something"
    );

    // The command is killed again and again, wherever it is, and a federator with it; newcomers join at each point.
    let begun = Instant::now();
    let logs = world.mesh.logs()?;
    for (round, millis) in [150, 400, 900, 1700, 1100].into_iter().enumerate() {
        let args = rotate_args(&world.mesh, "east", &["--wait", "--timeout", "60s"]);
        let mut command = ProcessSpec::new(format!("rotate-{round}"), binary()?).args(&args).spawn(&logs)?;
        std::thread::sleep(Duration::from_millis(millis));
        command.kill()?;
        println!("killed after {millis} ms: {}", step(&trust));
        if round == 2 {
            world.mesh.process_mut("west/federator")?.kill()?;
            world.mesh.restart("west/federator")?;
        }
        if round == 3 {
            world.mesh.process_mut("east/federator")?.kill()?;
            world.mesh.restart("east/federator")?;
            world.mesh.ready("east", 1, "federator")?;
        }
        newcomer(&mut world.mesh, &format!("newcomer-{round}"), 9100 + u16::try_from(round)?)?;
    }
    let done = finished(&world.mesh, "east")?;
    everybody(&done, 4, 3)?;
    println!(
        "the root rotated in {:?}, five crashes of the command and two of federators included",
        begun.elapsed()
    );
    ensure!(!trust.join("rotation.json").exists() && !trust.join("next").exists());
    newcomer(&mut world.mesh, "newcomer-after", 9110)?;

    // Undisturbed, from another cluster's federator.
    let begun = Instant::now();
    everybody(&finished(&world.mesh, "west")?, 7, 3)?;
    println!("the root rotated again in {:?}", begun.elapsed());

    let begun = Instant::now();
    further_intermediate(&world.mesh, "west")?;
    println!("west's intermediate in {:?}", begun.elapsed());
    let begun = Instant::now();
    for cluster in ["east", "north", "west"] {
        let args = ["trust", "reload", "--renew-leaves", "--wait", "--timeout", "30s"];
        let said = world.mesh.operate(cluster, &args)?;
        ensure!(said.contains("show it"), "{said}");
    }
    println!("all leaves in {:?}", begun.elapsed());
    // A restart begins with what was last brought.
    world.mesh.process_mut("west/federator")?.kill()?;
    world.mesh.restart("west/federator")?;
    world.mesh.ready("west", 1, "federator")?;
    newcomer(&mut world.mesh, "newcomer-last", 9111)?;
    flowing(&readers, 100_000, PATIENCE)?;

    let stalls: Vec<_> = readers.iter().map(StreamReader::take_longest_stall).collect();
    let bytes: u64 = readers.into_iter().map(StreamReader::finish).sum::<Result<u64>>()?;
    let answers: Vec<_> = loads.into_iter().map(RequestLoad::finish).collect::<Result<Vec<_>>>()?.concat();
    let elsewhere =
        answers.iter().filter(|a| a.body.as_ref().is_ok_and(|body| !body.contains("west"))).count();
    println!(
        "{:.0} requests a second: {} requests, {} failed, {elsewhere} not answered by west; 3 streams, {bytes} bytes, longest stalls {stalls:?}",
        answers.len() as f64 / loaded.elapsed().as_secs_f64(),
        answers.len(),
        failed(&answers).len()
    );
    ensure!(failed(&answers).is_empty(), "{:?}", failed(&answers));
    ensure!(elsewhere == 0, "west was out of rotation for {elsewhere} requests");
    ensure!(stalls.iter().all(|stall| *stall < STALL), "{stalls:?}");
    for (cluster, host) in [("east", 22), ("north", 22), ("west", 21)] {
        let shown = world.mesh.metrics(cluster, host)?;
        let cut = |name: &str| metric(&shown, name, &[]);
        ensure!(cut("tombolo_sidecar_expired_connections_total") == 0.0, "{cluster}");
        ensure!(cut("tombolo_sidecar_revoked_connections_total") == 0.0, "{cluster}");
        ensure!(refused_attestations(&shown) == 0.0, "{cluster}: {shown}");
        ensure!(cut("tombolo_sidecar_attestations_total") > 0.0, "{cluster} was shown no new chain");
    }
    Ok(())
}

#[test]
fn whoever_has_not_acknowledged_is_named_and_comes_back_by_itself_even_after_force() -> Result<()> {
    let test = "whoever_has_not_acknowledged_is_named_and_comes_back_by_itself_even_after_force";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut world = World::start(&Layout { gateways: 1, ..Layout::default() })?;
    world.mesh.process("east/client")?.signal(Signal::SIGSTOP)?;
    let (code, _, stderr) = rotate(&world.mesh, "west", &["--wait", "--timeout", "5s"])?;
    ensure!(code == 4 && stderr.contains("east: ") && stderr.contains("sa/client"), "exit {code}: {stderr}");
    ensure!(stderr.contains("step 1 of 3") && stderr.contains("--force"), "{stderr}");
    // Refused at once as well, and nothing is signed by the root that goes.
    let (code, _, stderr) = rotate(&world.mesh, "west", &[])?;
    ensure!(code == 1 && stderr.contains("sa/client"), "exit {code}: {stderr}");
    let dir = world.mesh.path("trust").display().to_string();
    let csr = world.mesh.path("csr").display().to_string();
    world.mesh.tombolo(&["trust", "csr", "south", "--out", &csr])?;
    let csr = format!("{csr}/ca.csr");
    for verb in [&["cluster", "south"][..], &["sign", &csr], &["passphrase", "--remove"]] {
        let refused = world.mesh.tombolo(&[&["trust"], verb, &["--dir", &dir]].concat());
        let refused = refused.err().with_context(|| format!("{verb:?} is not refused"))?;
        ensure!(refused.to_string().contains("rotation of the root is under way"), "{refused:#}");
    }
    let (code, _, stderr) = rotate(&world.mesh, "west", &["--force"])?;
    ensure!(code == 2, "force without a wait: {stderr}");
    let (code, _, stderr) = rotate(&world.mesh, "west", &["--wait", "--force", "--timeout", "1s"])?;
    ensure!(code == 2 && stderr.contains("they refuse whoever"), "nobody was asked: {stderr}");
    ensure!(standing(&world.mesh, "west", "east")?["sequence"] == 2, "nothing went on");

    // By force, and with a whole federator that misses the rest.
    world.mesh.process_mut("east/federator")?.kill()?;
    let (code, stdout, stderr) =
        rotate(&world.mesh, "west", &["--wait", "--force", "--timeout", "3s", "--yes"])?;
    ensure!(code == 0 && stderr.contains("going on without: east"), "exit {code}: {stderr}");
    println!("{stderr}\n{stdout}");
    ensure!(standing(&world.mesh, "west", "west")?["sequence"] == 4, "{stdout}");
    ensure!(standing(&world.mesh, "west", "east")?["sequence"] == 2, "{stdout}");

    // Both know nothing but what is on their disks: they are led across.
    world.mesh.process_mut("east/client")?.kill()?;
    world.mesh.restart("east/federator")?;
    world.mesh.restart("east/client")?;
    world.mesh.ready("east", 22, "client")?;
    let took = world.mesh.eventually("east has taken over what it missed", PATIENCE, |mesh| {
        let east = standing(mesh, "west", "east")?;
        ensure!(east["sequence"] == 4 && east["holding"] == east["members"], "{east}");
        ensure!(east["showing"] == east["members"] && east["pending"] == serde_json::json!([]), "{east}");
        Ok(())
    })?;
    println!("east was back {took:?} after its federator's start");
    world.answered_by("west", PATIENCE)?;
    let answer = world.mesh.operate("east", &["trust", "deliver", "--dir", &dir])?;
    ensure!(answer.contains("missed nothing"), "{answer}");
    Ok(())
}

#[test]
fn a_cluster_two_links_away_acknowledges_and_is_waited_for() -> Result<()> {
    let test = "a_cluster_two_links_away_acknowledges_and_is_waited_for";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut mesh =
        Mesh::unlinked(&Layout { clusters: &["east", "far", "mid"], gateways: 1, ..Layout::default() })?;
    mesh.link_clusters("east", "mid")?;
    // The root's key is under a passphrase, and so is its successor's.
    let (dir, passphrase) = (mesh.path("trust").display().to_string(), mesh.path("passphrase"));
    std::fs::write(&passphrase, "correct horse")?;
    std::fs::set_permissions(&passphrase, std::fs::Permissions::from_mode(0o600))?;
    let file = passphrase.display().to_string();
    mesh.tombolo(&["trust", "passphrase", "--dir", &dir, "--new-passphrase-file", &file])?;
    // Far is in the register and not linked: its silence is no acknowledgement.
    let (code, _, stderr) = rotate(&mesh, "east", &["--wait", "--timeout", "4s"])?;
    ensure!(code == 4 && stderr.contains("far: nothing has been heard"), "exit {code}: {stderr}");
    ensure!(!stderr.contains("mid: "), "{stderr}");
    // It belongs to the federation by the old root still; what it has missed comes over the link.
    mesh.link_clusters("mid", "far")?;
    everybody(&finished(&mesh, "east")?, 4, 3)?;
    let key = std::fs::read_to_string(mesh.path("trust/root.key"))?;
    ensure!(key.contains("ENCRYPTED"), "the successor's key is not under the passphrase");
    let audit = mesh.operate("far", &["audit", "--action", "rotation", "-o", "json"])?;
    let steps: Vec<Value> = audit.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let subjects: Vec<_> = steps.iter().filter_map(|step| step["subject"].as_str()).collect();
    ensure!(subjects.last() == Some(&"trust:4"), "{audit}");
    let shown: Value = serde_json::from_str(&mesh.tombolo(&["trust", "show", "--dir", &dir, "-o", "json"])?)?;
    for cluster in ["east", "mid", "far"] {
        let metrics = mesh.metrics(cluster, 1)?;
        ensure!(metric(&metrics, "tombolo_federator_trust_sequence", &[]) == 4.0, "{cluster}");
        let status = standing(&mesh, cluster, cluster)?;
        ensure!(status["root"] == "current", "{cluster} is not under {}: {status}", shown["fingerprint"]);
    }
    Ok(())
}
