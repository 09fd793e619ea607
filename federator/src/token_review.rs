//! Who a Kubernetes service account's token belongs to, by the word of its API server (authentication.k8s.io/v1 TokenReview).
//!
//! [`TokenReviewer`] is the capability; [`api`] asks an API server over HTTPS, found by [`access`]. [`read`] judges its
//! answer, and is pure: the token must be good for our audience, by an API server that knows audiences. It is bound to a pod,
//! or else whoever shows it says for whom it stands ([`PodIdentity::held_by`]): it was given one by the API server for
//! exactly this service account, which takes a right of its own (`serviceaccounts/token`).

pub mod access;
pub mod api;

use serde::Deserialize;
use tombolo_identity::TrustDomain;
use tombolo_model::names::Namespace;

/// A projected token with its claims has 1 to 2 KB.
pub const MAX_TOKEN_BYTES: usize = 16 * 1024;
const USER: &str = "system:serviceaccount:";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
/// Kubernetes object UIDs are UUIDs.
const MAX_UID_BYTES: usize = 64;
/// A pod's name.
const MAX_HOLDER_BYTES: usize = 253;
/// No UID begins so.
pub const HELD: &str = "held by ";

/// The audience that projected tokens have to be for: one for another server is of no use here, nor ours elsewhere.
pub fn audience(domain: &TrustDomain) -> String {
    format!("tombolo.dev/{domain}")
}

/// Whose token it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PodIdentity {
    pub namespace: Namespace,
    pub service_account: String,
    /// Of the pod, never given again; of who stands for pods, its name and theirs.
    pub pod_uid: String,
    pub pod: String,
    /// By the API server's word. Otherwise `pod` is only what the holder calls itself.
    pub bound: bool,
}

impl PodIdentity {
    /// A token that is bound to no pod is good for a holder that has a name.
    pub fn held_by(self, holder: &str) -> Result<Self, ReviewError> {
        if self.bound {
            return Ok(self);
        }
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
        if holder.is_empty() || holder.len() > MAX_HOLDER_BYTES || !holder.bytes().all(plain) {
            return Err(ReviewError::NotBound);
        }
        let pod_uid = format!("{HELD}{holder} {}/{}", self.namespace, self.service_account);
        Ok(Self { pod_uid, pod: holder.to_owned(), ..self })
    }
}

/// Why a token was not accepted.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReviewError {
    #[error(
        "this federator reviews no service account tokens: start it with --kubernetes in-cluster, or with a kubeconfig"
    )]
    NotConfigured,
    #[error("field token: {0} bytes are no service account token")]
    NoToken(usize),
    #[error(
        "Kubernetes does not accept the service account token for audience {expected:?} ({reason}): is it expired, of another cluster, or projected without this `audience`?"
    )]
    Unauthenticated { expected: String, reason: String },
    #[error(
        "the service account token is not for audience {expected:?} but for {found}: project it with `audience: {expected}`"
    )]
    Audience { expected: String, found: String },
    #[error("the token is {0}'s, not a service account's")]
    NotServiceAccount(String),
    #[error(
        "the service account token is bound to no pod: use a projected volume (serviceAccountToken), not a token made by hand"
    )]
    NotBound,
    #[error(
        "the Kubernetes API server does not let this federator review tokens ({0}): bind its service account to the ClusterRole system:auth-delegator"
    )]
    NotAllowed(String),
    #[error("the Kubernetes API server can't be asked now ({0}): try again")]
    Unavailable(String),
}

impl ReviewError {
    /// A metric label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NotConfigured => "not_configured",
            Self::NoToken(_) => "no_token",
            Self::Unauthenticated { .. } => "unauthenticated",
            Self::Audience { .. } => "audience",
            Self::NotServiceAccount(_) => "not_service_account",
            Self::NotBound => "not_bound",
            Self::NotAllowed(_) => "not_allowed",
            Self::Unavailable(_) => "unavailable",
        }
    }
    /// Whether the same token may be accepted later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::NotAllowed(_) | Self::Unavailable(_))
    }
}

