//! No federator answers the webhook.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tombolo_tests::kube::Object;
use tombolo_tests::testbed::{Cluster, NAMESPACE, eventually};

use super::mesh::{CLIENT, NGINX, WEB};
use super::pods::{INJECT, curl, pod, started};
use super::{SOON, World};

const ADMISSION: &str = "admissionregistration.k8s.io/v1";
const FEDERATOR: &str = "tombolo-federator";

fn configuration() -> Object {
    Object::new(ADMISSION, "MutatingWebhookConfiguration", "", "tombolo-inject")
}

fn policy(cluster: &Cluster, policy: &str) -> Result<()> {
    let found = cluster.api.get(&configuration())?.context("no configuration")?;
    let mut webhooks = found["webhooks"].as_array().cloned().context("no webhooks")?;
    webhooks.iter_mut().for_each(|webhook| webhook["failurePolicy"] = policy.into());
    cluster.api.merge(&configuration(), json!({ "webhooks": webhooks }))
}

fn scale(cluster: &Cluster, replicas: u8) -> Result<()> {
    let replicas = format!("--replicas={replicas}");
    cluster.kubectl(&["scale", "-n", NAMESPACE, "statefulset", FEDERATOR, &replicas]).map(drop)
}

fn refused(cluster: &Cluster, pod: &Value) -> Result<String> {
    match cluster.api.create(pod) {
        Ok(made) => bail!("it was made: {made}"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

pub fn without_a_federator_the_failure_policy_decides_and_nobody_else_is_held_up(
    world: &World,
) -> Result<()> {
    let (east, west) = (world.east()?, world.west()?);
    // Whatever somebody labels: what a federator needs to come back is never asked about.
    west.kubectl(&["label", "namespace", NAMESPACE, "kube-system", "tombolo.dev/inject=enabled"])?;
    scale(west, 0)?;
    let federator = Object::new("v1", "Pod", NAMESPACE, "tombolo-federator-0");
    west.api.until(&federator, SOON, |found| {
        ensure!(found.is_none(), "the federator is there still");
        Ok(())
    })?;

    // Fail: nothing is made in injected namespaces, and it is said why.
    let words = refused(west, &pod("shop", "alone", "web", json!({}), json!({})))?;
    ensure!(words.contains("failed calling webhook \"namespace.inject.tombolo.dev\""), "{words}");
    println!("     Fail: {words}");
    let mut asks = pod("inj-plain", "asks", "app", json!({}), json!({}));
    asks["metadata"]["labels"][INJECT] = json!("true");
    let words = refused(west, &asks)?;
    ensure!(words.contains("failed calling webhook \"pod.inject.tombolo.dev\""), "{words}");
    west.kubectl(&["scale", "-n", "shop", "deployment/web", "--replicas=3"])?;
    let events = eventually("an Event says why there are no more pods", SOON, || {
        let events = west.kubectl(&["get", "events", "-n", "shop", "-o", "jsonpath={.items[*].message}"])?;
        ensure!(events.contains("failed calling webhook \"namespace.inject.tombolo.dev\""), "{events}");
        Ok(events)
    });
    west.kubectl(&["scale", "-n", "shop", "deployment/web", "--replicas=2"])?;
    events?;

    // Nobody else is held up, and what runs goes on.
    started(west, &pod("inj-plain", "beside", "app", json!({}), json!({})))?;
    let mut own = pod(NAMESPACE, "inj-own", "default", json!({}), json!({}));
    own = super::pods::restricted(own);
    let own = started(west, &own)?;
    ensure!(own["spec"].get("initContainers").is_none(), "the system's own pods get none: {own}");
    west.kubectl(&["rollout", "restart", "-n", "kube-system", "deployment/coredns"])?;
    west.rolled_out("kube-system", "deployment/coredns")?;
    for _ in 0..5 {
        ensure!(curl(east, CLIENT, WEB)?.contains(NGINX), "open connections need no federator");
    }

    // Ignore: pods without a sidecar, which are found by their label.
    policy(west, "Ignore")?;
    eventually("pods are made without a sidecar", SOON, || {
        started(west, &pod("shop", "naked", "web", json!({}), json!({}))).map(drop)
    })?;
    let naked = west.kubectl(&["get", "pods", "-n", "shop", "-l", "!tombolo.dev/injected", "-o", "name"])?;
    ensure!(naked.contains("pod/naked") && !naked.contains("pod/web-"), "{naked}");

    // The federator comes back although nobody answers its own webhook, and its namespace is labelled.
    policy(west, "Fail")?;
    scale(west, 1)?;
    west.rolled_out(NAMESPACE, &format!("statefulset/{FEDERATOR}"))?;
    let back = eventually("pods have sidecars again", SOON, || {
        let name = format!("back-{}", rand::random::<u32>());
        west.api.create(&pod("shop", &name, "web", json!({}), json!({})))
    })?;
    ensure!(back["metadata"]["labels"]["tombolo.dev/injected"] == "true", "{back}");
    west.kubectl(&["label", "namespace", NAMESPACE, "kube-system", "tombolo.dev/inject-"])?;
    Ok(())
}
