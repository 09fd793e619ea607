//! What is to be written next for a service (pure): what it is to look like against what the API server holds.
//!
//! One step at a time: an import is made before what it owns, and gets its addresses once its derived `Service` has
//! them. After each step the answers are in the tables, and a plan without writes means that all is done. What somebody
//! else keeps under one of our names is never touched, and said ([`Plan::obstacle`]).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde_json::{Value, json};
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::resource::Condition;
use tombolo_model::resource::service_export::ServiceType;

use super::labels::derived_name;
use super::rows::{ImportRow, Meta, Packed, ServiceRow, SliceRow};
use super::tables::{Kind, Tables};
use super::targets::ServicePort;
use super::{desired, status};
use crate::view::kubernetes::{ShownExport, ShownImport, ShownService};

/// One request.
#[derive(Clone, PartialEq, Debug)]
pub enum Write {
    /// Server-side apply. `force`: over what others have set, on objects of ours.
    Apply { kind: Kind, name: String, document: Value, force: bool },
    /// Server-side apply of the status. `changed`: conditions that are other than before, for events.
    Status { kind: Kind, document: Value, uid: String, changed: Vec<Condition> },
    /// Of exactly this object.
    Delete { kind: Kind, name: String, uid: String },
}

/// The next step.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Plan {
    pub writes: Vec<Write>,
    /// What stands in the way, for people.
    pub obstacle: Option<String>,
}

/// What every plan is made with.
#[derive(Clone, Debug)]
pub struct Surroundings<'a> {
    /// Of `ServiceExport` and `ServiceImport`, as this API server serves them.
    pub api_version: &'a str,
    pub cluster: &'a ClusterName,
    /// RFC 3339, for conditions.
    pub now: &'a str,
    /// What the API server said of the last write, if it refused it.
    pub refusal: Option<&'a str>,
    /// `None`: derived `Service`s lead nowhere here.
    pub front: Option<Front<'a>>,
}

/// Where the derived `Service` leads.
#[derive(Clone, Copy, Debug)]
pub struct Front<'a> {
    /// The number of each port there.
    pub numbers: &'a BTreeMap<ServicePort, u16>,
    /// The shared sidecars that are ready.
    pub addresses: &'a BTreeSet<IpAddr>,
}

/// The next step for a service.
pub fn plan(service: &ServiceKey, shown: &ShownService, tables: &Tables, with: &Surroundings<'_>) -> Plan {
    let mut plan = Plan::default();
    let import = tables.import_row(service);
    match (&shown.import, import) {
        (_, Some(row)) if !row.meta.ours => {
            if shown.import.is_some() {
                plan.obstacle = Some(format!(
                    "a ServiceImport {service} is there that somebody else keeps: delete it, or label it app.kubernetes.io/managed-by=tombolo"
                ));
            }
        }
        (Some(_), Some(row)) if row.meta.deleting => {}
        (Some(wanted), row) if tables.has_namespace(service.namespace.as_str()) => {
            plan_import(&mut plan, service, wanted, row, tables, with);
        }
        // Not here: namespaces are somebody else's to make.
        (Some(_), _) => {}
        (None, row) => plan_removal(&mut plan, service, row, tables),
    }
    plan_export(&mut plan, service, shown.export.as_ref(), tables, with);
    plan
}

/// Whether an object has to be applied: it is not what was written last, or somebody has changed it.
fn differs(meta: &Meta, found: &Packed, document: &Value) -> bool {
    meta.applied != desired::applied(document)
        || !status::holds(&found.value(), document.get("spec").unwrap_or(&Value::Null))
}

