//! One cluster of the real binary on loopback addresses, for benchmarks that need no namespaces.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::process::{Process, ProcessSpec};
use tombolo_tests::usage;

use crate::mesh::{tombolo, tombolo_binary};

const READY: Duration = Duration::from_secs(20);

/// The cluster's processes and where they are.
pub struct Place {
    dir: tempfile::TempDir,
    pub processes: BTreeMap<&'static str, Process>,
}

/// Addresses are fixed: nothing else uses this corner of loopback.
pub fn address(host: u8, port: u16) -> SocketAddr {
    SocketAddr::from(([127, 83, 1, host], port))
}

impl Place {
    /// A federator.
    pub fn up() -> Result<Self> {
        let mut place = Self { dir: tempfile::tempdir()?, processes: BTreeMap::new() };
        let (root, trust, state) = (place.path("root"), place.path("trust"), place.path("federator"));
        tombolo(&["trust", "init", "--trust-domain", "bench.example", "--dir", &root], "")?;
        tombolo(&["trust", "cluster", "east", "--dir", &root, "--out", &trust], "")?;
        let (listen, socket) = (address(1, 7443).to_string(), place.path("admin.sock"));
        let args = ["federator", "--cluster", "east", "--trust-dir", &trust, "--state-dir", &state];
        place.start("federator", 1, &[&args[..], &["--listen", &listen, "--socket", &socket]].concat())?;
        Ok(place)
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// Starts a role and waits until it is ready.
    pub fn start(&mut self, name: &'static str, host: u8, args: &[&str]) -> Result<()> {
        let admin = address(host, 7445).to_string();
        let args = [args, &["--admin", &admin, "--log-level", "warn"]].concat();
        let process = ProcessSpec::new(name, tombolo_binary()?).args(args).spawn(self.dir.path())?;
        self.processes.insert(name, process);
        let deadline = Instant::now() + READY;
        while !get(address(host, 7445), "/ready").is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")) {
            let process = &self.processes[name];
            ensure!(Instant::now() < deadline, "{name} is not ready: {}", process.tail());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// A file with a join token.
    pub fn token(&self, role: &str, name: &str) -> Result<String> {
        let args = ["token", "create", "--role", role, "--name", name, "-n", "bench"];
        let token = tombolo(&[&["--socket", &self.path("admin.sock")], &args[..]].concat(), "")?;
        let path = self.path(&format!("{name}.token"));
        std::fs::write(&path, token)?;
        Ok(path)
    }

    pub fn rss_mb(&self, name: &str) -> Result<f64> {
        let pid = self.processes.get(name).context("no such process")?.pid();
        let used = usage::of(pid).with_context(|| format!("{name} is gone"))?;
        Ok(used.rss_bytes as f64 / 1e6)
    }
}

/// One answer of an admin endpoint, as text.
pub fn get(admin: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&admin, Duration::from_millis(200))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
