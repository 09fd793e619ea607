//! The demo's directory: below the platform's state directory, private, removed at the end. What an earlier demo left
//! behind because it was killed is swept at the next start.

use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use tombolo_runtime::dirs::{self, Dirs};

use crate::failure::Failure;

const NAME: &str = "demo-";
const LOGS: &str = "logs";
/// Marks what `--keep` made.
const KEPT: &str = "kept";

/// What stays when the demo ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    Nothing,
    /// After a failure, until the next demo starts: logs explain it; keys and tokens go.
    Logs,
    /// Asked for by `--keep`.
    Everything,
}

/// Removed on drop, as far as [`Keep`] says.
#[derive(Debug)]
pub struct Workspace {
    pub path: PathBuf,
    keep: Keep,
}

impl Workspace {
    pub fn create(keep: Keep) -> Result<Self, Failure> {
        let base = Dirs::from_environment().map_err(Failure::new)?.state;
        sweep(&base);
        let path = base.join(format!("{NAME}{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        dirs::ensure_private(&path).map_err(Failure::new)?;
        let workspace = Self { path, keep };
        for below in [LOGS, "east", "west"] {
            dirs::ensure_private(&workspace.path.join(below)).map_err(Failure::new)?;
        }
        if keep == Keep::Everything {
            let _ = std::fs::write(workspace.path.join(KEPT), "");
        }
        Ok(workspace)
    }

    pub fn logs(&self) -> PathBuf {
        self.path.join(LOGS)
    }

    /// Keeps at least the logs.
    pub fn keep_logs(&mut self) {
        if self.keep == Keep::Nothing {
            self.keep = Keep::Logs;
        }
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        match self.keep {
            Keep::Everything => {}
            Keep::Nothing => drop(std::fs::remove_dir_all(&self.path)),
            Keep::Logs => {
                for entry in std::fs::read_dir(&self.path).into_iter().flatten().flatten() {
                    let path = entry.path();
                    if entry.file_name() != LOGS {
                        let _ = if path.is_dir() {
                            std::fs::remove_dir_all(path)
                        } else {
                            std::fs::remove_file(path)
                        };
                    }
                }
            }
        }
    }
}

/// Removes the directories of demos whose process is gone. Kept ones carry a marker.
fn sweep(base: &Path) {
    for entry in std::fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.strip_prefix(NAME)).and_then(|n| n.parse::<i32>().ok())
        else {
            continue;
        };
        let alive = nix::sys::signal::kill(Pid::from_raw(pid), None) != Err(nix::errno::Errno::ESRCH);
        if !alive && !entry.path().join(KEPT).exists() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_demo_left_is_swept_and_what_was_kept_stays() {
        let base = std::env::temp_dir().join(format!("tombolo-sweep-{}", std::process::id()));
        // Above the highest process id there can be.
        let (gone, kept, mine) = (
            base.join("demo-5000000"),
            base.join("demo-5000001"),
            base.join(format!("demo-{}", std::process::id())),
        );
        for path in [&gone, &kept, &mine] {
            std::fs::create_dir_all(path).unwrap();
        }
        std::fs::write(kept.join(KEPT), "").unwrap();
        sweep(&base);
        let left = [gone.exists(), kept.exists(), mine.exists()];
        std::fs::remove_dir_all(&base).unwrap();
        assert_eq!(left, [false, true, true]);
    }

    #[test]
    fn after_a_failure_the_logs_stay_and_the_secrets_go() {
        let path = std::env::temp_dir().join(format!("tombolo-keep-{}", std::process::id()));
        for below in [LOGS, "east"] {
            std::fs::create_dir_all(path.join(below)).unwrap();
        }
        std::fs::write(path.join("vm.token"), "secret").unwrap();
        let mut workspace = Workspace { path: path.clone(), keep: Keep::Nothing };
        workspace.keep_logs();
        drop(workspace);
        let left: Vec<_> =
            std::fs::read_dir(&path).unwrap().flatten().map(|entry| entry.file_name()).collect();
        std::fs::remove_dir_all(&path).unwrap();
        assert_eq!(left, [LOGS]);
    }
}
