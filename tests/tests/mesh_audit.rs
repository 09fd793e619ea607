//! The audit log of a real federator: what an operator sees of issuances, refusals and revocations, that its chain is
//! checked, and that no acknowledged issuance is missing after kill -9.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tombolo_overlay::cid::Kind;
use tombolo_overlay::member::Member;
use tombolo_overlay::{Limits, Overlay, OverlayConfig};
use tombolo_runtime::tasks::TaskGroup;
use tombolo_tests::capability::require_netns;
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::scenario::flag;

const PATIENCE: Duration = Duration::from_secs(15);
const WEB: &str = "spiffe://acme.example/cluster/east/ns/shop/sa/web";

/// The whole log, as exported.
fn export(mesh: &Mesh) -> Result<String> {
    mesh.operate("east", &["audit", "--limit", "0", "-o", "json"])
}

fn entries(mesh: &Mesh, filter: &[&str]) -> Result<Vec<Value>> {
    let lines = mesh.operate("east", &[&["audit", "-o", "json"], filter].concat())?;
    Ok(lines.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}

/// A sidecar that calls something, each on a port of its own.
fn sidecar(mesh: &mut Mesh, name: &str, number: u16) -> Result<()> {
    let upstream = flag("--upstream", "web", 80, mesh.cluster("east")?.address(40, 9000 + number));
    mesh.sidecar("east", name, &upstream).map(drop)
}

/// Renews with what a sidecar that has ended keeps in its state directory.
fn renew(mesh: &Mesh, name: &str) -> Result<()> {
    let east = mesh.cluster("east")?;
    let (state, bind) = (mesh.state("east", name), east.address(39, 7442));
    east.namespace.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let member = Member::load(&state)?.context("no identity is kept")?;
            let tasks = TaskGroup::new();
            let config = OverlayConfig {
                tag: member.tag(),
                endpoint: member.burn_endpoint()?,
                keys: member.lease().keys.clone(),
                kind: Kind::Endpoint,
                bind,
                registers: false,
                learns: false,
                server: None,
                svid: None,
                limits: Limits::default(),
            };
            let overlay = Overlay::bind(config, &tasks)?;
            overlay.set_routes(member.first_routes());
            Ok(tokio::time::timeout(PATIENCE, member.renew(&overlay)).await??)
        })
    })?
}

fn verify(mesh: &Mesh, args: &[&str]) -> Result<Value> {
    let text = mesh.operate("east", &[&["audit", "verify", "-o", "json"], args].concat())?;
    Ok(serde_json::from_str(&text)?)
}

