//! Conditions and status documents, and whether what is found is what is wanted (pure).

use serde_json::{Value, json};
use tombolo_model::names::ServiceKey;
use tombolo_model::resource::Condition;

/// Conditions as Kubernetes has them: each keeps the time of its last change. `now`: RFC 3339.
pub fn conditions(wanted: &[Condition], before: &[Value], generation: u64, now: &str) -> Vec<Value> {
    let known = |condition: &Condition| {
        before.iter().find(|value| value.get("type").and_then(Value::as_str) == Some(&condition.r#type))
    };
    let since = |condition: &Condition| {
        let same = known(condition)
            .filter(|value| value.get("status").and_then(Value::as_str) == Some(condition.status.as_str()));
        let time = same.and_then(|value| value.get("lastTransitionTime")).and_then(Value::as_str);
        time.unwrap_or(now).to_owned()
    };
    let value = |condition: &Condition| {
        let mut value = json!({
            "type": condition.r#type, "status": condition.status, "reason": condition.reason,
            "message": condition.message, "lastTransitionTime": since(condition),
        });
        if generation > 0 {
            value["observedGeneration"] = generation.into();
        }
        value
    };
    wanted.iter().map(value).collect()
}

/// The status of an export or import.
pub fn document(service: &ServiceKey, api_version: &str, kind: &str, status: Value) -> Value {
    json!({
        "apiVersion": api_version, "kind": kind,
        "metadata": { "name": service.name.as_str(), "namespace": service.namespace.as_str() },
        "status": status,
    })
}

/// Whether everything of `wanted` is in `found`; lists are compared as wholes.
pub fn holds(found: &Value, wanted: &Value) -> bool {
    match (found, wanted) {
        (Value::Object(found), Value::Object(wanted)) => {
            wanted.iter().all(|(key, value)| found.get(key).is_some_and(|found| holds(found, value)))
        }
        (Value::Array(found), Value::Array(wanted)) => {
            found.len() == wanted.len() && found.iter().zip(wanted).all(|(found, value)| holds(found, value))
        }
        _ => found == wanted,
    }
}
