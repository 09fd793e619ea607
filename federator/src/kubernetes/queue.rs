//! Which service is looked at next (pure, time passed in): once however often it is touched, none twice at the same time,
//! and one in trouble not before its time. Every question takes logarithmic time: a cluster may have thousands waiting.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;
use tombolo_model::names::ServiceKey;

/// Services that are to be looked at.
#[derive(Clone, Debug, Default)]
pub struct Queue {
    due: BTreeSet<ServiceKey>,
    later: BTreeMap<ServiceKey, Instant>,
    /// Those of `later`, the soonest first.
    times: BTreeSet<(Instant, ServiceKey)>,
    /// Services that are being written.
    busy: BTreeSet<ServiceKey>,
}

impl Queue {
    /// It is to be looked at, at once or at a time. One that is busy is looked at when that is over, in any case.
    pub fn touch(&mut self, service: ServiceKey, not_before: Option<Instant>, now: Instant) {
        if self.busy.contains(&service) {
            return;
        }
        if let Some(before) = self.later.remove(&service) {
            self.times.remove(&(before, service.clone()));
        }
        match not_before.filter(|time| *time > now) {
            Some(time) => {
                self.due.remove(&service);
                self.later.insert(service.clone(), time);
                self.times.insert((time, service));
            }
            None => drop(self.due.insert(service)),
        }
    }

    /// Takes the next one out.
    pub fn next(&mut self, now: Instant) -> Option<ServiceKey> {
        while let Some((time, _)) = self.times.first()
            && *time <= now
            && let Some((_, service)) = self.times.pop_first()
        {
            self.later.remove(&service);
            self.due.insert(service);
        }
        self.due.pop_first()
    }

    /// It is being written.
    pub fn begin(&mut self, service: ServiceKey) {
        self.busy.insert(service);
    }

    /// It has been written: it is to be looked at again.
    pub fn end(&mut self, service: ServiceKey, not_before: Option<Instant>, now: Instant) {
        self.busy.remove(&service);
        self.touch(service, not_before, now);
    }

    /// When one is due that is not yet.
    pub fn next_time(&self) -> Option<Instant> {
        self.times.first().map(|(time, _)| *time)
    }

    pub fn busy(&self) -> usize {
        self.busy.len()
    }

    /// Those that wait.
    pub fn waiting(&self) -> usize {
        self.due.len() + self.later.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn key(name: &str) -> ServiceKey {
        format!("shop/{name}").parse().unwrap()
    }

    #[test]
    fn each_is_looked_at_once_when_it_is_due_and_never_while_it_is_busy() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut queue = Queue::default();
        queue.touch(key("a"), None, start);
        queue.touch(key("a"), None, start);
        queue.touch(key("b"), Some(at(5)), start);
        assert_eq!((queue.waiting(), queue.next_time()), (2, Some(at(5))));
        assert_eq!(queue.next(start), Some(key("a")));
        queue.begin(key("a"));
        queue.touch(key("a"), None, start);
        assert_eq!(queue.next(at(4)), None, "a is busy, b has its time");
        assert_eq!(queue.next(at(5)), Some(key("b")));
        queue.end(key("a"), Some(at(9)), at(5));
        queue.touch(key("a"), Some(at(8)), at(5));
        assert_eq!((queue.next_time(), queue.next(at(7))), (Some(at(8)), None));
        queue.touch(key("a"), None, at(7));
        assert_eq!(queue.next(at(7)), Some(key("a")), "its trouble is over");
        assert_eq!((queue.waiting(), queue.next_time(), queue.busy()), (0, None, 0));
    }
}
