//! Which statuses are to be written (pure): what `tombolo describe` shows against what is there.
//!
//! Statuses and reasons are written at once. Messages and figures change all the time ("heard 3 s ago"): they alone are
//! reason enough only once in [`REFRESHED`], so that an idle federator leaves the API server alone.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;
use tombolo_model::resource::{Condition, ObjectKey};

use super::rows::{Row, Rows};
use crate::kubernetes::crds::own;
use crate::kubernetes::status;

/// 100 objects whose messages change all the time cost a third of a request per second.
pub const REFRESHED: Duration = Duration::from_secs(300);
/// Statuses written between two looks at what has happened.
const AT_ONCE: usize = 16;
/// What was refused is tried again after 1 s, then twice as long, up to 64 s.
const MOST_DOUBLINGS: u32 = 6;

/// One request.
#[derive(Clone, PartialEq, Debug)]
pub struct Write {
    pub key: ObjectKey,
    pub document: Value,
    /// Conditions that are other than before, for Events.
    pub changed: Vec<Condition>,
}

/// When an object's status was written, and whether it could be.
#[derive(Clone, Copy, Debug)]
pub struct Written {
    pub at: Instant,
    pub failures: u32,
}

impl Written {
    fn may_again(&self, now: Instant) -> bool {
        let pause = Duration::from_secs(1 << self.failures.min(MOST_DOUBLINGS));
        self.failures == 0 || now >= self.at + pause
    }
}

/// The next writes. `shown`: by object, conditions and status, with uid and generation as the core has them. `start`: of
/// the session, before which nothing is known to have been written. `clock`: RFC 3339.
pub fn plan(
    rows: &Rows,
    shown: &HashMap<ObjectKey, Shown>,
    written: &HashMap<ObjectKey, Written>,
    (start, now): (Instant, Instant),
    clock: &str,
) -> Vec<Write> {
    let mut writes = Vec::new();
    for (key, row) in rows.all().filter(|(_, row)| !row.deleting) {
        if writes.len() >= AT_ONCE {
            break;
        }
        let last = written.get(key).copied().unwrap_or(Written { at: start, failures: 0 });
        let Some((conditions, shown)) = wanted(row, shown.get(key)) else { continue };
        let changed = changed(row, &conditions);
        let differs = !changed.is_empty() || conditions.len() != row.conditions.len();
        if !last.may_again(now) || !differs && now < last.at + REFRESHED {
            continue;
        }
        let mut whole = shown;
        whole["conditions"] =
            status::conditions(&conditions, &row.conditions, row.kept.generation, clock).into();
        let mut before = row.status.clone();
        before["conditions"] = row.conditions.clone().into();
        if status::holds(&before, &whole) && !differs {
            continue;
        }
        writes.push(Write { document: document(key, row, whole), key: key.clone(), changed });
    }
    writes
}

/// What is known of an object that the core has.
#[derive(Clone, PartialEq, Debug)]
pub struct Shown {
    pub uid: String,
    pub generation: u64,
    pub conditions: Vec<Condition>,
    pub status: Value,
}

/// `None`: nothing can be said yet.
fn wanted(row: &Row, shown: Option<&Shown>) -> Option<(Vec<Condition>, Value)> {
    let of_this = shown.filter(|shown| shown.uid == row.kept.uid);
    let Some(refused) = &row.refused else {
        let shown = of_this.filter(|shown| shown.generation == row.kept.generation)?;
        let mut status = shown.status.clone();
        if let Some(status) = status.as_object_mut() {
            // Measured again and again, and of no use to whoever looks here.
            status.remove("rttMs");
        }
        return Some((shown.conditions.clone(), status));
    };
    let text = match of_this {
        Some(_) => format!("{refused}. What was accepted before still holds"),
        None => refused.clone(),
    };
    let accepted = Condition::new("Accepted", false, "Invalid", text);
    Some((vec![accepted], json!({})))
}

