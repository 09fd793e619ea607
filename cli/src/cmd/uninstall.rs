//! `tombolo uninstall`: removes what was installed into a Kubernetes cluster, and what the federator has made there.
//!
//! First the peers are told, while there is somebody to tell them. The webhook goes before those who answer it, so that pods
//! can be made all the time; the federator goes before what it would make again.

use std::time::{Duration, Instant};

use clap::Args;
use serde_json::Value;
use tombolo_proto::v1::UnlinkRequest;

use super::confirm::Consent;
use super::install::objects::{Cluster, Kind, shown};
use super::install::{RECORD, agreed, target};
use super::unlink;
use crate::admin_client::Admin;
use crate::args::{Connect, duration};
use crate::failure::{Exit, Failure};
use crate::output;
use crate::output::objects::text;

/// Pods have up to half a minute to end, namespaces some seconds more.
const LOOK: Duration = Duration::from_millis(500);
/// What the federator writes, in every namespace or in its own: by label.
const DERIVED: [(&str, &str); 8] = [
    ("multicluster.x-k8s.io/v1beta1", "ServiceImport"),
    // Where definitions serve no other version; the same object once more is no harm.
    ("multicluster.x-k8s.io/v1alpha1", "ServiceImport"),
    ("about.k8s.io/v1alpha1", "ClusterProperty"),
    ("multicluster.x-k8s.io/v1alpha2", "ClusterProfile"),
    ("discovery.k8s.io/v1", "EndpointSlice"),
    ("v1", "Service"),
    ("about.k8s.io/v1beta1", "ClusterProperty"),
    ("multicluster.x-k8s.io/v1alpha1", "ClusterProfile"),
];
const DERIVED_LABEL: &str = "app.kubernetes.io/managed-by=tombolo";
/// Of its own namespace, when that stays.
const OWN: [(&str, &str); 3] = [("v1", "ConfigMap"), ("v1", "Secret"), ("coordination.k8s.io/v1", "Lease")];

/// Remove an installation from a Kubernetes cluster
#[derive(Debug, Args)]
#[command(after_help = "\
Unlinks every peer, and removes what was installed and what the federator made: ServiceImports, derived Services and
EndpointSlices, in every namespace. Definitions stay, and the ServiceExports of your services with them.

Examples:
  tombolo uninstall --kube-context east
  tombolo uninstall --kube-context east --yes --keep-data        its store and keys stay: install again later
  tombolo uninstall --kube-context east --dry-run")]
pub struct UninstallArgs {
    /// Keep the namespace, the Secret with the cluster's keys, the federator's store, and the links
    #[arg(long)]
    keep_data: bool,
    /// How long to wait until everything has gone
    #[arg(long, value_name = "DURATION", default_value = "3m", value_parser = duration)]
    gone_within: Duration,
    #[command(flatten)]
    consent: Consent,
}

pub async fn run(args: UninstallArgs, connect: Connect) -> Result<Exit, Failure> {
    let UninstallArgs { keep_data, gone_within, consent } = args;
    let target = target(&connect).await?;
    let namespace = connect.kube_namespace.clone();
    let installed = target.installed(&namespace).await?;
    let record = target.find(&Kind::new("v1", "ConfigMap", &namespace), RECORD).await?;
    // Namespaces and cluster-wide objects of another installation are not this one's.
    let here = |object: &&Value| {
        let within = text(object, "/metadata/namespace") == namespace;
        within
            || text(object, "/metadata/name") == namespace
            || text(object, "/metadata/name").starts_with("tombolo-")
    };
    let installed: Vec<Value> = installed.iter().filter(here).cloned().collect();
    if record.is_none() && installed.iter().all(|object| text(object, "/metadata/namespace") != namespace) {
        return Err(Failure::new(format_args!(
            "nothing is installed in namespace {namespace} by this command"
        ))
        .remedy(
            "name the namespace with --kube-namespace; an installation by helm goes with `helm uninstall`",
        ));
    }
    let derived = derived(&target).await?;
    if consent.dry_run {
        for object in installed.iter().chain(&derived).filter(|object| goes(object, keep_data)) {
            output::line(format_args!("{} would be removed (dry run)", shown(object)))?;
        }
        return Ok(Exit::Done);
    }
    let question = format!(
        "Remove tombolo from namespace {namespace}, {} objects that were installed and {} that it made{}?",
        installed.len(),
        derived.len(),
        if keep_data { "" } else { ", with the cluster's keys and links" }
    );
    agreed(&question, consent)?;
    if !keep_data {
        unlink_all(&connect).await;
    }
    let deadline = Instant::now() + gone_within;
    // The webhook first, then the rest from behind: workloads before what they need.
    let mut order: Vec<&Value> = installed.iter().rev().filter(|object| goes(object, keep_data)).collect();
    order.retain(|object| text(object, "/kind") != "Namespace");
    for object in &order {
        // Who is still to be stopped needs its rights to say goodbye; they go below.
        if matches!(text(object, "/kind"), "MutatingWebhookConfiguration" | "StatefulSet" | "Deployment") {
            target.delete(object).await?;
        }
    }
    pods_gone(&target, &namespace, deadline).await?;
    for object in order {
        target.delete(object).await?;
    }
    for object in self::derived(&target).await?.iter() {
        target.delete(object).await?;
    }
    let own_namespace = installed.iter().find(|object| text(object, "/kind") == "Namespace");
    match own_namespace.filter(|_| !keep_data) {
        Some(namespace) => {
            target.delete(namespace).await?;
            gone(&target, namespace, deadline).await?;
        }
        None => remove_own(&target, &namespace, keep_data).await?,
    }
    output::line(format_args!("tombolo is removed from namespace {namespace}"))?;
    if keep_data {
        eprintln!(
            "kept: Secret tombolo-trust and the federator's store; `tombolo install` goes on with them"
        );
    }
    Ok(Exit::Done)
}

