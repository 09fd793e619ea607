//! `Join`: the first contact of gateways, sidecars, machines and clusters, each with a one-use token.
//!
//! Callers have no identity yet, so both calls are rate-limited for everybody together: guessing is slow, and a flood of
//! bad requests costs no signatures.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tombolo_identity::{SvidHandle, rotation};
use tombolo_model::audit::{Action, Event};
use tombolo_proto::v1;
use tombolo_proto::v1::join_server::Join;
use tombolo_runtime::clock;
use tonic::{Request, Response, Status};

use crate::core::{Core, CoreError, CoreHandle, Moment};
use crate::linking;
use crate::metrics::Metrics;

/// A rollout of a thousand pods joins within 20 s.
const PER_SECOND: f64 = 50.0;
const BURST: f64 = 100.0;

/// A token bucket.
#[derive(Debug)]
struct Bucket {
    level: f64,
    at: Instant,
    /// Since the last request that was let in: counted here, because a job for each would be a way to flood the core.
    turned_away: u64,
}

pub struct JoinService {
    core: CoreHandle,
    svid: SvidHandle,
    metrics: Metrics,
    bucket: Mutex<Bucket>,
}

impl JoinService {
    pub fn new(core: CoreHandle, svid: SvidHandle, metrics: Metrics) -> Self {
        Self {
            core,
            svid,
            metrics,
            bucket: Mutex::new(Bucket { level: BURST, at: Instant::now(), turned_away: 0 }),
        }
    }

    /// Lets a request in; how many were turned away before it.
    fn admit(&self) -> Result<u64, Status> {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        bucket.level = (bucket.level + (now - bucket.at).as_secs_f64() * PER_SECOND).min(BURST);
        bucket.at = now;
        if bucket.level < 1.0 {
            bucket.turned_away += 1;
            return Err(Status::resource_exhausted("too many join requests: try again in a second"));
        }
        bucket.level -= 1.0;
        Ok(std::mem::take(&mut bucket.turned_away))
    }
}

/// The federator's chain with the root last, as a party of a link shows it.
pub fn chain_with_root(svid: &SvidHandle) -> Vec<Vec<u8>> {
    let svid = svid.load();
    let roots = svid.bundles.get(&svid.spiffe_id.trust_domain()).map(|b| b.roots.as_slice());
    // The root that this intermediate is of, without certificates that lead there from others.
    let chain = svid.chain().iter().take(2);
    let root =
        svid.chain().get(1).zip(roots).and_then(|(intermediate, roots)| {
            rotation::root_of(intermediate, roots, clock::since_unix_epoch())
        });
    chain.chain(root).map(|der| der.to_vec()).collect()
}

#[tonic::async_trait]
impl Join for JoinService {
    async fn join_workload(
        &self,
        request: Request<v1::JoinWorkloadRequest>,
    ) -> Result<Response<v1::JoinWorkloadResponse>, Status> {
        let turned_away = self.admit()?;
        let request = request.into_inner();
        let join = move |core: &mut Core, moment| {
            core.turned_away(Action::Join, turned_away, moment);
            core.join_workload(&request, moment)
        };
        let joined = self.core.attempt(join).await;
        self.metrics.issued("join", &joined);
        Ok(Response::new(joined?))
    }

    async fn join_link(
        &self,
        request: Request<v1::JoinLinkRequest>,
    ) -> Result<Response<v1::JoinLinkResponse>, Status> {
        let turned_away = self.admit()?;
        let request = request.into_inner();
        let chain = chain_with_root(&self.svid);
        let join = move |core: &mut Core, moment| {
            core.turned_away(Action::Join, turned_away, moment);
            let answer = join_link(core, &request, chain, moment);
            if let Err(error) = &answer {
                let claimed = request.joiner.as_ref().map(|party| party.cluster.as_str()).unwrap_or_default();
                let claimed: String = claimed.chars().take(64).collect();
                let token = request.token_id.chars().take(64).collect();
                let event = Event::refused(Action::Link, format!("cluster:{claimed}"), "");
                core.refused(Event { token, ..event }, error, moment);
            }
            answer
        };
        let answer = self.core.attempt(join).await;
        self.metrics.issued("link", &answer);
        Ok(Response::new(answer?))
    }
}

fn join_link(
    core: &mut Core,
    request: &v1::JoinLinkRequest,
    chain: Vec<Vec<u8>>,
    moment: Moment,
) -> Result<v1::JoinLinkResponse, CoreError> {
    let missing = || CoreError::Invalid("field joiner: nothing is not a party".to_owned());
    let party = request.joiner.as_ref().ok_or_else(missing)?;
    // Where our own gateways are on loopback, so may the peer's be.
    let loopback = core.facts.registry.gateways.values().any(|gateway| gateway.border.ip().is_loopback());
    let joiner = linking::verify_party(party, &core.facts, loopback, moment.unix)?;
    if !linking::verify_proof(party, &request.token_id, &request.joiner_chain_proof) {
        return Err(CoreError::Denied(format!("{} has not signed what it says of itself", joiner.cluster)));
    }
    core.join_link(request, &joiner, chain, moment)
}
