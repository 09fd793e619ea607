//! Uninstalling clusters whose pods run.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tombolo_tests::kube::{MCS, Object};
use tombolo_tests::testbed::{Cluster, NAMESPACE, Testbed, eventually};

use crate::shop::{self, SHOP};

/// Everything that an installation or its federator may make, in any namespace.
const KINDS: [(&str, &str); 21] = [
    ("v1", "Namespace"),
    ("v1", "Pod"),
    ("v1", "Service"),
    ("v1", "Secret"),
    ("v1", "ConfigMap"),
    ("v1", "ServiceAccount"),
    ("v1", "PersistentVolumeClaim"),
    ("apps/v1", "StatefulSet"),
    ("apps/v1", "Deployment"),
    ("batch/v1", "Job"),
    ("policy/v1", "PodDisruptionBudget"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("rbac.authorization.k8s.io/v1", "Role"),
    ("rbac.authorization.k8s.io/v1", "RoleBinding"),
    ("rbac.authorization.k8s.io/v1", "ClusterRole"),
    ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"),
    ("admissionregistration.k8s.io/v1", "MutatingWebhookConfiguration"),
    ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy"),
    ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicyBinding"),
    ("discovery.k8s.io/v1", "EndpointSlice"),
    ("coordination.k8s.io/v1", "Lease"),
];

/// Objects that are ours by name, by namespace or by label.
fn left(at: &Cluster) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for (version, kind) in KINDS.into_iter().chain([(MCS, "ServiceImport")]) {
        for object in at.api.list(&Object::new(version, kind, "", ""))? {
            let text = |path: &str| object.pointer(path).and_then(Value::as_str).unwrap_or_default();
            let (name, namespace) = (text("/metadata/name"), text("/metadata/namespace"));
            let ours = name.starts_with("tombolo-")
                || namespace == NAMESPACE
                || text("/metadata/labels/app.kubernetes.io~1managed-by").starts_with("tombolo");
            if ours {
                found.push(format!("{kind} {namespace}/{name}"));
            }
        }
    }
    Ok(found)
}

/// What is users' own stays: the export that they wrote, and its definition.
fn others_stay(at: &Cluster, export: &str) -> Result<()> {
    let export = Object::new(MCS, "ServiceExport", SHOP, export);
    at.api.get(&export)?.with_context(|| format!("{export:?} of {} is gone", at.name)).map(drop)
}

fn nothing(at: &Cluster) -> Result<()> {
    eventually(&format!("nothing is left in {}", at.name), shop::SOON, || {
        let left = left(at)?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}

fn uninstall(bed: &Testbed, at: &Cluster) -> Result<()> {
    let start = Instant::now();
    let said = bed.operate(at, &["uninstall", "--yes"], "")?;
    ensure!(said.contains("tombolo is removed"), "{said}");
    println!("FIGURE uninstall of {}: {:.1?}", at.name, start.elapsed());
    Ok(())
}

/// Who was unlinked has no link any more, or one that says so until it is removed here too.
fn forgotten(bed: &Testbed, at: &Cluster, peer: &str) -> Result<()> {
    eventually(&format!("{} has forgotten {peer}", at.name), shop::SOON, || {
        let status: Value = serde_json::from_str(&bed.operate(at, &["status", "-o", "json"], "")?)?;
        let links = status["links"].as_array().cloned().unwrap_or_default();
        let over = |link: &Value| {
            link["state"] == "expired"
                && link["reason"].as_str().is_some_and(|why| why.contains("has unlinked"))
        };
        ensure!(links.iter().filter(|link| link["peer"] == peer).all(over), "{links:?}");
        Ok(())
    })
}

pub fn after_uninstalling(bed: &Testbed) -> Result<()> {
    let (east, west) = (bed.cluster("east")?, bed.cluster("west")?);
    ensure!(left(east)?.len() > 20, "{:?}", left(east)?);
    uninstall(bed, east)?;
    nothing(east)?;
    forgotten(bed, west, "east")?;
    uninstall(bed, west)?;
    nothing(west)?;
    others_stay(west, "web")
}

/// As docs/kubernetes.md says it.
pub fn after_helm(bed: &Testbed) -> Result<()> {
    let (east, west) = (bed.cluster("east")?, bed.cluster("west")?);
    // Links that objects make end with them.
    east.kubectl(&["delete", "clusterlinks.tombolo.dev", "west"])?;
    west.kubectl(&["delete", "clusterlinks.tombolo.dev", "east"])?;
    forgotten(bed, west, "east")?;
    bed.run(
        &bed.programs.helm,
        &["uninstall", "tombolo", "-n", NAMESPACE, "--kube-context", "east", "--wait"],
    )?;
    let made = "services,endpointslices,serviceimports.multicluster.x-k8s.io";
    east.kubectl(&["delete", made, "-A", "-l", "app.kubernetes.io/managed-by=tombolo"])?;
    east.kubectl(&["delete", "namespace", NAMESPACE])?;
    nothing(east)?;
    others_stay(east, "api")?;
    uninstall(bed, west)?;
    nothing(west)?;
    others_stay(west, "web")
}
