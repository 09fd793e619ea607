//! Programs that know nothing of the mesh, across two clusters and 20 ms: nginx with curl and wrk, PostgreSQL with psql
//! and pgbench, Redis with redis-benchmark.

use std::io::{ErrorKind, Read as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tombolo_tests::capability::{find_program, require_netns, require_programs};
use tombolo_tests::link::Shape;
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::postgres::{self, owned_by};
use tombolo_tests::process::ProcessSpec;
use tombolo_tests::scenario::{entry, export, flag, metric};

/// 20 ms round trip.
const LINK: Shape =
    Shape { delay: Duration::from_millis(10), rate_bits_per_second: Some(200_000_000), ..Shape::PERFECT };
const RUN: Duration = Duration::from_secs(40);
const SERVER_HOST: u8 = 21;
const CALLER_HOST: u8 = 21;

/// One server in west, exported; a sidecar in east that offers it at the same port.
struct Site {
    mesh: Mesh,
    port: u16,
    service: &'static str,
}

impl Site {
    /// Starts west's server by `server`, which gets the address to listen on.
    fn start(
        service: &'static str,
        port: u16,
        server: impl FnOnce(&Mesh) -> Result<ProcessSpec>,
    ) -> Result<Self> {
        let mut mesh = Mesh::start(&Layout { gateways: 1, shape: LINK, ..Layout::default() })?;
        let spec = server(&mesh)?.within(&mesh.cluster("west")?.namespace);
        mesh.spawn(&format!("west/{service}-server"), spec)?;
        let listen = mesh.cluster("west")?.address(SERVER_HOST, port);
        mesh.eventually("the server listens", Duration::from_secs(10), |mesh| {
            mesh.cluster("west")?.namespace.run(|| std::net::TcpStream::connect(listen).map(drop))??;
            Ok(())
        })?;
        mesh.sidecar("west", service, &flag("--service", service, port, listen))?;
        mesh.apply("west", &export(service))?;
        let at = mesh.cluster("east")?.address(CALLER_HOST, port);
        mesh.sidecar("east", "caller", &flag("--upstream", service, port, at))?;
        let site = Self { mesh, port, service };
        site.mesh.eventually("the import is healthy", Duration::from_secs(15), |mesh| {
            let status = mesh.status("east")?;
            let import = entry(&status, "imports", "service", &format!("shop/{service}"))?;
            ensure!(import["clusters"][0]["healthy"] == 1, "{import}");
            Ok(())
        })?;
        // The caller's sidecar hears of it a moment later than the operator: until then it resets.
        site.mesh.eventually("a connection is carried", Duration::from_secs(5), |mesh| {
            let east = &mesh.cluster("east")?.namespace;
            let mut stream = east.run(|| std::net::TcpStream::connect(at))??;
            stream.set_read_timeout(Some(Duration::from_millis(300)))?;
            match stream.read(&mut [0]) {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(()),
                other => bail!("{other:?}"),
            }
        })?;
        Ok(site)
    }

    fn host(&self) -> Result<String> {
        Ok(self.mesh.cluster("east")?.address(CALLER_HOST, self.port).ip().to_string())
    }

    /// Runs a client in east to its end.
    fn client(&self, name: &str, program: &str, args: &[&str]) -> Result<String> {
        let path = postgres::program(program)?;
        let spec = ProcessSpec::new(name, path).args(args).within(&self.mesh.cluster("east")?.namespace);
        spec.run(&self.mesh.logs()?, RUN)
    }

    /// What an operator sees afterwards: bytes and streams of the service, none ended by an error of the mesh.
    fn seen_by_the_operator(&self) -> Result<()> {
        let metrics = self.mesh.metrics("east", CALLER_HOST)?;
        let label = format!("service=\"shop/{}\"", self.service);
        let (received, sent) = (
            metric(&metrics, "tombolo_sidecar_received_bytes_total", &[&label]),
            metric(&metrics, "tombolo_sidecar_sent_bytes_total", &[&label]),
        );
        let ended = metrics.lines().filter(|line| line.starts_with("tombolo_sidecar_streams_ended_total"));
        println!(
            "{}: {received} bytes received, {sent} sent; {}",
            self.service,
            ended.collect::<Vec<_>>().join(", ")
        );
        ensure!(received > 10_000.0 && sent > 1_000.0, "{metrics}");
        let gateway = self.mesh.metrics("west", 11)?;
        ensure!(gateway.contains("tombolo_gateway_"), "{gateway}");
        Ok(())
    }
}

/// Bytes that do not compress and differ from place to place.
fn random_file(path: &Path, bytes: usize) -> Result<Vec<u8>> {
    let content: Vec<u8> =
        (0..bytes as u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 37) as u8).collect();
    std::fs::write(path, &content)?;
    Ok(content)
}

/// The number after `label` in a program's report.
fn figure(report: &str, label: &str) -> Result<f64> {
    let rest = report.split_once(label).with_context(|| format!("no {label:?} in {report}"))?.1;
    let text: String = rest.trim_start().chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    text.parse().with_context(|| format!("{label:?} in {report}"))
}