/// What a token says of itself (its claims, RFC 7519 section 4, with those of Kubernetes), for people to find who shows it. Nobody
/// has checked it: it decides nothing.
pub fn claimed(token: &str) -> String {
    use base64::Engine as _;
    let claims = token.split('.').nth(1).filter(|_| token.len() <= MAX_TOKEN_BYTES);
    let claims = claims.and_then(|part| base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(part).ok());
    let claims = claims.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok());
    let name = |path: &str| -> Option<String> {
        let text = claims.as_ref()?.pointer(path)?.as_str()?;
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.');
        (!text.is_empty() && text.len() <= MAX_HOLDER_BYTES && text.bytes().all(plain))
            .then(|| text.to_owned())
    };
    let namespace = name("/kubernetes.io/namespace");
    let (pod, account) = (name("/kubernetes.io/pod/name"), name("/kubernetes.io/serviceaccount/name"));
    match (namespace, pod, account) {
        (Some(namespace), Some(pod), Some(account)) => {
            format!("pod {namespace}/{pod} (service account {account})")
        }
        (Some(namespace), None, Some(account)) => format!("service account {namespace}/{account}"),
        _ => "a token that names no pod".to_owned(),
    }
}

/// Asks about tokens.
#[tonic::async_trait]
pub trait TokenReviewer: Send + Sync {
    /// Whose token it is, if it is good for `audience`.
    async fn review(&self, token: &str, audience: &str) -> Result<PodIdentity, ReviewError>;
}

/// A federator outside Kubernetes.
#[derive(Debug)]
pub struct NoReviewer;

