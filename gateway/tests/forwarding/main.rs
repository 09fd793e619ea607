//! Gateways on real sockets between real overlays, end to end.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic is a test's failure

mod world;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tombolo_gateway::counters::{Name, Reason};
use world::*;

/// East's gateways and client, west's gateways and server, all configured.
struct Pair {
    world: World,
    east: Vec<Gateway>,
    west: Vec<Gateway>,
    client: tombolo_overlay::Overlay,
    server: tombolo_overlay::Overlay,
}

impl Pair {
    fn new(gateways: usize) -> Self {
        let world = World::new();
        let start = |cluster: &str| {
            (0..gateways).map(|n| Gateway::start(&format!("{cluster}-{n}"))).collect::<Vec<_>>()
        };
        let (east, west) = (start("east"), start("west"));
        let client = world.overlay(&world.east, 7, 0, "cart", false);
        let server = world.overlay(&world.west, 9, 2, "web", false);
        let pair = Self { world, east, west, client, server };
        pair.configure();
        through(&pair.client, &pair.east.iter().collect::<Vec<_>>());
        through(&pair.server, &pair.west.iter().collect::<Vec<_>>());
        pair
    }

    fn configure(&self) {
        let (world, west) = (&self.world, &self.west);
        let mut in_east =
            snapshot(world, &world.east, &world.west, west.iter().map(|g| g.replica(g.border)).collect());
        in_east.endpoints.push(at_address(&self.client));
        let mut in_west = snapshot(
            world,
            &world.west,
            &world.east,
            self.east.iter().map(|g| g.replica(g.border)).collect(),
        );
        in_west.endpoints.push(at_address(&self.server));
        in_west.handles.push(serving(world, &[self.server.endpoint_id()]));
        self.east.iter().filter(|g| g.plane.is_some()).for_each(|g| g.configure(&world.east, &in_east));
        west.iter().filter(|g| g.plane.is_some()).for_each(|g| g.configure(&world.west, &in_west));
    }
}

fn link(name: &str) -> Name {
    Name::Link(name.into())
}

#[tokio::test]
async fn two_sidecars_talk_through_the_gateways_of_both_clusters() {
    let pair = Pair::new(1);
    let (dialled, accepted) = pair.world.connect(&pair.client, &pair.server).await;
    echo(&dialled, &accepted, 2_000_000).await;
    for (gateway, peer) in [(&pair.east[0], "west"), (&pair.west[0], "east")] {
        let figures = gateway.handle.counters().of(&link(peer));
        assert!(figures.bytes_in > 2_000_000 && figures.bytes_out > 2_000_000, "{peer}: {figures:?}");
        assert_eq!(figures.dropped(Reason::Mac), 0);
        let status = gateway.handle.status();
        assert!(status.hops[0].alive && status.hops[0].rtt.is_some(), "{status:?}");
    }
}

#[tokio::test]
async fn a_killed_gateway_breaks_no_connection_and_a_new_one_takes_its_place() {
    let mut pair = Pair::new(2);
    let (dialled, accepted) = pair.world.connect(&pair.client, &pair.server).await;
    echo(&dialled, &accepted, 200_000).await;
    let (border, inner) = (pair.west[0].border, pair.west[0].inner);
    pair.west[0].kill();
    let started = Instant::now();
    echo(&dialled, &accepted, 200_000).await;
    println!("through the other replica after {:?}", started.elapsed());
    pair.east[1].kill();
    echo(&dialled, &accepted, 200_000).await;
    eventually("east sees which of west's gateways is dead", || {
        let alive: Vec<_> = pair.east[0].handle.status().hops.iter().map(|hop| hop.alive).collect();
        alive == [false, true]
    })
    .await;
    pair.west[0] = Gateway::start_at("west-0", border, inner);
    pair.configure();
    pair.west[1].kill();
    echo(&dialled, &accepted, 200_000).await;
    assert!(dialled.quic().close_reason().is_none());
}

#[tokio::test]
async fn a_refused_path_is_left_before_probes_could_tell() {
    let mut pair = Pair::new(1);
    let (dialled, accepted) = pair.world.connect(&pair.client, &pair.server).await;
    // Idle: probes of the path are a second apart, and its death by them would take longer than that.
    eventually("the path is alive", || pair.east[0].handle.status().hops[0].alive).await;
    pair.west[0].kill();
    let killed = Instant::now();
    // The first packet that leaves brings the ICMP error back.
    let (mut send, _recv) = dialled.quic().open_bi().await.unwrap();
    send.write_all(b"anyone there?").await.unwrap();
    eventually("the path is dead", || !pair.east[0].handle.status().hops[0].alive).await;
    let took = killed.elapsed();
    assert!(took < Duration::from_millis(900), "{took:?}");
    drop(accepted);
}

