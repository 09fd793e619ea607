//! The rules of `tombolo sidecar capture`, without a mesh: they come and go whole, leave other tools' rules and open
//! connections alone, and cut nobody off while no sidecar listens.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use socket2::{Domain, Socket, Type};
use tombolo_tests::capability::{require_netns, require_programs};
use tombolo_tests::captured::{
    Greeter, HERE, HERE6, THERE, THERE6, Talk, at, capture, counter, greeted, neighbour, other_tools,
    ruleset, run,
};
use tombolo_tests::mesh::binary;
use tombolo_tests::netns::Namespace;

/// Everything that rules can be made of.
const EVERYTHING: &[&str] = &[
    "apply",
    "--outbound",
    "all",
    "--virtual-range",
    "241.64.0.0/16,fd00:1::/64",
    "--address",
    "10.98.0.2:5432,[fd98::2]:5432",
    "--exclude-uid",
    "nobody",
    "--exclude-gid",
    "65534",
    "--exclude-port",
    "22",
    "--exclude-cidr",
    "10.1.0.0/16,fd01::/32",
    "--exclude-interface",
    "wg0",
    "--inbound",
    "permissive",
    "--inbound-port",
    "8080",
    "--inbound-allow",
    "10.98.0.0/24=9100",
];

fn routes(namespace: &Namespace) -> Result<String> {
    let routes =
        ["-4", "-6"].map(|family| run(namespace, "ip", &[family, "-N", "route", "show", "proto", "116"], ""));
    let [v4, v6] = routes;
    Ok(v4?.ok()? + &v6?.ok()?)
}

#[test]
fn rules_come_and_go_whole_beside_those_of_docker_and_kube_proxy() -> Result<()> {
    let test = "rules_come_and_go_whole_beside_those_of_docker_and_kube_proxy";
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &["iptables-nft"])) else {
        return Ok(());
    };
    let machine = Namespace::create("machine")?;
    let _neighbour = neighbour(&machine)?;
    other_tools(&machine)?;
    let before = ruleset(&machine)?;

    let dry = capture(&machine, &[EVERYTHING, &["--dry-run"]].concat())?.ok()?;
    ensure!(dry.contains("delete table inet tombolo_capture") && dry.contains("redirect to :7447"), "{dry}");
    ensure!(ruleset(&machine)? == before, "a dry run changed something");

    ensure!(capture(&machine, &["show"])?.code == 3, "nothing is there yet");
    capture(&machine, EVERYTHING)?.ok()?;
    let applied = ruleset(&machine)?;
    let ours = run(&machine, "nft", &["list", "table", "inet", "tombolo_capture"], "")?.ok()?;
    ensure!(applied.replace(&ours, "") == before, "other tools' rules are not as they were: {applied}");
    capture(&machine, EVERYTHING)?.ok()?;
    ensure!(ruleset(&machine)? == applied, "applied twice is not applied once");
    let routed = routes(&machine)?;
    ensure!(routed.lines().count() == 2, "one route for each virtual range: {routed}");
    let shown = capture(&machine, &["show"])?.ok()?;
    println!("{shown}");

    // Half-removed, in each way that somebody might.
    for harm in [
        "flush chain inet tombolo_capture output",
        "flush set inet tombolo_capture taken4",
        "flush chain inet tombolo_capture input; delete chain inet tombolo_capture input",
        "flush table inet tombolo_capture",
    ] {
        machine.nft(harm)?;
        let shown = capture(&machine, &["show"])?;
        ensure!(shown.code == 3 && shown.out.contains("damaged"), "{harm}: {shown:?}");
        capture(&machine, EVERYTHING)?.ok()?;
        ensure!(ruleset(&machine)? == applied, "{harm}: not repaired");
    }
    machine.nft("flush table inet tombolo_capture")?;
    ensure!(capture(&machine, &["remove"])?.ok()?.contains("removed"));
    ensure!(ruleset(&machine)? == before, "what is left after the removal: {}", ruleset(&machine)?);
    ensure!(routes(&machine)?.is_empty(), "{}", routes(&machine)?);
    ensure!(capture(&machine, &["remove"])?.ok()?.contains("nothing was there"));

    // Other settings take the place of the first ones, routes too.
    capture(&machine, &["apply", "--virtual-range", "241.65.0.0/16"])?.ok()?;
    capture(&machine, &["apply", "--virtual-range", "241.66.0.0/16", "--away", "refuse"])?.ok()?;
    let (other, routed) = (ruleset(&machine)?, routes(&machine)?);
    ensure!(other.contains("241.66.0.0/16") && !other.contains("241.65.0.0/16"), "{other}");
    ensure!(routed.contains("241.66.0.0/16") && routed.lines().count() == 1, "{routed}");
    capture(&machine, &["remove"])?.ok()?;
    ensure!(ruleset(&machine)? == before, "what is left after the removal");
    Ok(())
}

