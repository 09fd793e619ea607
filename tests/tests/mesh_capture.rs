//! What somebody on the path between two clusters sees: every packet is captured, Initials are decrypted (their keys are
//! public), and nothing in them tells the application's bytes, a service's name or an identity.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::capability::require_netns;
use tombolo_tests::link::Shape;
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::scenario::{entry, export, flag};
use tombolo_tests::traffic::StreamServer;
use tombolo_tests::wire::initial::{InitialReader, Side, client_hello_extensions};
use tombolo_tests::wire::{Capture, contains, udp, write_pcap};

const BORDER: u16 = 7440;
const IPPROTO_ICMP: u8 = 1;
const SERVICE: &str = "quarterly-ledger";
const SECRET: &str = "the-plaintext-of-the-application";
/// RFC 6066: where a name would be.
const SERVER_NAME: u16 = 0;
/// RFC 9001: proves that a ClientHello of QUIC was read to its end.
const QUIC_TRANSPORT_PARAMETERS: u16 = 0x39;

/// Sends the secret through the mesh and reads it back, `times` over.
fn exchange(mesh: &Mesh, address: std::net::SocketAddr, times: usize) -> Result<()> {
    mesh.cluster("east")?.namespace.run(|| {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"e")?;
        let text = SECRET.repeat(8);
        for _ in 0..times {
            stream.write_all(text.as_bytes())?;
            let mut back = vec![0; text.len()];
            stream.read_exact(&mut back)?;
            ensure!(back == text.as_bytes(), "the echo differs");
        }
        Ok(())
    })?
}

#[test]
fn nothing_but_one_udp_port_crosses_and_no_packet_tells_what_who_or_which_service() -> Result<()> {
    let test = "nothing_but_one_udp_port_crosses_and_no_packet_tells_what_who_or_which_service";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let shape = Shape { delay: Duration::from_millis(2), ..Shape::PERFECT };
    // Captured from before the link is made: joining and the federators' talk cross the border too.
    let mut mesh = Mesh::unlinked(&Layout { shape, ..Layout::default() })?;
    let capture = Capture::start(mesh.wire("east", "west")?);
    mesh.link_clusters("east", "west")?;
    // What the joiner's closing connection still says comes after this: a handful of packets.
    let joined = capture.packets().len();

    let echo = mesh.cluster("west")?.address(21, 9000);
    let _server = StreamServer::start(&mesh.cluster("west")?.namespace, echo)?;
    mesh.sidecar("west", "bookkeeper", &flag("--service", SERVICE, 9000, echo))?;
    mesh.apply("west", &export(SERVICE))?;
    let call = mesh.cluster("east")?.address(21, 9090);
    mesh.sidecar("east", "auditor", &flag("--upstream", SERVICE, 9000, call))?;
    mesh.eventually("the ledger answers", Duration::from_secs(15), |mesh| exchange(mesh, call, 1))?;
    exchange(&mesh, call, 200)?;

    let packets = capture.packets();
    write_pcap(&mesh.logs()?.join("border.pcap"), &packets)?;
    let mut reader = InitialReader::default();
    let (mut bytes, mut ports, mut foreign) = (0, BTreeSet::new(), 0);
    let mut icmp = 0;
    for packet in &packets {
        bytes += packet.bytes.len();
        match udp(&packet.bytes) {
            Some(datagram) => {
                ports.insert((datagram.from.port(), datagram.to.port()));
                reader.read(datagram.payload)?;
            }
            // The kernel's own neighbour discovery on the device; the clusters have no IPv6 address.
            None if packet.bytes.first().is_some_and(|byte| byte >> 4 == 6) => {}
            // An ICMP error quotes a packet that was looked at already; its quote is searched below all the same.
            None if packet.bytes.get(9) == Some(&IPPROTO_ICMP) => icmp += 1,
            None => foreign += 1,
        }
    }
    let whole = reader.handshakes.values().filter(|handshake| {
        client_hello_extensions(&handshake.crypto(Side::Client))
            .is_some_and(|types| types.contains(&QUIC_TRANSPORT_PARAMETERS))
    });
    println!(
        "{} packets, {bytes} bytes; ports {ports:?}; {} Initials opened of {} connections ({} ClientHellos read to \
         their end), {} not opened",
        packets.len(),
        reader.plaintexts.len(),
        reader.handshakes.len(),
        whole.count(),
        reader.unopened
    );
    ensure!(foreign == 0, "{foreign} packets are neither UDP nor ICMP errors ({icmp})");
    // A cluster that joins has no gateway of the other's yet: it speaks from a port of its own, to the one port.
    let strangers: Vec<_> = ports.iter().filter(|(from, to)| *from != BORDER && *to != BORDER).collect();
    ensure!(strangers.is_empty(), "other ports cross the border: {strangers:?}");
    let linked = packets.iter().skip(joined).filter_map(|packet| udp(&packet.bytes));
    let other =
        linked.filter(|datagram| (datagram.from.port(), datagram.to.port()) != (BORDER, BORDER)).count();
    println!("{other} packets of other ports after the link was made, {icmp} ICMP errors");
    ensure!(other <= 8, "after the link was made, {other} packets of another port");

    // Joining, each federator's watch, and the sidecars' connection.
    ensure!(reader.handshakes.len() >= 3 && reader.unopened == 0, "{} unopened", reader.unopened);
    let mut read = 0;
    for handshake in reader.handshakes.values() {
        let hello = handshake.crypto(Side::Client);
        // A dial that was given up may have sent its first packet only.
        let Some(extensions) = client_hello_extensions(&hello) else { continue };
        read += 1;
        ensure!(!extensions.contains(&SERVER_NAME), "a ClientHello carries a server name: {extensions:?}");
        ensure!(extensions.contains(&QUIC_TRANSPORT_PARAMETERS), "{extensions:?}");
    }
    ensure!(read >= 3, "only {read} ClientHellos were read");
    // The reader is no blind one: what it opens is TLS.
    ensure!(reader.plaintexts.iter().any(|plaintext| contains(plaintext, b"tombolo/1")), "no ALPN was seen");

    let needles = [
        SECRET,
        SERVICE,
        "spiffe://",
        "acme.example",
        "cluster/",
        "/sa/",
        "bookkeeper",
        "auditor",
        "federator",
    ];
    for needle in needles {
        let on_the_wire = packets.iter().filter(|packet| contains(&packet.bytes, needle.as_bytes())).count();
        let in_initials = reader.plaintexts.iter().filter(|text| contains(text, needle.as_bytes())).count();
        ensure!(on_the_wire + in_initials == 0, "{needle:?}: {on_the_wire} packets, {in_initials} Initials");
    }
    // What the operator sees: the same traffic, counted per link, by gateways that could not read it.
    let status = mesh.status("west")?;
    ensure!(entry(&status, "exports", "service", &format!("shop/{SERVICE}"))?["healthy"] == 1, "{status}");
    let carried: f64 = [11, 12]
        .into_iter()
        .map(|host| {
            let metrics = mesh.metrics("west", host)?;
            Ok(tombolo_tests::scenario::metric(&metrics, "tombolo_gateway_packets_total", &["link=\"east\""]))
        })
        .sum::<Result<f64>>()
        .context("metrics of the gateways")?;
    ensure!(carried > 100.0, "only {carried} packets counted");
    Ok(())
}
