//! Packets per second of a UDP service: through the mesh's four hops, and through two of nginx's stream module, which encrypts
//! nothing. Interleaved, the ratio by medians within one pass.
//!
//! The load is an echo with a fixed number of datagrams under way: each answer sends the next one, so that it goes as fast as
//! the path does and loses little; what is counted is answers, each of which has passed every hop twice.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use tombolo_tests::process::{Process, ProcessSpec};

use crate::site::{Port, Side, Site, own_program, program};
use crate::topology::tombolo::{ENTRY_UDP_PORT, ORIGIN_UDP_PORT, Tombolo, USUAL};
use crate::topology::{Running, Topology as _};

/// Where callers enter.
const ENTRY_NGINX_PORT: u16 = 21090;
const INNER_NGINX_PORT: u16 = 22120;
/// Without an answer for this long, what is under way is taken for lost.
const LOST: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, clap::Args)]
pub struct UdpArgs {
    /// Seconds per measurement.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Passes over both ways, interleaved.
    #[arg(long, default_value_t = 5)]
    passes: usize,
    /// Also writes every sample to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Debug, Clone, clap::Args)]
pub struct UdpLoadArgs {
    #[arg(long)]
    target: SocketAddr,
    #[arg(long)]
    flows: usize,
    #[arg(long)]
    bytes: usize,
    /// Datagrams under way, all flows together.
    #[arg(long, default_value_t = 128)]
    window: usize,
    #[arg(long)]
    seconds: f64,
}

#[derive(Debug, Clone, clap::Args)]
pub struct UdpOriginArgs {
    #[arg(long)]
    listen: SocketAddr,
}

#[derive(Debug, Serialize, Deserialize)]
struct LoadReport {
    answers_per_second: f64,
    lost: u64,
}

/// Samples of one load through each way, in the order of the passes.
#[derive(Debug, Serialize)]
struct Row {
    bytes: usize,
    flows: usize,
    nginx: Vec<f64>,
    tombolo: Vec<f64>,
}

/// Runs it and prints the figures.
pub fn run(args: &UdpArgs) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let site = Site::local(dir.path())?;
    let listen = site.socket(Side::Far, ORIGIN_UDP_PORT);
    let origin =
        ProcessSpec::new("origin-udp", own_program()?).args(["udp-origin", "--listen", &listen.to_string()]);
    let _origin = site.start(Side::Far, origin, &[Port::Udp(ORIGIN_UDP_PORT)])?;
    let _origins = site.start_origins()?;
    let (nginx, _hops) = nginx(&site, listen)?;
    let (tombolo, _path) = tombolo(&site)?;
    let mut rows: Vec<Row> = [(200, 1), (200, 16), (1200, 1), (1200, 16)]
        .map(|(bytes, flows)| Row { bytes, flows, nginx: Vec::new(), tombolo: Vec::new() })
        .into();
    for target in [nginx, tombolo] {
        load(&site, target, 1200, 1, 0.5).context("warming up")?;
    }
    for pass in 0..args.passes {
        eprintln!("pass {}/{}", pass + 1, args.passes);
        for row in &mut rows {
            let mut ways = [(nginx, false), (tombolo, true)];
            if pass % 2 == 1 {
                ways.reverse();
            }
            for (target, ours) in ways {
                let answers = load(&site, target, row.bytes, row.flows, args.seconds)?;
                if ours { &mut row.tombolo } else { &mut row.nginx }.push(answers);
            }
        }
    }
    println!("\nechoes per second, {} passes of {} s, medians:", args.passes, args.seconds);
    for Row { bytes, flows, nginx, tombolo } in &rows {
        let ratio = median(tombolo.iter().zip(nginx).map(|(ours, theirs)| ours / theirs).collect());
        let word = if ratio >= 1.0 { "REACHED" } else { "MISSED" };
        println!(
            "  {bytes:>5} bytes, {flows:>2} flows   nginx x2 {:>8.0}   tombolo x4 {:>8.0}   {word} {ratio:.2} x, target >= 1",
            median(nginx.clone()),
            median(tombolo.clone())
        );
    }
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&rows)?)?;
    }
    Ok(())
}

fn load(site: &Site, target: SocketAddr, bytes: usize, flows: usize, seconds: f64) -> Result<f64> {
    let number = |value: usize| value.to_string();
    let spec = ProcessSpec::new("load-udp", own_program()?)
        .args(["udp-load", "--target", &target.to_string(), "--bytes", &number(bytes)])
        .args(["--flows", &number(flows), "--seconds", &seconds.to_string()])
        .within_optional(site.namespace(Side::Near));
    let text = spec.run(site.dir(), Duration::from_secs_f64(seconds + 10.0))?;
    let report = text.lines().last().context("no report")?;
    let LoadReport { answers_per_second, lost } = serde_json::from_str(report)?;
    if lost > 0 {
        eprintln!("  {target}: {lost} lost at {answers_per_second:.0} echoes/s");
    }
    Ok(answers_per_second)
}

