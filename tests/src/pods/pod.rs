//! A pod's task: prepares its network and volumes, runs its containers in order, keeps its status, and takes it down in
//! order when it is deleted. It ends when the pod is gone from the API.

mod prepare;

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tombolo_runtime::tasks::TaskGroup;

use super::container::{Container, Handle};
use super::enter;
use super::images::Program;
use super::network::{Network, Sandbox};
use super::plan::{ContainerPlan, PodPlan, Refusal, plan};
use super::status::{Happened, PodState};
use super::timestamp;
use super::volumes::Volumes;

/// How often what volumes hold is looked at: a kubelet takes up to a minute.
const REFRESH: Duration = Duration::from_secs(5);
/// What has failed for want of an object or the API server is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// The node, for its pods.
pub struct Node {
    pub client: Client,
    pub name: String,
    pub network: Arc<Network>,
    pub dir: PathBuf,
    /// What `hostPath`s are below.
    pub host: PathBuf,
    /// The file of the node's own network namespace.
    pub netns: PathBuf,
    pub programs: BTreeMap<&'static str, PathBuf>,
    /// Nameserver and domain of the cluster.
    pub dns: (IpAddr, String),
    /// Address of the Service `kubernetes`.
    pub api_service: IpAddr,
    pub tasks: TaskGroup,
}

impl Node {
    fn ips(&self) -> Vec<IpAddr> {
        vec![self.network.addresses.node.into(), self.network.addresses.node_v6.into()]
    }

    fn program(&self, program: Program) -> Result<&PathBuf, Refusal> {
        let name = match program {
            Program::Tombolo => "tombolo",
            Program::CoreDns => "coredns",
        };
        self.programs.get(name).ok_or_else(|| Refusal::config(format!("the node has no {name}")))
    }
}

/// Runs one pod; what is told of it later comes by `latest`, which closes when it is gone.
pub async fn run(node: Arc<Node>, latest: watch::Receiver<Pod>) {
    let pod = latest.borrow().clone();
    let namespace = pod.metadata.namespace.clone().unwrap_or_default();
    let name = pod.metadata.name.clone().unwrap_or_default();
    let api = Api::namespaced(node.client.clone(), &namespace);
    let mut task = Task { node, api, name, namespace, latest, handles: Vec::new(), sandbox: None };
    let mut ending = task.latest.clone();
    let grace = tokio::select! {
        never = task.live(&pod) => match never {},
        grace = ended(&mut ending) => grace,
    };
    task.take_down(grace, &mut ending).await;
}

/// How long the pod may take to end, once it is to.
async fn ended(latest: &mut watch::Receiver<Pod>) -> Duration {
    let deleted = latest.wait_for(|pod| pod.metadata.deletion_timestamp.is_some()).await;
    let grace = deleted.ok().and_then(|pod| pod.metadata.deletion_grace_period_seconds);
    Duration::from_secs(grace.and_then(|grace| u64::try_from(grace).ok()).unwrap_or(0))
}

struct Task {
    node: Arc<Node>,
    api: Api<Pod>,
    name: String,
    namespace: String,
    latest: watch::Receiver<Pod>,
    handles: Vec<Handle>,
    sandbox: Option<Sandbox>,
}

/// What a pod's life goes by.
struct Life {
    state: PodState,
    volumes: Volumes,
    happened: mpsc::Receiver<Happened>,
}

impl Task {
    fn dir(&self, pod: &Pod) -> PathBuf {
        self.node.dir.join("pods").join(pod.metadata.uid.clone().unwrap_or_default())
    }

