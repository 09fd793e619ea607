//! The packages that deploy/package makes: what is in them, that they come out the same twice, and what installing,
//! upgrading, removing and purging the Debian one does to a machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tombolo_tests::capability::{require_programs, skipped};
use tombolo_tests::mesh::binary;

/// A loopback prefix of its own, so that no other demo on this machine is disturbed.
const PREFIX: &str = "127.182";
/// Any will do, as long as it is the same.
const EPOCH: &str = "1790000000";

/// What Debian and OCI call the machine that this runs on.
fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// What `deploy/package/static.sh` has built, which takes minutes: where `TOMBOLO_STATIC_BIN` says, or where it puts it.
fn built_static() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("TOMBOLO_STATIC_BIN") {
        return Some(path.into());
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let target = |libc: &str| format!("{}-unknown-linux-{libc}/release/tombolo", std::env::consts::ARCH);
    ["musl", "gnu"].map(|libc| root.join(target(libc))).into_iter().find(|path| path.exists())
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/package")
}

/// Runs a program; its standard output.
fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {error}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn script(name: &str, args: &[&Path]) -> Command {
    let mut command = Command::new(scripts().join(name));
    command.args(args).env("SOURCE_DATE_EPOCH", EPOCH).env("DEB_COMPRESS", "-Zgzip -z1");
    command
}

/// The binary under test, without what only a debugger reads: a fourth of the bytes.
fn stripped(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("tombolo");
    run(Command::new("strip").arg("-o").args([&path, &binary()?]))?;
    Ok(path)
}

/// A small program that needs no library, as the image wants it.
fn static_program(dir: &Path) -> Result<PathBuf> {
    let (source, program) = (dir.join("static.c"), dir.join("static"));
    fs::write(&source, "int main(void) { return 0; }\n")?;
    run(Command::new("cc").args(["-static", "-O1", "-o"]).args([&program, &source]))?;
    Ok(program)
}

fn files_of(dir: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let mut files = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(next) = dirs.pop() {
        for entry in fs::read_dir(&next)? {
            let path = entry?.path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                files.push((path.strip_prefix(dir)?.to_owned(), fs::read(&path)?));
            }
        }
    }
    files.sort();
    Ok(files)
}

/// An empty machine, as far as dpkg is concerned.
struct Machine(PathBuf);

