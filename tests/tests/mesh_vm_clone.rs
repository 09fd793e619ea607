//! A machine whose disk was copied: the second that comes with its key is refused while the first lives, the first is
//! told, and goes on; a restart and another address of the same machine are no clone.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;
use tombolo_tests::capability::require_netns;
use tombolo_tests::mesh::{Layout, Mesh, binary, http_get};
use tombolo_tests::process::ProcessSpec;
use tombolo_tests::scenario::{flag, metric};

const VM: &str = "vm-1";
const VM_APP: &str = "127.0.0.1:8080";
/// Process start, a handshake, a registration, and the second and a half in which the first could speak.
const BACK: Duration = Duration::from_secs(15);
const SOON: Duration = Duration::from_secs(10);

struct Site {
    mesh: Mesh,
    machine: usize,
    legacy: SocketAddr,
}

impl Site {
    fn start() -> Result<Self> {
        let mut mesh = Mesh::start(&Layout { clusters: &["west"], gateways: 1, ..Layout::default() })?;
        let machine = mesh.machine("west", VM, &flag("--service", "legacy", 80, VM_APP.parse()?))?;
        let app = ProcessSpec::new("vm-app", binary()?)
            .args(["demo-app", "--listen", VM_APP, "--name", VM])
            .within(mesh.outside(machine)?);
        mesh.spawn("vm/app", app)?;
        let legacy = mesh.cluster("west")?.address(21, 9080);
        mesh.sidecar("west", "client", &flag("--upstream", "legacy", 80, legacy))?;
        let site = Self { mesh, machine, legacy };
        site.served(BACK)?;
        Ok(site)
    }

    fn served(&self, limit: Duration) -> Result<Duration> {
        self.mesh.eventually("the machine serves", limit, |mesh| {
            let answer = http_get(&mesh.cluster("west")?.namespace, self.legacy, "/")?;
            ensure!(answer.contains(VM), "{answer}");
            Ok(())
        })
    }

    /// Another machine with a copy of the first's disk.
    fn copy(&mut self) -> Result<()> {
        let (from, to) = (self.mesh.state("vm", VM), self.mesh.state("vm", "copy"));
        let copied = Command::new("cp").arg("-a").args([&from, &to]).status()?;
        ensure!(copied.success(), "cp -a");
        let state = to.display().to_string();
        let args = ["sidecar", "--name", VM, "--state-dir", &state, "--bind", "0.0.0.0:7452"];
        let service = format!("shop/legacy:80={VM_APP}");
        let args = [&args[..], &["--admin", "127.0.0.1:7455", "--service", &service]].concat();
        let copy = ProcessSpec::new("copy", binary()?).args(args).within(self.mesh.outside(self.machine)?);
        self.mesh.spawn("vm/copy", copy)
    }

    fn machine_metrics(&self, admin: &str) -> Result<String> {
        http_get(self.mesh.outside(self.machine)?, admin.parse()?, "/metrics")
    }

    fn findings(&self) -> Result<Vec<Value>> {
        let status = self.mesh.status("west")?;
        let findings = status["findings"].as_array().cloned().unwrap_or_default();
        Ok(findings.into_iter().filter(|finding| finding["reason"] == "IdentityUsedTwice").collect())
    }
}

#[test]
fn a_copied_machine_is_refused_while_the_first_lives_and_the_first_is_told() -> Result<()> {
    let test = "a_copied_machine_is_refused_while_the_first_lives_and_the_first_is_told";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut site = Site::start()?;
    site.copy()?;
    let took = site.mesh.eventually("the copy is refused and says so", SOON, |mesh| {
        let log = mesh.process("vm/copy")?.log();
        ensure!(log.contains("used by another process") && log.contains("tombolo vm token"), "{log}");
        let metrics = site.machine_metrics("127.0.0.1:7455")?;
        ensure!(metric(&metrics, "tombolo_sidecar_clone_refused", &[]) == 1.0, "{metrics}");
        Ok(())
    })?;
    println!("the copy was refused {took:?} after its start");
    site.mesh.eventually("the first is told", SOON, |mesh| {
        let log = mesh.process(&format!("vm/{VM}"))?.log();
        ensure!(log.contains("came with this machine's identity and was refused"), "{log}");
        let metrics = site.machine_metrics("127.0.0.1:7445")?;
        ensure!(metric(&metrics, "tombolo_sidecar_clones_seen", &[]) == 1.0, "{metrics}");
        Ok(())
    })?;
    // What the operator sees: a finding, a metric, and the audit log.
    let findings = site.findings()?;
    ensure!(findings.len() == 1 && findings[0]["severity"] == "critical", "{findings:?}");
    let check = site.mesh.operate("west", &["check"]);
    ensure!(check.is_err_and(|error| !error.to_string().is_empty()), "a check finds it");
    let metrics = site.mesh.metrics("west", 1)?;
    let labels = ["call=\"hello\"", "result=\"cloned\""];
    ensure!(metric(&metrics, "tombolo_federator_requests_total", &labels) >= 1.0, "{metrics}");
    site.mesh.eventually("the audit log has it", SOON, |mesh| {
        let audit = mesh.operate("west", &["audit", "--action", "clone", "-o", "json"])?;
        ensure!(audit.contains("/vm/vm-1") && audit.contains("refused"), "{audit}");
        Ok(())
    })?;
    // The first has lost nothing.
    for _ in 0..20 {
        site.served(Duration::ZERO)?;
    }
    Ok(())
}

#[test]
fn a_restart_and_another_address_of_a_machine_are_no_clone() -> Result<()> {
    let test = "a_restart_and_another_address_of_a_machine_are_no_clone";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut site = Site::start()?;
    let name = format!("vm/{VM}");
    // Killed without a word, and back at once: the federator still waits for its last report.
    for round in 0..2 {
        site.mesh.process_mut(&name)?.kill()?;
        site.mesh.restart(&name)?;
        site.mesh.machine_ready(site.machine, VM)?;
        println!("killed and restarted, round {round}: serves again after {:?}", site.served(BACK)?);
    }
    let router = site.mesh.outside(site.machine + 1)?;
    for (from, to) in [("10.99.0.2/29", "10.99.0.6/29"), ("10.99.0.6/29", "10.99.0.2/29")] {
        router.ip(&["addr", "del", from, "dev", "outside"])?;
        router.ip(&["addr", "add", to, "dev", "outside"])?;
        router.ip(&["route", "replace", "default", "via", "10.99.0.1"])?;
        std::thread::sleep(Duration::from_secs(3));
        println!("at {to}: serves after {:?}", site.served(BACK)?);
    }
    // The federator restarts under it: nobody is a clone of anybody.
    site.mesh.process_mut("west/federator")?.kill()?;
    site.mesh.restart("west/federator")?;
    site.mesh.ready("west", 1, "federator")?;
    site.mesh.eventually("the machine is back in status", BACK, |mesh| {
        let status = mesh.status("west")?;
        let endpoints = status["endpoints"].as_array().cloned().unwrap_or_default();
        let back = endpoints.iter().any(|e| {
            e["spiffeId"].as_str().is_some_and(|id| id.ends_with(VM))
                && e["healthy"] == true
                && e["reason"] == ""
        });
        ensure!(back, "{status}");
        Ok(())
    })?;
    site.served(BACK)?;
    ensure!(site.findings()?.is_empty());
    let audit = site.mesh.operate("west", &["audit", "--action", "clone", "-o", "json"])?;
    ensure!(!audit.contains("/vm/vm-1"), "{audit}");
    Ok(())
}
