//! UDP of programs that know nothing of the mesh: by a name and its virtual addresses, at an old address that was taken over,
//! and past the sidecar while it is away. The application is a name server, its caller `dig`.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::capability::{require_netns, require_programs};
use tombolo_tests::captured::{THERE, at, capture, counter, neighbour, other_tools, run};
use tombolo_tests::datagrams::{Caller, Echo};
use tombolo_tests::link::Shape;
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::netns::Namespace;
use tombolo_tests::resolver::Resolver;
use tombolo_tests::scenario::{export, metric};

const CLIENT: u8 = 21;
const V6: &str = "fd00:241::/64";
const FIRST_ANSWER: Duration = Duration::from_secs(15);
const SOON: Duration = Duration::from_secs(2);
const NAME: &str = "dns.shop.svc.clusterset.local";

/// What `dig` prints, short, after one try of two seconds.
fn dig(namespace: &Namespace, server: SocketAddr, question: &[&str]) -> Result<String> {
    let (host, port) = (format!("@{}", server.ip()), server.port().to_string());
    let options = ["-p", &port, "+short", "+tries=1", "+time=2", "+notcp"];
    let ended = run(namespace, "dig", &[&[host.as_str()], &options[..], question].concat(), "")?;
    Ok(ended.ok()?.trim().to_owned())
}

/// Every rule of every tool, without what it has counted.
fn rules_of_all(namespace: &Namespace) -> Result<String> {
    run(namespace, "nft", &["-s", "list", "ruleset"], "")?.ok()
}

/// The rules and routes by which captured datagrams come in again.
fn policy_routes(namespace: &Namespace) -> Result<String> {
    let mut all = String::new();
    for family in ["-4", "-6"] {
        all += &run(namespace, "ip", &[family, "-N", "rule", "show"], "")?.ok()?;
        all += &run(namespace, "ip", &[family, "-N", "route", "show", "table", "all", "proto", "116"], "")?
            .ok()?;
    }
    Ok(all)
}

/// What the rules and the sidecar say of datagrams.
fn seen(mesh: &Mesh) -> Result<String> {
    let shown = capture(&mesh.cluster("east")?.namespace, &["show"])?.out;
    let metrics = mesh.metrics("east", CLIENT)?;
    let ours =
        |line: &&str| line.contains("_udp_") || line.contains("captured_total") || line.contains("shop/dns");
    Ok(metrics.lines().filter(ours).fold(shown, |seen, line| seen + line + "\n"))
}

