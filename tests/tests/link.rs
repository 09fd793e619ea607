//! Is the emulated link sound? Kernel TCP over it must behave as on a real path of that delay and loss
//! (`ping` for the delay, iperf3 with cubic for the rest), and every knob must do what it says to UDP.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::capability::{require_netns, require_programs};
use tombolo_tests::link::{Link, LinkEnd, Shape};
use tombolo_tests::netns::Namespace;
use tombolo_tests::process::ProcessSpec;

const NEAR: &str = "10.77.0.1";
const FAR: &str = "10.77.0.2";

struct Pair {
    // Dropped before the namespaces its devices are in.
    link: Link,
    near: Namespace,
    far: Namespace,
}

fn pair(shape: Shape) -> Result<Pair> {
    let (near, far) = (Namespace::create("near")?, Namespace::create("far")?);
    let end = |namespace, address: &str| -> Result<LinkEnd<'_>> {
        Ok(LinkEnd { namespace, device: "wan0", address: address.parse()? })
    };
    let link = Link::start(end(&near, NEAR)?, end(&far, FAR)?, shape, 42)?;
    Ok(Pair { link, near, far })
}

/// Mbit/s that a kernel TCP sender gets across for `seconds`.
fn iperf(pair: &Pair, seconds: u32) -> Result<f64> {
    let logs = tempfile::tempdir()?;
    let server = ProcessSpec::new("iperf3", "iperf3")
        .args(["-s", "-1", "--forceflush"])
        .within(&pair.far)
        .spawn(logs.path())?;
    server.wait_for_log("listening", Duration::from_secs(5))?;
    let mut client = ProcessSpec::new("client", "iperf3")
        .args(["-c", FAR, "-J", "-t", &seconds.to_string()])
        .within(&pair.near)
        .spawn(logs.path())?;
    ensure!(
        client.wait(Duration::from_secs(u64::from(seconds) + 20))?.success(),
        "iperf3: {}",
        client.tail()
    );
    let report: serde_json::Value = serde_json::from_str(&client.log())?;
    let sender = &report["end"]["sender_tcp_congestion"];
    ensure!(sender == "cubic", "the sender ran {sender}, not cubic");
    let bits =
        report["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3's report has no rate")?;
    Ok(bits / 1e6)
}

#[test]
fn a_ping_over_25_ms_each_way_takes_50_ms() -> Result<()> {
    let test = "a_ping_over_25_ms_each_way_takes_50_ms";
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &["ping"])) else { return Ok(()) };
    let pair = pair(Shape::wide_area(0.0))?;
    let near = pair.near.name().to_owned();
    let output =
        Command::new("ip").args(["netns", "exec", &near, "ping", "-c", "20", "-i", "0.05", FAR]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let times: Vec<f64> =
        text.lines().filter_map(|line| line.split_once("time=")?.1.split(' ').next()?.parse().ok()).collect();
    ensure!(times.len() == 20, "{text}");
    let mut sorted = times.clone();
    sorted.sort_by(f64::total_cmp);
    let median = sorted[10];
    println!("ping: median {median} ms, {} to {}", sorted[0], sorted[19]);
    ensure!(sorted[0] >= 50.0, "a packet arrived early: {times:?}");
    ensure!(median <= 56.0, "{times:?}");
    Ok(())
}

#[test]
fn kernel_cubic_fills_a_50_ms_path_without_loss_and_collapses_at_1_percent() -> Result<()> {
    let test = "kernel_cubic_fills_a_50_ms_path_without_loss_and_collapses_at_1_percent";
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &["iperf3"])) else {
        return Ok(());
    };
    let pair = pair(Shape::wide_area(0.0))?;
    let clean = iperf(&pair, 6)?;
    let counted = pair.link.a_to_b().counters();
    pair.link.update(|shape| shape.loss = 0.01)?;
    let lossy = iperf(&pair, 8)?;
    let after = pair.link.a_to_b().counters();
    println!("cubic: {clean:.1} Mbit/s at 0 %, {lossy:.1} at 1 % loss; {after:?}");
    ensure!(counted.lost == 0, "{counted:?}");
    // Measured on a quiet machine: 260.9 and 4.0 Mbit/s.
    ensure!((200.0..=300.0).contains(&clean), "{clean} Mbit/s at 0 % loss");
    ensure!((1.0..=15.0).contains(&lossy), "{lossy} Mbit/s at 1 % loss");
    ensure!(after.lost > 0 && after.refused_by_kernel == 0, "{after:?}");
    Ok(())
}

/// Sends `count` numbered datagrams of `bytes` and returns the numbers that arrived, in order of arrival.
fn numbered(pair: &Pair, count: u32, bytes: usize, gap: Duration) -> Result<Vec<u32>> {
    let receiver = pair.far.run(|| UdpSocket::bind((FAR, 0)))??;
    receiver.set_read_timeout(Some(Duration::from_millis(400)))?;
    let to: SocketAddr = receiver.local_addr()?;
    let sender = pair.near.run(|| UdpSocket::bind((NEAR, 0)))??;
    let sending = std::thread::spawn(move || -> std::io::Result<()> {
        let mut packet = vec![0; bytes];
        for number in 0..count {
            packet[..4].copy_from_slice(&number.to_be_bytes());
            sender.send_to(&packet, to)?;
            std::thread::sleep(gap);
        }
        Ok(())
    });
    let mut arrived = Vec::new();
    let mut buffer = [0; 2048];
    while let Ok(length) = receiver.recv(&mut buffer) {
        ensure!(length == bytes, "{length} bytes arrived of {bytes}");
        arrived.push(u32::from_be_bytes(buffer[..4].try_into()?));
    }
    sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    Ok(arrived)
}