#[tokio::test]
async fn a_draining_gateway_says_so_and_forwards_on() {
    let pair = Pair::new(2);
    let (dialled, accepted) = pair.world.connect(&pair.client, &pair.server).await;
    pair.west[0].handle.drain();
    pair.east[0].handle.drain();
    eventually("the peers know", || {
        pair.east[1].handle.status().hops.iter().any(|h| h.name == "west-0" && h.draining)
    })
    .await;
    eventually("the sidecar knows", || pair.client.hops().iter().any(|h| h.name == "east-0" && h.draining))
        .await;
    echo(&dialled, &accepted, 200_000).await;
    // Both draining: still better than nothing.
    pair.west[1].handle.drain();
    eventually("both drain", || pair.east[1].handle.status().hops.iter().all(|h| h.draining)).await;
    echo(&dialled, &accepted, 200_000).await;
}

/// A server without an address that gateways know: it registers.
struct Outside {
    world: World,
    east: Gateway,
    west: Vec<Gateway>,
    client: tombolo_overlay::Overlay,
    server: tombolo_overlay::Overlay,
}

impl Outside {
    /// `knows`: which of west's gateways the server registers at; `reaches`: which of them east knows.
    fn new(gateways: usize, knows: &[usize], reaches: &[usize]) -> Self {
        let world = World::new();
        let east = Gateway::start("east-0");
        let west: Vec<_> = (0..gateways).map(|n| Gateway::start(&format!("west-{n}"))).collect();
        let client = world.overlay(&world.east, 7, 0, "cart", false);
        let server = world.overlay(&world.west, 9, 2, "web", true);
        let peers = reaches.iter().map(|n| west[*n].replica(west[*n].border)).collect();
        let mut in_east = snapshot(&world, &world.east, &world.west, peers);
        in_east.endpoints.push(at_address(&client));
        east.configure(&world.east, &in_east);
        let mut in_west = snapshot(&world, &world.west, &world.east, vec![east.replica(east.border)]);
        in_west.endpoints.push(registering(&server));
        in_west.handles.push(serving(&world, &[server.endpoint_id()]));
        in_west.siblings = west.iter().map(|g| g.replica(g.inner)).collect();
        for gateway in &west {
            in_west.name.clone_from(&gateway.name);
            gateway.configure(&world.west, &in_west);
        }
        through(&client, &[&east]);
        // A machine outside reaches the border.
        let mut routes = tombolo_overlay::routes::Routes::empty(world.west.tag);
        routes.gateways = knows
            .iter()
            .map(|n| tombolo_overlay::GatewayHop { address: west[*n].border, ..west[*n].hop() })
            .collect();
        server.set_routes(routes);
        Self { world, east, west, client, server }
    }
}

#[tokio::test]
async fn a_registered_endpoint_is_reached_and_may_call_out_by_the_border() {
    let world = Outside::new(1, &[0], &[0]);
    eventually("the server is registered", || world.west[0].handle.status().registered == 1).await;
    let (dialled, accepted) = world.world.connect(&world.client, &world.server).await;
    echo(&dialled, &accepted, 500_000).await;
    assert_eq!(world.west[0].handle.counters().of(&link("east")).dropped(Reason::Source), 0);
    assert!(world.east.handle.counters().of(&link("west")).bytes_in > 500_000);
}

#[tokio::test]
async fn a_replica_hands_packets_over_to_the_sibling_that_has_the_registration() {
    let world = Outside::new(2, &[1], &[0]);
    eventually("the sibling has told", || world.west[0].handle.status().announced == 1).await;
    let (dialled, accepted) = world.world.connect(&world.client, &world.server).await;
    echo(&dialled, &accepted, 200_000).await;
    let handed = world.west[0].handle.counters().of(&Name::Gateway("west".into(), "west-1".into()));
    assert!(handed.bytes_out > 200_000, "{handed:?}");
    assert_eq!(world.west[0].handle.status().registered, 0);
}

/// A balancer: every source address sticks to one of the backends; answers are passed back.
struct Balancer {
    address: SocketAddr,
    served: Arc<[AtomicUsize; 2]>,
    stop: Arc<AtomicBool>,
}

