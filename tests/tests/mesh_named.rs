//! `psql`, `curl` and `dig` on a machine behind a router that masquerades: each calls a service of another cluster by its
//! name, captured, and knows nothing of it. All that was done on the machine is `tombolo vm join`.

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::capability::{require_netns, require_programs};
use tombolo_tests::captured::{counter, run};
use tombolo_tests::link::Shape;
use tombolo_tests::machine::Machine;
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::netns::Namespace;
use tombolo_tests::postgres::{self, owned_by};
use tombolo_tests::scenario::{application, entry, export, flag, metric};

/// 20 ms round trip.
const LINK: Shape =
    Shape { delay: Duration::from_millis(10), rate_bits_per_second: Some(200_000_000), ..Shape::PERFECT };
const FIRST_ANSWER: Duration = Duration::from_secs(20);
const DB: &str = "orders.shop.svc.clusterset.local";
const WEB: &str = "web.shop.svc.clusterset.local";

/// What programs of a namespace have for `/etc/resolv.conf`: the file of the machine that stands for it.
struct Resolver(PathBuf);

impl Resolver {
    fn of(namespace: &Namespace, machine: &Machine) -> Result<Self> {
        let dir = PathBuf::from("/etc/netns").join(namespace.name());
        std::fs::create_dir_all(&dir)?;
        let resolver = Self(dir);
        symlink(machine.path("root/etc/resolv.conf"), resolver.0.join("resolv.conf"))?;
        Ok(resolver)
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// East serves a real database and a web application.
fn east(dir: &std::path::Path) -> Result<Mesh> {
    let mut mesh = Mesh::start(&Layout { gateways: 1, shape: LINK, ..Layout::default() })?;
    let (db, app) = (mesh.cluster("east")?.address(21, 5432), mesh.cluster("east")?.address(21, 8080));
    let server = postgres::server(dir, db, &mesh.logs()?)?.within(&mesh.cluster("east")?.namespace);
    mesh.spawn("east/postgres", server)?;
    application(&mut mesh, "east", "app", app, "east")?;
    let serves = [flag("--service", "orders", 5432, db), flag("--service", "web", 80, app)].concat();
    mesh.sidecar("east", "server", &serves)?;
    mesh.apply("east", &(export("orders") + &export("web")))?;
    Ok(mesh)
}

fn psql(vm: &Namespace, command: &str) -> Result<String> {
    psql_with(vm, command, "")
}

fn psql_with(vm: &Namespace, command: &str, stdin: &str) -> Result<String> {
    let program = postgres::program("psql")?.display().to_string();
    let at = ["-h", DB, "-U", "postgres", "-d", "postgres", "-v", "ON_ERROR_STOP=1", "-Atc", command];
    Ok(run(vm, &program, &at, stdin)?.ok()?.trim().to_owned())
}

#[test]
fn psql_curl_and_dig_of_a_machine_behind_nat_reach_another_cluster_by_name_without_a_change() -> Result<()> {
    let test = "psql_curl_and_dig_of_a_machine_behind_nat_reach_another_cluster_by_name_without_a_change";
    let programs = ["psql", "curl", "dig", "setpriv", "setsid"];
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &programs)) else { return Ok(()) };
    let dir = owned_by("postgres")?;
    let mut mesh = east(dir.path())?;
    let index = mesh.bare_machine("west")?;
    let machine = Machine::new(true)?;
    let vm = mesh.outside(index)?;
    let _resolver = Resolver::of(vm, &machine)?;
    let before = machine.likeness(vm)?;
    let unknown = run(vm, "dig", &["+short", "+tries=1", "+time=1", DB], "")?;
    ensure!(!unknown.out.contains("241.64."), "before it joined: {unknown:?}");

    let token = mesh.token("west", "vm", "vm-1")?.display().to_string();
    machine.vm(vm, &["join", "--token-file", &token])?.ok().with_context(|| machine.sidecar_log())?;
    mesh.eventually("the database answers by its name", FIRST_ANSWER, |_| psql(vm, "select 1").map(drop))
        .with_context(|| machine.sidecar_log())?;

    // `dig` asks whom the machine asks, and is told a virtual address.
    let dug = run(vm, "dig", &["+short", DB], "")?.ok()?;
    let address: std::net::IpAddr = dug.trim().parse().with_context(|| dug.clone())?;
    ensure!(address.to_string().starts_with("241.64."), "{address}");
    let port = run(vm, "dig", &["+short", DB, "SRV"], "")?.ok()?;
    ensure!(port.contains(&format!(" 5432 {DB}.")), "{port}");

    // Real work, both ways: 2 MB up by COPY, a sum over them, and as many down.
    psql(vm, "create table orders (id int primary key, note text)")?;
    let rows: String = (1..=20_000).map(|n| format!("{n}\t{n:096}\n")).collect();
    psql_with(vm, "copy orders from stdin", &rows)?;
    let sum = psql(vm, "select count(*), sum(id), sum(length(note)) from orders")?;
    ensure!(sum == "20000|200010000|1920000", "{sum}");
    let all = psql(vm, "select note from orders order by id")?;
    ensure!(all.lines().count() == 20_000 && all.len() > 1_900_000, "{} bytes came", all.len());
    let refused = psql(vm, "select * from nothing");
    ensure!(refused.is_err_and(|error| error.to_string().contains("nothing")), "errors are the database's");
    // The name is what the application was given, so the server sees the callee's sidecar and no NAT address.
    let seen = psql(vm, "select inet_client_addr()")?;
    ensure!(seen.starts_with("10.61."), "{seen}");

    let url = format!("http://{WEB}/");
    mesh.eventually("curl is answered by its name", FIRST_ANSWER, |_| {
        let answer = run(vm, "curl", &["-sS", "--fail", "--max-time", "5", &url], "")?.ok()?;
        ensure!(answer.contains("east"), "{answer}");
        Ok(())
    })?;
    ensure!(counter(vm, "virtual")? >= 5, "captured by the machine's rules");

    // What the operator sees: a machine without an address of its own, and what it was served.
    let status = mesh.status("west")?;
    let endpoint = entry(&status, "endpoints", "spiffeId", "spiffe://acme.example/cluster/west/vm/vm-1")?;
    ensure!(endpoint["address"].as_str().is_some_and(|address| address.contains("registers")), "{endpoint}");
    let metrics = mesh.metrics("east", 21)?;
    for name in ["tombolo_sidecar_received_bytes_total", "tombolo_sidecar_sent_bytes_total"] {
        let carried = metric(&metrics, name, &["inbound", "service=\"shop/orders\""]);
        ensure!(carried > 1_900_000.0, "{name} is {carried}: not through the mesh");
    }

    machine.vm(vm, &["leave", "--yes"])?.ok()?;
    ensure!(psql(vm, "select 1").is_err(), "nothing leads there any more");
    let after = machine.likeness(vm)?;
    ensure!(after == before, "left behind: {after:?}\nbefore: {before:?}");
    Ok(())
}
