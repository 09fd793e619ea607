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
    /// `Unknown`: whoever says it can't tell yet.
    pub fn unknown(r#type: &str, reason: &str, message: impl Into<String>) -> Self {
        Self { status: "Unknown".into(), ..Self::new(r#type, false, reason, message) }
    }

    /// Whether an operator should look at it.
    pub fn needs_attention(&self) -> bool {
        needs_attention(&self.r#type, &self.status)
    }
}

/// Conditions that are `True` when something is wrong; `Conflict` is so by the MCS API.
pub const ABNORMAL_TRUE: &[&str] = &["Conflict", "Recreated"];

/// Whether a condition of this type and status is one that an operator should look at.
pub fn needs_attention(r#type: &str, status: &str) -> bool {
    if ABNORMAL_TRUE.contains(&r#type) { status != "False" } else { status != "True" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conflict_needs_attention_when_there_is_one() {
        let condition = |r#type, status| Condition::new(r#type, status, "Reason", "");
        assert!(condition("Conflict", true).needs_attention());
        assert!(!condition("Conflict", false).needs_attention());
        assert!(condition("Ready", false).needs_attention());
        assert!(!condition("Ready", true).needs_attention());
        assert!(Condition::unknown("Ready", "Pending", "").needs_attention());
    }
}
