//! What a cluster needs that has none: definitions of the MCS kinds (KEP-1645, release v0.5.0), made from the types below,
//! and those of the own kinds ([`own`]).
//!
//! Of MCS, `v1alpha1` and `v1beta1` (stored) have one schema, so nothing converts between them. Labels tell an installed
//! definition's age: a newer one is never replaced ([`is_newer`]).

pub mod inventory;
pub mod own;

use std::collections::BTreeMap;

use kube::api::{Patch, PatchParams};
use kube::core::schema::StructuralSchemaRewriter;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, Client};
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use schemars::transform::AddNullable;
use serde_json::{Value, json};

use super::labels::TOMBOLO;

/// What tells definitions of one group apart: labels, and their values here.
#[derive(Clone, Copy, Debug)]
pub struct Release {
    pub release: (&'static str, &'static str),
    /// Of the schema; grows with each change.
    pub revision: (&'static str, u64),
}

impl Release {
    fn labels(self) -> Value {
        json!({ self.release.0: self.release.1, self.revision.0: self.revision.1.to_string() })
    }
}

const MCS: Release = Release {
    release: ("multicluster.x-k8s.io/release-version", "v0.5.0"),
    revision: ("multicluster.x-k8s.io/crd-schema-revision", 0),
};
const GROUP: &str = "multicluster.x-k8s.io";

/// Announces that the `Service` of the same name and namespace may be used by other clusters.
#[derive(JsonSchema)]
#[allow(dead_code)] // read by the schema alone
#[schemars(rename_all = "camelCase")]
struct ServiceExportBody {
    spec: Option<ServiceExportSpec>,
    status: Option<ServiceExportStatus>,
}

/// What importers see beside the service itself.
#[derive(JsonSchema)]
#[allow(dead_code)]
#[schemars(rename_all = "camelCase")]
struct ServiceExportSpec {
    /// Labels of the imports.
    exported_labels: Option<BTreeMap<String, String>>,
    /// Annotations of the imports.
    exported_annotations: Option<BTreeMap<String, String>>,
}

#[derive(JsonSchema)]
#[allow(dead_code)]
struct ServiceExportStatus {
    /// `Valid`, `Ready` and `Conflict`.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    conditions: Option<Vec<Condition>>,
}

/// A service that some cluster exports. Made by the mesh, read by everybody.
#[derive(JsonSchema)]
#[allow(dead_code)]
#[schemars(rename_all = "camelCase")]
struct ServiceImportBody {
    spec: Option<ServiceImportSpec>,
    status: Option<ServiceImportStatus>,
}

#[derive(JsonSchema)]
#[allow(dead_code)]
#[schemars(rename_all = "camelCase")]
struct ServiceImportSpec {
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    ports: Vec<ServicePort>,
    /// Where the service is reached in this cluster.
    #[schemars(length(max = 2))]
    ips: Option<Vec<String>>,
    r#type: ServiceImportType,
    session_affinity: Option<String>,
    session_affinity_config: Option<SessionAffinityConfig>,
    /// Of `ips`, in their order.
    #[schemars(length(max = 2), extend("x-kubernetes-list-type" = "atomic"))]
    ip_families: Option<Vec<String>>,
    internal_traffic_policy: Option<String>,
    traffic_distribution: Option<String>,
}

#[derive(JsonSchema)]
#[allow(dead_code)]
enum ServiceImportType {
    ClusterSetIP,
    Headless,
}

#[derive(JsonSchema)]
#[allow(dead_code)]
#[schemars(rename_all = "camelCase")]
struct ServicePort {
    name: Option<String>,
    protocol: Option<String>,
    app_protocol: Option<String>,
    #[schemars(range(min = 1, max = 65535))]
    port: i32,
}

#[derive(JsonSchema)]
#[allow(dead_code)]
#[schemars(rename_all = "camelCase")]
struct SessionAffinityConfig {
    #[schemars(rename = "clientIP")]
    client_ip: Option<ClientIpConfig>,
}

#[derive(JsonSchema)]
#[allow(dead_code)]
#[schemars(rename_all = "camelCase")]
struct ClientIpConfig {
    timeout_seconds: Option<i32>,
}

#[derive(JsonSchema)]
#[allow(dead_code)]
struct ServiceImportStatus {
    /// Those that export it.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["cluster"]))]
    clusters: Option<Vec<ClusterStatus>>,
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    conditions: Option<Vec<Condition>>,
}

#[derive(JsonSchema)]
#[allow(dead_code)]
struct ClusterStatus {
    /// Its name, as its `ClusterProperty` `cluster.clusterset.k8s.io` has it.
    cluster: String,
}

/// As `metav1.Condition`.
#[derive(JsonSchema)]
#[allow(dead_code)]
#[schemars(rename_all = "camelCase")]
struct Condition {
    #[schemars(length(max = 316))]
    r#type: String,
    status: ConditionStatus,
    observed_generation: Option<i64>,
    #[schemars(extend("format" = "date-time"))]
    last_transition_time: String,
    /// Several reasons are joined by commas.
    #[schemars(length(min = 1, max = 1024), regex(pattern = r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"))]
    reason: String,
    #[schemars(length(max = 32768))]
    message: String,
}

#[derive(JsonSchema)]
#[allow(dead_code)]
enum ConditionStatus {
    True,
    False,
    Unknown,
}

/// A structural schema with what every object has.
fn schema<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::openapi3().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    let settings = settings.with_transform(AddNullable::default()).with_transform(StructuralSchemaRewriter);
    let mut schema = settings.into_generator().into_root_schema_for::<T>().to_value();
    if let Some(schema) = schema.as_object_mut() {
        schema.remove("title");
        schema.remove("required");
    }
    if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        properties.insert("apiVersion".to_owned(), json!({ "type": "string" }));
        properties.insert("kind".to_owned(), json!({ "type": "string" }));
        properties.insert("metadata".to_owned(), json!({ "type": "object" }));
    }
    schema
}

