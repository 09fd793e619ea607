//! A machine whose disk was copied: the second that comes with its key is refused while the first lives, the first is
//! told, and goes on; a restart and another address of the same machine are no clone.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;
use tombolo_tests::capability::require_netns;
use tombolo_tests::captured::{Ended, run};
use tombolo_tests::legacy::{Legacy, VM, VM_APP};
use tombolo_tests::mesh::{binary, http_get};
use tombolo_tests::process::ProcessSpec;
use tombolo_tests::scenario::metric;

/// Process start, a handshake, a registration, and the moment in which the first could answer.
const BACK: Duration = Duration::from_secs(15);
const SOON: Duration = Duration::from_secs(10);

struct Site(Legacy);

impl Site {
    fn start() -> Result<Self> {
        Legacy::start(&[]).map(Self)
    }

    /// Another machine with a copy of the first's disk.
    fn copy(&mut self) -> Result<()> {
        let (from, to) = (self.0.mesh.state("vm", VM), self.0.mesh.state("vm", "copy"));
        let copied = Command::new("cp").arg("-a").args([&from, &to]).status()?;
        ensure!(copied.success(), "cp -a");
        let state = to.display().to_string();
        let args = ["sidecar", "--name", VM, "--state-dir", &state, "--bind", "0.0.0.0:7452"];
        let service = format!("shop/legacy:80={VM_APP}");
        let args = [&args[..], &["--admin", "127.0.0.1:7455", "--service", &service]].concat();
        let copy =
            ProcessSpec::new("copy", binary()?).args(args).within(self.0.mesh.outside(self.0.machine)?);
        self.0.mesh.spawn("vm/copy", copy)
    }

    fn machine_metrics(&self, admin: &str) -> Result<String> {
        http_get(self.0.mesh.outside(self.0.machine)?, admin.parse()?, "/metrics")
    }

    /// `tombolo check`, with its findings.
    fn check(&self) -> Result<Ended> {
        let (bin, socket) = (binary()?.display().to_string(), self.0.mesh.socket("west"));
        run(&self.0.mesh.cluster("west")?.namespace, &bin, &["--socket", &socket, "check", "-o", "json"], "")
    }

    fn findings(&self) -> Result<Vec<Value>> {
        let status = self.0.mesh.status("west")?;
        let findings = status["findings"].as_array().cloned().unwrap_or_default();
        Ok(findings.into_iter().filter(|finding| finding["reason"] == "IdentityUsedTwice").collect())
    }
}

#[test]
fn a_copied_machine_is_refused_while_the_first_lives_and_the_first_is_told() -> Result<()> {
    let test = "a_copied_machine_is_refused_while_the_first_lives_and_the_first_is_told";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut site = Site::start()?;
    let before = site.check()?;
    ensure!(!before.out.contains("IdentityUsedTwice"), "found before it is there: {before:?}");
    site.copy()?;
    let took = site.0.mesh.eventually("the copy is refused and says so", SOON, |mesh| {
        let log = mesh.process("vm/copy")?.log();
        ensure!(log.contains("used by another process") && log.contains("tombolo vm token"), "{log}");
        let metrics = site.machine_metrics("127.0.0.1:7455")?;
        ensure!(metric(&metrics, "tombolo_sidecar_clone_refused", &[]) == 1.0, "{metrics}");
        Ok(())
    })?;
    println!("the copy was refused {took:?} after its start");
    site.0.mesh.eventually("the first is told", SOON, |mesh| {
        let log = mesh.process(&format!("vm/{VM}"))?.log();
        ensure!(log.contains("came with this machine's identity and was refused"), "{log}");
        let metrics = site.machine_metrics("127.0.0.1:7445")?;
        ensure!(metric(&metrics, "tombolo_sidecar_clones_seen", &[]) == 1.0, "{metrics}");
        Ok(())
    })?;
    // What the operator sees: a finding, a metric, and the audit log.
    let findings = site.findings()?;
    ensure!(findings.len() == 1 && findings[0]["severity"] == "critical", "{findings:?}");
    let check = site.check()?;
    ensure!(check.code == 3 && check.out.contains("IdentityUsedTwice"), "a check finds it: {check:?}");
    let metrics = site.0.mesh.metrics("west", 1)?;
    let labels = ["call=\"hello\"", "result=\"cloned\""];
    ensure!(metric(&metrics, "tombolo_federator_requests_total", &labels) >= 1.0, "{metrics}");
    site.0.mesh.eventually("the audit log has it", SOON, |mesh| {
        let audit = mesh.operate("west", &["audit", "--action", "clone", "-o", "json"])?;
        ensure!(audit.contains("/vm/vm-1") && audit.contains("refused"), "{audit}");
        Ok(())
    })?;
    // The first has lost nothing.
    for _ in 0..20 {
        site.0.served(Duration::ZERO)?;
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
        site.0.mesh.process_mut(&name)?.kill()?;
        let begun = Instant::now();
        site.0.mesh.restart(&name)?;
        site.0.served(BACK)?;
        println!("killed and restarted, round {round}: serves again after {:?}", begun.elapsed());
        let holder = site.0.mesh.process(&name)?;
        ensure!(!holder.log().contains("is refused"), "{}", holder.tail());
    }
    // As a reboot has it: everything of the machine is gone, and nothing is heard of it for some seconds.
    for process in [name.as_str(), "vm/app"] {
        site.0.mesh.process_mut(process)?.kill()?;
    }
    std::thread::sleep(Duration::from_secs(3));
    let begun = Instant::now();
    for process in ["vm/app", name.as_str()] {
        site.0.mesh.restart(process)?;
    }
    site.0.served(BACK)?;
    println!("rebooted: serves again {:?} after its processes start", begun.elapsed());
    let router = site.0.mesh.outside(site.0.machine + 1)?;
    for (from, to) in [("10.99.0.2/29", "10.99.0.6/29"), ("10.99.0.6/29", "10.99.0.2/29")] {
        router.ip(&["addr", "del", from, "dev", "outside"])?;
        router.ip(&["addr", "add", to, "dev", "outside"])?;
        router.ip(&["route", "replace", "default", "via", "10.99.0.1"])?;
        std::thread::sleep(Duration::from_secs(3));
        println!("at {to}: serves after {:?}", site.0.served(BACK)?);
    }
    // The federator restarts under it: nobody is a clone of anybody.
    site.0.mesh.process_mut("west/federator")?.kill()?;
    site.0.mesh.restart("west/federator")?;
    site.0.mesh.ready("west", 1, "federator")?;
    site.0.mesh.eventually("the machine is back in status", BACK, |mesh| {
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
    site.0.served(BACK)?;
    ensure!(site.findings()?.is_empty());
    let audit = site.0.mesh.operate("west", &["audit", "--action", "clone", "-o", "json"])?;
    ensure!(!audit.contains("/vm/vm-1"), "{audit}");
    Ok(())
}
