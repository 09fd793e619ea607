//! Where everything of a joined machine lies, below one root: `/`, or a directory that stands for it.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::failure::Failure;

#[derive(Clone, Debug, Args)]
pub struct Root {
    /// Put all files below this directory instead of /; what is written names it, and what is running is this machine's
    /// all the same
    #[arg(long = "root", value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// The paths below a root; all are absolute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place(PathBuf);

impl Root {
    pub fn place(&self) -> Result<Place, Failure> {
        match &self.dir {
            None => Ok(Place("/".into())),
            Some(dir) if dir.is_absolute() && dir.is_dir() => Ok(Place(dir.clone())),
            Some(dir) => Err(Failure::usage(format_args!("--root {}: is no directory", dir.display()))
                .remedy("give one that is there, by its absolute path")),
        }
    }
}

impl Place {
    fn below(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }
    /// `/etc/tombolo`.
    pub fn settings(&self) -> PathBuf {
        self.below("etc/tombolo")
    }
    pub fn sidecar(&self) -> PathBuf {
        self.settings().join("sidecar.yaml")
    }
    pub fn capture(&self) -> PathBuf {
        self.settings().join("capture.yaml")
    }
    pub fn workload(&self) -> PathBuf {
        self.settings().join("workload.yaml")
    }
    /// What `vm join` has made.
    pub fn record(&self) -> PathBuf {
        self.settings().join("vm.json")
    }
    /// As systemd's `StateDirectory=tombolo` has it.
    pub fn state(&self) -> PathBuf {
        self.below("var/lib/tombolo")
    }
    /// Where the sidecar of a name keeps its identity, as its own default is.
    pub fn identity(&self, name: &str) -> PathBuf {
        self.state().join("sidecar").join(name)
    }
    pub fn units(&self) -> PathBuf {
        self.below("etc/systemd/system")
    }
    /// Where packages put units.
    pub fn packaged_units(&self) -> [PathBuf; 2] {
        ["usr/lib/systemd/system", "lib/systemd/system"].map(|dir| self.below(dir))
    }
    pub fn resolv_conf(&self) -> PathBuf {
        self.below("etc/resolv.conf")
    }
    pub fn resolved_drop_ins(&self) -> PathBuf {
        self.below("etc/systemd/resolved.conf.d")
    }
    /// systemd is the service manager here (sd_booted(3)).
    pub fn has_systemd(&self) -> bool {
        self.below("run/systemd/system").is_dir()
    }
    pub fn has_resolved(&self) -> bool {
        self.below("run/systemd/resolve").is_dir()
    }
    pub fn root(&self) -> &Path {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_must_be_a_directory_that_is_there() {
        let bad = Root { dir: Some("relative".into()) };
        assert!(bad.place().unwrap_err().to_string().contains("--root relative"));
        let place = Root { dir: None }.place().unwrap();
        assert_eq!(place.identity("db-1"), Path::new("/var/lib/tombolo/sidecar/db-1"));
    }
}
