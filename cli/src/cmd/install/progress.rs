//! Waiting until what was applied runs, and what hinders it meanwhile.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::failure::Failure;
use crate::output::objects::text;
use crate::output::printable;

use super::objects::{Cluster, Kind};

/// Two requests a second are no load.
const LOOK: Duration = Duration::from_millis(500);
const WORKLOADS: [&str; 2] = ["StatefulSet", "Deployment"];

/// How far one workload is.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Rollout {
    name: String,
    wanted: i64,
    /// Of the newest template, and ready.
    ready: i64,
    done: bool,
}

impl std::fmt::Display for Rollout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}/{}", self.name.trim_start_matches("tombolo-"), self.ready, self.wanted)
    }
}

/// Pure.
fn rollout(object: &Value) -> Rollout {
    let number = |path: &str| object.pointer(path).and_then(Value::as_i64).unwrap_or(0);
    let wanted = object.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(1);
    let observed = number("/status/observedGeneration") >= number("/metadata/generation");
    // Those of the template before may be ready still.
    let ready = number("/status/readyReplicas").min(number("/status/updatedReplicas"));
    let updated = match text(object, "/kind") {
        "StatefulSet" => text(object, "/status/currentRevision") == text(object, "/status/updateRevision"),
        _ => number("/status/replicas") == number("/status/updatedReplicas"),
    };
    Rollout {
        name: text(object, "/metadata/name").to_owned(),
        wanted,
        ready: if observed { ready } else { 0 },
        done: observed && updated && ready >= wanted,
    }
}

/// Why pods are not ready, one line each. Pure.
fn hindrances(pods: &[Value]) -> Vec<String> {
    let mut lines = Vec::new();
    for pod in pods {
        let list = |path: &str| pod.pointer(path).and_then(Value::as_array).into_iter().flatten();
        let condition = |kind: &str| list("/status/conditions").find(|c| text(c, "/type") == kind);
        if condition("Ready").is_some_and(|ready| text(ready, "/status") == "True") {
            continue;
        }
        let unscheduled = condition("PodScheduled").filter(|c| text(c, "/status") == "False");
        let waiting = list("/status/initContainerStatuses")
            .chain(list("/status/containerStatuses"))
            .filter_map(|container| container.pointer("/state/waiting"));
        let mut why: Vec<String> = unscheduled
            .into_iter()
            .chain(waiting)
            .map(|reason| format!("{} {}", text(reason, "/reason"), text(reason, "/message")))
            .collect();
        if why.is_empty() {
            why.push("it runs, and is not ready yet: see its log".to_owned());
        }
        lines.push(format!("{}: {}", text(pod, "/metadata/name"), why.join("; ")));
    }
    lines.iter().map(|line| printable(line).trim().chars().take(400).collect()).collect()
}

/// Waits until every workload among the objects runs with what was applied.
pub async fn wait(cluster: &Cluster, objects: &[Value], within: Duration) -> Result<(), Failure> {
    let start = Instant::now();
    let mut said = String::new();
    loop {
        let mut rollouts = Vec::new();
        for object in objects.iter().filter(|object| WORKLOADS.contains(&text(object, "/kind"))) {
            let kind = Kind::new("apps/v1", text(object, "/kind"), text(object, "/metadata/namespace"));
            if let Some(found) = cluster.find(&kind, text(object, "/metadata/name")).await? {
                rollouts.push(rollout(&found));
            }
        }
        let shown = rollouts.iter().map(Rollout::to_string).collect::<Vec<_>>().join(", ");
        if shown != said {
            eprintln!("{:>6.1} s  ready: {shown}", start.elapsed().as_secs_f64());
            said = shown;
        }
        if rollouts.iter().all(|rollout| rollout.done) {
            return Ok(());
        }
        if start.elapsed() > within {
            let namespace = objects.iter().map(|o| text(o, "/metadata/namespace")).find(|n| !n.is_empty());
            let namespace = namespace.unwrap_or_default();
            let pods = Kind::new("v1", "Pod", namespace);
            let pods = cluster.list(&pods, "app.kubernetes.io/name=tombolo").await?;
            hindrances(&pods).iter().for_each(|line| eprintln!("  {line}"));
            return Err(Failure::timed_out(format_args!("not ready within {within:?}: {said}")).remedy(
                format_args!(
                    "see `kubectl -n {namespace} describe pods` and `kubectl -n {namespace} logs`; it goes on by itself, or is taken back with `tombolo uninstall`"
                ),
            ));
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_workload_is_there_when_the_newest_template_is_ready_everywhere() {
        let object = |observed: i64, updated: i64, ready: i64, current: &str| {
            json!({
                "kind": "StatefulSet", "metadata": { "name": "tombolo-gateway", "generation": 2 },
                "spec": { "replicas": 2 },
                "status": { "observedGeneration": observed, "updatedReplicas": updated, "readyReplicas": ready,
                    "currentRevision": current, "updateRevision": "b" },
            })
        };
        assert!(rollout(&object(2, 2, 2, "b")).done);
        for (observed, updated, ready, current) in
            [(1, 2, 2, "b"), (2, 1, 2, "a"), (2, 2, 1, "b"), (2, 2, 2, "a")]
        {
            let rollout = rollout(&object(observed, updated, ready, current));
            assert!(!rollout.done, "{rollout:?}");
        }
        assert_eq!(rollout(&object(2, 1, 2, "a")).to_string(), "gateway 1/2");
        assert!(!rollout(&json!({ "metadata": { "generation": 1 } })).done, "nobody has looked at it yet");
    }

    #[test]
    fn pods_that_are_not_ready_say_why() {
        let pods = [
            json!({ "metadata": { "name": "a" }, "status": { "conditions": [
                { "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no\u{1b} room" }] } }),
            json!({ "metadata": { "name": "b" }, "status": { "containerStatuses": [
                { "state": { "waiting": { "reason": "ImagePullBackOff", "message": "tombolo:9" } } }] } }),
            json!({ "metadata": { "name": "c" }, "status": {} }),
            json!({ "metadata": { "name": "d" }, "status": { "conditions": [{ "type": "Ready", "status": "True" }] } }),
        ];
        let lines = hindrances(&pods);
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert_eq!(lines[0], "a: Unschedulable no  room");
        assert_eq!(lines[1], "b: ImagePullBackOff tombolo:9");
    }
}
