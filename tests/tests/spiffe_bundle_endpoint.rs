//! The bundle endpoint as go-spiffe's federation package fetches it, in both profiles.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rcgen::{CertificateParams, KeyPair, SanType};
use serde_json::Value;
use tombolo_tests::capability::require_netns;
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::spiffe_probe::{Probe, require_probe};

const PATIENCE: Duration = Duration::from_secs(15);
const FEDERATOR: &str = "spiffe://acme.example/cluster/east/federator";

/// Fetches east's bundle from west's network; `peer` empty: by the web's rules.
fn fetch(mesh: &Mesh, probe: &Probe, peer: &str, roots: &str) -> Result<Value> {
    let url = format!("https://{}/", mesh.cluster("east")?.address(1, 8443));
    let args = ["bundle", "-url", &url, "-domain", "acme.example", "-peer", peer, "-roots", roots];
    probe.run(&mesh.cluster("west")?.namespace, &args)
}

/// The sequence number of a bundle with so many JWT keys.
fn sequence(mesh: &Mesh, probe: &Probe, peer: &str, roots: &str, jwt_keys: u64) -> Result<u64> {
    let fetched = || -> Result<Value> {
        let fetched = fetch(mesh, probe, peer, roots)?;
        ensure!(
            fetched["x509"] == 1 && fetched["jwt"] == jwt_keys && fetched["hintSeconds"] == 300.0,
            "{fetched}"
        );
        Ok(fetched)
    };
    mesh.eventually("the bundle is there", PATIENCE, |_| fetched().map(drop))?;
    fetched()?["sequence"].as_u64().context("no sequence")
}

#[test]
fn go_spiffe_fetches_the_bundle_by_the_svid_and_by_a_web_certificate() -> Result<()> {
    let test = "go_spiffe_fetches_the_bundle_by_the_svid_and_by_a_web_certificate";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let Some(probe) = require_probe(test) else { return Ok(()) };
    let probe = probe?;
    let mut mesh = Mesh::start(&Layout { gateways: 1, ..Layout::default() })?;
    let root = mesh.path("trust/root.crt").display().to_string();
    ensure!(fetch(&mesh, &probe, FEDERATOR, &root).is_err(), "it is off unless asked for");

    let address = mesh.cluster("east")?.address(1, 8443).to_string();
    mesh.federator_with("east", &["--bundle-endpoint", &address])?;
    let first = sequence(&mesh, &probe, FEDERATOR, &root, 2)?;
    let other = FEDERATOR.replace("east", "west");
    ensure!(fetch(&mesh, &probe, &other, &root).is_err(), "another identity than the agreed one is believed");
    mesh.federator_with("east", &["--bundle-endpoint", &address])?;
    let again = sequence(&mesh, &probe, FEDERATOR, &root, 2)?;
    ensure!(again == first, "the same content has another number after a restart: {first}, {again}");
    mesh.operate("east", &["unlink", "west", "--yes"])?;
    let fewer = sequence(&mesh, &probe, FEDERATOR, &root, 1)?;
    ensure!(fewer > first, "a change has no higher number: {first}, {fewer}");

    // The operator's own certificate.
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::IpAddress(mesh.cluster("east")?.address(1, 0).ip())];
    let [certificate, key_file] = ["web.crt", "web.key"].map(|name| mesh.path(name).display().to_string());
    std::fs::write(&certificate, params.self_signed(&key)?.pem())?;
    std::fs::write(&key_file, key.serialize_pem())?;
    let web = ["--bundle-endpoint-certificate", &certificate, "--bundle-endpoint-key", &key_file];
    mesh.federator_with("east", &[&["--bundle-endpoint", &address][..], &web].concat())?;
    ensure!(sequence(&mesh, &probe, "", &certificate, 1)? == fewer);
    ensure!(fetch(&mesh, &probe, FEDERATOR, &root).is_err(), "a web certificate is taken for an SVID");
    Ok(())
}