#[test]
fn dig_asks_another_clusters_name_server_by_name_and_at_its_old_address_and_nothing_else_is_touched()
-> Result<()> {
    let test =
        "dig_asks_another_clusters_name_server_by_name_and_at_its_old_address_and_nothing_else_is_touched";
    let programs = ["dig", "iptables-nft"];
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &programs)) else { return Ok(()) };
    let shape = Shape { delay: Duration::from_millis(2), ..Shape::PERFECT };
    let mut mesh = Mesh::start(&Layout { gateways: 1, shape, ..Layout::default() })?;
    mesh.federator_with("east", &["--virtual-range", V6])?;
    let application = mesh.cluster("west")?.address(21, 5353);
    let _server = Resolver::start(&mesh.cluster("west")?.namespace, application)?;
    mesh.sidecar("west", "server", &["--service".to_owned(), format!("shop/dns:53/udp={application}")])?;
    mesh.apply("west", &export("dns"))?;
    // The neighbour's name server is the old system; its echo is nobody's business.
    let there = neighbour(&mesh.cluster("east")?.namespace)?;
    other_tools(&mesh.cluster("east")?.namespace)?;
    let (old, other) = (at(THERE, 53)?, at(THERE, 54)?);
    let (_old, _other) = (Echo::start(&there, old, "old")?, Echo::start(&there, other, "other")?);
    let names = mesh.cluster("east")?.address(CLIENT, 7453);
    let (mapping, listen) = (format!("{old}/udp=shop/dns"), names.to_string());
    let flags =
        ["--capture-listen", "127.0.0.1:7447,[::1]:7447", "--virtual-range", V6, "--dns-listen", &listen];
    let flags = [&flags[..], &["--dns-upstream", "none", "--capture-address", &mapping]].concat();
    mesh.sidecar("east", "client", &flags.iter().map(|flag| (*flag).to_owned()).collect::<Vec<_>>())?;
    let east = &mesh.cluster("east")?.namespace;
    let before = (rules_of_all(east)?, policy_routes(east)?);
    let caller = Caller::new(east, old)?;
    ensure!(caller.ask(b"before", SOON)? == "old", "before it is taken over");

    let rules = ["apply", "--virtual-range", V6, "--address", &mapping];
    capture(east, &rules)?.ok()?;
    let applied = policy_routes(east)?;
    capture(east, &rules)?.ok()?;
    ensure!(policy_routes(east)? == applied, "applied twice is not applied once: {applied}");
    ensure!(applied.matches("fwmark 0x7463").count() == 2, "one rule for each family: {applied}");
    // By name, in both families.
    let mut addresses = Vec::new();
    mesh.eventually("the name resolves", FIRST_ANSWER, |mesh| {
        let east = &mesh.cluster("east")?.namespace;
        let found = dig(east, names, &[NAME, "A"])? + "\n" + &dig(east, names, &[NAME, "AAAA"])?;
        let parsed: Vec<std::net::IpAddr> = found.lines().filter_map(|line| line.parse().ok()).collect();
        ensure!(parsed.len() == 2, "{found:?}");
        Ok(())
    })?;
    for kind in ["A", "AAAA"] {
        let address = dig(east, names, &[NAME, kind])?.parse().context("an address")?;
        addresses.push(SocketAddr::new(address, 53));
    }
    let srv = dig(east, names, &[NAME, "SRV"])?;
    ensure!(srv.ends_with(&format!(" 53 {NAME}.")), "{srv}");
    addresses.push(old);
    for address in &addresses {
        mesh.eventually(&format!("{address} answers"), FIRST_ANSWER, |mesh| {
            let answer = dig(&mesh.cluster("east")?.namespace, *address, &["www.example", "A"]);
            let answer = answer.with_context(|| seen(mesh).unwrap_or_default())?;
            ensure!(answer == "192.0.2.80", "{answer}");
            Ok(())
        })?;
    }
    // A flow of its own for each socket, whatever else is asked meanwhile.
    for number in 0..20 {
        let answer = dig(east, addresses[number % 3], &["www.example", "A"])?;
        ensure!(answer == "192.0.2.80", "{answer}");
    }
    // Another port of the same machine is not ours, and neither is what has no name.
    let (seen, taken) = (counter(east, "datagrams")?, Caller::new(east, other)?.ask(b"whose?", SOON)?);
    ensure!(taken == "other" && counter(east, "datagrams")? == seen, "{taken}");
    ensure!(seen >= 23, "{seen} datagrams were handed over");
    let nobody: SocketAddr = "241.64.200.1:53".parse()?;
    ensure!(Caller::new(east, nobody)?.ask(b"anybody?", SOON).is_err());
    let metrics = mesh.metrics("east", CLIENT)?;
    ensure!(metric(&metrics, "tombolo_sidecar_udp_dropped_total", &["unknown"]) >= 1.0, "{metrics}");
    let carried = metric(&metrics, "tombolo_sidecar_captured_total", &["result=\"service\""]);
    ensure!(carried >= 20.0, "{carried}");

    // While the sidecar is away: what can do without it goes past it, after one that finds out; virtual addresses fail.
    mesh.process_mut("east/client")?.kill()?;
    let begun = Instant::now();
    let east = &mesh.cluster("east")?.namespace;
    let (who, after) = Caller::new(east, old)?.ask_until(b"and now?", Duration::from_secs(5))?;
    ensure!(who == "old", "{who}");
    println!("killed: the old address answers by itself after {after:?}");
    let refused = run(east, "dig", &["@241.64.0.1", "+tries=1", "+time=2", "www.example"], "")?;
    ensure!(refused.code != 0, "{}", refused.out);
    ensure!(counter(east, "datagrams_past")? >= 1 && counter(east, "datagrams_refused")? >= 1);
    mesh.restart("east/client")?;
    mesh.ready("east", CLIENT, "client")?;
    let back = mesh.eventually("captured again", FIRST_ANSWER, |mesh| {
        let answer = dig(&mesh.cluster("east")?.namespace, old, &["www.example", "A"])?;
        ensure!(answer == "192.0.2.80", "{answer}");
        Ok(())
    })?;
    println!("back after {back:?}, {:?} after it was killed", begun.elapsed());

    // Half removed is seen; removed leaves nothing.
    let east = &mesh.cluster("east")?.namespace;
    run(east, "ip", &["-4", "rule", "del", "fwmark", "0x7463"], "")?.ok()?;
    let shown = capture(east, &["show"])?;
    ensure!(shown.code == 3 && shown.out.contains("damaged"), "{}", shown.out);
    capture(east, &rules)?.ok()?;
    ensure!(capture(east, &["show"])?.code == 0);
    capture(east, &["remove"])?.ok()?;
    let left = (rules_of_all(east)?, policy_routes(east)?);
    ensure!(left == before, "{left:?}\n\n{before:?}");
    ensure!(Caller::new(east, old)?.ask(b"given back?", SOON)? == "old");
    Ok(())
}
