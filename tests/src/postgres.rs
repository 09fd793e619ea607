//! A PostgreSQL for scenarios: its programs, which Debian keeps in a directory of their own, and a server made from nothing.

use std::net::SocketAddr;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::capability::find_program;
use crate::process::ProcessSpec;

/// `initdb` on a busy machine.
const INIT: Duration = Duration::from_secs(60);

/// A program of the client or the server.
pub fn program(name: &str) -> Result<PathBuf> {
    let versions = || std::fs::read_dir("/usr/lib/postgresql").ok()?.flatten().next();
    let of_server = || versions().map(|version| version.path().join("bin").join(name));
    find_program(name)
        .or_else(|| of_server().filter(|path| path.exists()))
        .with_context(|| format!("{name} is not installed"))
}

/// A directory below the system's own temporary one that `user` owns.
pub fn owned_by(user: &str) -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    let user = nix::unistd::User::from_name(user)?.with_context(|| format!("no user {user}"))?;
    chown(dir.path(), Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
    Ok(dir)
}

/// Makes a database below `dir`, which is `postgres`'s own; what serves it at an address, without passwords.
pub fn server(dir: &Path, listen: SocketAddr, logs: &Path) -> Result<ProcessSpec> {
    let data = dir.join("data").display().to_string();
    ProcessSpec::new("initdb", program("initdb")?)
        .args(["-D", &data, "-A", "trust", "-U", "postgres", "--no-sync", "--locale=C"])
        .current_dir(dir)
        .as_user("postgres")?
        .run(logs, INIT)?;
    std::fs::write(format!("{data}/pg_hba.conf"), "host all all 0.0.0.0/0 trust\n")?;
    let (host, port) = (listen.ip().to_string(), listen.port().to_string());
    ProcessSpec::new("postgres", program("postgres")?)
        .args(["-D", &data, "-k", "", "-h", &host, "-p", &port, "-c", "fsync=off"])
        .current_dir(dir)
        .as_user("postgres")
}
