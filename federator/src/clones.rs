//! Two processes with one identity: which of them is let in (pure, time passed in; ADR 17).
//!
//! Every process of a sidecar has an instance, 16 random bytes. While the holder of a block may live, another instance
//! waits: the holder is asked over its configuration stream, and has [`ANSWER`]. One whose machine was restarted, or whose
//! process was killed, never answers. Does the holder answer, or report meanwhile, the newcomer is a clone, and refused for
//! as long as its process lives. A holder that can't be asked has [`PROOF`]: it reports once a second if it lives.
//! The same instance is never a clone, from whatever address it comes. Was the holder only cut off while it had to speak,
//! it speaks later: then the newcomer, which was let in, is the one that has to go.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tombolo_model::ids::Block;

/// For the question there and the answer back, with one of the two lost and sent again, over a path of 150 ms: QUIC
/// repeats what is lost after about twice the round trip.
pub const ANSWER: Duration = Duration::from_millis(600);
/// Of a holder that is not asked: a report a second, and how late one may be.
const PROOF: Duration = Duration::from_millis(1400);
/// What a process that is dead has sent may still arrive for so long: it proves nothing.
const IN_FLIGHT: Duration = Duration::from_millis(200);
/// A holder whose connection broke comes back within this, or it is not waited for.
pub const RECENT: Duration = Duration::from_secs(2);
/// Between two reports of a holder that was thought dead. Both are needed: one may be late.
const TWICE: Duration = Duration::from_millis(500);
/// A newcomer that does not ask again has gone.
const FORGOTTEN: Duration = Duration::from_secs(10);
/// Processes that wait for one block, and those that are remembered as refused.
const MOST: usize = 8;

/// One process of a sidecar.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Instance([u8; 16]);

impl Instance {
    /// `None`: an older sidecar, which says none.
    pub fn from_wire(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// Others that came while the holder lived.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    pub refused: u32,
    pub last_unix: u64,
    /// What the last one called its machine.
    pub host: String,
}

/// Who holds a block, as the registry has it.
#[derive(Clone, Copy, Debug)]
pub struct Holder {
    pub instance: Option<Instance>,
    /// When it last sent anything.
    pub spoke: Duration,
    /// It said farewell.
    pub left: bool,
    /// The last question that it has answered.
    pub answered: u64,
    /// How long it has for an answer; `None`: it can't be asked.
    pub answers_within: Option<Duration>,
}

/// What becomes of a hello.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claim {
    Admit,
    /// Put this question to the holder, and ask again after this.
    Ask {
        question: u64,
        wait: Duration,
    },
    /// Ask again after this.
    Wait(Duration),
    Refuse,
}

/// What a report of a process that is not the block's holder means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stray {
    /// It may be late.
    Ignore,
    /// It holds the block, and whoever was let in instead is a clone.
    Restore,
}

/// A newcomer that waits.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    since: Duration,
    until: Duration,
    /// What the holder was asked for its sake; `None`: nothing.
    question: Option<u64>,
}

/// Newcomers that wait, and former holders that speak.
#[derive(Clone, Debug, Default)]
pub struct Contests {
    /// Questions count up, so that an answer to one is an answer to all before it, and none to a later one.
    asked: u64,
    waiting: BTreeMap<(Block, Instance), Waiting>,
    strays: BTreeMap<(Block, Instance), Duration>,
}

