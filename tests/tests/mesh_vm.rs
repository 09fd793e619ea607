//! A machine outside, behind a router that masquerades and lets nothing in: it joins with a one-use token, serves and
//! calls, keeps its streams when its address changes, and its identity when it restarts.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tombolo_tests::capability::require_netns;
use tombolo_tests::link::Shape;
use tombolo_tests::mesh::{Layout, Mesh, http_get};
use tombolo_tests::netns::Namespace;
use tombolo_tests::process::ProcessSpec;
use tombolo_tests::scenario::{application, entry, export, flag, flowing, metric, stalls};
use tombolo_tests::traffic::{StreamReader, StreamServer};

const VM: &str = "vm-1";
/// On the machine itself.
const VM_APP: &str = "127.0.0.1:8080";
const VM_STREAM: &str = "127.0.0.1:9000";
const VM_UPSTREAM: &str = "127.0.0.1:9080";
/// A changed source address is seen by the next probe, answered and registered: three round trips and what a probe
/// under traffic waits (100 ms); kicks carry the connection over it.
const ADDRESS_CHANGE: Duration = Duration::from_secs(2);
/// Restarts are bounded by process start, two handshakes and a registration.
const RESTART: Duration = Duration::from_secs(15);

/// West with a machine that serves `shop/legacy` and `shop/stream` and calls `shop/web` of east; east calls the machine.
struct Outside {
    mesh: Mesh,
    machine: usize,
    legacy: SocketAddr,
    stream: SocketAddr,
    _servers: Vec<StreamServer>,
}

impl Outside {
    fn start() -> Result<Self> {
        let shape = Shape {
            delay: Duration::from_millis(5),
            rate_bits_per_second: Some(100_000_000),
            ..Shape::PERFECT
        };
        let mut mesh = Mesh::start(&Layout { shape, ..Layout::default() })?;
        let app = mesh.cluster("east")?.address(21, 8080);
        application(&mut mesh, "east", "app", app, "east")?;
        mesh.sidecar("east", "web", &flag("--service", "web", 80, app))?;
        mesh.apply("east", &export("web"))?;

        let (app, stream, upstream) = (VM_APP.parse()?, VM_STREAM.parse()?, VM_UPSTREAM.parse()?);
        let flags = [
            flag("--service", "legacy", 80, app),
            flag("--service", "stream", 9000, stream),
            flag("--upstream", "web", 80, upstream),
        ]
        .concat();
        let machine = mesh.machine("west", VM, &flags)?;
        let bin = tombolo_tests::mesh::binary()?;
        let app = ProcessSpec::new("vm-app", bin)
            .args(["demo-app", "--listen", VM_APP, "--name", VM])
            .within(mesh.outside(machine)?);
        mesh.spawn("vm/app", app)?;
        let server = StreamServer::start(mesh.outside(machine)?, stream)?;
        mesh.apply("west", &(export("legacy") + &export("stream")))?;

        let (legacy, stream) =
            (mesh.cluster("east")?.address(22, 9080), mesh.cluster("east")?.address(22, 9090));
        let calls =
            [flag("--upstream", "legacy", 80, legacy), flag("--upstream", "stream", 9000, stream)].concat();
        mesh.sidecar("east", "client", &calls)?;
        let outside = Self { mesh, machine, legacy, stream, _servers: vec![server] };
        outside.served_and_calling(Duration::from_secs(15))?;
        Ok(outside)
    }

    fn vm(&self) -> Result<&Namespace> {
        self.mesh.outside(self.machine)
    }

    fn router(&self) -> Result<&Namespace> {
        self.mesh.outside(self.machine + 1)
    }

    /// East reaches the machine, and the machine reaches east.
    fn served_and_calling(&self, limit: Duration) -> Result<Duration> {
        self.mesh.eventually("the machine serves and calls", limit, |mesh| {
            let served = http_get(&mesh.cluster("east")?.namespace, self.legacy, "/")?;
            ensure!(served.contains(VM), "{served}");
            let called = http_get(self.vm()?, VM_UPSTREAM.parse()?, "/")?;
            ensure!(called.contains("\"east\""), "{called}");
            Ok(())
        })
    }

    fn endpoint(&self) -> Result<Value> {
        let status = self.mesh.status("west")?;
        let endpoints = status["endpoints"].as_array().cloned().unwrap_or_default();
        let of_vm = |e: &&Value| e["spiffeId"].as_str().is_some_and(|id| id.ends_with(&format!("/vm/{VM}")));
        endpoints
            .iter()
            .find(of_vm)
            .cloned()
            .with_context(|| format!("the machine is not in status: {status}"))
    }

    /// Gives the router another address on the outside, as a provider does: every mapping is lost with the old one.
    fn change_address(&self, from: &str, to: &str) -> Result<()> {
        let router = self.router()?;
        router.ip(&["addr", "del", from, "dev", "outside"])?;
        router.ip(&["addr", "add", to, "dev", "outside"])?;
        router.ip(&["route", "replace", "default", "via", "10.99.0.1"])
    }
}

