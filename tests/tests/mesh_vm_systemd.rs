//! The Debian package on a machine that a real systemd runs: installed, joined, rebooted, upgraded, left, purged. The
//! machine is behind a router that masquerades; what it serves is called from another cluster all the while.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::capability::{require_netns, require_programs};
use tombolo_tests::mesh::{Mesh, binary, http_get};
use tombolo_tests::scenario::before_joining;
use tombolo_tests::systemd::{Systemd, require_systemd};

const VM_APP: &str = "127.0.0.1:8080";
const NAME: &str = "web.shop.svc.clusterset.local";
const SIDECAR: &str = "tombolo-sidecar.service";
const CAPTURE: &str = "tombolo-capture.service";
const SERVED: Duration = Duration::from_secs(20);

const WORKLOAD: &str = "apiVersion: tombolo.dev/v1alpha1
kind: Workload
metadata: { name: vm-1, namespace: shop }
spec:
  services:
    - name: legacy
      ports: [ { port: 80, targetPort: 8080 } ]
      healthCheck: { tcp: { port: 8080 }, interval: 300ms }
";

/// The package of the binary under test, without what only a debugger reads.
fn package(dir: &Path, version: &str) -> Result<PathBuf> {
    let program = dir.join("tombolo");
    if !program.exists() {
        let stripped = Command::new("strip").arg("-o").args([&program, &binary()?]).status()?;
        ensure!(stripped.success(), "strip");
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/package/deb.sh");
    let made = Command::new(script)
        .args([program.as_path(), &dir.join(version)])
        .envs([("DEB_VERSION", version), ("DEB_COMPRESS", "-Zgzip -z1"), ("SOURCE_DATE_EPOCH", "1790000000")])
        .output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    Ok(PathBuf::from(String::from_utf8(made.stdout)?.trim()))
}

struct Site {
    mesh: Mesh,
    machine: Systemd,
    legacy: SocketAddr,
}

impl Site {
    fn start() -> Result<Self> {
        let (mesh, index, legacy) = before_joining(VM_APP, "vm-1")?;
        let machine = Systemd::boot(mesh.outside(index)?)?;
        Ok(Self { mesh, machine, legacy })
    }

    fn served(&self) -> Result<Duration> {
        let served = self.mesh.eventually("east is served by the machine", SERVED, |mesh| {
            let answer = http_get(&mesh.cluster("east")?.namespace, self.legacy, "/")?;
            ensure!(answer.contains("vm-1"), "{answer}");
            Ok(())
        });
        served.with_context(|| self.machine.journal(SIDECAR))
    }

    /// By its name, captured.
    fn calls(&self) -> Result<()> {
        let url = format!("http://{NAME}/");
        self.mesh.eventually("the machine calls east by name", SERVED, |_| {
            let answer = self.machine.run("curl", &["-sS", "--fail", "--max-time", "3", &url])?.ok()?;
            ensure!(answer.contains("east"), "{answer}");
            Ok(())
        })?;
        Ok(())
    }

    /// What systemd says of a unit.
    fn property(&self, unit: &str, property: &str) -> Result<String> {
        let said = self.machine.run("systemctl", &["show", "-P", property, unit])?.ok()?;
        Ok(said.trim().to_owned())
    }

    fn dpkg(&self, args: &[&str]) -> Result<String> {
        let args = [&["DEBIAN_FRONTEND=noninteractive", "dpkg"], args].concat();
        let ended = self.machine.run("env", &args)?;
        ensure!(ended.code == 0, "{args:?}: {ended:?}");
        Ok(ended.out + &ended.err)
    }
}

#[test]
fn systemd_runs_what_the_package_brings_through_a_join_a_reboot_an_upgrade_and_a_leave() -> Result<()> {
    let test = "systemd_runs_what_the_package_brings_through_a_join_a_reboot_an_upgrade_and_a_leave";
    let programs = ["dpkg-deb", "dpkg", "strip", "readelf", "curl"];
    let (Some(_), Some(()), Some(())) =
        (require_netns(test), require_programs(test, &programs), require_systemd(test))
    else {
        return Ok(());
    };
    let packages = tempfile::tempdir()?;
    let (one, two) = (package(packages.path(), "1.0")?, package(packages.path(), "1.1")?);
    let mut site = Site::start()?;
    let (one, two) = (one.display().to_string(), two.display().to_string());

    // Installed: there, known to systemd, and nothing runs that nobody has asked for.
    site.dpkg(&["-i", &one])?;
    for unit in [SIDECAR, CAPTURE, "tombolo-gateway.service", "tombolo-federator.service"] {
        ensure!(site.property(unit, "LoadState")? == "loaded", "{unit}");
        ensure!(site.property(unit, "UnitFileState")? == "disabled", "{unit} is enabled by installing it");
        let verified = site.machine.run("systemd-analyze", &["verify", unit])?;
        ensure!(verified.code == 0 && verified.err.trim().is_empty(), "{unit}: {verified:?}");
    }

    let token = std::fs::read_to_string(site.mesh.token("west", "vm", "vm-1")?)?;
    site.machine.write("/root/token", &token)?;
    site.machine.write("/root/workload.yaml", WORKLOAD)?;
    let begun = Instant::now();
    let join = ["vm", "join", "--token-file", "/root/token", "--workload", "/root/workload.yaml"];
    site.machine.run("tombolo", &join)?.ok().with_context(|| site.machine.journal(SIDECAR))?;
    site.served()?;
    println!("from the token to the first request: {:?}", begun.elapsed());
    site.calls()?;
    for unit in [SIDECAR, CAPTURE] {
        ensure!(site.property(unit, "ActiveState")? == "active", "{unit}");
        ensure!(site.property(unit, "UnitFileState")? == "enabled", "{unit}");
    }
    // Without root, with two capabilities, and no way to write but its own state.
    let pid = site.property(SIDECAR, "MainPID")?;
    let status = site.machine.run("cat", &[&format!("/proc/{pid}/status")])?.ok()?;
    let line = |name: &str| status.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    ensure!(!line("Uid:").contains("\t0\t"), "it runs as root: {}", line("Uid:"));
    // CAP_NET_BIND_SERVICE (10) and CAP_NET_RAW (13).
    ensure!(line("CapEff:").trim_end().ends_with("0000000000002400"), "{}", line("CapEff:"));
    let state = site.machine.run("stat", &["-Lc", "%a", "/var/lib/tombolo"])?.ok()?;
    ensure!(state.trim() == "700", "{state}");

    // The plug is pulled.
    site.machine.power_off()?;
    let begun = Instant::now();
    site.machine.power_on()?;
    let booted = begun.elapsed();
    site.served()?;
    println!("rebooted: systemd is up after {booted:?}, served again after {:?}", begun.elapsed());
    site.calls()?;

    // An upgrade stops nothing and says so; what is new runs from the next start on.
    let before = site.property(SIDECAR, "MainPID")?;
    let said = site.dpkg(&["-i", &two])?;
    ensure!(said.contains("systemctl restart tombolo-sidecar"), "{said}");
    ensure!(site.property(SIDECAR, "MainPID")? == before, "an upgrade restarts the sidecar");
    site.served()?;
    site.machine.run("systemctl", &["restart", SIDECAR])?.ok()?;
    ensure!(site.property(SIDECAR, "MainPID")? != before);
    println!("restarted: serves again after {:?}", site.served()?);
    site.calls()?;

    let left = site.machine.run("tombolo", &["vm", "leave", "--yes"])?.ok()?;
    ensure!(left.contains("the federator has taken it out"), "{left}");
    for unit in [SIDECAR, CAPTURE] {
        ensure!(site.property(unit, "ActiveState")? == "inactive", "{unit} still runs");
        ensure!(site.property(unit, "UnitFileState")? == "disabled", "{unit}");
    }
    let rules = site.machine.run("nft", &["list", "ruleset"])?.ok()?;
    ensure!(!rules.contains("tombolo"), "{rules}");
    let resolver = site.machine.run("cat", &["/etc/resolv.conf"])?.ok()?;
    ensure!(!resolver.contains("127.0.0.54"), "{resolver}");

    site.dpkg(&["-P", "tombolo"])?;
    let kept = site.machine.run("sh", &["-c", "ls -d /etc/tombolo /var/lib/tombolo /var/lib/private/tombolo /usr/bin/tombolo 2>/dev/null; ls /etc/systemd/system"])?;
    ensure!(!kept.out.contains("tombolo"), "left behind: {}", kept.out);
    let state = site.machine.run("systemctl", &["is-system-running"])?;
    ensure!(state.out.trim() == "running", "{state:?}");
    Ok(())
}
