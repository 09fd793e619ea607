//! A federator over real sockets on 127.0.0.1: members join, watch and report, operators use the admin socket.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic is a test's failure

mod admin;
mod clocks;
mod clones;
mod joining;
mod restart;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use tombolo_federator::core::CoreHandle;
use tombolo_federator::facts::Facts;
use tombolo_federator::role::{BuildError, Federator, FederatorConfig};
use tombolo_identity::authority::{Existing, RootAuthority};
use tombolo_identity::tls;
use tombolo_overlay::cid::Kind;
use tombolo_overlay::member::Member;
use tombolo_overlay::{Limits, Overlay, OverlayConfig, ServerTls};
use tombolo_proto::v1;
use tombolo_proto::v1::admin_client::AdminClient;
use tombolo_proto::v1::config_client::ConfigClient;
use tombolo_runtime::clock;
use tombolo_runtime::drain::{self, DrainTrigger};
use tombolo_runtime::tasks::TaskGroup;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

/// Everything here takes milliseconds; beside other builds on two cores it takes longer.
const PATIENCE: Duration = Duration::from_secs(30);

fn local() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// Directories of one cluster under a root of its own.
struct Home {
    dir: TempDir,
    cluster: &'static str,
}

impl Home {
    fn new(cluster: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let now = clock::since_unix_epoch();
        let mut root =
            RootAuthority::init(&dir.path().join("root"), "acme.example".parse().unwrap(), now).unwrap();
        let material = root.sign_cluster(&cluster.parse().unwrap(), Existing::Refuse, now).unwrap();
        material.save(&dir.path().join("trust")).unwrap();
        Self { dir, cluster }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn config(&self, listen: SocketAddr) -> FederatorConfig {
        config(self.dir.path(), self.cluster, listen)
    }

    fn start(&self) -> Running {
        self.start_at(local())
    }

    fn start_at(&self, listen: SocketAddr) -> Running {
        Running::start(self.config(listen)).unwrap()
    }
}

fn config(dir: &Path, cluster: &str, listen: SocketAddr) -> FederatorConfig {
    FederatorConfig {
        cluster: cluster.parse().unwrap(),
        trust_dir: dir.join("trust"),
        state_dir: dir.join("state"),
        etcd: None,
        etcd_import: false,
        listen,
        advertise: None,
        admin: local(),
        socket: dir.join("run").join("federator.sock"),
        properties: Default::default(),
        audit: Default::default(),
        bundle_endpoint: None,
        kubernetes: None,
        kubernetes_services: None,
        pods: Default::default(),
        inject: None,
        web_roots: Default::default(),
        virtual_ranges: Default::default(),
        names: None,
    }
}

/// A federator with a thread and runtime of its own, as its process has them.
struct Running {
    thread: Option<JoinHandle<()>>,
    trigger: DrainTrigger,
    overlay: SocketAddr,
    socket: PathBuf,
    core: CoreHandle,
}

impl Running {
    fn start(config: FederatorConfig) -> Result<Self, BuildError> {
        let socket = config.socket.clone();
        let (trigger, drain) = drain::channel();
        let (bound, built) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                match Federator::build(config).await {
                    Ok(federator) => {
                        let _ = bound.send(Ok((federator.overlay_addr(), federator.core().clone())));
                        federator.run(drain).await.unwrap();
                    }
                    Err(error) => drop(bound.send(Err(error))),
                }
            });
        });
        let (overlay, core) = built.recv().unwrap()?;
        Ok(Self { thread: Some(thread), trigger, overlay, socket, core })
    }

    /// As on SIGTERM; the store is free afterwards.
    fn stop(mut self) {
        self.trigger.start();
        self.thread.take().unwrap().join().unwrap();
        let Self { core, .. } = self;
        drop(core);
    }

    async fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(connect(&self.socket).await)
    }

    async fn token(&self, role: &str, name: &str) -> String {
        let request = v1::CreateJoinTokenRequest {
            role: role.into(),
            name: name.into(),
            namespace: if role == "sidecar" { "shop".into() } else { String::new() },
            ..Default::default()
        };
        self.admin().await.create_join_token(request).await.unwrap().into_inner().token
    }

    /// The facts, once they are as wanted.
    async fn until(&self, what: &str, wanted: impl Fn(&Facts) -> bool) -> Arc<Facts> {
        let mut facts = self.core.watch();
        match tokio::time::timeout(PATIENCE, facts.wait_for(|facts| wanted(facts))).await {
            Ok(facts) => facts.unwrap().clone(),
            Err(_) => panic!("not within {PATIENCE:?}: {what}"),
        }
    }
}

