//! What happens to a pod.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_tests::kube::Object;
use tombolo_tests::testbed::{Cluster, Testbed, eventually};

use super::{pod, ready_ip};

const SOON: Duration = Duration::from_secs(20);

fn in_main(cluster: &Cluster, namespace: &str, name: &str, command: &str) -> Result<String> {
    cluster.exec(namespace, name, "main", &["sh", "-c", command])
}

fn json_of(cluster: &Cluster, namespace: &str, name: &str) -> Result<Value> {
    cluster.api.get(&Object::new("v1", "Pod", namespace, name))?.context("there is no such pod")
}

pub fn readiness(_: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    let probe = json!({ "exec": { "command": ["test", "-e", "/tmp/well"] }, "periodSeconds": 1, "failureThreshold": 1 });
    let script = "touch /tmp/well; exec socat TCP-LISTEN:42,reuseaddr,fork 'SYSTEM:echo well'";
    let server = json!({ "containers": [{ "image": "busybox", "command": ["sh", "-c", script], "readinessProbe": probe }] });
    cluster.api.apply(&pod(namespace, "server", server))?;
    cluster.api.apply(&pod(namespace, "request", json!({})))?;
    cluster.api.apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "server", "namespace": namespace },
        "spec": { "selector": { "app": "server" }, "ports": [{ "port": 42 }] },
    }))?;
    cluster.pod_ready(namespace, "server")?;
    cluster.pod_ready(namespace, "request")?;
    let ask = || in_main(cluster, namespace, "request", "nc -w 2 server 42");
    eventually("it is in", SOON, ask)?;
    in_main(cluster, namespace, "server", "rm /tmp/well")?;
    eventually("it is out", SOON, || {
        ensure!(ask().is_err(), "it still answers");
        Ok(())
    })?;
    let status = json_of(cluster, namespace, "server")?;
    ensure!(
        status["status"]["phase"] == "Running"
            && status["status"]["containerStatuses"][0]["restartCount"] == 0,
        "{status}"
    );
    in_main(cluster, namespace, "server", "touch /tmp/well")?;
    eventually("it is in again", SOON, ask).map(drop)
}

pub fn liveness(_: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    let probe = json!({ "tcpSocket": { "port": 42 }, "periodSeconds": 1, "failureThreshold": 2, "initialDelaySeconds": 1 });
    // It listens once a life, for three seconds.
    let script = "timeout 3 socat TCP-LISTEN:42,reuseaddr,fork SYSTEM:true; sleep 100 & wait";
    let server = json!({ "containers": [{ "image": "busybox", "command": ["sh", "-c", script], "livenessProbe": probe }] });
    cluster.api.apply(&pod(namespace, "server", server))?;
    eventually("it runs again", Duration::from_secs(30), || {
        let pod = json_of(cluster, namespace, "server")?;
        let status = &pod["status"]["containerStatuses"][0];
        ensure!(status["restartCount"].as_u64() >= Some(1), "{status}");
        ensure!(!status["lastState"]["terminated"].is_null(), "{status}");
        Ok(())
    })
}

