//! What waits to be sent: bounded, the oldest gives way. Pure but for the waking.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

/// A flow's datagrams while it is opened, and those too large for a DATAGRAM frame: two of the largest there are.
pub const MAX_BYTES: usize = 128 * 1024;
/// Small ones cost more than their bytes.
pub const MAX_ITEMS: usize = 128;

/// Bounded in bytes and in number.
#[derive(Debug, Default)]
pub struct DropOldest {
    items: VecDeque<Bytes>,
    bytes: usize,
}

impl DropOldest {
    /// Returns how many had to give way.
    pub fn push(&mut self, item: Bytes) -> u64 {
        self.bytes += item.len();
        self.items.push_back(item);
        let mut dropped = 0;
        while self.bytes > MAX_BYTES || self.items.len() > MAX_ITEMS {
            self.pop();
            dropped += 1;
        }
        dropped
    }

    pub fn pop(&mut self) -> Option<Bytes> {
        let item = self.items.pop_front()?;
        self.bytes -= item.len();
        Some(item)
    }

    pub fn clear(&mut self) -> u64 {
        self.bytes = 0;
        self.items.drain(..).count() as u64
    }

    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }
}

/// What all queues of a sidecar may hold together: thousands of flows must not add up, nor do many sidecars of one process.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    most: usize,
    used: AtomicUsize,
    /// What it is a part of.
    whole: Option<Budget>,
}

impl Budget {
    pub fn new(most: usize) -> Self {
        Self(Arc::new(Inner { most, used: AtomicUsize::new(0), whole: None }))
    }
    /// A part of this one, of so much at most.
    pub fn part(&self, most: usize) -> Self {
        Self(Arc::new(Inner { most, used: AtomicUsize::new(0), whole: Some(self.clone()) }))
    }
    fn take(&self, bytes: usize) -> bool {
        let fits = |used: usize| Some(used + bytes).filter(|sum| *sum <= self.0.most);
        if self.0.used.fetch_update(Relaxed, Relaxed, fits).is_err() {
            return false;
        }
        let whole = self.0.whole.as_ref().is_none_or(|whole| whole.take(bytes));
        if !whole {
            self.0.used.fetch_sub(bytes, Relaxed);
        }
        whole
    }
    fn give(&self, bytes: usize) {
        self.0.used.fetch_sub(bytes, Relaxed);
        if let Some(whole) = &self.0.whole {
            whole.give(bytes);
        }
    }
}

/// The same between one task that fills it and one that empties it.
#[derive(Debug)]
pub struct Queue {
    items: Mutex<DropOldest>,
    more: Notify,
    budget: Budget,
}

impl Queue {
    pub fn new(budget: Budget) -> Self {
        Self { items: Mutex::default(), more: Notify::new(), budget }
    }

    /// Returns how many had to give way.
    pub fn push(&self, item: Bytes) -> u64 {
        let mut items = self.lock();
        let mut dropped = 0;
        while !self.budget.take(item.len()) {
            match items.pop() {
                Some(oldest) => self.budget.give(oldest.len()),
                // Others have it all.
                None => return dropped + 1,
            }
            dropped += 1;
        }
        let before = items.bytes + item.len();
        dropped += items.push(item);
        self.budget.give(before - items.bytes);
        drop(items);
        self.more.notify_one();
        dropped
    }

    /// Loses nothing when it is dropped before it ends.
    pub async fn next(&self) -> Bytes {
        loop {
            let item = self.lock().pop();
            if let Some(item) = item {
                self.budget.give(item.len());
                return item;
            }
            self.more.notified().await;
        }
    }

    /// Until there is something in it.
    pub async fn filled(&self) {
        while self.lock().is_empty() {
            self.more.notified().await;
        }
    }

    /// What is in it, and stays there.
    pub fn all(&self) -> Vec<Bytes> {
        self.lock().items.iter().cloned().collect()
    }

    /// Returns how many there were.
    pub fn clear(&self) -> u64 {
        let mut items = self.lock();
        self.budget.give(items.bytes);
        items.clear()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, DropOldest> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_gives_way_to_bytes_and_to_numbers() {
        let mut queue = DropOldest::default();
        assert_eq!((0..MAX_ITEMS).map(|n| queue.push(vec![n as u8].into())).sum::<u64>(), 0);
        assert_eq!(queue.push(Bytes::from_static(b"x")), 1);
        assert_eq!(queue.pop().unwrap()[..], [1]);
        assert_eq!(queue.push(vec![0; MAX_BYTES].into()), MAX_ITEMS as u64 - 1);
        assert_eq!((queue.pop().unwrap().len(), queue.pop()), (MAX_BYTES, None));
        assert_eq!(queue.push(vec![0; MAX_BYTES + 1].into()), 1, "one that never fits is dropped itself");
        assert!(queue.is_empty() && queue.bytes == 0);
    }

    #[tokio::test]
    async fn who_waits_gets_what_comes() {
        let queue = Queue::new(Budget::new(1000));
        let (got, _) = tokio::join!(queue.next(), async { queue.push(Bytes::from_static(b"a")) });
        assert_eq!(&got[..], b"a");
        queue.push(Bytes::from_static(b"b"));
        queue.filled().await;
        assert_eq!((&queue.next().await[..], queue.clear()), (&b"b"[..], 0));
    }

    #[test]
    fn parts_of_a_budget_have_their_own_bound_and_the_wholes_together() {
        let whole = Budget::new(15);
        let (one, other) = (Queue::new(whole.part(10)), Queue::new(whole.part(10)));
        assert_eq!(one.push(vec![1; 10].into()), 0);
        assert_eq!(other.push(vec![2; 6].into()), 1, "the whole is used up");
        assert_eq!(other.push(vec![3; 5].into()), 0);
        assert_eq!(one.push(vec![4; 10].into()), 1, "its own oldest gives way");
        assert_eq!(whole.0.used.load(Relaxed), 15);
        drop((one, other));
        assert_eq!(whole.0.used.load(Relaxed), 0);
    }

    #[test]
    fn all_queues_together_hold_what_the_budget_allows_and_give_it_back() {
        let budget = Budget::new(10);
        let (one, other) = (Queue::new(budget.clone()), Queue::new(budget.clone()));
        assert_eq!(one.push(vec![1; 6].into()) + other.push(vec![2; 4].into()), 0);
        assert_eq!(one.push(vec![3; 6].into()), 1, "its own oldest gives way");
        assert_eq!(Queue::new(budget.clone()).push(vec![4; 1].into()), 1, "one without any gets nothing");
        assert_eq!((one.all().len(), other.all().len()), (1, 1));
        drop((one, other));
        assert_eq!(budget.0.used.load(Relaxed), 0);
    }
}
