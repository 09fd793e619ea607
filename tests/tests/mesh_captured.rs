//! Applications that know nothing of the mesh, their connections captured: carried across clusters, passed on untouched,
//! or let through, by what they connect to and who they are.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tombolo_tests::capability::{require_netns, require_programs};
use tombolo_tests::captured::{
    PatientLoad, THERE, THERE6, at, capture, counter, curl, curl_as, neighbour, refused,
};
use tombolo_tests::link::Shape;
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::netns::Namespace;
use tombolo_tests::process::ProcessSpec;
use tombolo_tests::scenario::{application, export, flag, metric};

const CLIENT: u8 = 21;
const LISTEN: [&str; 4] = ["--capture-listen", "127.0.0.1:7447", "--capture-listen", "[::1]:7447"];
const FIRST_ANSWER: Duration = Duration::from_secs(15);

fn owned(flags: &[&str]) -> Vec<String> {
    flags.iter().map(|flag| (*flag).to_owned()).collect()
}

/// West serves `shop/web`; east has a machine that captures, and a neighbour of it that answers as `neighbour`.
struct Site {
    mesh: Mesh,
    there: Namespace,
}

impl Site {
    fn start(clusters: &[&str]) -> Result<Self> {
        let shape = Shape { delay: Duration::from_millis(2), ..Shape::PERFECT };
        let mut mesh = Mesh::start(&Layout { clusters, gateways: 1, shape, ..Layout::default() })?;
        if clusters.contains(&"west") {
            let app = mesh.cluster("west")?.address(21, 8080);
            application(&mut mesh, "west", "app", app, "west")?;
            mesh.sidecar("west", "web", &flag("--service", "web", 80, app))?;
            mesh.apply("west", &export("web"))?;
        }
        let there = neighbour(&mesh.cluster("east")?.namespace)?;
        for (name, address, port) in
            [("v4", THERE, 80), ("v6", THERE6, 80), ("other", THERE, 81), ("other6", THERE6, 81)]
        {
            listen(&mut mesh, &there, name, at(address, port)?, "neighbour")?;
        }
        Ok(Self { mesh, there })
    }

    fn east(&self) -> Result<&Namespace> {
        Ok(&self.mesh.cluster("east")?.namespace)
    }

    fn answers(&self, address: SocketAddr, who: &str, limit: Duration) -> Result<Duration> {
        self.mesh.eventually(&format!("{address} is {who}"), limit, |_| {
            let answer = curl(self.east()?, address, 3)?;
            ensure!(answer.contains(who), "{address} is {answer}");
            Ok(())
        })
    }

    fn captured(&self, result: &str) -> Result<f64> {
        let metrics = self.mesh.metrics("east", CLIENT)?;
        Ok(metric(&metrics, "tombolo_sidecar_captured_total", &[&format!("result=\"{result}\"")]))
    }
}

/// A small web application on a machine that is none of a cluster's.
fn listen(mesh: &mut Mesh, on: &Namespace, name: &str, address: SocketAddr, answers_as: &str) -> Result<()> {
    let spec = ProcessSpec::new(format!("app-{name}"), tombolo_tests::mesh::binary()?)
        .args(["demo-app", "--listen", &address.to_string(), "--name", answers_as])
        .within(on);
    mesh.spawn(&format!("app/{name}"), spec)?;
    mesh.eventually("the application listens", Duration::from_secs(5), |_| {
        tombolo_tests::mesh::http_get(on, address, "/healthz").map(drop)
    })?;
    Ok(())
}

