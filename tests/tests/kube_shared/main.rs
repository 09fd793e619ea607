//! Pods without a sidecar, in two clusters with real API servers: an export of unmeshed pods in east is called by unmeshed
//! pods in west at the address of its derived `Service`'s slices, through shared sidecars of least privilege. Then what goes
//! wrong: replicas that die, an API server that is away, addresses that are given to others. Clusters are expensive to start:
//! one test goes through all of it in order.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tombolo_tests::capability::{amount, require_netns};
use tombolo_tests::kube::{Object, require_control_plane};
use tombolo_tests::times::Times;

mod site;

use site::{CART, NOBODY, OTHER, SHARED, SOON, Site, WEB};

const HTTP: fn(u16) -> serde_json::Value =
    |port| json!([{ "name": "http", "port": port, "targetPort": 8080 }]);

/// Lets these service accounts of west in, and nobody else.
fn only(account: &str) -> String {
    format!(
        "apiVersion: tombolo.dev/v1alpha1
kind: AccessPolicy
metadata: {{ name: only, namespace: shop }}
spec:
  action: ALLOW
  rules:
    - from: [ {{ identities: [ spiffe://acme.example/cluster/west/ns/shop/sa/{account} ] }} ]
"
    )
}

/// The derived `Service` leads nowhere until a shared sidecar is ready, and says so.
fn leads_there_once_one_is_ready(site: &mut Site) -> Result<()> {
    site.server("east", "web", WEB[0], "web of east")?;
    site.pod("east", "web-0", "web", WEB[0], json!({}))?;
    site.pod("west", "cart-0", "cart", CART, json!({}))?;
    site.pod("west", "other-0", "other", OTHER, json!({}))?;
    site.service("east", "web", "web", HTTP(80))?;
    site.export("east", "web")?;
    site.becomes("west's import says that its address leads nowhere", |site| {
        let (ready, message) = site.import_ready("west", "web")?;
        ensure!(
            ready == "False Pending" && message.contains("no shared sidecar is ready"),
            "{ready} {message}"
        );
        ensure!(site.led_to("west", "web", 80)?.is_empty());
        Ok(())
    })?;
    for cluster in ["east", "west"] {
        site.shared(cluster, SHARED[0])?;
        site.replicas(cluster, &SHARED[..1])?;
    }
    site.becomes("an unmeshed pod of west is answered by an unmeshed pod of east", |site| {
        let answer = site.called("west", CART, "web", 80, 0)?;
        ensure!(answer.contains("web of east"), "{answer}");
        Ok(())
    })?;
    let (ready, message) = site.import_ready("west", "web")?;
    ensure!(ready == "True Ready", "{ready} {message}");
    // Its own cluster has the import, too.
    site.pod("east", "cart-0", "cart", CART, json!({}))?;
    site.becomes("an unmeshed pod of east, too", |site| site.called("east", CART, "web", 80, 0).map(drop))?;
    Ok(())
}

/// Each pod calls as its service account, strangers as nobody; who has not called has no sidecar.
fn callers_are_their_service_accounts(site: &mut Site) -> Result<()> {
    let up = |site: &Site, account: &str| {
        let label = format!("application=\"shop/{account}\"");
        site.shared_metric("west", SHARED[0], "application_up", &[&label])
    };
    ensure!(
        up(site, "cart")? == 1.0 && up(site, "other")? == 0.0,
        "started by the first call, and not before"
    );
    site.mesh.apply("east", &only("cart"))?;
    site.becomes("another service account is refused by a policy for the first", |site| {
        ensure!(site.called("west", OTHER, "web", 80, 0).is_err(), "it is let in");
        Ok(())
    })?;
    ensure!(site.called("west", CART, "web", 80, 0)?.contains("web of east"));
    ensure!(up(site, "other")? == 1.0);
    ensure!(site.called("west", NOBODY, "web", 80, 0).is_err(), "a stranger was given an identity");
    let strangers = site.shared_metric("west", SHARED[0], "calls_total", &["result=\"unknown_caller\""])?;
    ensure!(strangers >= 1.0, "{strangers}");
    let audit = site.mesh.operate("west", &["audit", "--action", "join", "-o", "json"])?;
    ensure!(audit.contains("shared-30 for pods of the service account"), "{audit}");
    // One with a sidecar of its own is not stood for.
    site.pod("west", "meshed-0", "cart", NOBODY, json!({ "tombolo.dev/injected": "true" }))?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(site.called("west", NOBODY, "web", 80, 0).is_err(), "a pod with a sidecar was stood for");
    site.kill_pod("west", "meshed-0")?;
    // Pods that are being deleted, with their grace period: nothing that follows waits for them.
    for cluster in ["east", "west"] {
        site.pod_at(cluster, ("ending-0", "other"), "10.202.0.1", json!({}))?;
        site.plane(cluster).api.delete(&Object::new("v1", "Pod", "shop", "ending-0"))?;
    }
    Ok(())
}

/// From an export to the first answer at the derived `Service`'s address.
fn exports_are_answered_soon(site: &mut Site) -> Result<()> {
    site.mesh.operate("east", &["delete", "accesspolicy", "only", "-n", "shop", "--yes"])?;
    let mut times = Times::default();
    for n in 0..amount("TOMBOLO_SHARED_EXPORTS", 30) {
        let name = format!("svc-{n}");
        site.service("east", &name, "web", HTTP(80))?;
        std::thread::sleep(Duration::from_millis(300));
        let start = Instant::now();
        site.export("east", &name)?;
        while site.called("west", CART, &name, 80, 0).is_err() {
            ensure!(
                start.elapsed() < SOON,
                "{name} is not answered: {:?}",
                site.called("west", CART, &name, 80, 0)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        times.push(start.elapsed());
    }
    println!("FIGURE export -> first answer by the derived Service: {times}");
    ensure!(times.percentile(0.99) <= Duration::from_secs(2), "{times}");
    Ok(())
}

/// Exporting pods change: backends follow.
fn backends_follow_pods(site: &mut Site) -> Result<()> {
    site.server("east", "web-next", WEB[1], "the next web of east")?;
    site.pod("east", "web-1", "web", WEB[1], json!({}))?;
    site.kill_pod("east", "web-0")?;
    let took = site.becomes("the next pod answers, and only it", |site| {
        for _ in 0..5 {
            let answer = site.called("west", CART, "web", 80, 0)?;
            ensure!(answer.contains("the next web"), "{answer}");
        }
        Ok(())
    })?;
    ensure!(took < Duration::from_secs(3), "{took:?}");
    site.kill_pod("east", "web-1")?;
    site.becomes("without a pod nobody answers", |site| {
        ensure!(site.called("west", CART, "web", 80, 0).is_err());
        Ok(())
    })?;
    site.pod("east", "web-0", "web", WEB[0], json!({}))?;
    site.becomes("and again with one", |site| site.called("west", CART, "web", 80, 0).map(drop))?;
    Ok(())
}

/// MCS conformance 19 to 21: what is not exported is not reached, and a port is routed to whoever exposes it.
fn ports_lead_only_where_they_are_exposed(site: &mut Site) -> Result<()> {
    site.server("west", "web", WEB[0], "web of west")?;
    site.pod("west", "web-0", "web", WEB[0], json!({}))?;
    site.service("west", "web", "web", HTTP(80))?;
    std::thread::sleep(Duration::from_millis(500));
    for _ in 0..10 {
        let answer = site.called("west", CART, "web", 80, 0)?;
        ensure!(answer.contains("web of east"), "west has not exported it: {answer}");
    }
    for (name, port) in [("east", 42), ("west", 4242)] {
        let port = json!([{ "name": format!("of-{name}"), "port": port, "targetPort": 8080 }]);
        site.service(name, "ports", "web", port)?;
        site.export(name, "ports")?;
        std::thread::sleep(Duration::from_millis(1100));
    }
    for (cluster, exposer, port) in
        [("west", "east", 42), ("west", "west", 4242), ("east", "east", 42), ("east", "west", 4242)]
    {
        site.becomes(&format!("{cluster} is answered on {exposer}'s port"), |site| {
            site.called(cluster, CART, "ports", port, 0).map(drop)
        })?;
        for _ in 0..10 {
            let answer = site.called(cluster, CART, "ports", port, 0)?;
            ensure!(answer.contains(&format!("web of {exposer}")), "{cluster} {port}: {answer}");
        }
    }
    Ok(())
}

/// Two replicas stand for the same service accounts, each for itself; one dies.
fn replicas_are_members_of_their_own(site: &mut Site) -> Result<()> {
    for cluster in ["east", "west"] {
        site.shared(cluster, SHARED[1])?;
        site.replicas(cluster, &SHARED)?;
    }
    site.becomes("both replicas answer", |site| {
        ensure!(site.led_to("west", "web", 80)?.len() == 2);
        (0..2).try_for_each(|nth| site.called("west", CART, "web", 80, nth).map(drop))
    })?;
    for cluster in ["east", "west"] {
        let status = site.mesh.status(cluster)?.to_string();
        ensure!(!status.contains("clone"), "{status}");
        for host in SHARED {
            let log = site.mesh.process(&format!("{cluster}/shared-{host}"))?.log();
            ensure!(!log.contains("used by another process"), "{log}");
        }
    }
    for cluster in ["east", "west"] {
        site.mesh.process_mut(&format!("{cluster}/shared-{}", SHARED[0]))?.kill()?;
        site.replicas(cluster, &SHARED[1..])?;
    }
    site.becomes("the other replica answers alone", |site| {
        ensure!(site.led_to("west", "web", 80)?.len() == 1);
        site.called("west", CART, "web", 80, 0).map(drop)
    })?;
    for cluster in ["east", "west"] {
        site.mesh.restart(&format!("{cluster}/shared-{}", SHARED[0]))?;
        site.mesh.ready(cluster, SHARED[0], &format!("shared-{}", SHARED[0]))?;
        site.replicas(cluster, &SHARED)?;
    }
    site.becomes("and both after its restart", |site| {
        (0..2).try_for_each(|nth| site.called("west", CART, "web", 80, nth).map(drop))
    })?;
    Ok(())
}

/// What is known keeps serving, new connections too.
fn an_api_server_may_be_away(site: &mut Site) -> Result<()> {
    let to = *site.led_to("west", "web", 80)?.first().context("nobody stands for it")?;
    for cluster in ["east", "west"] {
        site.mesh.process_mut(&format!("{cluster}/apiserver"))?.kill()?;
    }
    std::thread::sleep(Duration::from_secs(3));
    for _ in 0..10 {
        ensure!(site.called_at("west", CART, to)?.contains("web of east"));
    }
    // Also after they were started again meanwhile, each in its place.
    for cluster in ["east", "west"] {
        for host in SHARED {
            site.mesh.process_mut(&format!("{cluster}/shared-{host}"))?.kill()?;
            site.mesh.restart(&format!("{cluster}/shared-{host}"))?;
        }
    }
    for cluster in ["east", "west"] {
        for host in SHARED {
            site.mesh.ready(cluster, host, &format!("shared-{host}"))?;
        }
    }
    site.becomes("shared sidecars that are started without an API server serve", |site| {
        ensure!(site.called_at("west", CART, to)?.contains("web of east"));
        Ok(())
    })?;
    for cluster in ["east", "west"] {
        site.mesh.restart(&format!("{cluster}/apiserver"))?;
        site.plane(cluster).ready(&site.mesh)?;
    }
    site.service("east", "after", "web", HTTP(80))?;
    site.export("east", "after")?;
    let took = site.mesh.eventually("what is new is answered", Duration::from_secs(60), |_| {
        site.called("west", CART, "after", 80, 0).map(drop)
    })?;
    println!("after both API servers were away what is new is answered after {took:?}");
    Ok(())
}

/// An address that is given to another pod is that pod's.
fn an_address_is_whose_it_is_now(site: &mut Site) -> Result<()> {
    site.mesh.apply("east", &only("cart"))?;
    site.becomes("cart alone is let in", |site| {
        ensure!(site.called("west", OTHER, "web", 80, 0).is_err());
        site.called("west", CART, "web", 80, 0).map(drop)
    })?;
    site.pod("west", "thief-0", "other", CART, json!({}))?;
    site.becomes("an address that two service accounts claim is nobody's", |site| {
        ensure!(site.called("west", CART, "web", 80, 0).is_err());
        ensure!(site.shared_metric("west", SHARED[0], "kubernetes_contested_addresses", &[])? == 1.0);
        Ok(())
    })?;
    site.kill_pod("west", "cart-0")?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(site.called("west", CART, "web", 80, 0).is_err(), "the new pod calls as the old one");
    site.kill_pod("west", "thief-0")?;
    site.pod("west", "cart-1", "cart", CART, json!({}))?;
    site.becomes("the old service account calls again", |site| {
        site.called("west", CART, "web", 80, 0).map(drop)
    })?;
    Ok(())
}

/// It gets no tokens but for the federator.
fn tokens_are_for_the_federator_alone(site: &mut Site) -> Result<()> {
    let account = Object::new("v1", "ServiceAccount", "shop", "cart");
    let kubeconfig = site.west.kubeconfig_of("tombolo-shared")?;
    let namespace = &site.mesh.cluster("west")?.namespace;
    let shared = tombolo_tests::kube::Api::connect(namespace, &kubeconfig)?;
    let refused = shared.token(&account).err().context("a token for the API server was given")?.to_string();
    ensure!(refused.contains("for the audience of its federator"), "{refused}");
    ensure!(shared.list(&Object::new("v1", "Secret", "shop", "")).is_err(), "it reads secrets");
    Ok(())
}

/// Pods that do nothing cost a row, service accounts that serve a sidecar each.
fn what_pods_and_applications_cost(site: &mut Site) -> Result<()> {
    let memory = |site: &Site| site.memory_bytes("east", SHARED[0]);
    let (pods, accounts) = (amount("TOMBOLO_SHARED_PODS", 200), amount("TOMBOLO_SHARED_ACCOUNTS", 40));
    let before = memory(site)?;
    site.account("east", "crowd")?;
    for n in 0..pods {
        let ip = format!("10.200.{}.{}", n / 250, n % 250 + 1);
        site.pod_at("east", (&format!("crowd-{n}"), "crowd"), &ip, json!({}))?;
    }
    let crowd = memory(site)?;
    for n in 0..accounts {
        let name = format!("many-{n}");
        site.account("east", &name)?;
        site.pod_at("east", (&name, &name), &format!("10.201.{}.{}", n / 250, n % 250 + 1), json!({}))?;
        site.service("east", &name, &name, HTTP(80))?;
        site.export("east", &name)?;
    }
    site.becomes("every service account that serves has its sidecar", |site| {
        let metrics = site.mesh.metrics("east", SHARED[0])?;
        let up = metrics
            .lines()
            .filter(|line| line.contains("application_up{application=\"shop/many-") && line.ends_with(" 1"));
        let up = u32::try_from(up.count())?;
        ensure!(up == accounts, "{up} of {accounts}");
        Ok(())
    })?;
    let kib = |bytes: u64, before: u64, count: u32| bytes.saturating_sub(before) / 1024 / u64::from(count);
    // What starting took is given back.
    std::thread::sleep(Duration::from_secs(5));
    let after = memory(site)?;
    println!(
        "FIGURE shared sidecar (debug): {} MiB, {} KiB per pod, {} KiB per application",
        after >> 20,
        kib(crowd, before, pods),
        kib(after, crowd, accounts)
    );
    // 1.2 to 2.1 MiB are measured: a QUIC endpoint, its connections and what the federator tells it.
    ensure!(kib(after, crowd, accounts) < 3072, "an application costs {} KiB", kib(after, crowd, accounts));
    Ok(())
}

type Step = fn(&mut Site) -> Result<()>;

const STEPS: [(&str, Step); 10] = [
    ("the derived Service leads to the shared sidecars", leads_there_once_one_is_ready),
    ("callers are their service accounts", callers_are_their_service_accounts),
    ("exports are answered soon", exports_are_answered_soon),
    ("backends follow pods", backends_follow_pods),
    ("ports lead only where they are exposed", ports_lead_only_where_they_are_exposed),
    ("replicas are members of their own", replicas_are_members_of_their_own),
    ("an address is whose it is now", an_address_is_whose_it_is_now),
    ("tokens are for the federator alone", tokens_are_for_the_federator_alone),
    ("an API server may be away", an_api_server_may_be_away),
    ("what pods and applications cost", what_pods_and_applications_cost),
];

#[test]
fn pods_without_a_sidecar_call_and_serve_across_clusters_through_shared_ones() -> Result<()> {
    let test = "pods_without_a_sidecar_call_and_serve_across_clusters_through_shared_ones";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let Some(bin) = require_control_plane(test) else { return Ok(()) };
    let mut site = Site::start(&bin)?;
    for (name, step) in STEPS {
        let start = Instant::now();
        if let Err(error) = step(&mut site) {
            for process in ["east/shared-30", "west/shared-30", "east/federator", "west/federator"] {
                if let Ok(process) = site.mesh.process(process) {
                    println!("{}", process.tail());
                }
            }
            return Err(error.context(name));
        }
        println!("ok   {name} ({:?})", start.elapsed());
    }
    site.stop()
}
