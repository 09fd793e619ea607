//! Backends without a sidecar, by address and by a name whose answer changes, behind a sidecar of another cluster: shared
//! by weight with a machine that has one, checked from there, refused where they are dangerous.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::capability::require_netns;
use tombolo_tests::captured::{THERE, neighbour};
use tombolo_tests::mesh::{Layout, Mesh, binary, http_get};
use tombolo_tests::netns::Namespace;
use tombolo_tests::process::ProcessSpec;
use tombolo_tests::resolver::Resolver;
use tombolo_tests::scenario::{application, export, flag};

const PATIENCE: Duration = Duration::from_secs(15);
/// Two failed checks half a second apart, a report, and the callers' next snapshot.
const OUT: Duration = Duration::from_secs(5);

/// What the sidecar `front` of west stands in front of; `$NAME` and `$ADDRESS` are where.
fn manifest(via: &str, backends: &str) -> String {
    format!(
        "apiVersion: tombolo.dev/v1alpha1
kind: Workload
metadata: {{ name: legacy, namespace: shop }}
spec:
  via: {via}
  services:
    - name: legacy
      ports: [ {{ port: 80 }} ]
      backends: {backends}
      healthCheck: {{ tcp: {{ port: 80 }}, interval: 300ms }}
"
    )
}

struct Site {
    mesh: Mesh,
    /// Of west, and no part of the mesh.
    old: Namespace,
    legacy: SocketAddr,
}

impl Site {
    fn start() -> Result<Self> {
        let mut mesh = Mesh::start(&Layout { gateways: 1, ..Layout::default() })?;
        mesh.apply("west", &export("legacy"))?;
        let legacy = mesh.cluster("east")?.address(21, 9080);
        mesh.sidecar("east", "client", &flag("--upstream", "legacy", 80, legacy))?;
        let old = neighbour(&mesh.cluster("west")?.namespace)?;
        let mut site = Self { mesh, old, legacy };
        for (name, port) in [("one", 8081), ("two", 8082)] {
            site.plain(name, port)?;
        }
        Ok(site)
    }

    /// An application of the old machine.
    fn plain(&mut self, name: &'static str, port: u16) -> Result<()> {
        let listen = format!("{THERE}:{port}");
        let spec = ProcessSpec::new(format!("old-{name}"), binary()?)
            .args(["demo-app", "--listen", &listen, "--name", name])
            .within(&self.old);
        self.mesh.spawn(&format!("old/{name}"), spec)
    }

    fn front(&mut self, text: &str, more: &[&str]) -> Result<()> {
        let path = self.mesh.path("legacy.yaml");
        std::fs::write(&path, text)?;
        let workload = path.display().to_string();
        let flags = [&["--workload", &workload], more].concat();
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        self.mesh.sidecar("west", "front", &flags)?;
        Ok(())
    }

    fn answer(&self) -> Result<String> {
        let answer = http_get(&self.mesh.cluster("east")?.namespace, self.legacy, "/")?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        Ok(answer)
    }

