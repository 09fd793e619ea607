//! Pods join as their service account, whom Kubernetes has vouched for ([`crate::token_review`]).
//!
//! No token is used up: a container that is started anew joins anew. So that a pod in a loop fills nothing, each may join so
//! often in so long, and the lease of its start before ends with the next one.

use std::sync::Arc;
use std::time::Duration;

use tombolo_identity::SpiffeId;
use tombolo_model::audit::{Action, Event};
use tombolo_model::resource::join_policy::Attested;
use tombolo_proto::{token, v1};

use super::allot::block_key;
use super::leases::{Issued, LEASE_LIFE};
use super::tokens::MadeToken;
use super::{Core, CoreError, Moment};
use crate::facts::{LeaseRecord, PodRecord, Role};
use crate::joining;
use crate::store::{Table, Transaction};
use crate::token_review::{HELD, PodIdentity, ReviewError};

/// A container that fails at once is started five times in the first two and a half minutes, then once in five (kubelet's
/// back-off). A pod in a loop of its own makes 2,900 leases in a day, after which they are forgotten: a megabyte.
const JOINS_OF_ONE: usize = 5;
const JOINS_WITHIN: Duration = Duration::from_secs(150);
/// Replicas of shared sidecars that stand for one service account, and join at once: each is named by itself, so they are
/// bounded together.
const HOLDERS: usize = 32;
/// `federator_names` of a token.
const MAX_NAMES: usize = 16;

impl Core {
    /// What a pod is told of this cluster: nothing of it is secret.
    pub(super) fn pods_token(&self, request: &v1::CreateJoinTokenRequest) -> Result<MadeToken, CoreError> {
        let names = &request.federator_names;
        if names.len() > MAX_NAMES {
            return Err(CoreError::Invalid(format!(
                "field federator: {} names are too many, at most {MAX_NAMES}",
                names.len()
            )));
        }
        let has_port = |name: &str| {
            name.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
        };
        if let Some(name) = names.iter().find(|name| name.len() > 260 || !has_port(name)) {
            return Err(CoreError::Invalid(format!("field federator: {name:?} is not HOST:PORT")));
        }
        let federators = if names.is_empty() { self.federators(true) } else { Vec::new() };
        if federators.is_empty() && names.is_empty() {
            return Err(CoreError::Precondition("the federator is not listening yet".to_owned()));
        }
        let cluster = &self.facts.cluster;
        let token = v1::Token {
            kind: v1::TokenKind::Pod.into(),
            role: "pod".to_owned(),
            cluster: cluster.name.to_string(),
            tag: cluster.tag.value(),
            root_fingerprint: self.facts.trust.root_fingerprint.clone(),
            federators,
            federator_names: names.clone(),
            ..v1::Token::default()
        };
        Ok(MadeToken { text: token::encode(&token), not_after: 0 })
    }

    /// A pod's request. `reviewed`: what Kubernetes says of its token.
    pub fn join_pod(
        &mut self,
        reviewed: Result<PodIdentity, ReviewError>,
        csr_der: &[u8],
        moment: Moment,
    ) -> Result<v1::JoinWorkloadResponse, CoreError> {
        let subject = reviewed.as_ref().ok().and_then(|pod| self.pod_id(pod).ok());
        // Tells refusals apart in the log, where the token itself must not be.
        let token = match &reviewed {
            Ok(_) => "service account".to_owned(),
            Err(error) => format!("service account: {}", error.kind()),
        };
        let joined = match reviewed {
            Ok(pod) => self.admit_pod(&pod, csr_der, moment),
            Err(error) if error.is_retryable() => Err(CoreError::Exhausted(error.to_string())),
            Err(error) => Err(CoreError::Denied(error.to_string())),
        };
        if let Err(error) = &joined {
            let subject = subject.map_or_else(String::new, |id| id.to_string());
            self.refused(Event { token, ..Event::refused(Action::Join, subject, "") }, error, moment);
        }
        joined
    }