    async fn live(&mut self, pod: &Pod) -> std::convert::Infallible {
        let plan = match plan(pod) {
            Ok(plan) => plan,
            Err(refusal) => {
                self.refuse(pod, &refusal).await;
                return std::future::pending().await;
            }
        };
        let mut state = PodState::new(&plan, self.node.ips(), timestamp());
        loop {
            match self.connect(&plan).await {
                Ok(ips) => break state.ips = ips,
                Err(error) => self.warn(pod, "FailedCreatePodSandBox", &format!("{error:#}")).await,
            }
            tokio::time::sleep(AGAIN).await;
        }
        self.publish(&mut state).await;
        let (events, happened) = mpsc::channel(64);
        let volumes = Volumes::new(
            self.node.client.clone(),
            self.dir(pod).join("volumes"),
            self.node.host.clone(),
            &plan,
        );
        let mut life = Life { state, volumes, happened };
        // The API server's own view has the addresses that variables want.
        let with_ips = |latest: &Pod| latest.status.as_ref().is_some_and(|status| status.pod_ip.is_some());
        let _ = self.latest.wait_for(with_ips).await;
        for (index, container) in plan.init.iter().enumerate() {
            self.start(pod, &plan, (true, index), container, &mut life, &events).await;
            let done = |state: &PodState| {
                let of = state.init.get(index);
                state.over()
                    || of.is_some_and(|of| if container.sidecar { of.started } else { of.over() == Some(0) })
            };
            self.follow(&mut life, done).await;
            if life.state.over() {
                return std::future::pending().await;
            }
        }
        for (index, container) in plan.main.iter().enumerate() {
            self.start(pod, &plan, (false, index), container, &mut life, &events).await;
        }
        self.follow(&mut life, PodState::over).await;
        for handle in self.handles.iter_mut().filter(|handle| handle.sidecar).rev() {
            handle.stop(plan.grace).await;
        }
        self.follow(&mut life, |_| false).await;
        std::future::pending().await
    }

    async fn connect(&mut self, plan: &PodPlan) -> Result<Vec<IpAddr>> {
        if plan.host_network {
            return Ok(self.node.ips());
        }
        let (network, sysctls, ports) =
            (Arc::clone(&self.node.network), plan.sysctls.clone(), plan.host_ports.clone());
        let sandbox = tokio::task::spawn_blocking(move || network.attach(&sysctls, &ports)).await??;
        let addresses = sandbox.addresses();
        self.sandbox = Some(sandbox);
        Ok(addresses)
    }

    /// Starts a container's task, as soon as what it needs is there.
    async fn start(
        &mut self,
        pod: &Pod,
        plan: &PodPlan,
        (init, index): (bool, usize),
        container: &ContainerPlan,
        life: &mut Life,
        events: &mpsc::Sender<Happened>,
    ) {
        let launch = loop {
            let latest = self.latest.borrow().clone();
            match self.prepare(&latest, plan, container, &mut life.volumes).await {
                Ok(launch) => break launch,
                Err(error) => {
                    self.warn(pod, "FailedMount", &format!("container {}: {error:#}", container.name)).await
                }
            }
            tokio::time::sleep(AGAIN).await;
        };
        let running = enter::directory(&self.node.dir, &self.namespace, &self.name);
        let _ = fs::create_dir_all(&running);
        let file = |end: &str| running.join(format!("{}.{end}", container.name));
        let dir = self.node.dir.display().to_string();
        let words = [
            "enter",
            "--dir",
            &dir,
            "--pod",
            &format!("{}/{}", self.namespace, self.name),
            "--container",
            &container.name,
            "--",
        ];
        let (stop, stopped) = watch::channel(None);
        let task = Container {
            init,
            index,
            plan: container.clone(),
            launch,
            files: [self.dir(pod).join(format!("{}.launch", container.name)), file("log"), file("json")],
            enter: std::iter::once("/proc/self/exe").chain(words).map(str::to_owned).collect(),
            address: life.state.ips.first().copied().unwrap_or(IpAddr::from([127, 0, 0, 1])),
            events: events.clone(),
            stop: stopped,
            grace: plan.grace,
        };
        let done = self.node.tasks.spawn("container", task.run());
        self.handles.push(Handle::new(container.sidecar, stop, done));
    }

    /// Takes in what happens until `done`, and publishes it.
    async fn follow(&mut self, life: &mut Life, done: impl Fn(&PodState) -> bool) {
        let mut refresh = tokio::time::interval(REFRESH);
        while !done(&life.state) {
            tokio::select! {
                Some(happened) = life.happened.recv() => {
                    life.state.apply(happened);
                    while let Ok(next) = life.happened.try_recv() {
                        life.state.apply(next);
                    }
                    self.publish(&mut life.state).await;
                }
                _ = refresh.tick(), if life.volumes.live() => {
                    let latest = self.latest.borrow().clone();
                    if let Err(error) = life.volumes.refresh(&latest).await {
                        tracing::debug!(pod = %self.name, "its volumes stay as they are: {error:#}");
                    }
                }
            }
        }
    }

