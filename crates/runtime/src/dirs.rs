//! Where state, sockets and settings live: systemd's directories for a service, the XDG ones for a person, never the
//! current folder.
//!
//! Resolution is a pure function of the environment. Nothing is created here but by [`ensure_private`].

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::settings;

/// `sun_path` holds 108 bytes with its terminator (unix(7)).
pub const MAX_SOCKET_PATH_BYTES: usize = 107;
/// Where the unit files of `deploy/` put sockets; operators look here too.
pub const SYSTEM_RUNTIME: &str = "/run/tombolo";

/// The platform's directories for this process. All are absolute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirs {
    /// Keys, leases, stores, last configuration.
    pub state: PathBuf,
    /// Sockets.
    pub runtime: PathBuf,
    /// Settings files.
    pub config: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum DirsError {
    #[error(
        "no directory for state: neither STATE_DIRECTORY, XDG_STATE_HOME nor HOME names one: give --state-dir"
    )]
    NoHome,
    #[error("socket path {path} is longer than {MAX_SOCKET_PATH_BYTES} bytes, more than a Unix socket can have: choose a shorter one with --socket", path = path.display())]
    SocketPath { path: PathBuf },
    #[error("directory {path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("directory {path} belongs to user {owner}, not to us: secrets are kept there; choose another", path = path.display())]
    ForeignOwner { path: PathBuf, owner: u32 },
    #[error("directory {path} (mode {mode:o}) can be written by others, and secrets are kept there: run chmod 700 {path}", path = path.display())]
    WritableByOthers { path: PathBuf, mode: u32 },
}

impl Dirs {
    /// From this process's environment.
    pub fn from_environment() -> Result<Self, DirsError> {
        Self::resolve(&settings::environment)
    }

    /// Pure: `env` looks up a variable.
    pub fn resolve(env: &dyn Fn(&str) -> Option<String>) -> Result<Self, DirsError> {
        // systemd may give several, separated by colons: the first is ours.
        let systemd = |name: &str| {
            let value = env(name)?;
            absolute(value.split(':').next().unwrap_or_default())
        };
        if let Some(state) = systemd("STATE_DIRECTORY") {
            let runtime = systemd("RUNTIME_DIRECTORY").unwrap_or_else(|| SYSTEM_RUNTIME.into());
            let config = systemd("CONFIGURATION_DIRECTORY").unwrap_or_else(|| "/etc/tombolo".into());
            return Ok(Self { state, runtime, config });
        }
        // The XDG specification: relative paths are invalid and ignored.
        let home = env("HOME").and_then(|home| absolute(&home));
        let xdg = |name: &str, below_home: &str| {
            let base =
                env(name).and_then(|path| absolute(&path)).or_else(|| Some(home.as_ref()?.join(below_home)));
            base.map(|base| base.join("tombolo"))
        };
        let state = xdg("XDG_STATE_HOME", ".local/state").ok_or(DirsError::NoHome)?;
        let config = xdg("XDG_CONFIG_HOME", ".config").unwrap_or_else(|| state.join("config"));
        let runtime =
            env("XDG_RUNTIME_DIR").and_then(|path| absolute(&path)).map(|base| base.join("tombolo"));
        Ok(Self { runtime: runtime.unwrap_or_else(|| state.join("run")), state, config })
    }

    /// Where the offline root and the clusters' intermediates are kept unless `--dir` says otherwise.
    pub fn trust(&self) -> PathBuf {
        self.state.join("trust")
    }

    /// State of one role of one cluster.
    pub fn role_state(&self, cluster: &str, role: &str) -> PathBuf {
        self.state.join(cluster).join(role)
    }

    /// The federator's socket for operators.
    pub fn admin_socket(&self, cluster: &str) -> PathBuf {
        admin_socket_in(&self.runtime, cluster)
    }
}

/// The federator's socket for operators below a runtime directory.
pub fn admin_socket_in(runtime: &Path, cluster: &str) -> PathBuf {
    runtime.join(cluster).join("admin.sock")
}

/// Refuses a path that can't be a Unix socket's.
pub fn check_socket_path(path: &Path) -> Result<(), DirsError> {
    if path.as_os_str().len() > MAX_SOCKET_PATH_BYTES {
        return Err(DirsError::SocketPath { path: path.to_owned() });
    }
    Ok(())
}

/// Creates a directory (and its parents) that only its owner can enter, or checks that nobody else could put files into
/// an existing one. An existing directory's mode is left alone: it may be the operator's own.
pub fn ensure_private(path: &Path) -> Result<(), DirsError> {
    let failed = |source| DirsError::Io { path: path.to_owned(), source };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
    let metadata = std::fs::metadata(path).map_err(failed)?;
    let me = nix::unistd::geteuid().as_raw();
    if metadata.uid() != me && me != 0 {
        return Err(DirsError::ForeignOwner { path: path.to_owned(), owner: metadata.uid() });
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(DirsError::WritableByOthers { path: path.to_owned(), mode: metadata.mode() & 0o7777 });
    }
    Ok(())
}

fn absolute(path: &str) -> Option<PathBuf> {
    let path = PathBuf::from(path);
    path.is_absolute().then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(vars: &[(&str, &str)]) -> Result<Dirs, DirsError> {
        Dirs::resolve(&|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    }

    #[test]
    fn a_service_uses_what_systemd_gives_it() {
        let dirs =
            resolve(&[("STATE_DIRECTORY", "/var/lib/tombolo:/var/lib/other"), ("HOME", "/root")]).unwrap();
        assert_eq!(dirs.state, Path::new("/var/lib/tombolo"));
        assert_eq!(dirs.admin_socket("east"), Path::new("/run/tombolo/east/admin.sock"));
    }

    #[test]
    fn a_person_uses_the_xdg_directories() {
        let dirs = resolve(&[("HOME", "/home/ada"), ("XDG_RUNTIME_DIR", "/run/user/7")]).unwrap();
        assert_eq!(dirs.trust(), Path::new("/home/ada/.local/state/tombolo/trust"));
        assert_eq!(dirs.runtime, Path::new("/run/user/7/tombolo"));
    }

    #[test]
    fn relative_paths_never_lead_to_the_current_folder() {
        let dirs =
            resolve(&[("HOME", "/home/ada"), ("XDG_STATE_HOME", "state"), ("XDG_RUNTIME_DIR", ".")]).unwrap();
        assert_eq!(dirs.state, Path::new("/home/ada/.local/state/tombolo"));
        assert_eq!(dirs.runtime, Path::new("/home/ada/.local/state/tombolo/run"));
        assert!(matches!(resolve(&[("HOME", "here")]), Err(DirsError::NoHome)));
    }

    #[test]
    fn a_directory_for_secrets_is_made_private_and_one_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        ensure_private(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(ensure_private(&path).unwrap_err().to_string().contains("chmod 700"));
    }

    #[test]
    fn a_socket_path_that_no_socket_can_have_is_refused_with_a_remedy() {
        let error = check_socket_path(Path::new(&format!("/{}", "x".repeat(107)))).unwrap_err().to_string();
        assert!(error.contains("--socket"), "{error}");
    }
}
