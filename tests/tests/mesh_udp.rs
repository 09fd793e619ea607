//! UDP services across clusters, through explicit listeners: what arrives, from where, how large; what ends, what is
//! refused, and what a flood costs.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use tombolo_tests::capability::require_netns;
use tombolo_tests::captured::{HERE, at, neighbour};
use tombolo_tests::datagrams::{Caller, Echo, Flood};
use tombolo_tests::link::Shape;
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::scenario::{application, export, flag, metric, west_first};
use tombolo_tests::traffic::RequestLoad;

/// The caller's sidecar in east.
const CLIENT: u8 = 21;
const FIRST_ANSWER: Duration = Duration::from_secs(15);
const SOON: Duration = Duration::from_secs(2);

fn udp(name: &str, service: &str, address: SocketAddr) -> [String; 2] {
    [name.to_owned(), format!("shop/{service}:53/udp={address}")]
}

fn owned(flags: &[&str]) -> Vec<String> {
    flags.iter().map(|flag| (*flag).to_owned()).collect()
}

fn mesh() -> Result<Mesh> {
    let shape = Shape { delay: Duration::from_millis(2), ..Shape::PERFECT };
    Mesh::start(&Layout { gateways: 1, shape, ..Layout::default() })
}

/// A sidecar of a cluster with an application behind it that answers with its name.
fn serve(mesh: &mut Mesh, cluster: &str, sidecar: &str, host: u8, name: &'static str) -> Result<Echo> {
    let address = mesh.cluster(cluster)?.address(host, 5353);
    let echo = Echo::start(&mesh.cluster(cluster)?.namespace, address, name)?;
    mesh.sidecar(cluster, sidecar, &udp("--service", "dns", address))?;
    Ok(echo)
}

fn of_client(mesh: &Mesh, name: &str, labels: &[&str]) -> Result<f64> {
    Ok(metric(&mesh.metrics("east", CLIENT)?, &format!("tombolo_sidecar_{name}"), labels))
}

#[test]
fn datagrams_of_any_size_are_carried_across_clusters_and_answers_come_from_where_they_were_asked()
-> Result<()> {
    let test =
        "datagrams_of_any_size_are_carried_across_clusters_and_answers_come_from_where_they_were_asked";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut mesh = mesh()?;
    let _echo = serve(&mut mesh, "west", "dns", 21, "west")?;
    mesh.apply("west", &export("dns"))?;
    let east = mesh.cluster("east")?;
    let (one, any) = (east.address(CLIENT, 9053), SocketAddr::from(([0, 0, 0, 0], 9054)));
    let hidden = east.address(CLIENT, 9055);
    let flags = [
        udp("--upstream", "dns", one).to_vec(),
        udp("--upstream", "dns", any).to_vec(),
        udp("--upstream", "hidden", hidden).to_vec(),
        owned(&["--udp-idle", "4s"]),
    ];
    mesh.sidecar("east", "client", &flags.concat())?;
    let namespace = &mesh.cluster("east")?.namespace;
    let caller = Caller::new(namespace, one)?;
    let (who, took) = caller.ask_until(b"hello", FIRST_ANSWER)?;
    println!("first answer after {took:?}");
    ensure!(who == "west", "{who}");

    // A listener at every address answers from the one that was asked: these sockets hear nobody else.
    for host in [CLIENT, 11, 1] {
        let address = mesh.cluster("east")?.address(host, 9054);
        Caller::new(namespace, address)?.ask_until(b"from where?", SOON)?;
    }
    // Whole, whatever the size: what no packet carries takes the flow's stream.
    for size in [0, 1, 200, 1200, 1400, 1473, 9000, 60_000] {
        let words = vec![size as u8; size];
        let (who, _) = caller.ask_until(&words, SOON)?;
        ensure!(who == "west", "{size} bytes: {who}");
    }
    // To callers on the network, too, whose frames carry 1500 bytes.
    let network = neighbour(namespace)?;
    let outside = Caller::new(&network, at(HERE, 9054)?)?;
    for size in [1200, 9000] {
        outside.ask_until(&vec![size as u8; size], SOON)?;
    }
    // Many flows at once, each with its own answers.
    let callers: Vec<Caller> = (0..200).map(|_| Caller::new(namespace, one)).collect::<Result<_>>()?;
    for (number, caller) in callers.iter().enumerate() {
        caller.ask_until(format!("caller {number}").as_bytes(), SOON)?;
    }
    let flows = of_client(&mesh, "udp_flows", &["direction=\"outbound\"", "shop/dns"])?;
    let served = metric(&mesh.metrics("west", 21)?, "tombolo_sidecar_udp_flows", &["direction=\"inbound\""]);
    ensure!(flows >= 200.0 && served >= 200.0, "{flows} flows, {served} served");
    // What is exported to nobody is carried to nobody.
    ensure!(Caller::new(namespace, hidden)?.ask(b"anybody?", SOON).is_err());
    mesh.eventually("a flow to nobody ends", Duration::from_secs(5), |mesh| {
        ensure!(of_client(mesh, "streams_ended_total", &["shop/hidden"])? >= 1.0);
        let dropped =
            of_client(mesh, "udp_dropped_total", &["direction=\"outbound\"", "reason=\"refused\""])?;
        ensure!(dropped >= 1.0, "what nobody took is not counted");
        Ok(())
    })?;
    // Silent ones end, on both sides, and are counted.
    mesh.eventually("idle flows end", Duration::from_secs(8), |mesh| {
        let left = of_client(mesh, "udp_flows", &["direction=\"outbound\""])?;
        let served = metric(&mesh.metrics("west", 21)?, "tombolo_sidecar_udp_flows", &[]);
        ensure!(left + served == 0.0, "{left} and {served} are open");
        Ok(())
    })?;
    let ended = of_client(&mesh, "streams_ended_total", &["reason=\"idle\"", "direction=\"outbound\""])?;
    ensure!(ended >= 200.0, "{ended} ended");
    // And begin again with the next datagram.
    caller.ask_until(b"still there?", SOON)?;
    let sent = of_client(&mesh, "udp_datagrams_total", &["to=\"peer\"", "shop/dns"])?;
    ensure!(sent >= 200.0, "{sent}");
    let log = mesh.process("east/client")?.log();
    ensure!(log.contains("protocol=\"udp\"") && log.contains("shop/dns"), "{log}");
    let ports = mesh.operate("east", &["get", "serviceimports", "dns", "-n", "shop", "-o", "yaml"])?;
    ensure!(ports.contains("protocol: UDP"), "{ports}");
    Ok(())
}

