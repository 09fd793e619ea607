//! A gateway in hostile hands: on the path of every packet, at a real gateway's address and with its keys. It can delay
//! and deny; it never reads, alters, impersonates, or closes a connection that another replica still carries.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tombolo_tests::capability::require_netns;
use tombolo_tests::hostile::{Forged, HostileGateway, forge, nobody};
use tombolo_tests::link::{Shape, Tap, Tapped};
use tombolo_tests::mesh::{Layout, Mesh, http_get};
use tombolo_tests::scenario::{World, application, export, failed, flag, flowing, metric, stalls};
use tombolo_tests::stolen::{Stolen, endpoint};
use tombolo_tests::traffic::{RequestLoad, StreamReader};
use tombolo_tests::wire::{udp, with_payload};

const LINK: Shape =
    Shape { delay: Duration::from_millis(2), rate_bits_per_second: Some(50_000_000), ..Shape::PERFECT };
/// Denial may stall; it may not break.
const LIMIT: Duration = Duration::from_secs(30);
/// After a denial of several seconds the next try may be as far away again (RFC 9002 section 6.2: PTOs double).
const DENIED: Duration = Duration::from_secs(40);

/// What the man in the middle does to every `one_in`th datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attack {
    FlipBits,
    Replay,
    Delay,
    Drop,
    Reorder,
    Truncate,
    Swap,
}

const ATTACKS: [Attack; 7] = [
    Attack::FlipBits,
    Attack::Replay,
    Attack::Delay,
    Attack::Drop,
    Attack::Reorder,
    Attack::Truncate,
    Attack::Swap,
];

/// A tap that treats one datagram in `one_in` so; counts those in `done`.
fn attacker(attack: Attack, one_in: u64, done: Arc<AtomicU64>) -> Tap {
    let (mut seen, mut earlier) = (0u64, Vec::new());
    Box::new(move |packet| {
        seen = seen.wrapping_add(1);
        let Some(datagram) = udp(packet) else { return Tapped::Pass };
        let held = std::mem::replace(&mut earlier, datagram.payload.to_vec());
        if seen % one_in != 0 {
            return Tapped::Pass;
        }
        done.fetch_add(1, Ordering::Relaxed);
        let mut payload = datagram.payload.to_vec();
        let at = |spread: u64| (seen.wrapping_mul(0x9e37_79b9_7f4a_7c15) % spread.max(1)) as usize;
        let millis = Duration::from_millis;
        let instead = match attack {
            Attack::FlipBits => {
                let place = at(payload.len() as u64);
                if let Some(byte) = payload.get_mut(place) {
                    *byte ^= 1 << (seen / one_in % 8);
                }
                with_payload(packet, &payload).map(|packet| vec![(Duration::ZERO, packet)])
            }
            Attack::Replay => Some([0, 0, 40, 400].map(|late| (millis(late), packet.to_vec())).to_vec()),
            Attack::Delay => Some(vec![(millis(150), packet.to_vec())]),
            Attack::Drop => Some(Vec::new()),
            Attack::Reorder => Some(vec![(millis(1 + at(20) as u64), packet.to_vec())]),
            Attack::Truncate => {
                payload.truncate(at(payload.len() as u64));
                with_payload(packet, &payload).map(|packet| vec![(Duration::ZERO, packet)])
            }
            // The ID of this packet over the content of the one before.
            Attack::Swap => {
                let mut mixed = held;
                let head = 21.min(mixed.len()).min(payload.len());
                if let (Some(to), Some(from)) = (mixed.get_mut(..head), payload.get(..head)) {
                    to.copy_from_slice(from);
                }
                with_payload(packet, &mixed).map(|packet| vec![(Duration::ZERO, packet)])
            }
        };
        instead.map_or(Tapped::Pass, Tapped::Instead)
    })
}

