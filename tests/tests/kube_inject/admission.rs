//! What the API server makes of pods.

use std::process::{Command, Stdio};

use tombolo_tests::captured::run;

use super::*;

const ENFORCE: &str = "pod-security.kubernetes.io/enforce";
const ENABLED: (&str, &str) = ("tombolo.dev/inject", "enabled");

pub fn restricted_namespaces_admit_pods_with_their_sidecar(world: &mut World) -> Result<()> {
    world.namespace("restricted", &[ENABLED, (ENFORCE, "restricted")])?;
    let annotations = json!({ "tombolo.dev/upstreams": "shop/web:80,shop/db:5432=127.0.0.1:5432", "tombolo.dev/serve": "web:80=http" });
    let made = world.create(&pod("restricted", "web-0", annotations, json!({})))?;
    let sidecar = sidecar(&made).with_context(|| format!("no sidecar: {made}"))?;
    ensure!(container(&made, "tombolo-capture").is_none(), "{made}");
    let args = args(sidecar).join(" ");
    for said in [
        "--upstream shop/web:80=127.116.98.1:80",
        "--upstream shop/db:5432=127.0.0.1:5432",
        "--service restricted/web:80=127.0.0.1:8080",
    ] {
        ensure!(args.contains(said), "{said}: {args}");
    }
    ensure!(made["spec"]["hostAliases"][0]["hostnames"][0] == "web.shop.svc.clusterset.local", "{made}");
    ensure!(made["metadata"]["labels"]["tombolo.dev/injected"] == "true", "{made}");
    // The pod that an injected one is copied from (kubectl get -o yaml | kubectl apply) is the same again.
    let mut copy = made.clone();
    copy["metadata"] = json!({
        "name": "web-1", "namespace": "restricted", "labels": made["metadata"]["labels"],
        "annotations": made["metadata"]["annotations"],
    });
    let again = world.create(&copy)?;
    let names = |pod: &Value| -> Vec<String> {
        let list = pod["spec"]["initContainers"].as_array().into_iter().flatten();
        list.filter_map(|container| container["name"].as_str()).map(str::to_owned).collect()
    };
    ensure!(names(&made) == names(&again), "{again}");
    ensure!(
        made["spec"]["volumes"].as_array().map(Vec::len) == again["spec"]["volumes"].as_array().map(Vec::len)
    );
    Ok(())
}

pub fn baseline_forbids_capture_and_says_so(world: &mut World) -> Result<()> {
    world.namespace("baseline", &[ENABLED, (ENFORCE, "baseline")])?;
    let made = world.create(&pod("baseline", "explicit", json!({}), json!({})))?;
    ensure!(sidecar(&made).is_some() && container(&made, "tombolo-capture").is_none(), "{made}");
    for (name, annotations, capability) in [
        ("forced", json!({ "tombolo.dev/capture": "enabled" }), "NET_ADMIN"),
        ("marks", json!({ "tombolo.dev/capture": "enabled" }), "NET_RAW"),
    ] {
        let words = world.refused(&pod("baseline", name, annotations, json!({})))?;
        ensure!(
            words.contains("violates PodSecurity \"baseline") && words.contains(capability),
            "{capability}: {words}"
        );
        println!("baseline: {words}");
    }
    let words =
        world.refused(&pod("baseline", "strict", json!({ "tombolo.dev/inbound": "strict" }), json!({})))?;
    ensure!(words.contains("tombolo.dev/inbound") && words.contains("needs captured connections"), "{words}");
    Ok(())
}

