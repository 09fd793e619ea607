//! Renewal of the SVID at half its life, jittered, or when the federator wants another, and of the keys that come with it. A failed renewal is tried again
//! with backoff: half a life is left. One that has ended takes the way of [`super::lapsed`]. The swap acts on the next handshake, and live connections are shown it.

use std::time::Duration;

use tombolo_identity::issuer::KeyAndCsr;
use tombolo_proto::v1;
use tombolo_proto::v1::config_client::ConfigClient;
use tombolo_runtime::clock;
use tombolo_runtime::tasks::TaskGroup;

use super::backoff::Backoff;
use super::lapsed::EntryPoints;
use super::trust::Schedule;
use super::{ControlError, Member, MemberError};
use crate::endpoint::Overlay;
use crate::keys::KeyRing;
use crate::lease::EndpointLease;

/// Looked at again at least this often: the clock may have been set, or the machine was asleep.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);
/// Control keys reach 24 h ahead; renewed below this, a federator may be away for half a day.
const KEYS_LOW: Duration = Duration::from_secs(12 * 3600);
/// After a renewal that brought no later keys.
const LOW_PAUSE: Duration = Duration::from_secs(60);
/// After a renewal that brought another SVID than the federator wants: its wish was on its way.
const UNFIT_PAUSE: Duration = Duration::from_secs(1);
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Without an identity nothing is served: tried soon, and for as long as it takes.
const LAPSED_FIRST: Duration = Duration::from_secs(1);
const LAPSED_MOST: Duration = Duration::from_secs(60);

/// Why a renewal failed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("the federator refused to renew: {}", .0.message())]
    Refused(#[from] Box<tonic::Status>),
    #[error("the federator did not answer within {}s", CALL_TIMEOUT.as_secs())]
    Late,
    #[error("the federator's answer carries no SVID")]
    Empty,
    #[error(transparent)]
    Member(#[from] MemberError),
}

/// When to renew: half of the life that is left at the start, moved by up to a tenth so that members that joined together
/// don't renew together. All in seconds since the Unix epoch; `random` in 0..1.
pub fn due_at(issued_at: u64, not_after: u64, random: f64) -> u64 {
    let life = not_after.saturating_sub(issued_at);
    let share = 0.45 + 0.1 * random.clamp(0.0, 1.0);
    issued_at + (life as f64 * share) as u64
}

impl Member {
    /// Renews for as long as the group lives. Renewed endpoint keys are given to every overlay of the process.
    /// `entries`: where gateways may be found when none of those last known answers.
    pub fn spawn_renewal(&self, overlays: Vec<Overlay>, entries: EntryPoints, tasks: &TaskGroup) {
        let member = self.clone();
        tasks.spawn("SVID renewal", async move {
            let Some(first) = overlays.first().cloned() else { return };
            let mut backoff = Backoff::new(Duration::from_secs(5), Duration::from_secs(300));
            let mut lapsed_backoff = Backoff::new(LAPSED_FIRST, LAPSED_MOST);
            let mut wanted = member.0.wanted.subscribe();
            // The start of this life is not written anywhere; now is late enough and never too late.
            let due = |member: &Member| {
                due_at(clock::unix_seconds(), member.svid().load().not_after, rand::random())
            };
            let mut schedule = Schedule::new(due(&member));
            loop {
                let now = clock::since_unix_epoch();
                if member.has_lapsed(now) {
                    if member.come_back(&first, &entries, &mut lapsed_backoff).await {
                        let lease = member.lease();
                        overlays.iter().for_each(|overlay| overlay.set_keys(lease.keys.clone()));
                        schedule = Schedule::new(due(&member));
                        if member.has_lapsed(clock::since_unix_epoch()) {
                            // The federator's clock is hours off: asking it again at once would change nothing.
                            tokio::time::sleep(LOW_PAUSE).await;
                        }
                    }
                    continue;
                }
                let wait = {
                    let wanted = wanted.borrow_and_update();
                    schedule.wait(&member.trust(), wanted.as_ref(), now, rand::random())
                };
                if !wait.is_zero() && !member.keys_low(now) {
                    let _ = tokio::time::timeout(wait.min(LONGEST_SLEEP), wanted.changed()).await;
                    continue;
                }
                match member.renew(&first).await {
                    Ok(()) => {
                        backoff.worked();
                        let lease = member.lease();
                        overlays.iter().for_each(|overlay| overlay.set_keys(lease.keys.clone()));
                        schedule = Schedule::new(due(&member));
                        let not_after = member.svid().load().not_after;
                        tracing::info!(spiffe_id = %member.spiffe_id(), not_after, "SVID renewed");
                        // What stays as it was must not make this spin.
                        if member.keys_low(now) {
                            tokio::time::sleep(LOW_PAUSE).await;
                        } else if wanted.borrow().as_ref().is_some_and(|w| !w.fits(&member.trust())) {
                            tokio::time::sleep(UNFIT_PAUSE).await;
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, "SVID renewal failed and will be tried again");
                        tokio::time::sleep(backoff.failed(rand::random())).await;
                    }
                }
            }
        });
    }

    /// One attempt to renew an identity that has ended; after one that failed, the wait before the next.
    async fn come_back(&self, overlay: &Overlay, entries: &EntryPoints, backoff: &mut Backoff) -> bool {
        match self.renew_lapsed(overlay, entries).await {
            Ok(()) => {
                backoff.worked();
                // What was dialled with the old identity has been refused, and need not be waited for.
                self.disconnect().await;
                let not_after = self.svid().load().not_after;
                tracing::info!(spiffe_id = %self.spiffe_id(), not_after, "an identity that had ended is renewed");
                true
            }
            Err(error) => {
                tracing::error!(%error, spiffe_id = %self.spiffe_id(), "the identity has ended and is not renewed yet");
                tokio::time::sleep(backoff.failed(rand::random())).await;
                false
            }
        }
    }

    fn keys_low(&self, now: Duration) -> bool {
        let last = self.control().keys.last_hour().map_or(0, |hour| hour.0);
        Duration::from_secs(last.saturating_mul(3600)) < now + KEYS_LOW
    }

    /// One renewal: a new key and CSR, a new SVID, and renewed keys.
    pub async fn renew(&self, overlay: &Overlay) -> Result<(), RenewError> {
        let fresh = KeyAndCsr::generate().map_err(MemberError::from)?;
        let mut client = ConfigClient::new(self.connect(overlay).await?);
        // Shown, so that a federator whose store was lost adopts it.
        let lease = v1::EndpointLease { keys: None, ..self.lease().to_wire() };
        let request =
            v1::RenewRequest { csr_der: fresh.csr_der.clone(), lease: Some(lease), workload: false };
        let answer = tokio::time::timeout(CALL_TIMEOUT, client.renew(request)).await;
        let answer = answer.map_err(|_| RenewError::Late)?.map_err(Box::new)?.into_inner();
        let v1::RenewResponse { svid, lease, control_keys } = answer;
        self.install(&fresh.key_der, &svid.ok_or(RenewError::Empty)?)?;
        if let Some(lease) = lease {
            self.renew_lease(EndpointLease::from_wire(&lease).map_err(MemberError::from)?)?;
        }
        if let Some(keys) = control_keys {
            self.renew_control_keys(KeyRing::from_wire(&keys).map_err(MemberError::from)?)?;
        }
        Ok(())
    }
}
