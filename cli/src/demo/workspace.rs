//! The demo's directory: below the platform's state directory, private, removed at the end. What an earlier demo left
//! behind because it was killed is swept at the next start.

use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use tombolo_runtime::dirs::{self, Dirs};

use crate::failure::Failure;

const NAME: &str = "demo-";

/// Removed on drop unless kept.
#[derive(Debug)]
pub struct Workspace {
    pub path: PathBuf,
    keep: bool,
}

impl Workspace {
    pub fn create(keep: bool) -> Result<Self, Failure> {
        let base = Dirs::from_environment().map_err(Failure::new)?.state;
        sweep(&base);
        let path = base.join(format!("{NAME}{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        dirs::ensure_private(&path).map_err(Failure::new)?;
        let workspace = Self { path, keep };
        for below in ["logs", "east", "west"] {
            dirs::ensure_private(&workspace.path.join(below)).map_err(Failure::new)?;
        }
        Ok(workspace)
    }

    /// Keeps the directory after all, for logs that explain a failure.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    pub fn is_kept(&self) -> bool {
        self.keep
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.path);
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
        if !alive && !entry.path().join("kept").exists() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Marks a directory that is to stay after its process.
pub fn mark_kept(path: &Path) {
    let _ = std::fs::write(path.join("kept"), "");
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
        mark_kept(&kept);
        sweep(&base);
        let left = [gone.exists(), kept.exists(), mine.exists()];
        std::fs::remove_dir_all(&base).unwrap();
        assert_eq!(left, [false, true, true]);
    }
}
