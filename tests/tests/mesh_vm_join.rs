//! `tombolo vm join` and `vm leave` on a machine behind a router that masquerades: one command from a token to the first
//! request, another that leaves nothing behind; whatever goes wrong changes nothing.

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::capability::{require_netns, require_programs};
use tombolo_tests::captured::{curl, run};
use tombolo_tests::machine::{Machine, RESOLV_CONF};
use tombolo_tests::mesh::{Mesh, binary, http_get};
use tombolo_tests::netns::Namespace;
use tombolo_tests::process::ProcessSpec;
use tombolo_tests::scenario::before_joining;

const VM: &str = "vm-1";
const VM_APP: &str = "127.0.0.1:8080";
/// The figure is 5 s; a debug build on a busy machine gets more.
const FIRST_REQUEST: Duration = Duration::from_secs(20);
const OUT_AT_ONCE: Duration = Duration::from_secs(2);

const WORKLOAD: &str = "apiVersion: tombolo.dev/v1alpha1
kind: Workload
metadata: { name: vm-1, namespace: shop }
spec:
  services:
    - name: legacy
      ports: [ { port: 80, targetPort: 8080 } ]
      healthCheck: { command: { exec: [ /usr/bin/test, -d, /proc ] }, interval: 300ms }
";

/// West with a machine that has not joined yet; east calls what it will serve, and serves `shop/web`.
struct Site {
    mesh: Mesh,
    index: usize,
    legacy: SocketAddr,
}

impl Site {
    fn start() -> Result<Self> {
        let (mesh, index, legacy) = before_joining(VM_APP, VM)?;
        std::fs::write(mesh.path("workload.yaml"), WORKLOAD)?;
        Ok(Self { mesh, index, legacy })
    }

    fn vm(&self) -> Result<&Namespace> {
        self.mesh.outside(self.index)
    }
    fn workload(&self) -> String {
        self.mesh.path("workload.yaml").display().to_string()
    }
    fn token(&self, name: &str) -> Result<String> {
        Ok(self.mesh.token("west", "vm", name)?.display().to_string())
    }

    fn served(&self, limit: Duration) -> Result<Duration> {
        self.mesh.eventually("east is served by the machine", limit, |mesh| {
            let answer = http_get(&mesh.cluster("east")?.namespace, self.legacy, "/")?;
            ensure!(answer.contains(VM), "{answer}");
            Ok(())
        })
    }

    /// The machine as west's federator knows it.
    fn endpoints(&self) -> Result<usize> {
        let status = self.mesh.status("west")?;
        let endpoints = status["endpoints"].as_array().cloned().unwrap_or_default();
        Ok(endpoints.iter().filter(|e| e["spiffeId"].as_str().is_some_and(|id| id.contains("/vm/"))).count())
    }
}

