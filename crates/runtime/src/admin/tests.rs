//! The endpoint over real sockets.

use std::net::SocketAddr;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Admin, AdminError};
use crate::drain;
use crate::readiness::Readiness;
use crate::tasks::TaskGroup;

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

async fn fetch(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn metrics_readiness_and_drain_are_shown() {
    let mut registry = Registry::default();
    let packets = Counter::<u64>::default();
    registry.register("tombolo_gateway_packets", "Packets forwarded", packets.clone());
    packets.inc_by(7);
    let readiness = Readiness::new();
    let blocked = readiness.block("configuration");
    let (trigger, watcher) = drain::channel();
    let admin = Admin::bind(ANY, registry, readiness).await.unwrap();
    let address = admin.local_addr();
    let tasks = TaskGroup::new();
    tasks.spawn("admin", admin.run(watcher));

    let metrics = fetch(address, "/metrics").await;
    assert!(
        metrics.contains("tombolo_gateway_packets_total 7") && metrics.contains("openmetrics-text"),
        "{metrics}"
    );
    let red = fetch(address, "/ready").await;
    assert!(red.starts_with("HTTP/1.1 503") && red.contains(r#""blockedBy":["configuration"]"#), "{red}");
    drop(blocked);
    let green = fetch(address, "/ready").await;
    assert!(green.starts_with("HTTP/1.1 200") && green.contains(r#""ready":true"#), "{green}");
    trigger.start();
    trigger.drained().await;
    let draining = fetch(address, "/ready").await;
    assert!(draining.starts_with("HTTP/1.1 503") && draining.contains("draining"), "{draining}");
    assert!(fetch(address, "/live").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_taken_port_fails_at_start_with_a_remedy() {
    let first = Admin::bind(ANY, Registry::default(), Readiness::new()).await.unwrap();
    let second = Admin::bind(first.local_addr(), Registry::default(), Readiness::new()).await;
    let error = second.err().unwrap();
    assert!(matches!(error, AdminError::Bind { .. }) && error.to_string().contains("--admin"), "{error}");
}