fn plan_import(
    plan: &mut Plan,
    service: &ServiceKey,
    wanted: &ShownImport,
    row: Option<&ImportRow>,
    tables: &Tables,
    with: &Surroundings<'_>,
) {
    let derived = tables.derived_row(service);
    let is_ours = |import: Option<&str>| import == Some(service.name.as_str());
    let own = derived.filter(|row| is_ours(row.import.as_deref()) && !row.meta.deleting);
    let ips: &[IpAddr] = match wanted.merged.kind {
        ServiceType::ClusterSetIp => own.map(|row| row.cluster_ips.as_slice()).unwrap_or_default(),
        ServiceType::Headless => &[],
    };
    let document = desired::import(service, with.api_version, &wanted.merged, ips);
    let name = service.name.to_string();
    let Some(row) = row else {
        let write = Write::Apply { kind: Kind::ServiceImport, name, document, force: false };
        plan.writes.push(write);
        return;
    };
    // Its addresses stay while its `Service` is made anew.
    let waiting = wanted.merged.kind == ServiceType::ClusterSetIp && own.is_none();
    if differs(&row.meta, &row.spec, &document) && !(waiting && row.addressed) {
        plan.writes.push(Write::Apply { kind: Kind::ServiceImport, name, document, force: true });
    }
    let uid = row.meta.uid.as_str();
    let found = own.map(|row| row.spec.value());
    let none = BTreeMap::new();
    let numbers = with.front.map_or(&none, |front| front.numbers);
    match (desired::derived(service, &wanted.merged, found.as_ref(), uid, with.api_version, numbers), derived)
    {
        (Some(_), Some(row)) if own.is_none() && !row.meta.deleting => {
            plan.obstacle = Some(format!(
                "a Service {}/{} is there that somebody else keeps: {service} gets no address",
                service.namespace,
                derived_name(service)
            ));
        }
        (Some(_), Some(row)) if row.meta.deleting => {}
        (Some(document), row) if row.is_none_or(|row| differs(&row.meta, &row.spec, &document)) => {
            let name = derived_name(service);
            plan.writes.push(Write::Apply { kind: Kind::Service, name, document, force: row.is_some() });
        }
        (None, Some(_)) => {
            plan.writes.extend(own.map(|row| delete(Kind::Service, derived_name(service), &row.meta)))
        }
        _ => {}
    }
    let slices = desired::slices(service, wanted, uid, with.api_version);
    plan_slices(plan, slices, &tables.slices_of_import(service));
    let fronts = with.front.zip(own).map(|(front, own)| {
        let ServiceRow { meta, cluster_ips, .. } = own;
        desired::fronts(service, &wanted.merged, &meta.uid, cluster_ips, front.numbers, front.addresses)
    });
    plan_slices(plan, fronts.unwrap_or_default(), &tables.fronts_of_import(service));
    let ready = import_ready(plan, wanted, row, with);
    if let Some(ready) = ready {
        plan_import_status(plan, service, wanted, row, ready, with);
    }
}

fn delete(kind: Kind, name: String, meta: &Meta) -> Write {
    Write::Delete { kind, name, uid: meta.uid.clone() }
}

fn plan_slices(plan: &mut Plan, wanted: BTreeMap<String, Value>, found: &BTreeMap<&str, &SliceRow>) {
    for (name, row) in found {
        if !wanted.contains_key(*name) && !row.meta.deleting {
            plan.writes.push(delete(Kind::EndpointSlice, (*name).to_owned(), &row.meta));
        }
    }
    for (name, document) in wanted {
        let row = found.get(name.as_str());
        // Slices are ours alone, and large: their fingerprint says enough.
        if row.is_none_or(|row| row.meta.applied != desired::applied(&document)) {
            plan.writes.push(Write::Apply {
                kind: Kind::EndpointSlice,
                name,
                document,
                force: row.is_some(),
            });
        }
    }
}

/// The `Ready` condition of an import; `None` while the next step is still to show it.
fn import_ready(
    plan: &Plan,
    wanted: &ShownImport,
    row: &ImportRow,
    with: &Surroundings<'_>,
) -> Option<Condition> {
    let clusters: Vec<&str> = wanted.clusters.iter().map(ClusterName::as_str).collect();
    let headless = wanted.merged.kind == ServiceType::Headless;
    let addressed = headless || row.addressed;
    let pending = |text: String| Some(Condition::new("Ready", false, "Pending", text));
    if let Some(text) = plan.obstacle.as_deref().or(with.refusal) {
        let family = text.contains("ipFamilies") || text.contains("ipFamilyPolicy");
        let reason = if family { "IPFamilyNotSupported" } else { "Pending" };
        let what = if addressed { "what is there is out of date" } else { "it has no address" };
        return Some(Condition::new("Ready", false, reason, format!("{what}: {text}")));
    }
    if !addressed && wanted.merged.ports.is_empty() {
        return pending("no exporter says what its ports are yet".to_owned());
    }
    if !addressed {
        return None;
    }
    let without = |port: &&ServicePort| with.front.is_some_and(|front| !front.numbers.contains_key(*port));
    let ports = desired::numbered_ports(&wanted.merged);
    if let Some((protocol, port)) = ports.iter().find(without) {
        return pending(format!(
            "no number is left at the shared sidecars for port {port}/{protocol}: they tell 10,000 apart"
        ));
    }
    if !headless && with.front.is_some_and(|front| front.addresses.is_empty()) {
        return pending(
            "no shared sidecar is ready: its address leads nowhere for pods without a sidecar".to_owned(),
        );
    }
    Some(Condition::new("Ready", true, "Ready", format!("exported by {}", clusters.join(", "))))
}

