//! What joining a machine takes, step by step: decided before anything is done, printed by `--dry-run`.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use tombolo_overlay::member::JoinPlan;

use super::place::Place;
use super::settings::Chosen;
use super::systemd::{self, CAPTURE_UNIT, SIDECAR_UNIT};

/// One step. Each is undone by what [`super::record`] keeps of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    Write {
        path: PathBuf,
        text: String,
    },
    /// The rules, as nft takes them.
    Capture {
        rules: String,
    },
    /// Uses the token up.
    Join {
        dir: PathBuf,
        as_whom: String,
        at: String,
    },
    Enable(&'static str),
    /// Waits until the sidecar serves.
    Ready(SocketAddr),
    Names {
        resolver: SocketAddr,
        file: PathBuf,
    },
}

/// What can fail without costing anything comes first, the token is used as late as it can be.
pub fn steps(place: &Place, chosen: &Chosen, plan: &JoinPlan, binary: &Path, systemd: bool) -> Vec<Step> {
    let write = |(path, text): (PathBuf, String)| Step::Write { path, text };
    let mut steps = vec![write((place.sidecar(), chosen.sidecar.clone()))];
    steps.extend(chosen.workload.iter().map(|text| write((place.workload(), text.clone()))));
    steps.extend(chosen.capture.iter().map(|(_, text)| write((place.capture(), text.clone()))));
    let units: Vec<&'static str> = [chosen.capture.is_some().then_some(CAPTURE_UNIT), Some(SIDECAR_UNIT)]
        .into_iter()
        .flatten()
        .collect();
    if systemd {
        steps.extend(units.iter().filter_map(|name| systemd::unit(place, name, binary)).map(write));
        let low_port = chosen.resolver.is_some_and(|resolver| resolver.port() < 1024);
        steps.extend(systemd::drop_in(place, chosen.capture.is_some(), low_port).map(write));
    }
    steps.extend(chosen.capture.iter().map(|(prepared, _)| Step::Capture { rules: prepared.rules() }));
    let at: Vec<String> = plan.addresses.iter().map(SocketAddr::to_string).collect();
    steps.push(Step::Join {
        dir: chosen.config.state_dir.clone(),
        as_whom: format!("{} of cluster {}", chosen.config.name, plan.cluster),
        at: at.join(", "),
    });
    if systemd {
        steps.extend(units.into_iter().map(Step::Enable));
        steps.push(Step::Ready(chosen.config.admin));
        steps.extend(chosen.resolver.map(|resolver| names(place, chosen, resolver)));
    }
    steps
}

fn names(place: &Place, chosen: &Chosen, resolver: SocketAddr) -> Step {
    let file =
        if chosen.resolved { place.resolved_drop_ins().join("tombolo.conf") } else { place.resolv_conf() };
    Step::Names { resolver, file }
}

/// What there is to do by hand where no service manager runs.
pub fn by_hand(place: &Place, chosen: &Chosen, binary: &Path) -> String {
    let binary = binary.display();
    let mut text = format!(
        "systemd does not run the sidecar here: start it, and have something start it again when it ends or the machine does\n  {binary} sidecar --config {}\n",
        place.sidecar().display()
    );
    if let Some(resolver) = chosen.resolver {
        let method = if chosen.resolved { "resolved" } else { "resolv-conf" };
        text += &format!(
            "once it runs, point this machine's resolver at it\n  {binary} sidecar dns install --resolver {resolver} --method {method} --resolv-conf {} --resolved-dir {} --state-dir {}\n",
            place.resolv_conf().display(),
            place.resolved_drop_ins().display(),
            place.state().display()
        );
    }
    if chosen.capture.is_some() {
        text += &format!(
            "the rules are in place until the machine is restarted; then, before the sidecar\n  {binary} sidecar capture apply --config {}\n",
            place.capture().display()
        );
    }
    text
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Write { path, text } => {
                writeln!(f, "write {}", path.display())?;
                text.lines().try_for_each(|line| writeln!(f, "  | {line}"))
            }
            Self::Capture { rules } => {
                writeln!(f, "put the capture rules in place, by nft")?;
                rules.lines().try_for_each(|line| writeln!(f, "  | {line}"))
            }
            Self::Join { dir, as_whom, at } => {
                writeln!(
                    f,
                    "join as {as_whom} at {at}: uses the token up; the identity is kept in {}",
                    dir.display()
                )
            }
            Self::Enable(unit) => writeln!(f, "systemctl enable --now {unit}"),
            Self::Ready(admin) => writeln!(f, "wait until the sidecar is ready ({admin})"),
            Self::Names { resolver, file } => {
                writeln!(f, "have names asked of {resolver} first, by {}", file.display())
            }
        }
    }
}
