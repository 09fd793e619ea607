//! Runtimes: one-thread tokio runtimes on the byte path, as many as the CPU quota of the cgroup allows.
//!
//! The small-request rate of a one-thread runtime is about twice that of the multi-thread scheduler (design section 3),
//! so a process that may use more cores runs several of these, each with sockets of its own.

use std::future::Future;
use std::io;
use std::num::NonZeroUsize;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

/// Blocking work on the byte path is rare (a lease written to disk, a name resolved); each idle thread costs a stack.
const MAX_BLOCKING_THREADS: usize = 4;
/// Blocking threads go soon after their work: an idle sidecar's memory is a promised figure.
const BLOCKING_KEEP_ALIVE: Duration = Duration::from_secs(5);

/// A runtime on the calling thread.
pub fn one_thread() -> io::Result<Runtime> {
    Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .thread_keep_alive(BLOCKING_KEEP_ALIVE)
        .thread_name("tombolo-blocking")
        .build()
}

/// Cores this process may use: the least of its CPU affinity and the quota of every cgroup above it (v1 and v2),
/// rounded down, at least one. The standard library reads both.
pub fn parallelism() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// How many byte-path threads to run: what was asked for, or everything the quota allows; never more than it allows
/// when `asked` is absent, and never zero.
pub fn threads(asked: Option<NonZeroUsize>) -> NonZeroUsize {
    asked.unwrap_or_else(parallelism)
}

/// Runs `work` on a thread of its own with a one-thread runtime.
pub fn spawn_thread<F, Fut>(name: String, work: F) -> io::Result<JoinHandle<io::Result<Fut::Output>>>
where
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future,
    Fut::Output: Send + 'static,
{
    std::thread::Builder::new().name(name).spawn(move || Ok(one_thread()?.block_on(work())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thread_has_a_runtime_of_its_own() {
        let id = |name: &str| {
            spawn_thread(name.to_owned(), || async { std::thread::current().id() })
                .unwrap()
                .join()
                .unwrap()
                .unwrap()
        };
        assert_ne!(id("a"), id("b"));
    }

    #[test]
    fn what_was_asked_for_wins_over_the_quota() {
        let seven = NonZeroUsize::new(7);
        assert_eq!(Some(threads(seven)), seven);
        assert!(threads(None) <= parallelism());
    }
}
