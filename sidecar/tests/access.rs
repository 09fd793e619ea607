//! Access policies and drains on real overlays: a served application, callers with identities of their own, policies that come
//! and go while streams are open.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic is a test's failure

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prometheus_client::registry::Registry;
use quinn::{ConnectionError, ReadError};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tombolo_identity::authority::{Existing, RootAuthority};
use tombolo_identity::issuer::{KeyAndCsr, LEAF_LIFE, LeafIssuer};
use tombolo_identity::{BundleSet, ExpectedPeer, SpiffeId, Svid, SvidHandle, tls};
use tombolo_model::ids::{Block, ClusterTag, Handle, Incarnation};
use tombolo_model::names::ClusterName;
use tombolo_model::protocol::Protocol;
use tombolo_overlay::cid::Kind;
use tombolo_overlay::keys::{ClusterKey, HandleBinding, KeyRing, LinkKey};
use tombolo_overlay::{
    DialTarget, HandleClass, Inbound, InboundHandle, Limits, Overlay, OverlayConfig, PeerConnection, Routes,
    ServerTls, close_code,
};
use tombolo_proto::v1;
use tombolo_runtime::tasks::TaskGroup;
use tombolo_runtime::{clock, drain};
use tombolo_sidecar::access::{Access, Admission};
use tombolo_sidecar::agentless::Destination;
use tombolo_sidecar::inbound::{InboundContext, InboundLimits, InboundTask, LocalTarget};
use tombolo_sidecar::metrics::{AccessLabels, Metrics};
use tombolo_sidecar::udp::{UdpContext, UdpLimits};
use tombolo_sidecar::{codes, header};

const HANDLE: Handle = Handle::JOIN; // any number will do without a gateway in between
const SERVICE: &str = "shop/web";
const PATIENCE: Duration = Duration::from_secs(5);

/// One cluster with a sidecar that serves an application which echoes, on ports 80 and 81 of `shop/web`.
struct World {
    issuer: LeafIssuer,
    cluster_key: ClusterKey,
    link_key: LinkKey,
    name: ClusterName,
    tag: ClusterTag,
    server: Option<Overlay>,
    admitted: watch::Sender<Arc<Admission>>,
    /// Where callers are, for the server's answers.
    callers: Mutex<HashMap<Block, SocketAddr>>,
    metrics: Metrics,
    tasks: TaskGroup,
    drain: drain::DrainTrigger,
    _dir: tempfile::TempDir,
}

