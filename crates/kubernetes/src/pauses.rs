//! How long a watch that failed waits.

use std::time::Duration;

use kube::runtime::utils::Backoff;
use kube::runtime::watcher::DefaultBackoff;

/// An API server that is back is heard within this: few processes of a cluster watch here, with some watches each.
const LONGEST: Duration = Duration::from_secs(5);

/// Kubernetes' own pauses, which grow to half a minute, cut short.
#[derive(Default)]
pub struct Pauses(DefaultBackoff);

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.0.next().map(|pause| pause.min(LONGEST))
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.0.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_the_longest_and_never_end() {
        let pauses: Vec<Duration> = Pauses::default().take(20).collect();
        assert_eq!((pauses.len(), pauses.last()), (20, Some(&LONGEST)));
        assert!(pauses.first().is_some_and(|first| *first < Duration::from_secs(2)));
    }
}
