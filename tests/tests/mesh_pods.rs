//! Pods join as their Kubernetes service account: by a projected token that the API server vouches for, and by no other.
//! The API server here speaks TokenReview and nothing else ([`tombolo_tests::token_review`]).

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use tombolo_tests::capability::require_netns;
use tombolo_tests::mesh::{Layout, Mesh, http_get};
use tombolo_tests::process::ProcessSpec;
use tombolo_tests::scenario::{application, flag, metric};
use tombolo_tests::token_review::{Issued, TokenReviewServer};

const AUDIENCE: &str = "tombolo.dev/acme.example";
const ID: &str = "spiffe://acme.example/cluster/west/ns/shop/sa/web";
const GOOD: &str = "good.shop.web";

const POLICIES: &str = "
apiVersion: tombolo.dev/v1alpha1
kind: JoinPolicy
metadata: { name: pods }
spec: { serviceAccounts: { namespaces: [ bank ] } }
---
apiVersion: tombolo.dev/v1alpha1
kind: JoinPolicy
metadata: { name: databases }
spec: { machines: { names: [ \"db-*\" ], groups: [ databases ] }, services: [ \"shop/db-*\" ] }
";

/// West, whose federator asks an API server about tokens, and what pods are told.
struct Kubernetes {
    mesh: Mesh,
    server: TokenReviewServer,
    pods_token: PathBuf,
}

fn issued(account: &'static str, pod: &'static str) -> Issued {
    Issued { account, audience: AUDIENCE.into(), expired: false, pod }
}

impl Kubernetes {
    fn start() -> Result<Self> {
        let mut mesh = Mesh::start(&Layout { clusters: &["west"], gateways: 1, ..Layout::default() })?;
        let west = mesh.cluster("west")?;
        let server = TokenReviewServer::start(&west.namespace, west.address(2, 6443))?;
        let federator = west.address(1, 7443).to_string();
        let kubeconfig = server.kubeconfig(&mesh.path("west/kubernetes"))?.display().to_string();
        mesh.federator_with("west", &["--kubernetes", &kubeconfig])?;
        let pods_token = mesh.path("west/pods.token");
        std::fs::write(&pods_token, mesh.operate("west", &["token", "pods", "--federator", &federator])?)?;
        let web = issued("shop:web", "web-0");
        server.issue(GOOD, web.clone());
        server.issue("expired.shop.web", Issued { expired: true, ..web.clone() });
        server.issue("other.shop.web", Issued { audience: "https://kubernetes".into(), ..web.clone() });
        server.issue("unbound.shop.web", Issued { pod: "", ..web });
        Ok(Self { mesh, server, pods_token })
    }

    /// A sidecar on host 21, as the pod that `token` is of.
    fn pod(&self, name: &str, token: &Path, more: &[String]) -> Result<ProcessSpec> {
        let west = self.mesh.cluster("west")?;
        let (overlay, admin) = (west.address(21, 7442).to_string(), west.address(21, 7445).to_string());
        let state = self.mesh.state("west", name).display().to_string();
        let (pods, token) = (self.pods_token.display().to_string(), token.display().to_string());
        let args =
            ["sidecar", "--name", "web", "--join-token-file", &pods, "--service-account-token", &token];
        let args = [&args[..], &["--state-dir", &state, "--bind", &overlay, "--announce", &overlay]].concat();
        let args = [&args[..], &["--admin", &admin]].concat();
        Ok(self.mesh.spec("west", name, &args)?.args(more))
    }

    fn refused_with(&self, name: &str, token: &str) -> Result<String> {
        let file = self.mesh.path(&format!("west/{name}.sa"));
        std::fs::write(&file, token)?;
        let upstream = flag("--upstream", "web", 80, self.mesh.cluster("west")?.address(21, 9081));
        let run = self.pod(name, &file, &upstream)?.run(&self.mesh.logs()?, Duration::from_secs(20));
        match run {
            Ok(output) => anyhow::bail!("{name}: {token:?} was accepted: {output}"),
            Err(error) => Ok(format!("{error:#}")),
        }
    }
}

fn served(mesh: &Mesh, web: SocketAddr) -> Result<Duration> {
    mesh.eventually("the pod serves", Duration::from_secs(15), |mesh| {
        let answer = http_get(&mesh.cluster("west")?.namespace, web, "/")?;
        ensure!(answer.contains("the pod"), "{answer}");
        Ok(())
    })
}

#[test]
fn a_pod_joins_as_its_service_account_serves_and_joins_anew_when_it_is_started_anew() -> Result<()> {
    let test = "a_pod_joins_as_its_service_account_serves_and_joins_anew_when_it_is_started_anew";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut k8s = Kubernetes::start()?;
    let token = k8s.mesh.path("west/projected");
    std::fs::write(&token, format!("{GOOD}\n"))?;
    let app = k8s.mesh.cluster("west")?.address(21, 8080);
    application(&mut k8s.mesh, "west", "app", app, "the pod")?;
    let serves = flag("--service", "web", 80, app);
    let pod = k8s.pod("pod", &token, &serves)?;
    k8s.mesh.spawn("west/pod", pod)?;
    k8s.mesh.ready("west", 21, "pod")?;
    // Host 22: the first one is the pod's.
    let web = k8s.mesh.cluster("west")?.address(22, 9080);
    k8s.mesh.skip_host("west")?;
    k8s.mesh.sidecar("west", "client", &flag("--upstream", "web", 80, web))?;
    served(&k8s.mesh, web)?;
    let log = k8s.mesh.operate("west", &["audit", "--action", "join", "--identity", ID, "-o", "json"])?;
    ensure!(log.contains("pod pod-web-0 by its service account"), "{log}");
    ensure!(k8s.server.asked() == 1, "{}", k8s.server.asked());
    // The container is started anew and has lost its state; its token was replaced meanwhile.
    k8s.mesh.process_mut("west/pod")?.kill()?;
    std::fs::remove_dir_all(k8s.mesh.state("west", "pod"))?;
    k8s.server.issue("newer.shop.web", issued("shop:web", "web-0"));
    std::fs::write(&token, "newer.shop.web")?;
    k8s.mesh.restart("west/pod")?;
    k8s.mesh.ready("west", 21, "pod")?;
    println!("joined anew and serves after {:?}", served(&k8s.mesh, web)?);
    ensure!(k8s.server.asked() == 2, "{}", k8s.server.asked());
    // With its state it needs no API server.
    k8s.mesh.process_mut("west/pod")?.kill()?;
    k8s.mesh.restart("west/pod")?;
    k8s.mesh.ready("west", 21, "pod")?;
    ensure!(k8s.server.asked() == 2, "{}", k8s.server.asked());
    Ok(())
}

#[test]
fn a_join_policy_says_which_service_accounts_and_machines_may_join() -> Result<()> {
    let test = "a_join_policy_says_which_service_accounts_and_machines_may_join";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let k8s = Kubernetes::start()?;
    k8s.mesh.apply("west", POLICIES)?;
    let words = k8s.refused_with("selected", GOOD)?;
    println!("{}", words.lines().last().unwrap_or_default());
    for said in ["no JoinPolicy lets shop/web join", "pods: namespace bank", "spec.serviceAccounts"] {
        ensure!(words.contains(said), "{said:?} is missing: {words}");
    }
    let refused = |args: &[&str]| match k8s.mesh.operate("west", args) {
        Ok(output) => anyhow::bail!("{args:?} worked: {output}"),
        Err(error) => Ok(format!("{error:#}")),
    };
    let words = refused(&["vm", "token", "db-1"])?;
    println!("{}", words.trim());
    ensure!(words.contains("databases: name db-*, group databases") && words.contains("--group"), "{words}");
    ensure!(!words.contains("as root"), "more rights would not help: {words}");
    let words = refused(&["vm", "token", "web-1", "--group", "databases"])?;
    ensure!(words.contains("machine \"web-1\" of group \"databases\""), "{words}");
    let token = k8s.mesh.operate("west", &["vm", "token", "db-1", "--group", "databases"])?;
    ensure!(token.starts_with("tombolo-join-1."), "{token}");
    let log =
        k8s.mesh.operate("west", &["audit", "--action", "token", "--identity", "db-1", "-o", "json"])?;
    ensure!(log.contains("group databases"), "{log}");
    // The policy goes, and the pod's service account joins.
    k8s.mesh.operate("west", &["delete", "joinpolicy", "pods", "--yes"])?;
    let shown = k8s.mesh.operate("west", &["get", "joinpolicies", "-o", "wide"])?;
    ensure!(shown.contains("machines db-*") && !shown.contains("bank"), "{shown}");
    Ok(())
}

#[test]
fn no_other_token_lets_a_pod_in_and_each_is_told_why() -> Result<()> {
    let test = "no_other_token_lets_a_pod_in_and_each_is_told_why";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let k8s = Kubernetes::start()?;
    for (name, token, said) in [
        ("expired", "expired.shop.web", "service account token has expired"),
        ("audience", "other.shop.web", "invalid for the target audiences"),
        ("unbound", "unbound.shop.web", "bound to no pod"),
        ("unknown", "made.up.token", "(invalid bearer token)"),
        ("noise", "noise", "5 bytes are no service account token"),
        ("nothing", "", "0 bytes are no service account token"),
    ] {
        let words = k8s.refused_with(name, token)?;
        println!("{name}: {}", words.lines().last().unwrap_or_default());
        ensure!(words.contains(said), "{name}: {said:?} is missing: {words}");
    }
    let asked = k8s.server.asked();
    ensure!(asked == 4, "what is no token is not asked about: {asked}");
    let metrics = k8s.mesh.metrics("west", 1)?;
    let denied =
        metric(&metrics, "tombolo_federator_requests_total", &["call=\"join_pod\"", "result=\"denied\""]);
    ensure!(denied == 6.0, "{metrics}");
    let audit = |k8s: &Kubernetes| -> Result<String> {
        k8s.mesh.operate("west", &["audit", "--action", "join", "--outcome", "refused", "-o", "json"])
    };
    k8s.mesh.eventually("refusals are in the audit log", Duration::from_secs(5), |_| {
        let log = audit(&k8s)?;
        for kind in ["not_bound", "unauthenticated", "no_token"] {
            ensure!(log.contains(&format!("service account: {kind}")), "{kind}: {log}");
        }
        Ok(())
    })?;
    // The API server goes away.
    let Kubernetes { mesh, server, pods_token } = k8s;
    let west = mesh.cluster("west")?;
    let other = TokenReviewServer::start(&west.namespace, west.address(2, 6444))?;
    drop(server);
    let k8s = Kubernetes { mesh, server: other, pods_token };
    let words = k8s.refused_with("down", GOOD)?;
    ensure!(words.contains("can\'t be asked now") && words.contains("try again"), "{words}");
    println!("down: {}", words.lines().last().unwrap_or_default());
    Ok(())
}