impl World {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let now = clock::since_unix_epoch();
        let mut root = RootAuthority::init(dir.path(), "acme.example".parse().unwrap(), now).unwrap();
        let name: ClusterName = "east".parse().unwrap();
        let material = root.sign_cluster(&name, Existing::Refuse, now).unwrap();
        let (trigger, drain) = drain::channel();
        let mut world = Self {
            tag: material.tag,
            issuer: LeafIssuer::new(material).unwrap(),
            cluster_key: ClusterKey::generate(),
            link_key: LinkKey::generate(),
            admitted: watch::Sender::new(Arc::new(Admission::nobody(name.clone()))),
            name,
            server: None,
            callers: Mutex::default(),
            metrics: Metrics::register(&mut Registry::default()),
            tasks: TaskGroup::new(),
            drain: trigger,
            _dir: dir,
        };
        let server = world.overlay(1, &world.svid("web"));
        server.set_inbound(world.inbound());
        let app = world.application().await;
        let target = LocalTarget {
            service: SERVICE.parse().unwrap(),
            ports: HashMap::from([
                ((Protocol::Tcp, 80), Destination::Local(app)),
                ((Protocol::Tcp, 81), Destination::Local(app)),
            ]),
            flows: world.metrics.udp.service("inbound", SERVICE),
            metrics: world.metrics.service("inbound", SERVICE),
            leaving: tombolo_sidecar::inbound::Leaving::default(),
        };
        let limits = InboundLimits::default();
        let context = InboundContext {
            limits,
            slots: Arc::new(Semaphore::new(limits.max_app_connections)),
            dialler: tombolo_sidecar::capture::pass::Dialler::plain(),
            udp: UdpContext::new(UdpLimits::default(), None, world.metrics.udp.clone()),
            metrics: world.metrics.clone(),
            drain,
            tasks: world.tasks.clone(),
        };
        let services = HashMap::from([(Arc::from(SERVICE), Arc::new(target))]);
        let services = Arc::new(arc_swap::ArcSwap::from_pointee(services));
        let inbound = InboundTask::new(server.clone(), services, world.admitted.subscribe(), context);
        world.tasks.spawn("inbound", inbound.run());
        world.server = Some(server);
        world.policies(&[]);
        world
    }

    async fn application(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tasks = self.tasks.clone();
        self.tasks.spawn("application", async move {
            while let Ok((mut tcp, _)) = listener.accept().await {
                tasks.spawn("echo", async move {
                    let (mut from, mut to) = tcp.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                    let _ = to.shutdown().await;
                });
            }
        });
        address
    }

    fn svid(&self, account: &str) -> SvidHandle {
        let key = KeyAndCsr::generate().unwrap();
        let id = SpiffeId::workload(&self.issuer.material.trust_domain, &self.name, "shop", account).unwrap();
        let leaf = self.issuer.issue(&key.csr_der, &id, LEAF_LIFE, clock::since_unix_epoch()).unwrap();
        let bundles = BundleSet::of(self.issuer.material.bundle.clone());
        SvidHandle::new(Svid::new(&key.key_der, leaf.chain, bundles).unwrap())
    }

    fn overlay(&self, block: u32, svid: &SvidHandle) -> Overlay {
        let block = Block::new(block).unwrap();
        let keys =
            KeyRing::derive_now(clock::since_unix_epoch(), |h| self.cluster_key.endpoint_key(block, h));
        let config = OverlayConfig {
            tag: self.tag,
            endpoint: block.endpoint(Incarnation::new(0).unwrap()),
            keys,
            kind: Kind::Endpoint,
            bind: SocketAddr::from(([127, 0, 0, 1], 0)),
            registers: false,
            learns: false,
            server: Some(ServerTls { mesh: tls::mesh_server_config(svid).unwrap(), join: None }),
            svid: Some(svid.clone()),
            limits: Limits::default(),
        };
        Overlay::bind(config, &self.tasks).unwrap()
    }

    fn inbound(&self) -> Inbound {
        let importer = Some(self.name.clone());
        let handle = InboundHandle { class: HandleClass::Mesh, importer, service: SERVICE.into() };
        Inbound { handles: [(HANDLE, handle)].into() }
    }

    /// Replaces all policies, as a snapshot does.
    fn policies(&self, policies: &[(&str, Value)]) {
        let policy = |(name, spec): &(&str, Value)| v1::AccessPolicy {
            name: format!("shop/{name}"),
            spec_json: spec.to_string(),
            services: vec![SERVICE.to_owned()],
        };
        let access_policies = policies.iter().map(policy).collect();
        let snapshot = v1::SidecarSnapshot { access_policies, ..Default::default() };
        let (access, rejected) = Access::read(&snapshot, &self.name);
        assert!(rejected.is_empty(), "{rejected:?}");
        let admission = Admission { inbound: Arc::new(self.inbound()), access: Arc::new(access) };
        self.admitted.send_replace(Arc::new(admission));
    }

    /// Every caller so far and this one.
    fn known(&self, caller: &Overlay) -> HashMap<Block, SocketAddr> {
        let mut callers = self.callers.lock().unwrap();
        callers.insert(caller.endpoint_id().block(), caller.local_addr());
        callers.clone()
    }

    /// A connection of a workload of that account.
    async fn caller(&self, block: u32, account: &str) -> Caller {
        let svid = self.svid(account);
        let (overlay, server) = (self.overlay(block, &svid), self.server.as_ref().unwrap());
        let mut routes = Routes::empty(self.tag);
        routes.endpoints = [(server.endpoint_id().block(), server.local_addr())].into();
        routes.services.insert(HANDLE, vec![server.endpoint_id()]);
        overlay.set_routes(routes);
        let binding = HandleBinding {
            handle: HANDLE,
            importer: self.name.clone(),
            service: SERVICE.into(),
            export_uid: [1; 16],
        };
        let keys = KeyRing::derive_now(clock::since_unix_epoch(), |h| self.link_key.handle_key(&binding, h));
        let target = DialTarget { kind: Kind::Service, tag: self.tag, handle: HANDLE, keys: Arc::new(keys) };
        let tls = tls::mesh_client_config(&svid, ExpectedPeer::Any).unwrap();
        let mut routes = Routes::empty(self.tag);
        routes.endpoints = self.known(&overlay);
        server.set_routes(routes);
        Caller { connection: overlay.dial(&target, tls).await.unwrap(), _overlay: overlay }
    }

    fn counted(&self, verdict: &'static str, policy: &str) -> u64 {
        let labels = AccessLabels { service: SERVICE.to_owned(), verdict, policy: policy.to_owned() };
        self.metrics.access.get_or_create(&labels).get()
    }
}

