//! Names: answers per second and latencies of the mesh's name server against CoreDNS, with the same 10,000 services and
//! the same questions, in turns, on one machine that dnsperf shares with whoever answers.
//!
//! CoreDNS serves them from its `file` plugin (a zone in memory), the fastest way that it has to hold names; it is built
//! from the Go module proxy into `--dir` and kept there. Ours is the server of `crates/names` as roles run it, in a
//! process of its own with the table that a federator would have sent. First as fast as dnsperf asks, then at one rate
//! that both take, where latencies are compared.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;
use tombolo_names::exchange::check_version;
use tombolo_names::metrics::Metrics;
use tombolo_names::server::{Bound, NamesConfig};
use tombolo_names::table::{NameTable, TableHandle};
use tombolo_proto::v1;
use tombolo_tests::capability::tool_dir;

const COREDNS_VERSION: &str = "1.15.0";
const OURS: &str = "127.0.0.1:15353";
const THEIRS: &str = "127.0.0.1:15354";
const READY: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, clap::Args)]
pub struct NamesArgs {
    /// Services, each with an address of either family and a named port.
    #[arg(long, default_value_t = 10_000)]
    services: usize,
    /// Turns of each side.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds of one turn.
    #[arg(long, default_value_t = 8)]
    seconds: u64,
    /// Questions per second at which latencies are compared.
    #[arg(long, default_value_t = 10_000)]
    rate: u64,
    /// Where CoreDNS is [default: beside the tests' own tools in the cache directory].
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Also writes the figures to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Debug, Clone, clap::Args)]
pub struct ServerArgs {
    #[arg(long)]
    services: usize,
    #[arg(long)]
    listen: SocketAddr,
}

#[derive(Debug, Default, Serialize)]
struct Side {
    answers_per_second: Vec<f64>,
    p99_us: Vec<f64>,
    resident_mb: f64,
}

#[derive(Debug, Serialize)]
struct Figures {
    services: usize,
    ours: Side,
    coredns: Side,
    ratio_of_medians: f64,
    p99_ratio_of_medians: f64,
}

fn service(n: usize) -> (String, String, String) {
    let (high, low) = (n / 250, n % 250 + 1);
    (format!("s{n}"), format!("241.64.{high}.{low}"), format!("fd00:64::{high:x}:{low:x}"))
}

/// (internal) Serves `services` names until it is killed.
pub fn serve(args: &ServerArgs) -> Result<()> {
    let record = |n: usize| {
        let (name, v4, v6) = service(n);
        let port = v1::ServicePort { name: "http".into(), port: 80, ..Default::default() };
        v1::NamedService {
            service: format!("shop/{name}"),
            clusterset: true,
            addresses: vec![v4, v6],
            ports: vec![port],
            ..Default::default()
        }
    };
    let records: Vec<_> = (0..args.services).map(record).collect();
    let table = TableHandle::default();
    table.store(NameTable::default().updated(true, &records, &[]).0);
    let metrics = Metrics::register(&mut prometheus_client::registry::Registry::default());
    let config = NamesConfig { listen: args.listen, upstreams: Vec::new() };
    let _running = Bound::bind(&config, metrics)?.start(table)?;
    loop {
        std::thread::park();
    }
}

fn coredns(dir: &Path) -> Result<PathBuf> {
    let program = dir.join("coredns");
    ensure!(program.exists(), "{} is missing: tests/setup.sh builds it (needs Go 1.26)", program.display());
    Ok(program)
}

