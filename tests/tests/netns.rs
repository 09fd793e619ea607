//! Namespaces, processes inside them and the masquerading router: what the harness promises.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use tombolo_tests::capability::require_netns;
use tombolo_tests::netns::{Namespace, VethEnd, veth};
use tombolo_tests::process::ProcessSpec;
use tombolo_tests::{balancer, nat};

#[test]
fn a_dropped_namespace_is_gone_and_two_of_the_same_label_differ() -> Result<()> {
    let test = "a_dropped_namespace_is_gone_and_two_of_the_same_label_differ";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let (one, two) = (Namespace::create("same")?, Namespace::create("same")?);
    ensure!(one.name() != two.name());
    let path = format!("/run/netns/{}", one.name());
    ensure!(Path::new(&path).exists());
    drop(one);
    ensure!(!Path::new(&path).exists());
    ensure!(Namespace::create("no spaces").is_err());
    Ok(())
}

#[test]
fn what_a_dead_test_process_left_is_reaped() -> Result<()> {
    let test = "what_a_dead_test_process_left_is_reaped";
    let Some(_) = require_netns(test) else { return Ok(()) };
    // This process's own ID with another start time: a process that is gone.
    let stale = format!("tb-{}-1-0-stale", std::process::id());
    ensure!(std::process::Command::new("ip").args(["netns", "add", &stale]).status()?.success());
    let live = Namespace::create("live")?;
    tombolo_tests::netns::reap_stale();
    ensure!(!Path::new(&format!("/run/netns/{stale}")).exists());
    ensure!(Path::new(&format!("/run/netns/{}", live.name())).exists());
    Ok(())
}

#[test]
fn a_process_runs_inside_its_namespace_and_ends_with_its_value() -> Result<()> {
    let test = "a_process_runs_inside_its_namespace_and_ends_with_its_value";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let logs = tempfile::tempdir()?;
    let namespace = Namespace::create("proc")?;
    namespace.add_address("lo", "10.99.0.1/32")?;
    let script = "ip -o addr show lo; echo ready; sleep 100 & wait";
    let process =
        ProcessSpec::new("child", "sh").args(["-c", script]).within(&namespace).spawn(logs.path())?;
    process.wait_for_log("ready", Duration::from_secs(5))?;
    ensure!(process.log().contains("10.99.0.1"), "{}", process.log());
    ensure!(process.usage().is_some_and(|usage| usage.rss_bytes > 0));
    let members = tombolo_tests::usage::with_descendants(process.pid());
    ensure!(members.len() >= 2, "{members:?}");
    drop(process);
    for pid in members {
        ensure!(!Path::new(&format!("/proc/{pid}")).exists() || zombie(pid), "{pid} outlived its group");
    }
    Ok(())
}

fn zombie(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

#[test]
fn a_process_that_ignores_sigterm_or_is_stopped_is_killed_after_its_grace() -> Result<()> {
    let logs = tempfile::tempdir()?;
    let grace = Duration::from_millis(200);
    let spec = |name| {
        ProcessSpec::new(name, "sh").args(["-c", "trap '' TERM; echo ready; while :; do sleep 1; done"])
    };
    for (name, stopped) in [("ignores", false), ("stopped", true)] {
        let mut process = spec(name).stop_grace(grace).spawn(logs.path())?;
        process.wait_for_log("ready", Duration::from_secs(5))?;
        if stopped {
            process.signal(Signal::SIGSTOP)?;
        }
        ensure!(!process.stop()?.success());
        ensure!(process.has_exited() && process.usage().is_none());
    }
    let early = ProcessSpec::new("early", "sh").args(["-c", "echo gone"]).spawn(logs.path())?;
    let error = early.wait_for_log("never", Duration::from_secs(5)).err().map(|error| error.to_string());
    ensure!(error.as_deref().is_some_and(|text| text.contains("ended before")), "{error:?}");
    Ok(())
}

#[test]
fn a_masquerading_router_lets_answers_in_and_nothing_else() -> Result<()> {
    let test = "a_masquerading_router_lets_answers_in_and_nothing_else";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let (vm, router, internet) =
        (Namespace::create("vm")?, Namespace::create("router")?, Namespace::create("net")?);
    let end = |namespace, device, address| VethEnd { namespace, device, address };
    veth(end(&vm, "eth0", "192.168.7.2/24"), end(&router, "lan", "192.168.7.1/24"), 1500)?;
    veth(end(&router, "wan", "203.0.113.1/24"), end(&internet, "eth0", "203.0.113.9/24"), 1500)?;
    vm.add_route("default", IpAddr::V4(Ipv4Addr::new(192, 168, 7, 1)))?;
    // Even a host that knows the way to the inside must not get there.
    internet.add_route("192.168.7.0/24", IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)))?;
    nat::masquerade(&router, "lan", "wan")?;

    let bind = |namespace: &Namespace, address: &str| -> Result<UdpSocket> {
        let socket = namespace.run(|| UdpSocket::bind(address))??;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        Ok(socket)
    };
    let server = bind(&internet, "203.0.113.9:7000")?;
    let client = bind(&vm, "192.168.7.2:5000")?;
    let mut buffer = [0; 64];

    // Not asked for: dropped at the router, by its own address and by the inside one.
    for target in ["203.0.113.1:5000", "192.168.7.2:5000"] {
        server.send_to(b"unasked", target)?;
    }
    ensure!(client.recv(&mut buffer).is_err(), "an unasked packet came through");

    client.send_to(b"ask", "203.0.113.9:7000")?;
    let (length, seen_as) = server.recv_from(&mut buffer)?;
    ensure!(&buffer[..length] == b"ask");
    ensure!(seen_as.ip() == "203.0.113.1".parse::<IpAddr>()?, "not masqueraded: {seen_as}");
    server.send_to(b"answer", seen_as)?;
    let (length, from) = client.recv_from(&mut buffer)?;
    ensure!(&buffer[..length] == b"answer" && from == "203.0.113.9:7000".parse::<SocketAddr>()?);

    // Another host or port is not the flow that was begun.
    let other = bind(&internet, "203.0.113.9:7001")?;
    other.send_to(b"unasked", seen_as)?;
    ensure!(client.recv(&mut buffer).is_err(), "a stranger came through the mapping");
    Ok(())
}