#[test]
fn one_command_takes_a_machine_from_a_token_to_its_first_request_and_another_takes_it_all_away() -> Result<()>
{
    let test = "one_command_takes_a_machine_from_a_token_to_its_first_request_and_another_takes_it_all_away";
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &["curl", "dig", "setsid"]))
    else {
        return Ok(());
    };
    let site = Site::start()?;
    let machine = Machine::new(true)?;
    let vm = site.vm()?;
    let before = machine.likeness(vm)?;
    let (token, workload) = (site.token(VM)?, site.workload());
    let join = ["join", "--token-file", &token, "--workload", &workload];

    let dry = machine.vm(vm, &[&join[..], &["--dry-run"]].concat())?.ok()?;
    for step in
        ["write ", "AmbientCapabilities=", "table inet tombolo_capture", "uses the token up", "enable --now"]
    {
        ensure!(dry.contains(step), "{step}: {dry}");
    }
    ensure!(machine.likeness(vm)? == before, "a dry run changes nothing");

    let begun = Instant::now();
    let said = machine.vm(vm, &join)?.ok().with_context(|| machine.sidecar_log())?;
    let joined = begun.elapsed();
    site.served(FIRST_REQUEST).with_context(|| machine.sidecar_log())?;
    let first = begun.elapsed();
    println!("joined after {joined:?}, first request served across clusters after {first:?} (target: 5 s)");
    ensure!(first <= FIRST_REQUEST, "{first:?}");
    for made in
        ["sidecar.yaml", "captured:", "/cluster/west/vm/vm-1", "tombolo-sidecar.service", "resolv.conf"]
    {
        ensure!(said.contains(made), "it does not say that it made {made}: {said}");
    }
    let mode =
        run(vm, "stat", &["-c", "%a", &format!("{}/var/lib/tombolo/sidecar/vm-1", machine.root())], "")?;
    ensure!(mode.out.trim() == "700", "{mode:?}");
    ensure!(machine.file("etc/resolv.conf")?.contains("nameserver 127.0.0.54"));

    // An application that knows nothing of the mesh: by its name, captured, across clusters.
    let dug = run(vm, "dig", &["+short", "@127.0.0.54", "web.shop.svc.clusterset.local"], "")?.ok()?;
    let address: std::net::IpAddr = dug.trim().parse().with_context(|| dug.clone())?;
    site.mesh.eventually("a captured call is answered", Duration::from_secs(10), |_| {
        let answer = curl(vm, SocketAddr::new(address, 80), 5)?;
        ensure!(answer.contains("east"), "{answer}");
        Ok(())
    })?;

    // Twice is once, with the same token or with none.
    let whole = machine.likeness(vm)?;
    for again in [&join[..], &["join"]] {
        let said = machine.vm(vm, again)?.ok()?;
        ensure!(said.contains("already") && said.contains("nothing was changed"), "{said}");
    }
    let other = site.token("vm-2")?;
    let refused = machine.vm(vm, &["join", "--token-file", &other])?;
    ensure!(
        refused.code == 1 && refused.err.contains("vm-2") && refused.err.contains("vm leave"),
        "{refused:?}"
    );
    let unasked = machine.vm(vm, &["leave"])?;
    ensure!(unasked.code == 2 && unasked.err.contains("--yes"), "{unasked:?}");
    ensure!(machine.likeness(vm)? == whole, "none of that changes anything");

    // A service that can't be stopped keeps all that it needs, and the machine serves on; the next attempt goes on from there.
    machine.refuse("disable", true)?;
    let refused = machine.vm(vm, &["leave", "--yes"])?;
    ensure!(refused.code == 1 && refused.err.contains("systemctl disable"), "{refused:?}");
    site.served(Duration::from_secs(5)).with_context(|| machine.sidecar_log())?;
    ensure!(site.endpoints()? == 1, "the federator was told of a machine that serves");
    ensure!(machine.file("etc/tombolo/sidecar.yaml").is_ok(), "its settings are gone");
    machine.refuse("disable", false)?;

    let said = machine.vm(vm, &["leave", "--yes"])?.ok()?;
    let left = Instant::now();
    site.mesh.eventually("the federator knows it no more", OUT_AT_ONCE, |_| {
        let endpoints = site.endpoints()?;
        ensure!(endpoints == 0, "{endpoints}");
        Ok(())
    })?;
    println!("left; out of status {:?} later", left.elapsed());
    ensure!(said.contains("has left") && said.contains("the federator has taken it out"), "{said}");
    let after = machine.likeness(vm)?;
    ensure!(after == before, "left behind: {after:?}\nbefore: {before:?}");
    ensure!(machine.file("etc/resolv.conf")? == RESOLV_CONF);
    let audit = site.mesh.operate("west", &["audit", "--action", "leave", "-o", "json"])?;
    ensure!(audit.contains("/vm/vm-1"), "{audit}");
    let said = machine.vm(vm, &["leave", "--yes"])?.ok()?;
    ensure!(said.contains("nothing to leave"), "{said}");

    // Its token was good for one machine, once.
    let reused = machine.vm(vm, &join)?;
    ensure!(reused.code == 1 && reused.err.contains("used already"), "{reused:?}");
    ensure!(machine.likeness(vm)? == before, "what a failed join had done is undone");
    Ok(())
}