fn goes(object: &Value, keep_data: bool) -> bool {
    !(keep_data && matches!(text(object, "/kind"), "Namespace" | "Secret"))
}

/// Everything that a federator has made, wherever.
async fn derived(target: &Cluster) -> Result<Vec<Value>, Failure> {
    let mut found = Vec::new();
    for (version, kind) in DERIVED {
        for object in target.list(&Kind::new(version, kind, ""), DERIVED_LABEL).await? {
            let same = |of: &Value| text(of, "/metadata/uid") == text(&object, "/metadata/uid");
            if !found.iter().any(same) {
                found.push(object);
            }
        }
    }
    Ok(found)
}

/// So that peers know at once. One that can't be told finds out by itself.
async fn unlink_all(connect: &Connect) {
    let unlinked = async {
        let mut admin = Admin::connect(connect).await?;
        for link in unlink::list(&mut admin, "ClusterLink").await? {
            let peer = text(&link, "/metadata/name").to_owned();
            let request = admin.request(UnlinkRequest { peer: peer.clone() });
            let peer = output::printable(&peer).to_string();
            match admin.client.unlink(request).await {
                Ok(answer) if answer.get_ref().existed => eprintln!("unlinked from {peer}"),
                Ok(_) => {}
                Err(status) => eprintln!("not unlinked from {peer}: {}", output::printable(status.message())),
            }
        }
        Ok::<_, Failure>(())
    };
    if let Err(failure) = unlinked.await {
        eprintln!(
            "links are not taken down, because the federator can't be asked; run `tombolo unlink` on the peers"
        );
        eprintln!("  {failure}");
    }
}

async fn pods_gone(target: &Cluster, namespace: &str, deadline: Instant) -> Result<(), Failure> {
    loop {
        let pods = target.list(&Kind::new("v1", "Pod", namespace), "app.kubernetes.io/name=tombolo").await?;
        if pods.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let names: Vec<&str> = pods.iter().map(|pod| text(pod, "/metadata/name")).collect();
            return Err(Failure::timed_out(format_args!("pods have not ended: {}", names.join(", ")))
                .remedy("see `kubectl describe pods`, and run the command again"));
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn gone(target: &Cluster, object: &Value, deadline: Instant) -> Result<(), Failure> {
    let kind = Kind::new(text(object, "/apiVersion"), text(object, "/kind"), "");
    while let Some(left) = target.find(&kind, text(object, "/metadata/name")).await? {
        if Instant::now() > deadline {
            let conditions = left.pointer("/status/conditions").and_then(Value::as_array);
            let why: Vec<&str> = conditions.into_iter().flatten().map(|c| text(c, "/message")).collect();
            return Err(Failure::timed_out(format_args!(
                "{} has not gone: {}",
                shown(object),
                why.join("; ")
            ))
            .remedy("remove what it names, and run the command again"));
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// What lies in a namespace that stays.
async fn remove_own(target: &Cluster, namespace: &str, keep_data: bool) -> Result<(), Failure> {
    for (version, kind) in OWN {
        for object in target.list(&Kind::new(version, kind, namespace), DERIVED_LABEL).await? {
            target.delete(&object).await?;
        }
    }
    // Leases have no labels of ours.
    let leases = target.list(&Kind::new("coordination.k8s.io/v1", "Lease", namespace), "").await?;
    for lease in leases.iter().filter(|lease| text(lease, "/metadata/name").starts_with("tombolo-")) {
        target.delete(lease).await?;
    }
    if keep_data {
        return Ok(());
    }
    let claims = Kind::new("v1", "PersistentVolumeClaim", namespace);
    for claim in target.list(&claims, "app.kubernetes.io/name=tombolo").await? {
        target.delete(&claim).await?;
    }
    Ok(())
}