#[test]
fn a_man_in_the_middle_can_delay_and_deny_but_alters_and_breaks_nothing() -> Result<()> {
    let test = "a_man_in_the_middle_can_delay_and_deny_but_alters_and_breaks_nothing";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let world = World::start(&Layout { shape: LINK, ..Layout::default() })?;
    let readers = world.readers(2)?;
    let load = RequestLoad::start(&world.mesh.cluster("east")?.namespace, world.web, "/", 20);
    flowing(&readers, 500_000, LIMIT)?;
    let wire = world.mesh.wire("east", "west")?;
    for attack in ATTACKS {
        // One in ten is more than any path loses; delays are harmless, so half are hit.
        let one_in = if matches!(attack, Attack::Delay | Attack::Reorder) { 2 } else { 10 };
        let done = Arc::new(AtomicU64::new(0));
        let begin = || {
            for direction in [wire.a_to_b(), wire.b_to_a()] {
                direction.set_tap(Some(attacker(attack, one_in, Arc::clone(&done))));
            }
            Ok(())
        };
        let before: u64 = readers.iter().map(StreamReader::bytes).sum();
        let stalls = stalls(&readers, begin, Duration::from_millis(1500), LIMIT)?;
        let carried = readers.iter().map(StreamReader::bytes).sum::<u64>() - before;
        for direction in [wire.a_to_b(), wire.b_to_a()] {
            direction.set_tap(None);
        }
        println!(
            "{attack:?} 1 in {one_in}: {done:?} datagrams, {carried} bytes came through, longest stalls {stalls:?}"
        );
        ensure!(done.load(Ordering::Relaxed) > 10, "{attack:?} hit nothing");
        flowing(&readers, 500_000, LIMIT)?;
    }
    // Every byte was compared as it came.
    let bytes = readers.into_iter().map(StreamReader::finish).sum::<Result<u64>>()?;
    let answers = load.finish()?;
    let failures = failed(&answers);
    let wrong = answers.iter().filter(|a| a.body.as_ref().is_ok_and(|b| !b.contains("servedBy"))).count();
    println!("{bytes} bytes whole; {} requests, {} failed, {wrong} altered", answers.len(), failures.len());
    ensure!(wrong == 0 && failures.len() * 100 <= answers.len() * 2, "{failures:?}");
    // What the operator sees: gateways that count what was not theirs to forward.
    let dropped: f64 = [11, 12]
        .into_iter()
        .map(|host| Ok(metric(&world.mesh.metrics("west", host)?, "tombolo_gateway_drops_total", &[])))
        .sum::<Result<f64>>()?;
    ensure!(dropped > 0.0, "no drop is counted");
    println!("west's gateways counted {dropped} drops");
    Ok(())
}

fn endpoint_of(status: &Value, name: &str) -> Result<tombolo_model::ids::EndpointId> {
    let endpoints = status["endpoints"].as_array().map(Vec::as_slice).unwrap_or_default();
    let of = |e: &&Value| e["spiffeId"].as_str().is_some_and(|id| id.ends_with(&format!("/sa/{name}")));
    let found = endpoints.iter().find(of).with_context(|| format!("{name} is not in {status}"))?;
    endpoint(found["id"].as_str().unwrap_or_default())
}

#[test]
fn a_gateways_keys_forge_neither_a_caller_nor_the_end_of_a_connection() -> Result<()> {
    let test = "a_gateways_keys_forge_neither_a_caller_nor_the_end_of_a_connection";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut world = World::start(&Layout { shape: LINK, ..Layout::default() })?;
    let readers = world.readers(2)?;
    flowing(&readers, 500_000, LIMIT)?;
    // East's second gateway falls into hostile hands, with everything that it has on disk.
    world.mesh.process_mut("east/gw-2")?.kill()?;
    let steal = || Stolen::read(&world.mesh.state("east", "gw-2"));
    let stolen = steal()?;
    let (east, west) = (world.mesh.status("east")?, world.mesh.status("west")?);
    let (caller, callee) = (endpoint_of(&east, "client")?, endpoint_of(&west, "web")?);
    let c = world.mesh.cluster("east")?;
    let [border, inner] = [7440, 7441].map(|port| c.address(12, port));
    let sidecar = c.address(22, 7442);
    let gateways = [11, 12].map(|host| world.mesh.cluster("west").map(|west| west.address(host, 7440)));
    let inner = c.namespace.run(|| UdpSocket::bind(inner))??;
    let peer = stolen.link("west")?.tag;

    // First packets that west's gateways admit: their MAC holds. West's packets to the forger come back to its border.
    let victim = world.mesh.cluster("west")?.address(11, 7440);
    let hostile = HostileGateway::start(&c.namespace, border, steal()?, "west", victim)?;
    // At once: the federator soon tells the peers that this gateway is silent, and they use the other one. Many, because
    // answers are spread over the gateways that there are: about every third comes back.
    let attempts: Vec<_> = (0..24)
        .map(|_| {
            let from = c.namespace.run(|| UdpSocket::bind(c.address(31, 0)))??;
            Ok((from, stolen.service_cid("west", "shop/web")?, stolen.endpoint_cid(nobody())?))
        })
        .collect::<Result<_>>()?;
    let all = || async {
        let forged = attempts.into_iter().map(|(from, first, own)| forge(from, hostile.relay, first, own));
        futures::future::join_all(forged).await.into_iter().collect::<Result<Vec<_>>>()
    };
    let mut outcomes = c.namespace.block_on(all)??;
    println!("the hostile gateway: {:?}", hostile.doings);
    drop(hostile);
    // And straight to the sidecar, as somebody inside west's network would: an endpoint-kind first ID, and the right one.
    let west_keys = Stolen::read(&world.mesh.state("west", "gw-1"))?;
    let target = world.mesh.cluster("west")?.address(21, 7442);
    for first in [west_keys.endpoint_cid(callee)?, stolen.service_cid("west", "shop/web")?] {
        let w = world.mesh.cluster("west")?;
        let from = w.namespace.run(|| UdpSocket::bind(w.address(31, 0)))??;
        let own = stolen.endpoint_cid(nobody())?;
        outcomes.push(w.namespace.block_on(|| forge(from, target, first, own))??);
    }
    let answered = outcomes.iter().filter(|outcome| **outcome != Forged::Unanswered).count();
    println!("{} forged connections, {answered} answered: {outcomes:?}", outcomes.len());
    ensure!(answered > 0, "no forged first packet was answered: the test shows nothing");

    // "West's server is no more", to the caller, from the address of its own gateway; and to west's gateways.
    let gone = || -> Result<()> {
        for _ in 0..100 {
            inner.send_to(&stolen.gone(caller, peer, callee)?, sidecar)?;
            for gateway in &gateways {
                let gateway = gateway.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
                inner.send_to(&stolen.gone_to_peer("west", stolen.tag, caller)?, gateway)?;
            }
        }
        Ok(())
    };
    let stalls = stalls(&readers, gone, Duration::from_secs(2), LIMIT)?;
    println!("300 forged GONE: longest stalls {stalls:?}");
    ensure!(stalls.iter().all(|stall| *stall < Duration::from_millis(1500)), "{stalls:?}");

    // It took what came its way meanwhile; that was a denial, and it is over.
    flowing(&readers, 500_000, DENIED)?;
    let bytes = readers.into_iter().map(StreamReader::finish).sum::<Result<u64>>()?;
    println!("{bytes} bytes whole");
    world.answered_by("west", Duration::from_secs(10))?;
    // What the operator sees: no stream of the forger's was ever served, and a gateway that is silent.
    let metrics = world.mesh.metrics("west", 21)?;
    println!(
        "west's sidecar: {} inbound connections",
        metric(&metrics, "tombolo_sidecar_inbound_connections", &[])
    );
    world.mesh.eventually("status shows the stolen gateway silent", Duration::from_secs(10), |mesh| {
        let status = mesh.status("east")?;
        let gateway = tombolo_tests::scenario::entry(&status, "gateways", "name", "gw-2")?.clone();
        ensure!(gateway["state"] == "silent", "{gateway}");
        Ok(())
    })?;
    Ok(())
}