pub fn pods_are_captured_where_nothing_forbids_it(world: &mut World) -> Result<()> {
    world.namespace("captured", &[ENABLED])?;
    let annotations = json!({
        "tombolo.dev/inbound": "strict", "tombolo.dev/exclude-outbound-cidrs": "192.0.2.0/24",
        "prometheus.io/scrape": "true", "prometheus.io/port": "8080",
    });
    let made = world.create(&pod("captured", "web-0", annotations, json!({})))?;
    let rules = container(&made, "tombolo-capture").with_context(|| format!("no rules: {made}"))?;
    let said = args(rules).join(" ");
    for flag in [
        "--outbound all",
        "--exclude-cidr 192.0.2.0/24",
        "--inbound strict",
        "--inbound-port 8080",
        "--inbound-allow =8080",
    ] {
        ensure!(said.contains(flag), "{flag}: {said}");
    }
    ensure!(rules["env"][0]["valueFrom"]["fieldRef"]["fieldPath"] == "status.hostIPs", "{rules}");
    // The arguments are the command's: it makes rules of them.
    let arguments: Vec<String> = args(rules);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(["--dry-run"]).collect();
    let spec = world.mesh.spec("west", "rules", &arguments)?.env("TOMBOLO_HOST_IPS", "10.0.0.1,fd00::1");
    let rules = spec.run(&world.mesh.logs()?, Duration::from_secs(10))?;
    ensure!(rules.contains("10.0.0.1") && rules.contains("192.0.2.0/24"), "{rules}");
    world.namespace("quiet", &[ENABLED, ("tombolo.dev/capture", "disabled")])?;
    let made = world.create(&pod("quiet", "web-0", json!({}), json!({})))?;
    ensure!(sidecar(&made).is_some() && container(&made, "tombolo-capture").is_none(), "{made}");
    Ok(())
}

pub fn pods_and_namespaces_choose(world: &mut World) -> Result<()> {
    world.namespace("plain", &[])?;
    let labelled = |namespace: &str, name: &str, value: &str| {
        let mut pod = pod(namespace, name, json!({}), json!({}));
        pod["metadata"]["labels"]["tombolo.dev/inject"] = value.into();
        pod
    };
    let annotated = json!({ "tombolo.dev/inject": "false" });
    let mut asked = pod("restricted", "host", json!({}), json!({ "hostNetwork": true }));
    asked["metadata"]["namespace"] = "captured".into();
    asked["spec"]["containers"][0]["ports"] = json!([]);
    for (pod, expected) in [
        (pod("plain", "none", json!({}), json!({})), false),
        (labelled("plain", "asks", "true"), true),
        (labelled("captured", "no", "false"), false),
        (pod("captured", "not", annotated, json!({})), false),
        (asked, false),
        (pod(SYSTEM, "own", json!({}), json!({ "serviceAccountName": "tombolo-federator" })), false),
    ] {
        let made = world.create(&pod)?;
        ensure!(sidecar(&made).is_some() == expected, "{made}");
    }
    Ok(())
}

pub fn what_a_pod_asks_for_wrongly_is_named(world: &mut World) -> Result<()> {
    for (name, value, said) in [
        ("serve", "web=8080", "NAME:PORT=TARGET"),
        ("serve", "web:80=nowhere", "no container has a TCP port of that name"),
        ("upstreams", "web", "NAMESPACE/NAME:PORT"),
        ("inbound", "closed", "strict, permissive or off"),
        ("requests", "cpu=lots", "cpu=10m"),
        ("inject", "perhaps", "neither"),
    ] {
        let key = format!("tombolo.dev/{name}");
        let words = world.refused(&pod("captured", "wrong", json!({ key: value }), json!({})))?;
        ensure!(
            words.contains(&format!("tombolo.dev/{name}")) && words.contains(said),
            "{name} {value}: {words}"
        );
    }
    Ok(())
}

/// 600 connections, opened anew as they end, until its end.
const GREEDY: &str = "
import socket, ssl, sys, threading, time
to = (sys.argv[1], int(sys.argv[2]))
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
head = b'POST /inject HTTP/1.1\\r\\nHost: x\\r\\nContent-Type: application/json\\r\\nContent-Length: 2000000\\r\\n\\r\\n'
begun = [0]
def hold(kind):
    first = True
    while True:
        try:
            s = socket.create_connection(to, 5)
            if kind > 0: s = context.wrap_socket(s)
            if kind > 1: s.sendall(head + b'{' + b' ' * 1000)
        except OSError: s = None
        if first: begun[0] += 1
        first = False
        try:
            if s: s.settimeout(60); s.recv(1)
        except OSError: pass
        time.sleep(1)
