//! What the clusters hold: namespaces, deployments whose pods are placed by the scheduler and called running by kwok, and
//! services that select them.
//!
//! A deployment of ten pods is selected by two services, so that `services` need five times as many pods and have ten
//! times as many endpoints.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_tests::kube::{Api, Object};

pub const MCS: &str = "multicluster.x-k8s.io/v1beta1";
pub const NAMESPACES: usize = 20;
const PODS_OF_A_DEPLOYMENT: usize = 10;
const SERVICES_OF_A_DEPLOYMENT: usize = 2;
/// Requests under way at a time.
const AT_ONCE: usize = 8;
/// Pods that become ready within a second, at least, where the machine has two cores.
const PODS_PER_SECOND: u64 = 10;

/// How much of everything.
#[derive(Clone, Copy, Debug)]
pub struct Population {
    pub services: usize,
}

/// Where a service is.
pub fn namespace(service: usize) -> String {
    format!("team-{}", service / SERVICES_OF_A_DEPLOYMENT % NAMESPACES)
}

pub fn name(service: usize) -> String {
    format!("service-{service}")
}

/// Performs `work` for each number below `count`, several at a time.
pub fn each(count: usize, work: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let work = &work;
        let part = |first: usize| move || (first..count).step_by(AT_ONCE).try_for_each(work);
        let parts: Vec<_> = (0..AT_ONCE).map(|first| scope.spawn(part(first))).collect();
        parts
            .into_iter()
            .try_for_each(|part| part.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?)
    })
}

impl Population {
    pub fn deployments(self) -> usize {
        self.services.div_ceil(SERVICES_OF_A_DEPLOYMENT)
    }

    pub fn pods(self) -> usize {
        self.deployments() * PODS_OF_A_DEPLOYMENT
    }

    pub fn endpoints(self) -> usize {
        self.services * PODS_OF_A_DEPLOYMENT
    }

    pub fn namespaces(api: &Api) -> Result<()> {
        each(NAMESPACES, |number| {
            let name = format!("team-{number}");
            let document = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } });
            api.apply(&document).map(drop)
        })?;
        // Without it no pod is admitted.
        (0..NAMESPACES).try_for_each(|number| {
            let account = Object::new("v1", "ServiceAccount", &format!("team-{number}"), "default");
            api.until(&account, Duration::from_secs(30), |found| found.context("no account").map(drop))
        })
    }

    /// Makes pods and services, and waits until every pod is an endpoint.
    pub fn settle(self, api: &Api) -> Result<Duration> {
        let begun = Instant::now();
        each(self.deployments(), |number| api.create(&deployment(number)).map(drop))?;
        each(self.services, |number| api.create(&service(number)).map(drop))?;
        let limit = Duration::from_secs(60 + self.pods() as u64 / PODS_PER_SECOND);
        loop {
            let ready = (0..NAMESPACES)
                .map(|number| ready_endpoints(api, &format!("team-{number}")))
                .sum::<Result<usize>>()?;
            if ready == self.endpoints() {
                return Ok(begun.elapsed());
            }
            ensure!(begun.elapsed() < limit, "{ready} of {} endpoints are ready", self.endpoints());
            std::thread::sleep(Duration::from_secs(1));
        }
    }

    /// Exports them all; how long it took to say so.
    pub fn export(self, api: &Api) -> Result<Duration> {
        let begun = Instant::now();
        each(self.services, |number| {
            let metadata = json!({ "name": name(number), "namespace": namespace(number) });
            let document = json!({ "apiVersion": MCS, "kind": "ServiceExport", "metadata": metadata });
            api.create(&document).map(drop)
        })?;
        Ok(begun.elapsed())
    }
}

/// Ready endpoints of the slices that Kubernetes' own controller has made.
fn ready_endpoints(api: &Api, namespace: &str) -> Result<usize> {
    let slices = api.list(&Object::new("discovery.k8s.io/v1", "EndpointSlice", namespace, ""))?;
    let own = slices.iter().filter(|slice| {
        slice["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"]
            == "endpointslice-controller.k8s.io"
    });
    let endpoints = own.flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
    Ok(endpoints.filter(|endpoint| endpoint["conditions"]["ready"] == true).count())
}

fn deployment(number: usize) -> Value {
    let app = format!("app-{number}");
    let namespace = namespace(number * SERVICES_OF_A_DEPLOYMENT);
    let port = json!({ "name": "http", "containerPort": 8080 });
    let container = json!({
        "name": "main", "image": format!("registry.example/{app}:1.2.3"), "ports": [port],
        "env": [{ "name": "POD", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } }],
        "resources": { "requests": { "cpu": "10m", "memory": "32Mi" } },
    });
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": app, "namespace": namespace },
        "spec": {
            "replicas": PODS_OF_A_DEPLOYMENT, "selector": { "matchLabels": { "app": app } },
            "template": { "metadata": { "labels": { "app": app } }, "spec": { "containers": [container] } },
        },
    })
}

fn service(number: usize) -> Value {
    let app = format!("app-{}", number / SERVICES_OF_A_DEPLOYMENT);
    let ports = json!([
        { "name": "http", "port": 80, "targetPort": "http", "protocol": "TCP", "appProtocol": "http" },
        { "name": "metrics", "port": 9090, "targetPort": 9090, "protocol": "TCP" },
    ]);
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": name(number), "namespace": namespace(number), "labels": { "app": app } },
        "spec": { "selector": { "app": app }, "ports": ports },
    })
}