    /// Who answers how many of so many calls.
    fn shares(&self, names: &[&'static str], calls: usize) -> Result<BTreeMap<&'static str, usize>> {
        let mut shares = BTreeMap::new();
        for _ in 0..calls {
            let answer = self.answer()?;
            let name = names.iter().find(|name| answer.contains(&format!("\"{name}\"")));
            *shares.entry(*name.with_context(|| answer.clone())?).or_insert(0) += 1;
        }
        Ok(shares)
    }
}

#[test]
fn old_systems_are_reached_by_weight_from_another_cluster_and_one_that_dies_gets_nothing() -> Result<()> {
    let test = "old_systems_are_reached_by_weight_from_another_cluster_and_one_that_dies_gets_nothing";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut site = Site::start()?;
    let host = site.mesh.cluster("west")?.address(21, 8080);
    application(&mut site.mesh, "west", "app", host, "meshed")?;
    let backends = format!(
        "[ {{ address: \"{THERE}:8081\", weight: 60 }}, {{ address: \"{THERE}:8082\", weight: 20 }}, {{ address: \"{host}\", weight: 20 }} ]"
    );
    // The third is this machine's own application, so the operator of this machine has to allow it.
    let own = host.ip().to_string();
    site.front(&manifest("front", &backends), &["--agentless-allow", &own])?;
    site.mesh.eventually("all three answer", PATIENCE, |_| {
        let shares = site.shares(&["one", "two", "meshed"], 30)?;
        ensure!(shares.len() == 3, "{shares:?}");
        Ok(())
    })?;
    let shares = site.shares(&["one", "two", "meshed"], 300)?;
    println!("of 300 calls, weights 60:20:20: {shares:?}");
    // Three standard deviations of a draw of 300: 25 and 21.
    let near = |name: &str, expected: usize, off: usize| shares[name].abs_diff(expected) <= off;
    ensure!(near("one", 180, 26) && near("two", 60, 21) && near("meshed", 60, 21), "{shares:?}");

    // What an operator sees: the last hop is plain, and to where.
    let status = site.mesh.status("west")?;
    let plain =
        status["endpoints"].as_array().into_iter().flatten().flat_map(|e| e["plain"].as_array().cloned());
    let plain: Vec<String> = plain.flatten().filter_map(|hop| hop.as_str().map(str::to_owned)).collect();
    ensure!(plain.iter().any(|hop| hop == &format!("shop/legacy at {THERE}:8081")), "{status}");
    let page = site.mesh.operate("west", &["status"])?;
    ensure!(page.contains("last hop plain"), "{page}");

    // One dies: no call fails for it, and it is left out; then the rest, and the service is out of rotation.
    site.mesh.process_mut("old/one")?.kill()?;
    let shares = site.shares(&["two", "meshed"], 60)?;
    ensure!(shares.len() == 2, "{shares:?}");
    site.mesh.process_mut("old/two")?.kill()?;
    site.mesh.process_mut("west/app")?.kill()?;
    site.mesh.eventually("the service is out of rotation", OUT, |mesh| {
        let status = mesh.status("west")?;
        let front = status["endpoints"].as_array().cloned().unwrap_or_default();
        let front = front.iter().find(|e| e["holder"] == "front").context("no front")?.clone();
        ensure!(front["healthy"] == false && front["reason"].to_string().contains("0 of 3"), "{front}");
        Ok(())
    })?;
    site.mesh.restart("old/two")?;
    site.mesh.eventually("it is back", PATIENCE, |_| site.answer().map(drop))?;
    Ok(())
}

#[test]
fn dangerous_and_foreign_backends_are_refused_by_name() -> Result<()> {
    let test = "dangerous_and_foreign_backends_are_refused_by_name";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut site = Site::start()?;
    let admin = site.mesh.cluster("west")?.address(21, 7445);
    // One is good, and goes on: each of the others is refused by itself.
    let bad = [
        ("127.0.0.1:9", "this machine itself"),
        ("169.254.169.254:80", "link-local"),
        ("224.0.0.1:80", "no address of one machine"),
        (&admin.to_string(), "sidecar itself"),
    ];
    let listed: Vec<String> =
        bad.iter().map(|(address, _)| format!("{{ address: \"{address}\" }}")).collect();
    let backends = format!("[ {{ address: \"{THERE}:8081\" }}, {} ]", listed.join(", "));
    let allow = admin.ip().to_string();
    site.front(&manifest("front", &backends), &["--agentless-allow", &allow])?;
    site.mesh.eventually("the good one answers", PATIENCE, |_| site.answer().map(drop))?;
    let log = site.mesh.process("west/front")?.log();
    for (address, reason) in &bad {
        let said = log.lines().any(|line| line.contains(address) && line.contains(reason));
        ensure!(said, "{address} is not refused because it {reason}: {log}");
    }
    let shares = site.shares(&["one"], 40)?;
    ensure!(shares["one"] == 40, "{shares:?}");

    // A manifest that is another sidecar's, or none, is refused before anything starts.
    let cases = [
        (manifest("other", "[ { address: \"10.0.0.5:80\" } ]"), "spec.via names the sidecar other"),
        (manifest("front", "[ { address: \"10.0.0.5\" } ]"), "HOST:PORT"),
        (manifest("front", "[ { address: \"http://a:80\" } ]"), "HOST:PORT"),
        (manifest("front", "[ { address: \"10.0.0.5:80\", weight: 5000 } ]"), "at most 1000"),
        (manifest("front", "[ { address: \"10.0.0.5:80\" } ]").replace("  via: front\n", ""), "spec.via"),
        (
            manifest("front", "[ { address: \"10.0.0.5:80\" } ]")
                .replace("port: 80 } ]", "port: 80, targetPort: 8 } ]"),
            "without targetPort",
        ),
    ];
    for (text, expected) in cases {
        let path = site.mesh.path("bad.yaml");
        std::fs::write(&path, &text)?;
        let workload = path.display().to_string();
        let error = site.mesh.tombolo(&[
            "sidecar",
            "--name",
            "front",
            "--state-dir",
            "/nonexistent",
            "--workload",
            &workload,
        ]);
        let error = error.err().map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(error.contains(expected), "{expected}: {error}\n{text}");
    }
    Ok(())
}

#[test]
fn a_name_is_followed_when_its_answer_changes_and_not_to_where_it_must_not_lead() -> Result<()> {
    let test = "a_name_is_followed_when_its_answer_changes_and_not_to_where_it_must_not_lead";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut site = Site::start()?;
    let second: Ipv4Addr = "10.98.0.3".parse()?;
    site.old.add_address("lan", &format!("{second}/24"))?;
    let spec = ProcessSpec::new("old-moved", binary()?)
        .args(["demo-app", "--listen", &format!("{second}:8081"), "--name", "moved"])
        .within(&site.old);
    site.mesh.spawn("old/moved", spec)?;
    let server = site.mesh.cluster("west")?.address(2, 53);
    let resolver = Resolver::start(&site.mesh.cluster("west")?.namespace, server)?;
    resolver.move_to(THERE.parse()?);
    let upstream = server.to_string();
    let names = ["--dns-listen", "127.0.0.54:53", "--dns-upstream", &upstream];
    site.front(&manifest("front", "[ { address: \"moving.example:8081\" } ]"), &names)?;
    let answers = |site: &Site, who: &str| {
        site.mesh.eventually(&format!("{who} answers"), PATIENCE, |_| {
            let answer = site.answer()?;
            ensure!(answer.contains(&format!("\"{who}\"")), "{answer}");
            Ok(())
        })
    };
    answers(&site, "one")?;
    resolver.move_to(second);
    println!("the name's TTL is 1 s; its new address answers after {:?}", answers(&site, "moved")?);
    // As in DNS rebinding: the name now leads to where a cloud keeps credentials.
    resolver.move_to("169.254.169.254".parse()?);
    site.mesh.eventually("it is refused", OUT, |mesh| {
        let log = mesh.process("west/front")?.log();
        ensure!(log.contains("169.254.169.254:8081 is link-local"), "{log}");
        let error = site.answer().err().context("it still answers")?;
        ensure!(!error.to_string().is_empty());
        Ok(())
    })?;
    resolver.move_to(THERE.parse()?);
    answers(&site, "one")?;
    ensure!(resolver.asked() > 3, "{}", resolver.asked());
    Ok(())
}
