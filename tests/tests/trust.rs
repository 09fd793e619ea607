//! `tombolo trust` and what it makes, by the real binary: keys under a passphrase, behind a program, made where they are
//! used; and a federator whose CA is about to end.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tombolo_identity::authority::{Existing, RootAuthority};
use tombolo_runtime::clock;
use tombolo_tests::capability::require_programs;
use tombolo_tests::mesh::binary;

const PATIENCE: Duration = Duration::from_secs(20);
const PASSPHRASE: &str = "korrekt Pferd Batterie";

fn run(args: &[&str], env: &[(&str, &str)]) -> Result<Output> {
    let mut command = Command::new(binary()?);
    command.args(args).stdin(Stdio::null()).envs(env.iter().copied());
    Ok(command.output()?)
}

/// Both streams of a command that has to work.
fn good(args: &[&str], env: &[(&str, &str)]) -> Result<String> {
    let output = run(args, env)?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(output.status.success(), "{args:?}: {text}");
    ensure!(!text.contains(PASSPHRASE), "the passphrase is printed: {text}");
    Ok(text)
}

/// What a command that has to fail says, and its exit code.
fn bad(args: &[&str], env: &[(&str, &str)]) -> Result<(i32, String)> {
    let output = run(args, env)?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "{args:?} worked");
    ensure!(!text.contains(PASSPHRASE), "the passphrase is printed: {text}");
    Ok((output.status.code().unwrap_or(-1), text))
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn a_root_under_a_passphrase_asks_for_it_when_it_signs_and_only_then() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let root = text(&dir.path().join("root"));
    let init = ["trust", "init", "--trust-domain", "acme.example", "--dir", &root];
    let (code, words) = bad(&[&init[..], &["--encrypt"]].concat(), &[])?;
    ensure!(code == 2 && words.contains("--passphrase-file"), "{words}");
    let secret = dir.path().join("passphrase");
    std::fs::write(&secret, format!("{PASSPHRASE}\n"))?;
    let file = text(&secret);
    let (_, words) = bad(&[&init[..], &["--passphrase-file", &file]].concat(), &[])?;
    ensure!(words.contains("chmod 600"), "a passphrase that others may read: {words}");
    std::fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    good(&[&init[..], &["--encrypt", "--passphrase-file", &file]].concat(), &[])?;
    let key = std::fs::read_to_string(dir.path().join("root/root.key"))?;
    ensure!(key.contains("ENCRYPTED PRIVATE KEY"), "{key}");

    good(&["trust", "show", "--dir", &root], &[])?;
    let cluster = ["trust", "cluster", "east", "--dir", &root];
    let (code, words) = bad(&cluster, &[])?;
    ensure!(code == 2 && words.contains("TOMBOLO_TRUST_PASSPHRASE"), "{words}");
    let (code, words) = bad(&cluster, &[("TOMBOLO_TRUST_PASSPHRASE", "wrong")])?;
    ensure!(code == 1 && words.contains("the passphrase is wrong"), "{words}");
    good(&cluster, &[("TOMBOLO_TRUST_PASSPHRASE", PASSPHRASE)])?;

    let change = ["trust", "passphrase", "--dir", &root];
    let env = [("TOMBOLO_TRUST_PASSPHRASE", PASSPHRASE), ("TOMBOLO_TRUST_NEW_PASSPHRASE", "another")];
    good(&change, &env)?;
    let west = ["trust", "cluster", "west", "--dir", &root];
    bad(&west, &[("TOMBOLO_TRUST_PASSPHRASE", PASSPHRASE)])?;
    good(&[&change[..], &["--remove"]].concat(), &[("TOMBOLO_TRUST_PASSPHRASE", "another")])?;
    good(&west, &[])?;
    Ok(())
}

