//! Undoing what `vm join` has made, the last first: for `vm leave`, and for a join that failed. What can't be undone stays
//! recorded, and is named.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use super::place::Place;
use super::record::{Made, Record};
use super::{deregister, systemd};
use crate::cmd::sidecar::{capture, dns};
use crate::failure::Failure;

pub fn failed(action: &str, path: &Path, error: &io::Error) -> Failure {
    let failure = Failure::new(format_args!("{action} {}: {error}", path.display()));
    match error.kind() {
        io::ErrorKind::PermissionDenied => failure.remedy("run it as root"),
        _ => failure,
    }
}

/// Where the resolver's files are.
pub fn names(place: &Place, dry_run: bool) -> dns::Place {
    dns::Place {
        dry_run,
        resolv_conf: place.resolv_conf(),
        resolved_dir: place.resolved_drop_ins(),
        state_dir: place.state(),
    }
}

/// What one entry's undoing is called.
pub fn describe(made: &Made) -> String {
    match made {
        Made::File(path) => format!("delete {}", path.display()),
        Made::Directory(path) => format!("delete {}, if it is empty", path.display()),
        Made::Identity(path) => {
            format!("tell the federator, and delete the identity in {}", path.display())
        }
        Made::CaptureRules => "take the capture rules away".to_owned(),
        Made::Unit(name) => format!("stop and disable {name}"),
        Made::Names => "put the machine's resolver back".to_owned(),
    }
}

/// Undoes everything; what failed, for people. `say` hears what was done.
pub fn everything(
    place: &Place,
    record: &mut Record,
    patience: Duration,
    say: &mut dyn FnMut(String),
) -> Vec<String> {
    let mut failures = Vec::new();
    let mut left = Vec::new();
    let (directories, made): (Vec<Made>, Vec<Made>) =
        std::mem::take(&mut record.made).into_iter().partition(|made| matches!(made, Made::Directory(_)));
    let mut runs = false;
    let units = made.iter().any(|made| matches!(made, Made::Unit(_)));
    for entry in made.into_iter().rev() {
        // Nothing is taken from under a process that could not be stopped.
        if runs {
            left.push(entry);
            continue;
        }
        match one(place, &entry, patience) {
            Ok(said) => say(said),
            Err(failure) => {
                failures.push(failure.to_string());
                runs = matches!(entry, Made::Unit(_));
                left.push(entry);
            }
        }
    }
    if units && let Err(failure) = systemd::systemctl(&["daemon-reload"]) {
        failures.push(failure.to_string());
    }
    if failures.is_empty() {
        if let Err(error) = fs::remove_file(place.record())
            && error.kind() != io::ErrorKind::NotFound
        {
            failures.push(failed("can't delete", &place.record(), &error).to_string());
        }
        for entry in directories.into_iter().rev() {
            let Made::Directory(path) = entry else { continue };
            if let Some(kept) = empty(&path) {
                say(kept);
            }
        }
        return failures;
    }
    left.reverse();
    record.made = directories.into_iter().chain(left).collect();
    record.complete = false;
    if let Err(failure) = record.save(place) {
        failures.push(failure.to_string());
    }
    failures
}

fn one(place: &Place, made: &Made, patience: Duration) -> Result<String, Failure> {
    match made {
        Made::File(path) => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed("can't delete", path, &error))
            }
            _ => Ok(format!("deleted {}", path.display())),
        },
        Made::Directory(path) => Ok(format!("left {}", path.display())),
        Made::Identity(path) => {
            let said = deregister::farewell(path, patience)?;
            match fs::remove_dir_all(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(failed("can't delete", path, &error))
                }
                _ => Ok(format!("{said}; deleted {}", path.display())),
            }
        }
        Made::CaptureRules => {
            let there = capture::take_away(None)?;
            Ok(if there { "took the capture rules away" } else { "the capture rules were gone already" }
                .to_owned())
        }
        Made::Unit(name) if !systemd::is_there(place, name) => Ok(format!("{name} was gone already")),
        Made::Unit(name) => {
            systemd::systemctl(&["disable", "--now", name])?;
            Ok(format!("stopped and disabled {name}"))
        }
        Made::Names => {
            dns::put_away(&names(place, false))?;
            Ok("the resolver is the machine's own again".to_owned())
        }
    }
}

/// Deletes a directory that join made, if nothing is left in it; what is kept is said. systemd may have moved a state
/// directory behind a link.
fn empty(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok().map(|target| path.with_file_name(target));
    let removed = match &target {
        Some(target) => fs::remove_dir(target).and_then(|()| fs::remove_file(path)),
        None => fs::remove_dir(path),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
            Some(format!("kept {}: there is something else in it", path.display()))
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Some(format!("kept {}: {error}", path.display()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_goes_only_when_it_is_empty_and_so_does_what_a_link_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        let full = dir.path().join("full");
        fs::create_dir_all(full.join("inner")).unwrap();
        assert!(empty(&full).unwrap().contains("something else"));
        assert!(full.exists());
        fs::create_dir_all(dir.path().join("private/tombolo")).unwrap();
        let link = dir.path().join("tombolo");
        std::os::unix::fs::symlink("private/tombolo", &link).unwrap();
        assert_eq!(empty(&link), None);
        assert!(!link.exists() && !dir.path().join("private/tombolo").exists());
        assert_eq!(empty(&dir.path().join("nothing")), None);
    }
}
