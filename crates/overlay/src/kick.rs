//! When to kick a connection, and when to believe that its peer is gone: pure decisions, time passed in.
//!
//! quinn's probe timeout doubles, so an outage of 650 ms becomes a stall of 1.2 s. With data in flight and no
//! acknowledgement for max(200 ms, 2 srtt) a one-byte DATAGRAM goes through another replica, again every 200 ms, 15
//! times at most: the stall is then the outage plus one round trip (protocol.md section 3). A GONE hint is checked by
//! three kicks, 2 srtt + 50 ms apart: closed only if none was acknowledged.

use std::time::{Duration, Instant};

const KICK_AFTER: Duration = Duration::from_millis(200);
const KICK_EVERY: Duration = Duration::from_millis(200);
/// 3 s: by then a dead peer is known by its lease, and quinn's own probe timeout goes on.
const MAX_KICKS: u32 = 15;
const GONE_KICKS: u32 = 3;
const GONE_MARGIN: Duration = Duration::from_millis(50);
/// A forged hint costs the connection three bytes at most this often.
const GONE_REST: Duration = Duration::from_secs(1);

/// What is known of a connection's progress at one tick.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    pub in_flight: bool,
    pub last_ack: Option<Instant>,
    pub srtt: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    Nothing,
    /// Send one byte through another replica.
    Kick,
    /// The peer is gone: three kicks without an answer.
    Gone,
}

#[derive(Debug)]
struct GoneCheck {
    kicks: u32,
    last_kick: Option<Instant>,
    asked: Instant,
    acked_before: Option<Instant>,
}

/// The kick state of one connection.
#[derive(Debug, Default)]
pub(crate) struct KickState {
    seen_ack: Option<Instant>,
    waiting_since: Option<Instant>,
    kicks: u32,
    last_kick: Option<Instant>,
    gone: Option<GoneCheck>,
    last_gone: Option<Instant>,
}

impl KickState {
    /// A GONE hint arrived. Ignored while one is being checked, and for a second after.
    pub fn hint_gone(&mut self, progress: Progress, now: Instant) {
        let resting = self.last_gone.is_some_and(|at| now.duration_since(at) < GONE_REST);
        if self.gone.is_none() && !resting {
            self.last_gone = Some(now);
            self.gone =
                Some(GoneCheck { kicks: 0, last_kick: None, asked: now, acked_before: progress.last_ack });
        }
    }

    /// Whether a GONE hint is being checked.
    pub fn is_checking(&self) -> bool {
        self.gone.is_some()
    }

    /// How many kicks have gone unanswered, those that check a GONE hint included.
    pub fn unanswered(&self) -> u32 {
        self.kicks.max(self.gone.as_ref().map_or(0, |check| check.kicks))
    }

    /// Decides for one tick.
    pub fn step(&mut self, progress: Progress, now: Instant) -> Verdict {
        match self.check_gone(progress, now) {
            Verdict::Nothing => self.check_stall(progress, now),
            verdict => verdict,
        }
    }

    fn check_gone(&mut self, progress: Progress, now: Instant) -> Verdict {
        let Some(check) = &mut self.gone else { return Verdict::Nothing };
        if progress.last_ack > check.acked_before && progress.last_ack.is_some_and(|at| at > check.asked) {
            self.gone = None; // it answered: the hint was wrong
            return Verdict::Nothing;
        }
        let spacing = 2 * progress.srtt + GONE_MARGIN;
        if check.last_kick.is_some_and(|at| now.duration_since(at) < spacing) {
            return Verdict::Nothing;
        }
        if check.kicks == GONE_KICKS {
            return Verdict::Gone;
        }
        check.kicks += 1;
        check.last_kick = Some(now);
        Verdict::Kick
    }

