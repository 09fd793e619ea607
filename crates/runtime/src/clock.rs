//! Wall-clock time, read in one place so that everything else has it passed in.
//!
//! `TOMBOLO_CLOCK_OFFSET_SECONDS` is read once per process: scenario tests shift a role's clock with it.

use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

fn offset_seconds() -> i64 {
    static OFFSET: OnceLock<i64> = OnceLock::new();
    #[allow(clippy::disallowed_methods)] // this module is the owner of the clock
    *OFFSET.get_or_init(|| {
        std::env::var("TOMBOLO_CLOCK_OFFSET_SECONDS").ok().and_then(|v| v.parse().ok()).unwrap_or(0)
    })
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
