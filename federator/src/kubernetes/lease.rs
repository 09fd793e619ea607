//! Which federator of the cluster writes: the one that holds a `Lease` (coordination.k8s.io/v1).
//!
//! [`step`] decides, and is pure: a holder that is silent for as long as it promised to be heard has lost, by the clock of
//! whoever looks on and not by the times in the lease. A leader stops by itself a third of the duration before others may
//! take over. Writes need no fence of their own beyond that: each one is applied whole, and an older leader's late write
//! is put right by the newer one's watch.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client, Error};
use tokio::sync::watch;
use tokio::time::Instant;

pub const NAME: &str = "tombolo-federator";
/// A dead leader is replaced after this.
pub const DURATION: Duration = Duration::from_secs(15);
/// Three chances before the leader gives up; a fifth of a request per second.
const RENEWED: Duration = Duration::from_secs(5);
/// A leader that could not renew stops here, two renewals before anybody else may start.
const DEADLINE: Duration = Duration::from_secs(10);
/// Followers look as often: one that is released is taken within this.
const LOOKED: Duration = Duration::from_secs(5);

/// The lease as it was last seen.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    pub holder: String,
    pub version: String,
    pub duration: Duration,
    /// When this version was first seen here.
    pub since: Duration,
}

/// What to do about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// It is ours: say so again.
    Renew,
    /// It is free, or its holder is silent.
    Take,
    /// Somebody else leads.
    Follow,
}

/// `seen`: `None` when there is no lease. `now` is monotonic.
pub fn step(seen: Option<&Seen>, own: &str, now: Duration) -> Step {
    match seen {
        None => Step::Take,
        Some(seen) if seen.holder == own => Step::Renew,
        Some(seen) if seen.holder.is_empty() => Step::Take,
        Some(seen) if now.saturating_sub(seen.since) > seen.duration => Step::Take,
        Some(_) => Step::Follow,
    }
}

/// Keeps the lease, or waits for it.
pub struct LeaseTask {
    pub client: Client,
    pub namespace: String,
    pub identity: String,
    /// Until when this federator leads; `None`: it does not.
    pub leads: watch::Sender<Option<Instant>>,
}

impl LeaseTask {
    /// Runs until it is dropped.
    pub async fn run(self) {
        let api: Api<Lease> = Api::namespaced(self.client.clone(), &self.namespace);
        let start = Instant::now();
        let (mut known, mut seen): (Option<Lease>, Option<Seen>) = (None, None);
        let mut silent = false;
        loop {
            let asked = Instant::now();
            let turn = tokio::time::timeout(RENEWED, self.turn(&api, &mut known, &mut seen, start)).await;
            let leads = match turn {
                Ok(Ok(leads)) => {
                    silent = false;
                    leads.then(|| asked + DEADLINE)
                }
                Ok(Err(error)) => {
                    (known, silent) = (None, warn(silent, &error.to_string(), &self.namespace));
                    *self.leads.borrow()
                }
                Err(_) => {
                    (known, silent) = (None, warn(silent, "no answer", &self.namespace));
                    *self.leads.borrow()
                }
            };
            let leads = leads.filter(|until| *until > Instant::now());
            self.leads.send_if_modified(|before| {
                let led = before.is_some_and(|until| until > Instant::now());
                if led != leads.is_some() {
                    tracing::info!(
                        leads = leads.is_some(),
                        lease = NAME,
                        namespace = self.namespace,
                        "who writes to Kubernetes has changed"
                    );
                }
                *before = leads;
                led != leads.is_some()
            });
            tokio::time::sleep(if leads.is_some() { RENEWED } else { LOOKED.min(RENEWED) }).await;
        }
    }

    /// Whether this federator leads.
    async fn turn(
        &self,
        api: &Api<Lease>,
        known: &mut Option<Lease>,
        seen: &mut Option<Seen>,
        start: Instant,
    ) -> Result<bool, Error> {
        let now = start.elapsed();
        // A leader's own copy is what it wrote; a conflict tells it that it was not.
        let held = known.as_ref().is_some_and(|lease| read(lease, now).holder == self.identity);
        if !held {
            *known = api.get_opt(NAME).await?;
        }
        let current = known.as_ref().map(|lease| {
            let fresh = read(lease, now);
            match seen.take() {
                Some(before) if before.version == fresh.version => before,
                _ => fresh,
            }
        });
        let wanted = step(current.as_ref(), &self.identity, now);
        *seen = current;
        if wanted == Step::Follow {
            return Ok(false);
        }
        let written = self.lease(known.as_ref(), wanted);
        let params =
            PostParams { field_manager: Some(super::labels::TOMBOLO.to_owned()), ..Default::default() };
        let answer = match known {
            None => api.create(&params, &written).await,
            Some(_) => api.replace(NAME, &params, &written).await,
        };
        match answer {
            Ok(lease) => {
                *seen = Some(read(&lease, now));
                *known = Some(lease);
                Ok(true)
            }
            // Somebody was faster.
            Err(Error::Api(status)) if status.code == 409 => {
                *known = None;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn lease(&self, known: Option<&Lease>, step: Step) -> Lease {
        let now = MicroTime(Timestamp::now());
        let before = known.and_then(|lease| lease.spec.clone()).unwrap_or_default();
        let taken = step == Step::Take;
        let spec = LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: if taken { Some(now.clone()) } else { before.acquire_time },
            renew_time: Some(now),
            lease_transitions: Some(before.lease_transitions.unwrap_or(0).saturating_add(i32::from(taken))),
            ..before
        };
        let metadata = ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() };
        let metadata = known.map_or(metadata, |lease| lease.metadata.clone());
        Lease { metadata, spec: Some(spec) }
    }
}

fn read(lease: &Lease, now: Duration) -> Seen {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok());
    Seen {
        holder: spec.holder_identity.unwrap_or_default(),
        version: lease.metadata.resource_version.clone().unwrap_or_default(),
        duration: seconds.map_or(DURATION, Duration::from_secs),
        since: now,
    }
}

/// Says it once per outage.
fn warn(silent: bool, error: &str, namespace: &str) -> bool {
    if !silent {
        tracing::warn!(
            error,
            lease = NAME,
            namespace,
            "the lease to write to Kubernetes can't be kept: is the namespace there, and may this federator get, create and update leases in it?"
        );
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(holder: &str, since: u64) -> Seen {
        Seen {
            holder: holder.into(),
            version: "1".into(),
            duration: DURATION,
            since: Duration::from_secs(since),
        }
    }

    #[test]
    fn a_lease_is_taken_only_from_nobody_or_from_whoever_is_silent() {
        let at = Duration::from_secs;
        assert_eq!(step(None, "me", at(0)), Step::Take);
        assert_eq!(step(Some(&seen("", 0)), "me", at(0)), Step::Take);
        assert_eq!(step(Some(&seen("me", 0)), "me", at(100)), Step::Renew);
        assert_eq!(step(Some(&seen("other", 10)), "me", at(25)), Step::Follow);
        assert_eq!(step(Some(&seen("other", 10)), "me", at(26)), Step::Take);
    }

    #[test]
    fn a_leader_has_stopped_before_another_may_start() {
        assert!(DEADLINE + RENEWED <= DURATION);
        assert!(RENEWED * 2 <= DEADLINE, "one lost renewal costs nothing");
    }
}
