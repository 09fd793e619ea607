//! Services of another cluster at the virtual addresses that the federator gave them, called by programs that know nothing
//! of it, through a sidecar that was told of no service.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tombolo_tests::capability::{find_program, require_netns, require_programs};
use tombolo_tests::captured::{capture, counter, curl, refused, run};
use tombolo_tests::link::Shape;
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::process::ProcessSpec;
use tombolo_tests::scenario::{application, export, flag, metric};

const CLIENT: u8 = 21;
const V6: &str = "fd00:241::/64";
const FIRST_ANSWER: Duration = Duration::from_secs(15);

/// West serves `shop/web` and `shop/redis`; east has a sidecar that knows neither.
fn start() -> Result<Mesh> {
    let shape = Shape { delay: Duration::from_millis(2), ..Shape::PERFECT };
    let mut mesh = Mesh::start(&Layout { gateways: 1, shape, ..Layout::default() })?;
    mesh.federator_with("east", &["--virtual-range", V6])?;
    let west = mesh.cluster("west")?;
    let (app, redis) = (west.address(21, 8080), west.address(21, 6379));
    application(&mut mesh, "west", "app", app, "west")?;
    let listen = redis.ip().to_string();
    let server = ProcessSpec::new("redis", find_program("redis-server").context("redis-server")?)
        .args(["--bind", &listen, "--port", "6379", "--save", "", "--appendonly", "no"])
        .args(["--protected-mode", "no"])
        .current_dir("/")
        .as_user("nobody")?
        .within(&mesh.cluster("west")?.namespace);
    mesh.spawn("west/redis-server", server)?;
    let serves = [flag("--service", "web", 80, app), flag("--service", "redis", 6379, redis)].concat();
    mesh.sidecar("west", "server", &serves)?;
    mesh.apply("west", &(export("web") + &export("redis")))?;
    let flags = ["--capture-listen", "127.0.0.1:7447,[::1]:7447", "--virtual-range", V6];
    mesh.sidecar("east", "client", &flags.map(str::to_owned))?;
    Ok(mesh)
}

/// What the import says: IPv4 first.
fn addresses(mesh: &Mesh, service: &str) -> Result<Vec<IpAddr>> {
    let text = mesh.operate("east", &["get", "serviceimports", service, "-n", "shop", "-o", "json"])?;
    let object: Value = serde_json::from_str(&text)?;
    let object = object.get("items").and_then(|items| items.get(0)).unwrap_or(&object);
    let ips = object["spec"]["ips"].as_array().map(Vec::as_slice).unwrap_or_default();
    let parsed: Vec<IpAddr> = ips.iter().filter_map(|ip| ip.as_str()?.parse().ok()).collect();
    ensure!(parsed.len() == 2 && parsed[0].is_ipv4() && parsed[1].is_ipv6(), "{object}");
    Ok(parsed)
}

fn answers(mesh: &Mesh, address: SocketAddr) -> Result<()> {
    mesh.eventually(&format!("{address} answers"), FIRST_ANSWER, |mesh| {
        let answer = curl(&mesh.cluster("east")?.namespace, address, 3)?;
        ensure!(answer.contains("west"), "{answer}");
        Ok(())
    })?;
    Ok(())
}

#[test]
fn programs_reach_another_clusters_services_at_virtual_addresses_that_nobody_configured() -> Result<()> {
    let test = "programs_reach_another_clusters_services_at_virtual_addresses_that_nobody_configured";
    let programs = ["curl", "redis-server", "redis-cli", "setpriv"];
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &programs)) else { return Ok(()) };
    let mut mesh = start()?;
    let mut web = Vec::new();
    mesh.eventually("the imports have addresses", FIRST_ANSWER, |mesh| {
        addresses(mesh, "web").and_then(|_| addresses(mesh, "redis")).map(drop)
    })?;
    web.extend(addresses(&mesh, "web")?.into_iter().map(|ip| SocketAddr::new(ip, 80)));
    let redis = addresses(&mesh, "redis")?;
    println!("shop/web is {web:?}, shop/redis {redis:?}");
    // Nobody has a route there, and nothing leaves the machine.
    for address in &web {
        ensure!(curl(&mesh.cluster("east")?.namespace, *address, 2).is_err(), "{address} without rules");
    }
    capture(&mesh.cluster("east")?.namespace, &["apply", "--virtual-range", V6])?.ok()?;
    for address in &web {
        answers(&mesh, *address)?;
    }
    let east = &mesh.cluster("east")?.namespace;
    for address in &redis {
        let host = address.to_string();
        let pong = run(east, "redis-cli", &["-h", &host, "ping"], "")?.ok()?;
        ensure!(pong.trim() == "PONG", "{pong}");
    }
    // A port that the service does not have is refused, not left hanging.
    let other = SocketAddr::new(web[0].ip(), 81);
    refused(east, other)?;
    ensure!(counter(east, "virtual")? >= 5 && counter(east, "taken")? == 0);

    // A restart without a federator: what was called before is known still.
    mesh.process_mut("east/federator")?.kill()?;
    mesh.process_mut("east/client")?.stop()?;
    mesh.restart("east/client")?;
    mesh.ready("east", CLIENT, "client")?;
    for address in &web {
        answers(&mesh, *address)?;
    }
    // What the operator sees.
    let metrics = mesh.metrics("east", CLIENT)?;
    let carried = metric(&metrics, "tombolo_sidecar_captured_total", &["result=\"service\""]);
    ensure!(carried >= 2.0, "{metrics}");
    mesh.restart("east/federator")?;
    mesh.eventually("the operator sees what is called", FIRST_ANSWER, |mesh| {
        let status = mesh.status("east")?.to_string();
        ensure!(status.contains("shop/web"), "{status}");
        Ok(())
    })?;
    Ok(())
}