#[test]
fn what_stands_in_the_way_is_named_and_nothing_is_changed() -> Result<()> {
    let test = "what_stands_in_the_way_is_named_and_nothing_is_changed";
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &["setpriv", "env"])) else {
        return Ok(());
    };
    let machine = Namespace::create("machine")?;
    machine.nft("table ip mine {\nchain c { type filter hook input priority 0; }\n}")?;
    let before = ruleset(&machine)?;
    let bin = binary()?.display().to_string();
    // Where others may run it.
    let dir = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .tempdir()?;
    let copy = dir.path().join("tombolo");
    std::fs::copy(&bin, &copy)?;
    let copy = copy.display().to_string();
    let apply = |program: &str, args: &[&str]| {
        run(&machine, program, &[args, &["sidecar", "capture", "apply"]].concat(), "")
    };
    let cases = [
        (
            "no nft",
            apply("env", &["PATH=/nonexistent", &bin])?,
            1,
            ["no nft in PATH", "apt install nftables"],
        ),
        (
            "no ip",
            {
                let nft = tombolo_tests::capability::find_program("nft").unwrap_or_default();
                let nft = format!("TOMBOLO_NFT={}", nft.display());
                apply("env", &["PATH=/nonexistent", &nft, &bin])?
            },
            1,
            ["no ip in PATH", "apt install iproute2"],
        ),
        (
            "no privilege",
            apply("setpriv", &["--reuid=65534", "--regid=65534", "--clear-groups", &copy])?,
            1,
            ["not permitted", "run it as root"],
        ),
    ];
    for (case, ended, code, texts) in cases {
        println!("{case}: {}", ended.err.trim());
        ensure!(ended.code == code && texts.iter().all(|text| ended.err.contains(text)), "{case}: {ended:?}");
    }
    let wrong = capture(&machine, &["apply", "--address", "db.local:5432"])?;
    ensure!(wrong.code == 2 && wrong.err.contains("--address \"db.local:5432\""), "{wrong:?}");
    ensure!(ruleset(&machine)? == before, "something was changed");
    ensure!(routes(&machine)?.is_empty());
    Ok(())
}

/// A machine with applications on both sides, everything open that is to survive.
struct Site {
    machine: Namespace,
    there: Namespace,
    _greeters: Vec<Greeter>,
}

impl Site {
    fn start() -> Result<Self> {
        let machine = Namespace::create("machine")?;
        let there = neighbour(&machine)?;
        let mut greeters = Vec::new();
        for (address, ports) in [(THERE, [80, 5432, 7000]), (THERE6, [80, 5432, 7000])] {
            for port in ports {
                greeters.push(Greeter::start(&there, at(address, port)?, "neighbour")?);
            }
        }
        for address in [HERE, HERE6] {
            greeters.push(Greeter::start(&machine, at(address, 8080)?, "application")?);
        }
        Ok(Self { machine, there, _greeters: greeters })
    }
}

