//! A machine, and the cluster with it, that was off for so long that every identity and key has ended: it comes back by
//! possession of its key for 30 days, through gateways that have moved, and is told what to do after that.
//!
//! Time passes by the clocks that the processes are started with; nothing runs meanwhile, as on a holiday.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use tombolo_tests::capability::require_netns;
use tombolo_tests::mesh::{Layout, Mesh, binary, http_get};
use tombolo_tests::process::ProcessSpec;
use tombolo_tests::scenario::{flag, metric};

const DAY: i64 = 24 * 3600;
const VM: &str = "vm-1";
const ID: &str = "spiffe://acme.example/cluster/west/vm/vm-1";
const VM_APP: &str = "127.0.0.1:8080";
/// Where a gateway will be that is not there when the machine goes off.
const NEW_GATEWAY: &str = "10.61.0.12:7440";
/// Process start, two handshakes, a registration, and the pauses between attempts.
const BACK: Duration = Duration::from_secs(30);

/// West with one gateway, and a machine that serves `shop/legacy` to a sidecar of west.
struct Holiday {
    mesh: Mesh,
    machine: usize,
    legacy: SocketAddr,
}

impl Holiday {
    fn start() -> Result<Self> {
        let mut mesh = Mesh::start(&Layout { clusters: &["west"], gateways: 1, ..Layout::default() })?;
        let flags = [
            flag("--service", "legacy", 80, VM_APP.parse()?),
            ["--gateway".to_owned(), NEW_GATEWAY.to_owned()],
        ]
        .concat();
        let machine = mesh.machine("west", VM, &flags)?;
        let app = ProcessSpec::new("vm-app", binary()?)
            .args(["demo-app", "--listen", VM_APP, "--name", VM])
            .within(mesh.outside(machine)?);
        mesh.spawn("vm/app", app)?;
        let legacy = mesh.cluster("west")?.address(21, 9080);
        mesh.sidecar("west", "client", &flag("--upstream", "legacy", 80, legacy))?;
        let holiday = Self { mesh, machine, legacy };
        holiday.served(Duration::from_secs(15))?;
        Ok(holiday)
    }

    fn served(&self, limit: Duration) -> Result<Duration> {
        self.mesh.eventually("the machine serves", limit, |mesh| {
            let answer = http_get(&mesh.cluster("west")?.namespace, self.legacy, "/")?;
            ensure!(answer.contains(VM), "{answer}");
            Ok(())
        })
    }

    /// Everything goes off, and all but the machine comes back.
    fn off_for(&mut self, seconds: i64, gateways: &[&str]) -> Result<()> {
        self.mesh.sleep(seconds)?;
        self.mesh.restart("west/federator")?;
        self.mesh.ready("west", 1, "federator")?;
        for name in gateways {
            self.mesh.restart(&format!("west/{name}"))?;
        }
        self.mesh.restart("west/client")
    }

    fn on(&mut self) -> Result<()> {
        self.mesh.restart("vm/app")?;
        self.mesh.restart(&format!("vm/{VM}"))
    }

    fn vm_log(&self) -> Result<String> {
        Ok(self.mesh.process(&format!("vm/{VM}"))?.log())
    }
}

#[test]
fn after_29_days_everybody_comes_back_and_after_32_the_machine_is_told_what_to_do() -> Result<()> {
    let test = "after_29_days_everybody_comes_back_and_after_32_the_machine_is_told_what_to_do";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut holiday = Holiday::start()?;
    // A leaf lives a day, so that it has ended 29 days ago.
    holiday.off_for(30 * DAY, &["gw-1"])?;
    holiday.on()?;
    println!(
        "29 days after its identity had ended the machine serves again after {:?}",
        holiday.served(BACK)?
    );
    let log =
        holiday.mesh.operate("west", &["audit", "--action", "renew", "--identity", VM, "-o", "json"])?;
    ensure!(log.contains("the one before had ended 69"), "29 days are 696 hours: {log}");
    let metrics = holiday.mesh.metrics("west", 1)?;
    let renewed =
        metric(&metrics, "tombolo_federator_requests_total", &["call=\"renew_lapsed\"", "result=\"ok\""]);
    ensure!(renewed >= 3.0, "the gateway, the client and the machine: {metrics}");

    holiday.off_for(32 * DAY, &[])?;
    holiday.on()?;
    let name = format!("vm/{VM}");
    let status = holiday.mesh.process_mut(&name)?.wait(Duration::from_secs(10))?;
    let log = holiday.vm_log()?;
    println!("{}", log.lines().last().unwrap_or_default());
    ensure!(!status.success(), "{status}");
    for said in ["ended 31 days ago", "30 days", "`tombolo vm token vm-1`", "--join-token-file"] {
        ensure!(log.contains(said), "{said:?} is missing: {log}");
    }
    Ok(())
}

#[test]
fn a_machine_finds_the_cluster_again_when_its_gateways_have_moved() -> Result<()> {
    let test = "a_machine_finds_the_cluster_again_when_its_gateways_have_moved";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut holiday = Holiday::start()?;
    holiday.off_for(20 * DAY, &[])?;
    // The gateway of before is gone for good; another one joins, elsewhere.
    holiday.mesh.gateway("west", "gw-2")?;
    holiday.on()?;
    println!("with other gateways it serves again after {:?}", holiday.served(BACK)?);
    // It knows them by now: off for another week, it needs nobody to say where they are.
    let known = std::fs::read_to_string(holiday.mesh.state("vm", VM).join("member.json"))?;
    ensure!(known.contains(NEW_GATEWAY), "{known}");
    Ok(())
}

#[test]
fn a_machine_that_was_revoked_while_it_was_off_stays_out_until_that_is_taken_back() -> Result<()> {
    let test = "a_machine_that_was_revoked_while_it_was_off_stays_out_until_that_is_taken_back";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut holiday = Holiday::start()?;
    holiday.off_for(10 * DAY, &["gw-1"])?;
    // Connected, so that it is told; until then it knows what it knew before the holiday.
    holiday.mesh.eventually("the gateway is connected", BACK, |mesh| {
        let status = mesh.status("west")?;
        ensure!(status["gateways"][0]["state"] == "ready", "{status}");
        Ok(())
    })?;
    holiday.mesh.operate("west", &["revoke", ID, "--reason", "left on a train", "--yes"])?;
    holiday.on()?;
    let process = holiday.mesh.process(&format!("vm/{VM}"))?;
    process.wait_for_log("the identity has ended and is not renewed yet", Duration::from_secs(30))?;
    // Its packets end at the gateway: no handshake, no signature, nothing of it reaches the federator.
    let metrics = holiday.mesh.metrics("west", 1)?;
    let asked = metric(&metrics, "tombolo_federator_requests_total", &["call=\"renew_lapsed\""]);
    ensure!(asked == 2.0, "the gateway and the client alone: {metrics}");
    ensure!(http_get(holiday.mesh.outside(holiday.machine)?, "127.0.0.1:7445".parse()?, "/live").is_ok());
    holiday.mesh.operate("west", &["unrevoke", ID, "--yes"])?;
    println!("un-revoked it serves again after {:?}", holiday.served(Duration::from_secs(90))?);
    Ok(())
}
