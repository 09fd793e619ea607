//! Pods with, and without, what they prove who they are by.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_tests::kube::{Object, signed};
use tombolo_tests::testbed::{Cluster, eventually};

use super::mesh::{NGINX, WEB};
use super::pods::{INJECT, answered, namespace, pod, started};
use super::{SOON, World};

const HERE: &str = "inj-identity";

pub fn pods_join_by_their_service_account_whatever_they_mount(world: &World) -> Result<()> {
    let (east, labels) = (world.east()?, json!({ INJECT: "enabled" }));
    namespace(east, HERE, labels, &["app", "short"])?;
    // What the pod itself gets of its account is not what the sidecar shows.
    let mut without = pod(HERE, "without", "app", json!({}), json!({}));
    without["spec"]["automountServiceAccountToken"] = json!(false);
    let made = started(east, &without)?;
    let mounts = made["spec"]["containers"][0]["volumeMounts"].to_string();
    ensure!(!mounts.contains("kubernetes.io/serviceaccount"), "{mounts}");
    answered(east, (HERE, "without"), WEB, NGINX)?;
    let audit = world.bed.operate(east, &["audit", "--action", "join", "-o", "json"], "")?;
    ensure!(audit.contains("pod without by its service account"), "{audit}");

    // An account that is gone: no new pods, and whoever makes them is told.
    east.api.delete(&Object::new("v1", "ServiceAccount", HERE, "short"))?;
    let words = eventually("a pod of an account that is gone is refused", SOON, || {
        let name = format!("gone-{}", rand::random::<u32>());
        match east.api.create(&pod(HERE, &name, "short", json!({}), json!({}))) {
            Ok(_) => anyhow::bail!("it was made"),
            Err(error) => Ok(format!("{error:#}")),
        }
    })?;
    ensure!(words.contains("serviceaccount \"short\" not found"), "{words}");
    // One that goes between admission and start: the kubelet has no token for it.
    namespace(east, HERE, json!({ INJECT: "enabled" }), &["late"])?;
    let mut late = pod(HERE, "late", "late", json!({}), json!({}));
    late["spec"]["schedulingGates"] = json!([{ "name": "example.com/wait" }]);
    eventually("the pod is made", SOON, || east.api.create(&late).map(drop))?;
    east.api.delete(&Object::new("v1", "ServiceAccount", HERE, "late"))?;
    east.api.merge(&Object::new("v1", "Pod", HERE, "late"), json!({ "spec": { "schedulingGates": [] } }))?;
    eventually("an Event says that there is no token", SOON, || {
        let events = events_of(east, "late")?;
        ensure!(events.contains("serviceaccounts \"late\" not found"), "{events}");
        Ok(())
    })?;
    east.api.kill(&Object::new("v1", "Pod", HERE, "late"))
}

fn events_of(cluster: &Cluster, pod: &str) -> Result<String> {
    let about = format!("involvedObject.name={pod}");
    cluster.kubectl(&[
        "get",
        "events",
        "-n",
        HERE,
        "--field-selector",
        &about,
        "-o",
        "jsonpath={.items[*].message}",
    ])
}

/// A pod with a sidecar as the webhook would make it, but for its token.
fn with_token(model: &Value, name: &str, token: Value) -> Result<Value> {
    let mut made = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": HERE, "labels": { INJECT: "false" }, "annotations": model["metadata"]["annotations"] },
        "spec": { "serviceAccountName": "app", "terminationGracePeriodSeconds": 1, "automountServiceAccountToken": false },
    });
    for field in ["initContainers", "containers", "volumes"] {
        made["spec"][field] = model["spec"][field].clone();
    }
    let volumes = made["spec"]["volumes"].as_array_mut().context("no volumes")?;
    let join = volumes.iter_mut().find(|volume| volume["name"] == "tombolo-join").context("no token")?;
    join["projected"]["sources"][0] = token;
    Ok(made)
}

