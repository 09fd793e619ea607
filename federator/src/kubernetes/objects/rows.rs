//! Objects of our own kinds as the API server holds them (pure): each read by the code that `tombolo apply` uses, with what
//! of its status is there. What does not read is kept too, with the reason: its status has to say it.

use std::collections::{BTreeMap, BTreeSet};

use kube::core::DynamicObject;
use kube::runtime::watcher::Event;
use serde_json::{Map, Value, json};
use tombolo_model::resource::{KindInfo, Object, ObjectKey};

use crate::core::objects::KeptByKubernetes;
use crate::kubernetes::crds::own;
use crate::kubernetes::labels::digest;

/// What `kubectl apply` keeps for itself: as long as the object.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// One object.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    pub kept: KeptByKubernetes,
    version: u64,
    pub deleting: bool,
    /// Of everything but the status: the same again need not be read.
    digest: String,
    /// Why the core has not got it; `None`: it has.
    pub refused: Option<String>,
    /// As it is there, without conditions.
    pub status: Value,
    pub conditions: Vec<Value>,
}

/// What is to be done after an event.
#[derive(Clone, PartialEq, Debug)]
pub enum Task {
    /// Hand it to the core.
    Apply(Box<Object>, KeptByKubernetes),
    /// Have the core forget it.
    Delete,
}

/// Every object of every kind.
#[derive(Debug, Default)]
pub struct Rows {
    rows: BTreeMap<ObjectKey, Row>,
    /// What the lists that are being received have named so far, by kind.
    listing: BTreeMap<&'static str, BTreeSet<ObjectKey>>,
}

impl Rows {
    /// Takes an event over.
    pub fn apply(
        &mut self,
        info: &'static KindInfo,
        event: Event<DynamicObject>,
    ) -> BTreeMap<ObjectKey, Task> {
        match event {
            Event::Init => {
                self.listing.insert(info.kind, BTreeSet::new());
                BTreeMap::new()
            }
            Event::InitApply(object) => {
                if let (Some(listing), Some(key)) = (self.listing.get_mut(info.kind), key_of(info, &object)) {
                    listing.insert(key);
                }
                self.put(info, object).into_iter().collect()
            }
            Event::InitDone => {
                let listed = self.listing.remove(info.kind).unwrap_or_default();
                let gone: Vec<ObjectKey> =
                    self.of_kind(info.kind).filter(|key| !listed.contains(*key)).cloned().collect();
                gone.iter().for_each(|key| drop(self.rows.remove(key)));
                gone.into_iter().map(|key| (key, Task::Delete)).collect()
            }
            Event::Apply(object) => self.put(info, object).into_iter().collect(),
            Event::Delete(object) => {
                let Some(key) = key_of(info, &object) else { return BTreeMap::new() };
                // One that was deleted before another of its name was made.
                let uid = object.metadata.uid.unwrap_or_default();
                match self.rows.get(&key) {
                    Some(row) if row.kept.uid == uid => {
                        self.rows.remove(&key);
                        [(key, Task::Delete)].into()
                    }
                    _ => BTreeMap::new(),
                }
            }
        }
    }

    fn put(&mut self, info: &'static KindInfo, object: DynamicObject) -> Option<(ObjectKey, Task)> {
        let key = key_of(info, &object)?;
        let (mut row, document) = read(info, object);
        let before = self.rows.get(&key).filter(|before| before.kept.uid == row.kept.uid);
        if before.is_some_and(|before| before.version > row.version) {
            return None;
        }
        let known = before.filter(|before| before.digest == row.digest && before.deleting == row.deleting);
        if let Some(known) = known {
            row.refused.clone_from(&known.refused);
            self.rows.insert(key, row);
            return None;
        }
        let task = if row.deleting {
            Task::Delete
        } else {
            match Object::from_json(document) {
                Ok(object) => Task::Apply(Box::new(object), row.kept.clone()),
                Err(error) => {
                    row.refused = Some(error.to_string());
                    self.rows.insert(key, row);
                    // What was accepted before holds: nothing is opened by a mistake.
                    return None;
                }
            }
        };
        self.rows.insert(key.clone(), row);
        Some((key, task))
    }

    /// What came of handing an object over.
    pub fn handed_over(&mut self, key: &ObjectKey, refused: Option<String>) {
        if let Some(row) = self.rows.get_mut(key) {
            row.refused = refused;
        }
    }

    fn of_kind(&self, kind: &'static str) -> impl Iterator<Item = &ObjectKey> {
        self.rows.keys().filter(move |key| key.kind == kind)
    }

    pub fn get(&self, key: &ObjectKey) -> Option<&Row> {
        self.rows.get(key)
    }

    pub fn all(&self) -> impl Iterator<Item = (&ObjectKey, &Row)> {
        self.rows.iter()
    }

    pub fn refused(&self) -> usize {
        self.rows.values().filter(|row| row.refused.is_some()).count()
    }
}

