//! Multi-Cluster Services between two real Kubernetes API servers, each with a federator of least privilege: the
//! behaviours of the MCS conformance suite that are about API objects (numbers are those of its specs), then what goes
//! wrong in practice, then figures. Clusters are expensive to start, so one test runs every case, each in a namespace of
//! its own, and names all that fail.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tombolo_tests::capability::{amount, require_netns};
use tombolo_tests::cases::Cases;
use tombolo_tests::kube::exporting::exported;
use tombolo_tests::kube::{ControlPlane, Object, require_control_plane};
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::scenario::metric;
use tombolo_tests::times::Times;

mod case;
mod practice;
mod stale;
mod standard;

use case::{Case, MCS, namespace};

struct World {
    mesh: Mesh,
    east: ControlPlane,
    west: ControlPlane,
}

impl World {
    fn case(&self, namespace_name: &str) -> Result<Case<'_>> {
        for at in [&self.east, &self.west] {
            at.api.apply(&namespace(namespace_name))?;
        }
        Ok(Case { east: &self.east, west: &self.west, namespace: namespace_name.to_owned() })
    }

    /// Namespaces that come late and that go with exports in them.
    fn namespaces_that_come_and_go(&self) -> Result<()> {
        let case = Case { east: &self.east, west: &self.west, namespace: "late".to_owned() };
        case.east.api.apply(&namespace("late"))?;
        case.service(case.east, json!({}))?;
        case.export(case.east, json!({}))?;
        case.usable(case.east)?;
        case.gone(case.west)?;
        case.west.api.apply(&namespace("late"))?;
        case.usable(case.west)?;
        case.east.api.delete(&Object::new("v1", "Namespace", "", "late"))?;
        case.gone(case.west)?;
        let left = Object::new("v1", "Namespace", "", "late");
        case.east.api.until(&left, Duration::from_secs(30), |found| {
            ensure!(found.is_none(), "the namespace can't be deleted: {found:?}");
            Ok(())
        })
    }

    /// API servers that go away, with and without the federator.
    fn api_servers_that_restart(&mut self) -> Result<()> {
        let case = self.case("restarts")?;
        case.service(case.east, json!({}))?;
        case.export(case.east, json!({}))?;
        let before = case.usable(case.west)?;
        self.mesh.process_mut("west/apiserver")?.kill()?;
        let case = self.case_in("restarts");
        let other = json!({ "ports": [{ "name": "late", "port": 7 }] });
        case.service(case.east, other)?;
        self.mesh.restart("west/apiserver")?;
        self.west.ready(&self.mesh)?;
        let start = Instant::now();
        let case = self.case_in("restarts");
        let import = Object::new(MCS, "ServiceImport", "restarts", "hello");
        case.west.api.until(&import, Duration::from_secs(60), |found| {
            let found = found.context("the import is gone")?;
            ensure!(found["spec"]["ports"][0]["name"] == "late", "{found}");
            ensure!(found["metadata"]["uid"] == before["metadata"]["uid"], "it was made anew: {found}");
            Ok(())
        })?;
        println!(
            "west's API server was away: what changed meanwhile was there {:?} after it",
            start.elapsed()
        );
        // East's API server and federator go; west keeps what it was told, and so does east's store.
        self.mesh.process_mut("east/apiserver")?.kill()?;
        self.mesh.process_mut("east/federator")?.kill()?;
        self.mesh.restart("east/federator")?;
        self.mesh.ready("east", 1, "federator")?;
        std::thread::sleep(Duration::from_secs(4));
        let kept = self.mesh.operate("east", &["get", "serviceexports", "-n", "restarts", "-o", "name"])?;
        ensure!(kept.contains("hello"), "{kept}");
        let refused =
            self.mesh.operate("east", &["delete", "serviceexport", "hello", "-n", "restarts", "--yes"]);
        let refused = refused.err().context("an export of Kubernetes was deleted here")?.to_string();
        ensure!(refused.contains("kept by this cluster's Kubernetes"), "{refused}");
        let case = self.case_in("restarts");
        let still = case.west.api.get(&import)?.context("west has lost the import")?;
        ensure!(still["metadata"]["uid"] == before["metadata"]["uid"], "it was made anew");
        self.mesh.restart("east/apiserver")?;
        self.east.ready(&self.mesh)?;
        let case = self.case_in("restarts");
        case.unexport(case.east)?;
        case.west.api.until(&import, Duration::from_secs(60), |found| {
            ensure!(found.is_none(), "east does not follow its API server: {found:?}");
            Ok(())
        })
    }

    fn case_in(&self, namespace: &str) -> Case<'_> {
        Case { east: &self.east, west: &self.west, namespace: namespace.to_owned() }
    }

    /// Definitions of a later version stay.
    fn definitions_are_never_downgraded(&self) -> Result<()> {
        let name = "serviceimports.multicluster.x-k8s.io";
        let crd = Object::new("apiextensions.k8s.io/v1", "CustomResourceDefinition", "", name);
        let revision = |revision: &str| json!({ "metadata": { "labels": { "multicluster.x-k8s.io/crd-schema-revision": revision } } });
        self.west.api.merge(&crd, revision("7"))?;
        let said = self.west.install_crds(&self.mesh)?;
        ensure!(said.contains(&format!("{name} left as it is")), "{said}");
        let found = self.west.api.get(&crd)?.context("no definition")?;
        ensure!(found["metadata"]["labels"]["multicluster.x-k8s.io/crd-schema-revision"] == "7", "{found}");
        self.west.api.merge(&crd, revision("0"))
    }

    /// From an export in east to an import in west that has an address.
    fn latency(&self) -> Result<()> {
        let case = self.case("latency")?;
        let mut times = Times::default();
        for n in 0..amount("TOMBOLO_MCS_EXPORTS", 50) {
            let name = format!("svc-{n}");
            let spec = json!({ "ports": [{ "port": 80 }] });
            times.push(exported(&case.east.api, &case.west.api, "latency", &name, &spec)?);
        }
        println!("FIGURE export -> usable import: {times}");
        ensure!(times.percentile(0.99) <= Duration::from_secs(1), "{times}");
        Ok(())
    }

    /// What an operator's metrics say at the end.
    fn metrics(&self) -> Result<()> {
        for cluster in ["east", "west"] {
            let metrics = self.mesh.metrics(cluster, 1)?;
            let steps = |result: &str| {
                metric(
                    &metrics,
                    "tombolo_federator_kubernetes_steps_total",
                    &[&format!("result=\"{result}\"")],
                )
            };
            ensure!(steps("ok") > 100.0 && steps("refused") == 0.0, "{cluster}: {metrics}");
            ensure!(
                metric(&metrics, "tombolo_federator_kubernetes_leads", &[]) == 1.0,
                "{cluster}: {metrics}"
            );
            ensure!(
                metric(&metrics, "tombolo_federator_kubernetes_waiting_services", &[]) == 0.0,
                "{cluster}: {metrics}"
            );
        }
        Ok(())
    }

    /// Nothing happens: what the federator still asks for.
    fn idle(&self) -> Result<()> {
        const WINDOW: Duration = Duration::from_secs(20);
        std::thread::sleep(Duration::from_secs(2));
        let before = self.east.requests_of_federator()?.len();
        std::thread::sleep(WINDOW);
        let requests = self.east.requests_of_federator()?;
        let during = &requests[before..];
        let rate = during.len() as f64 / WINDOW.as_secs_f64();
        println!("FIGURE idle federator: {rate:.2} API requests/s");
        ensure!(rate <= 0.5, "{during:?}");
        Ok(())
    }
}

