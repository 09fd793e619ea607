//! What strangers send: floods of first packets, garbage, forgeries, replays and packets of impossible sizes at every port
//! that is open. Each is a counted drop; memory stays flat, and nobody else is disturbed.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::capability::require_netns;
use tombolo_tests::link::Shape;
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::scenario::{World, failed, flowing, metric, stalls};
use tombolo_tests::stolen::Stolen;
use tombolo_tests::traffic::{RequestLoad, StreamReader};
use tombolo_tests::wire::{Capture, udp};

const LINK: Shape = Shape { rate_bits_per_second: Some(50_000_000), ..Shape::PERFECT };
/// Different connection IDs that the gateway must have looked at.
const FLOOD: f64 = 1_000_000.0;
/// Packets per system call.
const BATCH: usize = 64;
/// Of these, so many have a MAC that holds.
const ADMITTED: usize = 8;
/// What a gateway may grow by while it drops them: allocator noise, not state per ID (that would be 40 MB at 40 bytes each).
const GROWTH_BYTES: u64 = 4 << 20;
const FLOOD_LIMIT: Duration = Duration::from_secs(120);

/// A first packet of QUIC version 1 to `id`, with nothing that opens. Short: the gateway looks at no more than the IDs.
fn initial(id: &[u8]) -> Vec<u8> {
    let mut packet = vec![0xc0, 0, 0, 0, 1, 20];
    packet.extend_from_slice(id);
    packet.push(8);
    packet.resize(64, 0x5a);
    packet
}

/// Sends `packets` in one system call, as far as the kernel takes them.
fn send_all(socket: &UdpSocket, packets: &[Vec<u8>]) -> Result<()> {
    let mut slices: Vec<libc::iovec> = packets
        .iter()
        .map(|packet| libc::iovec { iov_base: packet.as_ptr().cast_mut().cast(), iov_len: packet.len() })
        .collect();
    let mut messages: Vec<libc::mmsghdr> = slices
        .iter_mut()
        .map(|slice| {
            // SAFETY: all fields of `mmsghdr` are integers and pointers, for which zero is a value.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            message.msg_hdr.msg_iov = slice;
            message.msg_hdr.msg_iovlen = 1;
            message
        })
        .collect();
    // SAFETY: the headers point into `slices`, these into `packets`, and both outlive the call; the count is theirs.
    let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), messages.len() as u32, 0) };
    ensure!(sent > 0, "sendmmsg: {}", std::io::Error::last_os_error());
    Ok(())
}

fn connected(mesh: &Mesh, cluster: &str, to: SocketAddr) -> Result<UdpSocket> {
    mesh.cluster(cluster)?
        .namespace
        .run(|| -> std::io::Result<UdpSocket> {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(to)?;
            Ok(socket)
        })?
        .context("a socket of the flood")
}

fn drops(mesh: &Mesh, cluster: &str, host: u8) -> Result<f64> {
    Ok(metric(&mesh.metrics(cluster, host)?, "tombolo_gateway_drops_total", &[]))
}

fn rss(mesh: &Mesh, name: &str) -> Result<u64> {
    Ok(mesh.process(name)?.usage().context("has ended")?.rss_bytes)
}

#[test]
fn a_million_connection_ids_leave_a_gateway_as_small_as_before_and_its_neighbours_undisturbed() -> Result<()>
{
    let test = "a_million_connection_ids_leave_a_gateway_as_small_as_before_and_its_neighbours_undisturbed";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let world = World::start(&Layout { shape: LINK, ..Layout::default() })?;
    let readers = world.readers(2)?;
    let load = RequestLoad::start(&world.mesh.cluster("east")?.namespace, world.web, "/", 20);
    flowing(&readers, 500_000, Duration::from_secs(10))?;
    let target = world.mesh.cluster("west")?.address(11, 7440);
    let socket = connected(&world.mesh, "west", target)?;
    let stolen = Stolen::read(&world.mesh.state("east", "gw-2"))?;
    // A few of 64 have a MAC that holds: what somebody with a stolen handle key can send. The bucket of the handle bounds it.
    let mut nonce = 0u64;
    let mut batch = || -> Result<Vec<Vec<u8>>> {
        let admitted = *stolen.service_cid("west", "shop/web")?.as_bytes();
        let others = (ADMITTED..BATCH).map(|n| {
            nonce += 1;
            let mut id = admitted;
            // Half with a MAC of another nonce, half for another handle.
            id[7] ^= if n % 2 == 0 { 0x10 } else { 0 };
            id[8..15].copy_from_slice(&nonce.to_be_bytes()[1..]);
            initial(&id)
        });
        Ok(std::iter::repeat_n(initial(&admitted), ADMITTED).chain(others).collect())
    };
    for _ in 0..200 {
        send_all(&socket, &batch()?)?;
    }
    let (before, counted) = (rss(&world.mesh, "west/gw-1")?, drops(&world.mesh, "west", 11)?);
    let begun = Instant::now();
    let mut looked = 0.0;
    let mut sent = 0u64;
    while looked < FLOOD {
        ensure!(begun.elapsed() < FLOOD_LIMIT, "only {looked} of {sent} looked at in {FLOOD_LIMIT:?}");
        for _ in 0..500 {
            send_all(&socket, &batch()?)?;
            sent += BATCH as u64;
        }
        looked = drops(&world.mesh, "west", 11)? - counted;
    }
    let took = begun.elapsed();
    let after = rss(&world.mesh, "west/gw-1")?;
    println!(
        "{looked} IDs looked at in {took:?} ({sent} sent): gateway {before} -> {after} bytes resident, sidecar {} bytes",
        rss(&world.mesh, "west/web")?
    );
    ensure!(after.saturating_sub(before) < GROWTH_BYTES, "the gateway grew by {} bytes", after - before);
    flowing(&readers, 500_000, Duration::from_secs(10))?;
    for reader in readers {
        println!("a stream beside the flood: longest stall {:?}", reader.take_longest_stall());
        reader.finish()?;
    }
    let answers = load.finish()?;
    let failures = failed(&answers);
    let slowest = answers.iter().map(|answer| answer.took).max().unwrap_or_default();
    println!("{} requests beside the flood, {} failed, slowest {slowest:?}", answers.len(), failures.len());
    ensure!(failures.len() * 100 <= answers.len(), "{failures:?}");
    // What the operator sees: why they were dropped.
    let metrics = world.mesh.metrics("west", 11)?;
    for reason in ["mac", "unknown_handle", "rate_limited"] {
        let count = metric(&metrics, "tombolo_gateway_drops_total", &[&format!("reason=\"{reason}\"")]);
        println!("dropped for {reason}: {count}");
        ensure!(count > 0.0, "{reason}: {metrics}");
    }
    Ok(())
}

