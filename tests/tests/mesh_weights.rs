//! One service that a pod, a machine behind NAT and a sidecar in front of two old systems serve together: each gets its
//! share of the calls, of this cluster's callers and of another's.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::capability::require_netns;
use tombolo_tests::captured::{THERE, neighbour};
use tombolo_tests::mesh::{Layout, Mesh, binary, http_get};
use tombolo_tests::netns::Namespace;
use tombolo_tests::process::ProcessSpec;
use tombolo_tests::scenario::{application, entry, export, flag};

const PATIENCE: Duration = Duration::from_secs(30);
const VM_APP: &str = "127.0.0.1:8080";
const CALLS: usize = 400;
const NAMES: [&str; 4] = ["pod", "machine", "old-one", "old-two"];

/// A service `shop/mixed` of one member, with its weight; `what` is where it leads.
fn manifest(name: &str, weight: u32, what: &str) -> String {
    format!(
        "apiVersion: tombolo.dev/v1alpha1
kind: Workload
metadata: {{ name: {name}, namespace: shop }}
spec:
  {what}
      weight: {weight}
      healthCheck: {{ tcp: {{ port: {port} }}, interval: 300ms }}
",
        port = if what.contains("backends") { 80 } else { 8080 }
    )
}

struct Site {
    mesh: Mesh,
    _old: Namespace,
    callers: [(&'static str, SocketAddr); 2],
}

impl Site {
    /// In west: a pod of weight 50, a machine of 30, and a front of 20 that shares its own 3 to 1.
    fn start() -> Result<Self> {
        let mut mesh = Mesh::start(&Layout { gateways: 1, ..Layout::default() })?;
        let app = mesh.cluster("west")?.address(21, 8080);
        application(&mut mesh, "west", "pod-app", app, "pod")?;
        let local = |host: &str| {
            format!(
                "services:\n    - name: mixed\n      ports: [ {{ port: 80, targetPort: 8080, targetHost: {host} }} ]"
            )
        };
        let front = format!(
            "via: front\n  services:\n    - name: mixed\n      ports: [ {{ port: 80 }} ]\n      backends: [ {{ address: \"{THERE}:8081\", weight: 75 }}, {{ address: \"{THERE}:8082\", weight: 25 }} ]"
        );
        let manifests = [
            ("pod", manifest("pod", 50, &local(&app.ip().to_string()))),
            ("vm-1", manifest("vm-1", 30, &local("127.0.0.1"))),
            ("front", manifest("front", 20, &front)),
        ];
        let mut flags = BTreeMap::new();
        for (name, text) in &manifests {
            let path = mesh.path(&format!("{name}.yaml"));
            std::fs::write(&path, text)?;
            flags.insert(*name, vec!["--workload".to_owned(), path.display().to_string()]);
        }
        mesh.sidecar("west", "pod", &flags["pod"])?;
        let machine = mesh.machine("west", "vm-1", &flags["vm-1"])?;
        let app = ProcessSpec::new("vm-app", binary()?)
            .args(["demo-app", "--listen", VM_APP, "--name", "machine"])
            .within(mesh.outside(machine)?);
        mesh.spawn("vm/app", app)?;
        let old = neighbour(&mesh.cluster("west")?.namespace)?;
        for (name, port) in [("old-one", 8081), ("old-two", 8082)] {
            let listen = format!("{THERE}:{port}");
            let spec =
                ProcessSpec::new(name, binary()?).args(["demo-app", "--listen", &listen, "--name", name]);
            mesh.spawn(&format!("old/{name}"), spec.within(&old))?;
        }
        mesh.sidecar("west", "front", &flags["front"])?;
        mesh.apply("west", &export("mixed"))?;
        let callers = [
            ("east", mesh.cluster("east")?.address(21, 9080)),
            ("west", { mesh.cluster("west")?.address(23, 9080) }),
        ];
        for (cluster, listen) in callers {
            mesh.sidecar(cluster, "caller", &flag("--upstream", "mixed", 80, listen))?;
        }
        Ok(Self { mesh, _old: old, callers })
    }

    /// Who answers how many of so many calls.
    fn shares(&self, caller: (&str, SocketAddr), calls: usize) -> Result<BTreeMap<&'static str, usize>> {
        let mut shares = BTreeMap::new();
        for _ in 0..calls {
            let answer = http_get(&self.mesh.cluster(caller.0)?.namespace, caller.1, "/")?;
            let name = NAMES.iter().find(|name| answer.contains(&format!("\"{name}\"")));
            *shares.entry(*name.with_context(|| answer.clone())?).or_insert(0) += 1;
        }
        Ok(shares)
    }

    /// Waits until each of `names` is called, and then holds the shares of [`CALLS`] against the weights: within five
    /// standard deviations, so that one run in a million fails by chance.
    fn shared_out(&self, caller: (&str, SocketAddr), names: &[(&'static str, f64)]) -> Result<()> {
        self.mesh.eventually("each of them is called", PATIENCE, |_| {
            let shares = self.shares(caller, 40)?;
            ensure!(names.iter().all(|(name, _)| shares.contains_key(name)), "{shares:?}");
            Ok(())
        })?;
        let shares = self.shares(caller, CALLS)?;
        println!("{CALLS} calls of {}, weights {names:?}: {shares:?}", caller.0);
        let whole: f64 = names.iter().map(|(_, weight)| weight).sum();
        for (name, weight) in names {
            let share = weight / whole;
            let (mean, spread) = (CALLS as f64 * share, (CALLS as f64 * share * (1.0 - share)).sqrt());
            let found = shares.get(name).copied().unwrap_or_default() as f64;
            ensure!(
                (found - mean).abs() <= 5.0 * spread,
                "{name}: {found}, expected {mean} +- {spread}: {shares:?}"
            );
        }
        Ok(())
    }
}

#[test]
fn a_pod_a_machine_and_old_systems_share_a_service_by_weight_for_callers_of_both_clusters() -> Result<()> {
    let test = "a_pod_a_machine_and_old_systems_share_a_service_by_weight_for_callers_of_both_clusters";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut site = Site::start()?;
    let all = [("pod", 50.0), ("machine", 30.0), ("old-one", 15.0), ("old-two", 5.0)];
    for caller in site.callers {
        site.mesh.eventually("the caller is answered", PATIENCE, |_| site.shares(caller, 1).map(drop))?;
        site.shared_out(caller, &all)?;
    }

    // What the operator sees.
    let status = site.mesh.status("west")?;
    for (id, weight) in [("ns/shop/sa/pod", 50), ("vm/vm-1", 30), ("ns/shop/sa/front", 20)] {
        let id = format!("spiffe://acme.example/cluster/west/{id}");
        let endpoint = entry(&status, "endpoints", "spiffeId", &id)?;
        ensure!(endpoint["weights"]["shop/mixed"] == weight, "{endpoint}");
    }
    let table = site.mesh.operate("west", &["status"])?;
    ensure!(table.contains("shop/mixed (weight 30)"), "{table}");

    // Who is gone leaves its share to the others, by their weights.
    site.mesh.process_mut("west/pod")?.kill()?;
    let left = [("machine", 30.0), ("old-one", 15.0), ("old-two", 5.0)];
    for caller in site.callers {
        site.mesh.eventually("the pod is called no more", PATIENCE, |_| {
            let shares = site.shares(caller, 20)?;
            ensure!(!shares.contains_key("pod"), "{shares:?}");
            Ok(())
        })?;
        site.shared_out(caller, &left)?;
    }
    Ok(())
}
