//! The units of a joined machine, and the service manager that runs them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::place::Place;
use crate::failure::Failure;

pub const SIDECAR_UNIT: &str = "tombolo-sidecar.service";
pub const CAPTURE_UNIT: &str = "tombolo-capture.service";
const SIDECAR: &str = include_str!("../../../../deploy/systemd/tombolo-sidecar.service");
const CAPTURE: &str = include_str!("../../../../deploy/systemd/tombolo-capture.service");
/// What the unit files of `deploy/` say, for packages.
const PACKAGED_BINARY: &str = "/usr/bin/tombolo";
const PACKAGED_SETTINGS: &str = "/etc/tombolo/";

/// The file of a unit where no package and no operator has put one already.
pub fn unit(place: &Place, name: &str, binary: &Path) -> Option<(PathBuf, String)> {
    let path = place.units().join(name);
    let there = is_there(place, name);
    let text = if name == CAPTURE_UNIT { CAPTURE } else { SIDECAR };
    let settings = format!("{}/", place.settings().display());
    let text =
        text.replace(PACKAGED_BINARY, &binary.display().to_string()).replace(PACKAGED_SETTINGS, &settings);
    (!there).then_some((path, text))
}

/// Whether a package, an operator or a join has put this unit in place.
pub fn is_there(place: &Place, name: &str) -> bool {
    place.packaged_units().into_iter().chain([place.units()]).any(|dir| dir.join(name).exists())
}

/// What the sidecar of a machine needs beyond the unit: to mark its connections, and to serve names on port 53.
pub fn drop_in(place: &Place, capture: bool, low_port: bool) -> Option<(PathBuf, String)> {
    let needed = [(capture, "CAP_NET_RAW"), (low_port, "CAP_NET_BIND_SERVICE")];
    let needed: Vec<&str> = needed.iter().filter(|(needed, _)| *needed).map(|(_, name)| *name).collect();
    let text = format!(
        "# Written by `tombolo vm join`; `tombolo vm leave` takes it away.\n[Service]\nAmbientCapabilities={}\n",
        needed.join(" ")
    );
    let path = place.units().join(format!("{SIDECAR_UNIT}.d")).join("vm-join.conf");
    (!needed.is_empty()).then_some((path, text))
}

/// Runs `systemctl` to its end.
pub fn systemctl(args: &[&str]) -> Result<(), Failure> {
    let line = args.join(" ");
    let output = Command::new("systemctl").args(args).stdin(Stdio::null()).output().map_err(|error| {
        Failure::new(format_args!("systemctl can't be run: {error}"))
            .remedy("give --no-systemd where something else is to run the sidecar")
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said =
        said.lines().find(|text| !text.trim().is_empty()).unwrap_or("it says no reason").trim().to_owned();
    Err(Failure::new(format_args!("systemctl {line}: {said}"))
        .remedy("see `systemctl status tombolo-sidecar` and `journalctl -u tombolo-sidecar`"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmd::vm::place::Root;

    fn place(dir: &Path) -> Place {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            root: Root,
        }
        let line = <Line as clap::Parser>::parse_from(["line", "--root", &dir.display().to_string()]);
        line.root.place().unwrap()
    }

    #[test]
    fn a_unit_runs_this_binary_with_these_settings_and_a_packaged_one_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path());
        for name in [SIDECAR_UNIT, CAPTURE_UNIT] {
            let (path, text) = unit(&place, name, Path::new("/opt/tombolo")).unwrap();
            assert_eq!(path, dir.path().join("etc/systemd/system").join(name));
            assert!(
                text.contains("ExecStart=/opt/tombolo sidecar") && !text.contains("/usr/bin/tombolo"),
                "{text}"
            );
            assert!(text.contains(&format!("--config {}/etc/tombolo/", dir.path().display())), "{text}");
        }
        let packaged = dir.path().join("usr/lib/systemd/system");
        std::fs::create_dir_all(&packaged).unwrap();
        std::fs::write(packaged.join(SIDECAR_UNIT), SIDECAR).unwrap();
        assert_eq!(unit(&place, SIDECAR_UNIT, Path::new("/opt/tombolo")), None);
        assert!(unit(&place, CAPTURE_UNIT, Path::new("/opt/tombolo")).is_some());
    }

    #[test]
    fn the_sidecar_gets_no_capability_that_it_does_not_need() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path());
        assert_eq!(drop_in(&place, false, false), None);
        assert!(drop_in(&place, true, false).unwrap().1.ends_with("AmbientCapabilities=CAP_NET_RAW\n"));
        assert!(drop_in(&place, true, true).unwrap().1.contains("CAP_NET_RAW CAP_NET_BIND_SERVICE"));
    }
}
