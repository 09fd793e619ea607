//! A federator with as much as a large cluster has: its memory, what it asks of the API server, and how long exports take
//! when everything else is there already. Two real control planes; pods are placed by the real scheduler and called
//! running by kwok, slices are made by Kubernetes' own controller.
//!
//! `TOMBOLO_SCALE_SERVICES=1000` has 5000 pods and 10,000 endpoints, the size that the figures of docs/kubernetes.md are
//! of; without it a tenth, which every run can afford.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_tests::capability::{amount, require_netns};
use tombolo_tests::kube::exporting::exported;
use tombolo_tests::kube::{ControlPlane, Object, condition, require_control_plane};
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::scenario::metric;
use tombolo_tests::times::Times;
use tombolo_tests::usage::{self, Memory};

mod population;

use population::{MCS, NAMESPACES, Population, name, namespace};

const SYSTEM: &str = "tombolo-system";
const MIB: f64 = 1024.0 * 1024.0;
/// A federator with 1000 services, 10,000 endpoints and 5000 pods may have so much.
const MOST_BYTES: u64 = 120_000_000;
/// Beyond what an empty one has: what allocators keep for later, whatever the size, and what a service with ten endpoints takes.
const FIXED_BYTES: u64 = 16_000_000;
const PER_SERVICE_BYTES: u64 = 60_000;
/// Without a write for so long nothing is under way.
const QUIET: Duration = Duration::from_secs(3);
/// What is left of writes is done by then, and a tenth of a second for each service.
const SETTLED: Duration = Duration::from_secs(60);
const EXPORTS: u32 = 50;
const WINDOW: Duration = Duration::from_secs(20);

struct World {
    mesh: Mesh,
    east: ControlPlane,
    west: ControlPlane,
    of: Population,
}