/// Packets made from real ones, and from nothing.
fn malformed(real: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut packets =
        vec![Vec::new(), vec![0x00], vec![0x40], vec![0xc0], vec![0xff; 1200], vec![0x00; 9000]];
    packets.extend([1_201, 9_001, 65_507].map(|bytes| vec![0xc3; bytes]));
    for kind in 0..=15u8 {
        packets.extend([16, 33, 54, 64, 80, 256].map(|bytes| vec![kind; bytes]));
    }
    for (n, packet) in real.iter().enumerate() {
        packets.push(packet.clone());
        packets.push(packet.get(..n % packet.len().max(1)).unwrap_or_default().to_vec());
        let mut flipped = packet.clone();
        for at in [n % 40, n % packet.len().max(1)] {
            if let Some(byte) = flipped.get_mut(at) {
                *byte ^= 1 << (n % 8);
            }
        }
        packets.push(flipped);
        let mut long = packet.clone();
        long.resize(packet.len() + 1 + n % 3000, n as u8);
        packets.push(long);
    }
    packets
}

#[test]
fn garbage_forgeries_and_replays_at_every_port_are_counted_drops_and_nothing_more() -> Result<()> {
    let test = "garbage_forgeries_and_replays_at_every_port_are_counted_drops_and_nothing_more";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let world = World::start(&Layout { shape: LINK, ..Layout::default() })?;
    let capture = Capture::start(world.mesh.wire("east", "west")?);
    let readers = world.readers(2)?;
    flowing(&readers, 500_000, Duration::from_secs(10))?;
    let real: Vec<Vec<u8>> = capture
        .packets()
        .iter()
        .filter_map(|packet| udp(&packet.bytes).map(|datagram| datagram.payload.to_vec()))
        .take(600)
        .collect();
    let packets = malformed(&real);
    let names = ["west/gw-1", "west/web", "west/federator", "east/gw-1", "east/client"];
    let pids: Vec<u32> =
        names.iter().map(|name| Ok(world.mesh.process(name)?.pid())).collect::<Result<_>>()?;
    let before = drops(&world.mesh, "west", 11)?;
    let mut sent = 0usize;
    let attack = || -> Result<()> {
        for (cluster, host, port) in [
            ("west", 11, 7440),
            ("west", 11, 7441),
            ("west", 21, 7442),
            ("west", 1, 7443),
            ("east", 11, 7440),
            ("east", 11, 7441),
            ("east", 22, 7442),
        ] {
            let socket = connected(&world.mesh, cluster, world.mesh.cluster(cluster)?.address(host, port))?;
            for packet in &packets {
                // A refused send is an ICMP error of an earlier one: nobody listens there any more.
                socket.send(packet).with_context(|| format!("{cluster} host {host} port {port}"))?;
                sent += 1;
            }
        }
        Ok(())
    };
    let stalls = stalls(&readers, attack, Duration::from_secs(1), Duration::from_secs(15))?;
    println!("{sent} bad packets, {} of them replays, at 7 ports: longest stalls {stalls:?}", real.len() * 7);
    ensure!(stalls.iter().all(|stall| *stall < Duration::from_secs(2)), "{stalls:?}");
    flowing(&readers, 500_000, Duration::from_secs(10))?;
    let bytes = readers.into_iter().map(StreamReader::finish).sum::<Result<u64>>()?;
    for (name, pid) in names.iter().zip(pids) {
        let process = world.mesh.process(name)?;
        ensure!(!process.has_exited() && process.pid() == pid, "{name} has ended");
        ensure!(!process.log().contains("panicked"), "{name} panicked:\n{}", process.tail());
    }
    // The policy may have moved calls for a moment, and holds for 2 s before it moves them back.
    println!("west answers after {:?}", world.answered_by("west", Duration::from_secs(15))?);
    // What the operator sees.
    let metrics = world.mesh.metrics("west", 11)?;
    for reason in ["malformed", "mac", "control"] {
        let count = metric(&metrics, "tombolo_gateway_drops_total", &[&format!("reason=\"{reason}\"")]);
        println!("dropped for {reason}: {count}");
        ensure!(count > 0.0, "{reason}: {metrics}");
    }
    println!("{bytes} bytes whole; {} drops counted", drops(&world.mesh, "west", 11)? - before);
    Ok(())
}
