//! Objects as `get` and `describe` show them: those that were applied, and those that follow from the facts.

mod derived;
mod workloads;

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::resource::{Condition, KindInfo, Object, ObjectKey, Spec};

use super::text::{rfc3339, sentences};
use super::{View, conditions, links, members};
use crate::exports::{exporters, exports};
use crate::facts::StoredObject;
use workloads::ByWorkload;

/// The annotation of objects that nobody applied.
pub const DERIVED: &str = "tombolo.dev/derived";

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Query {
    pub kind: &'static KindInfo,
    /// `None`: all. Kinds that belong to the cluster have none.
    pub namespace: Option<String>,
    /// `None`: all.
    pub name: Option<String>,
}

impl Query {
    fn wants(&self, object: &Object) -> bool {
        let namespace = object.metadata.namespace.as_deref();
        let in_namespace =
            !self.kind.namespaced || self.namespace.as_deref().is_none_or(|wanted| namespace == Some(wanted));
        in_namespace && self.name.as_deref().is_none_or(|wanted| object.metadata.name == wanted)
    }
}

/// An object to show.
struct Shown {
    object: Object,
    /// Applied ones count their changes; conditions say which one they are about.
    generation: Option<u64>,
}

pub fn list(view: &View<'_>, query: &Query) -> Vec<Value> {
    let applied = view.facts.objects.values().filter(|stored| stored.object.kind() == query.kind.kind);
    let applied = applied.filter(|stored| query.wants(&stored.object)).map(|stored| shown(stored));
    let derived = match query.kind.kind {
        "ServiceImport" => derived::imports(view),
        "ClusterLink" => derived::links(view),
        "Workload" => workloads::derived(view),
        _ => Vec::new(),
    };
    let derived = derived
        .into_iter()
        .filter(|object| query.wants(object) && !view.facts.objects.contains_key(&object.key()));
    let derived = derived.map(|object| Shown { object, generation: None });
    let mut wanted: Vec<Shown> = applied.chain(derived).collect();
    let place = |shown: &Shown| (shown.object.metadata.namespace.clone(), shown.object.metadata.name.clone());
    wanted.sort_by_cached_key(place);
    let members = if query.kind.kind == "Workload" { members::by_workload(view) } else { ByWorkload::new() };
    wanted.iter().map(|shown| document(view, shown, &members)).collect()
}

fn shown(stored: &StoredObject) -> Shown {
    let mut object = stored.object.clone();
    // A derived object that was fetched, edited and applied is an applied one.
    object.metadata.annotations.remove(DERIVED);
    object.metadata.uid = Some(stored.uid.clone());
    object.metadata.creation_timestamp = Some(rfc3339(Duration::from_secs(stored.created_unix)));
    object.metadata.generation = Some(stored.generation);
    Shown { object, generation: Some(stored.generation) }
}

/// Conditions and status of every object of our own kinds that Kubernetes keeps.
pub fn kept_in_kubernetes(view: &View<'_>) -> BTreeMap<ObjectKey, (Vec<Condition>, Value)> {
    let kept = view.facts.objects.iter().filter(|(_, stored)| stored.in_kubernetes);
    let members = if kept.clone().any(|(key, _)| key.kind == "Workload") {
        members::by_workload(view)
    } else {
        ByWorkload::new()
    };
    kept.map(|(key, stored)| (key.clone(), status(view, &stored.object, &members))).collect()
}

fn document(view: &View<'_>, shown: &Shown, members: &ByWorkload<'_>) -> Value {
    let Shown { object, generation } = shown;
    let (conditions, mut status) = status(view, object, members);
    let conditions: Vec<Value> =
        conditions.into_iter().map(|condition| observed(condition, *generation)).collect();
    status["conditions"] = Value::from(conditions);
    let mut document = object.to_json();
    document["status"] = status;
    document
}