/// What the API server would have signed an hour ago.
fn expired(cluster: &Cluster, model: &Value) -> Result<String> {
    let account =
        cluster.api.get(&Object::new("v1", "ServiceAccount", HERE, "app"))?.context("no account")?;
    let issued = tombolo_runtime::clock::unix_seconds() - 7200;
    let claims = json!({
        "iss": "https://kubernetes.default.svc", "aud": ["tombolo.dev/acme.example"],
        "sub": format!("system:serviceaccount:{HERE}:app"), "iat": issued, "nbf": issued, "exp": issued + 3600,
        "kubernetes.io": {
            "namespace": HERE, "pod": { "name": model["metadata"]["name"], "uid": model["metadata"]["uid"] },
            "serviceaccount": { "name": "app", "uid": account["metadata"]["uid"] },
        },
    });
    signed(&claims, &cluster.service_account_key()?)
}

/// Where an operator looks: the pod's status, its log, the federator's audit log, and `tombolo check`.
pub fn pods_that_are_not_let_in_say_why(world: &World) -> Result<()> {
    let east = world.east()?;
    namespace(east, HERE, json!({ INJECT: "enabled" }), &["app"])?;
    let model = pod(HERE, "model", "app", json!({ "tombolo.dev/capture": "disabled" }), json!({}));
    let model = started(east, &model)?;
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "expired", "namespace": HERE },
        "stringData": { "token": expired(east, &model)? },
    });
    east.api.apply(&secret)?;
    let elsewhere = json!({ "serviceAccountToken": { "path": "token", "audience": "https://elsewhere.example", "expirationSeconds": 3600 } });
    let old = json!({ "secret": { "name": "expired", "items": [{ "key": "token", "path": "token" }] } });
    for (name, token, shown_by, said) in [
        ("elsewhere", elsewhere, "elsewhere", "audience \"tombolo.dev/acme.example\""),
        ("expired", old, "model", "token has expired"),
    ] {
        east.api.create(&with_token(&model, name, token)?)?;
        let pod = Object::new("v1", "Pod", HERE, name);
        let words = east.api.until(&pod, SOON, |found| {
            let status = &found.context("the pod is gone")?["status"]["initContainerStatuses"][0];
            let words = [&status["state"], &status["lastState"]]
                .into_iter()
                .filter_map(|state| state["terminated"]["message"].as_str())
                .find(|words| !words.is_empty());
            words.map(str::to_owned).with_context(|| format!("{status}"))
        })?;
        ensure!(words.contains(said), "{name}: {words}");
        let logs = east.kubectl(&["logs", "-n", HERE, name, "-c", "tombolo-sidecar"])?;
        ensure!(logs.contains(said), "{name}: {logs}");
        let described = east.kubectl(&["describe", "pod", "-n", HERE, name])?;
        ensure!(described.contains(said), "{described}");
        let finding = format!("pod {HERE}/{shown_by} (service account app)");
        let found = eventually("tombolo check finds it", SOON, || {
            let found = world.bed.operate(east, &["status", "-o", "json"], "")?;
            let status: Value = serde_json::from_str(&found)?;
            let findings = status["findings"].as_array().cloned().unwrap_or_default();
            let of =
                findings.iter().find(|of| of["reason"] == "PodRefused" && of["about"] == finding.as_str());
            of.cloned().with_context(|| format!("{findings:?}"))
        })?;
        let message = found["message"].as_str().unwrap_or_default();
        ensure!(message.contains(said), "{found}");
        println!("     {message}");
        ensure!(world.bed.operate(east, &["check"], "").is_err(), "check found nothing");
        east.api.kill(&pod)?;
    }
    let audit = world.bed.operate(east, &["audit", "--action", "join", "-o", "json"], "")?;
    ensure!(audit.contains("\"refused\"") && audit.contains("https://elsewhere.example"), "{audit}");
    Ok(())
}