#[test]
fn a_flow_whose_endpoint_dies_goes_on_at_the_next_one_and_then_at_the_next_tier() -> Result<()> {
    let test = "a_flow_whose_endpoint_dies_goes_on_at_the_next_one_and_then_at_the_next_tier";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut mesh = mesh()?;
    let _one = serve(&mut mesh, "west", "one", 21, "one")?;
    let _two = serve(&mut mesh, "west", "two", 22, "two")?;
    mesh.apply("west", &export("dns"))?;
    let listen = mesh.cluster("east")?.address(CLIENT, 9053);
    mesh.sidecar("east", "client", &udp("--upstream", "dns", listen))?;
    let own = serve(&mut mesh, "east", "own", 22, "east")?;
    mesh.apply("east", &(export("dns") + &west_first("dns")))?;
    mesh.eventually("both of west are called", FIRST_ANSWER, |mesh| {
        // A socket of its own each time: a flow stays where it is for as long as it is answered there.
        let caller = Caller::new(&mesh.cluster("east")?.namespace, listen)?;
        let who = caller.ask(b"who?", Duration::from_millis(300))?;
        ensure!(who == "one" || who == "two", "{who}");
        let connections = of_client(mesh, "connections", &["shop/dns", "west"])?;
        ensure!(connections >= 2.0, "{connections}");
        Ok(())
    })?;
    let caller = Caller::new(&mesh.cluster("east")?.namespace, listen)?;
    let (first, _) = caller.ask_until(b"who?", SOON)?;
    ensure!(first != "east", "the first tier is west");

    mesh.process_mut(&format!("west/{first}"))?.kill()?;
    let other = if first == "one" { "two" } else { "one" };
    let moved = caller.answered_by(other, Duration::from_secs(8))?;
    println!("{first} was killed: {other} answers the same socket after {moved:?}");
    ensure!(moved < Duration::from_secs(4), "{moved:?}");

    mesh.process_mut(&format!("west/{other}"))?.kill()?;
    let moved = caller.answered_by("east", Duration::from_secs(12))?;
    println!("{other} was killed: east answers the same socket after {moved:?}");
    ensure!(moved < Duration::from_secs(6), "{moved:?}");
    ensure!(of_client(&mesh, "retries_total", &["shop/dns"])? >= 2.0, "the operator sees it");

    // An application that is gone, its sidecar not: refused, and asked again for as long as there is nobody else.
    drop(own);
    ensure!(caller.ask(b"who?", SOON).is_err());
    let address = mesh.cluster("east")?.address(22, 5353);
    let _again = Echo::start(&mesh.cluster("east")?.namespace, address, "again")?;
    let back = caller.answered_by("again", Duration::from_secs(12))?;
    println!("back after {back:?}");
    Ok(())
}

fn deny() -> &'static str {
    "---
apiVersion: tombolo.dev/v1alpha1
kind: AccessPolicy
metadata: { name: not-east, namespace: shop }
spec:
  targetRefs: [ { kind: Service, name: dns } ]
  action: DENY
  rules: [ { from: [ { clusters: [ east ] } ] } ]
"
}