fn status(view: &View<'_>, object: &Object, members: &ByWorkload<'_>) -> (Vec<Condition>, Value) {
    let metadata = &object.metadata;
    let (mut conditions, status) = match &object.spec {
        Spec::ServiceExport(_) => (export(view, object), json!({})),
        Spec::ServiceImport(_) => import(view, object),
        Spec::ClusterLink(spec) => link(view, spec.cluster.as_deref().unwrap_or(&metadata.name)),
        Spec::FailoverPolicy(spec) => {
            let stored = view.facts.objects.get(&object.key());
            let conditions = stored.map(|stored| conditions::policy::of(view, stored, spec));
            (conditions.unwrap_or_default(), json!({}))
        }
        Spec::AccessPolicy(spec) => conditions::access::of(view, object, spec),
        Spec::Revocation(spec) => {
            let stored = view.facts.objects.get(&object.key());
            stored
                .map(|s| conditions::revocation::of(view, s, spec))
                .unwrap_or_else(|| (Vec::new(), json!({})))
        }
        Spec::JoinPolicy(spec) => conditions::joining::of(view, spec),
        Spec::TrustDomainFederation(_) => conditions::federation::of(view, object),
        Spec::Workload(spec) => workloads::status(view, object, spec, members),
    };
    // Of what was admitted elsewhere, whether it holds here is a question of its own.
    let kept = view.facts.objects.get(&object.key()).is_some_and(|stored| stored.in_kubernetes);
    if kept && conditions.iter().all(|condition| condition.r#type != "Accepted") {
        let text = sentences(std::iter::once("holds in this cluster".to_owned()).chain(object.warnings()));
        conditions.insert(0, Condition::new("Accepted", true, "Accepted", text));
    }
    (conditions, status)
}

/// A condition, with the generation of the object that it is about.
fn observed(condition: Condition, generation: Option<u64>) -> Value {
    let Condition { r#type, status, reason, message } = condition;
    let mut value = json!({ "type": r#type, "status": status, "reason": reason, "message": message });
    if let Some(generation) = generation {
        value["observedGeneration"] = generation.into();
    }
    value
}

/// The service that an export or import stands for: the two share its name.
fn service(object: &Object) -> Option<ServiceKey> {
    let namespace = object.metadata.namespace.as_deref()?.parse().ok()?;
    Some(ServiceKey::new(namespace, object.metadata.name.parse().ok()?))
}

fn nameless(object: &Object) -> Vec<Condition> {
    let text = format!("metadata.name: {:?} is no service name", object.metadata.name);
    vec![Condition::new("Ready", false, "Failed", super::text::message(text))]
}

fn export(view: &View<'_>, object: &Object) -> Vec<Condition> {
    let Some(service) = service(object) else { return nameless(object) };
    let export = crate::exports::export_of(view.facts, &service);
    export.map(|export| conditions::export::of(view, &export)).unwrap_or_default()
}

fn import(view: &View<'_>, object: &Object) -> (Vec<Condition>, Value) {
    let Some(service) = service(object) else { return (nameless(object), json!({})) };
    let exporters = exporters(view.facts, &service, view.serving(&service).iter().copied());
    let mut clusters: Vec<ClusterName> = exporters.into_iter().map(|exporter| exporter.cluster).collect();
    clusters.sort_unstable();
    let clusters: Vec<Value> = clusters.iter().map(|cluster| json!({ "cluster": cluster })).collect();
    (conditions::import::of(view, &service), json!({ "clusters": clusters }))
}

fn link(view: &View<'_>, peer: &str) -> (Vec<Condition>, Value) {
    let Ok(peer) = peer.parse::<ClusterName>() else {
        let text = super::text::message(format!("metadata.name: {peer:?} is no cluster name"));
        return (vec![Condition::new("Connected", false, "Invalid", text)], json!({}));
    };
    let mut status = json!({});
    if let Some(link) = view.facts.links.get(&peer) {
        let gateways = view.facts.peer_gateways(link);
        let gateways: Vec<Value> =
            gateways.iter().map(|g| json!({ "name": g.name, "address": g.address })).collect();
        status["tag"] = link.tag.to_string().into();
        status["gateways"] = gateways.into();
    }
    let paths = links::paths(view, &peer);
    if let Some(rtt_ms) = links::best(&paths).and_then(links::Path::rtt_ms) {
        status["rttMs"] = rtt_ms.into();
    }
    (conditions::link::of(view, &peer), status)
}
