//! Tokens, as the real TokenReview judges them.

use std::path::Path;

use tombolo_tests::kube::signed;
use tombolo_tests::process::ProcessSpec;
use tombolo_tests::scenario::flag;

use super::*;

/// What an injected pod's sidecar is started with; `token`: what its volume would hold.
pub fn started(world: &World, pod: &Value, name: &str, host: u8, token: &str) -> Result<ProcessSpec> {
    let dir = world.mesh.path(&format!("west/pods/{name}"));
    std::fs::create_dir_all(&dir)?;
    let join = pod["metadata"]["annotations"]["tombolo.dev/join-token"].as_str().context("no join token")?;
    std::fs::write(dir.join("join-token"), join)?;
    std::fs::write(dir.join("token"), token)?;
    let at = |path: &str, to: &Path| (path.to_owned(), to.display().to_string());
    let places = [at("/var/run/secrets/tombolo", &dir), at("/var/lib/tombolo", &dir.join("state"))];
    let place = |arg: String| places.iter().fold(arg, |arg, (from, to)| arg.replace(from, to));
    let args: Vec<String> = args(sidecar(pod).context("no sidecar")?).into_iter().map(place).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let address = world.mesh.cluster("west")?.address(host, 0).ip().to_string();
    Ok(world
        .mesh
        .spec("west", name, &args)?
        .env("TOMBOLO_NAME", pod["metadata"]["name"].as_str().context("no name")?)
        .env("TOMBOLO_POD_IP", address)
        .env("TOMBOLO_ZONE", ""))
}

/// The audience that the pod's volume asks for.
pub fn audience(pod: &Value) -> Result<&str> {
    let volumes = pod["spec"]["volumes"].as_array().context("no volumes")?;
    let join = volumes.iter().find(|volume| volume["name"] == "tombolo-join").context("no token")?;
    join["projected"]["sources"][0]["serviceAccountToken"]["audience"].as_str().context("no audience")
}

fn refused_with(world: &World, pod: &Value, name: &str, token: &str) -> Result<String> {
    match started(world, pod, name, 30, token)?.run(&world.mesh.logs()?, Duration::from_secs(20)) {
        Ok(output) => bail!("{name} was accepted: {output}"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

/// What the API server itself would sign for a pod.
fn claims(pod: &Value, audience: &str, issued: u64) -> Value {
    let account = |field: &str| pod["metadata"][field].clone();
    json!({
        "iss": "https://kubernetes.default.svc", "aud": [audience], "sub": "system:serviceaccount:tokens:web",
        "iat": issued, "nbf": issued, "exp": issued + 600,
        "kubernetes.io": {
            "namespace": "tokens", "pod": { "name": account("name"), "uid": account("uid") },
            "serviceaccount": { "name": "web", "uid": Value::Null },
        },
    })
}

pub fn only_the_pods_own_token_lets_it_join(world: &mut World) -> Result<()> {
    world.namespace("tokens", &[("tombolo.dev/inject", "enabled"), ("tombolo.dev/capture", "disabled")])?;
    let pod = world.create(&pod("tokens", "web-0", json!({}), json!({})))?;
    let ours = audience(&pod)?.to_owned();
    let api = &world.west.api;
    let account = Object::new("v1", "ServiceAccount", "tokens", "web");
    let uid = api.get(&account)?.context("no account")?["metadata"]["uid"].clone();
    let now = tombolo_runtime::clock::unix_seconds();
    let made = |issued: u64, change: fn(&mut Value)| {
        let mut claims = claims(&pod, &ours, issued);
        claims["kubernetes.io"]["serviceaccount"]["uid"] = uid.clone();
        change(&mut claims);
        claims
    };
    let stranger = rcgen::KeyPair::generate()?.serialize_pem();
    let unbound = json!({ "expirationSeconds": 600, "audiences": [ours] });
    let genuine = api.pod_token(&pod, &ours)?;
    // Its middle part says another name: the signature is of what it said before.
    let mut parts: Vec<&str> = genuine.split('.').collect();
    let other =
        signed(&made(now, |claims| claims["sub"] = "system:serviceaccount:bank:vault".into()), &stranger)?;
    let claimed: Vec<String> = other.split('.').map(str::to_owned).collect();
    parts[1] = &claimed[1];
    let altered = parts.join(".");
    let gone = {
        let gone = world.create(&super::pod("tokens", "gone", json!({}), json!({})))?;
        let token = api.pod_token(&gone, &ours)?;
        api.merge(
            &Object::new("v1", "Pod", "tokens", "gone"),
            json!({ "metadata": { "finalizers": null } }),
        )?;
        let delete = Object::new("v1", "Pod", "tokens", "gone");
        api.delete(&delete)?;
        api.until(&delete, SOON, |found| {
            ensure!(found.is_none(), "{found:?}");
            Ok(())
        })?;
        token
    };
    for (name, token, said) in [
        ("expired", world.west.sign(&made(now - 3600, |_| ()))?, "token has expired"),
        ("other-audience", api.pod_token(&pod, "https://kubernetes.default.svc")?, "audience"),
        ("unbound", api.token_with(&account, unbound)?, "bound to no pod"),
        ("stranger", signed(&made(now, |_| ()), &stranger)?, "does not accept the service account token"),
        ("altered", altered, "does not accept the service account token"),
        ("pod-gone", gone, "does not accept the service account token"),
        (
            "other-pod",
            world.west.sign(&made(now, |claims| claims["kubernetes.io"]["pod"]["uid"] = "0-0".into()))?,
            "does not accept",
        ),
        (
            "other-account",
            world.west.sign(&made(now, |claims| {
                claims["kubernetes.io"]["serviceaccount"]["name"] = "default".into()
            }))?,
            "does not accept",
        ),
        ("noise", "noise".to_owned(), "no service account token"),
    ] {
        let words = refused_with(world, &pod, name, &token)?;
        println!("{name}: {}", words.lines().last().unwrap_or_default());
        ensure!(words.contains(said), "{name}: {said:?} is missing: {words}");
    }
    // A token that is signed as the API server signs is accepted: those above were refused for what is wrong with them.
    let upstream = flag("--upstream", "web", 80, world.mesh.cluster("west")?.address(30, 9080));
    let good = world.west.sign(&made(now, |_| ()))?;
    let spec = started(world, &pod, "good", 30, &good)?.args(upstream);
    world.mesh.spawn("west/good", spec)?;
    world.mesh.ready("west", 30, "good")?;
    let id = "spiffe://acme.example/cluster/west/ns/tokens/sa/web";
    let log = world.mesh.operate("west", &["audit", "--action", "join", "--identity", id, "-o", "json"])?;
    ensure!(log.contains("pod web-0 by its service account"), "{log}");
    world.mesh.process_mut("west/good")?.stop()?;
    Ok(())
}