#[test]
fn an_unmodified_client_is_served_across_clusters_at_an_old_address_and_nothing_else_is_touched() -> Result<()>
{
    let test = "an_unmodified_client_is_served_across_clusters_at_an_old_address_and_nothing_else_is_touched";
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &["curl", "setpriv"])) else {
        return Ok(());
    };
    let mut site = Site::start(&["east", "west"])?;
    let old = [at(THERE, 80)?, at(THERE6, 80)?];
    let addresses = old.map(|address| format!("{address}=shop/web"));
    let flags =
        [&LISTEN[..], &["--capture-address", &addresses[0], "--capture-address", &addresses[1]]].concat();
    for address in old {
        ensure!(curl(site.east()?, address, 3)?.contains("neighbour"), "before it is taken over");
    }
    site.mesh.sidecar("east", "client", &owned(&flags))?;
    let rules = ["apply", "--address", &addresses[0], "--address", &addresses[1]];
    capture(site.east()?, &rules)?.ok()?;
    for address in old {
        site.answers(address, "west", FIRST_ANSWER)?;
    }

    // Nothing but these two addresses touches the sidecar.
    let (taken, passed) = (counter(site.east()?, "taken")?, site.captured("passed")?);
    for address in [at(THERE, 81)?, at(THERE6, 81)?] {
        ensure!(curl(site.east()?, address, 3)?.contains("neighbour"), "{address} is not ours");
    }
    ensure!(counter(site.east()?, "taken")? == taken && site.captured("passed")? == passed);

    // Who is excluded goes where it was going, by each way to say who.
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let exclusions: [(&[&str], &[&str]); 6] = [
        (&["--exclude-uid", "65534"], &nobody),
        (&["--exclude-gid", "65534"], &nobody),
        (&["--exclude-port", "80"], &[]),
        (&["--exclude-cidr", "10.98.0.0/24,fd98::/64"], &[]),
        (&["--exclude-interface", "lan"], &[]),
        (&["--outbound", "none", "--inbound-port", "9999", "--inbound", "permissive"], &[]),
    ];
    for (exclusion, by) in exclusions {
        capture(site.east()?, &[&rules[..], exclusion].concat())?.ok()?;
        for address in old {
            let answer = curl_as(site.east()?, by, address, 3)?;
            ensure!(answer.contains("neighbour"), "{exclusion:?}: {address} is {answer}");
            if !by.is_empty() {
                ensure!(
                    curl(site.east()?, address, 3)?.contains("west"),
                    "{exclusion:?}: root is not excluded"
                );
            }
        }
    }
    capture(site.east()?, &rules)?.ok()?;
    for address in old {
        ensure!(curl(site.east()?, address, 3)?.contains("west"), "captured again");
    }
    // A virtual address that nobody has been given is refused at once, and does not leave the machine.
    refused(site.east()?, "241.64.200.1:80".parse()?)?;
    ensure!(site.captured("unknown")? == 1.0);
    capture(site.east()?, &["remove"])?.ok()?;
    for address in old {
        ensure!(curl(site.east()?, address, 3)?.contains("neighbour"), "given back");
    }
    // What the operator sees.
    let metrics = site.mesh.metrics("east", CLIENT)?;
    println!("{}", metrics.lines().filter(|l| l.contains("captured_total")).collect::<Vec<_>>().join("\n"));
    ensure!(site.captured("service")? >= 8.0, "{metrics}");
    let log = site.mesh.process("east/client")?.log();
    ensure!(log.contains("direction=\"outbound\"") && log.contains("shop/web"), "{log}");
    Ok(())
}

#[test]
fn a_sidecar_that_restarts_under_captured_load_refuses_nobody_and_one_that_is_gone_cuts_nobody_off()
-> Result<()> {
    let test =
        "a_sidecar_that_restarts_under_captured_load_refuses_nobody_and_one_that_is_gone_cuts_nobody_off";
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &["curl"])) else { return Ok(()) };
    let mut site = Site::start(&["east", "west"])?;
    let old = at(THERE, 80)?;
    let mapping = format!("{old}=shop/web");
    let flags = [&LISTEN[..], &["--capture-address", &mapping, "--drain", "3s"]].concat();
    site.mesh.sidecar("east", "client", &owned(&flags))?;
    capture(site.east()?, &["apply", "--address", &mapping, "--grace", "8s"])?.ok()?;
    site.answers(old, "west", FIRST_ANSWER)?;

    let load = PatientLoad::start(site.east()?, old, "west", 8);
    std::thread::sleep(Duration::from_secs(1));
    let begun = Instant::now();
    site.mesh.process_mut("east/client")?.stop()?;
    std::thread::sleep(Duration::from_millis(500));
    site.mesh.restart("east/client")?;
    site.mesh.ready("east", CLIENT, "client")?;
    let away = begun.elapsed();
    std::thread::sleep(Duration::from_secs(3));
    let (requests, slowest, wrong) = load.finish()?;
    println!(
        "restarted in {away:?} under load: {requests} requests, {} failed, the slowest took {slowest:?}",
        wrong.len()
    );
    ensure!(wrong.is_empty(), "{wrong:?}");
    // TCP tries again after 1, 3 and 7 s.
    ensure!(requests > 100 && slowest < away * 2 + Duration::from_secs(2), "{slowest:?}");

    // Killed for good: after the grace time, the old address answers by itself.
    site.mesh.process_mut("east/client")?.kill()?;
    let cut = site.answers(old, "neighbour", Duration::from_secs(20))?;
    println!("killed: the old address answers by itself after {cut:?}");
    for _ in 0..5 {
        ensure!(curl(site.east()?, old, 2)?.contains("neighbour"));
    }
    site.mesh.restart("east/client")?;
    site.mesh.ready("east", CLIENT, "client")?;
    let back = site.answers(old, "west", Duration::from_secs(5))?;
    println!("back: captured again after {back:?}");
    ensure!(counter(site.east()?, "past")? >= 6);
    Ok(())
}

