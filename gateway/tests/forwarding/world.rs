//! Two linked clusters, east and west, with real gateways and overlays on loopback; snapshots are handed straight to the
//! data planes, so no federator is needed.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use tombolo_gateway::dataplane::{BoundDataPlane, DataPlane, DataPlaneConfig, DataPlaneHandle};
use tombolo_gateway::tables::Tables;
use tombolo_identity::authority::{Existing, RootAuthority};
use tombolo_identity::issuer::{KeyAndCsr, LEAF_LIFE, LeafIssuer};
use tombolo_identity::{BundleSet, ExpectedPeer, SpiffeId, Svid, SvidHandle, tls};
use tombolo_model::ids::{Block, ClusterTag, EndpointId, Handle, Incarnation};
use tombolo_model::names::ClusterName;
use tombolo_overlay::cid::Kind;
use tombolo_overlay::datagram::StartNumber;
use tombolo_overlay::keys::{ClusterKey, HandleBinding, KeyRing, LinkKey};
use tombolo_overlay::routes::Routes;
use tombolo_overlay::{
    DialTarget, GatewayHop, HandleClass, Inbound, InboundHandle, Limits, Overlay, OverlayConfig,
    PeerConnection, ServerTls,
};
use tombolo_proto::v1;
use tombolo_runtime::clock;
use tombolo_runtime::tasks::TaskGroup;

pub fn web() -> Handle {
    Handle::from_u32(300)
}

/// One cluster.
pub struct Cluster {
    pub name: ClusterName,
    pub tag: ClusterTag,
    issuer: LeafIssuer,
    pub key: ClusterKey,
}

impl Cluster {
    pub fn id(&self, account: &str) -> SpiffeId {
        SpiffeId::workload(&self.issuer.material.trust_domain, &self.name, "shop", account).unwrap()
    }
    pub fn svid(&self, account: &str) -> SvidHandle {
        let key = KeyAndCsr::generate().unwrap();
        let now = clock::since_unix_epoch();
        let leaf = self.issuer.issue(&key.csr_der, &self.id(account), LEAF_LIFE, now).unwrap();
        let bundles = BundleSet::of(self.issuer.material.bundle.clone());
        SvidHandle::new(Svid::new(&key.key_der, leaf.chain, bundles).unwrap())
    }
    pub fn keys(&self, block: u32) -> KeyRing {
        let block = Block::new(block).unwrap();
        KeyRing::derive_now(clock::since_unix_epoch(), |hour| self.key.endpoint_key(block, hour))
    }
}

/// Both clusters.
pub struct World {
    pub east: Cluster,
    pub west: Cluster,
    pub link: LinkKey,
    pub tasks: TaskGroup,
    _dir: tempfile::TempDir,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let now = clock::since_unix_epoch();
        let mut root = RootAuthority::init(dir.path(), "acme.example".parse().unwrap(), now).unwrap();
        let mut cluster = |name: &str| {
            let name: ClusterName = name.parse().unwrap();
            let material = root.sign_cluster(&name, Existing::Refuse, now).unwrap();
            Cluster {
                name,
                tag: material.tag,
                issuer: LeafIssuer::new(material).unwrap(),
                key: ClusterKey::generate(),
            }
        };
        let (east, west) = (cluster("east"), cluster("west"));
        Self { east, west, link: LinkKey::generate(), tasks: TaskGroup::new(), _dir: dir }
    }

    pub fn binding(&self) -> HandleBinding {
        HandleBinding {
            handle: web(),
            importer: self.east.name.clone(),
            service: "shop/web".into(),
            export_uid: [1; 16],
        }
    }

    /// What east's sidecars dial west's web with.
    pub fn target(&self) -> DialTarget {
        let binding = self.binding();
        let keys =
            KeyRing::derive_now(clock::since_unix_epoch(), |hour| self.link.handle_key(&binding, hour));
        DialTarget { kind: Kind::Service, tag: self.west.tag, handle: web(), keys: Arc::new(keys) }
    }

    pub fn overlay(
        &self,
        cluster: &Cluster,
        block: u32,
        incarnation: u8,
        account: &str,
        registers: bool,
    ) -> Overlay {
        let svid = cluster.svid(account);
        let config = OverlayConfig {
            tag: cluster.tag,
            endpoint: Block::new(block).unwrap().endpoint(Incarnation::new(incarnation).unwrap()),
            keys: cluster.keys(block),
            kind: Kind::Endpoint,
            bind: SocketAddr::from(([127, 0, 0, 1], 0)),
            registers,
            learns: false,
            server: Some(ServerTls { mesh: tls::mesh_server_config(&svid).unwrap(), join: None }),
            svid: None,
            limits: Limits::default(),
        };
        let overlay = Overlay::bind(config, &self.tasks).unwrap();
        let handle = InboundHandle {
            class: HandleClass::Mesh,
            importer: Some(self.east.name.clone()),
            service: "shop/web".into(),
        };
        overlay.set_inbound(Inbound { handles: [(web(), handle)].into() });
        overlay
    }

    /// Dials web through what `client` routes by, and the connection as both sides see it.
    pub async fn connect(&self, client: &Overlay, server: &Overlay) -> (PeerConnection, PeerConnection) {
        let svid = self.east.svid("cart");
        let tls = tls::mesh_client_config(&svid, ExpectedPeer::OneOf([self.west.id("web")].into())).unwrap();
        let target = self.target();
        let dial = async {
            for _ in 0..5 {
                match client.dial(&target, Arc::clone(&tls)).await {
                    Ok(connection) => return connection,
                    Err(error) => println!("dialling again: {error}"),
                }
            }
            panic!("web can't be dialled");
        };
        let (dialled, accepted) = tokio::join!(dial, server.accept());
        (dialled, accepted.unwrap())
    }
}