#[test]
fn a_passphrase_typed_at_a_terminal_is_not_shown() -> Result<()> {
    let test = "a_passphrase_typed_at_a_terminal_is_not_shown";
    let Some(()) = require_programs(test, &["script"]) else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let root = dir.path().join("root");
    let line = format!("{} trust init --trust-domain acme.example --dir {}", text(&binary()?), text(&root));
    let mut child = Command::new("script")
        .args(["-qec", &line, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().context("no input")?;
    for _ in 0..2 {
        // Once it asks, or what is typed before is echoed by the terminal itself.
        std::thread::sleep(Duration::from_millis(700));
        stdin.write_all(format!("{PASSPHRASE}\n").as_bytes())?;
    }
    let mut shown = String::new();
    child.stdout.take().context("no output")?.read_to_string(&mut shown)?;
    drop(stdin);
    child.wait()?;
    ensure!(shown.contains("Passphrase for the root's key") && shown.contains("fingerprint"), "{shown}");
    ensure!(!shown.contains("Pferd"), "what was typed is shown: {shown}");
    ensure!(std::fs::read_to_string(root.join("root.key"))?.contains("ENCRYPTED"), "{shown}");
    Ok(())
}

/// A federator on this machine, ended when dropped.
struct Federator {
    child: Child,
    admin: SocketAddr,
    socket: String,
    log: std::path::PathBuf,
}

impl Drop for Federator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Federator {
    fn start(dir: &Path, cluster: &str, trust: &Path) -> Result<Self> {
        let admin = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let (socket, log) = (text(&dir.join("admin.sock")), dir.join("federator.log"));
        let (trust, state, at) = (text(trust), text(&dir.join("state")), admin.to_string());
        let args = ["--socket", &socket, "federator", "--cluster", cluster, "--trust-dir", &trust];
        let args = [&args[..], &["--state-dir", &state, "--listen", "127.0.0.1:0", "--admin", &at]].concat();
        let args = [&args[..], &["--log-level", "trace"]].concat();
        let child = Command::new(binary()?)
            .args(args)
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log)?)
            .spawn()?;
        let federator = Self { child, admin, socket, log };
        federator.until("it is ready", |federator| {
            federator.get("/ready").is_ok_and(|a| a.starts_with("HTTP/1.1 200"))
        })?;
        Ok(federator)
    }

    fn get(&self, path: &str) -> Result<String> {
        let mut stream = TcpStream::connect(self.admin)?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: f\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !holds(self) {
            ensure!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

#[test]
fn a_key_behind_a_program_and_a_clusters_own_key_make_a_federator_that_issues() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| text(&dir.path().join(name));
    let status = Command::new("openssl")
        .args([
            "genpkey",
            "-algorithm",
            "EC",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-out",
            &path("hsm.pem"),
        ])
        .output()?;
    ensure!(status.status.success(), "openssl is needed");
    let script = format!(
        "case \"$1\" in public-key) exec openssl pkey -in {0} -pubout;; sign) exec openssl dgst -sha256 -sign {0};; esac\n",
        path("hsm.pem")
    );
    std::fs::write(path("hsm.sh"), script)?;
    let hsm = format!("sh {}", path("hsm.sh"));
    let root = path("root");
    good(
        &["trust", "init", "--trust-domain", "acme.example", "--dir", &root, "--signer-command", &hsm],
        &[],
    )?;
    ensure!(!dir.path().join("root/root.key").exists(), "a key was left in the root's directory");

    good(&["trust", "csr", "east", "--out", &path("east")], &[])?;
    let key = std::fs::read_to_string(dir.path().join("east/ca.key"))?;
    let (csr, back) = (path("east/ca.csr"), path("back"));
    let sign = ["trust", "sign", &csr, "--dir", &root, "--out", &back];
    let (_, words) = bad(&sign, &[])?;
    ensure!(words.contains("--signer-command"), "{words}");
    let (_, words) = bad(&[&sign[..], &["--signer-command", "false"]].concat(), &[])?;
    ensure!(words.contains("false public-key") && words.contains("exit status: 1"), "{words}");
    good(&sign, &[("TOMBOLO_TRUST_SIGNER_COMMAND", &hsm)])?;
    for file in ["ca.crt", "bundle.json", "cluster.json"] {
        std::fs::copy(dir.path().join("back").join(file), dir.path().join("east").join(file))?;
    }
    let federator = Federator::start(dir.path(), "east", &dir.path().join("east"))?;
    let made =
        good(&["--socket", &federator.socket, "token", "create", "--role", "sidecar", "--name", "web"], &[])?;
    ensure!(made.contains("tombolo-join-"), "{made}");
    let own = good(&["--socket", &federator.socket, "audit", "--action", "own-svid"], &[])?;
    ensure!(own.contains("east/federator"), "{own}");
    let clean = good(&["--socket", &federator.socket, "check"], &[])?;
    ensure!(clean.contains("nothing found"), "{clean}");
    let secret = key.lines().nth(1).context("no key")?;
    ensure!(!federator.log().contains(secret), "the CA's key is in the log");

    let replica =
        ["trust", "cluster", "east", "--csr", &csr, "--renew", "--dir", &root, "--out", &path("again")];
    good(&[&replica[..], &["--signer-command", &hsm]].concat(), &[])?;
    Ok(())
}

#[test]
fn a_ca_that_ends_soon_is_said_in_log_metrics_status_and_check() -> Result<()> {
    let dir = tempfile::tempdir()?;
    // Signed 360 days ago: it ends in five.
    let past = clock::since_unix_epoch() - Duration::from_secs(360 * 86_400);
    let mut root = RootAuthority::init(&dir.path().join("root"), "acme.example".parse()?, past)?;
    let trust = dir.path().join("trust");
    root.sign_cluster(&"east".parse()?, Existing::Refuse, past)?.save(&trust)?;
    let federator = Federator::start(dir.path(), "east", &trust)?;
    let check = run(&["--socket", &federator.socket, "check"], &[])?;
    let words = String::from_utf8_lossy(&check.stdout).into_owned();
    ensure!(check.status.code() == Some(3), "{words}");
    ensure!(
        words.contains("warning: the intermediate of east expires in") && words.contains("--renew"),
        "{words}"
    );
    let status = good(&["--socket", &federator.socket, "status"], &[])?;
    ensure!(status.contains("NEEDS ATTENTION") && status.contains("CaExpiresSoon"), "{status}");
    let json: Value =
        serde_json::from_str(&good(&["--socket", &federator.socket, "status", "-o", "json"], &[])?)?;
    ensure!(json["findings"][0]["severity"] == "warning", "{json}");
    federator.until("the log says so", |federator| {
        federator
            .log()
            .lines()
            .any(|line| line.contains("ERROR") && line.contains("the intermediate of east expires in"))
    })?;
    federator.until("the metric is there", |federator| {
        let metrics = federator.get("/metrics").unwrap_or_default();
        let of = |ca: &str| {
            let line = metrics
                .lines()
                .find(|l| l.starts_with("tombolo_federator_ca_expiry_seconds{") && l.contains(ca))?;
            line.rsplit(' ').next()?.parse::<f64>().ok()
        };
        let intermediate = of("ca=\"intermediate\"").unwrap_or_default();
        (4.0 * 86_400.0..5.1 * 86_400.0).contains(&intermediate)
            && of("ca=\"root\"").is_some_and(|left| left > 1e8)
    })
}