impl Contests {
    /// `refused`: the instances that were refused for this block before.
    pub fn claim(
        &mut self,
        block: Block,
        claimant: Option<Instance>,
        holder: Option<Holder>,
        refused: &[Instance],
        now: Duration,
    ) -> Claim {
        self.forget(now);
        let Some(claimant) = claimant else { return Claim::Admit };
        if refused.contains(&claimant) {
            return Claim::Refuse;
        }
        let key = (block, claimant);
        let waiting = self.waiting.get(&key).copied();
        let contested = holder.filter(|holder| {
            let other = holder.instance.is_some_and(|instance| instance != claimant);
            let recent = now.saturating_sub(holder.spoke) < RECENT;
            other && !holder.left && (recent || waiting.is_some())
        });
        let Some(holder) = contested else {
            self.waiting.remove(&key);
            return Claim::Admit;
        };
        let Some(Waiting { since, until, question }) = waiting else {
            let others = self.waiting.keys().filter(|(waiting, _)| *waiting == block).count();
            // Where there is no room it waits all the same: that others came first proves nothing.
            if others >= MOST {
                return Claim::Wait(PROOF);
            }
            let wait = holder.answers_within.unwrap_or(PROOF).min(PROOF);
            let question = holder.answers_within.map(|_| {
                self.asked += 1;
                self.asked
            });
            self.waiting.insert(key, Waiting { since: now, until: now + wait, question });
            return question.map_or(Claim::Wait(wait), |question| Claim::Ask { question, wait });
        };
        let answered = question.is_some_and(|question| holder.answered >= question);
        if answered || holder.spoke >= since + IN_FLIGHT {
            self.waiting.remove(&key);
            return Claim::Refuse;
        }
        match until.checked_sub(now) {
            Some(wait) if !wait.is_zero() => Claim::Wait(wait),
            _ => {
                self.waiting.remove(&key);
                Claim::Admit
            }
        }
    }

    /// A report by a process that once held the block.
    pub fn stray(&mut self, block: Block, instance: Instance, now: Duration) -> Stray {
        self.forget(now);
        let first = *self.strays.entry((block, instance)).or_insert(now);
        if now.saturating_sub(first) < TWICE {
            return Stray::Ignore;
        }
        self.strays.remove(&(block, instance));
        Stray::Restore
    }

    fn forget(&mut self, now: Duration) {
        let recent = |since: Duration| now.saturating_sub(since) < FORGOTTEN;
        self.waiting.retain(|_, waiting| recent(waiting.since));
        self.strays.retain(|_, since| recent(*since));
    }
}

