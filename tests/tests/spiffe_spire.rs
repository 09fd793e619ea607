//! A SPIRE server as a foreign trust domain, in both directions: each fetches the other's bundle by `https_spiffe`, and
//! applications on go-spiffe, one behind our sidecar and one behind SPIRE's agent, authenticate each other by it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tombolo_tests::capability::require_netns;
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::process::ProcessSpec;
use tombolo_tests::scenario::metric;
use tombolo_tests::spiffe_probe::{Probe, require_probe};
use tombolo_tests::spire::{Place, Spire, require_spire};

/// SPIRE looks for new relationships every 10 s, and its agents for new entries every 5 s.
const PATIENCE: Duration = Duration::from_secs(40);
const WEB: &str = "spiffe://acme.example/cluster/east/ns/shop/sa/web";
const CART: &str = "spiffe://partner.example/cart";
const FEDERATOR: &str = "spiffe://acme.example/cluster/east/federator";

fn federation(mesh: &Mesh, first: &Value) -> Result<String> {
    let object = serde_json::json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "TrustDomainFederation", "metadata": { "name": "partner" },
        "spec": {
            "trustDomain": "partner.example",
            "bundleEndpointURL": format!("https://{}/", mesh.cluster("east")?.address(40, 8443)),
            "bundleEndpointProfile": { "type": "https_spiffe", "endpointSPIFFEID": "spiffe://partner.example/spire/server" },
            "trustDomainBundle": first.to_string(),
            "workloads": { "namespaces": ["shop"] },
        },
    });
    Ok(object.to_string())
}

fn policy(identity: &str) -> String {
    serde_json::json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "AccessPolicy", "metadata": { "name": "partners", "namespace": "shop" },
        "spec": { "action": "ALLOW", "rules": [{ "from": [{ "identities": [identity] }] }] },
    })
    .to_string()
}

/// The line of `tombolo status` about the partner.
fn status(mesh: &Mesh) -> Result<Value> {
    let status = mesh.status("east")?;
    Ok(status["federations"].as_array().and_then(|all| all.first()).cloned().unwrap_or_default())
}

fn run(mesh: &Mesh, probe: &Probe, args: &[&str]) -> Result<Value> {
    probe.run(&mesh.cluster("east")?.namespace, args)
}

fn call(mesh: &Mesh, probe: &Probe, socket: &str, port: u16, peer: &str) -> Result<Value> {
    let address = mesh.cluster("east")?.address(30, port).to_string();
    run(mesh, probe, &["call", "-socket", socket, "-address", &address, "-peer", peer])
}

/// What the socket makes of a token for `shop`.
fn judged(mesh: &Mesh, probe: &Probe, socket: &str, token: &str) -> Result<Value> {
    run(mesh, probe, &["validate", "-socket", socket, "-token", token, "-audience", "shop"])
}

fn token(mesh: &Mesh, probe: &Probe, socket: &str) -> Result<String> {
    let token = run(mesh, probe, &["jwt", "-socket", socket, "-audience", "shop"])?;
    Ok(token["token"].as_str().context("no token")?.to_owned())
}

