//! Connections from outside to a workload's own ports: through the mesh always, plain ones by the mode, probes past both.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::capability::{require_netns, require_programs};
use tombolo_tests::captured::{HERE, HERE6, THERE, at, capture, counter, curl, neighbour, refused, run};
use tombolo_tests::datagrams::{Caller, Echo};
use tombolo_tests::mesh::{Layout, Mesh, http_get};
use tombolo_tests::netns::Namespace;
use tombolo_tests::scenario::{export, flag, metric};

/// Of the neighbour, beside the one that everything else comes from.
const PROBE: &str = "10.98.0.3";
const FIRST: u8 = 21;
const SECOND: u8 = 22;
const SOON: Duration = Duration::from_secs(1);
const FIRST_ANSWER: Duration = Duration::from_secs(15);
const LISTEN: [&str; 4] = ["--inbound-listen", "127.0.0.1:7448", "--inbound-listen", "[::1]:7448"];

/// East's workload serves `shop/inner` at addresses that a neighbour reaches, and west calls it through the mesh.
struct Site {
    mesh: Mesh,
    there: Namespace,
    call: SocketAddr,
}

impl Site {
    fn start() -> Result<Self> {
        let mut mesh = Mesh::start(&Layout { gateways: 1, ..Layout::default() })?;
        let there = neighbour(&mesh.cluster("east")?.namespace)?;
        there.add_address("lan", &format!("{PROBE}/24"))?;
        for (name, address) in [("app", at(HERE, 8080)?), ("app6", at(HERE6, 8080)?)] {
            let listen = address.to_string();
            let app = mesh.spec("east", name, &["demo-app", "--listen", &listen, "--name", "inner"])?;
            mesh.spawn(&format!("east/{name}"), app)?;
            mesh.eventually("the application listens", Duration::from_secs(5), |mesh| {
                http_get(&mesh.cluster("east")?.namespace, address, "/healthz").map(drop)
            })?;
        }
        mesh.apply("east", &export("inner"))?;
        let call = mesh.cluster("west")?.address(FIRST, 9080);
        mesh.sidecar("west", "caller", &flag("--upstream", "inner", 80, call))?;
        Ok(Self { mesh, there, call })
    }

    fn east(&self) -> Result<&Namespace> {
        Ok(&self.mesh.cluster("east")?.namespace)
    }

    fn sidecar(&mut self, name: &str, mode: &str) -> Result<u8> {
        let serve = flag("--service", "inner", 80, at(HERE, 8080)?);
        let more = LISTEN.into_iter().chain(["--inbound", mode]).map(str::to_owned);
        self.mesh.sidecar("east", name, &serve.into_iter().chain(more).collect::<Vec<_>>())
    }

    fn rules(&self, mode: &str) -> Result<()> {
        let allow = format!("{PROBE}=8080");
        let rules = ["--outbound", "none", "--inbound-port", "8080", "--inbound-allow", &allow];
        capture(self.east()?, &[&["apply", "--inbound", mode], &rules[..]].concat())?.ok().map(drop)
    }

    fn through_the_mesh(&self, when: &str) -> Result<()> {
        self.mesh.eventually(&format!("{when}: west calls"), Duration::from_secs(15), |mesh| {
            let answer = curl(&mesh.cluster("west")?.namespace, self.call, 3)?;
            ensure!(answer.contains("inner"), "{answer}");
            Ok(())
        })?;
        Ok(())
    }

    /// From the neighbour, as everybody and as the prober.
    fn plain(&self, address: SocketAddr) -> Result<String> {
        curl(&self.there, address, 3)
    }
    fn probe(&self) -> Result<String> {
        let args =
            ["-sS", "--fail", "--max-time", "3", "--interface", PROBE, "http://10.98.0.1:8080/healthz"];
        run(&self.there, "curl", &args, "")?.ok()
    }

    fn counted(&self, host: u8, result: &str) -> Result<f64> {
        let metrics = self.mesh.metrics("east", host)?;
        let labels = ["direction=\"inbound\"", &format!("result=\"{result}\"")];
        Ok(metric(&metrics, "tombolo_sidecar_captured_total", &labels))
    }
}

#[test]
fn plain_connections_are_handed_on_or_refused_by_the_mode_and_probes_come_in_by_both() -> Result<()> {
    let test = "plain_connections_are_handed_on_or_refused_by_the_mode_and_probes_come_in_by_both";
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &["curl"])) else { return Ok(()) };
    let mut site = Site::start()?;
    let apps = [at(HERE, 8080)?, at(HERE6, 8080)?];
    site.sidecar("inner", "permissive")?;
    site.through_the_mesh("before")?;

    site.rules("permissive")?;
    for address in apps {
        ensure!(site.plain(address)?.contains("inner"), "handed on");
    }
    ensure!(site.counted(FIRST, "plain_allowed")? == 2.0);
    site.probe()?;
    ensure!(site.counted(FIRST, "plain_allowed")? == 2.0, "a probe does not touch the sidecar");
    site.through_the_mesh("permissive")?;
    // The machine's firewall still sees the application's port.
    site.east()?.nft(
        "table inet firewall {
            chain input {
                type filter hook input priority 0; policy accept;
                iifname lan meta l4proto tcp tcp dport != 8080 drop
            }
        }",
    )?;
    for address in apps {
        ensure!(site.plain(address)?.contains("inner"), "behind a firewall that lets 8080 in");
    }
    ensure!(site.counted(FIRST, "plain_allowed")? == 4.0);
    // Without its sidecar the application is there for everybody.
    site.mesh.process_mut("east/inner")?.kill()?;
    ensure!(site.plain(apps[0])?.contains("inner"), "the sidecar is gone");
    site.probe()?;
    ensure!(counter(site.east()?, "inbound_past")? >= 1);

    site.rules("strict")?;
    refused(&site.there, apps[0])?;
    site.probe()?;
    site.sidecar("inner-strict", "strict")?;
    for address in apps {
        refused(&site.there, address)?;
    }
    ensure!(site.counted(SECOND, "plain_refused")? == 2.0);
    site.probe()?;
    site.through_the_mesh("strict")?;
    // What the operator sees: who it was.
    let log = site.mesh.process("east/inner-strict")?.log();
    let line = log.lines().find(|line| line.contains("plain_refused")).context("no line")?;
    ensure!(line.contains("shop/inner") && line.contains("10.98.0.2"), "{line}");
    // Somebody who speaks to the listener itself gets nowhere.
    refused(site.east()?, "127.0.0.1:7448".parse()?)?;
    ensure!(site.counted(SECOND, "direct")? == 1.0);
    Ok(())
}