#[test]
fn services_are_exported_and_imported_between_kubernetes_clusters_as_mcs_has_it() -> Result<()> {
    let test = "services_are_exported_and_imported_between_kubernetes_clusters_as_mcs_has_it";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let Some(bin) = require_control_plane(test) else { return Ok(()) };
    let begun = Instant::now();
    let mut mesh = Mesh::start(&Layout { gateways: 1, ..Layout::default() })?;
    mesh.flatten("east", "west")?;
    let east = ControlPlane::start(&bin, &mut mesh, "east")?;
    let west = ControlPlane::start(&bin, &mut mesh, "west")?;
    east.federate(&mut mesh)?;
    west.federate(&mut mesh)?;
    let mut world = World { mesh, east, west };
    println!("two clusters are ready after {:?}", begun.elapsed());

    let mut cases = Cases::new(begun);
    for (number, (name, check)) in standard::CASES.iter().chain(practice::CASES).enumerate() {
        cases.run(name, || world.case(&format!("mcs-{number}")).and_then(|case| check(&case)));
    }
    cases.run("namespaces come late and go with exports in them", || world.namespaces_that_come_and_go());
    cases.run("definitions are never downgraded", || world.definitions_are_never_downgraded());
    cases.run("an export is usable within a second", || world.latency());
    cases.run("an idle federator leaves the API server alone", || world.idle());
    cases.run("metrics agree", || world.metrics());
    // Before the restarts: an API server that has just started forbids everything until it has read its roles.
    for (cluster, plane) in [("east", &world.east), ("west", &world.west)] {
        cases.run("the federator asks for nothing that it may not", || {
            let forbidden = plane.forbidden_to_federator()?;
            ensure!(forbidden.is_empty(), "{cluster}: {forbidden:?}");
            Ok(())
        });
    }
    cases.run("what a watch has missed for good is read anew", || world.watches_that_are_stale());
    cases.run("API servers restart, with and without the federator", || world.api_servers_that_restart());
    let World { mut mesh, east, west } = world;
    if !cases.all_held() {
        for cluster in ["east", "west"] {
            println!("{}", mesh.process(&format!("{cluster}/federator"))?.tail());
        }
    }
    east.stop(&mut mesh)?;
    west.stop(&mut mesh)?;
    cases.end()
}