impl Machine {
    fn new(root: PathBuf) -> Result<Self> {
        for dir in ["var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/triggers"] {
            fs::create_dir_all(root.join(dir))?;
        }
        for file in ["var/lib/dpkg/status", "var/lib/dpkg/available"] {
            fs::write(root.join(file), "")?;
        }
        Ok(Self(root))
    }
    fn dpkg(&self, args: &[&str]) -> Result<String> {
        let root = format!("--root={}", self.0.display());
        // Its libraries are this machine's, and so is the shell of its scripts.
        let force = "--force-depends,script-chrootless,not-root,bad-path,confdef";
        run(Command::new("dpkg")
            .args([root.as_str(), force])
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive"))
    }
    fn path(&self, below: &str) -> PathBuf {
        self.0.join(below)
    }
}

#[test]
fn the_debian_package_is_reproducible_enables_nothing_keeps_settings_and_purges_state() -> Result<()> {
    let test = "the_debian_package_is_reproducible_enables_nothing_keeps_settings_and_purges_state";
    let Some(()) = require_programs(test, &["dpkg-deb", "dpkg", "strip", "readelf", "cc"]) else {
        return Ok(());
    };
    if !nix::unistd::geteuid().is_root() {
        skipped(test, "dpkg installs as root only");
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    // The real binary once, since it takes its time; what is about the package itself, with a small one.
    let (program, small) = (stripped(dir.path())?, static_program(dir.path())?);
    let build = |program: &Path, out: &str, version: &str| -> Result<PathBuf> {
        let made = run(script("deb.sh", &[program, &dir.path().join(out)]).env("DEB_VERSION", version))?;
        Ok(PathBuf::from(made.trim()))
    };
    let (first, again) = (build(&small, "two", "1.1")?, build(&small, "three", "1.1")?);
    ensure!(fs::read(&first)? == fs::read(&again)?, "the same inputs gave another package");
    let one = build(&program, "one", "1.0")?;

    let one = one.display().to_string();
    let info = run(Command::new("dpkg-deb").args(["-I", &one]))?;
    for line in ["Package: tombolo", "Version: 1.0", "Depends: libc6 (>= 2.", "conffiles", "postrm"] {
        ensure!(info.contains(line), "{line}: {info}");
    }
    let contents = run(Command::new("dpkg-deb").args(["-c", &one]))?;
    for path in
        ["./usr/bin/tombolo", "./usr/lib/systemd/system/tombolo-sidecar.service", "./etc/default/tombolo"]
    {
        ensure!(contents.contains(path), "{path}: {contents}");
    }
    ensure!(contents.lines().all(|line| line.contains(" root/root ")), "{contents}");

    let machine = Machine::new(dir.path().join("machine"))?;
    machine.dpkg(&["-i", &one])?;
    let version = run(Command::new(machine.path("usr/bin/tombolo")).arg("--version"))?;
    ensure!(version.starts_with("tombolo "), "{version}");
    ensure!(!machine.path("etc/systemd").exists(), "a unit is enabled that nobody has asked for");

    // What the operator has changed and what a service has kept outlive an upgrade and a removal, not a purge.
    let kept =
        ["etc/default/tombolo", "etc/tombolo/sidecar.yaml", "var/lib/tombolo/sidecar/db-1/member.json"];
    for file in kept {
        let path = machine.path(file);
        fs::create_dir_all(path.parent().context("no parent")?)?;
        fs::write(path, "TOMBOLO_LOG=debug\n")?;
    }
    let mine = |machine: &Machine| {
        kept.iter().all(|file| {
            fs::read_to_string(machine.path(file)).is_ok_and(|text| text == "TOMBOLO_LOG=debug\n")
        })
    };
    let newer = first.display().to_string();
    let said = machine.dpkg(&["-i", &newer])?;
    ensure!(mine(&machine), "an upgrade lost settings or state: {said}");
    let status = machine.dpkg(&["-s", "tombolo"])?;
    ensure!(status.contains("Version: 1.1") && status.contains("install ok installed"), "{status}");
    machine.dpkg(&["-r", "tombolo"])?;
    ensure!(mine(&machine) && !machine.path("usr/bin/tombolo").exists(), "removal keeps settings and state");
    machine.dpkg(&["-P", "tombolo"])?;
    for gone in [
        "etc/default/tombolo",
        "etc/tombolo",
        "var/lib/tombolo",
        "usr/lib/systemd/system/tombolo-sidecar.service",
    ] {
        ensure!(!machine.path(gone).exists(), "{gone} is still there after a purge");
    }
    Ok(())
}

#[test]
fn the_image_is_a_layout_by_digest_reproducible_and_takes_no_binary_that_needs_a_library() -> Result<()> {
    let test = "the_image_is_a_layout_by_digest_reproducible_and_takes_no_binary_that_needs_a_library";
    let Some(()) = require_programs(test, &["cc", "readelf", "sha256sum", "tar"]) else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let (needs, program) = (binary()?, static_program(dir.path())?);
    let refused = script("oci.sh", &[&needs, &dir.path().join("none")]).output()?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains("static.sh"), "{said}");

    let mut layouts = Vec::new();
    for out in ["one", "two"] {
        let made = run(&mut script("oci.sh", &[&program, &dir.path().join(out)]))?;
        let (layout, digest) = made.trim().split_once(' ').context("no digest")?;
        layouts.push((PathBuf::from(layout), digest.to_owned()));
    }
    ensure!(layouts[0].1 == layouts[1].1, "{layouts:?}");
    ensure!(files_of(&layouts[0].0)? == files_of(&layouts[1].0)?, "the same inputs gave another image");

    let layout = &layouts[0].0;
    let json = |path: PathBuf| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
    ensure!(json(layout.join("oci-layout"))?["imageLayoutVersion"] == "1.0.0");
    // Every blob is what its name says, and as long as whoever names it says.
    let blob = |descriptor: &Value| -> Result<PathBuf> {
        let hex =
            descriptor["digest"].as_str().and_then(|d| d.strip_prefix("sha256:")).context("no digest")?;
        let path = layout.join("blobs/sha256").join(hex);
        let sum = run(Command::new("sha256sum").arg(&path))?;
        ensure!(sum.starts_with(hex) && descriptor["size"] == fs::metadata(&path)?.len(), "{descriptor}");
        Ok(path)
    };
    let index = json(layout.join("index.json"))?;
    let entry = &index["manifests"][0];
    ensure!(
        entry["digest"] == layouts[0].1.as_str() && entry["platform"]["architecture"] == arch(),
        "{index}"
    );
    let manifest = json(blob(entry)?)?;
    let config = json(blob(&manifest["config"])?)?;
    ensure!(
        config["config"]["Entrypoint"][0] == "/usr/bin/tombolo" && config["config"]["User"] == "65532:65532"
    );
    let layer = blob(&manifest["layers"][0])?;
    let tar = dir.path().join("layer.tar");
    run(Command::new("sh").args(["-c", "gzip -dc \"$0\" >\"$1\""]).args([&layer, &tar]))?;
    let diff = run(Command::new("sha256sum").arg(&tar))?;
    let diff = format!("sha256:{}", diff.split(' ').next().unwrap_or_default());
    ensure!(config["rootfs"]["diff_ids"][0] == diff.as_str(), "{config}");
    let listed = run(Command::new("tar").arg("-tvf").arg(&tar))?;
    ensure!(
        listed.contains("./usr/bin/tombolo") && listed.lines().all(|line| line.contains(" 0/0 ")),
        "{listed}"
    );
    Ok(())
}

#[test]
fn the_archive_and_the_bill_of_materials_come_out_the_same_twice() -> Result<()> {
    let test = "the_archive_and_the_bill_of_materials_come_out_the_same_twice";
    let Some(()) = require_programs(test, &["cc", "jq", "tar"]) else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let program = static_program(dir.path())?;
    let mut made = Vec::new();
    for out in ["one", "two"] {
        let out = dir.path().join(out);
        run(&mut script("tarball.sh", &[&program, &out]))?;
        run(&mut script("sbom.sh", &[&out]))?;
        made.push(files_of(&out)?);
    }
    ensure!(made[0] == made[1], "the same inputs gave other files");
    let named = |ending: &str| made[0].iter().find(|(path, _)| path.to_string_lossy().ends_with(ending));
    let (archive, _) = named(&format!("-linux-{}.tar.gz", arch())).context("no archive")?;
    let listed = run(Command::new("tar").arg("-tzf").arg(dir.path().join("one").join(archive)))?;
    ensure!(
        listed.contains("/bin/tombolo\n") && listed.contains("/systemd/tombolo-sidecar.service"),
        "{listed}"
    );
    let (_, bill) = named(".cdx.json").context("no bill of materials")?;
    let bill: Value = serde_json::from_slice(bill)?;
    ensure!(bill["bomFormat"] == "CycloneDX" && bill["metadata"]["component"]["name"] == "tombolo", "{bill}");
    let components = bill["components"].as_array().context("no components")?;
    let has = |name: &str| components.iter().any(|component| component["name"] == name);
    ensure!(has("quinn") && has("rustls") && has("tombolo-overlay"), "what is linked is listed");
    ensure!(!has("proptest") && !has("ring"), "what is not linked is not");
    ensure!(components.iter().all(|c| c["licenses"].as_array().is_some_and(|l| !l.is_empty())), "{bill}");
    Ok(())
}

#[test]
fn the_static_binary_plays_the_demo_in_a_root_with_nothing_but_the_image() -> Result<()> {
    let test = "the_static_binary_plays_the_demo_in_a_root_with_nothing_but_the_image";
    let Some(()) = require_programs(test, &["unshare", "chroot", "tar", "readelf"]) else { return Ok(()) };
    if !nix::unistd::geteuid().is_root() {
        skipped(test, "only root may change its root");
        return Ok(());
    }
    let Some(program) = built_static() else {
        skipped(
            test,
            "deploy/package/static.sh has not been run (TOMBOLO_STATIC_BIN names what it built elsewhere)",
        );
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let (out, root) = (dir.path().join("image"), dir.path().join("root"));
    let made = run(&mut script("oci.sh", &[&program, &out]))?;
    let layout = PathBuf::from(made.trim().split_once(' ').context("no digest")?.0);
    let json = |path: PathBuf| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
    let blob = |descriptor: &Value| {
        let hex = descriptor["digest"].as_str().and_then(|d| d.strip_prefix("sha256:")).context("no digest");
        hex.map(|hex| layout.join("blobs/sha256").join(hex))
    };
    let manifest = json(blob(&json(layout.join("index.json"))?["manifests"][0])?)?;
    fs::create_dir(&root)?;
    run(Command::new("tar").arg("-xzpf").arg(blob(&manifest["layers"][0])?).arg("-C").arg(&root))?;
    let mut files: Vec<PathBuf> = files_of(&root)?.into_iter().map(|(path, _)| path).collect();
    files.sort();
    ensure!(files == ["etc/group", "etc/passwd", "usr/bin/tombolo"].map(PathBuf::from), "{files:?}");

    // As an engine starts it: the user of the image, its processes alone, and `/proc`.
    fs::create_dir(root.join("proc"))?;
    let start = "mount --make-rprivate / && mount -t proc proc \"$0/proc\" && exec chroot --userspec=65532:65532 \"$0\" \"$@\"";
    let inside = |args: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-c", start]).arg(&root);
        command.arg("/usr/bin/tombolo").args(args);
        command.env_clear().envs([("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", "/tmp")]);
        run(command.envs([("XDG_STATE_HOME", "/tmp/state"), ("XDG_RUNTIME_DIR", "/tmp")]))
    };
    let version = inside(&["--version"])?;
    ensure!(version.starts_with("tombolo "), "{version}");
    let said = inside(&["demo", "--scenario", "--loopback", PREFIX])?;
    let summary = said.lines().find(|line| line.contains(" steps held")).with_context(|| said.clone())?;
    println!("{}: {summary}", program.display());
    Ok(())
}