    /// Until the API server has taken it, or the pod is not there any more.
    async fn publish(&self, state: &mut PodState) {
        self.put(json!({ "status": state.value(&timestamp()) })).await;
    }

    async fn put(&self, status: Value) {
        loop {
            let patch = Patch::Strategic(&status);
            match self.api.patch_status(&self.name, &PatchParams::default(), &patch).await {
                Ok(_) => return,
                Err(kube::Error::Api(error)) if error.code < 500 && error.code != 429 => {
                    return tracing::debug!(pod = %self.name, "its status was not taken: {error}");
                }
                Err(error) => tracing::debug!(pod = %self.name, "its status is put again: {error}"),
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn refuse(&self, pod: &Pod, refusal: &Refusal) {
        self.warn(pod, "Failed", &refusal.message).await;
        let waiting = json!({ "waiting": { "reason": refusal.reason, "message": refusal.message } });
        let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
        let status: Vec<Value> = containers
            .map(|of| {
                json!({ "name": of.name, "image": of.image, "imageID": "", "ready": false, "restartCount": 0, "state": waiting })
            })
            .collect();
        self.put(json!({ "status": { "phase": "Pending", "containerStatuses": status } })).await;
    }

    /// An Event; for people, so nothing waits for it to be taken.
    async fn warn(&self, pod: &Pod, reason: &str, message: &str) {
        tracing::warn!(pod = %self.name, namespace = %self.namespace, "{reason}: {message}");
        let events: Api<k8s_openapi::api::core::v1::Event> =
            Api::namespaced(self.node.client.clone(), &self.namespace);
        let event = json!({
            "metadata": { "generateName": format!("{}.", self.name), "namespace": self.namespace },
            "involvedObject": { "apiVersion": "v1", "kind": "Pod", "name": self.name, "namespace": self.namespace, "uid": pod.metadata.uid },
            "type": "Warning", "reason": reason, "message": message, "count": 1,
            "firstTimestamp": timestamp(), "lastTimestamp": timestamp(),
            "source": { "component": "testbed", "host": self.node.name },
        });
        let Ok(event) = serde_json::from_value(event) else { return };
        if let Err(error) = events.create(&Default::default(), &event).await {
            tracing::debug!("an event was not taken: {error}");
        }
    }

    /// Main containers first, sidecars in reverse order after them, then the pod itself.
    async fn take_down(mut self, grace: Duration, latest: &mut watch::Receiver<Pod>) {
        let pod = latest.borrow().clone();
        let (sidecars, main): (Vec<Handle>, Vec<Handle>) =
            self.handles.drain(..).partition(|handle| handle.sidecar);
        let deadline = tokio::time::Instant::now() + grace;
        futures::future::join_all(main.into_iter().map(|mut handle| async move { handle.stop(grace).await }))
            .await;
        for mut handle in sidecars.into_iter().rev() {
            handle.stop(deadline.saturating_duration_since(tokio::time::Instant::now())).await;
        }
        let sandbox = self.sandbox.take();
        let (own, running) = (self.dir(&pod), enter::directory(&self.node.dir, &self.namespace, &self.name));
        // Its logs stay for as long as the testbed does: what a pod said before it was replaced explains failures.
        let ended = enter::ended(&self.node.dir, &self.namespace, &self.name, &timestamp());
        let _ = tokio::task::spawn_blocking(move || {
            drop(sandbox);
            let _ = fs::remove_dir_all(own);
            let _ = fs::rename(running, ended);
        })
        .await;
        let preconditions = Preconditions { uid: pod.metadata.uid.clone(), resource_version: None };
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(preconditions),
            ..DeleteParams::default()
        };
        loop {
            match self.api.delete(&self.name, &params).await {
                Ok(_) => return,
                Err(kube::Error::Api(error)) if error.code < 500 && error.code != 429 => return,
                Err(error) => tracing::debug!(pod = %self.name, "it is deleted again: {error}"),
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
}
