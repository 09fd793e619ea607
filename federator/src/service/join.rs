//! `Join`: the first contact of gateways, sidecars, machines and clusters, each with a one-use token, and of pods with
//! their service account's.
//!
//! Callers have no identity yet, so all calls are rate-limited for everybody together: guessing is slow, and a flood of
//! bad requests costs no signatures.

use std::sync::Arc;

use tombolo_identity::{SvidHandle, rotation};
use tombolo_model::audit::{Action, Event};
use tombolo_overlay::grpc;
use tombolo_proto::v1;
use tombolo_proto::v1::join_server::Join;
use tombolo_runtime::clock;
use tonic::metadata::MetadataValue;
use tonic::{Request, Response, Status};
use zeroize::Zeroizing;

use super::pace::Pace;
use crate::core::{Core, CoreError, CoreHandle, Moment};
use crate::facts::Role;
use crate::linking;
use crate::metrics::Metrics;
use crate::token_review::{TokenReviewer, audience, claimed};

/// A rollout of a thousand pods joins within 20 s.
const PER_SECOND: f64 = 50.0;
const BURST: f64 = 100.0;

pub struct JoinService {
    core: CoreHandle,
    reviewer: Arc<dyn TokenReviewer>,
    svid: SvidHandle,
    metrics: Metrics,
    pace: Pace,
}

impl JoinService {
    pub fn new(
        core: CoreHandle,
        reviewer: Arc<dyn TokenReviewer>,
        svid: SvidHandle,
        metrics: Metrics,
    ) -> Self {
        Self { core, reviewer, svid, metrics, pace: Pace::new(PER_SECOND, BURST) }
    }

    /// Lets a request in; how many were turned away before it.
    fn admit(&self) -> Result<u64, Status> {
        let turned_away = self.pace.admit();
        turned_away.ok_or_else(|| {
            let mut status = Status::resource_exhausted("too many join requests: try again in a second");
            status.metadata_mut().insert(grpc::RETRY_AFTER, MetadataValue::from_static("1"));
            status
        })
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

    async fn join_pod(
        &self,
        request: Request<v1::JoinPodRequest>,
    ) -> Result<Response<v1::JoinWorkloadResponse>, Status> {
        let turned_away = self.admit()?;
        let v1::JoinPodRequest { service_account_token, csr_der, role, holder } = request.into_inner();
        let role = match role.as_str() {
            "" => Role::Sidecar,
            "gateway" => Role::Gateway,
            other => {
                let other: String = other.chars().take(32).collect();
                return Err(Status::invalid_argument(format!(
                    "field role: {other:?} is not \"\" or gateway"
                )));
            }
        };
        let token = Zeroizing::new(service_account_token);
        let expected = audience(&self.svid.load().spiffe_id.trust_domain());
        let reviewed = self.reviewer.review(&token, &expected).await.and_then(|pod| pod.held_by(&holder));
        let claimed = claimed(&token);
        if let Err(error) = &reviewed {
            tracing::warn!(%error, kind = error.kind(), pod = claimed, "a pod is not let in");
        }
        let join = move |core: &mut Core, moment| {
            core.turned_away(Action::Join, turned_away, moment);
            let joined = core.join_pod(reviewed, role, &csr_der, moment);
            core.pod_asked(&claimed, joined.as_ref().err(), moment);
            joined
        };
        let joined = self.core.attempt(join).await;
        self.metrics.issued("join_pod", &joined);
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