#[test]
fn a_policy_denies_a_flow_at_once_and_a_flood_grows_no_memory_and_stops_no_connection() -> Result<()> {
    let test = "a_policy_denies_a_flow_at_once_and_a_flood_grows_no_memory_and_stops_no_connection";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut mesh = mesh()?;
    let dns = mesh.cluster("west")?.address(21, 5353);
    let _echo = Echo::start(&mesh.cluster("west")?.namespace, dns, "west")?;
    let app = mesh.cluster("west")?.address(21, 8080);
    application(&mut mesh, "west", "app", app, "west")?;
    let serves = [udp("--service", "dns", dns), flag("--service", "web", 80, app)].concat();
    mesh.sidecar(
        "west",
        "server",
        &[serves, owned(&["--max-udp-flows-per-peer", "100", "--udp-idle", "3s"])].concat(),
    )?;
    mesh.apply("west", &(export("dns") + &export("web")))?;
    let (listen, web) =
        (mesh.cluster("east")?.address(CLIENT, 9053), mesh.cluster("east")?.address(CLIENT, 9080));
    let calls = [udp("--upstream", "dns", listen), flag("--upstream", "web", 80, web)].concat();
    mesh.sidecar(
        "east",
        "client",
        &[calls, owned(&["--max-udp-flows", "300", "--udp-idle", "3s"])].concat(),
    )?;
    let caller = Caller::new(&mesh.cluster("east")?.namespace, listen)?;
    caller.ask_until(b"hello", FIRST_ANSWER)?;

    // The open flow is cut, a new one is refused, and both are counted where the policy is.
    mesh.apply("west", deny())?;
    mesh.eventually("nobody of east is answered", Duration::from_secs(5), |_| {
        ensure!(caller.ask(b"still?", Duration::from_millis(300)).is_err());
        Ok(())
    })?;
    ensure!(Caller::new(&mesh.cluster("east")?.namespace, listen)?.ask(b"and I?", SOON).is_err());
    let seen = mesh.metrics("west", 21)?;
    for verdict in ["cut", "denied"] {
        let count = metric(&seen, "tombolo_sidecar_access_total", &["shop/dns", &format!("\"{verdict}\"")]);
        ensure!(count >= 1.0, "{verdict}: {seen}");
    }
    mesh.operate("west", &["delete", "accesspolicy", "not-east", "-n", "shop", "--yes"])?;
    caller.ask_until(b"again?", Duration::from_secs(8))?;

    // Ten times as many callers as there may be flows, beside requests over TCP.
    let load = |seconds| -> Result<(usize, Duration)> {
        let load = RequestLoad::start(&mesh.cluster("east")?.namespace, web, "/", 50);
        std::thread::sleep(Duration::from_secs(seconds));
        let answers = load.finish()?;
        for answer in &answers {
            ensure!(answer.body.is_ok(), "{:?}", answer.body);
        }
        let mut took: Vec<_> = answers.iter().map(|answer| answer.took).collect();
        took.sort();
        Ok((took.len(), took.get(took.len() * 95 / 100).copied().unwrap_or_default()))
    };
    let rss = |mesh: &Mesh, name: &str| -> Result<u64> {
        Ok(mesh.process(name)?.usage().map_or(0, |usage| usage.rss_bytes))
    };
    let quiet = load(3)?;
    let before = (rss(&mesh, "east/client")?, rss(&mesh, "west/server")?);
    let flood = Flood::start(&mesh.cluster("east")?.namespace, listen, 400, 3000);
    let flooded = load(5)?;
    let sent = flood.finish()?;
    let after = (rss(&mesh, "east/client")?, rss(&mesh, "west/server")?);
    let grown = [(before.0, after.0), (before.1, after.1)].map(|(b, a)| a.saturating_sub(b) / 1024);
    println!(
        "{sent} datagrams of a flood: {grown:?} KB more at caller and callee; requests {quiet:?}, beside it {flooded:?}"
    );
    ensure!(grown.iter().all(|kb| *kb < 24 * 1024), "{grown:?} KB");
    ensure!(
        flooded.0 >= 200 && flooded.1 < quiet.1 + Duration::from_millis(250),
        "{quiet:?}, then {flooded:?}"
    );
    ensure!(
        of_client(&mesh, "udp_dropped_total", &["flows_full"])? >= 1000.0,
        "{}",
        mesh.metrics("east", CLIENT)?
    );
    ensure!(of_client(&mesh, "udp_flows", &["direction=\"outbound\""])? <= 300.0);
    let refused = metric(&mesh.metrics("west", 21)?, "tombolo_sidecar_streams_ended_total", &["overloaded"]);
    ensure!(refused >= 100.0, "no caller has more than its share: {refused}");
    // Once it is over there is room again.
    let took = mesh.eventually("there is room again", Duration::from_secs(10), |mesh| {
        let caller = Caller::new(&mesh.cluster("east")?.namespace, listen)?;
        caller.ask(b"room?", Duration::from_secs(1)).map(drop)
    })?;
    println!("room again after {took:?}");
    Ok(())
}