impl World {
    fn planes(&self) -> [(&'static str, &ControlPlane); 2] {
        [("east", &self.east), ("west", &self.west)]
    }

    fn pid(&self, cluster: &str) -> Result<u32> {
        Ok(self.mesh.process(&format!("{cluster}/federator"))?.pid())
    }

    fn memory(&self, cluster: &str, when: &str) -> Result<Memory> {
        let memory = usage::memory(self.pid(cluster)?).context("the federator has ended")?;
        let Memory { rss_bytes, anonymous_bytes, peak_bytes } = memory;
        let mib = |bytes: u64| bytes as f64 / MIB;
        println!(
            "FIGURE {cluster}'s federator {when}: RSS {:.1} MiB, of its own {:.1} MiB, at most {:.1} MiB so far",
            mib(rss_bytes),
            mib(anonymous_bytes),
            mib(peak_bytes),
        );
        Ok(memory)
    }

    fn gauge(&self, cluster: &str, name: &str) -> Result<f64> {
        Ok(metric(&self.mesh.metrics(cluster, 1)?, name, &[]))
    }

    /// Until west has every import with an address, and neither federator has anything left to write.
    fn imported(&self, limit: Duration) -> Result<Duration> {
        let begun = Instant::now();
        loop {
            let usable = (0..NAMESPACES).map(|number| usable(&self.west, number)).sum::<Result<usize>>()?;
            if usable == self.of.services {
                break;
            }
            ensure!(begun.elapsed() < limit, "{usable} of {} imports are usable", self.of.services);
            std::thread::sleep(Duration::from_millis(250));
        }
        Ok(begun.elapsed())
    }

    /// Until nothing is left to write, or being written: only leases are for a while.
    fn settled(&self) -> Result<Duration> {
        let limit = SETTLED + Duration::from_millis(100) * u32::try_from(self.of.services)?;
        let begun = Instant::now();
        loop {
            let (before, waiting) = (self.written()?, self.waiting()?);
            std::thread::sleep(QUIET);
            if waiting == 0.0 && self.written()? == before {
                return Ok(begun.elapsed());
            }
            ensure!(begun.elapsed() < limit, "after {limit:?} {waiting} services wait");
        }
    }

    fn written(&self) -> Result<usize> {
        let of = |plane: &ControlPlane| -> Result<usize> {
            let requests = plane.requests_of_federator()?;
            Ok(requests.iter().filter(|request| request.starts_with("patch ")).count())
        };
        Ok(of(&self.east)? + of(&self.west)?)
    }

    fn waiting(&self) -> Result<f64> {
        let name = "tombolo_federator_kubernetes_waiting_services";
        Ok(self.gauge("east", name)? + self.gauge("west", name)?)
    }

    /// What one federator asks of its API server, and what CPU it takes, while nothing happens.
    fn idle(&self) -> Result<()> {
        let cpu = |cluster| usage::cpu(self.pid(cluster)?).context("the federator has ended");
        for (cluster, plane) in self.planes() {
            let (requests, used) = (plane.requests_of_federator()?.len(), cpu(cluster)?);
            std::thread::sleep(WINDOW);
            let (all, used) = (plane.requests_of_federator()?, cpu(cluster)?.saturating_sub(used));
            let during = all.get(requests..).unwrap_or_default();
            let rate = during.len() as f64 / WINDOW.as_secs_f64();
            let share = 100.0 * used.as_secs_f64() / WINDOW.as_secs_f64();
            println!("FIGURE {cluster}'s federator idle: {rate:.2} API requests/s, {share:.2} % of a core");
            ensure!(rate <= 0.5, "{during:?}");
        }
        Ok(())
    }

    /// From an export in east to an import in west that has an address.
    fn latency(&self) -> Result<()> {
        let mut times = Times::default();
        for number in 0..amount("TOMBOLO_MCS_EXPORTS", EXPORTS) {
            let selector =
                json!({ "app": format!("app-{}", usize::try_from(number)? % self.of.deployments()) });
            let spec = json!({ "ports": [{ "port": 80 }], "selector": selector });
            let name = format!("late-{number}");
            times.push(exported(&self.east.api, &self.west.api, "team-0", &name, &spec)?);
        }
        println!("FIGURE export -> usable import beside {} others: {times}", self.of.services);
        ensure!(times.percentile(0.99) <= Duration::from_secs(1), "{times}");
        Ok(())
    }

    /// What an empty federator has grown by stays within what its services may cost.
    fn within(&self, cluster: &str, empty: Memory, now: Memory) -> Result<()> {
        let grown = now.anonymous_bytes.saturating_sub(empty.anonymous_bytes);
        let services = u64::try_from(self.of.services)?;
        println!(
            "FIGURE {cluster}'s federator: {} bytes per service of ten endpoints beyond an empty one",
            grown / services.max(1)
        );
        let most = FIXED_BYTES + services * PER_SERVICE_BYTES;
        ensure!(grown <= most, "{cluster}: {grown} bytes for {services} services, at most {most}");
        ensure!(now.rss_bytes <= MOST_BYTES, "{cluster}: RSS {} bytes, at most {MOST_BYTES}", now.rss_bytes);
        Ok(())
    }
}

/// Imports of a namespace that have an address and say that they are ready.
fn usable(plane: &ControlPlane, namespace: usize) -> Result<usize> {
    let imports = plane.api.list(&Object::new(MCS, "ServiceImport", &format!("team-{namespace}"), ""))?;
    let usable = |import: &&Value| {
        import["spec"].get("ips").is_some() && condition(import, "Ready").0.starts_with("True")
    };
    Ok(imports.iter().filter(usable).count())
}

/// The Service of the shared sidecars, with two that are ready as far as anybody is told.
fn shared(plane: &ControlPlane) -> Result<()> {
    let metadata = json!({ "name": "tombolo-shared", "namespace": SYSTEM });
    let spec = json!({ "ports": [{ "port": 1 }] });
    plane.api.apply(&json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec }))?;
    let endpoint = |ip: &str| json!({ "addresses": [ip], "conditions": { "ready": true } });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": "tombolo-shared-1", "namespace": SYSTEM,
            "labels": { "kubernetes.io/service-name": "tombolo-shared" },
        },
        "endpoints": [endpoint("10.250.0.1"), endpoint("10.250.0.2")], "ports": [{ "port": 1 }],
    });
    plane.api.apply(&slice).map(drop)
}