threading.stack_size(128 << 10)
for n in range(600): threading.Thread(target=hold, args=(n % 3,), daemon=True).start()
while begun[0] < 600: time.sleep(0.05)
print(begun[0], flush=True)
sys.stdin.read()
";

/// Whoever reaches the port may ask; what is no question is told so, and costs nobody else anything.
pub fn strangers_get_clear_words_and_no_more(world: &mut World) -> Result<()> {
    let west = world.mesh.cluster("west")?;
    let at = |path: &str| format!("https://{}{path}", west.address(1, 9443));
    let asked = |args: &[&str], body: &str| -> Result<String> {
        let fixed = ["-sk", "--max-time", "10", "-w", "\n%{http_code}"];
        // One that is refused in the middle of its body sees a reset.
        let ended = run(&west.namespace, "curl", &[&fixed[..], args].concat(), body)?;
        ensure!(matches!(ended.code, 0 | 55), "{ended:?}");
        Ok(ended.out)
    };
    let (inject, other) = (at("/inject"), at("/metrics"));
    let post = |path: &str, body: &str| asked(&["-H", "Expect:", "--data-binary", "@-", path], body);
    let old = json!({ "apiVersion": "admission.k8s.io/v1beta1", "kind": "AdmissionReview", "request": { "uid": "7" } });
    for (answer, status, said) in [
        (asked(&[&inject], "")?, "405", "POST an AdmissionReview"),
        (asked(&[&other], "")?, "404", "/inject"),
        (post(&inject, "<html>")?, "400", "this is no AdmissionReview"),
        (post(&inject, "{}")?, "400", "request.uid is missing"),
        (post(&inject, &old.to_string())?, "200", "admissionReviewVersions has to be [v1]"),
    ] {
        ensure!(answer.ends_with(status) && answer.contains(said), "{status} {said}: {answer}");
    }
    let large = post(&inject, &"x".repeat(5 * 1024 * 1024))?;
    ensure!(large.ends_with("413") || large.ends_with("000"), "{large}");
    // More connections than there are places, from the address that the API server calls from: some say nothing, some have
    // shaken hands and ask nothing, some send a request whose body never ends.
    let to = west.address(1, 9443);
    let [host, port] = [to.ip().to_string(), to.port().to_string()];
    let mut greedy = west.namespace.run(|| {
        let mut command = Command::new("python3");
        command.args(["-c", GREEDY, &host, &port]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()
    })??;
    let out = greedy.stdout.take().context("no output")?;
    let mut said = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut said)?;
    let mut slowest = Duration::ZERO;
    let made = (0..10).try_for_each(|n| {
        let start = Instant::now();
        let made = world.create(&pod("restricted", &format!("beside-{n}"), json!({}), json!({})))?;
        slowest = slowest.max(start.elapsed());
        ensure!(sidecar(&made).is_some(), "{made}");
        std::thread::sleep(Duration::from_millis(300));
        Ok(())
    });
    greedy.kill()?;
    greedy.wait()?;
    made?;
    let metrics = world.mesh.metrics("west", 1)?;
    let ended =
        metric(&metrics, "tombolo_federator_inject_turned_away_connections_total", &["result=\"ended\""]);
    println!(
        "FIGURE beside {} connections of a greedy client a pod is made in {slowest:?} at most; {ended} of them ended",
        said.trim()
    );
    ensure!(said.trim() == "600" && ended >= 300.0, "{said}: {ended} ended: {metrics}");
    ensure!(slowest < Duration::from_secs(3), "{slowest:?}");
    Ok(())
}

fn secret() -> Object {
    Object::new("v1", "Secret", SYSTEM, "tombolo-webhook")
}

fn shown(world: &World) -> Result<String> {
    let secret = world.west.api.get(&secret())?.context("no Secret")?;
    Ok(secret["data"]["tls.crt"].as_str().unwrap_or_default().to_owned())
}

