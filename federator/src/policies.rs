//! Which `FailoverPolicy` holds for a service, and which `AccessPolicy` objects have a say about it (pure).

use std::collections::BTreeMap;

use tombolo_model::names::{Namespace, ServiceKey};
use tombolo_model::resource::{AccessPolicySpec, FailoverPolicySpec, ObjectKey, Spec};

use crate::facts::{Facts, Link, StoredObject};

const FAILOVER: &str = "FailoverPolicy";
const ACCESS: &str = "AccessPolicy";

/// Objects of a kind in a namespace, by name.
fn in_namespace<'a>(
    facts: &'a Facts,
    kind: &'static str,
    namespace: &str,
) -> impl Iterator<Item = &'a StoredObject> {
    let first = ObjectKey { kind, namespace: namespace.to_owned(), name: String::new() };
    let namespace = namespace.to_owned();
    let found = facts.objects.range(first..);
    found
        .take_while(move |(key, _)| key.kind == kind && key.namespace == namespace)
        .map(|(_, stored)| stored.as_ref())
}

/// The policies whose target a service is, the one that holds first: the oldest, then by name. Policies stand in their
/// target's namespace.
pub fn policies_for<'a>(
    facts: &'a Facts,
    service: &ServiceKey,
) -> Vec<(&'a StoredObject, &'a FailoverPolicySpec)> {
    let mut found: Vec<_> = in_namespace(facts, FAILOVER, service.namespace.as_str())
        .filter_map(|stored| match &stored.object.spec {
            Spec::FailoverPolicy(spec) if spec.target_ref.name == service.name.as_str() => {
                Some((stored, spec))
            }
            _ => None,
        })
        .collect();
    // Stable: they come in order of names.
    found.sort_by_key(|(stored, _)| stored.created_unix);
    found
}

/// The policy that holds for a service; `None`: the default, own cluster first.
pub fn policy_for<'a>(
    facts: &'a Facts,
    service: &ServiceKey,
) -> Option<(&'a StoredObject, &'a FailoverPolicySpec)> {
    policies_for(facts, service).into_iter().next()
}

/// The access policies of a namespace, by name.
pub fn access_policies<'a>(
    facts: &'a Facts,
    namespace: &Namespace,
) -> impl Iterator<Item = (&'a StoredObject, &'a AccessPolicySpec)> {
    in_namespace(facts, ACCESS, namespace.as_str()).filter_map(|stored| match &stored.object.spec {
        Spec::AccessPolicy(spec) => Some((stored, spec)),
        _ => None,
    })
}

/// How many access policies a namespace has.
pub fn access_policy_count(facts: &Facts, namespace: &str) -> usize {
    in_namespace(facts, ACCESS, namespace).count()
}

/// What is known of a linked cluster: its own record replaces what was told when the link was made.
pub fn properties_of<'a>(facts: &'a Facts, link: &'a Link) -> &'a BTreeMap<String, String> {
    match facts.imports.get(&link.peer) {
        Some(import) if !import.properties.is_empty() => &import.properties,
        _ => &link.properties,
    }
}