fn column(name: &str, path: &str) -> Value {
    json!({ "name": name, "type": "string", "jsonPath": path })
}

fn age() -> Value {
    json!({ "name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp" })
}

/// Of `status.conditions`.
fn conditions_schema() -> Value {
    let status = schema::<ServiceExportBody>();
    status.pointer("/properties/status/properties/conditions").cloned().unwrap_or_default()
}

fn condition(name: &str) -> Value {
    column(name, &format!(".status.conditions[?(@.type==\"{name}\")].status"))
}

fn definition(kind: &str, short: [&str; 2], schema: &Value, columns: Vec<Value>) -> Value {
    let plural = format!("{}s", kind.to_ascii_lowercase());
    let mut columns = columns;
    columns.push(age());
    let version = |name: &str, storage: bool| {
        json!({
            "name": name, "served": true, "storage": storage,
            "schema": { "openAPIV3Schema": schema },
            "subresources": { "status": {} },
            "additionalPrinterColumns": columns,
        })
    };
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{plural}.{GROUP}"),
            "labels": MCS.labels(),
            "annotations": { "api-approved.kubernetes.io": "https://github.com/kubernetes/enhancements/pull/1646" },
        },
        "spec": {
            "group": GROUP, "scope": "Namespaced",
            "names": {
                "kind": kind, "listKind": format!("{kind}List"), "plural": plural,
                "singular": kind.to_ascii_lowercase(), "shortNames": short,
            },
            "versions": [version("v1alpha1", false), version("v1beta1", true)],
        },
    })
}

/// Every definition, as documents for the API server.
pub fn all() -> Vec<Value> {
    mcs().into_iter().chain(own::all()).chain(inventory::all()).collect()
}

/// Those of the MCS kinds.
fn mcs() -> Vec<Value> {
    let export = definition(
        "ServiceExport",
        ["svcex", "svcexport"],
        &schema::<ServiceExportBody>(),
        vec![condition("Valid"), condition("Ready"), condition("Conflict")],
    );
    let import = definition(
        "ServiceImport",
        ["svcim", "svcimport"],
        &schema::<ServiceImportBody>(),
        vec![column("Type", ".spec.type"), column("IP", ".spec.ips"), condition("Ready")],
    );
    vec![export, import]
}

/// Whether an installed definition is of a later release or revision than `ours` of the same name: it is left as it is.
pub fn is_newer(installed: &Value, ours: &Value) -> bool {
    // Those of the inventory are released with ours.
    let ours_alone =
        ours.pointer("/metadata/labels").is_some_and(|labels| labels.get(own::RELEASE.release.0).is_some());
    let Release { release, revision } = if ours_alone { own::RELEASE } else { MCS };
    let labels = installed.pointer("/metadata/labels");
    let label = |key: &str| labels.and_then(|labels| labels.get(key)).and_then(Value::as_str);
    let found = label(revision.0).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    let (installed, own) = (label(release.0).map(numbers).unwrap_or_default(), numbers(release.1));
    match ours_alone {
        // The revision counts within a release.
        true => (installed, found) > (own, revision.1),
        false => found > revision.1 || installed > own,
    }
}

