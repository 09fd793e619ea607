//! Pods join as their service account, whom Kubernetes has vouched for ([`crate::token_review`]).
//!
//! No token is used up: a container that is started anew joins anew. So that a pod in a loop fills nothing, each may join so
//! often in so long, and the lease of its start before ends with the next one.

use std::sync::Arc;
use std::time::Duration;

use tombolo_identity::SpiffeId;
use tombolo_model::audit::{Action, Event};
use tombolo_model::names::{Namespace, ObjectName};
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

/// Of the pods that may be gateways.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceAccount {
    pub namespace: Namespace,
    pub name: ObjectName,
}

impl std::fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl std::str::FromStr for ServiceAccount {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (namespace, name) =
            text.split_once('/').ok_or_else(|| format!("{text:?} is not NAMESPACE/SERVICEACCOUNT"))?;
        Ok(Self {
            namespace: namespace.parse().map_err(|e| format!("{text:?}: {e}"))?,
            name: name.parse().map_err(|e| format!("{text:?}: {e}"))?,
        })
    }
}
/// `federator_names` of a token.
const MAX_NAMES: usize = 16;

impl Core {
    /// Pods of this service account may be gateways; `None`: no pods may.
    pub fn set_gateways(&mut self, gateways: Option<ServiceAccount>) {
        self.gateways = gateways;
    }

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
        role: Role,
        csr_der: &[u8],
        moment: Moment,
    ) -> Result<v1::JoinWorkloadResponse, CoreError> {
        let subject = reviewed.as_ref().ok().and_then(|pod| self.pod_id(pod, role).ok());
        // Tells refusals apart in the log, where the token itself must not be.
        let token = match &reviewed {
            Ok(_) => "service account".to_owned(),
            Err(error) => format!("service account: {}", error.kind()),
        };
        let joined = match reviewed {
            Ok(pod) => self.admit_pod(&pod, role, csr_der, moment),
            Err(error) if error.is_retryable() => Err(CoreError::Exhausted(error.to_string())),
            Err(error) => Err(CoreError::Denied(error.to_string())),
        };
        if let Err(error) = &joined {
            let subject = subject.map_or_else(String::new, |id| id.to_string());
            self.refused(Event { token, ..Event::refused(Action::Join, subject, "") }, error, moment);
        }
        joined
    }

    /// Remembers for operators what became of a pod's request. `claimed`: what its token says of itself.
    pub fn pod_asked(&mut self, claimed: &str, refused: Option<&CoreError>, moment: Moment) {
        // This side's own state, an API server that is away or a rush is nothing that a pod could mend: it asks again.
        if matches!(refused, Some(CoreError::Gone | CoreError::Store(_) | CoreError::Exhausted(_))) {
            return;
        }
        if refused.is_none() && self.facts.pods.refused.is_empty() {
            return;
        }
        let refused = refused.map(ToString::to_string);
        self.dirty |= Arc::make_mut(&mut self.facts.pods).asked(claimed, refused, moment.unix.as_secs());
    }

    fn pod_id(&self, pod: &PodIdentity, role: Role) -> Result<SpiffeId, CoreError> {
        let (domain, cluster) = (&self.facts.cluster.trust_domain, &self.facts.cluster.name);
        let id = match role {
            // By the API server's word, not the pod's: nobody takes another gateway's name.
            Role::Gateway => SpiffeId::gateway(domain, cluster, &pod.pod),
            _ => SpiffeId::workload(domain, cluster, pod.namespace.as_str(), &pod.service_account),
        };
        id.map_err(|e| CoreError::Invalid(e.to_string()))
    }

    /// Whether a pod may be what it asks for.
    fn may_be(&self, pod: &PodIdentity, role: Role) -> Result<(), CoreError> {
        if role != Role::Gateway {
            let account =
                Attested::ServiceAccount { namespace: pod.namespace.as_str(), name: &pod.service_account };
            return joining::may_join(&self.facts, account).map_err(CoreError::Denied);
        }
        let given = format!("{}/{}", pod.namespace, pod.service_account);
        match &self.gateways {
            Some(accounts) if accounts.to_string() != given => Err(CoreError::Denied(format!(
                "service account {given} may not be a gateway: pods of {accounts} may (--kubernetes-gateways)"
            ))),
            // Whoever may ask for tokens of the account could call itself as it likes.
            Some(_) if !pod.bound => Err(CoreError::Denied(
                "the token is bound to no pod, and a gateway is called as its pod is: project it into the pod (serviceAccountToken)"
                    .to_owned(),
            )),
            Some(_) => Ok(()),
            None => Err(CoreError::Denied(format!(
                "service account {given} may not be a gateway: start the federator with --kubernetes-gateways {given} to let its pods be gateways"
            ))),
        }
    }

    fn admit_pod(
        &mut self,
        pod: &PodIdentity,
        role: Role,
        csr_der: &[u8],
        moment: Moment,
    ) -> Result<v1::JoinWorkloadResponse, CoreError> {
        let id = self.pod_id(pod, role)?;
        self.may_be(pod, role)?;
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
        let issued = self.issue(csr_der, &id, role, moment, Transaction::new())?;
        let mut event = issued.event(Action::Join);
        event.reason = match pod.bound {
            true => format!("{}; pod {} by its service account", event.reason, pod.pod),
            false => format!("{}; {} for pods of the service account", event.reason, pod.pod),
        };
        let Issued { svid, mut transaction, record: identity, .. } = issued;
        let mut lease = self.new_lease(id.as_str(), role, unix + LEASE_LIFE.as_secs())?;
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