struct Caller {
    connection: PeerConnection,
    _overlay: Overlay,
}

impl Caller {
    async fn open(&self, port: u16) -> Call {
        let (mut send, recv) = self.connection.quic().open_bi().await.unwrap();
        send.write_chunk(header::encode(port)).await.unwrap();
        Call { send, recv }
    }

    /// `Ok` when a word comes back, else the code of the refusal.
    async fn tries(&self, port: u16) -> Result<(), u32> {
        self.open(port).await.echoes().await
    }
}

struct Call {
    send: quinn::SendStream,
    recv: quinn::RecvStream,
}

impl Call {
    async fn echoes(&mut self) -> Result<(), u32> {
        let word = b"hello";
        // A stream that was refused meanwhile can't be written; reading says why.
        let _ = self.send.write_all(word).await;
        let mut answer = [0; 5];
        match tokio::time::timeout(PATIENCE, self.recv.read_exact(&mut answer)).await.expect("an answer") {
            Ok(()) => {
                assert_eq!(&answer, word);
                Ok(())
            }
            Err(quinn::ReadExactError::ReadError(ReadError::Reset(code))) => {
                Err(u32::try_from(code.into_inner()).unwrap())
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Waits for the reset that nobody asked for.
    async fn cut(&mut self) -> u32 {
        match tokio::time::timeout(PATIENCE, self.recv.read_chunk(10, true)).await.expect("a reset") {
            Err(ReadError::Reset(code)) => u32::try_from(code.into_inner()).unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

fn identity(account: &str) -> Value {
    json!([{ "from": [{ "identities": [format!("spiffe://acme.example/cluster/east/ns/shop/sa/{account}")] }] }])
}

fn allow(account: &str) -> Value {
    json!({ "action": "ALLOW", "rules": identity(account) })
}

fn deny(account: &str) -> Value {
    json!({ "action": "DENY", "rules": identity(account) })
}

#[tokio::test]
async fn allow_admits_only_whom_it_names_and_deny_wins() {
    let world = World::start().await;
    let (cart, thief) = (world.caller(2, "cart").await, world.caller(3, "thief").await);
    assert_eq!((cart.tries(80).await, thief.tries(80).await), (Ok(()), Ok(())), "without a policy");
    assert_eq!(world.counted("allowed", "-"), 2);

    world.policies(&[("cart", allow("cart"))]);
    // The thief's connection is closed on the change: it is admitted to nothing.
    let closed = tokio::time::timeout(PATIENCE, thief.connection.closed()).await.unwrap();
    let ConnectionError::ApplicationClosed(close) = &closed else { panic!("{closed}") };
    assert_eq!(close.error_code.into_inner(), u64::from(close_code::NOT_ADMITTED), "{closed}");
    let thief = world.caller(4, "thief").await;
    assert_eq!((cart.tries(80).await, thief.tries(80).await), (Ok(()), Err(codes::DENIED)));
    assert_eq!(thief.tries(99).await, Err(codes::DENIED), "it is not told which ports there are");
    assert_eq!((world.counted("allowed", "shop/cart"), world.counted("denied", "shop/cart")), (1, 2));
    assert!(!thief.connection.is_closed(), "it is refused stream by stream");

    world.policies(&[
        ("cart", allow("cart")),
        ("not-81", json!({ "action": "DENY", "ports": [81], "rules": [{}] })),
    ]);
    assert_eq!((cart.tries(80).await, cart.tries(81).await), (Ok(()), Err(codes::DENIED)), "DENY wins");
    assert_eq!(world.counted("denied", "shop/not-81"), 1);
}

#[tokio::test]
async fn a_change_cuts_open_streams_that_are_no_longer_admitted_and_no_others() {
    let world = World::start().await;
    let (cart, thief) = (world.caller(2, "cart").await, world.caller(3, "thief").await);
    let (mut good, mut bad) = (cart.open(80).await, thief.open(80).await);
    let mut other_port = thief.open(81).await;
    assert_eq!((good.echoes().await, bad.echoes().await), (Ok(()), Ok(())));
    assert_eq!(other_port.echoes().await, Ok(()));

    let mut on_80 = deny("thief");
    on_80["ports"] = json!([80]);
    world.policies(&[("thief", on_80)]);
    assert_eq!(bad.cut().await, codes::CUT_BY_POLICY);
    assert_eq!((good.echoes().await, other_port.echoes().await), (Ok(()), Ok(())));
    assert_eq!(world.counted("cut", "shop/thief"), 1);

    // Admitted to no port at all: the resets come first, then the connection is closed.
    world.policies(&[("thief", deny("thief"))]);
    assert_eq!(other_port.cut().await, codes::CUT_BY_POLICY);
    tokio::time::timeout(PATIENCE, thief.connection.closed()).await.expect("the connection is closed");
    assert_eq!(good.echoes().await, Ok(()));
    assert!(!cart.connection.is_closed());
}

#[tokio::test]
async fn a_drain_that_is_over_cuts_what_is_open_and_still_refuses_what_comes() {
    let world = World::start().await;
    world.policies(&[("cart", allow("cart"))]);
    let cart = world.caller(2, "cart").await;
    let mut open = cart.open(80).await;
    assert_eq!(open.echoes().await, Ok(()));
    world.drain.start();
    assert_eq!(cart.tries(80).await, Err(codes::DRAINING));
    assert_eq!(open.echoes().await, Ok(()), "what is open goes on");
    world.drain.force();
    assert_eq!(open.cut().await, codes::CUT_BY_DRAIN);
    assert_eq!(cart.tries(80).await, Err(codes::DRAINING), "it was never begun: its caller may go elsewhere");
}

#[tokio::test]
async fn a_dry_run_denies_nothing_and_counts_what_it_would() {
    let world = World::start().await;
    let (cart, thief) = (world.caller(2, "cart").await, world.caller(3, "thief").await);
    let mut open = thief.open(80).await;
    assert_eq!(open.echoes().await, Ok(()));
    let mut dry = allow("cart");
    dry["dryRun"] = json!(true);
    world.policies(&[("plan", dry.clone())]);
    assert_eq!((cart.tries(80).await, thief.tries(80).await), (Ok(()), Ok(())));
    assert_eq!(open.echoes().await, Ok(()), "open streams go on");
    assert_eq!((world.counted("would_deny", "shop/plan"), world.counted("denied", "shop/plan")), (1, 0));
    assert_eq!(world.counted("allowed", "-"), 3);

    dry["dryRun"] = json!(false);
    world.policies(&[("plan", dry)]);
    assert_eq!(open.cut().await, codes::CUT_BY_POLICY);
}

#[tokio::test]
async fn nobody_is_served_before_the_policies_of_its_handle_are_known() {
    let world = World::start().await;
    world.admitted.send_replace(Arc::new(Admission::nobody(world.name.clone())));
    let cart = world.caller(2, "cart").await;
    tokio::time::timeout(PATIENCE, cart.connection.closed()).await.expect("the connection is closed");
    world.policies(&[("cart", allow("cart"))]);
    let cart = world.caller(3, "cart").await;
    assert_eq!(cart.tries(80).await, Ok(()));
}
