//! When an endpoint is asked next. Pure.

use std::time::Duration;

use super::Federation;

/// After a first failure; doubled with each, up to the refresh interval, at which the specification wants failed polls
/// repeated: a restart of the endpoint should not cost five minutes.
const FIRST_RETRY: Duration = Duration::from_secs(2);
/// Whole seconds of jitter would be none for a short interval: a tenth of it, so that clusters of one federation that
/// were started together do not ask together for ever.
const JITTER: f64 = 0.1;

/// How long after an attempt the next follows; `failures` in a row; `random` in 0..1.
pub(super) fn next(federation: &Federation, failures: u32, random: f64) -> Duration {
    let refresh = federation.refresh();
    let wait = match failures.checked_sub(1) {
        None => refresh,
        Some(doublings) => FIRST_RETRY.saturating_mul(1 << doublings.min(20)).min(refresh),
    };
    wait.mul_f64(1.0 - JITTER * random.clamp(0.0, 1.0))
}
