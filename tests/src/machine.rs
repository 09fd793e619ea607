//! A machine that `tombolo vm join` sets up: a directory that stands for its `/`, and a program that stands for `systemctl`
//! where systemd can't run. It starts what the written unit files say, and nothing else.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::captured::{Ended, ruleset, run};
use crate::mesh::binary;
use crate::netns::Namespace;

pub const RESOLV_CONF: &str = "# by the network\nnameserver 192.0.2.53\noptions timeout:1\n";

/// `ROOT` and `LOGS` stand for directories. What it starts ends by itself: a test that is killed leaves nothing.
const SYSTEMCTL: &str = r#"#!/bin/bash
file=ROOT/etc/systemd/system/${@: -1}
[ "$1" = daemon-reload ] || [ -f "$file" ] || { echo "Unit ${@: -1} not found." >&2; exit 1; }
[ -e "LOGS/refuse-$1" ] && { echo "Job for ${@: -1} failed." >&2; exit 1; }
value() { sed -n "s/^$1=//p" "$file"; }
pid=LOGS/${@: -1}.pid log=LOGS/${@: -1}.log
case "$1 $2" in
  "daemon-reload ") ;;
  "enable --now")
    if [ "$(value Type)" = oneshot ]; then
      $(value ExecStart) >>"$log" 2>&1 || { echo "${@: -1} failed" >&2; exit 1; }
    else
      setsid timeout -k 20 180 $(value ExecStart) >>"$log" 2>&1 </dev/null &
      echo $! >"$pid"
    fi ;;
  "disable --now")
    stop=$(value ExecStop)
    [ -z "$stop" ] || $stop >>"$log" 2>&1
    if [ -f "$pid" ]; then
      kill -TERM "$(cat "$pid")"
      while kill -0 "$(cat "$pid")" 2>/dev/null; do sleep 0.02; done
      rm "$pid"
    fi ;;
  *) echo "Unknown command $*" >&2; exit 1 ;;
esac
"#;

/// What a machine is like: its rules, its routes, and every file with its mode and contents.
#[derive(Debug, PartialEq, Eq)]
pub struct Likeness {
    rules: String,
    routes: String,
    files: Vec<(PathBuf, u32, String)>,
}

pub struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    /// With systemd, as far as anybody can tell, or without.
    pub fn new(systemd: bool) -> Result<Self> {
        let machine = Self { dir: tempfile::tempdir()? };
        for dir in ["root/etc", "root/var/lib", "bin", "logs"] {
            std::fs::create_dir_all(machine.path(dir))?;
        }
        std::fs::write(machine.path("root/etc/resolv.conf"), RESOLV_CONF)?;
        if systemd {
            std::fs::create_dir_all(machine.path("root/run/systemd/system"))?;
            std::fs::create_dir_all(machine.path("root/etc/systemd/system"))?;
            let text = SYSTEMCTL
                .replace("ROOT", &machine.root())
                .replace("LOGS", &machine.path("logs").display().to_string());
            let program = machine.path("bin/systemctl");
            std::fs::write(&program, text)?;
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
        }
        Ok(machine)
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }
    pub fn root(&self) -> String {
        self.path("root").display().to_string()
    }
    /// A file of the machine.
    pub fn file(&self, below: &str) -> Result<String> {
        let path = self.path("root").join(below);
        std::fs::read_to_string(&path).with_context(|| path.display().to_string())
    }
    /// Lets `systemctl enable` (or `disable`) fail, or work again.
    pub fn refuse(&self, verb: &str, refuse: bool) -> Result<()> {
        let mark = self.path(&format!("logs/refuse-{verb}"));
        if refuse {
            std::fs::write(mark, "")?
        } else {
            std::fs::remove_file(mark)?
        };
        Ok(())
    }
    pub fn sidecar_log(&self) -> String {
        std::fs::read_to_string(self.path("logs/tombolo-sidecar.service.log")).unwrap_or_default()
    }

    /// `tombolo vm <args>` on the machine.
    pub fn vm(&self, namespace: &Namespace, args: &[&str]) -> Result<Ended> {
        let path = format!("PATH={}:{}", self.path("bin").display(), "/usr/sbin:/usr/bin:/sbin:/bin");
        let (bin, root) = (binary()?.display().to_string(), self.root());
        run(namespace, "env", &[&[path.as_str(), &bin, "vm"], args, &["--root", &root]].concat(), "")
    }

    pub fn likeness(&self, namespace: &Namespace) -> Result<Likeness> {
        let mut files = Vec::new();
        walk(&self.path("root"), &mut files)?;
        files.sort();
        // The capture's own: others come and go by themselves, such as those of IPv6's address detection.
        let routes = ["-4", "-6"].map(|family| [family, "route", "show", "proto", "116"]);
        let routes = routes.iter().map(|args| run(namespace, "ip", args, "")?.ok());
        let routes = routes.collect::<Result<String>>()?;
        Ok(Likeness { rules: ruleset(namespace)?, routes, files })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let pid = std::fs::read_to_string(self.path("logs/tombolo-sidecar.service.pid"));
        if let Some(pid) = pid.ok().and_then(|text| text.trim().parse().ok()) {
            let _ =
                nix::sys::signal::killpg(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

fn walk(dir: &Path, files: &mut Vec<(PathBuf, u32, String)>) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let metadata = path.symlink_metadata()?;
        let text = if metadata.is_file() {
            String::from_utf8_lossy(&std::fs::read(&path)?).into_owned()
        } else {
            String::new()
        };
        files.push((path.clone(), metadata.mode(), text));
        if metadata.is_dir() {
            walk(&path, files)?;
        }
    }
    Ok(())
}
