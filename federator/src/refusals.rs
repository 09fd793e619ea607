//! Refusals on their way into the audit log: told at once, then counted. Pure: the time is passed in.
//!
//! Anybody may be refused as often as they like, so a refusal costs a place in a bounded map and no commit. Once a second
//! what is due is written in one transaction: the first of a kind (action, subject, requester, token) at once, what
//! repeats it within [`WINDOW`] as one entry with a count. [`BURST`] and [`EVERY`] bound what all kinds together may
//! write; what is beyond, or does not fit into the map, is counted per action and written every [`REST_EVERY`]. So a
//! flood that lasts writes at most 2,880 + 144 per action entries a day, some 2 MB, whatever its rate, and a log of
//! 100,000 entries still reaches back for a month. A crash loses the refusals of the last second and running counts.

use std::collections::BTreeMap;
use std::time::Duration;

use tombolo_model::audit::{Action, Event, Requester};

/// Repetitions of one kind become one entry.
const WINDOW: Duration = Duration::from_secs(60);
/// Kinds that are told apart at a time; each is under a kilobyte.
const MOST_KINDS: usize = 64;
/// Entries of refusals that may come at once: a rollout with a wrong token shows each pod.
const BURST: f64 = 120.0;
/// And one more per so much time.
const EVERY: Duration = Duration::from_secs(30);
/// How often what was only counted is written.
const REST_EVERY: Duration = Duration::from_secs(600);

type Kind = (Action, String, Requester, String);

/// A kind that was seen in the present window.
#[derive(Debug)]
struct Seen {
    /// The newest of it.
    event: Event,
    /// Not written yet.
    count: u64,
    /// When `count` is written.
    due: Duration,
}

/// What was counted only.
#[derive(Debug)]
struct Rest {
    count: u64,
    due: Duration,
    last: String,
}

/// Refusals that are not written yet.
#[derive(Debug, Default)]
pub struct Refusals {
    kinds: BTreeMap<Kind, Seen>,
    rest: BTreeMap<Action, Rest>,
    /// Spent of the burst; falls with time.
    spent: f64,
    spent_at: Duration,
}

impl Refusals {
    /// `now` is since the process started.
    pub fn note(&mut self, event: Event, now: Duration) {
        let kind = (event.action, event.subject.clone(), event.requester.clone(), event.token.clone());
        if let Some(seen) = self.kinds.get_mut(&kind) {
            seen.count += event.count;
            seen.event = event;
        } else if self.kinds.len() < MOST_KINDS {
            let count = event.count;
            self.kinds.insert(kind, Seen { event, count, due: now });
        } else {
            self.count_only(event.action, event.count, event.reason, now);
        }
    }

    /// Those that nobody looked at: refused before they were read.
    pub fn count_only(&mut self, action: Action, count: u64, reason: String, now: Duration) {
        let rest = self.rest.entry(action).or_insert(Rest { count: 0, due: now, last: String::new() });
        rest.count += count;
        rest.last = reason;
    }

    /// What is to be written now, in order of kinds.
    pub fn due(&mut self, now: Duration) -> Vec<Event> {
        let passed = now.saturating_sub(self.spent_at).as_secs_f64();
        self.spent = (self.spent - passed / EVERY.as_secs_f64()).max(0.0);
        self.spent_at = now;
        let mut events = Vec::new();
        let mut beyond = Vec::new();
        self.kinds.retain(|_, seen| {
            if now < seen.due {
                return true;
            }
            if seen.count == 0 {
                return false;
            }
            let event = Event { count: std::mem::take(&mut seen.count), ..seen.event.clone() };
            if self.spent + 1.0 > BURST {
                beyond.push(event);
                return false;
            }
            self.spent += 1.0;
            events.push(event);
            seen.due = now + WINDOW;
            true
        });
        for event in beyond {
            self.count_only(event.action, event.count, event.reason, now);
        }
        for (action, rest) in &mut self.rest {
            if rest.count > 0 && now >= rest.due {
                events.push(summary(*action, rest));
                rest.due = now + REST_EVERY;
            }
        }
        events
    }

    /// Everything, for the end of the process.
    pub fn all(&mut self) -> Vec<Event> {
        let kinds = std::mem::take(&mut self.kinds).into_values().filter(|seen| seen.count > 0);
        let mut events: Vec<Event> = kinds.map(|seen| Event { count: seen.count, ..seen.event }).collect();
        let rest = self.rest.iter_mut().filter(|(_, rest)| rest.count > 0);
        events.extend(rest.map(|(action, rest)| summary(*action, rest)));
        events
    }
}

fn summary(action: Action, rest: &mut Rest) -> Event {
    let count = std::mem::take(&mut rest.count);
    let reason = format!("many at a time, counted only; the last: {}", rest.last);
    Event { count, ..Event::refused(action, "", reason) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn refused(token: &str) -> Event {
        Event { token: token.into(), ..Event::refused(Action::Join, "", "its secret is wrong") }
    }

    #[test]
    fn the_first_is_told_at_once_and_repetitions_become_one_entry_a_minute() {
        let mut refusals = Refusals::default();
        refusals.note(refused("a"), at(0));
        assert_eq!(refusals.due(at(0)), [refused("a")]);
        for second in 1..60 {
            refusals.note(refused("a"), at(second));
            assert_eq!(refusals.due(at(second)), [], "in second {second}");
        }
        assert_eq!(refusals.due(at(60)), [Event { count: 59, ..refused("a") }]);
        assert_eq!(refusals.due(at(120)), []);
        assert!(refusals.kinds.is_empty(), "what does not come again is forgotten");
        refusals.note(refused("a"), at(121));
        assert_eq!(refusals.due(at(121)).len(), 1);
    }

    #[test]
    fn a_flood_of_a_day_writes_a_bounded_number_of_entries_and_none_is_uncounted() {
        let mut refusals = Refusals::default();
        let (mut written, mut counted, mut noted) = (0, 0, 0);
        for second in 0..86_400_u64 {
            for n in 0..50 {
                // Each with a token id of its own.
                refusals.note(refused(&format!("{second}-{n}")), at(second));
                noted += 1;
            }
            let due = refusals.due(at(second));
            written += due.len();
            counted += due.iter().map(|event| event.count).sum::<u64>();
            assert!(refusals.kinds.len() <= MOST_KINDS);
        }
        counted += refusals.all().iter().map(|event| event.count).sum::<u64>();
        assert_eq!(counted, noted);
        assert!(written <= 120 + 2880 + 145, "{written} entries");
        assert_eq!(refusals.all(), []);
    }

    #[test]
    fn after_a_flood_the_next_kind_is_told_apart_again() {
        let mut refusals = Refusals::default();
        for n in 0..10_000 {
            refusals.note(refused(&n.to_string()), at(0));
        }
        assert_eq!(refusals.due(at(0)).len(), MOST_KINDS + 1, "64 kinds and a count of the rest");
        refusals.due(at(60));
        refusals.note(refused("late"), at(61));
        assert_eq!(refusals.due(at(61)), [refused("late")]);
    }
}
