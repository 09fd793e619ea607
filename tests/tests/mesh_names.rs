//! Names of two linked clusters, asked with `dig` as anybody would: of the federator and of a sidecar, over UDP and TCP.

use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tombolo_tests::capability::{require_netns, require_programs};
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::resolver::Resolver;
use tombolo_tests::scenario::{application, export, metric};

const PATIENCE: Duration = Duration::from_secs(10);
/// A name is there within a second or so of its export in the other cluster.
const SOON: Duration = Duration::from_secs(2);

/// A sidecar's manifest: what it serves, with named ports.
fn workload(services: &[(&str, &str, SocketAddr)]) -> String {
    let services: Vec<String> = services
        .iter()
        .map(|(name, port, target)| {
            format!(
                "    - name: {name}\n      ports: [ {{ name: {port}, port: 80, targetPort: {}, targetHost: {} }} ]\n",
                target.port(),
                target.ip()
            )
        })
        .collect();
    format!(
        "apiVersion: tombolo.dev/v1alpha1\nkind: Workload\nmetadata: {{ name: w, namespace: shop }}\nspec:\n  sidecar: w\n  services:\n{}",
        services.concat()
    )
}

struct Names {
    mesh: Mesh,
    /// East's federator, and a sidecar there.
    servers: [SocketAddr; 2],
    upstream: Option<Resolver>,
}

/// What `dig` says: status, flags, and the data of the answers in order.
#[derive(Debug)]
struct Dug {
    status: String,
    flags: String,
    answers: Vec<String>,
    text: String,
}

impl Names {
    fn start() -> Result<Self> {
        let mut mesh = Mesh::start(&Layout { gateways: 1, ..Layout::default() })?;
        let east = mesh.cluster("east")?;
        let upstream = east.address(2, 53);
        let servers = [east.address(1, 7453), east.address(21, 53)];
        let resolver = Resolver::start(&east.namespace, upstream)?;
        let names = |listen: SocketAddr| {
            ["--dns-listen", &listen.to_string(), "--dns-upstream", &upstream.to_string()].map(str::to_owned)
        };
        let ranges = ["--virtual-range", "10.200.0.0/16,fd00:200::/112"].map(str::to_owned);
        let flags = [names(servers[0]).to_vec(), ranges.to_vec()].concat();
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        mesh.federator_with("east", &flags)?;
        mesh.sidecar("east", "client", &names(servers[1]))?;
        Ok(Self { mesh, servers, upstream: Some(resolver) })
    }

    /// A sidecar that serves with named ports; its applications are there already.
    fn serve(&mut self, cluster: &str, name: &str, services: &[(&str, &str)]) -> Result<()> {
        // As the harness numbers the sidecars; the client is east's first.
        let host = match (cluster, name) {
            ("east", "web") => 22,
            ("east", _) => 23,
            _ => 21,
        };
        let app = self.mesh.cluster(cluster)?.address(host, 8080);
        application(&mut self.mesh, cluster, &format!("app-{name}"), app, cluster)?;
        let services: Vec<_> = services.iter().map(|(name, port)| (*name, *port, app)).collect();
        let path = self.mesh.path(&format!("{cluster}-{name}.yaml"));
        std::fs::write(&path, workload(&services))?;
        let args = ["--workload".to_owned(), path.display().to_string()];
        self.mesh.sidecar(cluster, name, &args)?;
        Ok(())
    }

    /// Runs a program in east.
    fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let output =
            self.mesh.cluster("east")?.namespace.run(|| Command::new(program).args(args).output())??;
        let text = [output.stdout, output.stderr].concat();
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    fn dig(&self, server: SocketAddr, question: &[&str]) -> Result<Dug> {
        let (ip, port) = (format!("@{}", server.ip()), server.port().to_string());
        let args = [&[ip.as_str(), "-p", &port, "+tries=1", "+time=6"], question].concat();
        let text = self.run("dig", &args)?;
        let after = |mark: &str| {
            let rest = text.split_once(mark).map(|(_, rest)| rest).unwrap_or_default();
            rest.split([',', ';', '\n']).next().unwrap_or_default().trim().to_owned()
        };
        let (status, flags) = (after("status: "), after("flags: "));
        ensure!(!status.is_empty(), "dig {question:?} at {server} got nothing:\n{text}");
        let section = text.split_once("ANSWER SECTION:\n").map(|(_, rest)| rest).unwrap_or_default();
        let records = section.lines().take_while(|line| !line.is_empty());
        let data = |record: &str| record.split_whitespace().skip(4).collect::<Vec<_>>().join(" ");
        let mut answers: Vec<String> = records.map(data).collect();
        answers.sort_unstable();
        Ok(Dug { status, flags, answers, text })
    }

