//! Proving a party of a link, and the joiner's talk with the inviter.
//!
//! Both sides are under one root. A party shows its federator's chain up to that root; the joiner also signs the token
//! id and everything it says with its cluster's CA key. What a party says of itself is bounded like any peer's record.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tombolo_identity::bundle::{BundleSet, fingerprint};
use tombolo_identity::verify::{self, Usage};
use tombolo_identity::{SpiffeId, issuer};
use tombolo_model::audit::Requester;
use tombolo_model::ids::ClusterTag;
use tombolo_model::names::ClusterName;
use tombolo_overlay::grpc;
use tombolo_overlay::keys::{HandleBinding, LinkKey};
use tombolo_overlay::member::{JoinConnection, JoinError, JoinPlan};
use tombolo_proto::convert::{self, FieldError};
use tombolo_proto::v1;
use tombolo_proto::v1::join_client::JoinClient;

use crate::core::links::{PROOF_LABEL, check_control};
use crate::core::{CoreError, CoreHandle};
use tombolo_model::ranges::AllowedRanges;

use crate::facts::{Facts, PeerGateway};
use crate::import::{self, PeerScope};

const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// A federation has a handful of federators per cluster.
const MAX_FEDERATORS: usize = 16;

/// A party whose chain holds, parsed.
#[derive(Clone, Debug)]
pub struct VerifiedParty {
    pub cluster: ClusterName,
    pub tag: ClusterTag,
    pub federator_ids: Vec<SpiffeId>,
    /// By which we may dial it.
    pub control: HandleBinding,
    pub gateways: Vec<PeerGateway>,
    pub properties: BTreeMap<String, String>,
}

/// What the joiner's CA signs.
pub fn signed_bytes(token_id: &str, party: &v1::LinkParty) -> Vec<u8> {
    let mut bytes = u32::try_from(token_id.len()).unwrap_or(u32::MAX).to_be_bytes().to_vec();
    bytes.extend_from_slice(token_id.as_bytes());
    // Maps have no order on the wire: they are signed sorted.
    let sorted: BTreeMap<_, _> = party.properties.iter().collect();
    let rest = v1::LinkParty { properties: Default::default(), ..party.clone() };
    bytes.extend_from_slice(&rest.encode_to_vec());
    for (key, value) in sorted {
        for text in [key, value] {
            bytes.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
            bytes.extend_from_slice(text.as_bytes());
        }
    }
    bytes
}

/// Checks a party's chain, names and records. `own`: this side.
pub fn verify_party(
    party: &v1::LinkParty,
    facts: &Facts,
    loopback: bool,
    unix: Duration,
) -> Result<VerifiedParty, CoreError> {
    let (own, trust) = (&facts.cluster, &facts.trust);
    let cluster: ClusterName = convert::parse("party.cluster", &party.cluster)?;
    let tag = convert::tag("party.tag", party.tag)?;
    let [leaf, intermediate, root] = party.ca_chain_der.as_slice() else {
        let expected = "the federator's leaf, its intermediate and the root";
        return Err(FieldError::new("party.ca_chain", party.ca_chain_der.len(), expected).into());
    };
    if !trust.trusts(&fingerprint(root)) {
        return Err(CoreError::Denied(format!(
            "{cluster} belongs to another federation (root {}, ours is {}): clusters link under one root; if it was rotated meanwhile, run `tombolo trust deliver` for the one that missed it",
            fingerprint(root),
            trust.root_fingerprint
        )));
    }
    let bundles = BundleSet::of(trust.bundle.clone()).reissuing(Arc::clone(&trust.reissued));
    let chain: Vec<_> = [leaf, intermediate].into_iter().map(|der| der.clone().into()).collect();
    let time = verify::unix_time(unix);
    let identity = verify::authenticate(&chain, &bundles, Usage::Client, time)
        .map_err(|e| CoreError::Denied(format!("the chain of {cluster} does not hold: {e}")))?;
    if identity.cluster != cluster || identity.tag != tag {
        return Err(CoreError::Denied(format!(
            "whoever says to be {cluster} ({tag}) has shown the chain of {} ({})",
            identity.cluster, identity.tag
        )));
    }
    if identity.spiffe_id.within_cluster() != Some("/federator") {
        return Err(CoreError::Denied(format!("{} is not a federator", identity.spiffe_id)));
    }
    if party.federator_ids.is_empty() || party.federator_ids.len() > MAX_FEDERATORS {
        let expected = format!("1 to {MAX_FEDERATORS} identities");
        return Err(FieldError::new("party.federator_ids", party.federator_ids.len(), expected).into());
    }
    let mut federator_ids = Vec::new();
    for id in &party.federator_ids {
        let parsed: SpiffeId = convert::parse("party.federator_ids", id)?;
        if parsed.cluster().as_ref() != Some(&cluster) || parsed.trust_domain() != own.trust_domain {
            return Err(FieldError::new("party.federator_ids", id, format!("of cluster {cluster}")).into());
        }
        federator_ids.push(parsed);
    }
    let wire =
        party.control.as_ref().ok_or_else(|| FieldError::new("party.control", "nothing", "a handle"))?;
    let control = HandleBinding::from_wire(wire)?;
    check_control(&control, &own.name)?;
    let ranges = AllowedRanges { loopback, ..AllowedRanges::default() };
    let scope = PeerScope {
        peer: cluster.clone(),
        trust_domain: own.trust_domain.clone(),
        ranges,
        trust: Arc::clone(trust),
        unix,
    };
    Ok(VerifiedParty {
        gateways: import::gateways_of(&scope, &party.gateways)?,
        properties: import::properties_of(&party.properties)?,
        cluster,
        tag,
        federator_ids,
        control,
    })
}

