//! The application's first bytes, kept until an answer comes back, so that another endpoint can be given the same ones.
//!
//! Bounded: beyond [`MAX_BYTES`] the stream is committed to its endpoint. After the commit, recording costs one atomic
//! load per chunk.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

/// Requests fit; uploads commit.
pub const MAX_BYTES: usize = 64 * 1024;

/// What was kept.
#[derive(Debug, Default, Clone)]
pub struct Kept {
    pub chunks: Vec<Bytes>,
    /// The application has ended its direction.
    pub ended: bool,
    bytes: usize,
}

impl Kept {
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[derive(Debug)]
pub struct Replay {
    open: AtomicBool,
    kept: Mutex<Kept>,
}

impl Default for Replay {
    fn default() -> Self {
        Self { open: AtomicBool::new(true), kept: Mutex::default() }
    }
}

impl Replay {
    /// Keeps a chunk that is about to be sent.
    pub fn record(&self, chunk: &Bytes) {
        if !self.open.load(Ordering::Relaxed) {
            return;
        }
        let mut kept = self.lock();
        if kept.bytes + chunk.len() > MAX_BYTES {
            *kept = Kept::default();
            self.open.store(false, Ordering::Relaxed);
            return;
        }
        kept.bytes += chunk.len();
        kept.chunks.push(chunk.clone());
    }

    /// The application has ended its direction.
    pub fn record_end(&self) {
        self.lock().ended = true;
    }

    /// An answer has come, or too much was sent: nothing is kept from here on.
    pub fn commit(&self) {
        if self.open.swap(false, Ordering::Relaxed) {
            *self.lock() = Kept::default();
        }
    }

    /// What would have to be sent again; `None` once committed.
    pub fn kept(&self) -> Option<Kept> {
        self.open.load(Ordering::Relaxed).then(|| self.lock().clone())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_is_kept_in_order_until_the_commit() {
        let replay = Replay::default();
        replay.record(&Bytes::from_static(b"GET "));
        replay.record(&Bytes::from_static(b"/"));
        replay.record_end();
        let kept = replay.kept().unwrap();
        assert_eq!((kept.chunks.concat(), kept.bytes(), kept.ended), (b"GET /".to_vec(), 5, true));
        replay.commit();
        assert!(replay.kept().is_none());
    }

    #[test]
    fn more_than_the_limit_commits_and_frees() {
        let replay = Replay::default();
        replay.record(&Bytes::from(vec![0; MAX_BYTES]));
        assert!(replay.kept().is_some());
        replay.record(&Bytes::from_static(b"x"));
        assert!(replay.kept().is_none());
        assert!(replay.lock().chunks.is_empty());
    }
}