pub fn exec(_: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    for name in ["one", "two"] {
        cluster.api.apply(&pod(namespace, name, json!({})))?;
    }
    let (one, two) = (ready_ip(cluster, namespace, "one")?, ready_ip(cluster, namespace, "two")?);
    let addresses = in_main(cluster, namespace, "one", "hostname; ip -o -4 addr show dev eth0")?;
    ensure!(
        addresses.starts_with("one\n") && addresses.contains(&one) && !addresses.contains(&two),
        "{addresses}"
    );
    let processes = in_main(cluster, namespace, "one", "cat /proc/1/cmdline; ls -d /proc/[0-9]* | wc -l")?;
    ensure!(
        processes.starts_with("sh") && processes.trim().ends_with(|c: char| c.is_ascii_digit()),
        "{processes}"
    );
    let count: u32 = processes
        .lines()
        .last()
        .and_then(|line| line.rsplit('\0').next()?.trim().parse().ok())
        .context("no number")?;
    ensure!(count < 12, "it sees {count} processes");
    in_main(cluster, namespace, "one", "echo mine > /var/lib/mine && echo mine > /tmp/mine")?;
    ensure!(
        in_main(cluster, namespace, "one", "cat /var/lib/mine")?.trim() == "mine",
        "its file is not there"
    );
    ensure!(in_main(cluster, namespace, "two", "cat /var/lib/mine").is_err(), "another pod has its file");
    ensure!(!std::path::Path::new("/var/lib/mine").exists(), "the machine has its file");
    let hidden = in_main(cluster, namespace, "one", "ls -A /root /home /run | wc -l")?;
    ensure!(
        hidden.trim().parse::<u32>().is_ok_and(|lines| lines < 12),
        "it sees {hidden} of the machine's files"
    );
    let failed =
        in_main(cluster, namespace, "one", "exit 3").err().context("a command that fails went well")?;
    ensure!(format!("{failed:#}").contains("exit code 3"), "{failed:#}");
    let mut command = std::process::Command::new("sh");
    let typed = format!(
        "echo typed | {} --kubeconfig {} --context {} exec -i -n {namespace} one -c main -- tr a-z A-Z",
        cluster.kubectl_program().display(),
        cluster.kubeconfig().display(),
        cluster.name
    );
    let output = command.args(["-c", &typed]).output()?;
    ensure!(String::from_utf8_lossy(&output.stdout).trim() == "TYPED", "{output:?}");
    Ok(())
}

pub fn tokens(_: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    let source = json!({ "serviceAccountToken": { "audience": "tombolo.dev/east", "expirationSeconds": 600, "path": "token" } });
    let spec = json!({
        "securityContext": { "runAsUser": 1000, "fsGroup": 2000 },
        "volumes": [{ "name": "token", "projected": { "sources": [source] } }],
        "containers": [{ "volumeMounts": [{ "name": "token", "mountPath": "/var/run/secrets/tombolo" }] }],
    });
    cluster.api.apply(&pod(namespace, "holder", spec))?;
    cluster.pod_ready(namespace, "holder")?;
    let uid = json_of(cluster, namespace, "holder")?["metadata"]["uid"].clone();
    let token = in_main(cluster, namespace, "holder", "cat /var/run/secrets/tombolo/token")?;
    let review = |audience: &str| {
        let spec = json!({ "token": token.trim(), "audiences": [audience] });
        let review = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": { "name": "" }, "spec": spec });
        Ok::<_, anyhow::Error>(cluster.api.create(&review)?["status"].clone())
    };
    let good = review("tombolo.dev/east")?;
    ensure!(good["authenticated"] == true, "{good}");
    ensure!(good["user"]["username"] == format!("system:serviceaccount:{namespace}:default"), "{good}");
    ensure!(good["user"]["extra"]["authentication.kubernetes.io/pod-uid"] == json!([uid]), "{good}");
    ensure!(review("tombolo.dev/west")?["authenticated"] != true, "it is good for another audience");
    // The usual one: for the API server, which a pod reaches by its Service.
    let script = "cd /var/run/secrets/kubernetes.io/serviceaccount; curl -sS --cacert ca.crt -H \"Authorization: Bearer $(cat token)\" https://$KUBERNETES_SERVICE_HOST/api; cat namespace";
    let answer = in_main(cluster, namespace, "holder", script)?;
    ensure!(answer.contains("APIVersions") && answer.trim().ends_with(namespace), "{answer}");
    Ok(())
}

