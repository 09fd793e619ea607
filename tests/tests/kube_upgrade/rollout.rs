//! `tombolo upgrade` while the service is called 500 times a second: new pods beside old ones, in one cluster after the other.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_tests::capability::amount;
use tombolo_tests::kube::Object;
use tombolo_tests::requests::{Connections, Report};
use tombolo_tests::testbed::{Cluster, NAMESPACE, Testbed};
use tombolo_tests::usage::{self, Usage};

use crate::shop;

/// The load alone: what members use under it.
const ALONE: Duration = Duration::from_secs(10);
/// After an upgrade: what it has left behind would show.
const AFTER: Duration = Duration::from_secs(3);
/// The last old shared sidecars end so long after the new ones are ready: five seconds until every node has heard, ten of drain.
const LAST_DRAIN: Duration = Duration::from_secs(20);
const COMPONENTS: [&str; 3] = ["federator", "gateway", "shared"];

fn per_second() -> u32 {
    amount("TOMBOLO_REQUESTS_PER_SECOND", 500)
}

/// Pods of a component by their UID, with their names.
fn pods(at: &Cluster, component: &str) -> Result<BTreeMap<String, String>> {
    let pods = at.api.list(&Object::new("v1", "Pod", NAMESPACE, ""))?;
    let text =
        |pod: &Value, path: &str| pod.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    let of = pods.iter().filter(|pod| {
        text(pod, "/metadata/labels/app.kubernetes.io~1component") == component
            && pod["metadata"].get("deletionTimestamp").is_none()
    });
    Ok(of.map(|pod| (text(pod, "/metadata/uid"), text(pod, "/metadata/name"))).collect())
}

/// What lasts: the federator's claim, a policy that is in its store alone, and since when there is the link.
fn kept(bed: &Testbed, at: &Cluster) -> Result<Value> {
    let claim = Object::new("v1", "PersistentVolumeClaim", NAMESPACE, "state-tombolo-federator-0");
    let claim = at.api.get(&claim)?.context("the federator has no claim")?;
    let peer = if at.name == "east" { "west" } else { "east" };
    let stored = |kind: &[&str]| -> Result<Value> {
        let args = [&["get"], kind, &["-o", "json"]].concat();
        Ok(serde_json::from_str(&bed.operate(at, &args, "")?)?)
    };
    let link = stored(&["clusterlink", peer])?;
    let policy = stored(&["failoverpolicy", "web", "-n", shop::SHOP])?;
    Ok(json!({
        "claim": claim["metadata"]["uid"], "link": link["metadata"], "policy": policy["spec"],
    }))
}

/// Upgrades with other annotations of some components' pods: how long that took. Every pod of theirs is another one then.
fn replace(bed: &Testbed, at: &Cluster, components: &[&str], round: &str) -> Result<Duration> {
    let before: Vec<_> = components.iter().map(|of| pods(at, of)).collect::<Result<_>>()?;
    let set: Vec<String> = components.iter().map(|of| format!("{of}.podAnnotations.round={round}")).collect();
    let mut args = vec!["upgrade"];
    for value in &set {
        args.extend(["--set", value]);
    }
    let start = Instant::now();
    let said = bed.operate(at, &args, "")?;
    let took = start.elapsed();
    ensure!(said.contains("upgraded"), "{said}");
    for (component, before) in components.iter().zip(before) {
        let after = pods(at, component)?;
        ensure!(!before.is_empty() && after.len() == before.len(), "{component}: {before:?}, then {after:?}");
        let same: Vec<_> = after.keys().filter(|uid| before.contains_key(*uid)).collect();
        ensure!(same.is_empty(), "{component} of {}: {same:?} are the same pods", at.name);
    }
    Ok(took)
}

fn measured(at: &Cluster) -> Result<Vec<(String, Usage)>> {
    let mut found = Vec::new();
    for component in COMPONENTS {
        for pod in pods(at, component)?.into_values() {
            let pid = at.process_of(NAMESPACE, &pod, component)?;
            found.push((pod.clone(), usage::of(pid).with_context(|| format!("{pod} has ended"))?));
        }
    }
    Ok(found)
}