    /// Asks both servers over both transports, until they say the same that is expected.
    fn expect(&self, question: &[&str], status: &str, answers: &[&str], limit: Duration) -> Result<()> {
        for server in self.servers {
            for transport in ["+notcp", "+tcp"] {
                let what = format!("{question:?} {transport} at {server}");
                let question = [question, &[transport]].concat();
                self.mesh.eventually(&what, limit, |_| {
                    let dug = self.dig(server, &question)?;
                    ensure!(dug.status == status && dug.answers == answers, "{dug:?}");
                    Ok(())
                })?;
            }
        }
        Ok(())
    }

    /// The virtual addresses of an import, as the operator sees them.
    fn addresses(&self, name: &str) -> Result<Vec<String>> {
        let text = self.mesh.operate("east", &["get", "serviceimport", name, "-n", "shop", "-o", "json"])?;
        let value: Value = serde_json::from_str(&text)?;
        let object = value.get("items").and_then(|items| items.get(0)).unwrap_or(&value);
        let ips = object["spec"]["ips"].as_array().context("no spec.ips")?;
        Ok(ips.iter().filter_map(Value::as_str).map(str::to_owned).collect())
    }

    /// Sends a packet and forgets it.
    fn packets(&self, server: SocketAddr, packets: &[Vec<u8>]) -> Result<()> {
        self.mesh.cluster("east")?.namespace.run(|| -> Result<()> {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            for packet in packets {
                let _ = socket.send_to(packet, server);
            }
            Ok(())
        })?
    }
}

/// A question about a name, without EDNS.
fn question(id: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut packet = id.to_be_bytes().to_vec();
    packet.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.').filter(|label| !label.is_empty()) {
        packet.push(label.len() as u8);
        packet.extend(label.as_bytes());
    }
    packet.push(0);
    packet.extend(kind.to_be_bytes());
    packet.extend([0, 1]);
    packet
}

