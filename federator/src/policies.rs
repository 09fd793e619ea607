//! Which `FailoverPolicy` holds for a service (pure).

use tombolo_model::names::ServiceKey;
use tombolo_model::resource::{FailoverPolicySpec, ObjectKey, Spec};

use crate::facts::{Facts, StoredObject};

const KIND: &str = "FailoverPolicy";

/// The policies whose target a service is, the one that holds first: the oldest, then by name. Policies stand in their
/// target's namespace.
pub fn policies_for<'a>(
    facts: &'a Facts,
    service: &ServiceKey,
) -> Vec<(&'a StoredObject, &'a FailoverPolicySpec)> {
    let namespace = service.namespace.as_str();
    let first = ObjectKey { kind: KIND, namespace: namespace.to_owned(), name: String::new() };
    let in_namespace =
        facts.objects.range(first..).take_while(|(key, _)| key.kind == KIND && key.namespace == namespace);
    let mut found: Vec<_> = in_namespace
        .filter_map(|(_, stored)| match &stored.object.spec {
            Spec::FailoverPolicy(spec) if spec.target_ref.name == service.name.as_str() => {
                Some((stored.as_ref(), spec))
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