/// East's workload serves `shop/echo` over UDP, where a neighbour reaches it; west calls it through the mesh.
struct Datagrams {
    mesh: Mesh,
    there: Namespace,
    call: SocketAddr,
    _echoes: Vec<Echo>,
}

impl Datagrams {
    fn start() -> Result<Self> {
        let mut mesh = Mesh::start(&Layout { gateways: 1, ..Layout::default() })?;
        let there = neighbour(&mesh.cluster("east")?.namespace)?;
        there.add_address("lan", &format!("{PROBE}/24"))?;
        let east = &mesh.cluster("east")?.namespace;
        let echoes = vec![
            Echo::start(east, at(HERE, 7007)?, "inner")?,
            Echo::start(east, at(HERE6, 7007)?, "inner")?,
            Echo::start(&there, at(THERE, 54)?, "other")?,
        ];
        let service = format!("shop/echo:7/udp={HERE}:7007");
        mesh.sidecar("east", "server", &["--service".to_owned(), service])?;
        mesh.apply("east", &export("echo"))?;
        let call = mesh.cluster("west")?.address(FIRST, 9007);
        mesh.sidecar("west", "caller", &["--upstream".to_owned(), format!("shop/echo:7/udp={call}")])?;
        Ok(Self { mesh, there, call, _echoes: echoes })
    }

    fn rules(&self, mode: &str) -> Result<()> {
        let allow = format!("{PROBE}=7007");
        let ports = ["--inbound-port", "7007/udp", "--inbound-port", "7008/udp"];
        let rules =
            [&["apply", "--outbound", "none", "--inbound", mode, "--inbound-allow", &allow], &ports[..]];
        capture(&self.mesh.cluster("east")?.namespace, &rules.concat())?.ok().map(drop)
    }

    fn through_the_mesh(&self) -> Result<()> {
        let (who, _) = Caller::new(&self.mesh.cluster("west")?.namespace, self.call)?
            .ask_until(b"hello", FIRST_ANSWER)?;
        ensure!(who == "inner", "{who}");
        Ok(())
    }
}

#[test]
fn datagrams_from_outside_are_let_in_or_refused_by_the_mode_and_answers_to_own_questions_come_in()
-> Result<()> {
    let test =
        "datagrams_from_outside_are_let_in_or_refused_by_the_mode_and_answers_to_own_questions_come_in";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let site = Datagrams::start()?;
    let (here, here6) = (at(HERE, 7007)?, at(HERE6, 7007)?);
    let east = &site.mesh.cluster("east")?.namespace;
    site.through_the_mesh()?;
    site.rules("permissive")?;
    let (plain, plain6) = (Caller::new(&site.there, here)?, Caller::new(&site.there, here6)?);
    for caller in [&plain, &plain6] {
        ensure!(caller.ask(b"let in?", SOON)? == "inner");
    }
    ensure!(counter(east, "inbound_datagrams")? >= 2 && counter(east, "inbound_datagrams_refused")? == 0);
    site.through_the_mesh()?;

    // Also a flow that stands is refused from now on.
    site.rules("strict")?;
    for caller in [&plain, &plain6, &Caller::new(&site.there, here)?] {
        ensure!(caller.ask(b"and now?", SOON).is_err(), "strict lets plain datagrams in");
    }
    ensure!(counter(east, "inbound_datagrams_refused")? >= 3);
    ensure!(Caller::from(&site.there, PROBE.parse()?, here)?.ask(b"probe", SOON)? == "inner");
    site.through_the_mesh()?;
    // What the workload asks from a port of its own is answered.
    let (own, other) = (at(HERE, 7008)?, at(THERE, 54)?);
    let socket = east.run(|| std::net::UdpSocket::bind(own))??;
    socket.set_read_timeout(Some(SOON))?;
    socket.send_to(b"a question", other)?;
    let mut answer = [0; 64];
    let (count, from) = socket.recv_from(&mut answer).context("the answer was refused")?;
    ensure!(from == other && answer[..count] == *b"other a question");

    capture(east, &["remove"])?.ok()?;
    ensure!(plain.ask_until(b"given back?", FIRST_ANSWER)?.0 == "inner");
    Ok(())
}
