//! Definitions of Tombolo's own kinds, made from the types that `tombolo apply` reads (`tombolo_model::resource`): names from
//! [`KINDS`], schemas and rules from the specs' derives, so that a field that is added there is in the definition too.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};
use tombolo_model::resource::{
    AccessPolicySpec, ClusterLinkSpec, FailoverPolicySpec, JoinPolicySpec, KINDS, KindInfo, RevocationSpec,
    TrustDomainFederationSpec, WorkloadSpec,
};

use super::{Release, column, condition, conditions_schema};

/// The group of the own kinds.
pub const GROUP: &str = "tombolo.dev";
/// Of what this program serves.
pub const VERSION: &str = "v1alpha1";
/// The release is this program's; the revision grows with each change of a schema between releases.
pub const RELEASE: Release = Release {
    release: ("tombolo.dev/release-version", env!("CARGO_PKG_VERSION")),
    revision: ("tombolo.dev/crd-schema-revision", 0),
};

/// The own kinds that can be in Kubernetes: all but those of MCS.
pub fn kinds() -> impl Iterator<Item = &'static KindInfo> {
    KINDS.iter().filter(|info| info.api_versions.iter().any(|version| version.starts_with("tombolo.dev/")))
}

/// Every definition.
pub fn all() -> Vec<Value> {
    kinds().filter_map(|info| Some(definition(info, spec_of(info.kind)?, columns(info.kind)))).collect()
}

/// The schema of a kind's spec; `None` for kinds that are not ours.
fn spec_of(kind: &str) -> Option<Value> {
    Some(match kind {
        "Workload" => spec::<WorkloadSpec>(false),
        "FailoverPolicy" => spec::<FailoverPolicySpec>(false),
        // There `null` is stored, and refused by the federator; dropped as elsewhere, it would widen the policy.
        "AccessPolicy" => spec::<AccessPolicySpec>(true),
        "ClusterLink" => spec::<ClusterLinkSpec>(false),
        "Revocation" => spec::<RevocationSpec>(false),
        "JoinPolicy" => spec::<JoinPolicySpec>(false),
        "TrustDomainFederation" => spec::<TrustDomainFederationSpec>(false),
        _ => return None,
    })
}

fn columns(kind: &str) -> Vec<Value> {
    match kind {
        "Workload" => vec![condition("Joined"), condition("Ready")],
        "FailoverPolicy" => {
            vec![column("Target", ".spec.targetRef.name"), condition("Accepted"), condition("ResolvedRefs")]
        }
        "AccessPolicy" => vec![
            column("Action", ".spec.action"),
            json!({ "name": "Dry Run", "type": "boolean", "jsonPath": ".spec.dryRun", "priority": 1 }),
            condition("Accepted"),
            condition("ResolvedRefs"),
        ],
        "ClusterLink" => {
            vec![column("Tag", ".status.tag"), condition("Connected"), condition("Reachable")]
        }
        "Revocation" => vec![condition("Enforced"), column("Reason", ".spec.reason")],
        "TrustDomainFederation" => {
            vec![
                column("Trust Domain", ".spec.trustDomain"),
                condition("BundleFetched"),
                condition("Trusted"),
            ]
        }
        _ => vec![condition("Accepted")],
    }
}

fn definition(info: &KindInfo, spec: Value, mut columns: Vec<Value>) -> Value {
    columns.push(super::age());
    let singular = info.kind.to_ascii_lowercase();
    let required = spec.get("required").is_some() || spec.get("x-kubernetes-validations").is_some();
    let mut schema = json!({
        "type": "object",
        "description": spec.get("description").cloned().unwrap_or_default(),
        "properties": {
            "apiVersion": { "type": "string" },
            "kind": { "type": "string" },
            "metadata": { "type": "object" },
            "spec": spec,
            // What `tombolo describe` shows beside conditions differs from kind to kind.
            "status": {
                "type": "object",
                "x-kubernetes-preserve-unknown-fields": true,
                "properties": { "conditions": conditions_schema() },
            },
        },
    });
    if required {
        schema["required"] = json!(["spec"]);
    }
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": { "name": format!("{}.{GROUP}", info.plural), "labels": RELEASE.labels() },
        "spec": {
            "group": GROUP, "scope": if info.namespaced { "Namespaced" } else { "Cluster" },
            "names": {
                "kind": info.kind, "listKind": format!("{}List", info.kind), "plural": info.plural,
                "singular": singular, "shortNames": info.short, "categories": ["tombolo"],
            },
            "versions": [{
                "name": VERSION, "served": true, "storage": true,
                "schema": { "openAPIV3Schema": schema },
                "subresources": { "status": {} },
                "additionalPrinterColumns": columns,
            }],
        },
    })
}