/// What each pod uses under the load alone.
fn print_usage(bed: &Testbed) -> Result<()> {
    let before: Vec<_> = bed.clusters.iter().map(measured).collect::<Result<_>>()?;
    std::thread::sleep(ALONE);
    for (cluster, before) in bed.clusters.iter().zip(before) {
        for ((pod, before), (_, after)) in before.iter().zip(measured(cluster)?) {
            let millicores =
                (after.cpu.saturating_sub(before.cpu)).as_secs_f64() / ALONE.as_secs_f64() * 1000.0;
            println!(
                "FIGURE {} {pod} under load: {millicores:.0}m CPU, {:.1} MB RSS, {:.1} MB PSS",
                cluster.name,
                after.rss_bytes as f64 / 1e6,
                after.pss_bytes as f64 / 1e6
            );
        }
    }
    Ok(())
}

fn print(what: &str, report: &Report) {
    println!("FIGURE {what}: {report}");
}

/// Most of what was to be sent has been sent: otherwise nothing was shown.
fn enough(report: &Report) -> Result<()> {
    ensure!(report.not_sent * 4 < report.requests(), "too little was sent: {report}");
    ensure!(report.kept.answered() + report.new.answered() > 0, "{report}");
    Ok(())
}

pub fn of_the_control_plane(bed: &Testbed) -> Result<()> {
    let policy = json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "FailoverPolicy",
        "metadata": { "name": "web", "namespace": shop::SHOP },
        "spec": { "targetRef": { "kind": "ServiceImport", "name": "web" }, "tiers": [{ "clusters": ["west"] }] },
    });
    for cluster in &bed.clusters {
        bed.operate(cluster, &["apply", "-f", "-"], &policy.to_string())?;
    }
    let before: Vec<_> = bed.clusters.iter().map(|cluster| kept(bed, cluster)).collect::<Result<_>>()?;
    let load = shop::load(bed, "client", per_second(), Connections::Both)?;
    print_usage(bed)?;
    println!("after {:.1?}: {} failed before the upgrades", load.elapsed(), load.failed());
    for name in ["west", "east"] {
        let took = replace(bed, bed.cluster(name)?, &["federator", "gateway"], "first")?;
        println!(
            "FIGURE upgrade of {name}: {took:.1?}, until {:.1?}; {} requests have failed until now",
            load.elapsed(),
            load.failed()
        );
    }
    std::thread::sleep(AFTER);
    let report = load.finish()?;
    print("upgrades of federator and gateways in both clusters", &report);
    ensure!(report.failures() == 0, "{report}");
    ensure!(report.kept.answered() > 0 && report.new.answered() > 0, "{report}");
    enough(&report)?;
    bed.linked()?;
    for (cluster, before) in bed.clusters.iter().zip(before) {
        let after = kept(bed, cluster)?;
        ensure!(after == before, "{}: {before}, then {after}", cluster.name);
    }
    Ok(())
}

/// New connections go to one that stays; those that are open longer than its drain end with a shared sidecar. Another pod has those: the
/// kernel of a node remembers a connection that was reset for some seconds, and a new one of the same numbers would go where
/// that one went.
pub fn of_shared_sidecars(bed: &Testbed) -> Result<()> {
    let new = shop::load(bed, "client", per_second() / 5, Connections::New)?;
    let kept = shop::load(bed, "keeper", per_second() / 25, Connections::Kept)?;
    std::thread::scope(|scope| {
        let replaced = |cluster| scope.spawn(move || replace(bed, cluster, &["shared"], "first"));
        let both: Vec<_> = bed.clusters.iter().map(|cluster| (&cluster.name, replaced(cluster))).collect();
        for (name, thread) in both {
            let took = thread.join().map_err(|_| anyhow::anyhow!("it panicked"))??;
            println!("FIGURE rollout of shared sidecars in {name}: {took:.1?}");
        }
        anyhow::Ok(())
    })?;
    std::thread::sleep(LAST_DRAIN);
    let (new, kept) = (new.finish()?, kept.finish()?);
    print("new connections while shared sidecars are replaced in both clusters at once", &new);
    print("kept connections meanwhile, which are cut after the drain", &kept);
    ensure!(new.failures() == 0, "new connections failed: {new}");
    enough(&new)?;
    enough(&kept)?;
    // Nothing else breaks them, and none is broken twice by the same replica.
    let replicas = 4;
    ensure!(
        kept.failures() <= kept.kept_connections && kept.failures() < kept.requests() / replicas,
        "more than what is open at a drain's end: {kept}"
    );
    Ok(())
}
