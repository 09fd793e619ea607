//! What a member trusts and shows, as it tells its federator, and renewals that the federator asks for.
//!
//! Told is what the [`SvidHandle`](tombolo_identity::SvidHandle) holds, which every handshake reads: an acknowledgement can't be ahead of what it
//! acknowledges. A bundle goes forward only: one with a lower sequence, or without a root, leaves what is trusted alone.

use std::time::Duration;

use tombolo_identity::Svid;
use tombolo_identity::authority::BACKDATE;
use tombolo_identity::bundle::TrustBundle;
use tombolo_identity::rotation;
use tombolo_proto::v1;

use super::{Member, MemberError};

/// What handshakes with `svid` use.
pub fn trust_of(svid: &Svid) -> v1::TrustHeld {
    let bundle = svid.bundles.get(&svid.spiffe_id.trust_domain());
    let [leaf, issuer] = [0, 1].map(|at| svid.chain().get(at).map(|der| der.as_ref()).unwrap_or_default());
    let issued = rotation::not_before(leaf) + BACKDATE.as_secs();
    v1::TrustHeld {
        sequence: bundle.map_or(0, |bundle| bundle.sequence),
        issuer_sha256: rotation::sha256(issuer).to_vec(),
        issued_unix: i64::try_from(issued).unwrap_or(i64::MAX),
    }
}

/// Whether a bundle may take the place of one of sequence `held`: no empty one locks everybody out, and nothing goes back.
fn may_replace(bundle: &TrustBundle, held: u64) -> bool {
    !bundle.roots.is_empty() && bundle.sequence >= held
}

/// What the federator wants everybody's SVID to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Wanted {
    issuer_sha256: Vec<u8>,
    issued_after_unix: i64,
    spread: Duration,
}

impl Wanted {
    /// Without an issuer nothing is wanted: a federator of a version that does not ask.
    pub fn from_wire(wire: &v1::RenewalRequest) -> Option<Self> {
        let v1::RenewalRequest { issuer_sha256, issued_after_unix, spread_ms } = wire;
        (!issuer_sha256.is_empty()).then(|| Self {
            issuer_sha256: issuer_sha256.clone(),
            issued_after_unix: *issued_after_unix,
            spread: Duration::from_millis((*spread_ms).into()),
        })
    }

    pub fn fits(&self, held: &v1::TrustHeld) -> bool {
        held.issuer_sha256 == self.issuer_sha256 && held.issued_unix >= self.issued_after_unix
    }
}

/// When to renew. Pure: times since the Unix epoch.
#[derive(Debug)]
pub(super) struct Schedule {
    /// By the leaf's age.
    pub due: u64,
    /// By the federator's wish, and at which moment of its spread.
    early: Option<(Wanted, Duration)>,
}

impl Schedule {
    pub fn new(due: u64) -> Self {
        Self { due, early: None }
    }

    /// How long to wait; zero: now. `random` in 0..1 draws the moment of an early renewal.
    pub fn wait(
        &mut self,
        held: &v1::TrustHeld,
        wanted: Option<&Wanted>,
        unix: Duration,
        random: f64,
    ) -> Duration {
        let by_age = Duration::from_secs(self.due).saturating_sub(unix);
        let Some(wanted) = wanted.filter(|wanted| !wanted.fits(held)) else {
            self.early = None;
            return by_age;
        };
        let drawn = self.early.take().filter(|(of, at)| {
            // A clock that went back must not move it beyond its spread.
            of == wanted && *at <= unix + wanted.spread
        });
        let at = drawn.map_or_else(|| unix + wanted.spread.mul_f64(random.clamp(0.0, 1.0)), |(_, at)| at);
        self.early = Some((wanted.clone(), at));
        at.saturating_sub(unix).min(by_age)
    }
}

impl Member {
    /// What its handshakes use now.
    pub fn trust(&self) -> v1::TrustHeld {
        trust_of(&self.svid().load())
    }

    /// Renews early if the SVID is not what the federator wants.
    pub fn ask_renewal(&self, wire: Option<&v1::RenewalRequest>) {
        let wanted = wire.and_then(Wanted::from_wire);
        self.0.wanted.send_if_modified(|known| {
            let changed = *known != wanted;
            *known = wanted;
            changed
        });
    }

    /// Of a bundle from the federator and the one that is held, the one to trust by.
    pub(super) fn later_bundle(&self, json: &str) -> Result<String, MemberError> {
        let own = self.spiffe_id().trust_domain();
        let bundle = TrustBundle::from_json(own.clone(), json)?;
        let held = self.svid().load().bundles.get(&own).map_or(0, |bundle| bundle.sequence);
        if !may_replace(&bundle, held) {
            tracing::warn!(
                found = bundle.sequence,
                held,
                roots = bundle.roots.len(),
                "a trust bundle without roots or of before is left aside"
            );
            return Ok(self.lock().bundle.clone());
        }
        Ok(json.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Duration = Duration::from_secs(1_000_000);

    fn held(issuer: u8, issued_unix: i64) -> v1::TrustHeld {
        v1::TrustHeld { sequence: 1, issuer_sha256: vec![issuer; 32], issued_unix }
    }
    fn wanted(issuer: u8, issued_after_unix: i64) -> Wanted {
        let wire =
            v1::RenewalRequest { issuer_sha256: vec![issuer; 32], issued_after_unix, spread_ms: 10_000 };
        Wanted::from_wire(&wire).unwrap()
    }

    #[test]
    fn who_fits_waits_for_half_its_life_and_who_does_not_for_its_moment() {
        let mut schedule = Schedule::new(AT.as_secs() + 3600);
        let hour = Duration::from_secs(3600);
        assert_eq!(schedule.wait(&held(1, 5), None, AT, 0.5), hour);
        assert_eq!(schedule.wait(&held(1, 5), Some(&wanted(1, 5)), AT, 0.5), hour);
        // Another issuer, or an older leaf than wanted: once drawn, the moment stays.
        for wanted in [wanted(2, 0), wanted(1, 6)] {
            let second = Duration::from_secs(1);
            assert_eq!(schedule.wait(&held(1, 5), Some(&wanted), AT, 0.5), 5 * second);
            assert_eq!(schedule.wait(&held(1, 5), Some(&wanted), AT + second, 0.9), 4 * second);
            assert_eq!(schedule.wait(&held(1, 5), Some(&wanted), AT + 5 * second, 0.9), Duration::ZERO);
            assert_eq!(
                schedule.wait(&held(1, 5), Some(&wanted), AT - hour, 1.0),
                10 * second,
                "clock set back"
            );
        }
        // Never later than by age.
        let mut due = Schedule::new(AT.as_secs() + 1);
        assert_eq!(due.wait(&held(1, 5), Some(&wanted(2, 0)), AT, 1.0), Duration::from_secs(1));
    }

    #[test]
    fn no_bundle_without_roots_and_none_of_before_is_trusted_by() {
        let bundle = |sequence, roots: &[u8]| TrustBundle {
            trust_domain: "a.example".parse().unwrap(),
            sequence,
            roots: roots.iter().map(|byte| vec![*byte].into()).collect(),
        };
        assert!(may_replace(&bundle(3, &[1]), 3) && may_replace(&bundle(4, &[1, 2]), 3));
        assert!(!may_replace(&bundle(2, &[1]), 3) && !may_replace(&bundle(9, &[]), 3));
    }

    #[test]
    fn a_federator_that_does_not_ask_wants_nothing() {
        assert_eq!(Wanted::from_wire(&v1::RenewalRequest::default()), None);
    }
}
