//! Pods that end while they are called.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_tests::kube::Object;
use tombolo_tests::testbed::eventually;

use super::inbound::SERVER;
use super::mesh::{CLIENT, NGINX, WEB};
use super::pods::{INJECT, addresses, answered, curl, imported, namespace, pod, serve, started};
use super::{SOON, World};

/// Four callers, each request on a connection of its own, until there is a file: how many were answered, and what failed.
const LOAD: &str = "
import json, os, sys, threading, time, urllib.request
ok, failed, lock = [0], [], threading.Lock()
end = time.time() + 120
def call():
    while not os.path.exists('/tmp/stop') and time.time() < end:
        begun = time.time()
        try:
            with urllib.request.urlopen(sys.argv[1], timeout=10) as answer:
                answer.read()
            with lock: ok[0] += 1
        except Exception as error:
            with lock: failed.append(f'{begun:.3f} after {time.time() - begun:.3f} s: {error!r}')
        time.sleep(0.01)
threads = [threading.Thread(target=call) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps({'ok': ok[0], 'failed': failed[:20], 'count': len(failed)}))
";

/// Calls `url` from the client in east while `work` is done: how many were answered, none of them wrongly.
fn under_load(world: &World, url: &str, work: impl FnOnce() -> Result<()>) -> Result<u64> {
    let east = world.east()?;
    east.exec(CLIENT.0, CLIENT.1, "main", &["rm", "-f", "/tmp/stop"])?;
    let (said, worked) = std::thread::scope(|scope| -> Result<_> {
        let load = scope.spawn(|| east.exec(CLIENT.0, CLIENT.1, "main", &["python3", "-c", LOAD, url]));
        std::thread::sleep(Duration::from_secs(1));
        let worked = work();
        std::thread::sleep(Duration::from_secs(1));
        east.exec(CLIENT.0, CLIENT.1, "main", &["touch", "/tmp/stop"])?;
        let said = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))??;
        Ok((said, worked))
    })?;
    worked?;
    let said: Value = serde_json::from_str(said.trim()).with_context(|| said.clone())?;
    let ok = said["ok"].as_u64().unwrap_or(0);
    ensure!(said["count"] == 0, "{} of {ok} failed: {:#}", said["count"], said["failed"]);
    Ok(ok)
}

pub fn a_rollout_under_requests_fails_none(world: &World) -> Result<()> {
    let west = world.west()?;
    let names = || -> Result<BTreeSet<String>> {
        Ok(addresses(west, "shop", "app=web")?.into_iter().map(|(name, _)| name).collect())
    };
    let before = names()?;
    let ok = under_load(world, WEB, || {
        west.kubectl(&["rollout", "restart", "-n", "shop", "deployment/web"])?;
        west.rolled_out("shop", "deployment/web")?;
        eventually("the pods of before are gone", SOON, || {
            let now = names()?;
            ensure!(now.is_disjoint(&before) && now.len() == 2, "{now:?}");
            Ok(())
        })
    })?;
    ensure!(ok > 200, "{ok} requests are no load");
    println!("     FIGURE rollout restart of 2 injected pods under requests: {ok} answered, 0 failed");
    answered(world.east()?, CLIENT, WEB, NGINX)
}

