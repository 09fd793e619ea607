//! The congestion controller inside real quinn connections: over a lossy emulated WAN and over loopback.
#![allow(clippy::unwrap_used)] // outside #[test] functions too: a panic here is a failed test

use std::collections::VecDeque;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use quinn::congestion::{ControllerFactory, CubicConfig};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Endpoint, ServerConfig, TransportConfig, VarInt};
use tombolo_identity::authority::{Existing, RootAuthority};
use tombolo_identity::issuer::{KeyAndCsr, LEAF_LIFE, LeafIssuer};
use tombolo_identity::{BundleSet, ExpectedPeer, SpiffeId, Svid, SvidHandle, tls};
use tombolo_model::names::ClusterName;
use tombolo_overlay::congestion::{ModelController, ModelControllerFactory};
use tombolo_runtime::clock;

fn svid() -> SvidHandle {
    let dir = tempfile::tempdir().unwrap();
    let now = clock::since_unix_epoch();
    let mut root = RootAuthority::init(dir.path(), "acme.example".parse().unwrap(), now).unwrap();
    let name: ClusterName = "east".parse().unwrap();
    let issuer = LeafIssuer::new(root.sign_cluster(&name, Existing::Refuse, now).unwrap()).unwrap();
    let id = SpiffeId::workload(&issuer.material.trust_domain, &name, "shop", "web").unwrap();
    let key = KeyAndCsr::generate().unwrap();
    let leaf = issuer.issue(&key.csr_der, &id, LEAF_LIFE, now).unwrap();
    let bundles = BundleSet::of(issuer.material.bundle.clone());
    SvidHandle::new(Svid::new(&key.key_der, leaf.chain, bundles).unwrap())
}

fn transport(factory: Arc<dyn ControllerFactory + Send + Sync>) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config
        // The client's close may be lost.
        .max_idle_timeout(Some(VarInt::from_u32(3000).into()))
        .stream_receive_window(VarInt::from_u32(2_500_000))
        .send_window(8_000_000)
        .congestion_controller_factory(factory);
    Arc::new(config)
}

fn thread_runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// One direction of a link: rate, delay, a drop-tail buffer of one BDP, every n-th packet lost. Sends to `to`, or to where
/// the last packet of the other direction came from.
struct Wire {
    bytes_per_second: f64,
    delay: Duration,
    lose_every: u64,
}

impl Wire {
    fn carry(
        &self,
        from: &UdpSocket,
        out: &UdpSocket,
        to: impl Fn(SocketAddr) -> Option<SocketAddr>,
        end: &AtomicBool,
    ) {
        from.set_read_timeout(Some(Duration::from_micros(200))).unwrap();
        let mut queue: VecDeque<(Instant, SocketAddr, Vec<u8>)> = VecDeque::new();
        let mut buffer = [0; 2048];
        let (mut free_at, mut count) = (Instant::now(), 0u64);
        while !end.load(Relaxed) {
            if let Ok((len, source)) = from.recv_from(&mut buffer) {
                count += 1;
                let now = Instant::now();
                let full = free_at.saturating_duration_since(now) > 2 * self.delay;
                if let Some(target) = to(source).filter(|_| !full && !count.is_multiple_of(self.lose_every)) {
                    free_at = free_at.max(now) + Duration::from_secs_f64(len as f64 / self.bytes_per_second);
                    queue.push_back((free_at + self.delay, target, buffer[..len].to_vec()));
                }
            }
            while queue.front().is_some_and(|(at, ..)| *at <= Instant::now()) {
                let Some((_, target, packet)) = queue.pop_front() else { break };
                let _ = out.send_to(&packet, target);
            }
        }
    }
}

struct Outcome {
    megabits: f64,
    lost_share: f64,
    rtt: Duration,
    window: u64,
    took: Duration,
}