pub fn init_and_sidecars(_: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    let mount = json!([{ "name": "shared", "mountPath": "/shared" }]);
    let step = |name: &str, script: &str| json!({ "name": name, "image": "busybox", "command": ["sh", "-c", script], "volumeMounts": mount });
    let mut sidecar = step(
        "sidecar",
        "echo sidecar >> /shared/order; trap 'echo sidecar-ends >> /shared/order; exit' TERM; touch /tmp/up; sleep 1000 & wait",
    );
    sidecar["restartPolicy"] = json!("Always");
    sidecar["startupProbe"] = json!({ "exec": { "command": ["test", "-e", "/tmp/up"] }, "periodSeconds": 1 });
    let mut spec = json!({
        "terminationGracePeriodSeconds": 10,
        "volumes": [{ "name": "shared", "hostPath": { "path": format!("/{namespace}") } }],
        "initContainers": [step("first", "sleep 0.5; echo first >> /shared/order"), sidecar, step("last", "cat /shared/order && echo last >> /shared/order")],
    });
    spec["containers"] = json!([step(
        "main",
        "echo main >> /shared/order; trap 'sleep 0.5; echo main-ends >> /shared/order; exit' TERM; sleep 1000 & wait"
    )]);
    cluster.api.apply(&pod(namespace, "ordered", spec))?;
    cluster.pod_ready(namespace, "ordered")?;
    let order = |expected: &str| {
        eventually(expected, SOON, || {
            let found = cluster.host_file(&format!("{namespace}/order"))?;
            ensure!(found.split_whitespace().collect::<Vec<_>>().join(" ") == expected, "{found}");
            Ok(())
        })
    };
    order("first sidecar last main")?;
    cluster.kubectl(&["delete", "pod", "-n", namespace, "ordered"])?;
    order("first sidecar last main main-ends sidecar-ends")
}

pub fn privileges(_: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    let restricted = json!({
        "runAsNonRoot": true, "runAsUser": 65532, "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] },
        "readOnlyRootFilesystem": true, "seccompProfile": { "type": "RuntimeDefault" },
    });
    cluster.kubectl(&["label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted"])?;
    cluster.api.apply(&pod(
        namespace,
        "restricted",
        json!({ "containers": [{ "securityContext": restricted }] }),
    ))?;
    let refused = cluster.api.apply(&pod(namespace, "other", json!({})));
    ensure!(refused.is_err(), "PodSecurity lets anything in");
    cluster.pod_ready(namespace, "restricted")?;
    ensure!(in_main(cluster, namespace, "restricted", "id -u")?.trim() == "65532", "another user");
    for forbidden in [
        "touch /etc/x",
        "ip link add x type veth",
        "ip link set lo down",
        "echo 1 > /proc/sys/net/ipv4/ip_forward",
    ] {
        let outcome = in_main(cluster, namespace, "restricted", forbidden);
        ensure!(outcome.is_err(), "{forbidden} went well: {outcome:?}");
    }
    cluster.kubectl(&["label", "namespace", namespace, "pod-security.kubernetes.io/enforce-"])?;
    let admin =
        json!({ "containers": [{ "securityContext": { "capabilities": { "add": ["NET_ADMIN"] } } }] });
    cluster.api.apply(&pod(namespace, "admin", admin))?;
    cluster.api.apply(&pod(namespace, "usual", json!({})))?;
    cluster.pod_ready(namespace, "admin")?;
    cluster.pod_ready(namespace, "usual")?;
    in_main(cluster, namespace, "admin", "nft add table inet x && ip link add x type veth")?;
    ensure!(
        in_main(cluster, namespace, "usual", "nft add table inet x").is_err(),
        "anybody may change rules"
    );
    Ok(())
}

pub fn config_maps(_: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    let map = |value: &str| json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "settings", "namespace": namespace }, "data": { "key": value } });
    let variable =
        json!({ "name": "KEY", "valueFrom": { "configMapKeyRef": { "name": "settings", "key": "key" } } });
    let spec = json!({
        "volumes": [{ "name": "settings", "configMap": { "name": "settings" } }],
        "containers": [{ "env": [variable], "volumeMounts": [{ "name": "settings", "mountPath": "/etc/settings" }] }],
    });
    // The pod waits for what it needs.
    cluster.api.apply(&pod(namespace, "reader", spec))?;
    std::thread::sleep(Duration::from_millis(500));
    cluster.api.apply(&map("old"))?;
    cluster.pod_ready(namespace, "reader")?;
    let read = |expected: &str| {
        eventually(expected, SOON, || {
            let found = in_main(cluster, namespace, "reader", "cat /etc/settings/key; echo \" $KEY\"")?;
            ensure!(found.trim() == expected, "{found}");
            Ok(())
        })
    };
    read("old old")?;
    cluster.api.apply(&map("new"))?;
    read("new old")
}