    fn check_stall(&mut self, progress: Progress, now: Instant) -> Verdict {
        if !progress.in_flight || progress.last_ack > self.seen_ack {
            self.seen_ack = progress.last_ack.max(self.seen_ack);
            self.kicks = 0;
            self.last_kick = None;
            self.waiting_since = progress.in_flight.then_some(now);
            return Verdict::Nothing;
        }
        let since = *self.waiting_since.get_or_insert(now);
        let stalled = now.duration_since(since) >= KICK_AFTER.max(2 * progress.srtt);
        let rested = self.last_kick.is_none_or(|at| now.duration_since(at) >= KICK_EVERY);
        if stalled && rested && self.kicks < MAX_KICKS {
            self.kicks += 1;
            self.last_kick = Some(now);
            return Verdict::Kick;
        }
        Verdict::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(10);
    const TICK: Duration = Duration::from_millis(20);

    fn run(
        state: &mut KickState,
        from: Instant,
        for_: Duration,
        progress: impl Fn(Instant) -> Progress,
    ) -> Vec<(Duration, Verdict)> {
        let mut verdicts = Vec::new();
        let mut now = from;
        while now < from + for_ {
            match state.step(progress(now), now) {
                Verdict::Nothing => {}
                verdict => verdicts.push((now - from, verdict)),
            }
            now += TICK;
        }
        verdicts
    }

    #[test]
    fn a_stalled_connection_is_kicked_after_200_ms_every_200_ms_and_15_times() {
        let start = Instant::now();
        let stalled = |_| Progress { in_flight: true, last_ack: Some(start), srtt: RTT };
        let kicks = run(&mut KickState::default(), start, Duration::from_secs(10), stalled);
        assert_eq!(kicks.len(), 15);
        assert!((200..=240).contains(&(kicks[0].0.as_millis() as u64)), "{:?}", kicks[0]);
        assert!(kicks[1].0 - kicks[0].0 >= KICK_EVERY);
    }

    #[test]
    fn acknowledged_idle_and_long_distance_connections_are_left_alone() {
        let start = Instant::now();
        let acked = |now| Progress { in_flight: true, last_ack: Some(now), srtt: RTT };
        assert!(run(&mut KickState::default(), start, Duration::from_secs(5), acked).is_empty());
        let idle = |_| Progress { in_flight: false, last_ack: Some(start), srtt: RTT };
        assert!(run(&mut KickState::default(), start, Duration::from_secs(5), idle).is_empty());
        let far = |_| Progress { in_flight: true, last_ack: Some(start), srtt: Duration::from_millis(300) };
        assert!(run(&mut KickState::default(), start, Duration::from_millis(590), far).is_empty());
    }

    #[test]
    fn a_gone_hint_counts_as_silence_until_it_is_answered() {
        let start = Instant::now();
        let mut state = KickState::default();
        let progress = |last_ack| Progress { in_flight: true, last_ack: Some(last_ack), srtt: RTT };
        state.hint_gone(progress(start), start);
        assert_eq!(state.step(progress(start), start), Verdict::Kick);
        assert_eq!(state.unanswered(), 1);
        let answered = start + RTT;
        assert_eq!(state.step(progress(answered), answered), Verdict::Nothing);
        assert_eq!(state.unanswered(), 0);
    }

    #[test]
    fn a_true_gone_hint_closes_after_three_kicks_and_a_false_one_does_not() {
        let start = Instant::now();
        let silent = |_| Progress { in_flight: false, last_ack: Some(start), srtt: RTT };
        let mut state = KickState::default();
        state.hint_gone(silent(start), start);
        let verdicts: Vec<_> = run(&mut state, start, Duration::from_millis(400), silent)
            .into_iter()
            .map(|(_, v)| v)
            .take(4)
            .collect();
        assert_eq!(verdicts, [Verdict::Kick, Verdict::Kick, Verdict::Kick, Verdict::Gone]);

        let mut state = KickState::default();
        let begin = start + Duration::from_secs(1);
        state.hint_gone(silent(begin), begin);
        let answers = |now: Instant| Progress { last_ack: Some(now - RTT), ..silent(now) };
        let verdicts = run(&mut state, begin, Duration::from_secs(1), answers);
        assert!(verdicts.iter().all(|(_, v)| *v == Verdict::Kick) && verdicts.len() <= 2, "{verdicts:?}");
    }

    #[test]
    fn replayed_hints_cost_one_check_a_second() {
        let start = Instant::now();
        let mut state = KickState::default();
        let answers = |now: Instant| Progress { in_flight: false, last_ack: Some(now), srtt: RTT };
        let mut kicks = 0;
        for step in 0..100u32 {
            let now = start + TICK * step;
            state.hint_gone(answers(now), now);
            // the answer to a kick arrives by the next tick
            kicks += usize::from(
                state.step(Progress { last_ack: Some(start), ..answers(now) }, now) == Verdict::Kick,
            );
            state.step(answers(now + RTT), now + RTT);
        }
        assert!(kicks <= 3, "{kicks} kicks in two seconds");
    }
}