/// What became of a definition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Installed {
    Applied,
    /// A later one is there.
    LeftNewer,
    /// Somebody else's is there.
    LeftForeign,
}

impl std::fmt::Display for Installed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Applied => "applied",
            Self::LeftNewer => "left as it is: a later version is installed",
            Self::LeftForeign => "left as it is: somebody else has installed it",
        })
    }
}

/// Installs the definitions: by name, what became of each.
pub async fn install(client: Client) -> Result<Vec<(String, Installed)>, kube::Error> {
    let gvk = GroupVersionKind::gvk("apiextensions.k8s.io", "v1", "CustomResourceDefinition");
    let resource = ApiResource::from_gvk_with_plural(&gvk, "customresourcedefinitions");
    let api: Api<DynamicObject> = Api::all_with(client, &resource);
    let mut done = Vec::new();
    for document in all() {
        let name = document.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default().to_owned();
        let before = api.get_opt(&name).await?;
        let before = before.and_then(|found| serde_json::to_value(found).ok());
        let foreign = before.as_ref().is_some_and(|found| inventory::is_foreign(found, &document));
        let what = if foreign {
            Installed::LeftForeign
        } else if before.is_some_and(|found| is_newer(&found, &document)) {
            Installed::LeftNewer
        } else {
            let ours = PatchParams::apply(TOMBOLO).force();
            api.patch(&name, &ours, &Patch::Apply(&document)).await?;
            Installed::Applied
        };
        done.push((name, what));
    }
    Ok(done)
}

/// `v0.5.0`: `[0, 5, 0]`.
fn numbers(version: &str) -> Vec<u64> {
    version.trim_start_matches('v').split('.').map(|part| part.parse().unwrap_or(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_say_what_the_standard_says() {
        let all = mcs();
        let import = &all[1];
        assert_eq!(import["metadata"]["name"], "serviceimports.multicluster.x-k8s.io");
        assert_eq!(import["spec"]["versions"][1]["storage"], true);
        let schema = &import["spec"]["versions"][1]["schema"]["openAPIV3Schema"]["properties"];
        let spec = &schema["spec"]["properties"];
        assert_eq!(spec["type"]["enum"], json!(["ClusterSetIP", "Headless"]), "{spec}");
        assert_eq!(spec["ips"]["maxItems"], 2, "{spec}");
        assert_eq!(schema["spec"]["required"], json!(["ports", "type"]), "{schema}");
        assert_eq!(
            schema["status"]["properties"]["clusters"]["x-kubernetes-list-map-keys"],
            json!(["cluster"])
        );
        let text = serde_json::to_string(&all).unwrap();
        assert!(!text.contains("$ref") && !text.contains("$schema"), "not structural: {text}");
    }

    #[test]
    fn a_later_definition_is_known_as_such() {
        let installed = |release: &str, revision: &str| json!({ "metadata": { "labels": { MCS.release.0: release, MCS.revision.0: revision } } });
        let ours = &mcs()[0];
        for (release, revision, newer) in [
            ("v0.5.0", "0", false),
            ("v0.4.1", "0", false),
            ("v0.6.0", "0", true),
            ("v0.10.0", "0", true),
            ("v1.0", "0", true),
            ("v0.5.0", "1", true),
        ] {
            assert_eq!(is_newer(&installed(release, revision), ours), newer, "{release} {revision}");
        }
        let nothing = json!({ "metadata": {} });
        assert!(!is_newer(&nothing, ours), "one without labels is of before there were any");
        let own = &own::all()[0];
        let of_own = |release: &str| json!({ "metadata": { "labels": { own::RELEASE.release.0: release, own::RELEASE.revision.0: "0" } } });
        assert!(is_newer(&of_own("1000.0.0"), own) && !is_newer(&of_own(env!("CARGO_PKG_VERSION")), own));
        assert!(!is_newer(&nothing, own) && !is_newer(&of_own("0.0.0"), own));
    }
}