/// Ends 6 s after it is told to, and calls the mesh meanwhile: what it serves and what it calls goes on.
pub fn a_sidecar_carries_its_application_to_the_end(world: &World) -> Result<()> {
    let (east, west) = (world.east()?, world.west()?);
    let labels = json!({ INJECT: "enabled" });
    namespace(east, "inj-ending", labels.clone(), &["app"])?;
    namespace(west, "inj-ending", labels, &["app"])?;
    let probe = json!({ "httpGet": { "path": "/healthz", "port": 8080 }, "periodSeconds": 1 });
    let ports = json!([{ "name": "http", "containerPort": 8080 }]);
    let server = json!({ "image": "python:3", "command": ["python3", "-c", SERVER], "ports": ports, "readinessProbe": probe });
    serve(west, &pod("inj-ending", "book", "app", json!({}), server.clone()), 1)?;
    let book = "http://book.inj-ending.svc.clusterset.local";
    // The same server; told to end, it finishes what is open, and says good-bye at the end of it.
    let graceful = format!(
        "{SERVER}
import os, signal, urllib.request
def end(*_):
    for n in range(3):
        time.sleep(2)
        urllib.request.urlopen(f'{book}/bye-{{n}}', timeout=5).read()
    os._exit(0)
signal.signal(signal.SIGTERM, end)
while True: signal.pause()
"
    );
    let mut slow = server;
    slow["command"] = json!(["python3", "-c", graceful]);
    let mut slow = pod("inj-ending", "slow", "app", json!({}), slow);
    slow["spec"]["terminationGracePeriodSeconds"] = json!(30);
    imported(west, "inj-ending", "book")?;
    serve(west, &slow, 1)?;
    imported(east, "inj-ending", "slow")?;
    started(east, &pod("inj-ending", "caller", "app", json!({}), json!({})))?;
    let caller = ("inj-ending", "caller");
    let url = "http://slow.inj-ending.svc.clusterset.local";
    answered(east, caller, &format!("{url}/hello"), "8080 /hello")?;
    let pods = addresses(west, "inj-ending", "app=slow")?;
    let (name, _) = pods.first().context("no pod")?;
    let answer = std::thread::scope(|scope| {
        let open = scope.spawn(|| {
            east.exec(
                caller.0,
                caller.1,
                "main",
                &["curl", "-sS", "--max-time", "20", &format!("{url}/slow")],
            )
        });
        std::thread::sleep(Duration::from_secs(1));
        west.kubectl(&["delete", "pod", "-n", "inj-ending", name])?;
        open.join().map_err(|_| anyhow::anyhow!("the caller panicked"))?
    })?;
    ensure!(answer.contains("8080 /slow"), "what was open was cut: {answer}");
    eventually("what it called while it ended has arrived", SOON, || {
        let seen = curl(east, caller, &format!("{book}/seen"))?;
        ensure!((0..3).all(|n| seen.contains(&format!("/bye-{n}"))), "{seen}");
        Ok(())
    })?;
    println!("     served a request of 6 s and called three times after SIGTERM");
    Ok(())
}

/// Its very first call is answered, and its sidecar does not keep it from being over.
pub fn a_job_calls_at_once_and_is_over(world: &World) -> Result<()> {
    let east = world.east()?;
    namespace(east, "inj-job", json!({ INJECT: "enabled" }), &["app"])?;
    let run = json!({ "image": "curlimages/curl:8", "args": ["-sS", "--fail", "--max-time", "10", WEB] });
    let mut template = pod("inj-job", "once", "app", json!({}), run);
    template["spec"]["restartPolicy"] = json!("Never");
    let template = json!({ "metadata": { "labels": { "app": "once" } }, "spec": template["spec"] });
    for n in 0..3 {
        let name = format!("once-{n}");
        east.api.apply(&json!({
            "apiVersion": "batch/v1", "kind": "Job", "metadata": { "name": name, "namespace": "inj-job" },
            "spec": { "backoffLimit": 0, "template": template },
        }))?;
        let job = Object::new("batch/v1", "Job", "inj-job", &name);
        let status = east.api.until(&job, SOON, |found| {
            let status = found.context("the job is gone")?["status"].clone();
            ensure!(status["succeeded"] == 1 || status["failed"] == 1, "it is not over: {status}");
            Ok(status)
        })?;
        let what = format!("job/{name}");
        let logs = east.kubectl(&["logs", "-n", "inj-job", &what, "--all-containers", "--tail=40"])?;
        ensure!(status["succeeded"] == 1 && logs.contains(NGINX), "{status}: {logs}");
    }
    Ok(())
}