/// A structural schema of a type. `nullable`: fields that may be absent take `null`, for the federator to refuse.
fn spec<T: JsonSchema>(nullable: bool) -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    let mut schema = settings.into_generator().into_root_schema_for::<T>().to_value();
    structural(&mut schema, nullable);
    schema
}

/// Rewrites what JSON Schema has and structural schemas have not.
fn structural(schema: &mut Value, nullable: bool) {
    let Some(object) = schema.as_object_mut() else { return };
    // An optional type: itself, or null.
    if let Some(Value::Array(mut choices)) = object.remove("anyOf") {
        choices.retain(|choice| choice != &json!({ "type": "null" }));
        if let Some(Value::Object(chosen)) = choices.pop() {
            for (key, value) in chosen {
                object.entry(key).or_insert(value);
            }
            optional(object, nullable);
        }
    }
    if let Some(Value::Array(types)) = object.get("type") {
        let one = types.iter().find(|r#type| *r#type != "null").cloned().unwrap_or_default();
        object.insert("type".to_owned(), one);
        optional(object, nullable);
    }
    // Defaults are the reader's: what is stored stays as it was written. But a key of a list needs one.
    object.remove("default");
    if let Some(default) = object.remove("x-tombolo-default") {
        object.insert("default".to_owned(), default);
    }
    object.remove("title");
    if object.get("format").and_then(Value::as_str).is_some_and(|format| format.starts_with("uint")) {
        object.remove("format");
    }
    // Unknown fields are refused by strict validation, which kubectl asks for, and pruned otherwise.
    if object.get("additionalProperties") == Some(&Value::Bool(false)) {
        object.remove("additionalProperties");
    }
    if let Some(properties) = object.get_mut("properties").and_then(Value::as_object_mut) {
        properties.values_mut().for_each(|property| structural(property, nullable));
    }
    for key in ["items", "additionalProperties"] {
        if let Some(inner) = object.get_mut(key) {
            structural(inner, nullable);
        }
    }
}

fn optional(object: &mut Map<String, Value>, nullable: bool) {
    if nullable {
        object.insert("nullable".to_owned(), Value::Bool(true));
    }
    if let Some(Value::Array(values)) = object.get_mut("enum") {
        values.retain(|value| !value.is_null());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_of<'a>(schema: &'a Value, found: &mut Vec<&'a Map<String, Value>>) {
        let Some(object) = schema.as_object() else { return };
        found.push(object);
        let properties = object.get("properties").and_then(Value::as_object).into_iter().flatten();
        properties.for_each(|(_, property)| all_of(property, found));
        ["items", "additionalProperties"]
            .iter()
            .filter_map(|key| object.get(*key))
            .for_each(|s| all_of(s, found));
    }

    #[test]
    fn every_own_kind_has_a_structural_definition_with_its_names_and_columns() {
        let all = all();
        assert_eq!(all.len(), kinds().count());
        for (definition, info) in all.iter().zip(kinds()) {
            let version = &definition["spec"]["versions"][0];
            assert_eq!(definition["metadata"]["name"], format!("{}.tombolo.dev", info.plural));
            assert_eq!(definition["spec"]["names"]["shortNames"], json!(info.short));
            assert!(version["additionalPrinterColumns"].as_array().unwrap().len() >= 2);
            let mut schemas = Vec::new();
            all_of(&version["schema"]["openAPIV3Schema"], &mut schemas);
            for schema in &schemas {
                let text = Value::Object((*schema).clone());
                assert!(
                    schema.get("type").is_some_and(Value::is_string)
                        || schema.contains_key("x-kubernetes-preserve-unknown-fields"),
                    "{text}"
                );
                for foreign in ["$ref", "anyOf", "oneOf", "allOf", "const", "$defs"] {
                    assert!(!schema.contains_key(foreign), "{}: {foreign} in {text}", info.kind);
                }
                assert_ne!(schema.get("additionalProperties"), Some(&Value::Bool(false)), "{text}");
            }
            assert!(schemas.len() > 8, "{}: {definition}", info.kind);
        }
    }

    #[test]
    fn a_policys_null_is_kept_to_be_refused_and_everybody_elses_is_dropped() {
        let spec = |kind: &str| spec_of(kind).unwrap();
        let policy = spec("AccessPolicy");
        for field in ["targetRefs", "ports"] {
            assert_eq!(policy["properties"][field]["nullable"], true, "{policy}");
        }
        assert!(!spec("Revocation").to_string().contains("nullable"));
        assert_eq!(policy["required"], json!(["action"]));
    }
}