fn plan_import_status(
    plan: &mut Plan,
    service: &ServiceKey,
    wanted: &ShownImport,
    row: &ImportRow,
    ready: Condition,
    with: &Surroundings<'_>,
) {
    let found = row.status.value();
    let before = found.get("conditions").and_then(Value::as_array).cloned().unwrap_or_default();
    let clusters: Vec<Value> =
        wanted.clusters.iter().map(|cluster| json!({ "cluster": cluster.as_str() })).collect();
    let conditions = status::conditions(&[ready], &before, 0, with.now);
    let status = json!({ "clusters": clusters, "conditions": conditions });
    if status::holds(&found, &status) {
        return;
    }
    plan.writes.push(Write::Status {
        kind: Kind::ServiceImport,
        document: status::document(service, with.api_version, "ServiceImport", status),
        uid: row.meta.uid.clone(),
        changed: Vec::new(),
    });
}

/// Nobody exports it: what was written for it goes.
fn plan_removal(plan: &mut Plan, service: &ServiceKey, row: Option<&ImportRow>, tables: &Tables) {
    for (name, slice) in tables.slices_of_import(service).into_iter().chain(tables.fronts_of_import(service))
    {
        if !slice.meta.deleting {
            plan.writes.push(delete(Kind::EndpointSlice, name.to_owned(), &slice.meta));
        }
    }
    let derived = tables.derived_row(service);
    let derived = derived.filter(|row| row.import.as_deref() == Some(service.name.as_str()));
    if let Some(derived) = derived.filter(|row| !row.meta.deleting) {
        plan.writes.push(delete(Kind::Service, derived_name(service), &derived.meta));
    }
    if let Some(row) = row.filter(|row| !row.meta.deleting) {
        plan.writes.push(delete(Kind::ServiceImport, service.name.to_string(), &row.meta));
    }
}

fn plan_export(
    plan: &mut Plan,
    service: &ServiceKey,
    shown: Option<&ShownExport>,
    tables: &Tables,
    with: &Surroundings<'_>,
) {
    let (Some(shown), Some(row)) = (shown, tables.export_row(service)) else { return };
    // The facts are about another one of this name, or about what it was: they follow soon.
    if shown.uid != row.meta.uid || shown.generation != row.generation || row.meta.deleting {
        return;
    }
    let mut wanted = shown.conditions.clone();
    if let Some(obstacle) = &plan.obstacle {
        for ready in wanted.iter_mut().filter(|condition| condition.r#type == "Ready") {
            let text = format!("{}; in {} {obstacle}", ready.message, with.cluster);
            *ready = Condition::new("Ready", false, "Failed", text);
        }
    }
    let before = row.conditions.list();
    let conditions = status::conditions(&wanted, &before, row.generation, with.now);
    // Those of other controllers are theirs, and come in any order.
    let has = |condition: &Value| before.iter().any(|found| status::holds(found, condition));
    if conditions.iter().all(has) {
        return;
    }
    let changed = wanted.into_iter().zip(&conditions).filter(|(_, value)| {
        let was = before.iter().find(|before| before.get("type") == value.get("type"));
        was.is_none_or(|was| {
            was.get("status") != value.get("status") || was.get("reason") != value.get("reason")
        })
    });
    // No Event can be made in a namespace that ends.
    let changed = changed.filter(|_| tables.has_namespace(service.namespace.as_str()));
    let changed = changed.map(|(condition, _)| condition).collect();
    plan.writes.push(Write::Status {
        kind: Kind::ServiceExport,
        document: status::document(
            service,
            with.api_version,
            "ServiceExport",
            json!({ "conditions": conditions }),
        ),
        uid: row.meta.uid.clone(),
        changed,
    });
}

#[cfg(test)]
mod tests;
