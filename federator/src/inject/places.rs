//! Who may hold a connection to the webhook (pure): the API server has to get a place however many others hold.
//!
//! So many connections in all, and so many of one source address. When a place is wanted and none is free, a connection that
//! is answering nothing ends for it: of the newcomer's own source when that has its share, else of the source that has most;
//! among them one that has asked nothing yet before others, and the one that has been so longest. Only where all of those are
//! being answered the newcomer is turned away, and that takes seconds at most ([`super::serve`]). The API server asks anew on
//! another connection when an idle one ends.

use std::collections::BTreeMap;
use std::net::IpAddr;

/// API servers keep a few connections each, some 10 of the largest clusters' a few dozens.
const ALL: usize = 256;
/// All API servers may come from one address, by a tunnel or a balancer.
const OF_ONE: usize = 64;

/// A connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Place(u64);

/// What a connection is doing, since a step of [`Places`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Doing {
    /// It has never asked anything.
    Nothing(u64),
    Idle(u64),
    Answering(u64),
}

#[derive(Debug)]
struct Held {
    source: IpAddr,
    doing: Doing,
}

/// Everybody's.
#[derive(Debug, Default)]
pub struct Places {
    held: BTreeMap<Place, Held>,
    of: BTreeMap<IpAddr, usize>,
    /// Numbers places and orders what happens to them.
    step: u64,
}

impl Places {
    /// A place for a connection from `source`, and whose connection has to end for it; `None`: it is turned away.
    pub fn take(&mut self, source: IpAddr) -> Option<(Place, Option<Place>)> {
        // A peer of IPv4 on a socket of both families.
        let source = source.to_canonical();
        let own = self.of.get(&source).copied().unwrap_or(0);
        let victim = if own >= OF_ONE {
            Some(self.ends_for(source)?)
        } else if self.held.len() >= ALL {
            let (most, _) = self.of.iter().max_by_key(|(_, count)| **count)?;
            Some(self.ends_for(*most)?)
        } else {
            None
        };
        if let Some(victim) = victim {
            self.leave(victim);
        }
        self.step += 1;
        let place = Place(self.step);
        self.held.insert(place, Held { source, doing: Doing::Nothing(self.step) });
        *self.of.entry(source).or_insert(0) += 1;
        Some((place, victim))
    }

    fn ends_for(&self, source: IpAddr) -> Option<Place> {
        let quiet = self.held.iter().filter(|(_, held)| held.source == source);
        let quiet = quiet.filter(|(_, held)| !matches!(held.doing, Doing::Answering(_)));
        quiet.min_by_key(|(_, held)| held.doing).map(|(place, _)| *place)
    }

    /// The connection answers from now on, or no more.
    pub fn answering(&mut self, place: Place, answering: bool) {
        self.step += 1;
        let doing = if answering { Doing::Answering(self.step) } else { Doing::Idle(self.step) };
        if let Some(held) = self.held.get_mut(&place) {
            held.doing = doing;
        }
    }

    /// The connection has ended; one that has ended for another's sake is gone already.
    pub fn leave(&mut self, place: Place) {
        let Some(Held { source, .. }) = self.held.remove(&place) else { return };
        let Some(count) = self.of.get_mut(&source) else { return };
        *count = count.saturating_sub(1);
        if *count == 0 {
            self.of.remove(&source);
        }
    }

    #[cfg(test)]
    fn count(&self) -> usize {
        self.held.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    fn take(places: &mut Places, n: u8, count: usize) -> Vec<Place> {
        (0..count).map(|_| places.take(source(n)).expect("a place").0).collect()
    }

    #[test]
    fn one_source_that_takes_all_it_can_leaves_places_for_others_and_ends_its_own() {
        let mut places = Places::default();
        let api = take(&mut places, 1, 3);
        let greedy = take(&mut places, 2, OF_ONE);
        assert_eq!(places.count(), OF_ONE + 3);
        let (next, ended) = places.take(source(2)).unwrap();
        assert_eq!(ended, greedy.first().copied(), "its own, and the oldest");
        assert!(next > greedy[OF_ONE - 1] && places.count() == OF_ONE + 3);
        assert!(api.iter().all(|place| places.held.contains_key(place)));
    }

    #[test]
    fn a_newcomer_gets_the_place_of_the_source_that_has_most() {
        let mut places = Places::default();
        let idle = take(&mut places, 1, 2);
        idle.iter().for_each(|place| places.answering(*place, false));
        let mut all = Vec::new();
        for n in 2..=5 {
            let count = (ALL - places.count()).min(OF_ONE);
            all.extend(take(&mut places, n, count));
        }
        assert_eq!(places.count(), ALL);
        let (_, ended) = places.take(source(9)).unwrap();
        assert!(ended.is_some_and(|ended| all.contains(&ended)), "{ended:?}");
        assert!(idle.iter().all(|place| places.held.contains_key(place)));
        assert_eq!(places.count(), ALL);
    }

    #[test]
    fn those_that_have_asked_nothing_end_first_then_the_longest_idle_and_never_one_that_is_answered() {
        let mut places = Places::default();
        let all = take(&mut places, 1, OF_ONE);
        for place in &all {
            places.answering(*place, true);
        }
        assert_eq!(places.take(source(1)), None, "all of its own are being answered");
        places.answering(all[7], false);
        places.answering(all[3], false);
        let (silent, ended) = places.take(source(1)).unwrap();
        assert_eq!(ended, Some(all[7]), "idle for longer than the other");
        let (_, ended) = places.take(source(1)).unwrap();
        assert_eq!(ended, Some(silent), "it has asked nothing, though it came last");
        places.leave(all[7]);
        assert_eq!(places.count(), OF_ONE, "one that ended for another's sake leaves once");
    }

    #[test]
    fn nothing_is_left_of_connections_that_have_ended() {
        let mut places = Places::default();
        let mapped: IpAddr = "::ffff:10.0.0.1".parse().unwrap();
        let (first, _) = places.take(mapped).unwrap();
        let (second, _) = places.take(source(1)).unwrap();
        assert_eq!(places.of.get(&source(1)), Some(&2), "the same source by either family");
        places.leave(first);
        places.leave(second);
        assert!(places.held.is_empty() && places.of.is_empty());
    }
}
