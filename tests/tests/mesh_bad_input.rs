//! What people and machines get wrong: tokens, names, manifests, ports, clocks. Each gets a clear error, and nobody else
//! is disturbed.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::capability::require_netns;
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::scenario::{World, entry, export, flag, metric};

/// One cluster with nothing but its federator.
const ALONE: Layout<'static> = Layout {
    clusters: &["east"],
    gateways: 0,
    shape: tombolo_tests::link::Shape::PERFECT,
    balanced: None,
    clock_off: None,
    foreign: None,
    threads: 1,
};
const FEDERATOR: u8 = 1;
/// Tokens end at a whole second: one of 1 s is over for certain after this.
const ONE_SECOND_IS_OVER: Duration = Duration::from_millis(2100);
/// A refusal takes no longer: the joiner's dials end after 3 s each, five at most.
const REFUSED: Duration = Duration::from_secs(20);

/// What a command that must fail says.
fn refusal(result: Result<String>, what: &str) -> Result<String> {
    match result {
        Ok(output) => anyhow::bail!("{what} was accepted: {output}"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

fn rss(mesh: &Mesh, name: &str) -> Result<u64> {
    Ok(mesh.process(name)?.usage().context("has ended")?.rss_bytes)
}

#[test]
fn wrong_manifests_are_refused_with_field_and_value_and_change_nothing() -> Result<()> {
    let test = "wrong_manifests_are_refused_with_field_and_value_and_change_nothing";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mesh = Mesh::start(&ALONE)?;
    let good = export("web");
    let policy = tombolo_tests::scenario::west_first("web");
    let cases = [
        (
            "an unknown kind",
            good.replace("ServiceExport", "ServiceExprot"),
            &["ServiceExprot", "ServiceExport"][..],
        ),
        ("an unknown field", good.replace("namespace: shop", "namespace: shop, colour: red"), &["colour"]),
        (
            "an unknown group",
            good.replace("multicluster.x-k8s.io/v1beta1", "example.org/v1"),
            &["example.org/v1"],
        ),
        ("a wrong type", policy.replace("50%", "[ 50 ]"), &["whenHealthyBelow"]),
        ("an impossible share", policy.replace("50%", "150%"), &["whenHealthyBelow", "150%"]),
        ("a unit that is none", policy.replace("500ms", "5 parsecs"), &["for", "5 parsecs"]),
        ("an unknown field inside", policy.replace("for: 2s", "for: 2s, speed: 9"), &["speed"]),
        ("no name", good.replace("name: web, ", ""), &["name"]),
        ("a name that is none", good.replace("name: web", "name: We_b"), &["We_b"]),
        ("no YAML", "---\nkind: [".to_owned(), &[]),
        ("nothing", "---\n".to_owned(), &["no objects"]),
    ];
    for (what, yaml, needles) in &cases {
        // A good object before the bad one: a wrong file changes nothing at all.
        let before = if *what == "nothing" { String::new() } else { export("before") };
        let error = refusal(mesh.apply("east", &(before + yaml)), what)?;
        println!("{what}: {}", error.trim().lines().next().unwrap_or_default());
        for needle in *needles {
            ensure!(error.contains(needle), "{what}: the error does not name {needle}: {error}");
        }
    }
    let large = mesh.path("large.yaml");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&large)?);
    for n in 0..900_000 {
        write!(file, "{}", export(&format!("service-{n}")))?;
    }
    file.flush()?;
    drop(file);
    let bytes = std::fs::metadata(&large)?.len();
    ensure!(bytes >= 90_000_000, "{bytes}");
    let before = rss(&mesh, "east/federator")?;
    let begun = Instant::now();
    let error = refusal(mesh.operate("east", &["apply", "-f", &large.display().to_string()]), "100 MB")?;
    println!("{bytes} bytes refused after {:?}: {}", begun.elapsed(), error.trim());
    ensure!(begun.elapsed() < Duration::from_secs(2), "{error}");
    let grown = rss(&mesh, "east/federator")?.saturating_sub(before);
    ensure!(grown < 5_000_000, "the federator grew by {grown} bytes");
    // What the operator sees: no object, and a federator that goes on.
    ensure!(mesh.operate("east", &["get", "serviceexports", "-A", "-o", "name"])?.trim().is_empty());
    mesh.apply("east", &good)?;
    mesh.eventually("the metrics count one object", Duration::from_secs(5), |mesh| {
        let metrics = mesh.metrics("east", FEDERATOR)?;
        ensure!(metric(&metrics, "tombolo_federator_objects", &[]) == 1.0, "{metrics}");
        Ok(())
    })?;
    Ok(())
}

/// Starts a sidecar of east that must not get in, and says why not.
fn turned_away(mesh: &mut Mesh, name: &str, token: &str, host: u8) -> Result<String> {
    let (file, state) = (mesh.path(&format!("{name}.bad-token")), mesh.state("east", name));
    std::fs::write(&file, token)?;
    let overlay = mesh.cluster("east")?.address(host, 7442).to_string();
    let admin = mesh.cluster("east")?.address(host, 7445).to_string();
    let (file, state) = (file.display().to_string(), state.display().to_string());
    let args = ["sidecar", "--name", name, "--join-token-file", &file, "--state-dir", &state];
    let upstream = format!("shop/web:80={}", mesh.cluster("east")?.address(host, 9080));
    let more = ["--bind", &overlay, "--announce", &overlay, "--admin", &admin, "--upstream", &upstream];
    let args = [&args[..], &more].concat();
    let spec = mesh.spec("east", &format!("{name}-turned-away"), &args)?;
    refusal(spec.run(&mesh.logs()?, REFUSED), name)
}

/// The token with one character of its secret part changed.
fn tampered(token: &str) -> String {
    let mut text: Vec<char> = token.trim().chars().collect();
    let at = text.len() / 2;
    if let Some(c) = text.get_mut(at) {
        *c = if *c == 'A' { 'B' } else { 'A' };
    }
    text.into_iter().collect()
}

#[test]
fn a_join_token_that_is_wrong_used_expired_or_for_another_is_refused() -> Result<()> {
    let test = "a_join_token_that_is_wrong_used_expired_or_for_another_is_refused";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut mesh = Mesh::start(&ALONE)?;
    let create = |mesh: &Mesh, name: &str, ttl: &str| {
        mesh.operate(
            "east",
            &["token", "create", "--role", "sidecar", "--name", name, "-n", "shop", "--ttl", ttl],
        )
    };
    let upstream = flag("--upstream", "web", 80, mesh.cluster("east")?.address(21, 9080));
    mesh.sidecar("east", "good", &upstream)?;
    let used = std::fs::read_to_string(mesh.path("east/good.token"))?;
    let link = mesh.operate("east", &["link", "token", "west"]).unwrap_or_default();
    let expiring = create(&mesh, "late", "1s")?;
    let cases = [
        ("garbage", "garbage", "not-a-token".to_owned(), "token"),
        ("tampered", "tampered", tampered(&create(&mesh, "tampered", "5m")?), "token"),
        ("used", "good", used, "used already"),
        ("for another name", "other", create(&mesh, "somebody", "5m")?, "somebody"),
        ("expired", "late", expiring, "expired"),
        ("a link token", "linker", link, "token"),
    ];
    let mut hosts = 30..;
    for (what, name, token, needle) in cases {
        if what == "expired" {
            std::thread::sleep(ONE_SECOND_IS_OVER);
        }
        // `used` is tried from another state directory, as by somebody who found the token.
        let state = mesh.state("east", name);
        let hidden = state.with_extension("hidden");
        let moved = what == "used" && std::fs::rename(&state, &hidden).is_ok();
        let reason = turned_away(&mut mesh, name, &token, hosts.next().context("hosts")?);
        if moved {
            let _ = std::fs::remove_dir_all(&state);
            std::fs::rename(&hidden, &state)?;
        }
        let reason = reason?;
        println!("{what}: {}", reason.trim().lines().last().unwrap_or_default());
        ensure!(reason.contains(needle), "{what}: the refusal does not say {needle:?}: {reason}");
    }
    // What the operator sees: one member joined, the others are counted as denied.
    let metrics = mesh.metrics("east", FEDERATOR)?;
    let joins = |result: &str| {
        metric(
            &metrics,
            "tombolo_federator_requests_total",
            &["call=\"join\"", &format!("result=\"{result}\"")],
        )
    };
    println!("joins: {} ok, {} denied", joins("ok"), joins("denied"));
    ensure!(joins("ok") == 1.0 && joins("denied") >= 1.0, "{metrics}");
    let status = mesh.status("east")?;
    let holders: Vec<_> =
        status["endpoints"].as_array().into_iter().flatten().map(|e| e["holder"].clone()).collect();
    ensure!(holders.len() == 1, "{holders:?}");
    Ok(())
}

#[test]
fn a_link_token_that_is_wrong_used_or_foreign_is_refused_and_so_are_colliding_names() -> Result<()> {
    let test = "a_link_token_that_is_wrong_used_or_foreign_is_refused_and_so_are_colliding_names";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let clusters = ["east", "north", "west"];
    let mesh = Mesh::unlinked(&Layout {
        clusters: &clusters,
        gateways: 1,
        foreign: Some("north"),
        ..Layout::default()
    })?;
    let link_token = |peer: &str| mesh.operate("east", &["link", "token", peer]);
    let join = |cluster: &str, token: &str| {
        mesh.tombolo_with(&["--socket", &mesh.socket(cluster), "link", "join", "-"], token)
    };
    mesh.eventually("east can make link tokens", Duration::from_secs(10), |_| link_token("west").map(drop))?;
    let good = link_token("west")?;
    let cases = [
        ("garbage", join("west", "not-a-token"), "token"),
        ("tampered", join("west", &tampered(&link_token("west")?)), "token"),
        ("bound to another cluster", join("west", &link_token("central")?), "central"),
        ("of another federation", join("north", &link_token("north")?), "root"),
        (
            "expired",
            {
                let token = mesh.operate("east", &["link", "token", "west", "--ttl", "1s"])?;
                std::thread::sleep(ONE_SECOND_IS_OVER);
                join("west", &token)
            },
            "expired",
        ),
        ("to itself", link_token("east"), "itself"),
    ];
    for (what, result, needle) in cases {
        let reason = refusal(result, what)?;
        println!("{what}: {}", reason.trim().lines().last().unwrap_or_default());
        ensure!(reason.contains(needle), "{what}: the refusal does not say {needle:?}: {reason}");
    }
    join("west", &good)?;
    let again = refusal(join("west", &good), "used")?;
    let second = refusal(link_token("west"), "a second link to west")?;
    println!("used: {}\nlinked already: {}", again.trim(), second.trim());
    // The root hands out each name once, each with a tag of its own.
    let (trust, out) = (mesh.path("trust"), mesh.path("twin"));
    let twin = mesh.tombolo(&[
        "trust",
        "cluster",
        "west",
        "--dir",
        &trust.display().to_string(),
        "--out",
        &out.display().to_string(),
    ]);
    let twin = refusal(twin, "a second cluster by the name of west")?;
    println!("a name that is taken: {}", twin.trim());
    ensure!(twin.contains("west") && !out.exists(), "{twin}");
    // What the operator sees: one link, connected.
    mesh.eventually("the link is connected in status", Duration::from_secs(10), |mesh| {
        let status = mesh.status("east")?;
        ensure!(status["links"].as_array().is_some_and(|links| links.len() == 1), "{status}");
        ensure!(entry(&status, "links", "peer", "west")?["state"] == "connected", "{status}");
        Ok(())
    })?;
    Ok(())
}

#[test]
fn a_port_that_is_taken_fails_the_start_and_names_the_address() -> Result<()> {
    let test = "a_port_that_is_taken_fails_the_start_and_names_the_address";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut mesh = Mesh::start(&ALONE)?;
    let address = mesh.cluster("east")?.address(25, 9999);
    let _taken = mesh.cluster("east")?.namespace.run(|| std::net::TcpListener::bind(address))??;
    let first = flag("--upstream", "web", 80, mesh.cluster("east")?.address(21, 9080));
    mesh.sidecar("east", "first", &first)?;
    let overlay = mesh.cluster("east")?.address(21, 7442).to_string();
    let token: PathBuf = mesh.token("east", "sidecar", "second")?;
    let token = token.display().to_string();
    let state = mesh.state("east", "second").display().to_string();
    let admin = mesh.cluster("east")?.address(26, 7445).to_string();
    let free = mesh.cluster("east")?.address(26, 7442).to_string();
    let upstream = flag("--upstream", "web", 80, address);
    let harmless = format!("shop/web:80={}", mesh.cluster("east")?.address(26, 9080));
    let federator = mesh.cluster("east")?.address(FEDERATOR, 7443).to_string();
    let trust = mesh.path("east/trust").display().to_string();
    let other = mesh.state("east", "federator-2").display().to_string();
    let sidecar = |bind| {
        vec![
            "sidecar",
            "--name",
            "second",
            "--join-token-file",
            &token,
            "--state-dir",
            &state,
            "--bind",
            bind,
            "--announce",
            bind,
            "--admin",
            &admin,
        ]
    };
    let cases = [
        ("overlay", [sidecar(overlay.as_str()), vec!["--upstream", &harmless]].concat(), overlay.clone()),
        (
            "upstream",
            [sidecar(&free), upstream.iter().map(String::as_str).collect()].concat(),
            address.to_string(),
        ),
        (
            "federator",
            vec![
                "federator",
                "--cluster",
                "east",
                "--trust-dir",
                &trust,
                "--state-dir",
                &other,
                "--listen",
                &federator,
                "--admin",
                &admin,
                "--socket",
                "/nonexistent/socket",
            ],
            federator.clone(),
        ),
    ];
    for (what, args, needle) in cases {
        let begun = Instant::now();
        let reason =
            refusal(mesh.spec("east", &format!("clash-{what}"), &args)?.run(&mesh.logs()?, REFUSED), what)?;
        println!(
            "{what} port taken, after {:?}: {}",
            begun.elapsed(),
            reason.trim().lines().last().unwrap_or_default()
        );
        ensure!(reason.contains(&needle), "{what}: the error does not name {needle}: {reason}");
    }
    // Who was there first is not disturbed, and the failed ones are no members.
    mesh.ready("east", 21, "first")?;
    let status = mesh.status("east")?;
    let healthy = entry(&status, "endpoints", "holder", "shop/first");
    println!("{}", healthy.map_or_else(|_| status["endpoints"].to_string(), ToString::to_string));
    Ok(())
}

#[test]
fn clocks_that_are_ten_minutes_apart_do_not_hurt() -> Result<()> {
    let test = "clocks_that_are_ten_minutes_apart_do_not_hurt";
    let Some(_) = require_netns(test) else { return Ok(()) };
    for seconds in [600, -600] {
        let begun = Instant::now();
        let world =
            World::start(&Layout { clock_off: Some(("west", seconds)), gateways: 1, ..Layout::default() })?;
        let readers = world.readers(2)?;
        tombolo_tests::scenario::flowing(&readers, 1_000_000, Duration::from_secs(10))?;
        for reader in readers {
            reader.finish()?;
        }
        let status = world.mesh.status("east")?;
        let link = entry(&status, "links", "peer", "west")?;
        println!(
            "west's clocks {seconds:+} s: linked and serving after {:?}, age {} ms",
            begun.elapsed(),
            link["ageMs"]
        );
        ensure!(link["state"] == "connected", "{link}");
        ensure!(
            link["ageMs"].as_u64().is_some_and(|age| age < 10_000),
            "an age by the other's clock: {link}"
        );
    }
    Ok(())
}