#[test]
fn a_federator_of_a_large_cluster_stays_small_and_as_fast_as_an_empty_one() -> Result<()> {
    let test = "a_federator_of_a_large_cluster_stays_small_and_as_fast_as_an_empty_one";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let Some(bin) = require_control_plane(test) else { return Ok(()) };
    let begun = Instant::now();
    let of = Population { services: usize::try_from(amount("TOMBOLO_SCALE_SERVICES", 100))?.max(2) };
    let mut mesh = Mesh::start(&Layout { gateways: 1, ..Layout::default() })?;
    // The dearest kind of link: endpoints cross it.
    mesh.flatten("east", "west")?;
    let east = ControlPlane::start(&bin, &mut mesh, "east")?;
    let west = ControlPlane::start(&bin, &mut mesh, "west")?;
    for plane in [&east, &west] {
        plane.federate_with(
            &mut mesh,
            &["--kubernetes-objects", "--kubernetes-shared", "tombolo-system/tombolo-shared"],
        )?;
        shared(plane)?;
        Population::namespaces(&plane.api)?;
    }
    let mut world = World { mesh, east, west, of };
    world.settled()?;
    let empty = [world.memory("east", "empty")?, world.memory("west", "empty")?];

    world.east.crowd(&bin, &mut world.mesh, of.pods() + 20)?;
    let took = of.settle(&world.east.api)?;
    println!(
        "{} services, {} endpoints, {} pods: ready after {took:?}",
        of.services,
        of.endpoints(),
        of.pods()
    );
    world.memory("east", "with services that it does not export")?;
    let (start, said) = (Instant::now(), of.export(&world.east.api)?);
    world.imported(Duration::from_secs(60 + of.services as u64 / 2))?;
    println!(
        "FIGURE {} exports, made within {said:?}: all usable imports in west {:?} after the first",
        of.services,
        start.elapsed()
    );
    println!("nothing is left to write {:?} later", world.settled()?);
    let full = [world.memory("east", "full")?, world.memory("west", "full")?];
    world.idle()?;
    world.latency()?;
    world.settled()?;
    for cluster in ["east", "west"] {
        world.memory(cluster, "after all of it")?;
        let refused = world.gauge(cluster, "tombolo_federator_kubernetes_refused_objects")?;
        ensure!(refused == 0.0, "{cluster}: {refused} objects are refused");
    }
    // A federator that starts with all of it there.
    world.mesh.process_mut("east/federator")?.stop()?;
    world.mesh.restart("east/federator")?;
    world.mesh.ready("east", 1, "federator")?;
    world.mesh.eventually("the new one leads", SETTLED, |mesh| {
        let leads = metric(&mesh.metrics("east", 1)?, "tombolo_federator_kubernetes_leads", &[]);
        ensure!(leads == 1.0, "it does not lead");
        Ok(())
    })?;
    world.settled()?;
    std::thread::sleep(Duration::from_secs(5));
    world.memory("east", "started anew")?;
    for ((cluster, empty), full) in ["east", "west"].into_iter().zip(empty).zip(full) {
        world.within(cluster, empty, full)?;
    }
    let import = Object::new(MCS, "ServiceImport", &namespace(0), &name(0));
    world.west.api.get(&import)?.context("an import is gone after all")?;
    let World { mut mesh, east, west, .. } = world;
    east.disperse(&mut mesh)?;
    east.stop(&mut mesh)?;
    west.stop(&mut mesh)?;
    println!("all of it took {:?}", begun.elapsed());
    Ok(())
}