#[test]
fn nginx_answers_curl_and_wrk_across_clusters() -> Result<()> {
    let test = "nginx_answers_curl_and_wrk_across_clusters";
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &["nginx", "curl", "wrk"])) else {
        return Ok(());
    };
    let dir = owned_by("www-data")?;
    let (root, path) = (dir.path().display(), dir.path());
    let content = random_file(&path.join("large"), 16 << 20)?;
    std::fs::write(path.join("small"), "hello from nginx\n")?;
    let site = Site::start("nginx", 8080, |mesh| {
        let listen = mesh.cluster("west")?.address(SERVER_HOST, 8080);
        let config = path.join("nginx.conf");
        std::fs::write(
            &config,
            format!(
                "user www-data;\nworker_processes 1;\ndaemon off;\npid {root}/pid;\nerror_log stderr warn;\n\
                events {{}}\nhttp {{\n access_log off;\n client_body_temp_path {root}/body;\n client_max_body_size 64m;\n\
                server {{ listen {listen}; root {root}; location / {{ dav_methods PUT DELETE; }} }}\n}}\n"
            ),
        )?;
        let program = find_program("nginx").context("nginx")?;
        Ok(ProcessSpec::new("nginx", program).args(["-c", &config.display().to_string()]))
    })?;
    let url = format!("http://{}:8080", site.host()?);
    let (down, up) = (path.join("down"), path.join("up"));
    let timing = "%{http_code} %{speed_download} %{speed_upload}";
    let got = site.client(
        "curl-get",
        "curl",
        &["-sS", "-w", timing, "-o", &down.display().to_string(), &format!("{url}/large")],
    )?;
    ensure!(got.starts_with("200"), "{got}");
    ensure!(std::fs::read(&down)? == content, "the download differs");
    let sent = random_file(&up, 4 << 20)?;
    let put = site.client(
        "curl-put",
        "curl",
        &["-sS", "-w", timing, "-T", &up.display().to_string(), &format!("{url}/put")],
    )?;
    ensure!(put.starts_with("201"), "{put}");
    ensure!(std::fs::read(path.join("put"))? == sent, "the upload differs");
    println!("curl: 16 MiB down [{got}], 4 MiB up [{put}] (code, bytes/s down, up)");
    let report = site.client("wrk", "wrk", &["-t1", "-c32", "-d3s", "--latency", &format!("{url}/small")])?;
    println!("{report}");
    ensure!(!report.contains("Socket errors") && !report.contains("Non-2xx"), "{report}");
    ensure!(figure(&report, "Requests/sec:")? > 200.0, "32 connections and 20 ms allow 1600: {report}");
    site.seen_by_the_operator()
}

#[test]
fn postgresql_serves_psql_and_pgbench_across_clusters() -> Result<()> {
    let test = "postgresql_serves_psql_and_pgbench_across_clusters";
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &["psql", "setpriv"])) else {
        return Ok(());
    };
    let dir = owned_by("postgres")?;
    let site = Site::start("postgres", 5432, |mesh| {
        let listen = mesh.cluster("west")?.address(SERVER_HOST, 5432);
        postgres::server(dir.path(), listen, &mesh.logs()?)
    })?;
    let host = site.host()?;
    let at = ["-h", host.as_str(), "-p", "5432", "-U", "postgres"];
    let pgbench =
        |name: &str, args: &[&str]| site.client(name, "pgbench", &[&at[..], args, &["postgres"]].concat());
    pgbench("pgbench-init", &["-i", "-s", "1", "-q"])?;
    let count = site.client(
        "psql",
        "psql",
        &[&at[..], &["-d", "postgres", "-Atc", "select count(*), sum(abalance) from pgbench_accounts"]]
            .concat(),
    )?;
    ensure!(count.trim() == "100000|0", "{count}");
    let report = pgbench("pgbench", &["-c", "8", "-j", "1", "-T", "3"])?;
    let (tps, latency) = (figure(&report, "tps =")?, figure(&report, "latency average =")?);
    println!("pgbench, 8 clients at 20 ms: {tps:.0} transactions/s, {latency:.0} ms on average");
    ensure!(report.contains("failed transactions: 0 ") && tps > 5.0, "{report}");
    // 7 statements of a transaction are 7 round trips: 140 ms, what the server needs, and what else the machine does.
    ensure!(latency < 1500.0, "{report}");
    site.seen_by_the_operator()
}

#[test]
fn redis_serves_redis_benchmark_across_clusters() -> Result<()> {
    let test = "redis_serves_redis_benchmark_across_clusters";
    let programs = ["redis-server", "redis-benchmark", "redis-cli", "setpriv"];
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &programs)) else { return Ok(()) };
    let site = Site::start("redis", 6379, |mesh| {
        let listen = mesh.cluster("west")?.address(SERVER_HOST, 6379).ip().to_string();
        let program = find_program("redis-server").context("redis-server")?;
        ProcessSpec::new("redis", program)
            .args(["--bind", &listen, "--port", "6379", "--save", "", "--appendonly", "no"])
            .args(["--protected-mode", "no"])
            .current_dir("/")
            .as_user("nobody")
    })?;
    let host = site.host()?;
    let at = ["-h", host.as_str(), "-p", "6379"];
    let report = site.client(
        "redis-benchmark",
        "redis-benchmark",
        &[&at[..], &["-c", "50", "-n", "2000", "-d", "512", "-t", "set,get", "--csv"]].concat(),
    )?;
    for line in report.lines().filter(|line| line.starts_with('"')) {
        println!("redis-benchmark, 50 clients at 20 ms: {line}");
    }
    ensure!(
        report.contains("\"SET\"") && report.contains("\"GET\"") && !report.contains("Error"),
        "{report}"
    );
    let answer =
        site.client("redis-cli", "redis-cli", &[&at[..], &["strlen", "key:__rand_int__"]].concat())?;
    ensure!(answer.trim() == "512", "{answer}");
    site.seen_by_the_operator()
}