/// The same names as a zone file, and the questions: A, AAAA, SRV and names that are not there.
fn write_inputs(dir: &Path, services: usize) -> Result<(PathBuf, PathBuf)> {
    let mut zone = String::from(
        "$ORIGIN clusterset.local.\n$TTL 30\n@ IN SOA ns.dns hostmaster 1 7200 1800 86400 5\n@ IN NS ns.dns\n\
         ns.dns IN A 127.0.0.1\ndns-version IN TXT \"1.0.0\"\n",
    );
    let mut questions = String::new();
    // A step that has no factor with the number of services: neighbours are far apart, every one is asked for.
    for index in 0..services {
        let (name, v4, v6) = service(index);
        writeln!(zone, "{name}.shop.svc IN A {v4}\n{name}.shop.svc IN AAAA {v6}")?;
        writeln!(zone, "_http._tcp.{name}.shop.svc IN SRV 0 100 80 {name}.shop.svc")?;
        let asked = format!("s{}.shop.svc.clusterset.local", index * 7919 % services);
        match index % 10 {
            0..=5 => writeln!(questions, "{asked} A")?,
            6 | 7 => writeln!(questions, "{asked} AAAA")?,
            8 => writeln!(questions, "_http._tcp.{asked} SRV")?,
            _ => writeln!(questions, "x{asked} A")?,
        }
    }
    let (zone_file, question_file) = (dir.join("clusterset.zone"), dir.join("questions"));
    std::fs::write(&zone_file, zone)?;
    std::fs::write(&question_file, questions)?;
    Ok((zone_file, question_file))
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    fn start(command: &mut Command, address: SocketAddr) -> Result<Self> {
        let mut server = Self(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let begun = Instant::now();
        while let Err(reason) = runtime.block_on(check_version(address, Duration::from_millis(200))) {
            ensure!(begun.elapsed() < READY, "{address} does not answer: {reason}");
            if let Some(status) = server.0.try_wait()? {
                bail!("the server at {address} has ended: {status}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(server)
    }
    fn resident_mb(&self) -> f64 {
        tombolo_tests::usage::of(self.0.id()).map_or(0.0, |usage| usage.rss_bytes as f64 / 1e6)
    }
}

fn dnsperf(address: &str, questions: &Path, args: &NamesArgs, more: &[&str]) -> Result<String> {
    let (ip, port) = address.split_once(':').context("an address")?;
    let seconds = args.seconds.to_string();
    let output = Command::new("dnsperf")
        .args(["-s", ip, "-p", port, "-l", &seconds, "-e", "-c", "20", "-d"])
        .arg(questions)
        .args(more)
        .output()
        .context("dnsperf (Debian package dnsperf)")?;
    ensure!(output.status.success(), "dnsperf: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// The number behind a label of dnsperf's summary.
fn figure(text: &str, label: &str) -> Result<f64> {
    let line = text.lines().find_map(|line| line.trim().strip_prefix(label));
    let number = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    number.with_context(|| format!("dnsperf says nothing of {label:?}:\n{text}"))
}

fn turn(side: &mut Side, address: &str, questions: &Path, args: &NamesArgs) -> Result<()> {
    let text = dnsperf(address, questions, args, &["-q", "100"])?;
    let lost = figure(&text, "Queries lost:")?;
    ensure!(lost < 100.0, "{address} lost {lost} questions:\n{text}");
    side.answers_per_second.push(figure(&text, "Queries per second:")?);
    // One line per answer: `> NOERROR name kind seconds`.
    let text = dnsperf(address, questions, args, &["-v", "-Q", &args.rate.to_string()])?;
    let seconds = |line: &str| line.strip_prefix("> ")?.rsplit(' ').next()?.parse::<f64>().ok();
    let mut latencies: Vec<f64> = text.lines().filter_map(seconds).collect();
    ensure!(latencies.len() as u64 > args.seconds * args.rate / 2, "only {} answers", latencies.len());
    latencies.sort_by(f64::total_cmp);
    side.p99_us.push(latencies[latencies.len() * 99 / 100] * 1e6);
    Ok(())
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

pub fn run(args: &NamesArgs) -> Result<()> {
    let dir = args.dir.clone().unwrap_or_else(|| tool_dir(&format!("coredns-{COREDNS_VERSION}")));
    let program = coredns(&dir)?;
    let work = tempfile::tempdir()?;
    let (zone, questions) = write_inputs(work.path(), args.services)?;
    let corefile = work.path().join("Corefile");
    std::fs::write(
        &corefile,
        format!("clusterset.local:15354 {{\n  bind 127.0.0.1\n  file {}\n}}\n", zone.display()),
    )?;
    let (mut ours, mut theirs) = (Side::default(), Side::default());
    for round in 1..=args.rounds {
        let me = std::env::current_exe()?;
        let services = args.services.to_string();
        let server = Server::start(
            Command::new(me).args(["names-server", "--listen", OURS, "--services", &services]),
            OURS.parse()?,
        )?;
        turn(&mut ours, OURS, &questions, args)?;
        ours.resident_mb = server.resident_mb();
        drop(server);
        let server = Server::start(Command::new(&program).arg("-conf").arg(&corefile), THEIRS.parse()?)?;
        turn(&mut theirs, THEIRS, &questions, args)?;
        theirs.resident_mb = server.resident_mb();
        eprintln!("round {round}: ours {ours:?}, CoreDNS {theirs:?}");
    }
    let figures = Figures {
        services: args.services,
        ratio_of_medians: median(&ours.answers_per_second) / median(&theirs.answers_per_second),
        p99_ratio_of_medians: median(&ours.p99_us) / median(&theirs.p99_us),
        ours,
        coredns: theirs,
    };
    let row = |name: &str, side: &Side| {
        println!(
            "{name:10} {:>10.0} answers/s   p99 {:>7.0} us at {} /s   {:>6.1} MB",
            median(&side.answers_per_second),
            median(&side.p99_us),
            args.rate,
            side.resident_mb
        );
    };
    row("tombolo", &figures.ours);
    row("CoreDNS", &figures.coredns);
    println!(
        "answers {:.2} x (target 1.5), p99 {:.2} x (target 1)",
        figures.ratio_of_medians, figures.p99_ratio_of_medians
    );
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&figures)?)?;
    }
    Ok(())
}