/// Whether the party's own CA has signed what it says.
pub fn verify_proof(party: &v1::LinkParty, token_id: &str, proof: &[u8]) -> bool {
    let Some(intermediate) = party.ca_chain_der.get(1) else { return false };
    issuer::verify_record(intermediate, PROOF_LABEL, &signed_bytes(token_id, party), proof)
}

/// Links to the cluster that made the token: the joiner's side, on behalf of `operator`. Returns the peer.
pub async fn join(
    core: &CoreHandle,
    token: &str,
    own_chain: Vec<Vec<u8>>,
    bind: IpAddr,
    unix: Duration,
    operator: &Requester,
) -> Result<(ClusterName, ClusterTag), CoreError> {
    let facts = core.facts();
    let own = &facts.cluster;
    let plan = JoinPlan::from_link_token(token, &own.name, unix).map_err(refused)?;
    if !facts.trust.trusts(&plan.root_fingerprint) {
        return Err(CoreError::Denied(format!(
            "the token is from another federation (root {}, ours is {}): clusters link under one root",
            plan.root_fingerprint, facts.trust.root_fingerprint
        )));
    }
    let (peer, tag, id) = (plan.cluster.clone(), plan.tag, plan.token_id.clone());
    let (party, proof) = core.attempt(move |core, _| core.begin_link(&peer, tag, &id, own_chain)).await?;
    let linked = ask(core, &plan, party, proof, bind, operator).await;
    if linked.is_err() {
        let peer = plan.cluster.clone();
        let _ = core.call(move |core, moment| core.abandon_link(&peer, moment)).await;
    }
    linked.map(|()| (plan.cluster, plan.tag))
}

async fn ask(
    core: &CoreHandle,
    plan: &JoinPlan,
    party: v1::LinkParty,
    proof: Vec<u8>,
    bind: IpAddr,
    operator: &Requester,
) -> Result<(), CoreError> {
    let loopback = plan.addresses.iter().any(|address| address.ip().is_loopback());
    let way = JoinConnection::open(plan, SocketAddr::new(bind, 0)).await.map_err(refused)?;
    let request = v1::JoinLinkRequest {
        token_id: plan.token_id.clone(),
        secret: plan.secret.clone(),
        joiner: Some(party),
        joiner_chain_proof: proof,
    };
    let mut client = JoinClient::new(grpc::channel(way.peer().clone()));
    let answer = tokio::time::timeout(CALL_TIMEOUT, client.join_link(request)).await;
    way.close().await;
    let answer = answer
        .map_err(|_| CoreError::Exhausted(format!("{} did not answer in time: try again", plan.cluster)))?
        .map_err(|status| {
            let words: String = status.message().chars().take(400).collect();
            CoreError::Precondition(format!("{} refused to link: {words}", plan.cluster))
        })?
        .into_inner();
    let inviter = answer.inviter.ok_or_else(|| FieldError::new("inviter", "nothing", "present"))?;
    let key = LinkKey::from_bytes(convert::bytes("link_key", &answer.link_key)?);
    let (expected, tag) = (plan.cluster.clone(), plan.tag);
    let operator = operator.clone();
    core.attempt(move |core, moment| {
        let verified = verify_party(&inviter, &core.facts, loopback, moment.unix)?;
        if (&verified.cluster, verified.tag) != (&expected, tag) {
            let found = format!("{} ({})", verified.cluster, verified.tag);
            return Err(FieldError::new("inviter.cluster", found, format!("{expected} ({tag})")).into());
        }
        core.on_behalf(operator, |core| core.finish_link(&verified, &key, moment))
    })
    .await
}

fn refused(error: JoinError) -> CoreError {
    let text = match std::error::Error::source(&error) {
        Some(source) if !error.to_string().contains(&source.to_string()) => format!("{error}: {source}"),
        _ => error.to_string(),
    };
    if error.is_retryable() { CoreError::Exhausted(text) } else { CoreError::Precondition(text) }
}