#[tonic::async_trait]
impl TokenReviewer for NoReviewer {
    async fn review(&self, _: &str, _: &str) -> Result<PodIdentity, ReviewError> {
        Err(ReviewError::NotConfigured)
    }
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    status: Status,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Status {
    authenticated: bool,
    user: User,
    audiences: Vec<String>,
    error: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct User {
    username: String,
    extra: std::collections::HashMap<String, Vec<String>>,
}

fn shortened(text: &str) -> String {
    text.chars().take(200).collect()
}

/// Judges a TokenReview's answer.
fn read(answer: &[u8], expected: &str) -> Result<PodIdentity, ReviewError> {
    let unread = |e: serde_json::Error| ReviewError::Unavailable(format!("its answer does not read: {e}"));
    let Status { authenticated, user, audiences, error } =
        serde_json::from_slice::<Answer>(answer).map_err(unread)?.status;
    // An API server that rejects the audience says so in the error, and names no audiences.
    if !authenticated {
        let reason = if error.is_empty() { "it gives no reason".to_owned() } else { shortened(&error) };
        return Err(ReviewError::Unauthenticated { expected: expected.to_owned(), reason });
    }
    if !audiences.iter().any(|audience| audience == expected) {
        let found = match audiences.as_slice() {
            [] => "the API server itself".to_owned(),
            found => shortened(&found.join(", ")),
        };
        return Err(ReviewError::Audience { expected: expected.to_owned(), found });
    }
    let other = || ReviewError::NotServiceAccount(shortened(&user.username));
    let (namespace, name) =
        user.username.strip_prefix(USER).and_then(|rest| rest.split_once(':')).ok_or_else(other)?;
    let extra =
        |key: &str| user.extra.get(key).and_then(|values| values.first()).cloned().unwrap_or_default();
    let (pod, pod_uid) = (extra(POD_NAME), extra(POD_UID));
    let bound = !pod_uid.is_empty();
    if pod_uid.len() > MAX_UID_BYTES {
        return Err(ReviewError::NotBound);
    }
    Ok(PodIdentity {
        namespace: namespace.parse().map_err(|_| other())?,
        service_account: name.to_owned(),
        pod_uid,
        pod: shortened(&pod),
        bound,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const OURS: &str = "tombolo.dev/acme.example";

    fn good() -> Value {
        json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": {
            "authenticated": true, "audiences": [OURS],
            "user": { "username": "system:serviceaccount:shop:web", "uid": "1", "groups": ["system:serviceaccounts"],
                "extra": { POD_NAME: ["web-0"], POD_UID: ["7d2c"], "authentication.kubernetes.io/node-name": ["n1"] } },
        } })
    }

    fn judged(change: impl FnOnce(&mut Value)) -> Result<PodIdentity, ReviewError> {
        let mut answer = good();
        change(&mut answer["status"]);
        read(answer.to_string().as_bytes(), OURS)
    }

    #[test]
    fn a_bound_token_for_our_audience_is_its_service_accounts() {
        let pod = judged(|_| ()).unwrap();
        assert_eq!((pod.namespace.as_str(), pod.service_account.as_str()), ("shop", "web"));
        assert_eq!((pod.pod.as_str(), pod.pod_uid.as_str()), ("web-0", "7d2c"));
    }

    #[test]
    fn a_token_that_is_bound_to_no_pod_is_good_for_a_holder_with_a_name_alone() {
        let unbound = judged(|s| s["user"]["extra"] = json!({})).unwrap();
        for nobody in ["", "two words", "a/b", &"x".repeat(254)] {
            assert_eq!(unbound.clone().held_by(nobody).unwrap_err().kind(), "not_bound", "{nobody:?}");
        }
        let held = unbound.held_by("tombolo-shared-7d").unwrap();
        assert_eq!((held.pod.as_str(), held.bound), ("tombolo-shared-7d", false));
        assert_eq!(held.pod_uid, "held by tombolo-shared-7d shop/web");
        // Whoever has a pod's token speaks for that pod.
        let bound = judged(|_| ()).unwrap().held_by("other").unwrap();
        assert_eq!((bound.pod.as_str(), bound.pod_uid.as_str()), ("web-0", "7d2c"));
    }

    #[test]
    fn every_other_answer_is_refused_with_what_is_wrong() {
        type Change = fn(&mut Value);
        let cases: [(Change, &str, &str); 9] = [
            (|s| s["authenticated"] = false.into(), "unauthenticated", "no reason"),
            (
                |s| *s = json!({ "authenticated": false, "error": "token has expired" }),
                "unauthenticated",
                "token has expired",
            ),
            (|s| *s = json!({}), "unauthenticated", "no reason"),
            (|s| s["audiences"] = json!(["https://kubernetes"]), "audience", "https://kubernetes"),
            (|s| s["audiences"] = json!([]), "audience", "the API server itself"),
            (
                |s| s["user"]["username"] = "kubernetes-admin".into(),
                "not_service_account",
                "kubernetes-admin",
            ),
            (
                |s| s["user"]["username"] = "system:serviceaccount:No:web".into(),
                "not_service_account",
                "No:web",
            ),
            (|s| s["user"]["extra"][POD_UID] = json!(["x".repeat(65)]), "not_bound", "projected"),
            (|s| s["user"] = 7.into(), "unavailable", "does not read"),
        ];
        for (change, kind, said) in cases {
            let error = judged(change).expect_err(kind);
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(said), "{error}");
        }
        assert_eq!(read(b"<html>", OURS).unwrap_err().kind(), "unavailable");
    }

    #[test]
    fn a_token_is_called_by_what_it_says_of_itself_where_that_is_a_name() {
        use base64::Engine as _;
        let token = |claims: &Value| {
            let part = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(claims.to_string());
            claimed(&format!("e30.{part}.c2ln"))
        };
        let mut claims = json!({ "kubernetes.io": {
            "namespace": "shop", "pod": { "name": "web-0", "uid": "1" }, "serviceaccount": { "name": "web" },
        } });
        assert_eq!(token(&claims), "pod shop/web-0 (service account web)");
        claims["kubernetes.io"]["pod"]["name"] = "\u{1b}[2J".into();
        assert_eq!(token(&claims), "service account shop/web");
        claims["kubernetes.io"]["pod"] = Value::Null;
        assert_eq!(token(&claims), "service account shop/web");
        for none in ["", "a.b", "noise", "a.e30.c", &"x.".repeat(MAX_TOKEN_BYTES)] {
            assert_eq!(claimed(none), "a token that names no pod");
        }
    }
}
