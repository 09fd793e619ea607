//! The cluster's CRL as OpenSSL reads it: signed by the intermediate, and with it a revoked leaf is refused.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine;
use serde_json::Value;
use tombolo_tests::capability::{require_netns, require_programs};
use tombolo_tests::mesh::{Layout, Mesh};

const PATIENCE: Duration = Duration::from_secs(15);
const WEB: &str = "spiffe://acme.example/cluster/east/ns/shop/sa/web";

/// What a command printed, on either stream, whatever it ended with.
fn said(program: &str, args: &[&str]) -> Result<(bool, String)> {
    let output = Command::new(program).args(args).output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}

/// The leaf that a sidecar holds, as a PEM file.
fn leaf(mesh: &Mesh, name: &str) -> Result<PathBuf> {
    let state: Value = serde_json::from_slice(&std::fs::read(mesh.state("east", name).join("member.json"))?)?;
    let der = hex::decode(state["chain"][0].as_str().context("no chain")?)?;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let path = mesh.path(&format!("{name}.pem"));
    let wrapped = text.as_bytes().chunks(64).map(String::from_utf8_lossy).collect::<Vec<_>>().join("\n");
    std::fs::write(&path, format!("-----BEGIN CERTIFICATE-----\n{wrapped}\n-----END CERTIFICATE-----\n"))?;
    Ok(path)
}

struct World {
    mesh: Mesh,
    ca: String,
    root: String,
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

impl World {
    /// Fetches the list; what OpenSSL says of the leaf with it.
    fn judged(&self, leaf: &Path) -> Result<(bool, String)> {
        let (der, pem) = (text(&self.mesh.path("crl.der")), text(&self.mesh.path("crl.pem")));
        let url = format!("http://{}/crl.der", self.mesh.cluster("east")?.address(1, 7445));
        let fetched =
            self.mesh.cluster("east")?.namespace.run(|| said("curl", &["-sSf", "-o", &der, &url]))??;
        ensure!(fetched.0, "{}", fetched.1);
        let signed = said(
            "openssl",
            &["crl", "-inform", "DER", "-in", &der, "-CAfile", &self.ca, "-verify", "-out", &pem],
        )?;
        ensure!(signed.0 && signed.1.contains("verify OK"), "{}", signed.1);
        let args = ["verify", "-crl_check", "-CAfile", &self.root, "-untrusted", &self.ca, "-CRLfile", &pem];
        said("openssl", &[&args[..], &[&text(leaf)]].concat())
    }
}

#[test]
fn openssl_refuses_a_revoked_leaf_by_the_list_that_the_federator_signs() -> Result<()> {
    let test = "openssl_refuses_a_revoked_leaf_by_the_list_that_the_federator_signs";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let Some(()) = require_programs(test, &["openssl", "curl"]) else { return Ok(()) };
    let mut mesh = Mesh::unlinked(&Layout { clusters: &["east"], gateways: 0, ..Layout::default() })?;
    for name in ["web", "cart"] {
        let socket = text(&mesh.path(&format!("{name}/w.sock")));
        mesh.sidecar("east", name, &["--workload-api".to_owned(), socket])?;
    }
    let (ca, root) = (text(&mesh.path("east/trust/ca.crt")), text(&mesh.path("trust/root.crt")));
    let (web, cart) = (leaf(&mesh, "web")?, leaf(&mesh, "cart")?);
    let world = World { mesh, ca, root };
    let good = |leaf: &Path, wanted: bool| {
        world.mesh.eventually("OpenSSL says so", PATIENCE, |_| {
            let (good, words) = world.judged(leaf)?;
            ensure!(good == wanted && (wanted || words.contains("certificate revoked")), "{words}");
            Ok(())
        })
    };
    good(&web, true)?;
    world.mesh.operate("east", &["revoke", WEB, "--reason", "test", "--yes"])?;
    good(&web, false)?;
    good(&cart, true)?;
    let next = said("openssl", &["crl", "-in", &text(&world.mesh.path("crl.pem")), "-noout", "-nextupdate"])?;
    ensure!(next.1.starts_with("nextUpdate="), "{}", next.1);
    // It is kept over a restart of the federator, and taken back with the revocation.
    let mut world = world;
    world.mesh.process_mut("east/federator")?.kill()?;
    world.mesh.restart("east/federator")?;
    world.mesh.ready("east", 1, "federator")?;
    let good = |leaf: &Path, wanted: bool| {
        world.mesh.eventually("OpenSSL says so", PATIENCE, |_| {
            let (good, words) = world.judged(leaf)?;
            ensure!(good == wanted, "{words}");
            Ok(())
        })
    };
    good(&web, false)?;
    world.mesh.operate("east", &["unrevoke", WEB, "--yes"])?;
    good(&web, true)?;
    Ok(())
}