/// A federator that has just ended frees its store within moments: its core's thread sees the last handle go.
fn start_again(home: &Home, listen: SocketAddr) -> Running {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Running::start(home.config(listen)) {
            Ok(running) => return running,
            Err(BuildError::Store(error)) if error.kind() == "in_use" && Instant::now() < deadline => {
                std::thread::yield_now();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

async fn connect(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://federator").connect_with_connector(connector).await.unwrap()
}

/// A joined member with its overlay, as a sidecar has them.
struct Sidecar {
    member: Member,
    overlay: Overlay,
    _tasks: TaskGroup,
}

impl Sidecar {
    async fn join(token: &str, dir: &Path, name: &str) -> Self {
        Self::of(Member::join(token, dir, Some(name), local()).await.unwrap())
    }

    fn of(member: Member) -> Self {
        let tasks = TaskGroup::new();
        let config = OverlayConfig {
            tag: member.tag(),
            endpoint: member.burn_endpoint().unwrap(),
            keys: member.lease().keys.clone(),
            kind: Kind::Endpoint,
            bind: local(),
            registers: false,
            learns: false,
            server: Some(ServerTls { mesh: tls::mesh_server_config(member.svid()).unwrap(), join: None }),
            svid: None,
            limits: Limits::default(),
        };
        let overlay = Overlay::bind(config, &tasks).unwrap();
        overlay.set_routes(member.first_routes());
        Self { member, overlay, _tasks: tasks }
    }

    /// A client on the live connection, or on a new one as soon as somebody answers.
    async fn client(&self) -> ConfigClient<Channel> {
        let connected = async {
            loop {
                if let Ok(channel) = self.member.connect(&self.overlay).await {
                    return ConfigClient::new(channel);
                }
            }
        };
        tokio::time::timeout(PATIENCE, connected).await.expect("no federator answers")
    }

    fn hello(&self, services: &[&str]) -> v1::SidecarHello {
        let port = v1::ServicePort { port: 80, ..Default::default() };
        let service = |name: &&str| v1::LocalService {
            service: (*name).into(),
            ports: vec![port.clone()],
            ..Default::default()
        };
        v1::SidecarHello {
            endpoint_addresses: vec![self.overlay.local_addr().to_string()],
            endpoints: vec![self.overlay.endpoint_id().value()],
            services: services.iter().map(service).collect(),
            upstreams: services.iter().map(|name| (*name).to_owned()).collect(),
            version: "test".into(),
            lease: Some(self.member.lease().to_wire()),
            ..Default::default()
        }
    }

    async fn watch(&self, services: &[&str]) -> Streaming<v1::SidecarSnapshot> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.client().await.watch_sidecar(self.hello(services)).await {
                Ok(stream) => return stream.into_inner(),
                // The connection's end was not known yet.
                Err(status) if status.code() == tonic::Code::Unknown && Instant::now() < deadline => {
                    self.member.disconnect().await;
                }
                Err(status) => panic!("refused: {status:?}"),
            }
        }
    }

    async fn report(&self, service: &str, healthy: bool) -> Result<u64, tonic::Status> {
        let health = v1::ServiceHealth { service: service.into(), healthy, reason: "asked".into() };
        let report = v1::StatusReport { health: vec![health], ..Default::default() };
        self.client().await.report(report).await.map(|ack| ack.into_inner().acknowledged_shift)
    }
}

/// The next snapshot that is as wanted.
async fn next<T: Clone>(stream: &mut Streaming<T>, what: &str, wanted: impl Fn(&T) -> bool) -> T {
    let found = async {
        loop {
            let snapshot = stream.message().await.unwrap().expect("the stream has ended");
            if wanted(&snapshot) {
                return snapshot;
            }
        }
    };
    tokio::time::timeout(PATIENCE, found).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

#[track_caller]
fn assert_says(text: &str, pieces: &[&str]) {
    for piece in pieces {
        assert!(text.contains(piece), "{piece:?} is missing in {text:?}");
    }
}
