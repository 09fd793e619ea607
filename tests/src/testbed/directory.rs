//! Where a testbed keeps everything; what killed ones left goes with the next.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

const NAME: &str = "tombolo-testbed-";

/// A directory whose name says whose it is.
pub struct Directory(pub PathBuf);

impl Directory {
    pub fn make() -> Result<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let temporary = std::env::temp_dir();
        for entry in std::fs::read_dir(&temporary)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let owner = name.strip_prefix(NAME).and_then(|rest| rest.split_once('-'));
            let owner = owner.and_then(|(pid, rest)| {
                Some((pid.parse().ok()?, rest.split('-').next()?.parse::<u64>().ok()?))
            });
            if owner.is_some_and(|(pid, started)| crate::usage::start_time(pid) != Some(started)) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let pid = std::process::id();
        let started = crate::usage::start_time(pid).context("read this process's start time")?;
        let path = temporary.join(format!("{NAME}{pid}-{started}-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