#[test]
fn open_connections_and_other_tools_translations_go_on_under_rules_that_come_change_and_go() -> Result<()> {
    let test = "open_connections_and_other_tools_translations_go_on_under_rules_that_come_change_and_go";
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &["iptables-nft"])) else {
        return Ok(());
    };
    let site = Site::start()?;
    let (machine, there) = (&site.machine, &site.there);
    // Before there is any rule, so that the kernel does not even track them.
    let limit = Duration::from_secs(3);
    let mut open = vec![
        Talk::open(machine, at(THERE, 5432)?, limit)?,
        Talk::open(machine, at(THERE6, 5432)?, limit)?,
        Talk::open(there, at(HERE, 8080)?, limit)?,
        Talk::open(there, at(HERE6, 8080)?, limit)?,
    ];
    let mut all_go_on = |when: &str| -> Result<()> {
        for talk in &mut open {
            talk.say("still here").map_err(|e| e.context(format!("{when}: {:?}", talk.peer())))?;
        }
        Ok(())
    };
    other_tools(machine)?;
    let translated = ["10.96.0.10", "10.96.0.11"].map(|address| at(address, 80));
    let translated: Vec<_> = translated.into_iter().chain([at(HERE, 8081)]).collect::<Result<_>>()?;
    let tools_work = |when: &str| -> Result<()> {
        for address in &translated {
            let who = greeted(machine, *address).0.map_err(|e| e.context(format!("{when}: {address}")))?;
            ensure!(who == "neighbour", "{when}: {address} is {who}");
        }
        Ok(())
    };
    tools_work("before")?;
    let both = ["--address", "10.98.0.2:5432,[fd98::2]:5432", "--inbound-port", "8080", "--grace", "0s"];
    let strict = [&["apply", "--inbound", "strict"], &both[..]].concat();
    let permissive = [&["apply", "--inbound", "permissive", "--outbound", "all"], &both[..]].concat();
    for (name, rules) in [("strict", &strict), ("all", &permissive), ("strict again", &strict)] {
        capture(machine, rules)?.ok()?;
        all_go_on(name)?;
        // With `all` and nobody that listens, the first of each family is refused, and the others go past.
        for address in [THERE, THERE6] {
            let _ = greeted(machine, at(address, 7000)?);
        }
        tools_work(name)?;
        ensure!(
            greeted(machine, at(THERE, 7000)?).0? == "neighbour",
            "what is not ours goes where it was going"
        );
    }
    // What is ours comes before what kube-proxy would do with it: refused, since nobody listens and we say so.
    capture(machine, &["apply", "--address", "10.96.0.10:80", "--away", "refuse", "--grace", "0s"])?.ok()?;
    ensure!(greeted(machine, at("10.96.0.10", 80)?).0.is_err(), "kube-proxy came first");
    ensure!(greeted(machine, at("10.96.0.11", 80)?).0? == "neighbour");
    capture(machine, &["remove"])?.ok()?;
    all_go_on("removed")?;
    tools_work("removed")
}