impl Balancer {
    fn start(backends: [SocketAddr; 2]) -> Self {
        let front = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        front.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let address = front.local_addr().unwrap();
        let (served, stop) = (Arc::<[AtomicUsize; 2]>::default(), Arc::<AtomicBool>::default());
        let (counts, stopped) = (Arc::clone(&served), Arc::clone(&stop));
        std::thread::spawn(move || {
            let mut flows: std::collections::HashMap<SocketAddr, std::net::UdpSocket> = Default::default();
            let mut buffer = vec![0; 65_536];
            while !stopped.load(Relaxed) {
                let Ok((len, source)) = front.recv_from(&mut buffer) else { continue };
                let index = flows.len() % 2;
                let back = flows.entry(source).or_insert_with(|| {
                    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
                    socket.connect(backends[index]).unwrap();
                    counts[index].fetch_add(1, Relaxed);
                    let (answers, front, stopped) =
                        (socket.try_clone().unwrap(), front.try_clone().unwrap(), Arc::clone(&stopped));
                    answers.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
                    std::thread::spawn(move || {
                        let mut buffer = vec![0; 65_536];
                        while !stopped.load(Relaxed) {
                            if let Ok(len) = answers.recv(&mut buffer) {
                                let _ = front.send_to(&buffer[..len], source);
                            }
                        }
                    });
                    socket
                });
                let _ = back.send(&buffer[..len]);
            }
        });
        Self { address, served, stop }
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

#[tokio::test]
async fn a_balanced_peer_is_used_through_several_ports_and_outlives_one_of_its_replicas() {
    let world = World::new();
    let east = Gateway::start("east-0");
    let mut west = [Gateway::start("west-0"), Gateway::start("west-1")];
    let balancer = Balancer::start([west[0].border, west[1].border]);
    let client = world.overlay(&world.east, 7, 0, "cart", false);
    let server = world.overlay(&world.west, 9, 2, "web", false);
    let mut balanced = west[0].replica(balancer.address);
    balanced.balanced = true;
    let mut in_east = snapshot(&world, &world.east, &world.west, vec![balanced]);
    in_east.endpoints.push(at_address(&client));
    east.configure(&world.east, &in_east);
    let mut in_west = snapshot(&world, &world.west, &world.east, vec![east.replica(east.border)]);
    in_west.endpoints.push(at_address(&server));
    in_west.handles.push(serving(&world, &[server.endpoint_id()]));
    west.iter().for_each(|gateway| gateway.configure(&world.west, &in_west));
    through(&client, &[&east]);
    through(&server, &[&west[0], &west[1]]);
    eventually("four ports", || balancer.served.iter().all(|n| n.load(Relaxed) >= 2)).await;
    let (dialled, accepted) = world.connect(&client, &server).await;
    echo(&dialled, &accepted, 200_000).await;
    west[0].kill();
    echo(&dialled, &accepted, 200_000).await;
    let before: usize = balancer.served.iter().map(|n| n.load(Relaxed)).sum();
    eventually("dead ports are replaced", || {
        balancer.served.iter().map(|n| n.load(Relaxed)).sum::<usize>() > before
    })
    .await;
    echo(&dialled, &accepted, 200_000).await;
}

#[tokio::test]
async fn strangers_get_nothing_through() {
    let pair = Pair::new(1);
    let (dialled, accepted) = pair.world.connect(&pair.client, &pair.server).await;
    echo(&dialled, &accepted, 1000).await;
    let stranger = tokio::net::UdpSocket::bind("127.0.0.2:0").await.unwrap();
    // Outward by either socket, and inward with a wrong key: both of a foreign address.
    let (tag, other) = (pair.world.west.tag, tombolo_overlay::keys::CidKey::from_bytes([0; 16]));
    let id = pair.server.endpoint_id();
    let hour = tombolo_overlay::keys::Hour::at(tombolo_runtime::clock::since_unix_epoch());
    let kind = tombolo_overlay::cid::Kind::Endpoint;
    let cid = tombolo_overlay::cid::Cid::mint(kind, tag, id.value(), [1; 7], hour, &other);
    let packet = [&[0x41], cid.as_bytes().as_slice(), &[0; 100]].concat();
    for to in [pair.east[0].border, pair.east[0].inner, pair.west[0].border] {
        stranger.send_to(&packet, to).await.unwrap();
    }
    let dropped = |gateway: &Gateway, name: &Name, reason| gateway.handle.counters().of(name).dropped(reason);
    eventually("east is no open relay", || dropped(&pair.east[0], &link("west"), Reason::Source) == 2).await;
    eventually("west checks the MAC", || dropped(&pair.west[0], &Name::Unknown, Reason::Mac) == 1).await;
}
