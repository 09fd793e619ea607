//! A machine, and the cluster with it, that was off for so long that every identity and key has ended: it comes back by
//! possession of its key for 30 days, through gateways that have moved, and is told what to do after that.
//!
//! Time passes by the clocks that the processes are started with; nothing runs meanwhile, as on a holiday.

use std::time::Duration;

use anyhow::{Result, ensure};
use tombolo_tests::capability::require_netns;
use tombolo_tests::legacy::{Legacy, VM};
use tombolo_tests::mesh::http_get;
use tombolo_tests::scenario::metric;

const DAY: i64 = 24 * 3600;
const ID: &str = "spiffe://acme.example/cluster/west/vm/vm-1";
/// Where a gateway will be that is not there when the machine goes off.
const NEW_GATEWAY: &str = "10.61.0.12:7440";
/// Process start, two handshakes, a registration, and the pauses between attempts.
const BACK: Duration = Duration::from_secs(30);

struct Holiday(Legacy);

impl Holiday {
    fn start() -> Result<Self> {
        Legacy::start(&["--gateway", NEW_GATEWAY]).map(Self)
    }

    /// Everything goes off, and all but the machine comes back.
    fn off_for(&mut self, seconds: i64, gateways: &[&str]) -> Result<()> {
        self.0.mesh.sleep(seconds)?;
        self.0.mesh.restart("west/federator")?;
        self.0.mesh.ready("west", 1, "federator")?;
        for name in gateways {
            self.0.mesh.restart(&format!("west/{name}"))?;
        }
        self.0.mesh.restart("west/client")
    }

    fn on(&mut self) -> Result<()> {
        self.0.mesh.restart("vm/app")?;
        self.0.mesh.restart(&format!("vm/{VM}"))
    }

    fn vm_log(&self) -> Result<String> {
        Ok(self.0.mesh.process(&format!("vm/{VM}"))?.log())
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
        holiday.0.served(BACK)?
    );
    let log =
        holiday.0.mesh.operate("west", &["audit", "--action", "renew", "--identity", VM, "-o", "json"])?;
    ensure!(log.contains("the one before had ended 69"), "29 days are 696 hours: {log}");
    let metrics = holiday.0.mesh.metrics("west", 1)?;
    let renewed =
        metric(&metrics, "tombolo_federator_requests_total", &["call=\"renew_lapsed\"", "result=\"ok\""]);
    ensure!(renewed >= 3.0, "the gateway, the client and the machine: {metrics}");

    holiday.off_for(32 * DAY, &[])?;
    holiday.on()?;
    let name = format!("vm/{VM}");
    let status = holiday.0.mesh.process_mut(&name)?.wait(Duration::from_secs(10))?;
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
    holiday.0.mesh.gateway("west", "gw-2")?;
    holiday.on()?;
    println!("with other gateways it serves again after {:?}", holiday.0.served(BACK)?);
    // It knows them by now: off for another week, it needs nobody to say where they are.
    let known = std::fs::read_to_string(holiday.0.mesh.state("vm", VM).join("member.json"))?;
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
    holiday.0.mesh.eventually("the gateway is connected", BACK, |mesh| {
        let status = mesh.status("west")?;
        ensure!(status["gateways"][0]["state"] == "ready", "{status}");
        Ok(())
    })?;
    holiday.0.mesh.operate("west", &["revoke", ID, "--reason", "left on a train", "--yes"])?;
    holiday.on()?;
    let process = holiday.0.mesh.process(&format!("vm/{VM}"))?;
    process.wait_for_log("the identity has ended and is not renewed yet", Duration::from_secs(30))?;
    // Its packets end at the gateway: no handshake, no signature, nothing of it reaches the federator.
    let metrics = holiday.0.mesh.metrics("west", 1)?;
    let asked = metric(&metrics, "tombolo_federator_requests_total", &["call=\"renew_lapsed\""]);
    ensure!(asked == 2.0, "the gateway and the client alone: {metrics}");
    ensure!(http_get(holiday.0.mesh.outside(holiday.0.machine)?, "127.0.0.1:7445".parse()?, "/live").is_ok());
    holiday.0.mesh.operate("west", &["unrevoke", ID, "--yes"])?;
    println!("un-revoked it serves again after {:?}", holiday.0.served(Duration::from_secs(90))?);
    Ok(())
}