#[test]
fn while_no_sidecar_listens_connections_wait_then_go_past_it_and_are_captured_as_soon_as_one_does()
-> Result<()> {
    let test =
        "while_no_sidecar_listens_connections_wait_then_go_past_it_and_are_captured_as_soon_as_one_does";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let site = Site::start()?;
    let machine = &site.machine;
    let rules = ["apply", "--virtual-range", "241.64.0.0/16,fd00:1::/64", "--grace", "4s"];
    capture(machine, &[&rules[..], &["--address", "10.98.0.2:5432,[fd98::2]:5432"]].concat())?.ok()?;
    let families = [("127.0.0.1", THERE, "241.64.0.9"), ("::1", THERE6, "fd00:1::9")];
    for (loopback, taken, unrouted) in families {
        let (taken, unrouted) = (at(taken, 5432)?, at(unrouted, 80)?);
        let sidecar = at(loopback, 7447)?;
        let listening = Greeter::start(machine, sidecar, "sidecar")?;
        for address in [taken, unrouted] {
            ensure!(greeted(machine, address).0? == "sidecar", "{address} was not captured");
        }
        // Gone, and back within the grace time: whoever connects meanwhile waits.
        drop(listening);
        let (waited, took) = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| greeted(machine, unrouted));
            std::thread::sleep(Duration::from_millis(1500));
            let listening = Greeter::start(machine, sidecar, "sidecar again");
            let answer = waiting.join().map_err(|_| anyhow::anyhow!("it panicked"));
            drop(listening?);
            answer
        })?;
        println!("{loopback}: a restart of 1.5 s made a connection wait {took:?}");
        ensure!(waited? == "sidecar again" && took < Duration::from_secs(5), "{took:?}");
        // Gone for longer: refused, and then past it.
        let (refused, took) = greeted(machine, taken);
        ensure!(refused.is_err() && took < Duration::from_secs(9), "{refused:?} after {took:?}");
        for _ in 0..3 {
            let (who, took) = greeted(machine, taken);
            ensure!(who? == "neighbour" && took < Duration::from_secs(1), "not let past: {took:?}");
        }
        let (refused, took) = greeted(machine, unrouted);
        ensure!(refused.is_err() && took < Duration::from_secs(1), "there is nowhere to let it: {took:?}");
        // Back: it says so itself, by a connection to itself.
        let _listening = Greeter::start(machine, sidecar, "sidecar")?;
        machine.run(|| std::net::TcpStream::connect(sidecar))??;
        ensure!(greeted(machine, taken).0? == "sidecar", "not captured again");
    }
    ensure!(counter(machine, "past")? == 6 && counter(machine, "waiting")? > 1);
    capture(machine, &["remove"])?.ok().map(drop)
}

/// One line to each who connects, and an end before the caller's: the kernel remembers the connection here.
fn hangs_up_first(machine: &Namespace, address: std::net::SocketAddr, callers: usize) -> Result<()> {
    let listener = machine.run(|| std::net::TcpListener::bind(address))??;
    std::thread::spawn(move || -> std::io::Result<()> {
        for stream in listener.incoming().take(callers) {
            let mut stream = stream?;
            stream.write_all(b"sidecar\n")?;
            stream.shutdown(std::net::Shutdown::Write)?;
            let _ = stream.read_to_end(&mut Vec::new())?;
        }
        Ok(())
    });
    Ok(())
}

#[test]
fn callers_whose_port_is_remembered_from_a_connection_before_are_captured_as_ever() -> Result<()> {
    let test = "callers_whose_port_is_remembered_from_a_connection_before_are_captured_as_ever";
    let Some(_) = require_netns(test) else { return Ok(()) };
    const AGAIN: usize = 5;
    let site = Site::start()?;
    let machine = &site.machine;
    capture(machine, &["apply", "--address", "10.98.0.2:5432,[fd98::2]:5432", "--grace", "4s"])?.ok()?;
    for (loopback, here, taken) in [("127.0.0.1", HERE, THERE), ("::1", HERE6, THERE6)] {
        let (from, taken) = (at(here, 40_000)?, at(taken, 5432)?);
        hangs_up_first(machine, at(loopback, 7447)?, AGAIN)?;
        for turn in 0..AGAIN {
            let begun = std::time::Instant::now();
            let socket = machine.run(|| -> std::io::Result<Socket> {
                let socket = Socket::new(Domain::for_address(taken), Type::STREAM, None)?;
                socket.set_reuse_address(true)?;
                socket.bind(&from.into())?;
                socket.connect_timeout(&taken.into(), Duration::from_secs(10))?;
                Ok(socket)
            })?;
            let (mut who, mut stream) =
                (String::new(), std::net::TcpStream::from(socket.with_context(|| format!("turn {turn}"))?));
            stream.read_to_string(&mut who)?;
            let took = begun.elapsed();
            ensure!(
                who == "sidecar\n" && took < Duration::from_millis(900),
                "turn {turn}: {who} after {took:?}"
            );
        }
    }
    ensure!(counter(machine, "waiting")? == 0 && counter(machine, "past")? == 0);
    Ok(())
}