#[test]
fn what_was_issued_refused_and_revoked_shows_holds_and_survives_kill_9() -> Result<()> {
    let test = "what_was_issued_refused_and_revoked_shows_holds_and_survives_kill_9";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut mesh = Mesh::start(&Layout { clusters: &["east"], gateways: 1, ..Layout::default() })?;
    sidecar(&mut mesh, "web", 0)?;
    let uid = nix::unistd::geteuid().as_raw();

    let joined = entries(&mesh, &["--action", "join", "--identity", "sa/web"])?;
    ensure!(joined.len() == 1 && joined[0]["subject"] == WEB, "{joined:?}");
    let token = joined[0]["token"].as_str().context("a join names its token")?.to_owned();
    let made = entries(&mesh, &["--action", "token", "--identity", "sa/web"])?;
    ensure!(made[0]["token"] == token.as_str() && made[0]["requester"]["uid"] == uid, "{made:?}");
    ensure!(made[0]["time"].as_str().unwrap_or_default().ends_with('Z'), "{made:?}");

    // A stolen token, used a second time from another directory: refused, and seen.
    let (stolen, state) = (mesh.path("east/web.token"), mesh.path("east/state/thief"));
    let (stolen, state) = (stolen.display().to_string(), state.display().to_string());
    let (bind, admin) = (mesh.cluster("east")?.address(30, 7442), mesh.cluster("east")?.address(30, 7445));
    let (bind, admin) = (bind.to_string(), admin.to_string());
    let args = ["sidecar", "--name", "web", "--join-token-file", &stolen, "--state-dir", &state];
    let args = [&args[..], &["--bind", &bind, "--announce", &bind, "--admin", &admin]].concat();
    let upstream = flag("--upstream", "web", 80, mesh.cluster("east")?.address(30, 9080));
    let args = [args, upstream.iter().map(String::as_str).collect()].concat();
    let thief = mesh.spec("east", "thief", &args)?;
    mesh.spawn("east/thief", thief)?;
    mesh.eventually("the reused token is in the log", PATIENCE, |mesh| {
        let refused = entries(mesh, &["--outcome", "refused"])?;
        let found = refused.iter().any(|entry| {
            entry["token"] == token.as_str()
                && entry["reason"].as_str().unwrap_or_default().contains("used already")
        });
        ensure!(found, "{refused:?}");
        Ok(())
    })?;

    mesh.operate("east", &["revoke", WEB, "--reason", "key leaked", "--yes"])?;
    mesh.operate("east", &["unrevoke", WEB, "--yes"])?;
    let revoked = entries(&mesh, &["--action", "revoke", "--action", "unrevoke", "--since", "10m"])?;
    let actions: Vec<_> = revoked.iter().map(|entry| entry["action"].as_str().unwrap_or_default()).collect();
    ensure!(actions == ["revoke", "unrevoke"] && revoked[0]["subject"] == WEB, "{revoked:?}");
    ensure!(revoked[0]["requester"]["uid"] == uid, "{revoked:?}");
    let table = mesh.operate("east", &["audit", "--limit", "3"])?;
    ensure!(table.contains("key leaked") && table.contains(&format!("uid {uid}")), "{table}");

    let whole = verify(&mesh, &[])?;
    let head = whole["head"]["hash"].as_str().context("no head")?.to_owned();
    ensure!(whole["holds"] == true && whole["first"] == 1, "{whole}");

    // Each is acknowledged, then the federator is killed: nothing of it is missing.
    for round in 0..3 {
        let mut acknowledged = Vec::new();
        for n in 0..5 {
            let name = format!("job-{round}-{n}");
            mesh.operate("east", &["token", "create", "--role", "sidecar", "--name", &name, "-n", "shop"])?;
            acknowledged.push(name);
        }
        let name = format!("w{round}");
        sidecar(&mut mesh, &name, 1 + round)?;
        mesh.process_mut("east/federator")?.kill()?;
        mesh.restart("east/federator")?;
        mesh.ready("east", 1, "federator")?;
        let log = export(&mesh)?;
        for name in acknowledged {
            ensure!(log.contains(&format!("sa/{name}\"")), "the token of {name} is not in the log:\n{log}");
        }
        let joined = entries(&mesh, &["--action", "join", "--identity", &format!("sa/{name}")])?;
        ensure!(joined.len() == 1, "{name} has an identity that the log does not know: {joined:?}");
        let checked = verify(&mesh, &["--from-head", &head])?;
        ensure!(
            checked["holds"] == true && checked["fromHead"]["sequence"] == whole["head"]["sequence"],
            "{checked}"
        );
    }

    // Leaves renew after half a day: what a sidecar does then is done here with its identity.
    mesh.process_mut("east/web")?.kill()?;
    renew(&mesh, "web")?;
    mesh.eventually("the renewal is in the log", PATIENCE, |mesh| {
        let renewed = entries(mesh, &["--action", "renew", "--identity", "sa/web"])?;
        ensure!(
            renewed.iter().any(|e| e["requester"]["identity"] == WEB && e["outcome"] == "done"),
            "{renewed:?}"
        );
        Ok(())
    })?;

    // Offline, from a file; and one that somebody has changed.
    let file = mesh.path("east.jsonl");
    let (log, path) = (export(&mesh)?, file.display().to_string());
    std::fs::write(&file, &log)?;
    let words = mesh.tombolo(&["audit", "verify", "--file", &path, "--from-head", &head])?;
    ensure!(words.contains("the chain holds") && words.contains("the noted head is entry"), "{words}");
    std::fs::write(&file, log.replacen("key leaked", "no reason!", 1))?;
    let sequence = revoked[0]["sequence"].as_u64().context("no sequence")?;
    let changed = mesh.tombolo(&["audit", "verify", "--file", &path]);
    ensure!(changed.is_err(), "a changed entry is not found");
    let found = std::process::Command::new(tombolo_tests::mesh::binary()?)
        .args(["audit", "verify", "--file", &path])
        .output()?;
    let words = String::from_utf8_lossy(&found.stdout);
    ensure!(found.status.code() == Some(3), "{words}");
    ensure!(words.contains(&format!("entry {sequence} is not as it was written")), "{words}");

    // No key of the cluster is in any log, whatever the level.
    let key = std::fs::read_to_string(mesh.path("east/trust/ca.key"))?;
    let secret = key.lines().nth(1).context("no key")?;
    for log in std::fs::read_dir(mesh.logs()?)? {
        let text = std::fs::read_to_string(log?.path())?;
        ensure!(!text.contains(secret), "the CA's key is in a log");
    }
    Ok(())
}