#[test]
fn exported_services_are_resolved_in_the_other_cluster_by_every_kind_of_record() -> Result<()> {
    let test = "exported_services_are_resolved_in_the_other_cluster_by_every_kind_of_record";
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &["dig"])) else { return Ok(()) };
    let mut world = Names::start()?;
    world.serve("west", "web", &[("web", "http")])?;
    let web = "web.shop.svc.clusterset.local";
    world.expect(&[web, "A"], "NXDOMAIN", &[], PATIENCE)?;

    // Appears within a second or so of its export, at an address that the operator sees.
    let exported = Instant::now();
    world.mesh.apply("west", &export("web"))?;
    let took = world.mesh.eventually("the name is there", SOON, |_| {
        for server in world.servers {
            let dug = world.dig(server, &[web, "A"])?;
            ensure!(dug.status == "NOERROR" && dug.answers.len() == 1, "{dug:?}");
        }
        Ok(())
    })?;
    println!("a name is there {took:?} ({:?} with the command) after its export", exported.elapsed());
    let addresses = world.addresses("web")?;
    let [v4, v6] = addresses.as_slice() else { bail!("{addresses:?}") };
    ensure!(v4.starts_with("10.200.") && v6.starts_with("fd00:200::"), "{addresses:?}");

    let srv = "0 100 80 web.shop.svc.clusterset.local.";
    let cases: &[(&[&str], &str, &[&str])] = &[
        (&[web, "A"], "NOERROR", &[v4]),
        (&[web, "AAAA"], "NOERROR", &[v6]),
        (&["WEB.Shop.SVC.clusterset.LOCAL", "A"], "NOERROR", &[v4]),
        (&[web, "SRV"], "NOERROR", &[srv]),
        (&["_http._tcp.web.shop.svc.clusterset.local", "SRV"], "NOERROR", &[srv]),
        (&["_http._udp.web.shop.svc.clusterset.local", "SRV"], "NXDOMAIN", &[]),
        (&["dns-version.clusterset.local", "TXT"], "NOERROR", &["\"1.0.0\""]),
        (&[web, "MX"], "NOERROR", &[]),
        (&["west.web.shop.svc.clusterset.local", "A"], "NXDOMAIN", &[]),
        (&["cart.shop.svc.clusterset.local", "A"], "NXDOMAIN", &[]),
        (&["shop.svc.clusterset.local", "A"], "NOERROR", &[]),
    ];
    for (question, status, answers) in cases {
        world.expect(question, status, answers, SOON)?;
    }
    let dug = world.dig(world.servers[0], &[web, "A"])?;
    ensure!(dug.flags.contains("aa") && dug.flags.contains("ra"), "{dug:?}");
    let negative = world.dig(world.servers[0], &["x.shop.svc.clusterset.local", "A"])?;
    ensure!(
        negative.text.contains("AUTHORITY SECTION") && negative.text.contains("SOA"),
        "{}",
        negative.text
    );

    // It vanishes with its export, and has the same address when it comes back.
    world.mesh.operate("west", &["delete", "serviceexport", "web", "-n", "shop", "--yes"])?;
    world.expect(&[web, "A"], "NXDOMAIN", &[], SOON)?;
    world.mesh.apply("west", &export("web"))?;
    world.expect(&[web, "A"], "NOERROR", &[v4], SOON)?;

    // Its ordinary name is the cluster's own resolver's until a FailoverPolicy is about the Service.
    let ordinary = "web.shop.svc.cluster.local";
    world.expect(&[ordinary, "A"], "NXDOMAIN", &[], SOON)?;
    world.mesh.apply(
        "east",
        "apiVersion: tombolo.dev/v1alpha1
kind: FailoverPolicy
metadata: { name: web, namespace: shop }
spec:
  targetRef: { kind: Service, name: web }
  tiers: [ { clusters: [ \"@self\" ] }, { clusters: [ west ] } ]
",
    )?;
    world.expect(&[ordinary, "A"], "NOERROR", &[v4], SOON)?;
    let srv = "0 100 80 web.shop.svc.cluster.local.";
    world.expect(&["_http._tcp.web.shop.svc.cluster.local", "SRV"], "NOERROR", &[srv], SOON)?;

    // A headless service of east resolves to its ready endpoints.
    world.serve("east", "web", &[("db", "sql")])?;
    world.serve("east", "db-1", &[("db", "sql")])?;
    world.mesh.apply(
        "east",
        "apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: { name: db, namespace: shop, annotations: { tombolo.dev/service-type: Headless } }
",
    )?;
    let hosts =
        [world.mesh.cluster("east")?.address(22, 0).ip(), world.mesh.cluster("east")?.address(23, 0).ip()];
    let hosts = hosts.map(|ip| ip.to_string());
    let db = "db.shop.svc.clusterset.local";
    world.expect(&[db, "A"], "NOERROR", &[&hosts[0], &hosts[1]], PATIENCE)?;
    world.expect(&[db, "AAAA"], "NOERROR", &[], SOON)?;
    let dug = world.dig(world.servers[1], &["_sql._tcp.db.shop.svc.clusterset.local", "SRV"])?;
    ensure!(
        dug.answers.len() == 2
            && dug.answers.iter().all(|a| a.ends_with(".east.db.shop.svc.clusterset.local.")),
        "{dug:?}"
    );
    let host = dug.answers[0].split(' ').nth(3).context("no target")?.to_owned();
    let dug = world.dig(world.servers[1], &[&host, "A"])?;
    ensure!(dug.answers.len() == 1 && hosts.contains(&dug.answers[0]), "{dug:?}");
    world.expect(&["east.db.shop.svc.clusterset.local", "A"], "NOERROR", &[], SOON)?;
    world.mesh.process_mut("east/db-1")?.kill()?;
    world.expect(&[db, "A"], "NOERROR", &[&hosts[0]], PATIENCE)?;
    let shown = world.mesh.operate("east", &["get", "serviceimport", "db", "-n", "shop", "-o", "yaml"])?;
    ensure!(shown.contains("type: Headless"), "{shown}");

    // The address is the service's over a restart of the federator, and while it is away the sidecar resolves.
    world.mesh.process_mut("east/federator")?.kill()?;
    let dug = world.dig(world.servers[1], &[web, "A"])?;
    ensure!(dug.answers == [v4.as_str()], "without a federator: {dug:?}");
    world.mesh.restart("east/federator")?;
    world.expect(&[web, "A"], "NOERROR", &[v4], PATIENCE)?;

    // Who lost the federator follows the new one.
    world.mesh.operate("west", &["delete", "serviceexport", "web", "-n", "shop", "--yes"])?;
    world.expect(&[web, "A"], "NXDOMAIN", &[], PATIENCE)?;
    Ok(())
}

#[test]
fn other_names_are_forwarded_and_nothing_that_comes_in_does_harm() -> Result<()> {
    let test = "other_names_are_forwarded_and_nothing_that_comes_in_does_harm";
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &["dig", "unshare"])) else {
        return Ok(());
    };
    let mut world = Names::start()?;
    world.serve("west", "web", &[("web", "http")])?;
    world.mesh.apply("west", &export("web"))?;
    let web = "web.shop.svc.clusterset.local";
    world.mesh.eventually("the name is there", PATIENCE, |_| {
        let dug = world.dig(world.servers[1], &[web, "A"])?;
        ensure!(dug.answers.len() == 1, "{dug:?}");
        Ok(())
    })?;

    // Forwarded, cached, and over TCP where it does not fit.
    world.expect(&["www.example", "A"], "NOERROR", &["192.0.2.80"], SOON)?;
    let asked = |world: &Names| world.upstream.as_ref().map_or(0, Resolver::asked);
    let before = asked(&world);
    world.expect(&["www.example", "A"], "NOERROR", &["192.0.2.80"], SOON)?;
    ensure!(asked(&world) == before, "the upstream was asked again for what is cached");
    world.expect(&["missing.example", "A"], "NXDOMAIN", &[], SOON)?;
    for server in world.servers {
        let dug = world.dig(server, &["big.example", "A"])?;
        ensure!(dug.answers.len() == 100, "dig goes on over TCP: {dug:?}");
        let cut = world.dig(server, &["big.example", "A", "+ignore"])?;
        ensure!(cut.flags.contains("tc") && cut.answers.is_empty(), "{cut:?}");
    }

    // The machine's own resolver goes through the sidecar, by short names too, and back.
    let conf = world.mesh.path("resolv.conf");
    let before = "nameserver 10.61.0.2\noptions timeout:1\n";
    std::fs::write(&conf, before)?;
    let state = world.mesh.path("host-state");
    let bin = tombolo_tests::mesh::binary()?.display().to_string();
    let (conf, state) = (conf.display().to_string(), state.display().to_string());
    let place = ["--resolv-conf", &conf, "--state-dir", &state];
    let resolver = world.servers[1].ip().to_string();
    let install = ["sidecar", "dns", "install", "--resolver", &resolver, "--method", "resolv-conf"];
    let install = [&install[..], &["--search", "svc.clusterset.local"], &place].concat();
    let said = world.run(&bin, &install)?;
    ensure!(std::fs::read_to_string(&conf)?.starts_with("# Set up by"), "{said}");
    let by_glibc = format!(
        "mount --bind {conf} /etc/resolv.conf && getent ahostsv4 web.shop && getent ahostsv4 www.example"
    );
    let resolved = world.run("unshare", &["-m", "sh", "-c", &by_glibc])?;
    ensure!(resolved.contains("10.200.") && resolved.contains("192.0.2.80"), "{resolved}");
    world.run(&bin, &[&["sidecar", "dns", "remove"][..], &place].concat())?;
    ensure!(std::fs::read_to_string(&conf)? == before, "{}", std::fs::read_to_string(&conf)?);

    // Packets of nonsense, names of 255 bytes, a flood: answers go on, and memory does not grow with them.
    let label = "x".repeat(63);
    let longest = format!("{label}.{label}.{label}.{}.{web}", "y".repeat(60 - web.len()));
    let dug = world.dig(world.servers[1], &[&longest, "A"])?;
    ensure!(dug.status == "NXDOMAIN", "{dug:?}");
    let sidecar = world.mesh.process("east/client")?;
    let used = sidecar.usage().context("the sidecar has ended")?.rss_bytes;
    let mut noise = Vec::new();
    for n in 0..20_000u32 {
        let good = question(n as u16, web, 1);
        noise.push(match n % 5 {
            0 => good.iter().map(|byte| byte ^ (n % 251) as u8).collect(),
            1 => good.get(..(n % 40) as usize).unwrap_or_default().to_vec(),
            2 => question(n as u16, &format!("n{n}.silent.example"), 1),
            3 => question(n as u16, &format!("n{n}.example"), 1),
            _ => good,
        });
    }
    for server in world.servers {
        world.packets(server, &noise)?;
    }
    world.expect(&[web, "A"], "NOERROR", &[&world.addresses("web")?[0]], PATIENCE)?;
    let grown = sidecar.usage().context("the sidecar has ended")?.rss_bytes.saturating_sub(used);
    ensure!(grown < 32 * 1024 * 1024, "a flood has cost {grown} bytes");
    let shown = world.mesh.metrics("east", 21)?;
    let counted = |labels: &[&str]| metric(&shown, "tombolo_names_queries_total", labels);
    ensure!(
        counted(&["result=\"malformed\""]) > 0.0 && counted(&["result=\"answered\""]) > 1000.0,
        "{shown}"
    );

    // The upstream is gone: SERVFAIL before a resolver gives up, and at once when that is known; our names go on.
    world.upstream = None;
    for server in world.servers {
        let begun = Instant::now();
        let dug = world.dig(server, &["gone-1.example", "A"])?;
        ensure!(
            dug.status == "SERVFAIL" && begun.elapsed() < Duration::from_secs(5),
            "{dug:?} {:?}",
            begun.elapsed()
        );
        world.dig(server, &["gone-2.example", "A"])?;
        let begun = Instant::now();
        let dug = world.dig(server, &["gone-3.example", "A"])?;
        ensure!(
            dug.status == "SERVFAIL" && begun.elapsed() < Duration::from_millis(500),
            "{dug:?} {:?}",
            begun.elapsed()
        );
    }
    world.expect(&[web, "AAAA"], "NOERROR", &[&world.addresses("web")?[1]], SOON)?;
    let east = world.mesh.cluster("east")?;
    world.upstream = Some(Resolver::start(&east.namespace, east.address(2, 53))?);
    world.expect(&["back.example", "A"], "NOERROR", &["192.0.2.80"], Duration::from_secs(60))?;
    Ok(())
}

