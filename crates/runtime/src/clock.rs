//! Wall-clock time, read in one place so that everything else has it passed in.
//!
//! `TOMBOLO_CLOCK_OFFSET_SECONDS` is read once per process: scenario tests shift a role's clock with it. `@FILE` names a file
//! with the seconds instead, which is looked at again and again: a clock that a test moves while the process runs.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often a file is looked at.
const LOOK: Duration = Duration::from_millis(100);

enum Offset {
    Fixed(i64),
    Follows { path: PathBuf, seconds: AtomicI64, origin: Instant, next_look_ms: AtomicU64 },
}

impl Offset {
    fn of(text: Option<&str>) -> Self {
        match text {
            Some(text) if text.starts_with('@') => Self::Follows {
                path: text.trim_start_matches('@').into(),
                seconds: AtomicI64::new(0),
                origin: Instant::now(),
                next_look_ms: AtomicU64::new(0),
            },
            text => Self::Fixed(text.and_then(|text| text.parse().ok()).unwrap_or(0)),
        }
    }

    fn seconds(&self) -> i64 {
        match self {
            Self::Fixed(seconds) => *seconds,
            Self::Follows { path, seconds, origin, next_look_ms } => {
                let now = u64::try_from(origin.elapsed().as_millis()).unwrap_or(u64::MAX);
                if now >= next_look_ms.load(Relaxed) {
                    next_look_ms.store(now.saturating_add(LOOK.as_millis() as u64), Relaxed);
                    let read = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok());
                    // One that is being written is as it was.
                    read.inspect(|read| seconds.store(*read, Relaxed));
                }
                seconds.load(Relaxed)
            }
        }
    }
}

fn offset_seconds() -> i64 {
    static OFFSET: OnceLock<Offset> = OnceLock::new();
    #[allow(clippy::disallowed_methods)] // this module is the owner of the clock
    let read = || Offset::of(std::env::var("TOMBOLO_CLOCK_OFFSET_SECONDS").ok().as_deref());
    OFFSET.get_or_init(read).seconds()
}

/// Time since the Unix epoch.
pub fn since_unix_epoch() -> Duration {
    #[allow(clippy::disallowed_methods)]
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let offset = offset_seconds();
    let shift = Duration::from_secs(offset.unsigned_abs());
    if offset < 0 { now.saturating_sub(shift) } else { now + shift }
}

/// Whole seconds since the Unix epoch.
pub fn unix_seconds() -> u64 {
    since_unix_epoch().as_secs()
}

/// Wall-clock time as [`SystemTime`].
pub fn now() -> SystemTime {
    UNIX_EPOCH + since_unix_epoch()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_as_far_off_as_the_variable_or_the_file_says() {
        assert_eq!(Offset::of(None).seconds(), 0);
        assert_eq!(Offset::of(Some("-540")).seconds(), -540);
        assert_eq!(Offset::of(Some("noon")).seconds(), 0);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("clock");
        let follows = Offset::of(Some(&format!("@{}", path.display())));
        assert_eq!(follows.seconds(), 0, "not there yet");
        for (written, expected) in [("3600\n", 3600), ("", 3600), ("-7", -7)] {
            std::fs::write(&path, written).unwrap();
            std::thread::sleep(LOOK + Duration::from_millis(20));
            assert_eq!(follows.seconds(), expected);
        }
    }
}
