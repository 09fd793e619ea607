//! What a gateway forwards: packets per second with one worker and with two, and its memory after a million different
//! connection IDs.
//!
//! This process joins as one endpoint and sends packets for itself to the gateway's inner socket, in segmented batches that
//! cost the sender little; where they are delivered nobody reads, so the kernel drops them there.

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use quinn_udp::{Transmit, UdpSocketState};
use serde::Serialize;
use tombolo_identity::tls;
use tombolo_model::ids::EndpointId;
use tombolo_overlay::cid::{Cid, Kind};
use tombolo_overlay::member::Member;
use tombolo_overlay::{Limits, Overlay, OverlayConfig, ServerTls};
use tombolo_proto::v1;
use tombolo_proto::v1::config_client::ConfigClient;
use tombolo_runtime::clock;
use tombolo_runtime::tasks::TaskGroup;

use crate::cluster::{Place, address, get};

const PACKET: usize = 1200;
/// quinn's own batches have ten segments.
const BATCH: usize = 10;
const CONNECTIONS: usize = 256;
const DISTINCT: usize = 1_000_000;

#[derive(Debug, Clone, clap::Args)]
pub struct ForwardArgs {
    /// Seconds per measurement.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Measurements per number of workers, interleaved.
    #[arg(long, default_value_t = 3)]
    passes: usize,
    /// Also writes the figures to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Debug, Default, Serialize)]
struct Figures {
    packets_per_second_1: Vec<f64>,
    packets_per_second_2: Vec<f64>,
    rss_before_mb: f64,
    rss_after_mb: f64,
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// Runs it and prints the figures.
pub fn run(args: &ForwardArgs) -> Result<()> {
    let runtime = tombolo_runtime::rt::one_thread()?;
    let mut figures = Figures::default();
    for pass in 0..args.passes {
        for workers in [1u8, 2] {
            eprintln!("pass {}/{}: {workers} worker(s)", pass + 1, args.passes);
            let rate = runtime.block_on(rate(workers, Duration::from_secs_f64(args.seconds)))?;
            match workers {
                1 => figures.packets_per_second_1.push(rate),
                _ => figures.packets_per_second_2.push(rate),
            }
        }
    }
    (figures.rss_before_mb, figures.rss_after_mb) = runtime.block_on(distinct())?;
    let (one, two) = (median(&figures.packets_per_second_1), median(&figures.packets_per_second_2));
    let word = |reached: bool| if reached { "REACHED" } else { "MISSED" };
    println!("one worker   {one:.0} packets/s");
    println!("two workers  {two:.0} packets/s (the sender runs on the same cores)");
    println!("{} two workers vs one: {:.2}, target > 1.5", word(two > 1.5 * one), two / one);
    let grown = figures.rss_after_mb - figures.rss_before_mb;
    println!(
        "{} memory after {DISTINCT} different connection IDs: {:.1} MB before, {:.1} MB after, target flat (within 1 MB)",
        word(grown < 1.0),
        figures.rss_before_mb,
        figures.rss_after_mb
    );
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&figures)?)?;
    }
    Ok(())
}

/// A cluster with one gateway, and this process as an endpoint of it that nobody reads.
struct Target {
    place: Place,
    member: Member,
    endpoint: EndpointId,
    /// Full at once, then everything is dropped there.
    _sink: UdpSocket,
    inner: SocketAddr,
    overlay: Overlay,
    tasks: TaskGroup,
}