fn changed(row: &Row, wanted: &[Condition]) -> Vec<Condition> {
    let is = |condition: &Condition, found: &Value| {
        let text = |field: &str| found.get(field).and_then(Value::as_str).unwrap_or_default();
        (text("type"), text("status"), text("reason"))
            == (condition.r#type.as_str(), condition.status.as_str(), condition.reason.as_str())
            && found.get("observedGeneration").and_then(Value::as_u64) == Some(row.kept.generation)
    };
    wanted
        .iter()
        .filter(|condition| !row.conditions.iter().any(|found| is(condition, found)))
        .cloned()
        .collect()
}

fn document(key: &ObjectKey, row: &Row, status: Value) -> Value {
    // With the uid: a status is of this object, and not of another that got its name.
    let mut metadata = json!({ "name": key.name, "uid": row.kept.uid });
    if !key.namespace.is_empty() {
        metadata["namespace"] = key.namespace.as_str().into();
    }
    json!({
        "apiVersion": format!("{}/{}", own::GROUP, own::VERSION), "kind": key.kind,
        "metadata": metadata, "status": status,
    })
}

#[cfg(test)]
mod tests {
    use kube::core::DynamicObject;
    use kube::runtime::watcher::Event;
    use tombolo_model::resource::KindInfo;

    use super::*;

    fn rows(spec: Value, status: Value) -> (Rows, ObjectKey) {
        let object: DynamicObject = serde_json::from_value(json!({
            "metadata": { "name": "leak", "uid": "u", "resourceVersion": "1", "generation": 2 },
            "spec": spec, "status": status,
        }))
        .unwrap();
        let mut rows = Rows::default();
        rows.apply(KindInfo::find("Revocation").unwrap(), Event::Apply(object));
        let key = rows.all().next().unwrap().0.clone();
        (rows, key)
    }

    fn shown(message: &str) -> Shown {
        let conditions = vec![Condition::new("Enforced", true, "Enforced", message)];
        Shown { uid: "u".into(), generation: 2, conditions, status: json!({ "rttMs": 3 }) }
    }

    #[test]
    fn a_status_is_written_at_once_when_it_says_something_else_and_rarely_when_only_words_change() {
        let start = Instant::now();
        let soon = start + Duration::from_secs(10);
        let (rows, key) = rows(json!({ "node": "db-1" }), json!({}));
        let all = HashMap::from([(key.clone(), shown("1 refuses"))]);
        let first = plan(&rows, &all, &HashMap::new(), (start, soon), "2026-01-01T00:00:00Z");
        let [write] = first.as_slice() else { panic!("{first:?}") };
        assert_eq!(write.document["metadata"]["uid"], "u");
        assert_eq!(write.document["status"].get("rttMs"), None);
        assert_eq!(write.document["status"]["conditions"][0]["observedGeneration"], 2);
        let (rows, _) = self::rows(json!({ "node": "db-1" }), write.document["status"].clone());
        let written = |at| HashMap::from([(key.clone(), Written { at, failures: 0 })]);
        let other = HashMap::from([(key.clone(), shown("2 refuse"))]);
        assert!(plan(&rows, &all, &written(soon), (start, soon + REFRESHED), "x").is_empty(), "nothing new");
        assert!(plan(&rows, &other, &written(soon), (start, soon), "x").is_empty(), "words alone");
        assert_eq!(plan(&rows, &other, &written(soon), (start, soon + REFRESHED), "x").len(), 1);
        let mut older = shown("1 refuses");
        older.generation = 1;
        let late = HashMap::from([(key.clone(), older)]);
        assert!(
            plan(&rows, &late, &written(start), (start, soon + REFRESHED), "x").is_empty(),
            "not seen yet"
        );
    }

    #[test]
    fn what_is_refused_says_so_with_the_field_and_what_failed_waits() {
        let now = Instant::now();
        let (rows, key) = rows(json!({ "node": "a", "serial": "01" }), json!({}));
        let writes = plan(&rows, &HashMap::new(), &HashMap::new(), (now, now), "x");
        let accepted = &writes[0].document["status"]["conditions"][0];
        assert_eq!((&accepted["status"], &accepted["reason"]), (&json!("False"), &json!("Invalid")));
        assert!(accepted["message"].as_str().unwrap().contains("node"), "{accepted}");
        let failed = HashMap::from([(key, Written { at: now, failures: 3 })]);
        assert!(plan(&rows, &HashMap::new(), &failed, (now, now + Duration::from_secs(7)), "x").is_empty());
        assert_eq!(plan(&rows, &HashMap::new(), &failed, (now, now + Duration::from_secs(8)), "x").len(), 1);
    }
}