/// One stream for `time` from a client thread to a server thread, through `wire` when there is one.
fn bulk(factory: Arc<dyn ControllerFactory + Send + Sync>, wire: Option<&Wire>, time: Duration) -> Outcome {
    let svid = svid();
    let server_tls = QuicServerConfig::try_from(tls::mesh_server_config(&svid).unwrap()).unwrap();
    let mut server_config = ServerConfig::with_crypto(Arc::new(server_tls));
    server_config.transport_config(transport(factory.clone()));
    let end = AtomicBool::new(false);
    let (tell, learn) = std::sync::mpsc::channel();
    let near = UdpSocket::bind("127.0.0.1:0").unwrap();
    let far = UdpSocket::bind("127.0.0.1:0").unwrap();
    let client_seen = std::sync::Mutex::new(None);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            thread_runtime().block_on(async {
                let endpoint =
                    Endpoint::server(server_config, SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
                tell.send(endpoint.local_addr().unwrap()).unwrap();
                let connection = endpoint.accept().await.unwrap().await.unwrap();
                let mut stream = connection.accept_uni().await.unwrap();
                let begin = Instant::now();
                let (mut bytes, mut took) = (0u64, Duration::ZERO);
                while let Ok(Some(chunk)) = stream.read_chunk(usize::MAX, true).await {
                    bytes += chunk.bytes.len() as u64;
                    took = begin.elapsed();
                }
                (bytes, took)
            })
        });
        let mut target = learn.recv().unwrap();
        if let Some(wire) = wire {
            let server = target;
            target = near.local_addr().unwrap();
            let (near, far, end, seen) = (&near, &far, &end, &client_seen);
            scope.spawn(move || {
                let forward = |source| {
                    *seen.lock().unwrap() = Some(source);
                    Some(server)
                };
                wire.carry(near, far, forward, end);
            });
            scope.spawn(move || wire.carry(far, near, |_| *seen.lock().unwrap(), end));
        }
        let svid = &svid;
        let client = scope.spawn(move || {
            thread_runtime().block_on(async {
                let client_tls = tls::mesh_client_config(svid, ExpectedPeer::Any).unwrap();
                let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(client_tls).unwrap()));
                config.transport_config(transport(factory));
                let endpoint = Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
                let connection = endpoint.connect_with(config, target, "tombolo").unwrap().await.unwrap();
                let mut stream = connection.open_uni().await.unwrap();
                let data = vec![7u8; 256 * 1024];
                let write = async {
                    loop {
                        stream.write_all(&data).await.unwrap();
                    }
                };
                let _ = tokio::time::timeout(time, write).await;
                let stats = connection.stats().path;
                // What the overlay reads beside quinn is there, through quinn's clone of the controller.
                if let Ok(ours) = connection.congestion_state().into_any().downcast::<ModelController>() {
                    assert!(ours.state().last_ack().is_some_and(|at| at.elapsed() < Duration::from_secs(1)));
                    assert!(ours.state().bytes_in_flight() > 0);
                }
                connection.close(VarInt::from_u32(0), b"");
                endpoint.wait_idle().await;
                (stats.lost_packets as f64 / stats.sent_packets.max(1) as f64, stats.rtt, stats.cwnd)
            })
        });
        let (lost_share, rtt, window) = client.join().unwrap();
        let (bytes, took) = server.join().unwrap();
        end.store(true, Relaxed);
        Outcome { megabits: bytes as f64 * 8.0 / 1e6 / took.as_secs_f64(), lost_share, rtt, window, took }
    })
}

fn show(name: &str, outcome: &Outcome) {
    let Outcome { megabits, lost_share, rtt, window, took } = outcome;
    println!(
        "{name}: {megabits:.1} Mbit/s, lost {:.2} %, rtt {rtt:?}, window {window}, took {took:.1?}",
        lost_share * 100.0
    );
}

#[test]
fn one_percent_loss_on_a_wan_costs_little_where_cubic_collapses() {
    let wire = Wire { bytes_per_second: 100e6 / 8.0, delay: Duration::from_millis(25), lose_every: 100 };
    let ours = bulk(Arc::new(ModelControllerFactory::default()), Some(&wire), Duration::from_secs(5));
    let cubic = bulk(Arc::new(CubicConfig::default()), Some(&wire), Duration::from_secs(5));
    show("ours", &ours);
    show("cubic", &cubic);
    // Generous, because other tests and builds share the cores: figures are the benchmark's.
    assert!(ours.megabits > 15.0, "of 100 Mbit/s: {}", ours.megabits);
    assert!(ours.megabits > 2.0 * cubic.megabits, "cubic {}", cubic.megabits);
    assert!(ours.rtt < Duration::from_millis(250), "the queue stays short: {:?}", ours.rtt);
}

/// Both are bound by the CPU: the bound is wide because the machine's other load differs between the two runs.
#[test]
fn on_loopback_it_does_not_limit() {
    let ours = bulk(Arc::new(ModelControllerFactory::default()), None, Duration::from_secs(2));
    let cubic = bulk(Arc::new(CubicConfig::default()), None, Duration::from_secs(2));
    show("ours", &ours);
    show("cubic", &cubic);
    assert!(ours.megabits > 0.2 * cubic.megabits, "ours {} cubic {}", ours.megabits, cubic.megabits);
}