impl Target {
    async fn up(workers: u8) -> Result<Self> {
        let mut place = Place::up()?;
        let (token, state) = (place.token("gateway", "gw-1")?, place.path("gw-1"));
        let (border, inner) = (address(11, 7440), address(11, 7441));
        let (border_text, inner_text, workers) = (border.to_string(), inner.to_string(), workers.to_string());
        let args = ["gateway", "--name", "gw-1", "--join-token-file", &token, "--state-dir", &state];
        let more = ["--border", &border_text, "--inner", &inner_text, "--workers", &workers];
        place.start("gateway", 11, &[&args[..], &more].concat())?;

        let token = std::fs::read_to_string(place.token("sidecar", "sink")?)?;
        let member = Member::join(token.trim(), &place.dir().join("sink"), None, address(23, 7442)).await?;
        let tasks = TaskGroup::new();
        let endpoint = member.burn_endpoint()?;
        let config = OverlayConfig {
            tag: member.tag(),
            endpoint,
            keys: member.lease().keys.clone(),
            kind: Kind::Endpoint,
            bind: address(23, 7442),
            registers: false,
            learns: false,
            server: Some(ServerTls { mesh: tls::mesh_server_config(member.svid())?, join: None }),
            svid: Some(member.svid().clone()),
            limits: Limits::default(),
        };
        let overlay = Overlay::bind(config, &tasks)?;
        overlay.set_routes(member.first_routes());
        // The announced address is the sink's, not the overlay's.
        let sink = UdpSocket::bind(address(24, 7442))?;
        let hello = v1::SidecarHello {
            endpoint_addresses: vec![sink.local_addr()?.to_string()],
            endpoints: vec![endpoint.value()],
            lease: Some(member.lease().to_wire()),
            ..Default::default()
        };
        let channel = member.connect(&overlay).await?;
        let mut snapshots = ConfigClient::new(channel.clone()).watch_sidecar(hello).await?.into_inner();
        snapshots.message().await?.context("the federator ended the stream")?;
        // Reports keep the endpoint from being taken for gone.
        tasks.spawn("reports", async move {
            loop {
                let _ = ConfigClient::new(channel.clone()).report(v1::StatusReport::default()).await;
                let _ = tokio::time::timeout(Duration::from_secs(1), snapshots.message()).await;
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        });
        let target = Self { place, member, endpoint, _sink: sink, inner, overlay, tasks };
        target.reached().await?;
        Ok(target)
    }

    /// Lets the addresses go: the next one has the same.
    async fn down(self) {
        self.overlay.close().await;
        self.tasks.shutdown(Duration::from_secs(1)).await;
    }

    fn cid(&self) -> Result<Cid> {
        let lease = self.member.lease();
        let (hour, key) = lease.keys.current(clock::since_unix_epoch()).context("no key for this hour")?;
        Ok(Cid::mint(Kind::Endpoint, self.member.tag(), self.endpoint.value(), rand::random(), hour, key))
    }

    fn batch(&self) -> Result<Vec<u8>> {
        let cid = self.cid()?;
        let mut packet = vec![0x41];
        packet.extend_from_slice(cid.as_bytes());
        packet.resize(PACKET, 0x5a);
        Ok(packet.repeat(BATCH))
    }

    /// Waits until the gateway forwards to the endpoint.
    async fn reached(&self) -> Result<()> {
        let socket = UdpSocket::bind(address(25, 0))?;
        let packet = self.batch()?;
        for _ in 0..200 {
            socket.send_to(&packet[..PACKET], self.inner)?;
            tokio::time::sleep(Duration::from_millis(50)).await;
            if self.forwarded()? > 0 {
                return Ok(());
            }
        }
        anyhow::bail!("the gateway forwards nothing to the endpoint")
    }

    /// Packets that left for endpoints so far.
    fn forwarded(&self) -> Result<u64> {
        let metrics = get(address(11, 7445), "/metrics")?;
        let line = metrics
            .lines()
            .find(|l| l.contains("hop_packets_total") && l.contains("endpoints") && l.contains("\"out\""));
        let value = line.and_then(|l| l.rsplit(' ').next()).and_then(|v| v.parse::<f64>().ok());
        Ok(value.map_or(0, |v| v as u64))
    }
}

/// Sends batches until `stop`.
fn blast(batches: &[Vec<u8>], to: SocketAddr, stop: &AtomicBool) -> Result<()> {
    let socket = UdpSocket::bind(address(25, 0))?;
    let state = UdpSocketState::new((&socket).into())?;
    for batch in batches.iter().cycle() {
        if stop.load(Relaxed) {
            return Ok(());
        }
        let transmit = Transmit {
            destination: to,
            ecn: None,
            contents: batch,
            segment_size: Some(PACKET),
            src_ip: None,
        };
        // A full queue is what is wanted: the gateway is the bottleneck.
        let _ = state.send((&socket).into(), &transmit);
    }
    Ok(())
}

async fn rate(workers: u8, window: Duration) -> Result<f64> {
    let target = Target::up(workers).await?;
    let batches: Vec<Vec<u8>> = (0..CONNECTIONS).map(|_| target.batch()).collect::<Result<_>>()?;
    let (stop, inner) = (Arc::new(AtomicBool::new(false)), target.inner);
    let sender = {
        let stop = Arc::clone(&stop);
        std::thread::spawn(move || blast(&batches, inner, &stop))
    };
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (before, begun) = (target.forwarded()?, Instant::now());
    tokio::time::sleep(window).await;
    let (after, took) = (target.forwarded()?, begun.elapsed());
    stop.store(true, Relaxed);
    sender.join().map_err(|_| anyhow::anyhow!("the sender failed"))??;
    target.down().await;
    Ok(after.saturating_sub(before) as f64 / took.as_secs_f64())
}

/// The gateway's memory before and after a million connection IDs, each seen once.
async fn distinct() -> Result<(f64, f64)> {
    let target = Target::up(1).await?;
    let socket = UdpSocket::bind(address(25, 0))?;
    let send = |count: usize| -> Result<()> {
        let mut packet = target.batch()?;
        packet.truncate(64);
        for sent in 0..count {
            packet.get_mut(1..21).context("a packet")?.copy_from_slice(target.cid()?.as_bytes());
            let _ = socket.send_to(&packet, target.inner);
            // As fast as one worker takes them.
            if sent % 64 == 0 {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        Ok(())
    };
    // Buffers and caches are warm before the first look.
    send(10_000)?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = target.place.rss_mb("gateway")?;
    send(DISTINCT)?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = target.place.rss_mb("gateway")?;
    target.down().await;
    Ok((before, after))
}