/// One replica.
pub struct Gateway {
    pub name: String,
    pub plane: Option<DataPlane>,
    pub handle: DataPlaneHandle,
    pub border: SocketAddr,
    pub inner: SocketAddr,
}

impl Gateway {
    pub fn start(name: &str) -> Self {
        Self::start_at(name, SocketAddr::from(([127, 0, 0, 1], 0)), SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    pub fn start_at(name: &str, border: SocketAddr, inner: SocketAddr) -> Self {
        let config = DataPlaneConfig {
            border,
            inner,
            workers: NonZeroUsize::new(2).unwrap(),
            start: StartNumber(rand::random()),
        };
        let plane = BoundDataPlane::bind(config).unwrap().start().unwrap();
        Self {
            name: name.into(),
            handle: plane.handle(),
            border: plane.border_addr(),
            inner: plane.inner_addr(),
            plane: Some(plane),
        }
    }

    pub fn hop(&self) -> GatewayHop {
        GatewayHop { name: self.name.clone(), ..GatewayHop::at(self.inner) }
    }
    pub fn replica(&self, address: SocketAddr) -> v1::GatewayReplica {
        v1::GatewayReplica {
            name: self.name.clone(),
            address: address.to_string(),
            balanced: false,
            zone: String::new(),
        }
    }
    /// `kill -9`: sockets close without a word.
    pub fn kill(&mut self) {
        drop(self.plane.take());
    }
    pub fn configure(&self, cluster: &Cluster, snapshot: &v1::GatewaySnapshot) {
        let unix = clock::since_unix_epoch();
        let tables = Tables::parse(snapshot, &cluster.name, cluster.tag, None, unix).unwrap();
        assert_eq!(tables.rejected, []);
        self.handle.set_tables(Arc::new(tables));
        assert!(self.handle.wait_configured(Duration::from_secs(5)));
    }
}

/// What a gateway of `own` is told; handles, endpoints and siblings are added by the test.
pub fn snapshot(
    world: &World,
    own: &Cluster,
    peer: &Cluster,
    peers: Vec<v1::GatewayReplica>,
) -> v1::GatewaySnapshot {
    let importing = own.name == world.east.name;
    let outbound = if importing { vec![world.binding().to_wire()] } else { Vec::new() };
    let link = v1::GatewayLink {
        peer: peer.name.to_string(),
        tag: peer.tag.value(),
        key: world.link.as_bytes().to_vec(),
        gateways: peers,
        outbound,
        self_: false,
    };
    v1::GatewaySnapshot {
        revision: 1,
        cluster: own.name.to_string(),
        tag: own.tag.value(),
        cluster_key: own.key.as_bytes().to_vec(),
        links: vec![link],
        ..Default::default()
    }
}

pub fn at_address(overlay: &Overlay) -> v1::GatewayEndpoint {
    v1::GatewayEndpoint {
        block: overlay.endpoint_id().block().value(),
        address: overlay.local_addr().to_string(),
        ..Default::default()
    }
}

pub fn registering(overlay: &Overlay) -> v1::GatewayEndpoint {
    v1::GatewayEndpoint {
        block: overlay.endpoint_id().block().value(),
        registers: true,
        ..Default::default()
    }
}

/// The handle of web, served by these.
pub fn serving(world: &World, endpoints: &[EndpointId]) -> v1::InboundHandle {
    v1::InboundHandle {
        binding: Some(world.binding().to_wire()),
        class: v1::HandleClass::Service.into(),
        endpoints: endpoints.iter().map(|e| e.value()).collect(),
        initials_per_second: 100,
    }
}

/// Routes of a sidecar that knows these gateways only.
pub fn through(overlay: &Overlay, gateways: &[&Gateway]) {
    let mut routes = Routes::empty(overlay.tag());
    routes.gateways = gateways.iter().map(|g| g.hop()).collect();
    overlay.set_routes(routes);
}

pub async fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if check() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 10 s: {what}");
}

/// Sends `bytes` over a new stream and gets them back.
pub async fn echo(dialled: &PeerConnection, accepted: &PeerConnection, bytes: usize) {
    let body: Vec<u8> = (0..bytes).map(|n| (n % 251) as u8).collect();
    let there = async {
        let (mut send, mut recv) = dialled.quic().open_bi().await.unwrap();
        let upload = async {
            send.write_all(&body).await.unwrap();
            send.finish().unwrap();
        };
        let (_, back) = tokio::join!(upload, recv.read_to_end(bytes + 1));
        assert!(back.unwrap() == body, "what comes back is what was sent");
    };
    let back = async {
        let (mut send, mut recv) = accepted.quic().accept_bi().await.unwrap();
        let received = recv.read_to_end(bytes + 1).await.unwrap();
        send.write_all(&received).await.unwrap();
        send.finish().unwrap();
        let _ = send.stopped().await;
    };
    tokio::time::timeout(Duration::from_secs(30), async { tokio::join!(there, back) })
        .await
        .expect("an echo ends");
}