#[test]
fn a_spire_trust_domain_and_ours_believe_each_other_for_what_is_named_and_no_longer() -> Result<()> {
    let test = "a_spire_trust_domain_and_ours_believe_each_other_for_what_is_named_and_no_longer";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let Some(bin) = require_spire(test) else { return Ok(()) };
    let Some(probe) = require_probe(test) else { return Ok(()) };
    let probe = probe?;
    let mut mesh = Mesh::start(&Layout { clusters: &["east"], gateways: 1, ..Layout::default() })?;
    let endpoint = mesh.cluster("east")?.address(1, 8443).to_string();
    mesh.federator_with("east", &["--bundle-endpoint", &endpoint])?;
    let ours = format!("unix://{}", mesh.path("workload.sock").display());
    let service = format!("shop/web:80={}", mesh.cluster("east")?.address(30, 8080));
    let flags = ["--workload-api", ours.trim_start_matches("unix://"), "--service", &service];
    mesh.sidecar("east", "web", &flags.map(str::to_owned))?;

    // SPIRE knows us by our root and asks our endpoint; we know it by its bundle and ask its endpoint.
    let place = Place { cluster: "east", host: 40 };
    let spire = Spire::start(bin, &mut mesh, place, "partner.example")?;
    let (root, url) = (mesh.path("trust/root.crt").display().to_string(), format!("https://{endpoint}/"));
    let relation = ["federation", "create", "-trustDomain", "acme.example", "-bundleEndpointURL", &url];
    let profile = ["-bundleEndpointProfile", "https_spiffe", "-endpointSpiffeID", FEDERATOR];
    let first = ["-trustDomainBundlePath", &root, "-trustDomainBundleFormat", "pem"];
    spire.operate(&mesh, &[&relation[..], &profile, &first].concat())?;
    let object = federation(&mesh, &spire.bundle(&mesh)?)?;
    mesh.apply("east", &object)?;
    mesh.eventually("SPIRE's bundle is fetched", PATIENCE, |mesh| {
        let status = status(mesh)?;
        ensure!(status["state"] == "fetched" && status["error"] == "" && status["roots"] == 1, "{status}");
        Ok(())
    })?;
    let server = mesh.cluster("east")?.address(40, 8081);
    let theirs = spire.agent(&mut mesh, server, "cart", &["-federatesWith", "spiffe://acme.example"])?;

    // mTLS between the applications, in both directions.
    for (name, port, socket, peer) in [("web", 9443, &ours, CART), ("cart", 9444, &theirs, WEB)] {
        let address = mesh.cluster("east")?.address(30, port).to_string();
        let spec = ProcessSpec::new(name, probe.path())
            .args(["serve", "-socket", socket, "-address", &address, "-peer", peer])
            .within(&mesh.cluster("east")?.namespace);
        mesh.spawn(name, spec)?;
    }
    mesh.eventually("SPIRE's application reaches ours", PATIENCE, |mesh| {
        ensure!(call(mesh, &probe, &theirs, 9443, WEB)?["takenFor"] == CART);
        Ok(())
    })?;
    mesh.eventually("ours reaches SPIRE's", PATIENCE, |mesh| {
        ensure!(call(mesh, &probe, &ours, 9444, CART)?["takenFor"] == WEB);
        Ok(())
    })?;

    // Tokens: ours holds at SPIRE once SPIRE has fetched our keys; SPIRE's here once a policy names whom it is about.
    let (our_token, their_token) = (token(&mesh, &probe, &ours)?, token(&mesh, &probe, &theirs)?);
    mesh.eventually("SPIRE has our JWT keys from our endpoint", PATIENCE, |mesh| {
        let judged = judged(mesh, &probe, &theirs, &our_token)?;
        ensure!(judged["bundles"] == WEB && judged["api"] == WEB, "{judged}");
        Ok(())
    })?;
    let unnamed = judged(&mesh, &probe, &ours, &their_token)?;
    ensure!(unnamed["bundles"] == CART && unnamed["apiError"] == "PermissionDenied", "{unnamed}");
    for (identity, admitted) in
        [("spiffe://partner.example/other", false), ("spiffe://partner.example/*", true)]
    {
        mesh.apply("east", &policy(identity))?;
        mesh.eventually("the policy holds", PATIENCE, |mesh| {
            let judged = judged(mesh, &probe, &ours, &their_token)?;
            ensure!((judged["api"] == CART) == admitted, "{identity}: {judged}");
            Ok(())
        })?;
    }

    // SPIRE away, and a restart of ours: what is known stays, and the operator is told.
    mesh.process_mut("spire-server")?.stop()?;
    mesh.federator_with("east", &["--bundle-endpoint", &endpoint])?;
    mesh.eventually("the failure is shown", PATIENCE, |mesh| {
        let status = status(mesh)?;
        let said = status["error"].as_str().unwrap_or_default();
        ensure!(status["state"] == "fetched" && said.contains("can't be reached"), "{status}");
        let metrics = mesh.metrics("east", 1)?;
        let failed = [("trust_domain=\"partner.example\""), ("result=\"connect\"")];
        ensure!(metric(&metrics, "tombolo_federator_foreign_bundle_fetches_total", &failed) >= 1.0);
        ensure!(metric(&metrics, "tombolo_federator_foreign_bundle_roots", &failed[..1]) == 1.0);
        Ok(())
    })?;
    let described = mesh.operate("east", &["describe", "trustdomainfederation", "partner"])?;
    ensure!(described.contains("BundleFetched") && described.contains("FetchFailed"), "{described}");
    ensure!(
        call(&mesh, &probe, &theirs, 9443, WEB)?["takenFor"] == CART,
        "a fact was lost with the endpoint"
    );
    mesh.restart("spire-server")?;
    spire.ready(&mesh)?;
    mesh.eventually("it is fetched again", PATIENCE, |mesh| {
        let status = status(mesh)?;
        ensure!(status["error"] == "", "{status}");
        Ok(())
    })?;

    // Taken back.
    mesh.operate("east", &["delete", "trustdomainfederation", "partner", "--yes"])?;
    mesh.eventually("SPIRE's application is refused", PATIENCE, |mesh| {
        ensure!(call(mesh, &probe, &theirs, 9443, WEB).is_err(), "it is still answered");
        let judged = judged(mesh, &probe, &ours, &their_token)?;
        ensure!(judged["apiError"] == "InvalidArgument" && judged.get("bundlesError").is_some(), "{judged}");
        Ok(())
    })?;
    let audit = mesh.operate("east", &["audit", "--action", "federation", "-o", "json"])?;
    for said in ["trust-domain:partner.example", "applied", "1 roots", "deleted"] {
        ensure!(audit.contains(said), "{said}: {audit}");
    }
    Ok(())
}

