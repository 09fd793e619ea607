//! Admission requests and answers (admission.k8s.io/v1 AdmissionReview), and what is decided of one (pure).

use serde_json::{Value, json};

use super::pod::{Given, inject, patch};
use super::wishes::{NamespaceLabels, Wanted, wanted};

const API_VERSION: &str = "admission.k8s.io/v1";
/// Kubernetes cuts longer ones, and more than 4096 bytes together.
const MAX_WARNING_BYTES: usize = 256;

/// A pod that is about to be made.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    pub uid: String,
    pub namespace: String,
    pub pod: Value,
}

/// Why a request is not one about a pod that is made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unread {
    /// There is nothing to answer in its own form.
    #[error("this is no AdmissionReview: {0}")]
    NoReview(String),
    #[error("{field}: {reason}")]
    Field { uid: String, field: &'static str, reason: String },
    /// Not ours to decide.
    #[error("{what} is let through as it is")]
    Other { uid: String, what: String },
}

impl Unread {
    /// The answer, where the request has an identity.
    pub fn answer(&self) -> Option<Value> {
        match self {
            Self::NoReview(_) => None,
            Self::Field { uid, .. } => Some(refused(uid, 400, "BadRequest", &self.to_string())),
            Self::Other { uid, .. } => Some(admitted(uid, &[], Vec::new())),
        }
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(100).collect()
}

/// Reads a request's body.
pub fn read(body: &[u8]) -> Result<Asked, Unread> {
    let mut review: Value = serde_json::from_slice(body).map_err(|e| Unread::NoReview(e.to_string()))?;
    let text = |path: &str| review.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    let uid = text("/request/uid");
    if uid.is_empty() || uid.len() > 128 {
        return Err(Unread::NoReview("request.uid is missing".to_owned()));
    }
    let wrong = |field, reason: String| Err(Unread::Field { uid: uid.clone(), field, reason });
    let (version, kind) = (text("/apiVersion"), text("/kind"));
    if version != API_VERSION || kind != "AdmissionReview" {
        let found = format!("{:?} {:?}", shortened(&version), shortened(&kind));
        return wrong(
            "apiVersion",
            format!(
                "{found} is not {API_VERSION} AdmissionReview: the webhook's admissionReviewVersions has to be [v1]"
            ),
        );
    }
    let (group, resource, sub) =
        (text("/request/resource/group"), text("/request/resource/resource"), text("/request/subResource"));
    let operation = text("/request/operation");
    if !group.is_empty() || resource != "pods" || !sub.is_empty() || operation != "CREATE" {
        let what = format!("{} of {}/{}", shortened(&operation), shortened(&resource), shortened(&sub));
        return Err(Unread::Other { uid, what });
    }
    let namespace = text("/request/namespace");
    // It becomes part of what the API server is asked.
    if namespace.parse::<tombolo_model::names::Namespace>().is_err() {
        return wrong("request.namespace", "is missing, or no namespace's name".to_owned());
    }
    let Some(pod) = review.pointer_mut("/request/object").map(Value::take).filter(Value::is_object) else {
        return wrong("request.object", "is no pod".to_owned());
    };
    Ok(Asked { uid, namespace, pod })
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// As it is: it wants no sidecar, cannot have one, or has it.
    Unchanged {
        warnings: Vec<String>,
    },
    Injected {
        patch: Vec<Value>,
        warnings: Vec<String>,
    },
    Refused {
        message: String,
    },
}

impl Decision {
    /// A metric label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unchanged { .. } => "unchanged",
            Self::Injected { .. } => "injected",
            Self::Refused { .. } => "refused",
        }
    }

    pub fn answer(&self, uid: &str) -> Value {
        match self {
            Self::Unchanged { warnings } => admitted(uid, warnings, Vec::new()),
            Self::Injected { patch, warnings } => admitted(uid, warnings, patch.clone()),
            Self::Refused { message } => refused(uid, 422, "Invalid", message),
        }
    }
}

/// Decides. `labels`: of the pod's namespace.
pub fn decide(asked: &Asked, labels: &NamespaceLabels, given: &Given<'_>) -> Decision {
    let refuse = |error: &dyn std::fmt::Display| Decision::Refused {
        message: format!("tombolo injects no sidecar: {error}"),
    };
    let wishes = match wanted(&asked.pod, &asked.namespace, labels) {
        Ok(Wanted::No) => return Decision::Unchanged { warnings: Vec::new() },
        Ok(Wanted::NotPossible(why)) => return Decision::Unchanged { warnings: vec![why] },
        Ok(Wanted::Yes(wishes)) => wishes,
        Err(error) => return refuse(&error),
    };
    match inject(&asked.pod, &wishes, given) {
        Err(error) => refuse(&error),
        Ok(pod) => {
            let warnings = wishes.warnings.clone();
            match patch(&asked.pod, &pod) {
                patch if patch.is_empty() => Decision::Unchanged { warnings },
                patch => Decision::Injected { patch, warnings },
            }
        }
    }
}

fn response(response: Value) -> Value {
    json!({ "apiVersion": API_VERSION, "kind": "AdmissionReview", "response": response })
}

fn admitted(uid: &str, warnings: &[String], patch: Vec<Value>) -> Value {
    use base64::Engine as _;
    let warnings: Vec<String> = warnings.iter().map(|warning| cut(warning)).collect();
    let mut answer = json!({ "uid": uid, "allowed": true, "warnings": warnings });
    if !patch.is_empty() {
        let patch = Value::Array(patch).to_string();
        answer["patchType"] = "JSONPatch".into();
        answer["patch"] = base64::engine::general_purpose::STANDARD.encode(patch).into();
    }
    response(answer)
}

fn cut(warning: &str) -> String {
    let end = (0..=MAX_WARNING_BYTES.min(warning.len())).rev().find(|at| warning.is_char_boundary(*at));
    warning.get(..end.unwrap_or_default()).unwrap_or_default().to_owned()
}

/// A refusal that whoever makes the pod can read.
pub fn refused(uid: &str, code: u16, reason: &str, message: &str) -> Value {
    let status = json!({ "code": code, "reason": reason, "message": message });
    response(json!({ "uid": uid, "allowed": false, "status": status }))
}

#[cfg(test)]
mod tests;