fn nginx(site: &Site, origin: SocketAddr) -> Result<(SocketAddr, Vec<Process>)> {
    let hop = |role: &str, side: Side, port: u16, next: SocketAddr| -> Result<Process> {
        let mut config = String::new();
        let listen = site.socket(side, port);
        let _ = write!(
            config,
            "daemon off; worker_processes auto; error_log stderr crit; pid {dir}/{role}.pid; user root;
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
events {{ worker_connections 20000; }}
stream {{ server {{ listen {listen} udp reuseport; proxy_pass {next}; proxy_timeout 60s; }} }}
",
            dir = site.dir().display(),
        );
        let config = site.write(&format!("{role}.conf"), &config)?;
        let spec = ProcessSpec::new(role, program("nginx")?).arg("-c").arg(config).arg("-p").arg(site.dir());
        site.start(side, spec, &[Port::Udp(port)])
    };
    let far = hop("udp-far", Side::Far, INNER_NGINX_PORT, origin)?;
    let inner = site.socket(Side::Far, INNER_NGINX_PORT);
    let near = hop("udp-near", Side::Near, ENTRY_NGINX_PORT, inner)?;
    Ok((site.socket(Side::Near, ENTRY_NGINX_PORT), vec![near, far]))
}

fn tombolo(site: &Site) -> Result<(SocketAddr, Running)> {
    let running = Tombolo { max_udp_payload: USUAL, captured: None, datagrams: true }.start(site)?;
    Ok((site.socket(Side::Near, ENTRY_UDP_PORT), running))
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(0.0)
}

/// (internal) The echo's far end.
pub fn origin(args: &UdpOriginArgs) -> Result<()> {
    let socket = std::net::UdpSocket::bind(args.listen)?;
    let mut buffer = vec![0; 65_536];
    loop {
        let (count, from) = socket.recv_from(&mut buffer)?;
        let _ = socket.send_to(buffer.get(..count).unwrap_or_default(), from);
    }
}

/// (internal) Keeps a number of datagrams under way and counts the answers.
pub fn generate(args: &UdpLoadArgs) -> Result<()> {
    ensure!(args.flows > 0 && args.window >= args.flows, "at least one datagram per flow");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let window = args.window / args.flows;
    let (answers, lost, took) = runtime.block_on(async {
        let begun = Instant::now();
        let warm = begun + Duration::from_secs_f64(args.seconds * 0.1);
        let end = begun + Duration::from_secs_f64(args.seconds);
        let flows = (0..args.flows).map(|_| flow(args.target, args.bytes, window, warm, end));
        let counted: Vec<(u64, u64)> = futures::future::try_join_all(flows).await?;
        let sum = counted.iter().fold((0, 0), |sum, flow| (sum.0 + flow.0, sum.1 + flow.1));
        anyhow::Ok((sum.0, sum.1, (end - warm).as_secs_f64()))
    })?;
    let report = LoadReport { answers_per_second: answers as f64 / took, lost };
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

/// Answers after `warm`, and what was lost.
async fn flow(
    target: SocketAddr,
    bytes: usize,
    window: usize,
    warm: Instant,
    end: Instant,
) -> Result<(u64, u64)> {
    let socket = tokio::net::UdpSocket::bind(SocketAddr::new([0, 0, 0, 0].into(), 0)).await?;
    socket.connect(target).await?;
    let (payload, mut buffer) = (vec![0x5a; bytes], vec![0; 65_536]);
    let (mut answers, mut lost, mut under_way) = (0, 0, 0);
    while Instant::now() < end {
        while under_way < window && socket.try_send(&payload).is_ok() {
            under_way += 1;
        }
        if tokio::time::timeout(LOST, socket.readable()).await.is_err() {
            lost += under_way as u64;
            under_way = 0;
            continue;
        }
        let counts = Instant::now() >= warm;
        // A quarter of the window at a time keeps the rest of it moving.
        for _ in 0..window.div_ceil(4) {
            match socket.try_recv(&mut buffer) {
                Ok(count) => {
                    ensure!(count == bytes, "an answer of {count} bytes");
                    answers += u64::from(counts);
                    under_way = under_way.saturating_sub(1);
                }
                Err(_) => break,
            }
        }
        tokio::task::yield_now().await;
    }
    Ok((answers, lost))
}