    fn pod_id(&self, pod: &PodIdentity) -> Result<SpiffeId, CoreError> {
        let cluster = &self.facts.cluster;
        let id = SpiffeId::workload(
            &cluster.trust_domain,
            &cluster.name,
            pod.namespace.as_str(),
            &pod.service_account,
        );
        id.map_err(|e| CoreError::Invalid(e.to_string()))
    }

    fn admit_pod(
        &mut self,
        pod: &PodIdentity,
        csr_der: &[u8],
        moment: Moment,
    ) -> Result<v1::JoinWorkloadResponse, CoreError> {
        let id = self.pod_id(pod)?;
        let account =
            Attested::ServiceAccount { namespace: pod.namespace.as_str(), name: &pod.service_account };
        joining::may_join(&self.facts, account).map_err(CoreError::Denied)?;
        let unix = moment.unix.as_secs();
        let of_pod = |lease: &LeaseRecord| lease.pod.as_ref().is_some_and(|known| known.uid == pod.pod_uid);
        let before: Vec<Arc<LeaseRecord>> =
            self.facts.leases.values().filter(|lease| of_pod(lease)).cloned().collect();
        let lately = before.iter().filter_map(|lease| lease.pod.as_ref());
        let lately = lately.filter(|known| known.joined_unix + JOINS_WITHIN.as_secs() > unix).count();
        if lately >= JOINS_OF_ONE {
            return Err(CoreError::Exhausted(format!(
                "pod {} has joined {lately} times within {} s: keep the sidecar's state directory in an emptyDir volume, and see why it is started anew",
                pod.pod,
                JOINS_WITHIN.as_secs()
            )));
        }
        let held = |lease: &&Arc<LeaseRecord>| {
            let recent = |known: &PodRecord| {
                known.uid.starts_with(HELD) && known.joined_unix + JOINS_WITHIN.as_secs() > unix
            };
            lease.spiffe_id == id.as_str() && lease.pod.as_ref().is_some_and(recent)
        };
        if !pod.bound && self.facts.leases.values().filter(held).count() >= HOLDERS {
            return Err(CoreError::Exhausted(format!(
                "holders of tokens that are bound to no pod have joined {HOLDERS} times as {id} within {} s: try again later",
                JOINS_WITHIN.as_secs()
            )));
        }
        let issued = self.issue(csr_der, &id, Role::Sidecar, moment, Transaction::new())?;
        let mut event = issued.event(Action::Join);
        event.reason = match pod.bound {
            true => format!("{}; pod {} by its service account", event.reason, pod.pod),
            false => format!("{}; {} for pods of the service account", event.reason, pod.pod),
        };
        let Issued { svid, mut transaction, record: identity, .. } = issued;
        let mut lease = self.new_lease(id.as_str(), Role::Sidecar, unix + LEASE_LIFE.as_secs())?;
        let (uid, name) = (pod.pod_uid.clone(), pod.pod.clone());
        lease.pod = Some(PodRecord { uid, name, joined_unix: unix });
        let key = block_key(lease.block);
        transaction = transaction.absent(Table::Leases, key.as_str()).put(key, &lease);
        let ended: Vec<LeaseRecord> = before
            .iter()
            .filter(|lease| lease.not_after > unix)
            .map(|lease| LeaseRecord { not_after: unix, ..(**lease).clone() })
            .collect();
        for lease in &ended {
            transaction = transaction.put(block_key(lease.block), lease);
        }
        let answer = self.membership(svid, &lease, moment)?;
        self.commit_audited(transaction, event, moment)?;
        self.install_identity(identity);
        tracing::info!(spiffe_id = %id, pod = pod.pod, block = %lease.block, "a pod has joined");
        ended.into_iter().chain([lease]).for_each(|lease| self.install_lease(lease));
        Ok(answer)
    }
}