#[test]
fn udp_meets_loss_reordering_a_smaller_mtu_and_a_black_hole_as_told() -> Result<()> {
    let test = "udp_meets_loss_reordering_a_smaller_mtu_and_a_black_hole_as_told";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let base = Shape { delay: Duration::from_millis(5), ..Shape::PERFECT };
    let pair = pair(base)?;
    let link = &pair.link;
    let gap = Duration::from_micros(300);

    let all = numbered(&pair, 500, 100, gap)?;
    ensure!(
        all == (0..500).collect::<Vec<_>>(),
        "a link without loss lost or reordered: {} arrived",
        all.len()
    );

    link.update(|shape| shape.loss = 0.2)?;
    let some = numbered(&pair, 1000, 100, gap)?;
    ensure!((700..900).contains(&some.len()) && some.is_sorted(), "{} of 1000 at 20 % loss", some.len());

    link.update(|shape| (shape.loss, shape.reorder) = (0.0, 0.1))?;
    let swapped = numbered(&pair, 500, 100, gap)?;
    ensure!(
        swapped.len() == 500 && !swapped.is_sorted(),
        "{} arrived, in order: {}",
        swapped.len(),
        swapped.is_sorted()
    );

    link.update(|shape| (shape.reorder, shape.mtu) = (0.0, 1420))?;
    // 20 bytes of IPv4 and 8 of UDP on top.
    ensure!(numbered(&pair, 10, 1392, gap)?.len() == 10);
    ensure!(numbered(&pair, 10, 1393, gap)?.is_empty());
    ensure!(link.a_to_b().counters().too_big == 10, "{:?}", link.a_to_b().counters());

    link.set_black_hole(true);
    ensure!(numbered(&pair, 10, 100, gap)?.is_empty());
    ensure!(link.a_to_b().counters().black_holed >= 10);
    link.set_black_hole(false);
    ensure!(numbered(&pair, 10, 100, gap)?.len() == 10);
    Ok(())
}

#[test]
fn the_rate_holds_for_udp_and_the_thread_stays_cheap() -> Result<()> {
    let test = "the_rate_holds_for_udp_and_the_thread_stays_cheap";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let pair = pair(Shape { rate_bits_per_second: Some(50_000_000), ..Shape::wide_area(0.0) })?;
    let receiver = pair.far.run(|| UdpSocket::bind((FAR, 0)))??;
    receiver.set_read_timeout(Some(Duration::from_millis(500)))?;
    let to = receiver.local_addr()?;
    let sender = pair.near.run(|| UdpSocket::bind((NEAR, 0)))??;
    // Twice the rate for 2 s.
    let sending = std::thread::spawn(move || {
        let end = Instant::now() + Duration::from_secs(2);
        while Instant::now() < end {
            for _ in 0..10 {
                let _ = sender.send_to(&[0; 1472], to);
            }
            std::thread::sleep(Duration::from_micros(1200));
        }
    });
    let (mut bytes, mut first, mut last) = (0, None, Instant::now());
    let mut buffer = [0; 2048];
    while let Ok(length) = receiver.recv(&mut buffer) {
        first.get_or_insert_with(Instant::now);
        last = Instant::now();
        bytes += length + 28;
    }
    let _ = sending.join();
    let seconds = last.duration_since(first.context("nothing arrived")?).as_secs_f64();
    let mbits = bytes as f64 * 8.0 / seconds / 1e6;
    let counters = pair.link.a_to_b().counters();
    println!("UDP at a 50 Mbit/s limit: {mbits:.1} Mbit/s, {counters:?}");
    ensure!((42.0..=55.0).contains(&mbits), "{mbits} Mbit/s");
    ensure!(counters.queue_full > 0, "{counters:?}");
    Ok(())
}

#[test]
fn both_address_families_cross() -> Result<()> {
    let test = "both_address_families_cross";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let (near, far) = (Namespace::create("near6")?, Namespace::create("far6")?);
    let (a, b): (IpAddr, IpAddr) = ("fd77::1".parse()?, "fd77::2".parse()?);
    let _link = Link::start(
        LinkEnd { namespace: &near, device: "wan0", address: a },
        LinkEnd { namespace: &far, device: "wan0", address: b },
        Shape { delay: Duration::from_millis(5), ..Shape::PERFECT },
        1,
    )?;
    let receiver = far.run(|| UdpSocket::bind((b, 0)))??;
    receiver.set_read_timeout(Some(Duration::from_secs(2)))?;
    let to = receiver.local_addr()?;
    near.run(|| -> std::io::Result<usize> { UdpSocket::bind((a, 0))?.send_to(b"hello", to) })??;
    let mut buffer = [0; 16];
    let (length, from) = receiver.recv_from(&mut buffer)?;
    ensure!(&buffer[..length] == b"hello" && from.ip() == a);
    Ok(())
}