pub fn claims(_: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    cluster.api.apply(&json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": { "name": "data", "namespace": namespace },
        "spec": { "accessModes": ["ReadWriteOnce"], "resources": { "requests": { "storage": "1Gi" } } },
    }))?;
    let spec = json!({
        "volumes": [{ "name": "data", "persistentVolumeClaim": { "claimName": "data" } }],
        "containers": [{ "volumeMounts": [{ "name": "data", "mountPath": "/data" }] }],
    });
    for name in ["first", "second"] {
        cluster.api.apply(&pod(namespace, name, spec.clone()))?;
        cluster.pod_ready(namespace, name)?;
        in_main(cluster, namespace, name, &format!("echo {name} >> /data/who"))?;
        if name == "first" {
            cluster.kubectl(&["delete", "pod", "-n", namespace, name])?;
        }
    }
    let who = in_main(cluster, namespace, "second", "cat /data/who")?;
    ensure!(who.split_whitespace().eq(["first", "second"]), "{who}");
    Ok(())
}

pub fn ending(_: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    let stubborn = json!({ "terminationGracePeriodSeconds": 3, "containers": [{ "command": ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"] }] });
    cluster.api.apply(&pod(namespace, "stubborn", stubborn))?;
    cluster.api.apply(&pod(namespace, "willing", json!({ "terminationGracePeriodSeconds": 30 })))?;
    for (name, at_least, at_most) in [("stubborn", 3, 15), ("willing", 0, 15)] {
        cluster.pod_ready(namespace, name)?;
        let start = Instant::now();
        cluster.kubectl(&["delete", "pod", "-n", namespace, name])?;
        let took = start.elapsed();
        let fits = (Duration::from_secs(at_least)..Duration::from_secs(at_most)).contains(&took);
        ensure!(fits, "{name} took {took:?}");
    }
    let over = json!({ "restartPolicy": "Never", "containers": [{ "command": ["sh", "-c", "exit 7"] }] });
    cluster.api.apply(&pod(namespace, "over", over))?;
    eventually("it is over", SOON, || {
        let pod = json_of(cluster, namespace, "over")?;
        let status = &pod["status"];
        ensure!(
            status["phase"] == "Failed"
                && status["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 7,
            "{status}"
        );
        Ok(())
    })
}

pub fn logs(_: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    let spec = json!({ "containers": [{ "command": ["sh", "-c", "echo said; echo warned >&2; sleep 1000 & wait"] }] });
    cluster.api.apply(&pod(namespace, "speaker", spec))?;
    cluster.pod_ready(namespace, "speaker")?;
    let said = eventually("it has spoken", SOON, || {
        let said = cluster.kubectl(&["logs", "-n", namespace, "speaker"])?;
        ensure!(said.contains("warned"), "{said}");
        Ok(said)
    })?;
    ensure!(said.contains("said\n"), "{said}");
    Ok(())
}

pub fn attach(_: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    let run =
        ["run", "once", "-n", namespace, "--image=busybox", "-i", "--quiet", "--restart=Never", "--rm", "--"];
    let said = cluster.kubectl(&[&run[..], &["sh", "-c", "echo begun; sleep 2; echo over"]].concat())?;
    ensure!(said.contains("begun\nover\n"), "{said}");
    Ok(())
}

pub fn unknown_images(_: &Testbed, cluster: &Cluster, namespace: &str) -> Result<()> {
    cluster.api.apply(&pod(
        namespace,
        "unknown",
        json!({ "containers": [{ "image": "registry.example/unknown:7" }] }),
    ))?;
    eventually("it says so", SOON, || {
        let pod = json_of(cluster, namespace, "unknown")?;
        let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
        ensure!(waiting["reason"] == "ErrImagePull", "{}", pod["status"]);
        let events =
            cluster.kubectl(&["get", "events", "-n", namespace, "-o", "jsonpath={.items[*].message}"])?;
        ensure!(events.contains("registry.example/unknown:7"), "{events}");
        Ok(())
    })
}