/// Adds a refused instance; the oldest is forgotten.
pub fn remember(refused: &mut Vec<Instance>, instance: Instance) {
    if !refused.contains(&instance) {
        if refused.len() >= MOST {
            refused.remove(0);
        }
        refused.push(instance);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: fn() -> Block = || Block::new(7).unwrap();
    const FIRST: Instance = Instance([1; 16]);
    const SECOND: Instance = Instance([2; 16]);

    fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn holder(spoke: u64) -> Option<Holder> {
        Some(Holder {
            instance: Some(FIRST),
            spoke: at(spoke),
            left: false,
            answered: 0,
            answers_within: None,
        })
    }

    /// One that can be asked, and has answered so many questions.
    fn asked(spoke: u64, answered: u64) -> Option<Holder> {
        holder(spoke).map(|holder| Holder { answered, answers_within: Some(ANSWER), ..holder })
    }

    #[test]
    fn a_holder_that_is_asked_and_answers_is_alive_and_one_that_does_not_is_waited_for_briefly() {
        let mut contests = Contests::default();
        let ask = |contests: &mut Contests, spoke, answered, now| {
            contests.claim(BLOCK(), Some(SECOND), asked(spoke, answered), &[], at(now))
        };
        let Claim::Ask { question, wait } = ask(&mut contests, 9_900, 0, 10_000) else { panic!("not asked") };
        assert_eq!(wait, ANSWER);
        // Killed: nothing but what was on its way.
        assert_eq!(ask(&mut contests, 10_100, question - 1, 10_300), Claim::Wait(at(300)));
        assert_eq!(ask(&mut contests, 10_100, question - 1, 10_600), Claim::Admit);
        // Alive: the answer proves it at once, however soon it comes.
        let Claim::Ask { question: next, .. } = ask(&mut contests, 19_900, question, 20_000) else {
            panic!("not asked")
        };
        assert!(next > question, "an old answer is none to a new question");
        assert_eq!(ask(&mut contests, 20_010, next, 20_600), Claim::Refuse);
    }

    #[test]
    fn a_report_of_a_holder_that_is_asked_proves_as_much_as_an_answer() {
        let mut contests = Contests::default();
        let ask = |contests: &mut Contests, spoke, now| {
            contests.claim(BLOCK(), Some(SECOND), asked(spoke, 0), &[], at(now))
        };
        assert!(matches!(ask(&mut contests, 9_900, 10_000), Claim::Ask { .. }));
        assert_eq!(ask(&mut contests, 10_300, 10_600), Claim::Refuse);
    }

    #[test]
    fn a_second_process_is_refused_once_the_first_has_spoken_and_stays_refused() {
        let mut contests = Contests::default();
        let mut refused = Vec::new();
        let ask = |contests: &mut Contests, spoke, now, refused: &[Instance]| {
            contests.claim(BLOCK(), Some(SECOND), holder(spoke), refused, at(now))
        };
        assert_eq!(ask(&mut contests, 9_900, 10_000, &refused), Claim::Wait(PROOF));
        assert_eq!(ask(&mut contests, 10_900, 11_400, &refused), Claim::Refuse);
        remember(&mut refused, SECOND);
        // The first has gone long since: it is the same process all the same.
        assert_eq!(ask(&mut contests, 10_900, 90_000, &refused), Claim::Refuse);
    }

    #[test]
    fn a_restarted_machine_waits_for_its_own_past_at_most_once() {
        let mut contests = Contests::default();
        let ask = |contests: &mut Contests, spoke, now| {
            contests.claim(BLOCK(), Some(SECOND), holder(spoke), &[], at(now))
        };
        // Killed at 9.9 s, back at 10 s; its last report was still on its way.
        assert_eq!(ask(&mut contests, 9_900, 10_000), Claim::Wait(PROOF));
        assert_eq!(ask(&mut contests, 10_100, 11_400), Claim::Admit);
        // Rebooted: nothing was heard for two seconds.
        assert_eq!(ask(&mut contests, 10_000, 12_000), Claim::Admit);
    }

    #[test]
    fn the_same_process_and_one_that_follows_a_farewell_and_older_ones_are_let_in_at_once() {
        let mut contests = Contests::default();
        let now = at(10_000);
        assert_eq!(contests.claim(BLOCK(), Some(FIRST), holder(9_990), &[], now), Claim::Admit);
        let left = holder(9_990).map(|holder| Holder { left: true, ..holder });
        assert_eq!(contests.claim(BLOCK(), Some(SECOND), left, &[], now), Claim::Admit);
        assert_eq!(contests.claim(BLOCK(), None, holder(9_990), &[], now), Claim::Admit);
        let older = holder(9_990).map(|holder| Holder { instance: None, ..holder });
        assert_eq!(contests.claim(BLOCK(), Some(SECOND), older, &[], now), Claim::Admit);
        assert_eq!(contests.claim(BLOCK(), Some(SECOND), None, &[], now), Claim::Admit);
    }

    #[test]
    fn a_holder_that_was_cut_off_while_it_had_to_speak_gets_its_place_back() {
        let mut contests = Contests::default();
        assert_eq!(contests.stray(BLOCK(), FIRST, at(12_000)), Stray::Ignore);
        assert_eq!(contests.stray(BLOCK(), FIRST, at(12_100)), Stray::Ignore, "what was on its way");
        assert_eq!(contests.stray(BLOCK(), FIRST, at(13_000)), Stray::Restore);
        // Ages apart are no two reports.
        assert_eq!(contests.stray(BLOCK(), FIRST, at(20_000)), Stray::Ignore);
        assert_eq!(contests.stray(BLOCK(), FIRST, at(40_000)), Stray::Ignore);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut refused = Vec::new();
        (0..100).for_each(|n| remember(&mut refused, Instance([n; 16])));
        assert_eq!(refused.len(), MOST);
        let mut contests = Contests::default();
        let claims: Vec<_> = (10..30)
            .map(|n| contests.claim(BLOCK(), Some(Instance([n; 16])), holder(9_900), &[], at(10_000)))
            .collect();
        assert!(
            claims.iter().all(|claim| matches!(claim, Claim::Wait(_))),
            "a crowd is no proof: {claims:?}"
        );
        assert_eq!(contests.waiting.len(), MOST);
    }
}
