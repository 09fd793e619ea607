//! A token bucket for calls of those who have no identity that holds: for everybody together.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

#[derive(Debug)]
struct State {
    level: f64,
    at: Instant,
    /// Since the last request that was let in: counted here, because a job for each would be a way to flood the core.
    turned_away: u64,
}

#[derive(Debug)]
pub struct Pace {
    per_second: f64,
    burst: f64,
    state: Mutex<State>,
}

impl Pace {
    pub fn new(per_second: f64, burst: f64) -> Self {
        let state = State { level: burst, at: Instant::now(), turned_away: 0 };
        Self { per_second, burst, state: Mutex::new(state) }
    }

    /// Lets a request in: how many were turned away before it. `None`: it is turned away itself.
    pub fn admit(&self) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        state.level = (state.level + (now - state.at).as_secs_f64() * self.per_second).min(self.burst);
        state.at = now;
        if state.level < 1.0 {
            state.turned_away += 1;
            return None;
        }
        state.level -= 1.0;
        Some(std::mem::take(&mut state.turned_away))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_let_in_and_who_is_turned_away_is_counted_with_the_next() {
        let pace = Pace::new(1000.0, 2.0);
        assert_eq!([pace.admit(), pace.admit()], [Some(0), Some(0)]);
        let mut turned_away = 0;
        let counted = loop {
            match pace.admit() {
                Some(counted) => break counted,
                None => turned_away += 1,
            }
        };
        assert_eq!(counted, turned_away);
    }
}