pub fn certificates_rotate_while_pods_are_made(world: &mut World) -> Result<()> {
    let first = shown(world)?;
    let annotation = json!({ "metadata": { "annotations": { "tombolo.dev/rotate": "now" } } });
    world.west.api.merge(&secret(), annotation)?;
    let start = Instant::now();
    let (mut pods, mut seen) = (0, None);
    // Every pod is made while certificates change: failurePolicy is Fail.
    while start.elapsed() < Duration::from_secs(40) {
        let name = format!("rotating-{pods}");
        let made = world.create(&pod("restricted", &name, json!({}), json!({})))?;
        ensure!(sidecar(&made).is_some(), "{made}");
        pods += 1;
        if seen.is_none() && shown(world)? != first {
            seen = Some(start.elapsed());
        }
        if seen.is_some_and(|seen| start.elapsed() > seen + Duration::from_secs(5)) {
            break;
        }
    }
    let seen = seen.context("the certificate was not rotated within 40 s")?;
    println!("FIGURE certificate rotated after {seen:?}; {pods} pods made meanwhile, none refused");
    ensure!(seen >= Duration::from_secs(10), "it was shown before it was trusted everywhere");
    let metrics = world.mesh.metrics("west", 1)?;
    ensure!(metric(&metrics, "tombolo_federator_inject_rotations_total", &[]) >= 2.0, "{metrics}");
    Ok(())
}

pub fn a_secret_that_is_lost_is_made_anew(world: &mut World) -> Result<()> {
    let before = shown(world)?;
    world.west.api.delete(&secret())?;
    world.mesh.eventually("there is another certificate", SOON, |_| {
        let now = shown(world)?;
        ensure!(now != before && !now.is_empty());
        Ok(())
    })?;
    world.until_made("restricted", true)
}

pub fn others_webhooks_are_left_alone(world: &mut World) -> Result<()> {
    let before = world.west.api.get(&world.configuration())?.context("no configuration")?;
    let other = json!({
        "name": "other.example.com", "clientConfig": { "url": "https://192.0.2.1/x" }, "admissionReviewVersions": ["v1"],
        "sideEffects": "None", "failurePolicy": "Ignore", "rules": [],
    });
    let mut changed = before["webhooks"].as_array().cloned().unwrap_or_default();
    changed[0]["clientConfig"]["caBundle"] = Value::Null;
    changed[0]["timeoutSeconds"] = 7.into();
    changed.push(other);
    world.west.api.merge(&world.configuration(), json!({ "webhooks": changed }))?;
    world.west.api.until(&world.configuration(), SOON, |found| {
        let webhooks = &found.context("no configuration")?["webhooks"];
        let told = |index: usize| webhooks[index]["clientConfig"]["caBundle"].is_string();
        ensure!(told(0) && told(1), "{webhooks}");
        ensure!(
            !told(2) && webhooks[2]["failurePolicy"] == "Ignore",
            "somebody else's was written to: {webhooks}"
        );
        ensure!(webhooks[0]["timeoutSeconds"] == 7, "more than caBundle was written: {webhooks}");
        Ok(())
    })
}

pub fn without_a_federator_the_failure_policy_decides(world: &mut World) -> Result<()> {
    world.mesh.process_mut("west/federator")?.stop()?;
    let words = world.refused(&pod("restricted", "alone", json!({}), json!({})))?;
    ensure!(words.contains("failed calling webhook \"namespace.inject.tombolo.dev\""), "{words}");
    println!("webhook down, Fail: {words}");
    let policy = |policy: &str| -> Result<()> {
        let configuration = world.west.api.get(&world.configuration())?.context("no configuration")?;
        let mut webhooks = configuration["webhooks"].as_array().cloned().unwrap_or_default();
        webhooks.iter_mut().for_each(|webhook| webhook["failurePolicy"] = policy.into());
        world.west.api.merge(&world.configuration(), json!({ "webhooks": webhooks }))
    };
    policy("Ignore")?;
    world.until_made("restricted", false)?;
    policy("Fail")?;
    world.mesh.restart("west/federator")?;
    world.mesh.ready("west", 1, "federator")?;
    world.until_made("restricted", true)
}
