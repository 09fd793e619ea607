//! What the API server holds of the inventory (pure), filled by watches.

use std::collections::{BTreeMap, BTreeSet};

use kube::core::DynamicObject;
use kube::runtime::watcher::Event;
use serde_json::Value;

use crate::kubernetes::labels::{MANAGED_BY, TOMBOLO};

/// What the API server holds of one kind, by name.
pub type Held = BTreeMap<String, Value>;

/// Kinds of the inventory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Property,
    Profile,
}

/// Both kinds.
#[derive(Default)]
pub struct Tables {
    pub properties: Held,
    pub profiles: Held,
    /// What the lists that are being received have named so far.
    listing: BTreeSet<(bool, String)>,
    pub properties_synced: bool,
    pub profiles_synced: bool,
}

impl Tables {
    /// Takes an event over.
    pub fn take(&mut self, kind: Kind, event: Event<DynamicObject>) {
        let of_property = kind == Kind::Property;
        let (held, synced) = match kind {
            Kind::Property => (&mut self.properties, &mut self.properties_synced),
            Kind::Profile => (&mut self.profiles, &mut self.profiles_synced),
        };
        let kept = |object: DynamicObject| {
            let name = object.metadata.name.clone()?;
            let mut value = serde_json::to_value(object).ok()?;
            if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
                metadata.remove("managedFields");
            }
            Some((name, value))
        };
        match event {
            Event::Init => self.listing.retain(|(property, _)| *property != of_property),
            Event::InitApply(object) => {
                if let Some((name, value)) = kept(object) {
                    self.listing.insert((of_property, name.clone()));
                    held.insert(name, value);
                }
            }
            Event::InitDone => {
                held.retain(|name, _| self.listing.contains(&(of_property, name.clone())));
                *synced = true;
            }
            Event::Apply(object) => held.extend(kept(object)),
            Event::Delete(object) => {
                held.remove(&object.metadata.name.unwrap_or_default());
            }
        }
    }
}

/// Whether an object was written by a federator.
pub fn is_ours(object: &Value) -> bool {
    let labels = object.pointer("/metadata/labels");
    labels.and_then(|labels| labels.get(MANAGED_BY)).and_then(Value::as_str) == Some(TOMBOLO)
}
