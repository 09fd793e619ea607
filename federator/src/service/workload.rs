//! `Workload`: what a member asks for on behalf of the application behind it.
//!
//! Each token costs the core a signature, so every identity has a rate: an application that asks for a token of another
//! audience each time must not keep the core from everybody else.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tombolo_identity::SpiffeId;
use tombolo_proto::v1;
use tombolo_proto::v1::workload_server::Workload;
use tonic::{Request, Response, Status};

use super::member;
use crate::core::{CoreError, CoreHandle};
use crate::metrics::Metrics;

/// A sidecar keeps a token for half of its life: this is 3,000 audiences at a time.
const PER_SECOND: f64 = 20.0;
const BURST: f64 = 100.0;
/// Identities that are remembered before those with all their tokens back are forgotten.
const MAX_KEPT: usize = 4096;

/// A token bucket for each identity. Pure: the time is passed in.
#[derive(Debug, Default)]
struct Rates(HashMap<SpiffeId, (f64, Duration)>);

impl Rates {
    fn admit(&mut self, id: &SpiffeId, now: Duration) -> bool {
        let level = |(level, at): &(f64, Duration)| {
            (level + now.saturating_sub(*at).as_secs_f64() * PER_SECOND).min(BURST)
        };
        if self.0.len() >= MAX_KEPT {
            self.0.retain(|_, kept| level(kept) < BURST);
        }
        let left = self.0.get(id).map_or(BURST, level) - 1.0;
        if left < 0.0 {
            return false;
        }
        self.0.insert(id.clone(), (left, now));
        true
    }
}

pub struct WorkloadService {
    core: CoreHandle,
    metrics: Metrics,
    rates: Mutex<Rates>,
}

impl WorkloadService {
    pub fn new(core: CoreHandle, metrics: Metrics) -> Self {
        Self { core, metrics, rates: Mutex::default() }
    }

    async fn mint(&self, request: Request<v1::MintJwtRequest>) -> Result<v1::MintJwtResponse, CoreError> {
        let caller = member(&request, &self.core.facts().cluster.name)
            .map_err(|status| CoreError::Denied(status.message().to_owned()))?;
        let id = &caller.identity.spiffe_id;
        let admitted = {
            let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
            rates.admit(id, self.core.now().monotonic)
        };
        if !admitted {
            return Err(CoreError::Exhausted(format!(
                "{id} asks for more than {PER_SECOND} tokens a second"
            )));
        }
        let request = request.into_inner();
        self.core.attempt(move |core, moment| core.mint_jwt(&caller.identity, &request, moment)).await
    }
}

#[tonic::async_trait]
impl Workload for WorkloadService {
    async fn mint_jwt(
        &self,
        request: Request<v1::MintJwtRequest>,
    ) -> Result<Response<v1::MintJwtResponse>, Status> {
        let minted = self.mint(request).await;
        self.metrics.issued("mint_jwt", &minted);
        Ok(Response::new(minted?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_identity_has_its_rate_and_costs_no_other_and_few_are_remembered() {
        let id = |n: usize| -> SpiffeId {
            format!("spiffe://a.example/cluster/east/ns/shop/sa/w{n}").parse().unwrap()
        };
        let mut rates = Rates::default();
        let at = Duration::from_millis;
        let admitted = (0..200).filter(|_| rates.admit(&id(0), at(0))).count();
        assert_eq!(admitted, 100);
        assert!(rates.admit(&id(1), at(0)));
        assert!(rates.admit(&id(0), at(50)) && !rates.admit(&id(0), at(50)));
        (0..10_000).for_each(|n| assert!(rates.admit(&id(n + 10), at(10_000 + 100 * n as u64))));
        assert!(rates.0.len() <= MAX_KEPT);
    }
}