#[test]
fn a_machine_behind_masquerade_joins_serves_calls_and_keeps_streams_when_its_address_changes() -> Result<()> {
    let test = "a_machine_behind_masquerade_joins_serves_calls_and_keeps_streams_when_its_address_changes";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let outside = Outside::start()?;
    // It has nothing but its own outbound UDP: everything else is refused at its router, and it goes on.
    outside.router()?.nft(
        "table inet only_udp {
            chain forward {
                type filter hook forward priority -5; policy accept;
                iifname \"inside\" meta l4proto != udp counter drop
            }
        }",
    )?;
    let endpoint = outside.endpoint()?;
    ensure!(endpoint["address"] == "registers" && endpoint["healthy"] == true, "{endpoint}");
    let east = &outside.mesh.cluster("east")?.namespace;
    let readers: Vec<_> = (0..2).map(|_| StreamReader::start(east, outside.stream)).collect::<Result<_>>()?;
    flowing(&readers, 1_000_000, Duration::from_secs(10))?;
    for (what, from, to) in
        [("another address", "10.99.0.2/29", "10.99.0.6/29"), ("and back", "10.99.0.6/29", "10.99.0.2/29")]
    {
        let change = || outside.change_address(from, to);
        let stalls = stalls(&readers, change, Duration::from_secs(2), Duration::from_secs(15))?;
        println!("{what}: longest stalls {stalls:?}");
        ensure!(stalls.iter().all(|stall| *stall <= ADDRESS_CHANGE), "{what}: {stalls:?}");
        flowing(&readers, 1_000_000, Duration::from_secs(10))?;
    }
    let bytes = readers.into_iter().map(StreamReader::finish).sum::<Result<u64>>()?;
    let again = outside.served_and_calling(Duration::from_secs(5))?;
    println!("{bytes} bytes of 2 streams checked; served and calling after {again:?}");
    // What the operator sees: both gateways hold the registration, and the identity of a machine.
    let status = outside.mesh.status("west")?;
    for gateway in status["gateways"].as_array().into_iter().flatten() {
        // Its own, and for a while the provisional one of its token.
        ensure!(gateway["registeredEndpoints"].as_u64().is_some_and(|count| count >= 1), "{gateway}");
    }
    entry(&status, "identities", "spiffeId", &format!("spiffe://acme.example/cluster/west/vm/{VM}"))?;
    Ok(())
}

#[test]
fn a_machine_keeps_its_identity_over_a_restart_and_its_token_is_good_only_once() -> Result<()> {
    let test = "a_machine_keeps_its_identity_over_a_restart_and_its_token_is_good_only_once";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut outside = Outside::start()?;
    let before = outside.endpoint()?;
    let name = format!("vm/{VM}");
    outside.mesh.process_mut(&name)?.kill()?;
    outside.mesh.restart(&name)?;
    let back = outside.served_and_calling(RESTART)?;
    let after = outside.mesh.eventually("status shows the new incarnation", Duration::from_secs(5), |_| {
        let after = outside.endpoint()?;
        ensure!(after["id"] != before["id"], "{after}");
        Ok(())
    });
    let now = outside.endpoint()?;
    println!("restarted: serves again after {back:?}; {} -> {}", before["id"], now["id"]);
    after?;
    ensure!(now["spiffeId"] == before["spiffeId"], "{before} {now}");

    // Somebody who found the token, on another machine with the same network.
    let token = outside.mesh.path(&format!("west/{VM}.token")).display().to_string();
    let state = outside.mesh.state("vm", "thief").display().to_string();
    let args = ["sidecar", "--name", VM, "--join-token-file", &token, "--state-dir", &state, "--bind"];
    let args = [
        &args[..],
        &["0.0.0.0:7452", "--admin", "127.0.0.1:7455", "--upstream", "shop/web:80=127.0.0.1:9085"],
    ];
    let thief =
        ProcessSpec::new("thief", tombolo_tests::mesh::binary()?).args(args.concat()).within(outside.vm()?);
    let refused = thief.run(&outside.mesh.logs()?, Duration::from_secs(30));
    let reason = match refused {
        Ok(output) => anyhow::bail!("a used token was accepted: {output}"),
        Err(error) => format!("{error:#}"),
    };
    println!("used again: {}", reason.trim().lines().last().unwrap_or_default());
    ensure!(reason.contains("used already"), "{reason}");
    outside.served_and_calling(Duration::from_secs(5))?;
    // What the operator sees: the refusal, counted.
    let metrics = outside.mesh.metrics("west", 1)?;
    let denied =
        metric(&metrics, "tombolo_federator_requests_total", &["call=\"join\"", "result=\"denied\""]);
    ensure!(denied >= 1.0, "{metrics}");
    Ok(())
}
