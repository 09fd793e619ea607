//! Status conditions, shaped like Kubernetes' `metav1.Condition`.

use serde::{Deserialize, Serialize};

/// One aspect of an object's state.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    pub r#type: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// CamelCase, for programs.
    pub reason: String,
    /// For people.
    pub message: String,
}

impl Condition {
    pub fn new(r#type: &str, status: bool, reason: &str, message: impl Into<String>) -> Self {
        Self {
            r#type: r#type.into(),
            status: if status { "True" } else { "False" }.into(),
            reason: reason.into(),
            message: message.into(),
        }
    }
}