/// Another workload of west, valid and exported, that says so.
fn impostor(mesh: &mut Mesh) -> Result<u8> {
    let app = mesh.cluster("west")?.address(22, 8081);
    application(mesh, "west", "impostor-app", app, "impostor")?;
    let host = mesh.sidecar("west", "impostor", &flag("--service", "other", 80, app))?;
    mesh.apply("west", &export("other"))?;
    Ok(host)
}

#[test]
fn a_first_packet_led_to_another_workload_reaches_no_impostor() -> Result<()> {
    let test = "a_first_packet_led_to_another_workload_reaches_no_impostor";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut world = World::start(&Layout { shape: LINK, ..Layout::default() })?;
    let host = impostor(&mut world.mesh)?;
    let west = world.mesh.cluster("west")?;
    let (right, wrong) = (west.address(21, 0).ip(), west.address(host, 0).ip());
    // Every long-header packet of west's gateways to the server goes to the impostor instead: no honest path is left for a
    // handshake, and established connections are carried on.
    west.namespace.nft(&format!(
        "table ip tombolo_redirect {{
            chain out {{
                type route hook output priority mangle; policy accept;
                ip saddr {{ {}, {} }} ip daddr {right} udp dport 7442 @th,64,2 3 counter ip daddr set {wrong}
            }}
        }}",
        west.address(11, 0).ip(),
        west.address(12, 0).ip(),
    ))?;
    let calls = world.mesh.cluster("east")?.address(23, 9080);
    let fresh = world.mesh.sidecar("east", "fresh", &flag("--upstream", "web", 80, calls))?;
    let east = &world.mesh.cluster("east")?.namespace;
    let (mut refused, mut elsewhere) = (0, 0);
    for _ in 0..12 {
        match http_get(east, calls, "/") {
            Ok(answer) => {
                ensure!(!answer.contains("impostor"), "the caller was led to an impostor: {answer}");
                ensure!(!answer.contains("\"west\""), "the redirection does not work: {answer}");
                elsewhere += usize::from(answer.contains("\"east\""));
            }
            Err(_) => refused += 1,
        }
    }
    // The caller that had its connection before is not disturbed.
    let before = http_get(east, world.web, "/")?;
    ensure!(before.contains("west"), "{before}");
    world.mesh.cluster("west")?.namespace.nft("delete table ip tombolo_redirect")?;
    let back = world.mesh.eventually("the honest path serves again", Duration::from_secs(20), |mesh| {
        let answer = http_get(&mesh.cluster("east")?.namespace, calls, "/")?;
        ensure!(answer.contains("west"), "{answer}");
        Ok(())
    })?;
    let metrics = world.mesh.metrics("east", fresh)?;
    let dials: Vec<_> =
        metrics.lines().filter(|line| line.starts_with("tombolo_sidecar_dials_total")).collect();
    println!(
        "12 calls led astray: {refused} refused, {elsewhere} served by the next tier; back after {back:?}; {dials:?}"
    );
    ensure!(!dials.is_empty(), "{metrics}");
    Ok(())
}