#[test]
fn what_is_not_of_the_mesh_is_passed_on_untouched_and_a_sidecar_that_catches_itself_ends_it() -> Result<()> {
    let test = "what_is_not_of_the_mesh_is_passed_on_untouched_and_a_sidecar_that_catches_itself_ends_it";
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &["curl", "setpriv"])) else {
        return Ok(());
    };
    let mut site = Site::start(&["east"])?;
    site.mesh.sidecar("east", "client", &owned(&LISTEN))?;
    capture(site.east()?, &["apply", "--outbound", "all"])?.ok()?;
    for (number, address) in [at(THERE, 80)?, at(THERE6, 80)?, at(THERE, 81)?].into_iter().enumerate() {
        ensure!(curl(site.east()?, address, 3)?.contains("neighbour"), "{address}");
        ensure!(site.captured("passed")? == number as f64 + 1.0);
    }
    // Refused where it was going: reset, and counted.
    refused(site.east()?, at(THERE, 99)?)?;
    ensure!(site.captured("pass_failed")? == 1.0);
    // Connections to oneself are nobody else's.
    listen(&mut site.mesh, &site.there, "unused", at(THERE, 82)?, "neighbour")?;
    let admin = site.mesh.cluster("east")?.address(CLIENT, 7445);
    tombolo_tests::mesh::http_get(site.east()?, admin, "/ready")?;
    ensure!(site.captured("passed")? == 3.0);
    // Somebody who speaks to the listener itself gets nowhere.
    refused(site.east()?, "127.0.0.1:7447".parse()?)?;
    ensure!(site.captured("direct")? == 1.0);

    // A sidecar without the right to mark, and rules that do not exclude it: seen, and cut.
    site.mesh.process_mut("east/client")?.stop()?;
    let bin = tombolo_tests::mesh::binary()?.display().to_string();
    let (state, overlay, admin) = (
        site.mesh.state("east", "client").display().to_string(),
        site.mesh.cluster("east")?.address(CLIENT, 7442).to_string(),
        admin.to_string(),
    );
    let unprivileged =
        ["--bounding-set=-net_raw,-net_admin", "--inh-caps=-net_raw,-net_admin", "--regid=7447"];
    let spec = ProcessSpec::new("east-unprivileged", "setpriv")
        .args(unprivileged)
        .args(["--clear-groups", &bin, "sidecar", "--name", "client", "--state-dir", &state])
        .args(["--bind", &overlay, "--announce", &overlay, "--admin", &admin])
        .args(LISTEN)
        .within(site.east()?);
    site.mesh.spawn("east/unprivileged", spec)?;
    site.mesh.ready("east", CLIENT, "unprivileged")?;
    refused(site.east()?, at(THERE, 80)?)?;
    ensure!(site.captured("loop")? >= 1.0, "{}", site.mesh.metrics("east", CLIENT)?);
    let log = site.mesh.process("east/unprivileged")?.log();
    ensure!(
        log.contains("--exclude-uid") && log.contains("the rules catch this sidecar's own connections"),
        "{log}"
    );
    // With its group excluded it needs no privilege at all.
    capture(site.east()?, &["apply", "--outbound", "all", "--exclude-gid", "7447"])?.ok()?;
    let before = site.captured("passed")?;
    ensure!(curl(site.east()?, at(THERE, 80)?, 3)?.contains("neighbour"));
    ensure!(site.captured("passed")? == before + 1.0);
    Ok(())
}
