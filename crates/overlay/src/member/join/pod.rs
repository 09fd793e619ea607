//! Joining as a pod: where to says a token without a secret, who says a service account's token: the pod's projected one, or
//! one that Kubernetes gives to whoever may stand for the service account.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tombolo_identity::files;
use tombolo_identity::issuer::KeyAndCsr;
use tombolo_proto::v1::join_client::JoinClient;
use tombolo_proto::{convert, token, v1};
use tombolo_runtime::clock;
use zeroize::Zeroizing;

use super::{JoinError, JoinOptions, JoinPlan, Proof, answered, control_targets, log_rejected};
use crate::connection::PeerConnection;
use crate::grpc;
use crate::keys::{CidKey, KeyRing};
use crate::member::{Member, MemberError};

/// Where the token of a service account comes from.
#[derive(Clone, Debug)]
pub enum ServiceAccountToken {
    /// A file that is read when it is needed: Kubernetes replaces it.
    File(PathBuf),
    /// Asked for when it is needed. `holder`: what this process calls itself, for the federator to tell it from others that
    /// stand for the same service account.
    Asked { source: Arc<dyn TokenSource>, holder: String },
}

/// Asks for tokens of one service account, for the federator's audience.
pub trait TokenSource: Send + Sync + std::fmt::Debug {
    /// A token that is good now, or why there is none.
    fn token(&self) -> BoxFuture<'_, Result<Zeroizing<String>, String>>;
}

/// 1 to 2 KB; the federator takes no more.
const MAX_SERVICE_ACCOUNT_TOKEN: u64 = 16 * 1024;

impl JoinPlan {
    /// Reads a token for pods and finds its federators, whose names are resolved now.
    async fn for_pod(text: &str, now: Duration) -> Result<Self, JoinError> {
        let token = token::parse(text, v1::TokenKind::Pod, now)?;
        let mut addresses = Vec::new();
        for name in &token.federator_names {
            match tokio::net::lookup_host(name).await {
                Ok(found) => addresses.extend(found),
                Err(error) => tracing::warn!(federator = name, %error, "a federator's name does not resolve"),
            }
        }
        let (federators, rejected) = control_targets(&token.federators);
        log_rejected(&rejected);
        addresses.extend(federators.into_iter().filter_map(|(_, address)| address));
        // A federator that is dialled at its own address asks for no MAC.
        let key = CidKey::from_bytes(rand::random());
        Ok(Self {
            addresses,
            direct: true,
            root_fingerprint: token.root_fingerprint,
            cluster: convert::parse("token.cluster", &token.cluster)?,
            tag: convert::tag("token.tag", token.tag)?,
            token_id: String::new(),
            secret: Vec::new(),
            not_after: u64::MAX,
            provisional: None,
            join_keys: KeyRing::constant(now, &key),
        })
    }
}

/// What a pod joins as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PodRole {
    /// A workload: its service account.
    Sidecar,
    /// The gateway that is called like the pod; the federator says whose pods may.
    Gateway,
}

impl PodRole {
    fn as_str(self) -> &'static str {
        match self {
            Self::Sidecar => "",
            Self::Gateway => "gateway",
        }
    }
}

impl Member {
    /// Joins as a service account. `text`: a token for pods, which says where; `service_account`: its own, which says who.
    pub async fn join_pod(
        text: &str,
        service_account: &ServiceAccountToken,
        dir: &Path,
        options: &JoinOptions,
    ) -> Result<Self, JoinError> {
        Self::join_pod_as(text, (service_account, PodRole::Sidecar), dir, options).await
    }

    /// The same in a role.
    pub async fn join_pod_as(
        text: &str,
        (service_account, role): (&ServiceAccountToken, PodRole),
        dir: &Path,
        options: &JoinOptions,
    ) -> Result<Self, JoinError> {
        let plan = JoinPlan::for_pod(text, clock::since_unix_epoch()).await?;
        let proof = Proof::ServiceAccount(service_account.clone(), role);
        Self::join_by(&plan, &proof, dir, options).await
    }
}

/// The same for a pod. Its token is read as late as possible: it is replaced all the time.
pub(super) async fn ask(
    plan: &JoinPlan,
    peer: &PeerConnection,
    name: &str,
    (service_account, role): (&ServiceAccountToken, PodRole),
) -> Result<(KeyAndCsr, v1::JoinWorkloadResponse), JoinError> {
    let (token, holder) = match service_account {
        ServiceAccountToken::File(file) => {
            let bytes =
                Zeroizing::new(files::read(file, MAX_SERVICE_ACCOUNT_TOKEN).map_err(MemberError::from)?);
            (Zeroizing::new(String::from_utf8_lossy(&bytes).trim().to_owned()), "")
        }
        ServiceAccountToken::Asked { source, holder } => {
            (source.token().await.map_err(JoinError::ServiceAccount)?, holder.as_str())
        }
    };
    let fresh = KeyAndCsr::generate().map_err(MemberError::from)?;
    let request = v1::JoinPodRequest {
        service_account_token: token.to_string(),
        csr_der: fresh.csr_der.clone(),
        role: role.as_str().to_owned(),
        holder: holder.to_owned(),
    };
    let client = JoinClient::new(grpc::channel(peer.clone()));
    let call = || {
        let (mut client, request) = (client.clone(), request.clone());
        async move { client.join_pod(request).await }
    };
    let answer = answered(plan, name, call).await?;
    let id = answer.svid.as_ref().map(|svid| svid.spiffe_id.as_str()).unwrap_or_default();
    // Before anything is stored: its name would not be the one that it is started with.
    if role == PodRole::Gateway && !id.ends_with(&format!("/gateway/{name}")) {
        return Err(JoinError::OtherPod { given: name.to_owned(), id: id.to_owned() });
    }
    Ok((fresh, answer))
}