/// SPIRE of the same trust domain certifies east's key as a downstream CA, the root binds it to east, and applications of
/// both, one behind our sidecar and one behind SPIRE's agent, are one trust domain; while the mesh takes nobody's word but the root's.
#[test]
fn spire_is_the_upstream_authority_of_a_cluster_for_applications_and_nobody_for_the_mesh() -> Result<()> {
    let test = "spire_is_the_upstream_authority_of_a_cluster_for_applications_and_nobody_for_the_mesh";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let Some(bin) = require_spire(test) else { return Ok(()) };
    let Some(probe) = require_probe(test) else { return Ok(()) };
    let probe = probe?;
    let mut mesh = Mesh::start(&Layout { gateways: 1, ..Layout::default() })?;
    let ours = format!("unix://{}", mesh.path("workload.sock").display());
    mesh.sidecar("east", "web", &["--workload-api", ours.trim_start_matches("unix://")].map(str::to_owned))?;

    let place = Place { cluster: "east", host: 40 };
    let spire = Spire::start(bin, &mut mesh, place, "acme.example")?;
    let server = mesh.cluster("east")?.address(40, 8081);
    let theirs = spire.agent(&mut mesh, server, "cart", &["-downstream"])?;
    let cart = "spiffe://acme.example/cart";
    let address = mesh.cluster("east")?.address(30, 9443).to_string();
    let spec = ProcessSpec::new("cart", probe.path())
        .args(["serve", "-socket", &theirs, "-address", &address, "-peer", WEB])
        .within(&mesh.cluster("east")?.namespace);
    mesh.spawn("cart", spec)?;
    ensure!(
        call(&mesh, &probe, &ours, 9443, cart).is_err(),
        "strangers of one trust domain believe each other"
    );

    // The key stays where it is: its request goes to SPIRE, what SPIRE signs to the root, and the root's word back.
    let (trust, root) = (mesh.path("east/trust"), mesh.path("trust").display().to_string());
    let place = trust.display().to_string();
    mesh.tombolo(&["trust", "csr", "east", "--out", &place])?;
    let csr = trust.join("ca.csr");
    let sign = |mesh: &Mesh| spire.sign_downstream(mesh, (&theirs, server), "cart", &csr);
    mesh.eventually("SPIRE signs the request", PATIENCE, |mesh| sign(mesh).map(drop))?;
    let (chain, roots) = sign(&mesh)?;
    let files = ["--certificate", &chain.display().to_string(), "--authority", &roots.display().to_string()];
    let adopt = ["trust", "adopt", "east", "--dir", &root, "--out", &place];
    ensure!(mesh.tombolo(&[&adopt[..], &files].concat()).is_err(), "a registered cluster is adopted unasked");
    mesh.tombolo(&[&adopt[..], &files, &["--renew"]].concat())?;
    mesh.operate("east", &["trust", "reload", "--renew-leaves", "--wait", "--timeout", "60s"])?;

    // Nothing was restarted, and both sides are one trust domain now.
    mesh.eventually("our application reaches SPIRE's", PATIENCE, |mesh| {
        ensure!(call(mesh, &probe, &ours, 9443, cart)?["takenFor"] == WEB);
        Ok(())
    })?;
    // The link lives on, under the new intermediate, which west believes by the root alone.
    mesh.federator_with("west", &[])?;
    mesh.eventually("west is linked still", PATIENCE, |mesh| {
        let status = mesh.status("west")?;
        ensure!(status["links"][0]["state"] == "connected", "{}", status["links"]);
        Ok(())
    })?;
    Ok(())
}