#[test]
fn forwarders_in_a_loop_are_found_and_cost_next_to_nothing() -> Result<()> {
    let test = "forwarders_in_a_loop_are_found_and_cost_next_to_nothing";
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &["dig"])) else { return Ok(()) };
    let mut mesh = Mesh::start(&Layout { clusters: &["east"], gateways: 1, ..Layout::default() })?;
    let (a, b) = (mesh.cluster("east")?.address(21, 53), mesh.cluster("east")?.address(22, 53));
    for (name, listen, upstream) in [("a", a, b), ("b", b, a)] {
        let flags = ["--dns-listen", &listen.to_string(), "--dns-upstream", &upstream.to_string()];
        mesh.sidecar("east", name, &flags.map(str::to_owned))?;
    }
    mesh.process("east/b")?.wait_for_log("forwards back to us", PATIENCE)?;
    let world = Names { mesh, servers: [a, b], upstream: None };
    for server in world.servers {
        let begun = Instant::now();
        let dug = world.dig(server, &["www.example", "A"])?;
        ensure!(
            dug.status == "SERVFAIL" && begun.elapsed() < Duration::from_secs(5),
            "{dug:?} {:?}",
            begun.elapsed()
        );
    }
    let questions = metric(&world.mesh.metrics("east", 22)?, "tombolo_names_queries_total", &[]);
    ensure!(questions < 100.0, "a loop has made {questions} questions");

    // To oneself nobody forwards.
    let bin = tombolo_tests::mesh::binary()?.display().to_string();
    let state = world.mesh.path("itself").display().to_string();
    let args = [
        "sidecar",
        "--name",
        "c",
        "--state-dir",
        &state,
        "--admin",
        "127.0.0.1:0",
        "--dns-listen",
        "127.0.0.9:5399",
    ];
    let said = world.run(&bin, &[&args[..], &["--dns-upstream", "127.0.0.9:5399"]].concat())?;
    ensure!(said.contains("is this resolver itself"), "{said}");
    Ok(())
}
