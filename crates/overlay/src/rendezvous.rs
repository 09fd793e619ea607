//! Rendezvous (highest-random-weight) hashing: every gateway picks the same candidate for the same key, and a
//! candidate that comes or goes moves only its own share. Used for "any healthy endpoint of this handle", so that a
//! retransmitted Initial reaches the same one.
//!
//! The hash is SipHash-1-3 with fixed keys: replicas of different versions must agree, so neither may ever change.
//! It need not resist an attacker: who chooses the nonce of an Initial may choose the endpoint anyway.

use std::cmp::Reverse;
use std::hash::Hasher;

use siphasher::sip::SipHasher13;

/// ASCII "tombolo " and "rendezv!": nothing up the sleeve, never to change.
const KEYS: (u64, u64) = (0x746f_6d62_6f6c_6f20, 0x7265_6e64_657a_7621);

/// The weight of candidate `id` for `key`.
pub fn weight(key: u64, id: u64) -> u64 {
    let mut hasher = SipHasher13::new_with_keys(KEYS.0, KEYS.1);
    hasher.write(&key.to_le_bytes());
    hasher.write(&id.to_le_bytes());
    hasher.finish()
}

/// Reduces bytes (a connection ID's nonce, a name) to a key.
pub fn key_of(bytes: &[u8]) -> u64 {
    let mut hasher = SipHasher13::new_with_keys(KEYS.1, KEYS.0);
    hasher.write(bytes);
    hasher.finish()
}

/// The candidate with the highest weight; the order of the candidates does not matter.
pub fn pick(key: u64, candidates: impl IntoIterator<Item = u64>) -> Option<u64> {
    candidates.into_iter().max_by_key(|id| (weight(key, *id), *id))
}

/// All candidates, best first: the second is who would be picked without the first.
pub fn ranked(key: u64, candidates: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let mut weighted: Vec<(u64, u64)> = candidates.into_iter().map(|id| (weight(key, id), id)).collect();
    weighted.sort_unstable_by_key(|pair| Reverse(*pair));
    weighted.into_iter().map(|(_, id)| id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_the_same_in_every_version() {
        assert_eq!(
            (weight(1, 2), key_of(b"tombolo")),
            (7_419_153_502_604_878_027, 14_029_506_509_192_974_979)
        );
    }

    #[test]
    fn the_order_of_the_candidates_does_not_matter_and_none_give_none() {
        for key in 0..200 {
            assert_eq!(pick(key, [1, 2, 3, 4]), pick(key, [4, 2, 1, 3]));
            assert_eq!(pick(key, [9, 4, 7]), ranked(key, [9, 4, 7]).first().copied());
        }
        assert_eq!(pick(1, []), None);
    }

    #[test]
    fn one_candidate_less_moves_only_its_share() {
        let (mut moved, mut owned) = (0, 0);
        for key in 0..10_000 {
            let before = pick(key, 0..10).unwrap();
            let after = pick(key, 0..9).unwrap();
            owned += u32::from(before == 9);
            moved += u32::from(before != after);
            assert!(before == 9 || before == after);
            if before == 9 {
                assert_eq!(after, ranked(key, 0..10)[1]);
            }
        }
        assert_eq!(moved, owned);
        assert!((800..1200).contains(&owned), "{owned} of 10000 for one of ten");
    }
}