#[test]
fn a_join_that_fails_says_what_failed_and_changes_nothing() -> Result<()> {
    let test = "a_join_that_fails_says_what_failed_and_changes_nothing";
    let (Some(_), Some(())) = (require_netns(test), require_programs(test, &["setsid"])) else {
        return Ok(());
    };
    let site = Site::start()?;
    let machine = Machine::new(true)?;
    let vm = site.vm()?;
    let before = machine.likeness(vm)?;
    let (token, workload) = (site.token(VM)?, site.workload());
    let file = |name: &str, text: &str| -> Result<String> {
        let path = site.mesh.path(name);
        std::fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    let short = site.mesh.operate("west", &["vm", "token", "vm-3", "--ttl", "1s"])?;
    let short = file("short.token", &short)?;
    std::thread::sleep(Duration::from_millis(2100));
    let nonsense = file("nonsense.yaml", "][ nonsense: {{{\n")?;
    let no_check =
        file("check.yaml", &WORKLOAD.replace("exec: [ /usr/bin/test, -d, /proc ]", "exec: [ test ]"))?;
    let unknown = file("unknown.yaml", &WORKLOAD.replace("services:", "servces:"))?;
    let cases: [(&str, Vec<&str>, &[&str]); 9] = [
        ("no token at all", vec!["join"], &["no token", "tombolo vm token"]),
        ("a token that is none", vec!["join", "--token", "tombolo-nonsense"], &["token"]),
        ("a token that has ended", vec!["join", "--token-file", &short], &["expired"]),
        (
            "a token for another name",
            vec!["join", "--token-file", &token, "--name", "vm-9"],
            &["\"vm-1\"", "\"vm-9\""],
        ),
        ("nonsense", vec!["join", "--token-file", &token, "--workload", &nonsense], &["nonsense.yaml"]),
        (
            "a field that is not known",
            vec!["join", "--token-file", &token, "--workload", &unknown],
            &["servces"],
        ),
        (
            "a check by no absolute path",
            vec!["join", "--token-file", &token, "--workload", &no_check],
            &["healthCheck.command", "absolute path"],
        ),
        (
            "nothing to do",
            vec!["join", "--token-file", &token, "--no-capture", "--no-dns"],
            &["nothing to do"],
        ),
        (
            "a resolver that resolv.conf can't name",
            vec!["join", "--token-file", &token, "--dns-listen", "127.0.0.1:7453"],
            &["--dns-listen", "port 53"],
        ),
    ];
    for (what, args, expected) in &cases {
        let ended = machine.vm(vm, args)?;
        ensure!(ended.code != 0, "{what}: {ended:?}");
        ensure!(expected.iter().all(|text| ended.err.contains(text)), "{what}: {}", ended.err);
        println!("{what}: {}", ended.err.lines().next().unwrap_or_default());
        ensure!(machine.likeness(vm)? == before, "{what} changed something");
    }

    // What is in the way on the machine.
    let join = ["join", "--token-file", &token, "--workload", &workload];
    let listener = vm.run(|| TcpListener::bind("127.0.0.1:7445"))??;
    let ended = machine.vm(vm, &join)?;
    ensure!(ended.code == 1 && ended.err.contains("--admin") && ended.err.contains("7445"), "{ended:?}");
    drop(listener);
    let settings = machine.path("root/etc/tombolo");
    std::fs::create_dir(&settings)?;
    std::fs::write(settings.join("sidecar.yaml"), "name: mine\n")?;
    let ended = machine.vm(vm, &join)?;
    ensure!(ended.code == 1 && ended.err.contains("sidecar.yaml is there already"), "{ended:?}");
    ensure!(machine.file("etc/tombolo/sidecar.yaml")? == "name: mine\n");
    std::fs::remove_dir_all(&settings)?;
    ensure!(machine.likeness(vm)? == before);

    // The last step but two fails: everything before it is undone, and the federator told.
    machine.refuse("enable", true)?;
    let ended = machine.vm(vm, &join)?;
    ensure!(ended.code == 1 && ended.err.contains("systemctl enable"), "{ended:?}");
    ensure!(ended.err.contains("undone") && ended.err.contains("token is used up"), "{ended:?}");
    ensure!(machine.likeness(vm)? == before, "something is left half-installed");
    ensure!(site.endpoints()? == 0);
    machine.refuse("enable", false)?;
    Ok(())
}

#[test]
fn a_machine_without_systemd_is_told_how_to_start_its_sidecar_and_leaves_once_it_is_stopped() -> Result<()> {
    let test = "a_machine_without_systemd_is_told_how_to_start_its_sidecar_and_leaves_once_it_is_stopped";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut site = Site::start()?;
    let machine = Machine::new(false)?;
    let before = machine.likeness(site.vm()?)?;
    let (token, workload) = (site.token(VM)?, site.workload());
    let join = ["join", "--token-file", &token, "--workload", &workload, "--no-capture"];
    let said = machine.vm(site.vm()?, &join)?.ok()?;
    let config = format!("{}/etc/tombolo/sidecar.yaml", machine.root());
    ensure!(said.contains(&format!("sidecar --config {config}")), "{said}");
    ensure!(said.contains("dns install --resolver 127.0.0.54"), "{said}");

    let sidecar = ProcessSpec::new("vm", binary()?).args(["sidecar", "--config", &config]).within(site.vm()?);
    site.mesh.spawn("vm/sidecar", sidecar)?;
    site.served(FIRST_REQUEST)?;
    let early = machine.vm(site.vm()?, &["leave", "--yes"])?;
    ensure!(early.code == 1 && early.err.contains("still runs"), "{early:?}");
    site.served(Duration::from_secs(2))?;
    // It dies without a word, and the federator is told by leaving alone.
    site.mesh.process_mut("vm/sidecar")?.kill()?;
    let said = machine.vm(site.vm()?, &["leave", "--yes"])?.ok()?;
    ensure!(said.contains("the federator has taken it out"), "{said}");
    ensure!(site.endpoints()? == 0);
    let after = machine.likeness(site.vm()?)?;
    ensure!(after == before, "left behind: {after:?}");
    Ok(())
}