fn key_of(info: &'static KindInfo, object: &DynamicObject) -> Option<ObjectKey> {
    let namespace = object.metadata.namespace.clone().unwrap_or_default();
    Some(ObjectKey { kind: info.kind, namespace, name: object.metadata.name.clone()? })
}

/// A row, and the document as `tombolo apply` would get it.
fn read(info: &'static KindInfo, object: DynamicObject) -> (Row, Value) {
    let DynamicObject { metadata, mut data, .. } = object;
    let annotations: Map<String, Value> = metadata
        .annotations
        .unwrap_or_default()
        .into_iter()
        .filter(|(key, _)| key != LAST_APPLIED)
        .map(|(key, value)| (key, value.into()))
        .collect();
    let mut named = json!({
        "name": metadata.name, "annotations": annotations, "labels": metadata.labels.unwrap_or_default(),
    });
    if let Some(namespace) = metadata.namespace {
        named["namespace"] = namespace.into();
    }
    let spec =
        data.get_mut("spec").map(Value::take).filter(|spec| !spec.is_null()).unwrap_or_else(|| json!({}));
    let mut status = data.get_mut("status").map(Value::take).unwrap_or_default();
    let conditions = status.as_object_mut().and_then(|status| status.remove("conditions"));
    let conditions = match conditions {
        Some(Value::Array(conditions)) => conditions,
        _ => Vec::new(),
    };
    let document = json!({
        "apiVersion": format!("{}/{}", own::GROUP, own::VERSION), "kind": info.kind,
        "metadata": named, "spec": spec,
    });
    let generation = metadata.generation.and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
    let created = metadata.creation_timestamp.map_or(0, |time| time.0.as_second());
    let row = Row {
        digest: digest(&json!([document, generation])),
        kept: KeptByKubernetes {
            uid: metadata.uid.unwrap_or_default(),
            created_unix: u64::try_from(created).unwrap_or(0),
            generation,
        },
        version: metadata.resource_version.and_then(|v| v.parse().ok()).unwrap_or(0),
        deleting: metadata.deletion_timestamp.is_some(),
        refused: None,
        status,
        conditions,
    };
    (row, document)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> &'static KindInfo {
        KindInfo::find("Revocation").unwrap()
    }

    fn revocation(uid: &str, version: u64, spec: Value) -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "tombolo.dev/v1alpha1", "kind": "Revocation",
            "metadata": {
                "name": "leak", "uid": uid, "resourceVersion": version.to_string(), "generation": version,
                "managedFields": [], "creationTimestamp": "2026-01-01T00:00:00Z",
                "annotations": { LAST_APPLIED: "{}" },
            },
            "spec": spec, "status": { "conditions": [{ "type": "Enforced" }], "clusters": [] },
        }))
        .unwrap()
    }

    #[test]
    fn an_object_is_handed_over_once_and_what_does_not_read_is_kept_with_the_reason() {
        let mut rows = Rows::default();
        let good = revocation("u", 1, json!({ "node": "db-1" }));
        let tasks = rows.apply(info(), Event::Apply(good.clone()));
        let (key, Task::Apply(object, kept)) = tasks.into_iter().next().unwrap() else { panic!() };
        assert!(object.metadata.annotations.is_empty() && kept.generation == 1 && kept.uid == "u");
        assert_eq!(kept.created_unix, 1_767_225_600);
        assert_eq!(rows.get(&key).unwrap().conditions.len(), 1);
        assert!(rows.apply(info(), Event::Apply(good)).is_empty(), "the same again");
        let bad = revocation("u", 2, json!({ "node": "db-1", "cluster": "west" }));
        assert!(rows.apply(info(), Event::Apply(bad)).is_empty(), "what was accepted before holds");
        assert!(rows.get(&key).unwrap().refused.as_ref().unwrap().contains("exactly one"));
        let old = revocation("u", 1, json!({ "node": "db-1" }));
        assert!(rows.apply(info(), Event::Apply(old)).is_empty(), "older than what is known");
        assert_eq!(rows.refused(), 1);
    }

    #[test]
    fn a_list_that_begins_anew_deletes_what_it_does_not_name_once_it_is_whole() {
        let mut rows = Rows::default();
        rows.apply(info(), Event::Apply(revocation("u", 1, json!({ "node": "db-1" }))));
        assert!(rows.apply(info(), Event::Init).is_empty() && rows.all().next().is_some());
        let tasks = rows.apply(info(), Event::InitDone);
        assert_eq!(tasks.values().collect::<Vec<_>>(), [&Task::Delete]);
        assert!(rows.all().next().is_none());
    }

    #[test]
    fn a_late_deletion_of_another_of_its_name_deletes_nothing() {
        let mut rows = Rows::default();
        rows.apply(info(), Event::Apply(revocation("new", 5, json!({ "node": "db-1" }))));
        assert!(rows.apply(info(), Event::Delete(revocation("old", 6, json!({})))).is_empty());
        assert_eq!(rows.apply(info(), Event::Delete(revocation("new", 7, json!({})))).len(), 1);
    }
}
