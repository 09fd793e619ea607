//! Which services the federator is asked for because an application has called one of their addresses.
//!
//! A cluster may have ten thousand names, and a workload calls a handful: those are asked for when they are first called,
//! and kept for as long as there is room. One writer at a time (a lock held for a map's operation); the control task
//! follows [`Wanted::changes`].

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::watch;
use tombolo_model::names::ServiceKey;

/// What one federator sends to one sidecar (its `MAX_UPSTREAMS`), those of the configuration included.
pub const MAX_SERVICES: usize = 256;

#[derive(Clone, Debug)]
pub struct Wanted(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    fixed: HashSet<ServiceKey>,
    most: usize,
    services: Mutex<HashMap<ServiceKey, Use>>,
    published: watch::Sender<Vec<ServiceKey>>,
}

#[derive(Debug)]
struct Use {
    open: usize,
    last: Instant,
}

/// Held by a connection for as long as it needs the service: a service in use is not dropped for another.
#[derive(Debug)]
pub struct InUse {
    wanted: Wanted,
    service: ServiceKey,
}

impl Wanted {
    /// `fixed`: what the configuration names by itself, which is asked for in any case.
    pub fn new(fixed: HashSet<ServiceKey>) -> Self {
        let most = MAX_SERVICES.saturating_sub(fixed.len());
        let (published, _) = watch::channel(Vec::new());
        Self(Arc::new(Inner { fixed, most, services: Mutex::default(), published }))
    }

    /// What was wanted before a restart, as far as there is room.
    pub fn restore(&self, services: impl IntoIterator<Item = ServiceKey>, now: Instant) {
        let mut wanted = self.0.services.lock().unwrap_or_else(PoisonError::into_inner);
        for service in services {
            if wanted.len() < self.0.most && !self.0.fixed.contains(&service) {
                wanted.entry(service).or_insert(Use { open: 0, last: now });
            }
        }
        self.publish(&wanted);
    }

    /// `None`: as many services as there is room for are all in use.
    pub fn want(&self, service: &ServiceKey, now: Instant) -> Option<InUse> {
        let in_use = InUse { wanted: self.clone(), service: service.clone() };
        if self.0.fixed.contains(service) {
            return Some(in_use);
        }
        let mut wanted = self.0.services.lock().unwrap_or_else(PoisonError::into_inner);
        let known = wanted.contains_key(service);
        if !known && wanted.len() >= self.0.most {
            let idle = wanted.iter().filter(|(_, used)| used.open == 0);
            let oldest = idle.min_by_key(|(_, used)| used.last).map(|(service, _)| service.clone())?;
            wanted.remove(&oldest);
        }
        let used = wanted.entry(service.clone()).or_insert(Use { open: 0, last: now });
        used.open += 1;
        used.last = now;
        if !known {
            self.publish(&wanted);
        }
        Some(in_use)
    }

    /// The services beside the fixed ones, in order, whenever they change.
    pub fn changes(&self) -> watch::Receiver<Vec<ServiceKey>> {
        self.0.published.subscribe()
    }

    fn publish(&self, wanted: &HashMap<ServiceKey, Use>) {
        let mut services: Vec<_> = wanted.keys().cloned().collect();
        services.sort();
        self.0.published.send_if_modified(|published| {
            let changed = *published != services;
            *published = services;
            changed
        });
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut wanted = self.wanted.0.services.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(used) = wanted.get_mut(&self.service) {
            used.open = used.open.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn key(name: &str) -> ServiceKey {
        format!("shop/{name}").parse().unwrap()
    }

    /// With room for `room` services beside the fixed ones.
    fn room(room: usize) -> Wanted {
        Wanted::new((room..MAX_SERVICES).map(|n| key(&format!("fixed-{n}"))).collect())
    }

    #[test]
    fn a_service_of_the_configuration_takes_no_room() {
        let (wanted, now) = (room(1), Instant::now());
        let _fixed = wanted.want(&key("fixed-7"), now).unwrap();
        let _other = wanted.want(&key("web"), now).unwrap();
        assert_eq!(*wanted.changes().borrow(), [key("web")]);
    }

    #[test]
    fn a_service_is_asked_for_once_and_kept() {
        let (wanted, now) = (room(9), Instant::now());
        let mut changes = wanted.changes();
        drop(wanted.want(&key("web"), now));
        assert!(changes.has_changed().unwrap());
        assert_eq!(*changes.borrow_and_update(), [key("web")]);
        drop(wanted.want(&key("web"), now));
        assert!(!changes.has_changed().unwrap(), "known already");
    }

    #[test]
    fn the_one_unused_for_longest_makes_room_and_one_in_use_never_does() {
        let (wanted, start) = (room(2), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let held = wanted.want(&key("a"), at(0)).unwrap();
        drop(wanted.want(&key("b"), at(1)));
        drop(wanted.want(&key("c"), at(2)).unwrap());
        assert_eq!(*wanted.changes().borrow(), [key("a"), key("c")], "b gave way, a is in use");
        let second = wanted.want(&key("c"), at(3)).unwrap();
        assert!(wanted.want(&key("d"), at(4)).is_none(), "both are in use");
        drop((held, second));
        assert!(wanted.want(&key("d"), at(5)).is_some());
    }

    #[test]
    fn a_restart_continues_with_what_was_wanted() {
        let wanted = room(1);
        wanted.restore([key("fixed-9"), key("b"), key("a")], Instant::now());
        assert_eq!(*wanted.changes().borrow(), [key("b")], "as far as there is room");
    }
}