#[test]
fn an_in_process_role_runs_inside_a_namespace() -> Result<()> {
    let test = "an_in_process_role_runs_inside_a_namespace";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let namespace = Namespace::create("role")?;
    namespace.add_address("lo", "10.98.0.1/32")?;
    let bound =
        namespace.block_on(|| async { tokio::net::TcpListener::bind("10.98.0.1:0").await.is_ok() })?;
    ensure!(bound);
    let runtime = namespace.runtime(2)?;
    let task = runtime.spawn(async { tokio::net::UdpSocket::bind("10.98.0.1:0").await.is_ok() });
    ensure!(
        std::thread::scope(|scope| scope.spawn(|| futures::executor::block_on(task)).join())
            .is_ok_and(|r| r.is_ok_and(|ok| ok))
    );
    ensure!(UdpSocket::bind("10.98.0.1:0").is_err(), "the address leaked out of its namespace");
    runtime.shutdown_background();
    Ok(())
}

#[test]
fn a_sticky_balancer_keeps_each_5_tuple_on_one_backend_and_uses_them_all() -> Result<()> {
    let test = "a_sticky_balancer_keeps_each_5_tuple_on_one_backend_and_uses_them_all";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let (client, router, cluster) =
        (Namespace::create("cl")?, Namespace::create("lb")?, Namespace::create("gw")?);
    let end = |namespace, device, address| VethEnd { namespace, device, address };
    veth(end(&client, "eth0", "198.51.100.2/24"), end(&router, "wan", "198.51.100.1/24"), 1500)?;
    veth(end(&router, "lan", "10.50.0.1/24"), end(&cluster, "eth0", "10.50.0.11/24"), 1500)?;
    cluster.add_address("eth0", "10.50.0.12/24")?;
    cluster.add_route("default", IpAddr::V4(Ipv4Addr::new(10, 50, 0, 1)))?;
    client.add_route("default", IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)))?;
    let front: SocketAddrV4 = "203.0.113.50:7443".parse()?;
    let backends = [Ipv4Addr::new(10, 50, 0, 11), Ipv4Addr::new(10, 50, 0, 12)];
    balancer::sticky(&router, front, &backends)?;

    let bind = |namespace: &Namespace, address: SocketAddr| -> Result<UdpSocket> {
        let socket = namespace.run(|| UdpSocket::bind(address))??;
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
        Ok(socket)
    };
    let gateways = backends
        .iter()
        .map(|address| bind(&cluster, SocketAddr::from((*address, front.port()))))
        .collect::<Result<Vec<_>>>()?;
    // Each gateway answers with its own number.
    for (n, gateway) in gateways.iter().enumerate() {
        let gateway = gateway.try_clone()?;
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            let mut quiet = 0;
            // Twenty quiet read timeouts are 6 s, longer than the test.
            while quiet < 20 {
                match gateway.recv_from(&mut buffer) {
                    Ok((_, from)) => drop(gateway.send_to(&[n as u8], from)),
                    Err(_) => quiet += 1,
                }
            }
        });
    }
    let mut used = [0; 2];
    for port in 30000..30032 {
        let socket = bind(&client, SocketAddr::from(([198, 51, 100, 2], port)))?;
        let mut seen = Vec::new();
        for _ in 0..3 {
            socket.send_to(b"hello", front)?;
            let mut answer = [0; 8];
            let (length, from) = socket.recv_from(&mut answer)?;
            ensure!(length == 1 && from == SocketAddr::V4(front), "{length} bytes from {from}");
            seen.push(answer[0]);
        }
        ensure!(seen.iter().all(|backend| *backend == seen[0]), "port {port} wandered: {seen:?}");
        used[usize::from(seen[0])] += 1;
    }
    ensure!(used.iter().all(|flows| *flows > 4), "{used:?}");
    Ok(())
}
